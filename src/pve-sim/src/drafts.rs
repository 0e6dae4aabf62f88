//! Where files are written before they are moved to their places: a directory of each simulator's own, within one that several
//! share. One whose lock nobody holds is of a simulator that was killed, and goes.

use std::{
    fs::{self, File},
    io::{ErrorKind, Result},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

/// The directory of one simulator, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Drafts {
    dir: PathBuf,
    _held: File,
}

impl Drafts {
    /// Makes one within a directory, which is made if missing.
    pub(crate) fn open(shared: &Path) -> Result<Self> {
        fs::create_dir_all(shared)?;
        // One at a time: nobody takes for abandoned what is just being made.
        let opening = File::open(shared)?;
        flock(&opening, FlockOperation::LockExclusive)?;
        for entry in fs::read_dir(shared)? {
            let path = entry?.path();
            if flock(File::open(&path)?, FlockOperation::NonBlockingLockExclusive).is_ok() {
                fs::remove_dir_all(&path)?;
            }
        }
        let mut number = 0_u32;
        let dir = loop {
            let dir = shared.join(number.to_string());
            match fs::create_dir(&dir) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
                made => break made.map(|()| dir)?,
            }
        };
        let held = File::open(&dir)?;
        flock(&held, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { dir, _held: held })
    }

    /// Where a file of this name is written.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn two_simulators_do_not_write_to_the_same_place_and_what_a_dead_one_left_goes() {
        let shared = tempfile::tempdir().unwrap();
        let one = Drafts::open(shared.path()).unwrap();
        fs::write(one.path("half"), "of one").unwrap();
        let two = Drafts::open(shared.path()).unwrap();
        fs::write(two.path("half"), "of two").unwrap();
        assert_eq!(fs::read(one.path("half")).unwrap(), b"of one");
        drop(one);
        let third = Drafts::open(shared.path()).unwrap();
        assert!(!third.path("half").exists());
        assert_eq!(fs::read(two.path("half")).unwrap(), b"of two");
    }
}
