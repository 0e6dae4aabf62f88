//! Mounts of the host: shared directories, what is mounted, and taking it down again.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, StatxAttributes, StatxFlags},
    io::Errno,
    mount::{MountPropagationFlags, UnmountFlags},
};

use crate::error::{Attempt, Result};

/// Makes a directory a shared mount of its own, so that what is mounted below it appears in the containers that
/// have it as a slave. Idempotent.
pub fn make_shared_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).attempt("create", path)?;
    if !is_mounted(path)? {
        crate::idmap::bind_with(path, path, None, false, false)?;
    }
    rustix::mount::mount_change(path, MountPropagationFlags::SHARED).attempt("make shared", path)
}

/// Whether something is mounted at exactly this path; a missing one is not.
pub fn is_mounted(path: &Path) -> Result<bool> {
    match rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, StatxFlags::empty())
    {
        Ok(s) => Ok(s.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
        // What is left of a file system that died is a mount as well.
        Err(Errno::NOTCONN | Errno::STALE) => Ok(true),
        Err(e) => Err(e).attempt("look at", path),
    }
}

/// Unmounts whatever is mounted at a path, however many times; a busy mount is detached. Idempotent.
pub fn unmount(path: &Path) -> Result<()> {
    while is_mounted(path)? {
        match rustix::mount::unmount(path, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::BUSY) => rustix::mount::unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
                .attempt("detach", path)?,
            // Somebody else was faster, or it is the root of a mount namespace.
            Err(Errno::INVAL | Errno::NOENT) if !is_mounted(path)? => {}
            Err(e) => return Err(e).attempt("unmount", path),
        }
    }
    Ok(())
}

/// Unmounts all that is mounted strictly below a directory, the innermost first.
pub fn unmount_all_below(dir: &Path) -> Result<()> {
    let mut failed = None;
    for path in mounted_below(dir)?.into_iter().rev() {
        if let Err(e) = unmount(&path) {
            failed.get_or_insert(e);
        }
    }
    failed.map_or(Ok(()), Err)
}

/// The mount points strictly below a directory, in the order in which they were mounted.
pub fn mounted_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let table = fs::read("/proc/self/mountinfo").attempt("read", "/proc/self/mountinfo")?;
    let dir = match fs::canonicalize(dir) {
        Ok(dir) => dir,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).attempt("look at", dir),
    };
    Ok(mount_points(&table).filter(|p| p.starts_with(&dir) && *p != dir).collect())
}

/// The mount points of a `mountinfo` table (proc(5)): the fifth field, with blanks as octal escapes.
fn mount_points(table: &[u8]) -> impl Iterator<Item = PathBuf> {
    table
        .split(|b| *b == b'\n')
        .filter_map(|line| line.split(|b| *b == b' ').nth(4))
        .map(|field| PathBuf::from(OsString::from_vec(unescape(field))))
}

fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| first == b'\\').and_then(|d| {
            d.iter().try_fold(0_u16, |n, c| (b'0'..=b'7').contains(c).then(|| n * 8 + u16::from(c - b'0')))
        });
        match octal.and_then(|n| u8::try_from(n).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn mount_points_with_blanks_are_read() {
        let table = b"36 35 98:0 /mnt1 /mnt/a\\040b\\134 rw shared:1 - ext4 /dev/root rw\nshort\n";
        let points: Vec<_> = mount_points(table).collect();
        assert_eq!(points, [PathBuf::from("/mnt/a b\\")]);
    }

    #[test]
    fn a_missing_path_is_not_mounted() {
        assert!(!is_mounted(Path::new("/nonexistent/x")).unwrap());
        unmount(Path::new("/nonexistent/x")).unwrap();
        unmount_all_below(Path::new("/nonexistent/x")).unwrap();
    }
}
