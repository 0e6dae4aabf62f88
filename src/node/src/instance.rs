//! Which process this is: an id that belongs to the state directory, and the lock on it.
//!
//! A restart has the same id, so that it goes on at once with what it held; another process, with a state directory of its own,
//! has another one. The lock keeps two processes from one directory.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io::{Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

use rustix::fs::{FlockOperation, flock};

use crate::error::{Error, Result};

/// Bytes of an id in hexadecimal digits.
const DIGITS: usize = 32;

/// An id, held as long as this lives.
#[derive(Debug)]
pub(crate) struct Instance {
    id: String,
    /// Whoever has it open has the lock.
    _lock: File,
}

impl Instance {
    /// Takes the state directory; makes it and the id where they are missing.
    ///
    /// # Errors
    /// [`Error::StateDirInUse`] where another process has it; [`Error::File`].
    pub(crate) fn take(state_dir: &Path) -> Result<Self> {
        let path = state_dir.join("instance");
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| Error::File { what, path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(state_dir).map_err(failed("make", state_dir))?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed("open", &path))?;
        if let Err(errno) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
            return Err(match errno {
                rustix::io::Errno::WOULDBLOCK => Error::StateDirInUse { path: state_dir.to_owned() },
                other => failed("lock", &path)(other.into()),
            });
        }
        let mut id = Vec::new();
        Read::by_ref(&mut file)
            .take(DIGITS as u64 + 1)
            .read_to_end(&mut id)
            .map_err(failed("read", &path))?;
        let id = match String::from_utf8(id) {
            Ok(id) if id.len() == DIGITS && id.bytes().all(|b| b.is_ascii_hexdigit()) => id,
            _ => {
                let id = hex::encode(rand::random::<[u8; DIGITS / 2]>());
                let written = file
                    .set_len(0)
                    .and_then(|()| file.rewind())
                    .and_then(|()| file.write_all(id.as_bytes()))
                    .and_then(|()| file.sync_all());
                written.map_err(failed("write", &path))?;
                id
            }
        };
        Ok(Self { id, _lock: file })
    }

    /// The id.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_restart_is_the_same_instance_and_a_second_process_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let first = Instance::take(dir.path()).unwrap();
        assert!(matches!(Instance::take(dir.path()), Err(Error::StateDirInUse { .. })));
        let id = first.id().to_owned();
        drop(first);
        assert_eq!(Instance::take(dir.path()).unwrap().id(), id);
        let other = tempfile::tempdir().unwrap();
        assert_ne!(Instance::take(other.path()).unwrap().id(), id);
    }

    #[test]
    fn a_file_that_was_cut_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("instance"), "abc").unwrap();
        let id = Instance::take(dir.path()).unwrap().id().to_owned();
        assert_eq!(id.len(), DIGITS);
        assert_eq!(Instance::take(dir.path()).unwrap().id(), id);
    }
}
