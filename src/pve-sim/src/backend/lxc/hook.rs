//! The pre-start hook of a CT: binds its root and mount points in the monitor's mount namespace, as Proxmox VE's does. Volumes
//! are mounted on the host before.
//!
//! What to mount is in a file beside the CT's config, written before each start. The hook runs in a process of its own
//! (`pve-sim ct-hook DIR ID lxc pre-start`), since liblxc calls it after the monitor has unshared its mount namespace.

use std::{
    fs,
    io::ErrorKind,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags},
    mount::MountFlags,
};

use super::super::{Mount, MountSource};
use crate::{Error, Result, error::io};

const FILE: &str = "mounts.json";
/// The host's id of an unprivileged CT's root.
const ROOT_UID: u32 = 100_000;

/// Writes what the hook will mount.
pub(super) fn write_mounts(dir: &Path, mounts: &[Mount]) -> Result<()> {
    let path = dir.join(FILE);
    let text = serde_json::to_vec(mounts).unwrap_or_default();
    fs::write(&path, text).map_err(io("write", &path))
}

/// The hook.
///
/// # Errors
/// A mount fails; liblxc then gives the start up.
pub fn run(dir: &Path) -> Result<()> {
    let path = dir.join(FILE);
    let text = fs::read(&path).map_err(io("read", &path))?;
    let mounts: Vec<Mount> =
        serde_json::from_slice(&text).map_err(|e| Error::Backend(format!("{}: {e}", path.display())))?;
    let rootfs = dir.join("rootfs");
    for mount in &mounts {
        if mount.target.is_empty() {
            mount_at(mount, &rootfs)?;
        } else {
            let target = make_beneath(&rootfs, &mount.target)?;
            // The descriptor names the directory, whatever becomes of its path.
            mount_at(
                mount,
                &PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), target.as_raw_fd())),
            )?;
        }
    }
    Ok(())
}

fn mount_at(mount: &Mount, target: &Path) -> Result<()> {
    if mount.passthrough {
        return mount_shifted(mount, target);
    }
    let failed = |what| move |e: rustix::io::Errno| io(what, target)(e.into());
    rustix::mount::mount_bind(directory(&mount.source), target).map_err(failed("bind at"))?;
    if mount.read_only {
        // The descriptor's directory lies below the mount, which only a path leads to.
        let path = fs::read_link(target).unwrap_or_else(|_| target.to_path_buf());
        let flags = MountFlags::BIND | MountFlags::RDONLY;
        rustix::mount::mount_remount(&path, flags, "").map_err(|e| io("make read-only", &path)(e.into()))?;
    }
    Ok(())
}

/// The directory of the host that is bound; a volume has been activated before.
fn directory(source: &MountSource) -> &str {
    match source {
        MountSource::Subvolume { path, .. } => path,
        MountSource::Dir(dir) => dir,
    }
}

/// A mount whose ids on disk are ids in the CT: `mount` of util-linux knows how.
fn mount_shifted(mount: &Mount, target: &Path) -> Result<()> {
    let target = target.display().to_string();
    let mut options = vec![format!("X-mount.idmap=u:0:{ROOT_UID}:65536 g:0:{ROOT_UID}:65536"), "bind".into()];
    let source = directory(&mount.source);
    if mount.read_only {
        options.push("ro".into());
    }
    let output = Command::new("/usr/bin/mount")
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .args(["-o", &options.join(","), source, &target])
        .output()
        .map_err(io("run", Path::new("/usr/bin/mount")))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Tool {
        program: "mount".into(),
        args: format!("-o {} {source} {target}", options.join(",")),
        status: output.status.to_string(),
        stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// Makes a directory beneath the CT's root, following no link, and opens it.
fn make_beneath(rootfs: &Path, target: &str) -> Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
    let failed = |e: rustix::io::Errno| io("open", rootfs)(e.into());
    let mut at = rustix::fs::open(rootfs, flags, Mode::empty()).map_err(failed)?;
    // Made as the CT's root: on a mount with shifted ids the host's own root has no id, and cannot make anything.
    let _as_root = FsIds::of_root();
    for part in target.split('/').filter(|p| !p.is_empty()) {
        match rustix::fs::mkdirat(at.as_fd(), part, Mode::from_raw_mode(0o755)) {
            Ok(()) => {}
            Err(e) if std::io::Error::from(e).kind() == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(failed(e)),
        }
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        at = rustix::fs::openat2(at.as_fd(), part, flags, Mode::empty(), resolve).map_err(failed)?;
    }
    Ok(at)
}

/// The file system ids of this thread are those of the CT's root until dropped.
struct FsIds;

impl FsIds {
    fn of_root() -> Self {
        nix::unistd::setfsgid(ROOT_UID.into());
        nix::unistd::setfsuid(ROOT_UID.into());
        Self
    }
}

impl Drop for FsIds {
    fn drop(&mut self) {
        nix::unistd::setfsuid(0.into());
        nix::unistd::setfsgid(0.into());
    }
}
