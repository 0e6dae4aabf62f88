//! Images that are mounted for somebody to look at: each mount has a record, which keeps its layers for as long as
//! that mount is there.
//!
//! ```text
//! <dir>/views/<hex of the path's digest>.json
//! ```

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use moxlet_ids::{ChainId, Digest};
use moxlet_storage::mounts;
use rustix::fs::{AtFlags, CWD, StatxFlags};
use serde::{Deserialize, Serialize};

use super::{records, records::Records};
use crate::{Error, Result, error::Attempt};

const VERSION: u32 = 1;

/// A mounted image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct View {
    version: u32,
    /// The image's id.
    pub(crate) image: Digest,
    /// Its layers, the bottom one first.
    pub(crate) layers: Vec<ChainId>,
    /// Where it is mounted.
    pub(crate) target: PathBuf,
    /// The file system that the mount made; none until it is mounted.
    device: Option<(u32, u32)>,
    /// The boot in which it was mounted: device numbers begin anew with each.
    boot: String,
}

impl View {
    pub(crate) fn new(image: Digest, layers: Vec<ChainId>, target: PathBuf) -> Self {
        Self { version: VERSION, image, layers, target, device: None, boot: boot_id() }
    }

    /// Notes which mount it is.
    pub(crate) fn mounted(&mut self) -> Result<()> {
        self.device = Some(device(&self.target).attempt("look at", &self.target)?);
        Ok(())
    }

    /// Whether the mount is still there. One whose making was cut off counts as soon as anything is mounted there.
    pub(crate) fn is_there(&self) -> bool {
        let same = |known| device(&self.target).is_ok_and(|now| now == known);
        self.boot == boot_id()
            && mounts::is_mounted(&self.target).unwrap_or(true)
            && self.device.is_none_or(same)
    }
}

fn device(path: &Path) -> rustix::io::Result<(u32, u32)> {
    let stat = rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty())?;
    Ok((stat.stx_dev_major, stat.stx_dev_minor))
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

impl Records {
    fn view_path(&self, target: &Path) -> PathBuf {
        let name = Digest::of(target.as_os_str().as_encoded_bytes());
        self.dir.join("views").join(format!("{}.json", name.hex()))
    }

    /// Writes a view's record.
    pub(crate) fn write_view(&self, view: &View) -> Result<()> {
        let path = self.view_path(&view.target);
        let text = serde_json::to_vec_pretty(view).map_err(io::Error::from).attempt("write", &path)?;
        self.put(&path, &text)
    }

    /// Forgets a view. Idempotent.
    pub(crate) fn remove_view(&self, target: &Path) -> Result<()> {
        records::remove(&self.view_path(target))
    }

    /// The views that are mounted; the records of others go.
    pub(crate) fn views(&self) -> Result<Vec<View>> {
        let mut views = Vec::new();
        for path in records::files(&self.dir.join("views"))? {
            let text = fs::read(&path).attempt("read", &path)?;
            match serde_json::from_slice::<View>(&text) {
                Ok(view) if view.version > VERSION => {
                    return Err(Error::TooNew { path, version: view.version });
                }
                Ok(view) if view.is_there() => views.push(view),
                Ok(view) => {
                    tracing::debug!(target = %view.target.display(), "a mount of an image is gone");
                    records::remove(&path)?;
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "the record of a mount is damaged and is removed");
                    records::remove(&path)?;
                }
            }
        }
        Ok(views)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn a_view_without_its_mount_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let lock = super::super::lock::DirLock::take(dir.path()).unwrap();
        let records = Records::open(dir.path().to_owned(), lock).unwrap();
        let view = View::new(Digest::of(b"x"), Vec::new(), dir.path().join("nowhere"));
        records.write_view(&view).unwrap();
        assert!(records.views().unwrap().is_empty());
        assert_eq!(fs::read_dir(dir.path().join("views")).unwrap().count(), 0);
    }
}
