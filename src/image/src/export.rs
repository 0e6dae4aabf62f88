//! Images as one archive: an OCI layout that is a `docker save` archive as well, so that every tool reads it.
//!
//! Layers are in it as they are named in the config, without compression: that keeps an export of the same image the
//! same, byte by byte, and whoever wants it smaller compresses the whole.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write},
    sync::Arc,
};

use moxlet_ids::{ChainId, Digest};
use serde_json::{Value, json};

use crate::{
    Error, ImageRecord, ImageStore, Result,
    registry::upload::ByteStream,
    restore::{Archive, written},
    store::{ImageHold, Store, blocking},
};

/// A layer of an export.
struct Layer {
    chain: ChainId,
    diff_id: Digest,
    size: u64,
}

/// All that is known before the first byte is written.
struct Plan {
    /// Small blobs: manifests and configs, by digest.
    blobs: BTreeMap<Digest, Vec<u8>>,
    layers: Vec<Layer>,
    index: Value,
    docker: Value,
}

impl ImageStore {
    /// Images as an archive. Their layers stay until the stream is dropped.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::NotRestorable`]; [`Error::Damaged`] where a layer is not what it was. What fails later ends
    /// the stream.
    pub async fn export(&self, references: &[String]) -> Result<ByteStream> {
        let mut holds: Vec<(ImageHold, Vec<String>)> = Vec::new();
        for reference in references {
            let hold = self.store.hold(reference).await?.ok_or_else(|| Error::Missing(reference.clone()))?;
            let names = names(hold.record(), reference);
            match holds.iter_mut().find(|(h, _)| h.record().id == hold.record().id) {
                Some((_, known)) => known.extend(names),
                None => holds.push((hold, names)),
            }
        }
        let plan = plan(&self.store, &holds).await?;
        // Opened beforehand, since the writer blocks.
        let mut archives = Vec::new();
        for layer in &plan.layers {
            archives.push(self.store.archive("", &layer.chain).await?);
        }
        Ok(written(move |out| {
            let done = write(&plan, archives, out);
            drop(holds);
            done
        }))
    }
}

/// The names that an image goes out with: the one that was asked for, or all where it was asked for by its id.
fn names(image: &ImageRecord, reference: &str) -> Vec<String> {
    let asked = crate::Reference::parse(reference).ok().and_then(|r| r.repo_tag());
    match asked.filter(|tag| image.repo_tags.contains(tag)) {
        Some(tag) => vec![tag],
        None => image.repo_tags.clone(),
    }
}

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

async fn plan(store: &Arc<Store>, holds: &[(ImageHold, Vec<String>)]) -> Result<Plan> {
    let mut plan =
        Plan { blobs: BTreeMap::new(), layers: Vec::new(), index: Value::Null, docker: Value::Null };
    let (mut manifests, mut docker) = (Vec::new(), Vec::new());
    for (hold, names) in holds {
        let image = hold.record();
        let mut layers = Vec::new();
        for n in 0..image.layers.len() {
            let (digest, size) = plan.layer(store, image, n).await?;
            layers.push(json!({ "mediaType": LAYER, "digest": digest, "size": size }));
        }
        let (reading, id) = (store.clone(), image.id.clone());
        let config = blocking(move || reading.records.config_blob(&id)).await?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": { "mediaType": CONFIG, "digest": image.id, "size": config.len() },
            "layers": layers,
        });
        let manifest = manifest.to_string().into_bytes();
        let digest = Digest::of(&manifest);
        manifests.extend(descriptors(image, names, &digest, manifest.len()));
        let paths: Vec<String> = image.config.diff_ids.iter().map(path).collect();
        docker.push(json!({ "Config": path(&image.id), "RepoTags": names, "Layers": paths }));
        plan.blobs.insert(image.id.clone(), config);
        plan.blobs.insert(digest, manifest);
    }
    plan.index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests });
    plan.docker = Value::Array(docker);
    Ok(plan)
}

/// An image's entries in the index: one for each name, or one without.
fn descriptors(image: &ImageRecord, names: &[String], manifest: &Digest, size: usize) -> Vec<Value> {
    let platform = json!({
        "architecture": image.config.architecture, "os": image.config.os,
    });
    let plain = json!({ "mediaType": MANIFEST, "digest": manifest, "size": size, "platform": platform });
    if names.is_empty() {
        return vec![plain];
    }
    let named = |name: &String| {
        let mut entry = plain.clone();
        // The first is containerd's, the second everybody's.
        entry["annotations"] =
            json!({ "io.containerd.image.name": name, "org.opencontainers.image.ref.name": name });
        entry
    };
    names.iter().map(named).collect()
}

impl Plan {
    /// The digest and size of an image's layer, which is read once for all images; it has to be what the config names.
    async fn layer(&mut self, store: &Arc<Store>, image: &ImageRecord, n: usize) -> Result<(Digest, u64)> {
        let damaged = |reason: String| Error::Damaged { image: image.id.to_string(), reason };
        let chain = image.layers.get(n).ok_or_else(|| damaged(format!("it has no layer {}", n + 1)))?;
        let known = self.layers.iter().find(|l| l.chain == *chain).map(|l| (l.diff_id.clone(), l.size));
        let (digest, size) = match known {
            Some(known) => known,
            None => {
                let mut archive = store.archive(image.id.as_str(), chain).await?;
                let read = blocking(move || Ok(archive.digest())).await?;
                let (digest, size) = read.map_err(|e| damaged(format!("layer {}: {e}", n + 1)))?;
                self.layers.push(Layer { chain: chain.clone(), diff_id: digest.clone(), size });
                (digest, size)
            }
        };
        if image.config.diff_ids.get(n) != Some(&digest) {
            return Err(damaged(format!("layer {} has digest {digest}, not the one of the config", n + 1)));
        }
        Ok((digest, size))
    }
}

fn path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn write(plan: &Plan, archives: Vec<Archive>, out: &mut dyn Write) -> io::Result<()> {
    let mut tar = tar::Builder::new(out);
    let text = |v: &Value| v.to_string().into_bytes();
    add(&mut tar, "oci-layout", &text(&json!({ "imageLayoutVersion": "1.0.0" })))?;
    add(&mut tar, "index.json", &text(&plan.index))?;
    add(&mut tar, "manifest.json", &text(&plan.docker))?;
    for (digest, blob) in &plan.blobs {
        add(&mut tar, &path(digest), blob)?;
    }
    // Two stacks may have the same layer at different places.
    let mut told = BTreeSet::new();
    for (layer, archive) in plan.layers.iter().zip(archives) {
        if told.insert(layer.diff_id.clone()) {
            tar.append_data(&mut header(layer.size), path(&layer.diff_id), archive)?;
        }
    }
    tar.into_inner()?.flush()
}

fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_entry_type(tar::EntryType::Regular);
    header
}

fn add(tar: &mut tar::Builder<&mut dyn Write>, path: &str, content: &[u8]) -> io::Result<()> {
    tar.append_data(&mut header(content.len() as u64), path, content)
}
