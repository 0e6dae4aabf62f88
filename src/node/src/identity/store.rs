//! The node's keys and certificates on disk: one file a pair, 0600, replaced atomically, so that key and
//! certificate always belong together.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use super::keys::Pair;
use crate::{Error, Result};

/// More than any key with its chain.
const MAX_FILE: u64 = 256 << 10;

/// A directory of key files.
#[derive(Clone, Debug)]
pub(super) struct Store {
    dir: PathBuf,
}

impl Store {
    /// Opens or makes the directory, 0700.
    pub(super) fn open(state_dir: &Path) -> Result<Self> {
        let dir = state_dir.join("pki");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(file("make", &dir))?;
        Ok(Self { dir })
    }

    /// The pair of that name; one that cannot be used counts as none and is told in the log.
    pub(super) fn pair(&self, name: &str) -> Result<Option<Pair>> {
        let Some(text) = self.read(&format!("{name}.pem"))? else { return Ok(None) };
        match Pair::parse_joined(&text) {
            Ok(pair) => Ok(Some(pair)),
            Err(error) => {
                tracing::warn!(file = %self.dir.join(format!("{name}.pem")).display(), %error, "stored certificate cannot be used, a new one will be made");
                Ok(None)
            }
        }
    }

    /// Keeps a pair and forgets the key that waited for it.
    pub(super) fn keep(&self, name: &str, pair: &Pair) -> Result<()> {
        self.write(&format!("{name}.pem"), &pair.joined())?;
        self.forget_pending(name)
    }

    /// The key whose certificate has been requested but not yet issued.
    pub(super) fn pending(&self, name: &str) -> Result<Option<String>> {
        self.read(&format!("{name}-pending.key"))
    }

    /// Keeps such a key, so that a restart goes on with the same request.
    pub(super) fn keep_pending(&self, name: &str, key_pem: &str) -> Result<()> {
        self.write(&format!("{name}-pending.key"), key_pem)
    }

    /// Forgets it.
    pub(super) fn forget_pending(&self, name: &str) -> Result<()> {
        let path = self.dir.join(format!("{name}-pending.key"));
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(file("remove", &path)(e)),
            _ => Ok(()),
        }
    }

    fn read(&self, name: &str) -> Result<Option<String>> {
        let path = self.dir.join(name);
        let mut text = String::new();
        match File::open(&path) {
            Ok(f) => f.take(MAX_FILE + 1).read_to_string(&mut text).map_err(file("read", &path))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(file("read", &path)(e)),
        };
        // Cut, a chain would read as a shorter one.
        if text.len() as u64 > MAX_FILE {
            return Err(file("read", &path)(std::io::ErrorKind::FileTooLarge.into()));
        }
        Ok(Some(text))
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.dir.join(name);
        let draft = self.dir.join(format!(".{name}.new"));
        let _ = fs::remove_file(&draft);
        let done = (|| {
            let mut f = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
            f.write_all(text.as_bytes())?;
            f.sync_all()?;
            fs::rename(&draft, &path)?;
            File::open(&self.dir)?.sync_all()
        })();
        done.map_err(file("write", &path))
    }
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { what, path, source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::identity::{keys, names::ServingNames};

    #[test]
    fn keeps_a_pair_0600_and_survives_garbage() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert!(store.pair("x").unwrap().is_none());
        store.keep_pending("x", "key").unwrap();
        assert_eq!(store.pending("x").unwrap().as_deref(), Some("key"));
        let pair = keys::self_signed("n", &ServingNames { dns: vec!["n".into()], ips: vec![] }).unwrap();
        store.keep("x", &pair).unwrap();
        assert!(store.pending("x").unwrap().is_none());
        let path = dir.path().join("pki/x.pem");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(store.pair("x").unwrap().unwrap().leaf, pair.leaf);
        fs::write(&path, "nonsense").unwrap();
        assert!(store.pair("x").unwrap().is_none());
    }

    #[test]
    fn a_file_that_is_too_large_is_refused_and_not_cut() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let most = usize::try_from(MAX_FILE).unwrap();
        store.keep_pending("x", &"k".repeat(most)).unwrap();
        assert_eq!(store.pending("x").unwrap().unwrap().len(), most);
        store.keep_pending("x", &"k".repeat(most + 1)).unwrap();
        let error = store.pending("x").unwrap_err();
        assert!(error.to_string().contains("x-pending.key"), "{error}");
    }
}
