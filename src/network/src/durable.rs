//! Files that are there after a power cut if they were said to be: written beside, synced, renamed, and their directory synced.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
};

use crate::{Result, error::io};

/// Writes a file whole or not at all.
///
/// # Errors
/// It could not be written; what was there before may be there still.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let draft = path.with_extension("new");
    let write = || {
        let mut file = File::create(&draft)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(io("write", &draft))?;
    fs::rename(&draft, path).map_err(io("write", path))?;
    sync_dir(path.parent().unwrap_or(Path::new("/"))).map_err(io("write", path))
}

/// Has a directory's names on disk.
///
/// # Errors
/// The directory cannot be opened or synced.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_no_draft_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write(&path, b"a longer text").unwrap();
        write(&path, b"text").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"text");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let error = write(&dir.path().join("none/a.json"), b"").unwrap_err();
        assert!(error.to_string().contains("none/a.new"), "{error}");
    }
}
