//! The lock of an image directory: two programs on one directory would undo each other's work.

use std::{
    fs::{self, File, TryLockError},
    io::{Read, Seek, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::{Duration, Instant},
};

use crate::{Error, Result, error::Attempt, place::dataset_dir};

/// How long a holder that is about to end is waited for.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(50);
/// Where the locks of stores on datasets lie.
const STORES: &str = "/run/moxlet/stores";
/// Bytes of what a holder says of itself.
const MAX_WORDS: u64 = 200;

/// The lock of a store's directory: held for as long as the store is open, given back by the kernel however the process ends.
///
/// Whoever opens a driver first, which removes what it takes for half-made, has to hold the lock before that.
#[derive(Debug)]
pub(crate) struct DirLock {
    _file: File,
}

impl DirLock {
    /// Takes the lock of a directory, which is made if missing, and writes who holds it. It waits two seconds for a holder
    /// that is about to end.
    ///
    /// # Errors
    /// [`Error::Locked`] with the holder.
    pub(crate) fn take(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).attempt("create", dir)?;
        Self::take_in(dir)
    }

    /// The lock of a store on a dataset, which is mounted only when its driver is open: it lies in `/run/moxlet/stores`.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub(crate) fn of_dataset(dataset: &str) -> Result<Self> {
        let stores = Path::new(STORES);
        let lock = Self::take(&stores.join(dataset_dir(dataset)))?;
        // What an earlier version still has open. It is not kept: other datasets have the same name there.
        let earlier = stores.join(dataset.replace('/', "_"));
        if dataset.contains('/') && earlier.exists() {
            Self::take_in(&earlier)?;
        }
        Ok(lock)
    }

    fn take_in(dir: &Path) -> Result<Self> {
        let path = dir.join("lock");
        let mut file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .attempt("open", &path)?;
        let begun = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if begun.elapsed() < PATIENCE => std::thread::sleep(PAUSE),
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::Locked { dir: dir.to_owned(), holder: words(&file) });
                }
                Err(TryLockError::Error(e)) => return Err(e).attempt("lock", path),
            }
        }
        let mut write = || -> std::io::Result<()> {
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(own_words().as_bytes())
        };
        // Only words for people: a full disk must not keep a store from being opened and emptied.
        if let Err(error) = write() {
            tracing::debug!(path = %path.display(), %error, "the lock does not say who holds it");
        }
        Ok(Self { _file: file })
    }
}

/// What the holder wrote.
fn words(mut file: &File) -> String {
    let mut text = Vec::new();
    if file.rewind().is_ok() {
        let _ = file.take(MAX_WORDS).read_to_end(&mut text);
    }
    let text: String = String::from_utf8_lossy(&text).chars().filter(|c| !c.is_control()).collect();
    if text.is_empty() { "another program".to_owned() } else { text }
}

/// This process, as another one shall name it. Arguments are left out, since they might hold a secret.
fn own_words() -> String {
    let name = std::env::args_os().next().unwrap_or_default();
    let name = Path::new(&name).file_name().unwrap_or_default().to_string_lossy().into_owned();
    format!("process {} ({name})", std::process::id())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn datasets_with_names_that_are_alike_have_locks_of_their_own() {
        let begin = format!("test-{}", std::process::id());
        let [one, two] = ["a/b", "a_b"].map(|end| format!("{begin}/{end}"));
        let first = DirLock::of_dataset(&one).unwrap();
        let second = DirLock::of_dataset(&two).unwrap();
        assert!(matches!(DirLock::of_dataset(&one), Err(Error::Locked { .. })));
        drop((first, second));
        // As an earlier version holds it.
        let earlier = DirLock::take(&Path::new(STORES).join(format!("{begin}_a_b"))).unwrap();
        assert!(matches!(DirLock::of_dataset(&one), Err(Error::Locked { .. })));
        drop(earlier);
        DirLock::of_dataset(&one).unwrap();
        for dir in [dataset_dir(&one), dataset_dir(&two), format!("{begin}_a_b")] {
            fs::remove_dir_all(Path::new(STORES).join(dir)).unwrap();
        }
    }

    #[test]
    fn a_second_opener_is_told_who_holds_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let first = DirLock::take(dir.path()).unwrap();
        let error = DirLock::take(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        drop(first);
        DirLock::take(dir.path()).unwrap();
    }
}
