//! Mounting datasets by the kernel's mount API: a mount has its place only when its ids and flags are right, and no program
//! is started for it.

use std::{
    collections::HashMap,
    fs,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    io::Errno,
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags},
};

use crate::{
    IdMap,
    error::{Attempt, Result},
    idmap::Namespace,
    mounts,
};

/// `ZFS_SUPER_MAGIC`.
const ZFS_MAGIC: u64 = 0x2fc1_2fc1;
/// How often and with which pause a mount is tried again while an earlier one of the dataset is still being taken down.
const TRIES: u32 = 6;
const PAUSE: Duration = Duration::from_millis(15);

/// What a mount is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Whatever `zfs mount` allows.
    Plain,
    /// No device node in it opens.
    Write,
    /// Nor is it written to, nor has a file in it its setuid.
    Read,
}

/// Mounts a dataset at a directory, which is made if missing, as `zfs mount` does for one with `canmount=noauto`, without a
/// program. Idempotent.
///
/// # Errors
/// What the system says of which dataset or path.
pub fn mount_dataset(dataset: &str, target: &Path) -> Result<()> {
    if mounts::source_of(target)?.as_deref() == Some(dataset) {
        return Ok(());
    }
    fs::create_dir_all(target).attempt("create", target)?;
    put(&detached(dataset, Access::Plain)?, &opened(target)?, target)
}

/// A mount of a dataset or snapshot that has no place yet.
pub(super) fn detached(dataset: &str, access: Access) -> Result<OwnedFd> {
    let mut pause = PAUSE;
    let mut tries = 0;
    loop {
        match make(dataset, access) {
            Err(Errno::BUSY) if tries < TRIES => {
                tries += 1;
                thread::sleep(pause);
                pause *= 2;
            }
            made => return made.attempt("mount the dataset", dataset),
        }
    }
}

fn make(dataset: &str, access: Access) -> rustix::io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("zfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(context.as_fd(), "source", dataset)?;
    let attributes = match access {
        Access::Plain => MountAttrFlags::empty(),
        Access::Write => MountAttrFlags::MOUNT_ATTR_NODEV,
        Access::Read => {
            rustix::mount::fsconfig_set_flag(context.as_fd(), "ro")?;
            MountAttrFlags::MOUNT_ATTR_NODEV
                | MountAttrFlags::MOUNT_ATTR_RDONLY
                | MountAttrFlags::MOUNT_ATTR_NOSUID
        }
    };
    rustix::mount::fsconfig_create(context.as_fd())?;
    rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// A read-only mount of nothing at all.
pub(super) fn nothing() -> Result<OwnedFd> {
    let make = || -> rustix::io::Result<OwnedFd> {
        let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_set_string(context.as_fd(), "mode", "0755")?;
        rustix::mount::fsconfig_set_flag(context.as_fd(), "ro")?;
        rustix::mount::fsconfig_create(context.as_fd())?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID;
        rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    make().attempt("make an empty", "tmpfs")
}

/// The directory to mount at, made if missing; none if one of our kind is mounted there already.
pub(super) fn place_for(target: &Path) -> Result<Option<OwnedFd>> {
    fs::create_dir_all(target).attempt("create", target)?;
    let place = opened(target)?;
    let there = mounts::is_mounted(target)? && is_zfs(&place).attempt("look at", target)?;
    Ok((!there).then_some(place))
}

fn opened(target: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, target, flags, Mode::empty()).attempt("open", target)
}

/// Gives a mount its place.
pub(super) fn put(mount: &OwnedFd, place: &OwnedFd, target: &Path) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount, "", place, "", flags).attempt("mount at", target)
}

fn is_zfs(fd: &OwnedFd) -> rustix::io::Result<bool> {
    Ok(u64::try_from(rustix::fs::fstatfs(fd)?.f_type).is_ok_and(|t| t == ZFS_MAGIC))
}

/// Objects in use in a mounted dataset: files, directories and a few of ZFS' own.
pub(super) fn objects(mount: &OwnedFd, dataset: &str) -> Result<u64> {
    let stat = rustix::fs::fstatvfs(mount).attempt("look at", dataset)?;
    Ok(stat.f_files.saturating_sub(stat.f_ffree))
}

/// The user namespaces of the maps that were needed so far: making one costs a process.
#[derive(Debug, Default)]
pub(super) struct Namespaces(Mutex<HashMap<IdMap, Arc<Namespace>>>);

impl Namespaces {
    pub(super) fn of(&self, map: IdMap) -> Result<Arc<Namespace>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = all.get(&map) {
            return Ok(Arc::clone(there));
        }
        let made = Arc::new(Namespace::new(map)?);
        all.insert(map, Arc::clone(&made));
        Ok(made)
    }
}

/// Whether kernel and OpenZFS know idmapped mounts, tried on a mounted dataset.
pub(super) fn knows_idmapped(mounted: &Path, namespaces: &Namespaces) -> Result<bool> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let copy = rustix::mount::open_tree(CWD, mounted, flags).attempt("clone the mount of", mounted)?;
    match namespaces.of(IdMap::default())?.shift(&copy) {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP)) => {
            Ok(false)
        }
        Err(e) => Err(e).attempt("shift the ids of", mounted),
    }
}
