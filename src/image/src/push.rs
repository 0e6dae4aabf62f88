//! Pushing an image: with its own manifest, so that it keeps its digest, where the registry has or can get the blobs that it
//! came with; else with layers that are made again.

use futures::FutureExt;
use moxlet_ids::{ChainId, Digest};
use serde_json::json;

use crate::{
    Credentials, Error, ImageRecord, ImageStore, LayerBlob, Reference, Result,
    registry::{Session, upload::ByteStream},
    restore::{Compression, compressed, written},
    store::{Details, blocking},
};

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";

impl ImageStore {
    /// Pushes an image to `target`, or to the name that it is asked for by; the digest of the manifest there. Nothing is sent
    /// that the registry has: by the blobs that the image came with, or by those of an earlier push.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::NotRestorable`], [`Error::Push`]; that also where the image is asked for by its id and no
    /// target is named.
    pub async fn push(
        &self,
        reference: &str,
        target: Option<&str>,
        auths: &[Credentials],
        compression: Compression,
    ) -> Result<Digest> {
        let hold = self.store.hold(reference).await?.ok_or_else(|| Error::Missing(reference.to_owned()))?;
        let image = hold.record();
        let target = match target {
            Some(target) if target != reference => Reference::parse(target)?,
            _ => own_name(reference, image)?,
        };
        let details = self.store.look_up(image.id.as_str())?.map(|(_, d)| d).unwrap_or_default();
        let session = self.registry.session(&target, auths).await?;
        let push =
            Push { images: self, session, image, details, sources: sources(image, &target), compression };
        let digest = match push.as_it_came(&target).await? {
            Some(digest) => digest,
            None => push.anew(&target).await?,
        };
        let name = format!("{}@{digest}", target.name());
        let tag = target.repo_tag();
        self.store
            .change(&image.id, move |record, _| {
                let ours = tag.is_some_and(|t| record.repo_tags.contains(&t));
                if ours && !record.repo_digests.contains(&name) {
                    record.repo_digests.push(name);
                }
            })
            .await?;
        tracing::info!(image = %image.id, target = %target, %digest, "image pushed");
        Ok(digest)
    }
}

/// Where an image goes by the name that it was asked for by. An id is none: read as a name it would be one of Docker Hub's.
fn own_name(text: &str, image: &ImageRecord) -> Result<Reference> {
    let named = |r: &Reference| {
        let digest = r.digest().map(|d| format!("{}@{d}", r.name()));
        r.repo_tag().is_some_and(|tag| image.repo_tags.contains(&tag))
            || digest.is_some_and(|digest| image.repo_digests.contains(&digest))
    };
    let name = if text.starts_with("sha256:") { None } else { Reference::parse(text).ok() };
    name.filter(named).ok_or_else(|| Error::Push {
        reference: text.to_owned(),
        reason: "it is asked for by its id, which does not say where to: name a target, such as \
                 registry.example/team/app:1"
            .to_owned(),
        denied: false,
    })
}

/// Other repositories of the registry that may have the blobs.
fn sources(image: &ImageRecord, target: &Reference) -> Vec<String> {
    let mut all: Vec<String> = image
        .repo_digests
        .iter()
        .filter_map(|d| Reference::parse(d).ok())
        .filter(|r| r.registry() == target.registry() && r.repository() != target.repository())
        .map(|r| r.repository().to_owned())
        .collect();
    all.dedup();
    all.truncate(4);
    all
}

struct Push<'a> {
    images: &'a ImageStore,
    session: Session<'a>,
    image: &'a ImageRecord,
    details: Details,
    sources: Vec<String>,
    compression: Compression,
}

impl Push<'_> {
    /// Whether the registry has a blob, or takes it over from another repository.
    async fn is_there(&self, digest: &Digest) -> Result<bool> {
        if self.session.exists(digest).await? {
            return Ok(true);
        }
        for source in &self.sources {
            if self.session.mount(digest, source).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Puts the manifest that the image came with, if all blobs are there.
    async fn as_it_came(&self, target: &Reference) -> Result<Option<Digest>> {
        let Some(note) = self.details.manifest.clone().filter(|_| !self.details.blobs.is_empty()) else {
            return Ok(None);
        };
        let (store, id) = (self.images.store.clone(), self.image.id.clone());
        let (read, media_type) = (note.clone(), note.media_type);
        let Some(manifest) = blocking(move || store.records.manifest_blob(&id, &read)).await? else {
            return Ok(None);
        };
        for blob in &self.details.blobs {
            if !self.is_there(&blob.digest).await? {
                return Ok(None);
            }
        }
        self.config().await?;
        self.session.put_manifest(target.wanted(), &media_type, &manifest).await.map(Some)
    }

    /// Puts layers and a manifest that are made for it. The config, and with it the image's id, stays.
    async fn anew(&self, target: &Reference) -> Result<Digest> {
        let mut layers = Vec::new();
        for (n, chain) in self.image.layers.iter().enumerate() {
            layers.push(self.layer(n, chain).await?);
        }
        let config_size = self.config().await?;
        let descriptor =
            |b: &LayerBlob| json!({ "mediaType": b.media_type, "digest": b.digest, "size": b.size });
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": { "mediaType": OCI_CONFIG, "digest": self.image.id, "size": config_size },
            "layers": layers.iter().map(descriptor).collect::<Vec<_>>(),
        });
        self.session.put_manifest(target.wanted(), OCI_MANIFEST, manifest.to_string().as_bytes()).await
    }

    /// The blob of a layer, uploaded unless one that fits is there.
    async fn layer(&self, n: usize, chain: &ChainId) -> Result<LayerBlob> {
        let known = [self.details.blobs.get(n), self.details.pushed.get(&chain.to_string())];
        for blob in known.into_iter().flatten() {
            if self.is_there(&blob.digest).await? {
                return Ok(LayerBlob { media_type: oci_media_type(&blob.media_type), ..blob.clone() });
            }
        }
        let (store, image, layer) = (self.images.store.clone(), self.image.id.to_string(), chain.clone());
        let how = self.compression;
        let open = move || {
            let (store, image, layer) = (store.clone(), image.clone(), layer.clone());
            async move { Ok(compressed(store.archive(&image, &layer).await?, how)) }.boxed()
        };
        let (digest, size) = self.session.upload_unknown(&format!("layer {}", n + 1), &open).await?;
        let blob = LayerBlob { digest, size, media_type: how.media_type().to_owned() };
        let (key, kept) = (chain.to_string(), blob.clone());
        let note = move |_: &mut ImageRecord, details: &mut Details| {
            details.pushed.insert(key, kept);
        };
        self.images.store.change(&self.image.id, note).await?;
        Ok(blob)
    }

    /// Uploads the config unless it is there; its size.
    async fn config(&self) -> Result<u64> {
        let (store, id) = (self.images.store.clone(), self.image.id.clone());
        let blob = blocking(move || store.records.config_blob(&id)).await?;
        let size = blob.len() as u64;
        if !self.is_there(&self.image.id).await? {
            let open = move || {
                let blob = blob.clone();
                let stream: ByteStream = written(move |out| out.write_all(&blob));
                std::future::ready(Ok(stream)).boxed()
            };
            self.session.upload(&self.image.id, size, "the config", &open).await?;
        }
        Ok(size)
    }
}

/// OCI's name of a layer's type; the bytes are the same.
fn oci_media_type(media_type: &str) -> String {
    match media_type {
        "application/vnd.docker.image.rootfs.diff.tar.gzip" => Compression::Gzip.media_type().to_owned(),
        "application/vnd.docker.image.rootfs.diff.tar" => "application/vnd.oci.image.layer.v1.tar".to_owned(),
        "" => Compression::Gzip.media_type().to_owned(),
        other => other.to_owned(),
    }
}
