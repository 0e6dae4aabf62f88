//! All of a container that is made before its start: record, root, mounts, OCI spec.
//!
//! What the host mounts below the pod's directory appears in the running CT (the directory is a shared mount there), so
//! everything of a container is put there: its root at `ctr/<id>/rootfs`, each mount at `mnt/<id>/<n>`.

use std::{
    fs,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use moxlet_cri::{annotations, v1};
use moxlet_ids::ContainerId;
use moxlet_image::{ImageConfig, ImageHold, ImageRecord};
use moxlet_init_proto::CreateRequest;
use moxlet_sandbox::{Limits, POD_DIR_IN_CT, cgroup::ContainerCgroups};
use moxlet_storage::{IdMap, RootOptions};
use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::{
    beneath, containers,
    core::{Container, Core, Sandbox, blocking, now_ns},
    error::{Error, Result},
    ledger::{ContainerRecord, MountRecord},
    sandboxes,
    spec::{self, ResolvedMount, SpecInput},
};

/// Where a container's termination message goes if nobody says.
const MESSAGE_PATH: &str = "/dev/termination-log";

/// What a start needs; in memory only.
pub(crate) struct Pending {
    /// What the init is asked.
    pub(crate) request: CreateRequest,
    /// Limits of the container.
    pub(crate) limits: Limits,
    /// Set from the host between create and start.
    pub(crate) oom_score_adj: Option<i32>,
}

/// The record of a new container and its image, which is held until the container's root stands on it.
///
/// # Errors
/// The image is not here, or the name with this attempt is taken.
pub(crate) async fn record(
    core: &Core,
    sandbox: &Sandbox,
    config: &v1::ContainerConfig,
) -> Result<(ContainerRecord, ImageHold)> {
    let meta =
        config.metadata.clone().ok_or_else(|| Error::Invalid("the container has no metadata".into()))?;
    let wanted = config.image.clone().unwrap_or_default();
    let hold = core.images.hold(&wanted.image).await?;
    let hold = hold.ok_or_else(|| Error::NotFound(format!("image {:?}", wanted.image)))?;
    let image = hold.record();
    let of_sandbox = core.containers_of(&sandbox.id);
    if let Some(other) =
        of_sandbox.iter().map(|c| c.record()).find(|c| c.name == meta.name && c.attempt == meta.attempt)
    {
        return Err(Error::State(format!(
            "container {} has name {:?} and attempt {} already",
            other.id, meta.name, meta.attempt
        )));
    }
    let mut record =
        ContainerRecord::new(ContainerId::random(), sandbox.id.clone(), image.id.clone(), now_ns());
    record.name = meta.name;
    record.attempt = meta.attempt;
    record.user_image = if wanted.user_specified_image.is_empty() {
        wanted.image.clone()
    } else {
        wanted.user_specified_image
    };
    record.image = wanted.image;
    record.image_ref = image.repo_digests.first().cloned().unwrap_or_else(|| image.id.to_string());
    record.labels = config.labels.clone().into_iter().collect();
    record.annotations = config.annotations.clone().into_iter().collect();
    record.tty = config.tty;
    record.stdin = config.stdin;
    record.stop_signal = stop_signal(config, &image.config)?;
    let resources = config.linux.as_ref().and_then(|l| l.resources.as_ref());
    record.memory_limit = resources.and_then(|r| containers::limits(r).memory_bytes);
    if let (Some(dir), false) = (sandbox.record().log_directory, config.log_path.is_empty()) {
        let path = beneath::relative(&config.log_path).map_err(|_| {
            Error::Invalid(format!("log_path {:?} is no plain relative path", config.log_path))
        })?;
        record.log_file = Some(dir.join(path));
    }
    record.mounts = config
        .mounts
        .iter()
        .map(|m| MountRecord {
            host_path: m.host_path.clone(),
            container_path: m.container_path.clone(),
            read_only: m.readonly,
        })
        .collect();
    Ok((record, hold))
}

/// The request's stop signal, else the image's, else SIGTERM.
fn stop_signal(config: &v1::ContainerConfig, image: &ImageConfig) -> Result<i32> {
    let asked = config.stop_signal();
    if asked != v1::Signal::RuntimeDefault {
        return signal_number(asked.as_str_name());
    }
    match image.stop_signal.as_str() {
        "" => Ok(15),
        text => signal_number(text),
    }
}

/// A signal as images and CRI write it: `SIGQUIT`, `QUIT`, `3`, `SIGRTMIN+3`, `SIGRTMINPLUS3`.
fn signal_number(text: &str) -> Result<i32> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
        "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
        "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    let upper = text.trim().to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let within = |n: i32| (1..=64).contains(&n).then_some(n);
    let real_time = |rest: &str, base: i32, sign: i32| {
        let rest = rest.trim_start_matches("PLUS").trim_start_matches("MINUS").trim_start_matches(['+', '-']);
        let offset: i32 =
            if rest.is_empty() { 0 } else { rest.parse().ok().filter(|n| (0..=30).contains(n))? };
        within(base + sign * offset)
    };
    let number = if let Ok(number) = name.parse() {
        within(number)
    } else if let Some(rest) = name.strip_prefix("RTMIN") {
        real_time(rest, 34, 1)
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        real_time(rest, 64, -1)
    } else {
        let plain = match name {
            "IOT" => "ABRT",
            "CLD" => "CHLD",
            "POLL" => "IO",
            other => other,
        };
        NAMES.iter().position(|n| *n == plain).and_then(|at| i32::try_from(at + 1).ok())
    };
    number.ok_or_else(|| Error::Invalid(format!("{text:?} is no signal")))
}

/// Makes root, mounts and spec; the container can be started then.
///
/// # Errors
/// Whatever cannot be made; the caller removes the rest.
pub(crate) async fn make(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    container: &Arc<Container>,
    config: &v1::ContainerConfig,
    of_pod: &v1::PodSandboxConfig,
    image: &ImageRecord,
) -> Result<()> {
    let (id, map) = (&container.id, core.config.map);
    let shared = sandboxes::shared_dir(core, &sandbox.id);
    let rootfs = shared.join("ctr").join(id.as_str()).join("rootfs");
    let options = RootOptions { map, quota_bytes: core.config.container_root_quota };
    core.driver.create_root(id, &image.layers, options).await?;
    let dir = shared.clone();
    let name = id.clone();
    blocking("making a container's directory", move || make_dirs(&dir, &name)).await?;
    core.driver.mount_root(id, &rootfs).await?;

    let pending = {
        let (core, sandbox, id) = (core.clone(), sandbox.clone(), id.clone());
        let (config, of_pod, image, record) =
            (config.clone(), of_pod.clone(), image.config.clone(), container.record());
        blocking("making a container's spec", move || {
            let place = Place { core: &core, sandbox: &sandbox, id: &id, shared: &shared, rootfs: &rootfs };
            pending(&place, &config, &of_pod, &image, &record)
        })
        .await?
    };
    let user = serde_json::from_value(pending.request.spec["process"]["user"].clone()).ok();
    container.set_pending(pending);
    core.change_container(container, |r| {
        r.created = true;
        r.user = user;
    })
    .await
}

fn make_dirs(shared: &Path, id: &ContainerId) -> Result<()> {
    for path in [shared.join("ctr").join(id.as_str()), shared.join("mnt").join(id.as_str())] {
        match fs::DirBuilder::new().mode(0o711).create(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::io(format!("cannot make {}", path.display()), e));
            }
            _ => {}
        }
    }
    Ok(())
}

struct Place<'a> {
    core: &'a Core,
    sandbox: &'a Sandbox,
    id: &'a ContainerId,
    shared: &'a Path,
    rootfs: &'a Path,
}

fn pending(
    place: &Place<'_>,
    config: &v1::ContainerConfig,
    of_pod: &v1::PodSandboxConfig,
    image: &ImageConfig,
    record: &ContainerRecord,
) -> Result<Pending> {
    let Place { core, sandbox, id, rootfs, .. } = place;
    let map = core.config.map;
    let mounts = all_mounts(place, config)?;
    let hostname = sandbox.record().hostname;
    let rootfs_ct = format!("{POD_DIR_IN_CT}/ctr/{id}/rootfs");
    let spec = spec::build(&SpecInput {
        container_id: id,
        config,
        sandbox: of_pod,
        image,
        rootfs_host: rootfs,
        rootfs_ct: &rootfs_ct,
        mounts: &mounts,
        cgroup_path: Some(&ContainerCgroups::path_in_ct(id)),
        cgroup_v1: core.cgroups.is_v1(),
        hostname: &hostname,
        map,
    })?;
    if let Some(cwd) = spec["process"]["cwd"].as_str() {
        make_cwd(rootfs, cwd, map)?;
    }
    let log_path = match &record.log_file {
        Some(_) => {
            make_log_dir(sandbox.record().log_directory.as_deref(), &config.log_path)?;
            Some(PathBuf::from(format!("{POD_DIR_IN_CT}/logs/{}", config.log_path)))
        }
        None => None,
    };
    let resources = config.linux.as_ref().and_then(|l| l.resources.clone()).unwrap_or_default();
    let noted = config.annotations.get(annotations::OOM_SCORE_ADJ).and_then(|v| v.parse().ok());
    let asked = i32::try_from(resources.oom_score_adj).ok().filter(|adj| *adj != 0);
    Ok(Pending {
        limits: containers::limits(&resources),
        oom_score_adj: noted.or(asked),
        request: CreateRequest {
            id: id.to_string(),
            spec,
            log_path,
            log_max_bytes: core.config.log_max_bytes,
            log_max_files: core.config.log_max_files,
            tty: config.tty,
            stdin: config.stdin,
            stdin_once: config.stdin_once,
            stop_signal: record.stop_signal,
        },
    })
}

/// The request's mounts, then what every container of a pod has unless the request has its own.
fn all_mounts(place: &Place<'_>, config: &v1::ContainerConfig) -> Result<Vec<ResolvedMount>> {
    let mut all = Vec::new();
    for (number, mount) in config.mounts.iter().enumerate() {
        all.push(own_mount(place, number, mount)?);
    }
    let read_only =
        config.linux.as_ref().and_then(|l| l.security_context.as_ref()).is_some_and(|s| s.readonly_rootfs);
    let mut standard = vec![
        ("etc/resolv.conf".to_owned(), "/etc/resolv.conf".to_owned(), read_only),
        ("etc/hostname".to_owned(), "/etc/hostname".to_owned(), read_only),
        ("shm".to_owned(), "/dev/shm".to_owned(), false),
    ];
    if let Some(path) = config.annotations.get(annotations::TERMINATION_MESSAGE_PATH) {
        let path = if path.is_empty() { MESSAGE_PATH } else { path };
        message_file(place)?;
        standard.push((format!("term/{}", place.id), path.to_owned(), false));
    }
    let taken: Vec<String> = all.iter().map(|m| m.target.trim_end_matches('/').to_owned()).collect();
    all.extend(standard.into_iter().filter(|(_, target, _)| !taken.contains(target)).map(
        |(source, target, read_only)| ResolvedMount {
            source_ct: format!("{POD_DIR_IN_CT}/{source}"),
            target,
            read_only,
            ..ResolvedMount::default()
        },
    ));
    Ok(all)
}

/// Puts the source of a mount of the request, with the CT's ids, where the CT can see it.
fn own_mount(place: &Place<'_>, number: usize, mount: &v1::Mount) -> Result<ResolvedMount> {
    if mount.image.as_ref().is_some_and(|i| !i.image.is_empty()) {
        return Err(Error::Refused("an image as a volume".to_owned()));
    }
    if mount.propagation() != v1::MountPropagation::PropagationPrivate {
        return Err(Error::Refused(format!("mount propagation of {}", mount.container_path)));
    }
    let source = Path::new(&mount.host_path);
    let failed = |e: std::io::Error| Error::io(format!("cannot mount {}", mount.host_path), e);
    if !source.is_absolute() {
        return Err(Error::Invalid(format!("mount source {:?} is not absolute", mount.host_path)));
    }
    let ours = place.core.volumes.owns(source);
    let is_dir = match fs::metadata(source) {
        Ok(meta) => meta.is_dir(),
        // As containerd: a missing directory of the host is made. One of ours is only missing by mistake.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !ours => {
            fs::create_dir_all(source).map_err(failed)?;
            true
        }
        Err(e) => return Err(failed(e)),
    };
    let relative = format!("mnt/{}/{number}", place.id);
    let target = place.shared.join(&relative);
    let made = if is_dir {
        fs::DirBuilder::new().mode(0o755).create(&target)
    } else {
        fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(&target).map(drop)
    };
    made.map_err(failed)?;
    place.core.shifted.bind(source, &target, !ours && is_dir, mount.readonly)?;
    Ok(ResolvedMount {
        source_ct: format!("{POD_DIR_IN_CT}/{relative}"),
        target: mount.container_path.clone(),
        read_only: mount.readonly,
        recursive: !ours && is_dir,
        tmpfs: false,
    })
}

/// The file of the termination message: any user of the container may write it, nobody there may replace it.
fn message_file(place: &Place<'_>) -> Result<()> {
    let dir = place.shared.join("term");
    let path = dir.join(place.id.as_str());
    let base = place.core.config.map.host_base;
    let made = || -> std::io::Result<()> {
        match fs::DirBuilder::new().mode(0o711).create(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        fs::OpenOptions::new().write(true).create(true).truncate(true).open(&path)?;
        chown(&path, Some(base), Some(base))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666))
    };
    made().map_err(|e| Error::io(format!("cannot make {}", path.display()), e))
}

/// The directory of a log below the pod's, which the CT's root writes in. It is made on the host's side of the shifted mount:
/// the host's root has no id on the other.
fn make_log_dir(dir: Option<&Path>, log_path: &str) -> Result<()> {
    let parent = Path::new(log_path).parent().filter(|p| !p.as_os_str().is_empty());
    let (Some(dir), Some(parent)) = (dir, parent) else { return Ok(()) };
    beneath::open_dir(dir)
        .and_then(|dir| beneath::make_dirs(&dir, parent, Mode::from_raw_mode(0o755)))
        .map(drop)
        .map_err(|e| Error::io(format!("cannot make the log directory of {log_path}"), e))
}

/// A working directory that the image lacks is made, as runc does. The image's links are followed within its root.
fn make_cwd(rootfs: &Path, cwd: &str, map: IdMap) -> Result<()> {
    let failed = |e: rustix::io::Errno| Error::io(format!("cannot make the working directory {cwd}"), e);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let root =
        beneath::open_dir(rootfs).map_err(|e| Error::io(format!("cannot open {}", rootfs.display()), e))?;
    let mut path = PathBuf::new();
    for part in cwd.split('/').filter(|p| !p.is_empty()) {
        let parent = if path.as_os_str().is_empty() { Path::new(".") } else { &path };
        let at = rustix::fs::openat2(&root, parent, flags, Mode::empty(), inside).map_err(failed)?;
        path.push(part);
        match rustix::fs::openat2(&root, &path, flags, Mode::empty(), inside) {
            Ok(_) => {}
            Err(rustix::io::Errno::NOENT) => match make_as_root_of(map, &at, part) {
                Ok(()) => {}
                // A link to nowhere; the start says what is wrong with it.
                Err(rustix::io::Errno::EXIST) => return Ok(()),
                Err(e) => return Err(failed(e)),
            },
            // Something that is no directory: the start says so, as with runc.
            Err(rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => return Ok(()),
            Err(e) => return Err(failed(e)),
        }
    }
    Ok(())
}

/// Makes a directory that belongs to the container's root. Where ids are shifted at the mount the host's root has none in the
/// container and could make nothing, so this thread takes the other's id for a moment, without losing its own rights.
fn make_as_root_of(map: IdMap, at: &OwnedFd, name: &str) -> std::result::Result<(), rustix::io::Errno> {
    use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
    let before = rustix::thread::capabilities(None)?;
    let group = setfsgid(Gid::from_raw(map.host_base));
    let user = setfsuid(Uid::from_raw(map.host_base));
    let made = rustix::thread::set_capabilities(None, before)
        .and_then(|()| rustix::fs::mkdirat(at, name, Mode::from_raw_mode(0o755)));
    setfsuid(user);
    setfsgid(group);
    rustix::thread::set_capabilities(None, before)?;
    made
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_working_directory_is_the_containers_wherever_it_lies() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("of-another")).unwrap();
        chown(dir.path().join("of-another"), Some(101_000), Some(101_000)).unwrap();
        make_cwd(dir.path(), "/of-another/a/b", IdMap::default()).unwrap();
        let made = fs::metadata(dir.path().join("of-another/a/b")).unwrap();
        assert_eq!((made.uid(), made.gid(), made.mode() & 0o7777), (100_000, 100_000, 0o755));
        fs::write(dir.path().join("mine"), "").unwrap();
        assert_eq!(
            fs::metadata(dir.path().join("mine")).unwrap().uid(),
            0,
            "the thread is the host's root again"
        );
    }

    #[test]
    fn signals_are_read_in_every_spelling() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("quit", 3),
            ("9", 9),
            ("SIGRTMIN+3", 37),
            ("SIGRTMINPLUS1", 35),
            ("SIGRTMAXMINUS1", 63),
            ("SIGPOLL", 29),
        ] {
            assert_eq!(signal_number(text).unwrap(), number, "{text}");
        }
        for bad in ["", "SIGFOO", "0", "65", "-9", "RTMIN+99"] {
            assert!(signal_number(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_missing_working_directory_is_made_and_a_link_stays_in_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let map = IdMap { host_base: rustix::process::getuid().as_raw(), size: 65536 };
        fs::create_dir(root.join("real")).unwrap();
        std::os::unix::fs::symlink("/real", root.join("link")).unwrap();
        std::os::unix::fs::symlink("/nowhere", root.join("dangling")).unwrap();
        make_cwd(root, "/link/a/b", map).unwrap();
        assert!(root.join("real/a/b").is_dir());
        make_cwd(root, "/dangling/x", map).unwrap();
        assert!(!root.join("nowhere").exists());
    }
}
