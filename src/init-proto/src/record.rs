//! Exit records: one small JSON file a container, replaced atomically, read without trust.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{Read, Write},
    os::fd::OwnedFd,
    path::Path,
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};

use crate::{ContainerState, Error, Result, Status, bounded, valid_id};

/// The longest exit record in bytes.
const MAX_RECORD: u64 = 64 << 10;

/// Opens `path` without following links in its last two components: they lie in a directory that a CT's root owns.
pub(crate) fn open_untrusted(path: &Path, flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or(Errno::INVAL)?;
    let (trusted, relative) = match (parent.parent(), parent.file_name()) {
        (Some(top), Some(dir)) => {
            let top = if top.as_os_str().is_empty() { Path::new(".") } else { top };
            (top, Path::new(dir).join(name))
        }
        _ => (parent, Path::new(name).to_path_buf()),
    };
    let top =
        rustix::fs::openat(CWD, trusted, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::fs::openat2(
        top,
        relative,
        flags | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )
}

/// Reads the exit record of a container; `None` where there is none.
///
/// The CT's root owns the file and its directory: links are not followed, only a regular file is read, at most 64 KiB of it.
///
/// # Errors
/// [`Error::Record`] for a file that is not such a record.
pub fn read_exit_record(path: &Path) -> Result<Option<ContainerState>> {
    let wrong = |reason: String| Error::Record { path: path.to_owned(), reason };
    let file = match open_untrusted(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(None),
        Err(e) => return Err(wrong(e.to_string())),
    };
    let stat = rustix::fs::fstat(&file).map_err(|e| wrong(e.to_string()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(wrong("it is not a regular file".into()));
    }
    let mut text = Vec::new();
    File::from(file).take(MAX_RECORD + 1).read_to_end(&mut text).map_err(|e| wrong(e.to_string()))?;
    if text.len() as u64 > MAX_RECORD {
        return Err(wrong(format!("it is longer than {MAX_RECORD} bytes")));
    }
    let state: ContainerState = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
    if path.file_name() != Some(OsStr::new(&format!("{}.json", state.id))) {
        return Err(wrong("it is of another container".into()));
    }
    Ok(Some(checked(state)?))
}

/// Replaces `<dir>/<id>.json` by rename. For the init; the directory is made where it is missing. Not synced to the disk: it
/// has to outlive the CT and the agent, and after a crash of the host the CT is gone with all that the record speaks of.
///
/// # Errors
/// [`Error::Record`] with what the system says.
pub fn write_exit_record(dir: &Path, state: &ContainerState) -> Result<()> {
    let path = dir.join(format!("{}.json", state.id));
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(dir)?;
        let draft = dir.join(format!(".{}.json", state.id));
        let mut file = File::create(&draft)?;
        file.write_all(&serde_json::to_vec(state)?)?;
        fs::rename(&draft, &path)
    };
    write().map_err(|e| Error::Record { path: path.clone(), reason: e.to_string() })
}

/// A state from a CT with its texts bounded and its id checked.
pub(crate) fn checked(mut state: ContainerState) -> Result<ContainerState> {
    if !valid_id(&state.id) {
        return Err(Error::Malformed("an id is not valid".into()));
    }
    if let Status::Exited { message: Some(text), .. } = &mut state.status {
        *text = bounded(text);
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::os::unix::fs::symlink;

    use super::*;

    fn exited(id: &str) -> ContainerState {
        ContainerState {
            id: id.into(),
            status: Status::Exited {
                code: 137,
                signal: Some(9),
                started_at_ns: 1,
                finished_at_ns: 2,
                message: None,
            },
            pid: None,
            created_at_ns: 1,
        }
    }

    #[test]
    fn a_record_comes_back_as_written() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("state");
        write_exit_record(&dir, &exited("abc")).unwrap();
        assert_eq!(read_exit_record(&dir.join("abc.json")).unwrap(), Some(exited("abc")));
        assert_eq!(read_exit_record(&dir.join("none.json")).unwrap(), None);
    }

    #[test]
    fn links_devices_and_huge_files_are_refused() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("state");
        write_exit_record(&dir, &exited("abc")).unwrap();
        symlink(dir.join("abc.json"), dir.join("link.json")).unwrap();
        assert!(read_exit_record(&dir.join("link.json")).is_err());
        symlink(&dir, top.path().join("other")).unwrap();
        assert!(read_exit_record(&top.path().join("other/abc.json")).is_err());
        fs::write(dir.join("big.json"), vec![b' '; 70_000]).unwrap();
        assert!(read_exit_record(&dir.join("big.json")).is_err());
        fs::copy(dir.join("abc.json"), dir.join("def.json")).unwrap();
        assert!(read_exit_record(&dir.join("def.json")).is_err(), "another container's record");
        fs::create_dir(dir.join("dir.json")).unwrap();
        assert!(read_exit_record(&dir.join("dir.json")).is_err());
    }
}
