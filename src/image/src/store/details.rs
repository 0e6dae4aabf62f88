//! What is known of an image, and what becomes of it when names move.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use moxlet_ids::Digest;
use serde::{Deserialize, Serialize};

use crate::{ImageRecord, LayerBlob, Origin};

/// How many credentials are remembered of a repository.
const MAX_PROOFS: usize = 256;

/// An image that is here.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) record: ImageRecord,
    /// Grows with every pull.
    pub(super) serial: u64,
    pub(super) details: Details,
}

impl Stored {
    /// Takes tags from the image, and with the last one by which it was pinned the pin; those by which it was.
    pub(super) fn lose_tags(&mut self, lost: impl Fn(&str) -> bool) -> BTreeSet<String> {
        self.record.repo_tags.retain(|tag| !lost(tag));
        let (pins, left) =
            std::mem::take(&mut self.details.pinned_tags).into_iter().partition(|tag| lost(tag));
        self.details.pinned_tags = left;
        if !BTreeSet::is_empty(&pins) && self.details.pinned_tags.is_empty() {
            self.record.pinned = false;
        }
        pins
    }

    /// Pins it by tags, unless it is pinned whatever its tags are.
    pub(super) fn pin_by(&mut self, tags: BTreeSet<String>) {
        if tags.is_empty() || (self.record.pinned && self.details.pinned_tags.is_empty()) {
            return;
        }
        self.details.pinned_tags.extend(tags);
        self.record.pinned = true;
    }
}

/// What is known of an image beside what every caller wants.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Details {
    /// Its layers as they lie in a registry, the bottom one first; empty where nobody knows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) blobs: Vec<LayerBlob>,
    /// The manifest that it came with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) manifest: Option<ManifestNote>,
    /// When it was pulled or imported, the first time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) added_at: Option<Timestamp>,
    #[serde(default)]
    pub(crate) origin: Origin,
    /// Who has shown that he may have it, by the repository that it was pulled from; empty for what was not pulled.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) access: BTreeMap<String, Access>,
    /// The tags by which it was pinned: the pin goes with these. Empty where it is not pinned, or by its id.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub(crate) pinned_tags: BTreeSet<String>,
    /// The blobs that our own pushes have made of layers, by chain.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) pushed: BTreeMap<String, LayerBlob>,
}

/// The manifest of an image; its bytes lie in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ManifestNote {
    pub(crate) digest: Digest,
    pub(crate) media_type: String,
}

/// Who may have an image of a repository.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Access {
    /// It was pulled for a pod that had no credentials for it.
    #[serde(default)]
    pub(crate) anyone: bool,
    /// Salted digests of the credentials that pods have shown when it was pulled for them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub(crate) credentials: BTreeSet<String>,
}

impl Access {
    /// Adds those who have shown it now. Of too many, earlier ones are forgotten: they ask the registry once more.
    pub(super) fn add(&mut self, more: &Self) {
        self.anyone |= more.anyone;
        self.credentials.extend(more.credentials.iter().cloned());
        while self.credentials.len() > MAX_PROOFS {
            let Some(old) = self.credentials.iter().find(|c| !more.credentials.contains(*c)).cloned() else {
                return;
            };
            self.credentials.remove(&old);
        }
    }
}
