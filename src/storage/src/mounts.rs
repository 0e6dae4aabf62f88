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
        crate::idmap::bind_with(path, path, None, crate::idmap::BindOptions::default())?;
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

/// Unmounts all that is mounted strictly below a directory, the innermost first. What is mounted elsewhere stays: a mount with a
/// peer outside of the directory leaves its group before.
pub fn unmount_all_below(dir: &Path) -> Result<()> {
    let mut failed = None;
    for path in with_peers_elsewhere(dir)? {
        // Of two mounts on one place only the upper one can be named; the lower one is reached when that is gone.
        rustix::mount::mount_change(&path, MountPropagationFlags::PRIVATE).attempt("make private", &path)?;
    }
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

/// The mount points strictly below a directory that share a peer group with a mount that is not there.
fn with_peers_elsewhere(dir: &Path) -> Result<Vec<PathBuf>> {
    let table = fs::read("/proc/self/mountinfo").attempt("read", "/proc/self/mountinfo")?;
    match fs::canonicalize(dir) {
        Ok(dir) => Ok(shared_across(&table, &dir)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e).attempt("look at", dir),
    }
}

/// As [`with_peers_elsewhere`], of a `mountinfo` table: the peer group is the optional field `shared:N` before the lone dash.
fn shared_across(table: &[u8], dir: &Path) -> Vec<PathBuf> {
    let mut elsewhere = std::collections::HashSet::new();
    let mut below = Vec::new();
    for line in table.split(|b| *b == b'\n') {
        let mut fields = line.split(|b| *b == b' ');
        let Some(point) = fields.nth(4).map(|f| PathBuf::from(OsString::from_vec(unescape(f)))) else {
            continue;
        };
        let group = fields.skip(1).take_while(|f| *f != b"-").find(|f| f.starts_with(b"shared:"));
        match group {
            Some(group) if point.starts_with(dir) && point != dir => below.push((point, group)),
            Some(group) => drop(elsewhere.insert(group)),
            None => {}
        }
    }
    below.retain(|(_, group)| elsewhere.contains(group));
    below.into_iter().map(|(point, _)| point).collect()
}

/// What is mounted at a path, as the file system names it (a device or a dataset); none if nothing is.
pub(crate) fn source_of(path: &Path) -> Result<Option<String>> {
    if !is_mounted(path)? {
        return Ok(None);
    }
    let table = fs::read("/proc/self/mountinfo").attempt("read", "/proc/self/mountinfo")?;
    let path = fs::canonicalize(path).attempt("look at", path)?;
    Ok(last_source(&table, &path))
}

/// Whether what is mounted at a path is the file system of this name (a device or a dataset).
pub fn is_mounted_from(path: &Path, source: &str) -> Result<bool> {
    Ok(source_of(path)?.as_deref() == Some(source))
}

/// The name of the file system that a directory lies on, such as `ext4`.
pub(crate) fn file_system_of(path: &Path) -> Result<String> {
    let stat = rustix::fs::stat(path).attempt("look at", path)?;
    let device = format!("{}:{}", rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let table = fs::read("/proc/self/mountinfo").attempt("read", "/proc/self/mountinfo")?;
    let path = fs::canonicalize(path).attempt("look at", path)?;
    Ok(type_of(&table, &path, &device).unwrap_or_else(|| "an unknown file system".to_owned()))
}

/// The type of the innermost mount above a path; btrfs has other device numbers in its files than in the table, so the
/// device decides only between mounts at one place.
fn type_of(table: &[u8], path: &Path, device: &str) -> Option<String> {
    let above = table.split(|b| *b == b'\n').filter_map(|line| {
        let mut fields = line.split(|b| *b == b' ');
        let own = fields.nth(2)? == device.as_bytes();
        let point = PathBuf::from(OsString::from_vec(unescape(fields.nth(1)?)));
        let kind = fields.skip_while(|f| *f != b"-").nth(1)?;
        path.starts_with(&point).then(|| (point.components().count(), own, kind))
    });
    above
        .max_by_key(|(depth, own, _)| (*depth, *own))
        .map(|(_, _, kind)| String::from_utf8_lossy(kind).into_owned())
}

/// The source of the topmost mount at a path: the second field after the lone dash.
fn last_source(table: &[u8], path: &Path) -> Option<String> {
    let mut from_the_end = table.rsplit(|b| *b == b'\n');
    let last = from_the_end.find(|line| {
        let point = line.split(|b| *b == b' ').nth(4);
        point.is_some_and(|p| Path::new(&OsString::from_vec(unescape(p))) == path)
    });
    let mut fields = last?.split(|b| *b == b' ').skip_while(|f| *f != b"-");
    fields.nth(2).map(|source| String::from_utf8_lossy(&unescape(source)).into_owned())
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
    fn only_mounts_with_a_peer_outside_of_the_directory_are_named() {
        let table = b"1 0 0:1 / / rw shared:1 - ext4 a rw\n2 1 0:2 / /srv rw shared:2 - tmpfs t rw\n\
            3 1 0:1 /p /pods rw shared:3 - ext4 a rw\n4 3 0:2 / /pods/a rw shared:2 - tmpfs t rw\n\
            5 3 0:2 / /pods/b rw shared:4 master:2 - tmpfs t rw\n6 5 0:3 / /pods/b/c rw - tmpfs t rw\n";
        assert_eq!(shared_across(table, Path::new("/pods")), [PathBuf::from("/pods/a")]);
        assert_eq!(shared_across(table, Path::new("/pods/b")), Vec::<PathBuf>::new());
    }

    #[test]
    fn what_is_mounted_at_a_path_is_what_came_last() {
        let table = b"41 26 0:34 / /tank rw shared:37 - zfs tank rw,xattr\n43 26 0:35 / /mnt/a rw,nodev shared:39 - zfs \
            tank/p/a rw\n44 26 0:36 / /mnt/a rw shared:40 - zfs tank/p/b rw,xattr,posixacl\n";
        assert_eq!(last_source(table, Path::new("/mnt/a")).as_deref(), Some("tank/p/b"));
        assert_eq!(last_source(table, Path::new("/mnt")), None);
        assert_eq!(type_of(table, Path::new("/tank/x/y"), "0:34").as_deref(), Some("zfs"));
        assert_eq!(type_of(table, Path::new("/etc"), "0:1"), None);
    }

    #[test]
    fn a_missing_path_is_not_mounted() {
        assert!(!is_mounted(Path::new("/nonexistent/x")).unwrap());
        unmount(Path::new("/nonexistent/x")).unwrap();
        unmount_all_below(Path::new("/nonexistent/x")).unwrap();
    }
}
