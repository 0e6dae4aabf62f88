//! Trees that containers wrote are deleted in the background: whoever removes a volume only waits for a rename.
//!
//! One thread deletes one tree at a time, however many wait and however large they are, so that neither locks nor the runtime's threads
//! are held meanwhile. A process that ends does not wait for it: what is left is deleted after the next start.

use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::mpsc,
};

use moxlet_errors::chain;
use tracing::warn;

use crate::error::{Error, Result};

/// What deletes a tree by way of a scratch directory.
type Delete = fn(&Path, &Path) -> moxlet_storage::Result<()>;

/// The trees that are to be deleted.
#[derive(Debug)]
pub(crate) struct Deletions {
    /// Where they lie until then, on the file system that they are from.
    dir: PathBuf,
    queue: mpsc::Sender<PathBuf>,
}

impl Deletions {
    /// Makes the directory that trees are moved into, and goes on with what is in it.
    ///
    /// # Errors
    /// The directory or the thread cannot be made.
    pub(crate) fn open(dir: PathBuf) -> Result<Self> {
        Self::with(dir, moxlet_storage::remove_tree)
    }

    /// The same with another way to delete.
    pub(crate) fn with(dir: PathBuf, delete: Delete) -> Result<Self> {
        let failed = |what: &str, e| Error::io(format!("cannot {what} {}", dir.display()), e);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(|e| failed("make", e))?;
        let (queue, waiting) = mpsc::channel::<PathBuf>();
        for entry in fs::read_dir(&dir).map_err(|e| failed("list", e))? {
            // The receiver is not gone yet.
            let _ = queue.send(entry.map_err(|e| failed("list", e))?.path());
        }
        let scratch = dir.clone();
        let work = move || {
            for tree in waiting {
                if let Err(error) = delete(&tree, &scratch) {
                    warn!(error = chain(&error), "not deleted; the next start of the agent tries again");
                }
            }
        };
        std::thread::Builder::new()
            .name("deletions".to_owned())
            .spawn(work)
            .map_err(|e| Error::io("cannot start a thread for deletions", e))?;
        Ok(Self { dir, queue })
    }

    /// Takes a tree from its place and has it deleted; of a missing one nothing. Nothing may be mounted below it.
    ///
    /// # Errors
    /// It cannot be moved.
    pub(crate) fn take(&self, tree: &Path) -> Result<()> {
        let aside = self.dir.join(hex::encode(rand::random::<[u8; 16]>()));
        match fs::rename(tree, &aside) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(Error::io(format!("cannot move {} away", tree.display()), e)),
        }
        // Without the thread it is deleted after the next start.
        let _ = self.queue.send(aside);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_tree_is_gone_from_its_place_at_once_and_what_was_left_is_deleted_too() {
        let dir = tempfile::tempdir().unwrap();
        let aside = dir.path().join(".del");
        fs::create_dir_all(aside.join("left/by/a/kill")).unwrap();
        let deletions = Deletions::open(aside.clone()).unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        deletions.take(&tree).unwrap();
        deletions.take(&tree).unwrap();
        assert!(!tree.exists());
        while fs::read_dir(&aside).unwrap().count() > 0 {
            std::thread::yield_now();
        }
    }
}
