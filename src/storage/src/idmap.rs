//! Bind mounts whose ids are shifted (idmapped mounts), made by the kernel's mount API without external programs.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, OpenTreeFlags},
};

use crate::{
    IdMap,
    error::{Attempt, Error, Result},
};

/// What of a bind mount may not be written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReadOnly {
    /// Nothing is read-only that is not so at the source.
    #[default]
    No,
    /// The mount itself; mounts that come along from below the source stay as they are.
    Top,
    /// The mount and all that come along from below the source.
    Recursive,
}

/// How a bind mount is made. It is always a private copy: neither do mounts that the host makes later below the source appear in it,
/// nor do mounts go from the source when they are taken from the copy.
#[derive(Debug, Clone, Copy, Default)]
pub struct BindOptions {
    /// Mounts below the source come along.
    pub recursive: bool,
    /// What may not be written to.
    pub read_only: ReadOnly,
    /// No program gains rights by its set-user-ID or set-group-ID bit.
    pub no_suid: bool,
    /// Device files are no devices.
    pub no_dev: bool,
    /// No program can be executed.
    pub no_exec: bool,
}

impl BindOptions {
    /// For files that are only read and written by programs: logs, messages, sockets.
    #[must_use]
    pub fn data() -> Self {
        Self { no_suid: true, no_dev: true, no_exec: true, ..Self::default() }
    }

    /// The attributes of all mounts of the copy.
    fn attributes(self) -> u64 {
        let when = |set: bool, attribute| if set { attribute } else { 0 };
        when(self.no_suid, libc::MOUNT_ATTR_NOSUID)
            | when(self.no_dev, libc::MOUNT_ATTR_NODEV)
            | when(self.no_exec, libc::MOUNT_ATTR_NOEXEC)
            | when(self.read_only == ReadOnly::Recursive, libc::MOUNT_ATTR_RDONLY)
    }
}

/// A user namespace with a map, to make mounts with; it lives as long as this.
#[derive(Debug)]
pub struct Namespace(OwnedFd);

impl Namespace {
    /// A namespace with the given map for users and groups.
    ///
    /// # Errors
    /// A map that is none, or what the system says.
    pub fn new(map: IdMap) -> Result<Self> {
        user_namespace(map).map(Self)
    }

    /// Shifts the ids of a mount that has no place yet.
    ///
    /// # Errors
    /// `EINVAL` where its file system does not know idmapped mounts.
    pub(crate) fn shift(&self, mount: &OwnedFd) -> io::Result<()> {
        let attributes = libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: libc::MS_PRIVATE,
            userns_fd: u64::try_from(self.0.as_raw_fd()).unwrap_or(u64::MAX),
        };
        set_attributes(mount, &attributes, false)
    }

    /// Mounts `src` (a file or a directory) at `dst`, which must exist, with its ids shifted by the map.
    ///
    /// Of mounts that come along from below `src` each file system has to know idmapped mounts.
    ///
    /// # Errors
    /// What the system says of which path.
    pub fn bind(&self, src: &Path, dst: &Path, options: BindOptions) -> Result<()> {
        bind_with(src, dst, Some(self.0.as_fd()), options)
    }
}

/// The user namespace of a child that waits until we have opened it.
fn user_namespace(map: IdMap) -> Result<OwnedFd> {
    if !map.is_valid() {
        return Err(Error::BadIdMap { host_base: map.host_base, size: map.size });
    }
    let (wait, release) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .attempt("make a pipe for", "/proc/self/ns/user")?;
    // SAFETY: a plain fork into a new user namespace. The child shares no memory with us and makes only raw system
    // calls on descriptors that it inherited, which is sound in a program with threads. It keeps nothing but its own end
    // of the pipe: with the pipes of other threads' children two of them would wait for each other.
    #[allow(unsafe_code)]
    let pid = unsafe {
        let pid = libc::syscall(libc::SYS_clone, libc::CLONE_NEWUSER | libc::SIGCHLD, 0, 0, 0, 0);
        if pid == 0 {
            libc::dup2(wait.as_raw_fd(), 0);
            libc::syscall(libc::SYS_close_range, 1, libc::c_uint::MAX, 0);
            let mut byte = 0_u8;
            libc::read(0, std::ptr::from_mut(&mut byte).cast(), 1);
            libc::_exit(0);
        }
        pid
    };
    if pid < 0 {
        return Err(io::Error::last_os_error()).attempt("create a user namespace for", "/proc/self/ns/user");
    }
    let made = map_and_open(pid, map);
    // The end of the pipe lets the child go.
    drop(release);
    let mut status = 0;
    // SAFETY: the pid is that of our own child, not reaped before.
    #[allow(unsafe_code)]
    let pid = libc::pid_t::try_from(pid).map(|pid| unsafe { libc::waitpid(pid, &raw mut status, 0) });
    debug_assert!(pid.is_ok());
    made
}

fn map_and_open(pid: libc::c_long, map: IdMap) -> Result<OwnedFd> {
    let line = format!("0 {} {}", map.host_base, map.size);
    for name in ["uid_map", "gid_map"] {
        let path = format!("/proc/{pid}/{name}");
        fs::write(&path, &line).attempt("write the id map", path)?;
    }
    let path = format!("/proc/{pid}/ns/user");
    Ok(File::open(&path).attempt("open", path)?.into())
}

/// Mounts `src` at `dst` as it is, or shifted by the map of a user namespace.
///
/// The copy leaves the source's peer group before it is moved. Below a shared directory it gets a group of its own then, which is how
/// it appears in a CT; as a peer of its source its unmounting would go back to the host.
pub(crate) fn bind_with(
    src: &Path,
    dst: &Path,
    namespace: Option<std::os::fd::BorrowedFd<'_>>,
    options: BindOptions,
) -> Result<()> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if options.recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = rustix::mount::open_tree(CWD, src, flags).attempt("clone the mount of", src)?;
    let mut attributes = libc::mount_attr {
        attr_set: options.attributes(),
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    if let Some(namespace) = namespace {
        attributes.attr_set |= libc::MOUNT_ATTR_IDMAP;
        attributes.userns_fd = u64::try_from(namespace.as_raw_fd()).unwrap_or(u64::MAX);
    }
    set_attributes(&tree, &attributes, options.recursive).attempt("set the ids and attributes of", src)?;
    if options.read_only == ReadOnly::Top {
        let top =
            libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
        set_attributes(&tree, &top, false).attempt("make read-only", src)?;
    }
    rustix::mount::move_mount(&tree, "", CWD, dst, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .attempt("mount at", dst)
}

fn set_attributes(mount: &OwnedFd, attributes: &libc::mount_attr, recursive: bool) -> io::Result<()> {
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: all pointers are valid for the call, the size is that of the structure.
    #[allow(unsafe_code)]
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
