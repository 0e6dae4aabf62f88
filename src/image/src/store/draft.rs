//! A layer's tape while it is written.

use std::path::{Path, PathBuf};

use moxlet_ids::ChainId;

use super::Records;
use crate::Result;

/// A tape that is being written; removed unless it is kept, whatever becomes of who writes it.
pub(crate) struct TapeDraft(PathBuf);

impl TapeDraft {
    /// A place for one. The file is the writer's to make.
    pub(crate) fn new(records: &Records) -> Self {
        Self(records.draft_path())
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Puts it, written and flushed, in its place, before the layer itself is there.
    ///
    /// # Errors
    /// What the system says; it is removed then.
    pub(crate) fn keep(self, records: &Records, layer: &ChainId) -> Result<()> {
        records.keep_tape(&self.0, layer)
    }
}

impl Drop for TapeDraft {
    fn drop(&mut self) {
        // It may never have been made, or be in its place.
        let _ = std::fs::remove_file(&self.0);
    }
}
