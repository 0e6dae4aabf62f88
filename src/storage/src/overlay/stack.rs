//! Putting OverlayFS mounts together by the kernel's mount API.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags},
};

use crate::{
    error::{Attempt, Result},
    mounts,
};

/// The kernel's bound on a mount option's text (`fsconfig(2)`), with its final zero.
const MAX_OPTION: usize = 256;
/// `OVERLAYFS_SUPER_MAGIC`.
pub(super) const OVERLAY_MAGIC: u64 = 0x794c_7630;

/// Directories, merged: `lower` with the bottom one first, below the upper and work directory of `writable` or read-only.
/// The mount has no place yet.
pub(super) fn merge(lower: &[PathBuf], writable: Option<(&Path, &Path)>) -> Result<OwnedFd> {
    let shown = lower.last().map_or(Path::new("/"), PathBuf::as_path);
    let context =
        rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).attempt("open OverlayFS for", shown)?;
    // Long paths go in through descriptors, which live until the file system has looked at them.
    let mut kept = Vec::new();
    let mut set = |key: &str, path: &Path| -> Result<()> {
        let text = short(path, &mut kept)?;
        rustix::mount::fsconfig_set_string(context.as_fd(), key, &text)
            .map_err(|e| explain(&context, e))
            .attempt("stack", text)
    };
    // The topmost comes first.
    for layer in lower.iter().rev() {
        set("lowerdir+", layer)?;
    }
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NODEV;
    match writable {
        Some((upper, work)) => {
            set("upperdir", upper)?;
            set("workdir", work)?;
        }
        None => attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID,
    }
    for (key, value) in [
        ("source", "overlay"),
        ("index", "off"),
        ("metacopy", "off"),
        ("redirect_dir", "off"),
        ("xino", "off"),
    ] {
        rustix::mount::fsconfig_set_string(context.as_fd(), key, value)
            .attempt("configure the root on", shown)?;
    }
    rustix::mount::fsconfig_create(context.as_fd())
        .map_err(|e| explain(&context, e))
        .attempt("stack the layers up to", shown)?;
    // A device node that an image brings must not open: the file system belongs to the host's user namespace.
    rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .attempt("make the mount of", shown)
}

/// The directory to mount an overlay at, made if missing; none if there is one already.
pub(super) fn place_for(target: &Path) -> Result<Option<OwnedFd>> {
    fs::create_dir_all(target).attempt("create", target)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let place = rustix::fs::openat(CWD, target, flags, Mode::empty()).attempt("open", target)?;
    let there = mounts::is_mounted(target)? && is_overlay(&place).attempt("look at", target)?;
    Ok((!there).then_some(place))
}

/// Gives a mount its place.
pub(super) fn put(mount: &OwnedFd, place: &OwnedFd, target: &Path) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount, "", place, "", flags).attempt("mount at", target)
}

fn is_overlay(fd: &OwnedFd) -> rustix::io::Result<bool> {
    Ok(u64::try_from(rustix::fs::fstatfs(fd)?.f_type).is_ok_and(|t| t == OVERLAY_MAGIC))
}

/// What the kernel's file system context has to say about an error.
fn explain(context: &OwnedFd, error: rustix::io::Errno) -> io::Error {
    let mut buffer = [0_u8; 512];
    let said = match rustix::io::read(context, &mut buffer) {
        Ok(n) => String::from_utf8_lossy(&buffer[..n]).trim().to_owned(),
        Err(_) => String::new(),
    };
    let error = io::Error::from(error);
    if said.is_empty() { error } else { io::Error::new(error.kind(), format!("{error} ({said})")) }
}

/// The path itself, or a short one through a descriptor that is added to `kept`.
fn short(path: &Path, kept: &mut Vec<OwnedFd>) -> Result<PathBuf> {
    if path.as_os_str().len() < MAX_OPTION {
        return Ok(path.to_owned());
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(CWD, path, flags, Mode::empty()).attempt("open", path)?;
    let text = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    kept.push(fd);
    Ok(text)
}
