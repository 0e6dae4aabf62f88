//! Project quotas: what a container may write on a file system that it shares with others.
//!
//! The upper and the work directory of a root get a project id of their own, which everything made in them inherits; the
//! file system counts what belongs to it (`xfs_quota(8)`, `ext4(5)`: `prjquota`; `quotactl(2)`). OverlayFS renames from work
//! to upper, which only works within one project.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    io::Errno,
    ioctl::{self, Getter, Opcode, Setter, opcode},
};

use crate::error::{Attempt, Error, Result};

/// The project ids of all stores: far from those that people give by hand, and from the user ids that some tools take.
pub(super) const FIRST: u32 = 1_000_000_000;
/// How many there are.
const COUNT: u32 = 1 << 20;

/// `linux/quota.h`.
const PRJQUOTA: libc::c_int = 2;
const Q_GETQUOTA: libc::c_int = 0x80_0007;
const Q_SETQUOTA: libc::c_int = 0x80_0008;
const QIF_BLIMITS: u32 = 1;
/// `linux/dqblk_xfs.h`; every file system with quotas answers it.
const Q_XGETQSTATV: libc::c_int = (b'X' as libc::c_int) << 8 | 8;
const FS_QSTATV_VERSION1: u8 = 1;
const FS_QUOTA_PDQ_ENFD: u16 = 1 << 5;
/// Bytes of a block in `struct if_dqblk`.
const BLOCK: u64 = 1024;

/// `struct if_dqblk`.
#[repr(C)]
#[derive(Default)]
struct Limits {
    hard_blocks: u64,
    soft_blocks: u64,
    bytes: u64,
    hard_inodes: u64,
    soft_inodes: u64,
    inodes: u64,
    block_time: u64,
    inode_time: u64,
    valid: u32,
}

/// `struct fsxattr` (`linux/fs.h`).
#[repr(C)]
#[derive(Default)]
struct Attributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    pad: [u8; 8],
}

/// `FS_XFLAG_PROJINHERIT`.
const INHERIT: u32 = 0x200;

/// `FS_IOC_FSGETXATTR` and `FS_IOC_FSSETXATTR`.
const GET_ATTRIBUTES: Opcode = opcode::read::<Attributes>(b'X', 31);
const SET_ATTRIBUTES: Opcode = opcode::write::<Attributes>(b'X', 32);

/// A file system that keeps project quotas.
#[derive(Debug)]
pub(super) struct Quotas {
    /// A directory on it.
    dir: PathBuf,
    fd: OwnedFd,
}

impl Quotas {
    /// The quotas of the file system of a directory; none if it does not enforce any for projects.
    pub(super) fn find(dir: &Path) -> Result<Option<Self>> {
        let fd: OwnedFd = File::open(dir).attempt("open", dir)?.into();
        let found = Self { dir: dir.to_owned(), fd };
        // `struct fs_quota_statv`, of which only version (byte 0) and flags (bytes 2 and 3) matter here.
        let mut state = [0_u64; 32];
        state[0] = u64::from_ne_bytes([FS_QSTATV_VERSION1, 0, 0, 0, 0, 0, 0, 0]);
        if found.control(Q_XGETQSTATV, 0, state.as_mut_ptr().cast()).is_err() {
            return Ok(None);
        }
        let [_, _, low, high, ..] = state[0].to_ne_bytes();
        let enforced = u16::from_ne_bytes([low, high]) & FS_QUOTA_PDQ_ENFD != 0;
        Ok(enforced.then_some(found))
    }

    /// A project that has neither files nor a limit. `taken` are those that the store knows to be in use.
    pub(super) fn choose(&self, taken: impl Fn(u32) -> bool) -> Result<u32> {
        // Stores that share a file system begin at different places.
        let start = rustix::fs::fstat(&self.fd).attempt("look at", &self.dir)?.st_ino;
        let start = u32::try_from(start.wrapping_mul(0x9e37_79b9) % u64::from(COUNT)).unwrap_or(0);
        for n in 0..COUNT {
            let project = FIRST + (start + n) % COUNT;
            if taken(project) {
                continue;
            }
            let there = self.limits(project).attempt("look up a project quota of", &self.dir)?;
            if there.bytes == 0 && there.inodes == 0 && there.hard_blocks == 0 {
                return Ok(project);
            }
        }
        Err(Error::NoProjectId(self.dir.clone()))
    }

    /// Sets how many bytes a project may have; 0 is no limit.
    pub(super) fn limit(&self, project: u32, bytes: u64) -> Result<()> {
        let blocks = bytes.div_ceil(BLOCK);
        let mut limits = Limits { hard_blocks: blocks, valid: QIF_BLIMITS, ..Limits::default() };
        self.control(Q_SETQUOTA, project, (&raw mut limits).cast())
            .attempt("set a project quota of", &self.dir)
    }

    fn limits(&self, project: u32) -> io::Result<Limits> {
        let mut limits = Limits::default();
        match self.control(Q_GETQUOTA, project, (&raw mut limits).cast()) {
            // XFS says so of a project that it has never met.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Ok(Limits::default()),
            done => done.map(|()| limits),
        }
    }

    fn control(&self, command: libc::c_int, id: u32, data: *mut libc::c_void) -> io::Result<()> {
        // QCMD of `linux/quota.h`.
        let command = command << 8 | PRJQUOTA;
        // SAFETY: `data` is valid for the structure of each command that we use; the kernel keeps no pointer.
        #[allow(unsafe_code)]
        let done = unsafe { libc::syscall(libc::SYS_quotactl_fd, self.fd.as_raw_fd(), command, id, data) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Makes an empty directory, and whatever is made in it later, part of a project.
pub(super) fn join(dir: &Path, project: u32) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(CWD, dir, flags, Mode::empty()).attempt("open", dir)?;
    set_project(fd.as_fd(), project).attempt("set the quota project of", dir)
}

fn set_project(fd: BorrowedFd<'_>, project: u32) -> std::result::Result<(), Errno> {
    // SAFETY: opcodes and structure are those of `FS_IOC_FSGETXATTR` and `FS_IOC_FSSETXATTR` (`linux/fs.h`).
    #[allow(unsafe_code)]
    unsafe {
        let mut attributes: Attributes = ioctl::ioctl(fd, Getter::<GET_ATTRIBUTES, Attributes>::new())?;
        attributes.project = project;
        attributes.flags |= INHERIT;
        ioctl::ioctl(fd, Setter::<SET_ATTRIBUTES, Attributes>::new(attributes))
    }
}
