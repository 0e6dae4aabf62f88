//! A container's mounts: the standard ones and those of the request, each parent before what lies below it.

use moxlet_cri::v1;
use oci_spec::runtime::{Mount, MountBuilder};

use super::{ResolvedMount, oci};
use crate::error::{Error, Result};

const MAX_MOUNTS: usize = 1024;

/// An absolute path without empty parts, `.` and `..`; as Kubernetes, a relative one begins at the root.
pub(crate) fn target(path: &str) -> Result<String> {
    let bad = |why: &str| Err(Error::Invalid(format!("container path {path:?} {why}")));
    if path.is_empty() || path.len() > 4095 || path.contains('\0') {
        return bad("is no path");
    }
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty() && *p != ".").collect();
    if parts.contains(&"..") {
        return bad("must not contain ..");
    }
    Ok(format!("/{}", parts.join("/")))
}

fn made(at: &str, kind: &str, source: &str, options: &[&str]) -> Result<Mount> {
    let options: Vec<String> = options.iter().map(|o| (*o).to_owned()).collect();
    oci(MountBuilder::default().destination(at).typ(kind).source(source).options(options).build())
}

/// What every container has, each with its place.
fn standard() -> Result<Vec<(String, Mount)>> {
    let pts = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"];
    let of_kernel: [(&str, &str, &[&str]); 6] = [
        ("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        ("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ("/dev/pts", "devpts", &pts),
        ("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        ("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        ("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
    ];
    of_kernel
        .into_iter()
        .map(|(at, kind, options)| Ok((at.to_owned(), made(at, kind, kind, options)?)))
        .collect()
}

/// All mounts of the container in the order in which they are made.
pub(super) fn all(mounts: &[ResolvedMount]) -> Result<Vec<Mount>> {
    if mounts.len() > MAX_MOUNTS {
        return Err(Error::Invalid(format!("more than {MAX_MOUNTS} mounts")));
    }
    let mut all = standard()?;
    let targets = mounts.iter().map(|m| target(&m.target)).collect::<Result<Vec<_>>>()?;
    if targets.iter().any(|at| at == "/dev") {
        // As containerd: who brings a /dev brings all of it.
        all.retain(|(at, _)| !at.starts_with("/dev/"));
    }
    let ours = all.len();
    for (mount, at) in mounts.iter().zip(targets) {
        if at == "/" {
            return Err(Error::Invalid("a mount on the container's root".to_owned()));
        }
        let access = if mount.read_only { "ro" } else { "rw" };
        if !mount.source_ct.starts_with('/') {
            return Err(Error::Invalid(format!("mount source {:?} is not absolute", mount.source_ct)));
        }
        // No file of a mount is a device of the host's in a CT.
        let mut options = vec![if mount.recursive { "rbind" } else { "bind" }, "rprivate", access, "nodev"];
        if mount.data {
            options.extend(["nosuid", "noexec"]);
        }
        let value = made(&at, "bind", &mount.source_ct, &options)?;
        if let Some(place) = all[..ours].iter().position(|(standard, _)| *standard == at) {
            all[place].1 = value;
        } else {
            all.push((at, value));
        }
    }
    // Stable: of two mounts on one place the later stays the later.
    all.sort_by_key(|(at, _)| at.matches('/').count());
    Ok(all.into_iter().map(|(_, value)| value).collect())
}

/// Paths that are hidden or read-only: the request's, else the default.
pub(super) fn paths(asked: &[String], default: &[&str]) -> Result<Vec<String>> {
    if asked.is_empty() {
        return Ok(default.iter().map(|p| (*p).to_owned()).collect());
    }
    if asked.len() > MAX_MOUNTS {
        return Err(Error::Invalid(format!("more than {MAX_MOUNTS} masked or read-only paths")));
    }
    asked.iter().map(|p| target(p)).collect()
}

/// What of the request no container of a CT can have.
pub(super) fn refuse(config: &v1::ContainerConfig) -> Result<()> {
    if let Some(device) = config.devices.first() {
        return Err(Error::Refused(format!("device {} of the host", device.host_path)));
    }
    if let Some(device) = config.cdi_devices.first() {
        return Err(Error::Refused(format!("CDI device {}", device.name)));
    }
    // CRI: the runtime must refuse what contradicts itself.
    if let Some(mount) = config.mounts.iter().find(|m| m.recursive_read_only && !m.readonly) {
        return Err(Error::Invalid(format!(
            "mount of {}: recursive_read_only without readonly",
            mount.container_path
        )));
    }
    Ok(())
}
