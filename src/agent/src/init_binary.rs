//! moxlet-init as CTs get it: a copy named by its hash below `root_dir`, so that an upgrade of the program replaces nothing
//! that a running CT has mounted.

use std::{
    fs,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

const NAME: &str = "moxlet-init";
/// Larger is no moxlet-init.
const MAX: u64 = 64 << 20;

/// Puts a copy of moxlet-init (`from`, else beside this program) below `dir` and returns its path.
///
/// # Errors
/// [`Error::Unfit`] when there is none, with the key that names one.
pub(crate) fn install(from: Option<&Path>, dir: &Path) -> Result<PathBuf> {
    let source = match from {
        Some(path) => path.to_owned(),
        None => std::env::current_exe()
            .map_err(|e| Error::io("cannot find this program", e))?
            .with_file_name(NAME),
    };
    let bytes = match fs::metadata(&source) {
        Ok(meta) if meta.is_file() && meta.len() <= MAX => {
            fs::read(&source).map_err(|e| Error::io(format!("cannot read {}", source.display()), e))?
        }
        _ => {
            return Err(Error::Unfit(format!(
                "{} is not there or no program: install moxlet-init beside moxlet, or set init_binary",
                source.display()
            )));
        }
    };
    if !bytes.starts_with(b"\x7fELF") {
        return Err(Error::Unfit(format!(
            "{} is no ELF program: set init_binary to moxlet-init",
            source.display()
        )));
    }
    let hash = hex::encode(Sha256::digest(&bytes));
    let own = dir.join(&hash[..16]);
    let target = own.join(NAME);
    let failed = |e: std::io::Error| Error::io(format!("cannot write {}", target.display()), e);
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o711).create(&own).map_err(failed)?;
    if fs::metadata(&target).is_ok_and(|m| m.len() == bytes.len() as u64) {
        return Ok(target);
    }
    let draft = own.join(".new");
    let _ = fs::remove_file(&draft);
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(&draft).map_err(failed)?;
    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(failed)?;
    drop(file);
    fs::rename(&draft, &target).map_err(failed)?;
    Ok(target)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_upgrade_leaves_the_old_program_where_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join(NAME);
        fs::write(&source, b"\x7fELF one").unwrap();
        let one = install(Some(&source), &dir.path().join("init")).unwrap();
        fs::write(&source, b"\x7fELF two").unwrap();
        let two = install(Some(&source), &dir.path().join("init")).unwrap();
        assert_ne!(one, two);
        assert_eq!(fs::read(one).unwrap(), b"\x7fELF one");
    }

    #[test]
    fn a_missing_program_is_named_with_the_key() {
        let error = install(Some(Path::new("/nonexistent/x")), Path::new("/nonexistent")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/x") && error.to_string().contains("init_binary"));
    }
}
