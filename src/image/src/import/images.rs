//! An archive of images: an OCI layout, or what `docker save` writes.

use std::{io::Read, sync::Arc};

use moxlet_ids::{ChainId, Digest};
use oci_spec::image::ImageConfiguration;
use serde::Deserialize;

use super::{
    Source,
    archive::{Members, blob_name},
    bring_layer, refused,
};
use crate::{
    ImageRecord, ImageStore, LayerBlob, Origin, Reference, Result,
    layer::Claim,
    registry::manifest::{self, Found, host_architecture},
    store::{NewImage, RawManifest, blocking},
};

/// Images that an archive may have.
const MAX_IMAGES: usize = 1000;
/// An index may name another one, not a row of them.
const MAX_DEPTH: usize = 3;
/// Layers of an image.
const MAX_LAYERS: usize = 128;

/// Where an archive has a layer, and what it says of it.
struct Layer {
    member: String,
    claim: Claim,
    blob: Option<LayerBlob>,
}

/// An image of an archive.
struct Entry {
    names: Vec<String>,
    config: Vec<u8>,
    layers: Vec<Layer>,
    manifest: Option<RawManifest>,
    /// Of which architecture it is, if it is not for this host.
    foreign: Option<String>,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<IndexEntry>,
}

#[derive(Deserialize)]
struct IndexEntry {
    digest: Digest,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl ImageStore {
    /// Takes the images of an archive that are for this host's architecture: an OCI layout or what `docker save` writes; tar,
    /// plain or with gzip, zstd or xz. `name` is the tag of the image if the archive has one alone.
    ///
    /// # Errors
    /// [`crate::Error::BadArchive`], [`crate::Error::InvalidName`], a failure of the store. Images that were complete before stay.
    pub async fn import(&self, source: Source, name: Option<&str>) -> Result<Vec<ImageRecord>> {
        let dir = self.store.records.draft_path();
        let outcome = self.import_from(source, dir, name).await;
        self.tidy(outcome).await
    }

    async fn import_from(
        &self,
        source: Source,
        dir: std::path::PathBuf,
        name: Option<&str>,
    ) -> Result<Vec<ImageRecord>> {
        let name = name.map(Reference::parse).transpose()?;
        let (members, mut entries) = blocking(move || {
            let members = Members::read(source, dir)?;
            let entries = if members.has("index.json") { layout(&members)? } else { docker(&members)? };
            Ok((Arc::new(members), entries))
        })
        .await?;
        let foreign: Vec<String> = entries.iter().filter_map(|e| e.foreign.clone()).collect();
        entries.retain(|e| e.foreign.is_none());
        if entries.is_empty() {
            let reason = match foreign.first() {
                Some(other) => {
                    format!("its images are for {other}, this host is linux/{}", host_architecture())
                }
                None => "it has no image".to_owned(),
            };
            return Err(refused("the archive", reason));
        }
        if let Some(name) = &name {
            let mut ids: Vec<Digest> = entries.iter().map(|e| Digest::of(&e.config)).collect();
            ids.sort();
            ids.dedup();
            if ids.len() > 1 {
                let reason = format!("it has {} images; a name can be given to one alone", ids.len());
                return Err(refused("the archive", reason));
            }
            for entry in &mut entries {
                entry.names = name.repo_tag().into_iter().collect();
            }
        }
        let mut records = Vec::new();
        for entry in entries {
            let record = self.import_entry(&members, entry).await?;
            records.retain(|r: &ImageRecord| r.id != record.id);
            records.push(record);
        }
        // Its files are many.
        tokio::task::spawn_blocking(move || drop(members)).await.map_err(|_| crate::Error::Stopped)?;
        Ok(records)
    }

    async fn import_entry(&self, members: &Arc<Members>, entry: Entry) -> Result<ImageRecord> {
        let parsed: ImageConfiguration = serde_json::from_slice(&entry.config)
            .map_err(|e| refused("the config", format!("it cannot be read: {e}")))?;
        let (mut layers, mut pins, mut size): (Vec<ChainId>, Vec<_>, u64) =
            (Vec::new(), Vec::new(), entry.config.len() as u64);
        let blobs: Option<Vec<LayerBlob>> = entry.layers.iter().map(|l| l.blob.clone()).collect();
        for (n, layer) in entry.layers.into_iter().enumerate() {
            let (members, member) = (members.clone(), layer.member);
            size = size.saturating_add(layer.claim.size.unwrap_or_default());
            let open = move || {
                let (file, _) = members.open(&member).map_err(std::io::Error::other)?;
                Ok(Box::new(file) as Box<dyn Read + Send>)
            };
            let part = format!("layer {}", n + 1);
            let (chain, _, kept) = bring_layer(&self.store, &layers, layer.claim, part, open).await?;
            layers.push(chain);
            pins.push(kept);
        }
        // All of them at once, for as long as the record needs.
        let all = self.store.pin(&layers).await;
        drop(pins);
        let image = NewImage {
            id: Digest::of(&entry.config),
            tags: entry.names,
            digests: Vec::new(),
            size_bytes: size,
            layers,
            config: parsed,
            blob: Some(entry.config),
            manifest: entry.manifest,
            blobs: blobs.unwrap_or_default(),
            origin: Origin::Imported,
            access: None,
        };
        let record = self.store.add(image, all).await?;
        tracing::info!(id = %record.id, names = ?record.repo_tags, "image imported");
        Ok(record)
    }
}

/// The images of an OCI layout.
fn layout(members: &Members) -> Result<Vec<Entry>> {
    let wrong = |what: &str, e: &dyn std::fmt::Display| refused(what, format!("it cannot be read: {e}"));
    let index: Index =
        serde_json::from_slice(&members.document("index.json")?).map_err(|e| wrong("index.json", &e))?;
    if index.manifests.len() > MAX_IMAGES {
        return Err(refused("index.json", format!("it names more than {MAX_IMAGES} images")));
    }
    let mut entries: Vec<Entry> = Vec::new();
    for named in index.manifests {
        let (mut digest, mut left) = (named.digest, MAX_DEPTH);
        let (bytes, config, layers) = loop {
            if left == 0 {
                return Err(refused("index.json", "indexes are nested too deep"));
            }
            left -= 1;
            let bytes = members.blob(&digest)?;
            match manifest::read(&bytes).map_err(|reason| refused(&format!("manifest {digest}"), reason))? {
                Found::Image(config, layers) => break (bytes, config, layers),
                Found::Next(next) => digest = next,
            }
        };
        let media_type = manifest::media_type(&bytes, &config);
        let config = members.blob(&config.digest)?;
        let diff_ids = diff_ids(&config, layers.len())?;
        let layers = layers.into_iter().zip(diff_ids).map(|(blob, diff_id)| Layer {
            member: blob_name(&blob.digest),
            claim: Claim { digest: Some(blob.digest.clone()), size: Some(blob.size), diff_id: Some(diff_id) },
            blob: Some(blob.into()),
        });
        let foreign = foreign(&config)?;
        let name = ["io.containerd.image.name", "org.opencontainers.image.ref.name"]
            .iter()
            .find_map(|key| full_name(named.annotations.get(*key)?));
        let names: Vec<String> = name.into_iter().collect();
        // An image with several names is there once for each.
        if let Some(known) = entries.iter_mut().find(|e| e.config == config) {
            known.names.extend(names);
            continue;
        }
        let layers = layers.collect();
        let manifest = Some(RawManifest { media_type, bytes });
        entries.push(Entry { names, config, layers, manifest, foreign });
    }
    Ok(entries)
}

/// The images of an archive of `docker save`.
fn docker(members: &Members) -> Result<Vec<Entry>> {
    if !members.has("manifest.json") {
        let reason = "it has neither index.json nor manifest.json: it is no archive of images (give --rootfs for a root \
                      file system)";
        return Err(refused("the archive", reason));
    }
    let all: Vec<DockerEntry> = serde_json::from_slice(&members.document("manifest.json")?)
        .map_err(|e| refused("manifest.json", format!("it cannot be read: {e}")))?;
    if all.len() > MAX_IMAGES {
        return Err(refused("manifest.json", format!("it names more than {MAX_IMAGES} images")));
    }
    let mut entries = Vec::new();
    for entry in all {
        let config = members.document(&entry.config)?;
        let diff_ids = diff_ids(&config, entry.layers.len())?;
        let mut layers = Vec::new();
        for (member, diff_id) in entry.layers.into_iter().zip(diff_ids) {
            let size = members.open(&member)?.1;
            let claim = Claim { digest: None, size: Some(size), diff_id: Some(diff_id) };
            layers.push(Layer { member, claim, blob: None });
        }
        let names = entry.repo_tags.unwrap_or_default().iter().filter_map(|n| full_name(n)).collect();
        entries.push(Entry { names, foreign: foreign(&config)?, config, layers, manifest: None });
    }
    Ok(entries)
}

/// A tag that an archive gives. A word alone is a tag without a repository (`oci:DIR:latest`) and says nothing.
fn full_name(name: &str) -> Option<String> {
    if !name.contains(['/', ':']) {
        return None;
    }
    Reference::parse(name).ok()?.repo_tag()
}

fn config_of(config: &[u8]) -> Result<ImageConfiguration> {
    serde_json::from_slice(config).map_err(|e| refused("the config", format!("it cannot be read: {e}")))
}

fn diff_ids(config: &[u8], layers: usize) -> Result<Vec<Digest>> {
    let config = config_of(config)?;
    let said = config.rootfs().diff_ids();
    if layers > MAX_LAYERS || said.len() != layers {
        let reason =
            format!("it names {} layers, the manifest {layers} (of {MAX_LAYERS} at most)", said.len());
        return Err(refused("the config", reason));
    }
    said.iter().map(|d| d.parse().map_err(|e| refused("the config", format!("{e}")))).collect()
}

/// What an image is for, if not for this host.
fn foreign(config: &[u8]) -> Result<Option<String>> {
    let config = config_of(config)?;
    let (os, architecture) = (config.os().to_string(), config.architecture().to_string());
    let ours = os == "linux" && architecture == host_architecture();
    Ok((!ours).then(|| format!("{os}/{architecture}")))
}
