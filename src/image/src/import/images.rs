//! An archive of images: an OCI layout, or what `docker save` writes.

use std::{io::Read, sync::Arc};

use moxlet_ids::{ChainId, Digest};
use serde::Deserialize;

use super::{
    Source,
    archive::{Members, blob_name},
    bring_layer, refused,
};
use crate::{
    ImageConfig, ImageRecord, ImageStore, LayerBlob, Origin, Reference, Result,
    layer::Claim,
    registry::{
        manifest::{self, Found, RawManifest},
        platform,
    },
    store::{NewImage, blocking},
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
}

impl Entry {
    /// How people know it.
    fn called(&self) -> String {
        self.names.first().cloned().unwrap_or_else(|| Digest::of(&self.config).to_string())
    }
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

/// What an import has brought.
#[derive(Debug, Clone, PartialEq)]
pub struct Imported {
    /// The images.
    pub images: Vec<ImageRecord>,
    /// What else the archive names and why it was left out: what is no image, or not for this host, or not in it.
    pub skipped: Vec<String>,
}

impl ImageStore {
    /// Takes the images of an archive that are for this host's architecture: an OCI layout or what `docker save` writes; tar,
    /// plain or with gzip, zstd or xz. `name` is the tag of the image if the archive has one alone.
    ///
    /// # Errors
    /// [`crate::Error::BadArchive`], also where it has nothing that is an image for this host;
    /// [`crate::Error::InvalidName`], a failure of the store. Images that were complete before stay.
    pub async fn import(&self, source: Source, name: Option<&str>) -> Result<Imported> {
        let dir = self.store.records.draft_path();
        let outcome = self.store.unless_stalled(self.import_from(source, dir, name)).await;
        self.tidy(outcome).await
    }

    async fn import_from(
        &self,
        source: Source,
        dir: std::path::PathBuf,
        name: Option<&str>,
    ) -> Result<Imported> {
        let name = name.map(Reference::parse).transpose()?;
        let (members, Entries { found, mut skipped }) = blocking(move || {
            let members = Members::read(source, dir)?;
            let entries = entries(&members)?;
            Ok((Arc::new(members), entries))
        })
        .await?;
        let mut entries = Vec::new();
        for entry in found {
            match self.missing(&members, &entry).await? {
                Some(layer) => skipped.push(format!("{}: {layer:?} is missing", entry.called())),
                None => entries.push(entry),
            }
        }
        if entries.is_empty() {
            return Err(nothing(&skipped));
        }
        if let Some(name) = &name {
            give_name(&mut entries, name)?;
        }
        let mut images = Vec::new();
        for entry in entries {
            let record = self.import_entry(&members, entry).await?;
            images.retain(|r: &ImageRecord| r.id != record.id);
            images.push(record);
        }
        // Its files are many.
        tokio::task::spawn_blocking(move || drop(members)).await.map_err(|_| crate::Error::Stopped)?;
        Ok(Imported { images, skipped })
    }

    /// A layer that neither the archive nor the store has.
    async fn missing(&self, members: &Members, entry: &Entry) -> Result<Option<String>> {
        let mut chain: Option<ChainId> = None;
        for layer in &entry.layers {
            chain = layer.claim.diff_id.as_ref().map(|diff_id| match &chain {
                Some(below) => below.push(diff_id),
                None => ChainId::base(diff_id),
            });
            if members.has(&layer.member) {
                continue;
            }
            let here = match &chain {
                Some(chain) => {
                    self.store.records.tape_path(chain).exists() && self.store.driver.has_layer(chain).await?
                }
                None => false,
            };
            if !here {
                return Ok(Some(layer.member.clone()));
            }
        }
        Ok(None)
    }

    async fn import_entry(&self, members: &Arc<Members>, entry: Entry) -> Result<ImageRecord> {
        let parsed = Arc::new(config_of(&entry.config)?);
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

/// What an archive has.
#[derive(Default)]
pub(super) struct Entries {
    found: Vec<Entry>,
    skipped: Vec<String>,
}

impl Entries {
    /// Adds an image, unless it is for another host.
    fn add(&mut self, entry: Entry) -> Result<()> {
        if let Some(other) = foreign(&entry.config)? {
            let ours = platform::host_architecture();
            self.skipped.push(format!("{}: it is for {other}, this host is linux/{ours}", entry.called()));
            return Ok(());
        }
        // An image with several names is there once for each.
        match self.found.iter_mut().find(|e| e.config == entry.config) {
            Some(known) => known.names.extend(entry.names),
            None => self.found.push(entry),
        }
        Ok(())
    }
}

/// The images that an archive names.
pub(super) fn entries(members: &Members) -> Result<Entries> {
    if members.has("index.json") { layout(members) } else { docker(members) }
}

/// An archive of which nothing can be taken.
fn nothing(skipped: &[String]) -> crate::Error {
    let reason = match skipped {
        [] => "it has no image".to_owned(),
        [only] => format!("it has no image that can be taken: {only}"),
        [first, rest @ ..] => {
            format!("it has no image that can be taken: {first}; and {} more", rest.len())
        }
    };
    refused("the archive", reason)
}

fn give_name(entries: &mut [Entry], name: &Reference) -> Result<()> {
    let mut ids: Vec<Digest> = entries.iter().map(|e| Digest::of(&e.config)).collect();
    ids.sort();
    ids.dedup();
    if ids.len() > 1 {
        let reason = format!("it has {} images; a name can be given to one alone", ids.len());
        return Err(refused("the archive", reason));
    }
    for entry in entries {
        entry.names = name.repo_tag().into_iter().collect();
    }
    Ok(())
}

/// The images of an OCI layout.
fn layout(members: &Members) -> Result<Entries> {
    let wrong = |what: &str, e: &dyn std::fmt::Display| refused(what, format!("it cannot be read: {e}"));
    let index: Index =
        serde_json::from_slice(&members.document("index.json")?).map_err(|e| wrong("index.json", &e))?;
    if index.manifests.len() > MAX_IMAGES {
        return Err(refused("index.json", format!("it names more than {MAX_IMAGES} images")));
    }
    let mut entries = Entries::default();
    for named in index.manifests {
        let name = ["io.containerd.image.name", "org.opencontainers.image.ref.name"]
            .iter()
            .find_map(|key| full_name(named.annotations.get(*key)?));
        let called = name.clone().unwrap_or_else(|| named.digest.to_string());
        match described(members, named.digest)? {
            Ok(entry) => entries.add(Entry { names: name.into_iter().collect(), ..entry })?,
            Err(reason) => entries.skipped.push(format!("{called}: {reason}")),
        }
    }
    Ok(entries)
}

/// The image that a manifest or index describes; the inner error says why it is none of ours. What is there and damaged
/// spoils the whole archive.
fn described(members: &Members, mut digest: Digest) -> Result<std::result::Result<Entry, String>> {
    let absent = |digest: &Digest| Ok(Err(format!("its blob {digest} is missing")));
    let mut left = MAX_DEPTH;
    let (bytes, config, layers) = loop {
        if left == 0 {
            return Err(refused("index.json", "indexes are nested too deep"));
        }
        left -= 1;
        if !members.has(&blob_name(&digest)) {
            return absent(&digest);
        }
        let bytes = members.blob(&digest)?;
        match manifest::read(&bytes) {
            Ok(Found::Image(config, layers)) => break (bytes, config, layers),
            Ok(Found::Next(next)) => digest = next,
            Err(reason) => return Ok(Err(reason)),
        }
    };
    if !members.has(&blob_name(&config.digest)) {
        return absent(&config.digest);
    }
    let media_type = manifest::media_type(&bytes, &config);
    let config = members.blob(&config.digest)?;
    let diff_ids = diff_ids(&config, layers.len())?;
    let layers = layers.into_iter().zip(diff_ids).map(|(blob, diff_id)| Layer {
        member: blob_name(&blob.digest),
        claim: Claim { digest: Some(blob.digest.clone()), size: Some(blob.size), diff_id: Some(diff_id) },
        blob: Some(blob.into()),
    });
    let manifest = Some(RawManifest { media_type, bytes });
    Ok(Ok(Entry { names: Vec::new(), config, layers: layers.collect(), manifest }))
}

/// The images of an archive of `docker save`.
fn docker(members: &Members) -> Result<Entries> {
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
    let mut entries = Entries::default();
    for entry in all {
        let names: Vec<String> =
            entry.repo_tags.unwrap_or_default().iter().filter_map(|n| full_name(n)).collect();
        if !members.has(&entry.config) {
            let called = names.first().unwrap_or(&entry.config);
            entries.skipped.push(format!("{called}: its config {:?} is missing", entry.config));
            continue;
        }
        let config = members.document(&entry.config)?;
        let diff_ids = diff_ids(&config, entry.layers.len())?;
        let layers = entry.layers.into_iter().zip(diff_ids).map(|(member, diff_id)| {
            let claim = Claim { digest: None, size: members.size(&member), diff_id: Some(diff_id) };
            Layer { member, claim, blob: None }
        });
        let layers = layers.collect();
        entries.add(Entry { names, config, layers, manifest: None })?;
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

fn config_of(config: &[u8]) -> Result<ImageConfig> {
    ImageConfig::read(config).map_err(|reason| refused("the config", reason))
}

fn diff_ids(config: &[u8], layers: usize) -> Result<Vec<Digest>> {
    let said = config_of(config)?.diff_ids;
    if layers > MAX_LAYERS || said.len() != layers {
        let reason =
            format!("it names {} layers, the manifest {layers} (of {MAX_LAYERS} at most)", said.len());
        return Err(refused("the config", reason));
    }
    Ok(said)
}

/// What an image is for, if not for this host.
fn foreign(config: &[u8]) -> Result<Option<String>> {
    let config = config_of(config)?;
    Ok(platform::foreign(&config.os, &config.architecture))
}
