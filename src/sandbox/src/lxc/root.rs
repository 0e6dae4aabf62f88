//! The one root directory that all CTs share, mounted read-only: mount points and nothing else. What a CT has beside
//! them is mounted: moxlet-init, the pod's shared directory, and the kernel's filesystems.

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use crate::{Error, INIT_IN_CT, Result, error::io};

const DIRS: [&str; 11] = ["bin", "dev", "etc", "mnt", "proc", "root", "run", "sbin", "sys", "tmp", "var"];

/// Makes a directory with this mode, or gives an existing one that mode.
pub(super) fn make_dir(path: &Path, mode: u32) -> Result<()> {
    fs::create_dir_all(path).map_err(io("create", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(io("set the mode of", path))
}

/// Makes the root directory, or completes it. CTs may be running on it.
pub(super) fn make(root: &Path) -> Result<()> {
    make_dir(root, 0o755)?;
    for dir in DIRS {
        make_dir(&root.join(dir), 0o755)?;
    }
    let init = root.join(&INIT_IN_CT[1..]);
    match fs::File::create_new(&init) {
        Ok(_) => {}
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
        Err(e) => return Err(io("create", init)(e)),
    }
    Ok(())
}

/// Fails if the ids of a CT could not get at `path`: every directory above it must be searchable by others.
pub(super) fn check_reachable(path: &Path) -> Result<()> {
    for dir in path.ancestors().skip(1) {
        let meta = fs::metadata(dir).map_err(io("look at", dir))?;
        if meta.mode() & 0o001 == 0 {
            return Err(Error::Host(format!(
                "a CT's ids cannot get at {}: run `chmod o+x {}` or choose another directory",
                path.display(),
                dir.display()
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_root_is_made_once_and_completed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        make(&root).unwrap();
        fs::remove_dir(root.join("tmp")).unwrap();
        make(&root).unwrap();
        assert!(root.join("tmp").is_dir() && root.join("sbin/moxlet-init").is_file());
    }

    #[test]
    fn a_closed_directory_above_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let inner = dir.path().join("x");
        let error = check_reachable(&inner).unwrap_err().to_string();
        assert!(error.contains(&format!("chmod o+x {}", dir.path().display())), "{error}");
    }
}
