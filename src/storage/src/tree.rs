//! Walking and removing trees that a container wrote: of any depth, never followed through links.

use std::{
    collections::HashSet,
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags},
    io::Errno,
};

use crate::{
    Usage,
    error::{Attempt, Result},
};

/// How deep and how far [`usage`] looks before it is content with what it has.
const USAGE_DEPTH: usize = 200;
const USAGE_ENTRIES: u64 = 2_000_000;

/// Removes a file or tree by moving it into a new directory of `scratch` (on the same file system) first, so that it
/// is gone from its place at once. A missing one is removed already.
///
/// A container can nest directories deeper than any stack or descriptor table goes; so a directory that is not empty
/// is moved up instead of being entered.
pub(crate) fn remove(path: &Path, scratch: &Path) -> Result<()> {
    match set_aside(path, scratch)? {
        Some(aside) => finish(&aside),
        None => Ok(()),
    }
}

/// The first half of [`remove`]: takes the tree from its place.
pub(crate) fn set_aside(path: &Path, scratch: &Path) -> Result<Option<PathBuf>> {
    let aside = unique(scratch, "del");
    fs::create_dir(&aside).attempt("create", &aside)?;
    match fs::rename(path, aside.join("0")) {
        Ok(()) => Ok(Some(aside)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            fs::remove_dir(&aside).attempt("remove", &aside)?;
            Ok(None)
        }
        Err(e) => {
            let _ = fs::remove_dir(&aside);
            Err(e).attempt("move away", path)
        }
    }
}

/// The second half of [`remove`]: removes what was set aside.
pub(crate) fn finish(aside: &Path) -> Result<()> {
    let top = open_dir(aside)?;
    let mut next: u64 = 0;
    let mut moved: u64 = 1;
    while next < moved {
        let name = next.to_string();
        next += 1;
        match rustix::fs::unlinkat(&top, &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::ISDIR) => {}
            Err(e) => return Err(e).attempt("remove", aside.join(name)),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(&top, &name, flags, Mode::empty()).attempt("open", aside.join(&name))?;
        for entry in Dir::read_from(&dir).attempt("list", aside.join(&name))? {
            let entry = entry.attempt("list", aside.join(&name))?;
            let child = entry.file_name();
            if child == c"." || child == c".." {
                continue;
            }
            match rustix::fs::unlinkat(&dir, child, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => continue,
                Err(Errno::ISDIR) => {}
                Err(e) => return Err(e).attempt("remove a file below", aside.join(&name)),
            }
            match rustix::fs::unlinkat(&dir, child, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::NOTEMPTY) => {
                    rustix::fs::renameat(&dir, child, &top, moved.to_string())
                        .attempt("move up a directory below", aside.join(&name))?;
                    moved += 1;
                }
                Err(e) => return Err(e).attempt("remove a directory below", aside.join(&name)),
            }
        }
        rustix::fs::unlinkat(&top, &name, AtFlags::REMOVEDIR).attempt("remove", aside.join(&name))?;
    }
    fs::remove_dir(aside).attempt("remove", aside)
}

/// A name in a directory that nobody else has used or will use.
pub(crate) fn unique(dir: &Path, prefix: &str) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    dir.join(format!("{prefix}-{}-{now:x}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)))
}

fn open_dir(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty()).attempt("open", path)
}

/// What a tree takes on disk, its root directory apart. Bounded: of a tree beyond all reason only a part is counted.
pub(crate) fn usage(path: &Path) -> Result<Usage> {
    let mut usage = Usage::default();
    let mut linked = HashSet::new();
    let mut stack = vec![Dir::new(open_dir(path)?).attempt("list", path)?];
    loop {
        let depth = stack.len();
        let Some(dir) = stack.last_mut() else { break };
        let Some(entry) = dir.read() else {
            stack.pop();
            continue;
        };
        let entry = entry.attempt("list", path)?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let fd = dir.fd().attempt("list", path)?;
        let stat = match rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            // The container is running and may remove what we are looking at.
            Err(Errno::NOENT) => continue,
            Err(e) => return Err(e).attempt("look below", path),
        };
        let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if is_dir || stat.st_nlink < 2 || linked.insert((stat.st_dev, stat.st_ino)) {
            usage.inodes += 1;
            usage.bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
        }
        if usage.inodes >= USAGE_ENTRIES {
            break;
        }
        if is_dir && depth < USAGE_DEPTH {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match rustix::fs::openat(fd, name, flags, Mode::empty()) {
                Ok(child) => {
                    let child = Dir::new(child).attempt("list", path)?;
                    stack.push(child);
                }
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(e) => return Err(e).attempt("open a directory below", path),
            }
        }
    }
    Ok(usage)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn a_tree_deeper_than_any_descriptor_table_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = dir.path().join("scratch");
        fs::create_dir(&scratch).unwrap();
        let top = dir.path().join("deep");
        fs::create_dir(&top).unwrap();
        let mut at = open_dir(&top).unwrap();
        for _ in 0..5000 {
            rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
            at = rustix::fs::openat(&at, "d", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        }
        drop(at);
        fs::write(top.join("f"), "x").unwrap();
        std::os::unix::fs::symlink("/etc", top.join("link")).unwrap();
        assert!(usage(&top).unwrap().inodes >= 100);
        remove(&top, &scratch).unwrap();
        assert!(!top.exists());
        assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0);
        assert!(Path::new("/etc/passwd").exists());
        remove(&top, &scratch).unwrap();
    }

    #[test]
    fn hard_links_are_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), vec![1; 8192]).unwrap();
        fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
        assert_eq!(usage(dir.path()).unwrap().inodes, 1);
    }
}
