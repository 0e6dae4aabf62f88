//! What of the host is put where a container can see it: its mounts, its termination message, the directories of its log and its
//! working directory.

use std::{
    fs,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown},
    },
    path::{Path, PathBuf},
};

use moxlet_cri::{annotations, v1};
use moxlet_ids::ContainerId;
use moxlet_image::ImageConfig;
use moxlet_sandbox::POD_DIR_IN_CT;
use moxlet_storage::{
    IdMap,
    idmap::{BindOptions, ReadOnly},
};
use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::Containers;
use crate::{
    beneath,
    error::{Error, Result},
    spec::{self, ResolvedMount},
    state::Sandbox,
};

/// Where a container's termination message goes if nobody says.
const MESSAGE_PATH: &str = "/dev/termination-log";

/// A container that is being made.
pub(super) struct Making<'a> {
    pub(super) own: &'a Containers,
    pub(super) sandbox: &'a Sandbox,
    pub(super) id: &'a ContainerId,
    /// The pod's shared directory.
    pub(super) shared: &'a Path,
    /// The mounted root.
    pub(super) rootfs: &'a Path,
}

/// The request's mounts, then what every container of a pod has unless the request has its own.
pub(super) fn all(
    making: &Making<'_>,
    config: &v1::ContainerConfig,
    image: &ImageConfig,
) -> Result<Vec<ResolvedMount>> {
    let mut all = Vec::new();
    for (number, mount) in config.mounts.iter().enumerate() {
        all.push(own_mount(making, number, mount)?);
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
        message_file(making)?;
        standard.push((format!("term/{}", making.id), path.to_owned(), false));
    }
    let taken: Vec<String> = all.iter().map(|m| m.target.trim_end_matches('/').to_owned()).collect();
    all.extend(standard.into_iter().filter(|(_, target, _)| !taken.contains(target)).map(
        |(source, target, read_only)| ResolvedMount {
            source_ct: format!("{POD_DIR_IN_CT}/{source}"),
            target,
            read_only,
            data: true,
            ..ResolvedMount::default()
        },
    ));
    if read_only {
        for path in &image.volumes {
            all.extend(image_volume(making, path, &all)?);
        }
    }
    Ok(all)
}

/// What an image declares as a volume stays writable where the container's root is not: its own directory once more, with the
/// image's content and owners. None where something else is mounted, or for what every container has anew.
fn image_volume(making: &Making<'_>, path: &str, others: &[ResolvedMount]) -> Result<Option<ResolvedMount>> {
    let target = spec::target(path)?;
    let standard = ["/proc", "/sys", "/dev"].iter().any(|dir| Path::new(&target).starts_with(dir));
    let taken = others.iter().any(|m| m.target.trim_end_matches('/') == target);
    if target == "/" || standard || taken {
        return Ok(None);
    }
    make_cwd(making.rootfs, &target, making.own.settings.map)?;
    let Some(inside) = directory_in(making.rootfs, &target)
        .map_err(|e| Error::io(format!("cannot find the image's volume {target}"), e))?
    else {
        return Ok(None);
    };
    Ok(Some(ResolvedMount {
        source_ct: format!("{POD_DIR_IN_CT}/ctr/{}/rootfs/{}", making.id, inside.display()),
        target,
        ..ResolvedMount::default()
    }))
}

/// Where a directory of a root is when its links are followed within the root, relative to it; none if it is no directory.
fn directory_in(rootfs: &Path, path: &str) -> std::io::Result<Option<PathBuf>> {
    let root = beneath::open_dir(rootfs)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let place = |fd: &OwnedFd| fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    match rustix::fs::openat2(&root, path, flags, Mode::empty(), inside) {
        Ok(found) => Ok(place(&found)?.strip_prefix(place(&root)?).ok().map(Path::to_owned)),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Puts the source of a mount of the request, with the CT's ids, where the CT can see it.
fn own_mount(making: &Making<'_>, number: usize, mount: &v1::Mount) -> Result<ResolvedMount> {
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
    let ours = making.own.volumes.owns(source);
    let is_dir = match fs::metadata(source) {
        Ok(meta) => meta.is_dir(),
        // As containerd: a missing directory of the host is made. One of ours is only missing by mistake.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !ours => {
            fs::create_dir_all(source).map_err(failed)?;
            true
        }
        Err(e) => return Err(failed(e)),
    };
    let relative = format!("mnt/{}/{number}", making.id);
    let target = making.shared.join(&relative);
    let made = if is_dir {
        fs::DirBuilder::new().mode(0o755).create(&target)
    } else {
        fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(&target).map(drop)
    };
    made.map_err(failed)?;
    let options = BindOptions {
        recursive: !ours && is_dir,
        read_only: match (mount.readonly, mount.recursive_read_only) {
            (false, _) => ReadOnly::No,
            (true, false) => ReadOnly::Top,
            (true, true) => ReadOnly::Recursive,
        },
        no_dev: true,
        ..BindOptions::default()
    };
    making.own.shifted.bind(source, &target, options)?;
    Ok(ResolvedMount {
        source_ct: format!("{POD_DIR_IN_CT}/{relative}"),
        target: mount.container_path.clone(),
        read_only: mount.readonly,
        recursive: !ours && is_dir,
        ..ResolvedMount::default()
    })
}

/// The file of the termination message: any user of the container may write it, nobody there may replace it.
fn message_file(making: &Making<'_>) -> Result<()> {
    let dir = making.shared.join("term");
    let path = dir.join(making.id.as_str());
    let base = making.own.settings.map.host_base;
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
pub(super) fn make_log_dir(dir: Option<&Path>, log_path: &str) -> Result<()> {
    let parent = Path::new(log_path).parent().filter(|p| !p.as_os_str().is_empty());
    let (Some(dir), Some(parent)) = (dir, parent) else { return Ok(()) };
    beneath::open_dir(dir)
        .and_then(|dir| beneath::make_dirs(&dir, parent, Mode::from_raw_mode(0o700)))
        .map(drop)
        .map_err(|e| Error::io(format!("cannot make the log directory of {log_path}"), e))
}

/// A working directory that the image lacks is made, as runc does. The image's links are followed within its root.
pub(super) fn make_cwd(rootfs: &Path, cwd: &str, map: IdMap) -> Result<()> {
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
    fn a_directory_of_an_image_is_found_within_its_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("srv/data")).unwrap();
        std::os::unix::fs::symlink("../../../srv/data", root.join("data")).unwrap();
        std::os::unix::fs::symlink("/etc", root.join("evil")).unwrap();
        fs::write(root.join("file"), "").unwrap();
        assert_eq!(directory_in(root, "/data").unwrap().unwrap(), Path::new("srv/data"));
        for none in ["/evil", "/file", "/nowhere"] {
            assert_eq!(directory_in(root, none).unwrap(), None, "{none}");
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
