//! All that is known of an image, for people and programs.

use jiff::Timestamp;
use moxlet_ids::{ChainId, Digest};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::{Error, ImageRecord, ImageStore, LayerBlob, Origin, Result, store::blocking};

/// All that is known of an image. Its JSON is what `moxlet image inspect` prints.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Inspection {
    /// The digest of its config.
    pub id: Digest,
    /// `docker.io/library/busybox:latest`.
    pub repo_tags: Vec<String>,
    /// `docker.io/library/busybox@sha256:…`.
    pub repo_digests: Vec<String>,
    /// Go's name of its architecture.
    pub architecture: String,
    /// Its operating system.
    pub os: String,
    /// When it was made, as its config says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// When it was pulled or imported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub added_at: Option<Timestamp>,
    /// When a container used it last, or when it was pulled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<Timestamp>,
    /// Where it is from.
    pub origin: Origin,
    /// Whether garbage collection passes it by.
    pub pinned: bool,
    /// Containers and mounts that stand on it.
    pub in_use_by: Vec<String>,
    /// What config and layers take in a registry.
    pub size_bytes: u64,
    /// The manifest that it came with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manifest: Option<InspectedManifest>,
    /// Its layers, the bottom one first.
    pub layers: Vec<InspectedLayer>,
    /// The config, as it came: made into values it can be a hundred times as large.
    pub config: Box<RawValue>,
}

/// A manifest of an image.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InspectedManifest {
    /// Its digest.
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
}

/// A layer of an image.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InspectedLayer {
    /// The digest of its archive.
    pub diff_id: String,
    /// Its name in the store.
    pub chain_id: String,
    /// How it lies in a registry.
    #[serde(flatten)]
    pub blob: Option<LayerBlob>,
    /// Whether its archive can be made again: what pushes, exports and verification need.
    pub restorable: bool,
}

/// A line of a list of images.
#[derive(Debug, Clone)]
pub struct ListedImage {
    /// The image.
    pub record: ImageRecord,
    /// When it was pulled or imported.
    pub added_at: Option<Timestamp>,
    /// When it was used last.
    pub last_used_at: Option<Timestamp>,
    /// Containers and mounts that stand on it.
    pub in_use_by: Vec<String>,
}

impl ImageStore {
    /// All that is known of an image.
    ///
    /// # Errors
    /// As [`Self::resolve`]; its files cannot be read.
    pub async fn inspect(&self, reference: &str) -> Result<Option<Inspection>> {
        let users = self.store.users().await?;
        let (store, reference) = (self.store.clone(), reference.to_owned());
        blocking(move || {
            let Some((image, details)) = store.look_up(&reference)? else { return Ok(None) };
            let config: Box<RawValue> =
                serde_json::from_slice(&store.records.config_blob(&image.id)?).map_err(|e| {
                    Error::Damaged { image: image.id.to_string(), reason: format!("its config: {e}") }
                })?;
            let layer = |(n, chain): (usize, &ChainId)| InspectedLayer {
                diff_id: image.config.diff_ids.get(n).map(ToString::to_string).unwrap_or_default(),
                chain_id: chain.to_string(),
                blob: details.blobs.get(n).cloned(),
                restorable: store.records.tape_path(chain).exists(),
            };
            let mut manifest = details.manifest;
            if let Some(note) = &manifest
                && store.records.manifest_blob(&image.id, note)?.is_none()
            {
                manifest = None;
            }
            Ok(Some(Inspection {
                layers: image.layers.iter().enumerate().map(layer).collect(),
                architecture: image.config.architecture.clone(),
                os: image.config.os.clone(),
                created: image.config.created.clone(),
                added_at: details.added_at,
                last_used_at: store.last_used(&image.id),
                origin: details.origin,
                pinned: image.pinned,
                in_use_by: users.of(&image).iter().map(ToString::to_string).collect(),
                size_bytes: image.size_bytes,
                manifest: manifest.map(|m| InspectedManifest { digest: m.digest, media_type: m.media_type }),
                config,
                id: image.id,
                repo_tags: image.repo_tags,
                repo_digests: image.repo_digests,
            }))
        })
        .await
    }

    /// All images with who uses them.
    ///
    /// # Errors
    /// The driver cannot be asked.
    pub async fn list_all(&self) -> Result<Vec<ListedImage>> {
        let users = self.store.users().await?;
        let store = self.store.clone();
        blocking(move || {
            let mut all = Vec::new();
            for record in store.list() {
                let details = store.look_up(record.id.as_str())?.map(|(_, details)| details);
                all.push(ListedImage {
                    added_at: details.and_then(|d| d.added_at),
                    last_used_at: store.last_used(&record.id),
                    in_use_by: users.of(&record).iter().map(ToString::to_string).collect(),
                    record,
                });
            }
            Ok(all)
        })
        .await
    }
}
