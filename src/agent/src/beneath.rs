//! Files and directories below a directory that a container may write to: never over a link, never outside.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat2};

const INSIDE: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// The parts of a relative path without `.` and `..`.
pub(crate) fn relative(path: &str) -> io::Result<PathBuf> {
    let bad = || io::Error::new(io::ErrorKind::InvalidInput, format!("{path:?} is no plain relative path"));
    if path.is_empty() || path.len() > 4096 || path.contains('\0') {
        return Err(bad());
    }
    let plain = Path::new(path).components().all(|c| matches!(c, Component::Normal(_)));
    if plain { Ok(PathBuf::from(path)) } else { Err(bad()) }
}

/// Opens a directory by its trusted path.
pub(crate) fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(CWD, path, OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

/// Makes the directories of `path` (relative) below `dir` and returns the last one.
pub(crate) fn make_dirs(dir: impl AsFd, path: &Path, mode: Mode) -> io::Result<OwnedFd> {
    let mut at =
        openat2(&dir, ".", OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), INSIDE)?;
    for part in path.components() {
        let Component::Normal(name) = part else { continue };
        match mkdirat(&at, name, mode) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        at = openat2(&at, name, OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), INSIDE)?;
    }
    Ok(at)
}

/// Opens a directory below `dir` for listing; `path` may be empty for `dir` itself.
pub(crate) fn open_dir_below(dir: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(openat2(&dir, path, flags, Mode::empty(), INSIDE)?)
}

/// Opens a regular file below `dir` for reading; of anything else nothing is read.
pub(crate) fn open_file(dir: impl AsFd, path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(openat2(&dir, path, flags, Mode::empty(), INSIDE)?);
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} is no regular file", path.display())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_link_on_the_way_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/tmp", dir.path().join("a")).unwrap();
        let root = open_dir(dir.path()).unwrap();
        assert!(make_dirs(&root, Path::new("a/b"), Mode::from_raw_mode(0o755)).is_err());
        assert!(make_dirs(&root, Path::new("c/d"), Mode::from_raw_mode(0o755)).is_ok());
        assert!(dir.path().join("c/d").is_dir());
    }

    #[test]
    fn only_regular_files_are_read_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("a")).unwrap();
        std::fs::write(dir.path().join("a/file"), "x").unwrap();
        std::os::unix::fs::symlink("file", dir.path().join("a/link")).unwrap();
        std::os::unix::fs::symlink("a", dir.path().join("b")).unwrap();
        let root = open_dir(dir.path()).unwrap();
        assert!(open_file(&root, Path::new("a/file")).is_ok());
        for bad in ["a", "a/link", "b/file", "../x"] {
            assert!(open_file(&root, Path::new(bad)).is_err(), "{bad}");
        }
        assert!(
            open_dir_below(&root, Path::new("a")).is_ok() && open_dir_below(&root, Path::new("")).is_ok()
        );
        assert!(open_dir_below(&root, Path::new("b")).is_err());
    }

    #[test]
    fn only_plain_relative_paths_pass() {
        for bad in ["", "/a", "../a", "a/../b", "a\0b"] {
            assert!(relative(bad).is_err(), "{bad:?}");
        }
        assert!(relative("web/0.log").is_ok());
    }
}
