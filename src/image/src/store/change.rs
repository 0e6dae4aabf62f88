//! Changes of records: an image comes, gets or loses a name, is pinned, goes.
//!
//! Each is made under the writer's lock, on disk first and then in memory, and to its end even if the caller goes away.

use std::{collections::BTreeSet, sync::Arc};

use jiff::Timestamp;
use moxlet_ids::{ChainId, Digest};

use super::{
    Access, Pins, Store,
    details::{Details, ManifestNote, Stored},
    lock,
    names::{self, Named},
    records::Images,
};
use crate::{
    Error, ImageConfig, ImageRecord, LayerBlob, Origin, Reference, Removed, Result,
    registry::manifest::RawManifest,
};

/// What a pull or an import has brought.
pub(crate) struct NewImage {
    pub(crate) id: Digest,
    /// `docker.io/library/busybox:latest`.
    pub(crate) tags: Vec<String>,
    /// `docker.io/library/busybox@sha256:…`.
    pub(crate) digests: Vec<String>,
    pub(crate) size_bytes: u64,
    pub(crate) layers: Vec<ChainId>,
    pub(crate) config: Arc<ImageConfig>,
    /// The bytes of the config, where they are not here yet.
    pub(crate) blob: Option<Vec<u8>>,
    pub(crate) manifest: Option<RawManifest>,
    /// Its layers as they lie in a registry, as many as `layers`; empty where there are none.
    pub(crate) blobs: Vec<LayerBlob>,
    pub(crate) origin: Origin,
    /// The repository that it was pulled from, and who has shown that he may have it.
    pub(crate) access: Option<(String, Access)>,
}

/// What keeps an image from being removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Veto {
    Nobody,
    Used,
    UsedOrPinned,
}

pub(super) fn next_serial(images: &Images) -> u64 {
    images.values().map(|s| s.serial).max().map_or(1, |s| s + 1)
}

impl Store {
    /// Records an image whose layers are all here and pinned. It is done even if the caller goes away.
    pub(crate) async fn add(self: &Arc<Self>, image: NewImage, pins: Pins) -> Result<ImageRecord> {
        let store = Arc::clone(self);
        self.writing(move || {
            let record = store.add_now(image);
            drop(pins);
            record
        })
        .await
    }

    fn add_now(&self, image: NewImage) -> Result<ImageRecord> {
        let _writer = lock(&self.writer);
        let known = lock(&self.images).get(&image.id).cloned();
        let mut stored = known.unwrap_or_else(|| Stored {
            record: ImageRecord {
                id: image.id,
                repo_tags: Vec::new(),
                repo_digests: Vec::new(),
                size_bytes: 0,
                layers: Vec::new(),
                pinned: false,
                config: image.config,
            },
            serial: 0,
            details: Details::default(),
        });
        let record = &mut stored.record;
        for (names, new) in [(&mut record.repo_tags, &image.tags), (&mut record.repo_digests, &image.digests)]
        {
            for name in new {
                if !names.contains(name) {
                    names.push(name.clone());
                }
            }
        }
        (record.size_bytes, record.layers) = (image.size_bytes, image.layers);
        let id = record.id.clone();
        let details = &mut stored.details;
        let before = details.manifest.clone();
        details.added_at.get_or_insert_with(Timestamp::now);
        details.origin = image.origin;
        if !image.blobs.is_empty() {
            details.blobs = image.blobs;
        }
        if let Some((repository, access)) = image.access {
            details.access.entry(repository).or_default().add(&access);
        }
        if let Some(blob) = &image.blob {
            self.records.write_config(&id, blob)?;
        }
        if let Some(manifest) = image.manifest {
            self.records.write_manifest(&manifest.bytes)?;
            let digest = Digest::of(&manifest.bytes);
            details.manifest = Some(ManifestNote { digest, media_type: manifest.media_type });
        }
        let record = self.put_named(stored, &image.tags)?;
        self.forget_manifest(before);
        Ok(record)
    }

    /// Removes a manifest unless a record names it.
    fn forget_manifest(&self, note: Option<ManifestNote>) {
        let Some(ManifestNote { digest, .. }) = note else { return };
        let names = |s: &Stored| s.details.manifest.as_ref().is_some_and(|note| note.digest == digest);
        if !lock(&self.images).values().any(names) {
            self.records.forget_manifest(&digest);
        }
    }

    /// Notes that an image that is here was asked for again, by which tag and by whom; nothing where it is gone.
    pub(crate) async fn renew(
        self: &Arc<Self>,
        id: &Digest,
        tag: Option<String>,
        access: Option<(String, Access)>,
    ) -> Result<Option<ImageRecord>> {
        let (store, id) = (Arc::clone(self), id.clone());
        self.writing(move || {
            let _writer = lock(&store.writer);
            let Some(known) = lock(&store.images).get(&id).cloned() else { return Ok(None) };
            let mut stored = known.clone();
            let tags: Vec<String> = tag.into_iter().collect();
            stored
                .record
                .repo_tags
                .extend(tags.iter().filter(|t| !known.record.repo_tags.contains(t)).cloned());
            if let Some((repository, access)) = access {
                stored.details.access.entry(repository).or_default().add(&access);
            }
            if (&stored.record, &stored.details) == (&known.record, &known.details) {
                store.records.touch(&id);
                return Ok(Some(known.record));
            }
            store.put_named(stored, &tags).map(Some)
        })
        .await
    }

    /// Writes an image that has got tags, then takes these from whoever had them.
    fn put_named(&self, mut stored: Stored, tags: &[String]) -> Result<ImageRecord> {
        let id = stored.record.id.clone();
        let mut losers: Vec<Stored> = {
            let images = lock(&self.images);
            stored.serial = next_serial(&images);
            let loses =
                |s: &&Stored| s.record.id != id && s.record.repo_tags.iter().any(|t| tags.contains(t));
            images.values().filter(loses).cloned().collect()
        };
        for loser in &mut losers {
            stored.pin_by(loser.lose_tags(|t| tags.iter().any(|tag| tag == t)));
        }
        self.put(stored.clone())?;
        self.records.touch(&id);
        for loser in losers {
            self.put(loser)?;
        }
        Ok(stored.record)
    }

    pub(super) fn put(&self, stored: Stored) -> Result<()> {
        self.records.write(&stored)?;
        lock(&self.images).insert(stored.record.id.clone(), stored);
        Ok(())
    }

    /// Changes what is known of an image; nothing where it is gone.
    pub(crate) async fn change(
        self: &Arc<Self>,
        id: &Digest,
        change: impl FnOnce(&mut ImageRecord, &mut Details) + Send + 'static,
    ) -> Result<Option<ImageRecord>> {
        let (store, id) = (Arc::clone(self), id.clone());
        self.writing(move || {
            let _writer = lock(&store.writer);
            let Some(mut stored) = lock(&store.images).get(&id).cloned() else { return Ok(None) };
            change(&mut stored.record, &mut stored.details);
            store.put(stored.clone())?;
            Ok(Some(stored.record))
        })
        .await
    }

    /// Gives an image a further tag, which goes from whoever had it.
    pub(crate) async fn tag(self: &Arc<Self>, text: &str, tag: &Reference) -> Result<ImageRecord> {
        let Some(name) = tag.repo_tag() else {
            let reason = "a digest cannot be given to an image, only a tag".to_owned();
            return Err(Error::InvalidName { reference: tag.to_string(), reason });
        };
        let (store, text) = (Arc::clone(self), text.to_owned());
        self.writing(move || {
            let _writer = lock(&store.writer);
            let found = {
                let images = lock(&store.images);
                names::find(&images, &text)?.and_then(|n| images.get(n.id()).cloned())
            };
            let Some(mut stored) = found else { return Err(Error::Missing(text)) };
            if stored.record.repo_tags.contains(&name) {
                return Ok(stored.record);
            }
            stored.record.repo_tags.push(name.clone());
            store.put_named(stored, &[name])
        })
        .await
    }

    /// Pins an image, or pins it no more. By a tag, the pin goes with the tag.
    pub(crate) async fn set_pinned(self: &Arc<Self>, text: &str, pinned: bool) -> Result<ImageRecord> {
        let (store, text) = (Arc::clone(self), text.to_owned());
        self.writing(move || {
            let _writer = lock(&store.writer);
            let found = {
                let images = lock(&store.images);
                names::find(&images, &text)?.and_then(|n| Some((images.get(n.id()).cloned()?, n)))
            };
            let Some((mut stored, named)) = found else { return Err(Error::Missing(text)) };
            match named {
                Named::Tag(_, tag) if pinned => stored.pin_by(BTreeSet::from([tag])),
                _ => {
                    stored.record.pinned = pinned;
                    stored.details.pinned_tags.clear();
                }
            }
            store.put(stored.clone())?;
            Ok(stored.record)
        })
        .await
    }

    /// Takes a name from its image, or removes the image; then the layers that nothing needs any more.
    pub(crate) async fn remove(self: &Arc<Self>, text: &str) -> Result<()> {
        self.remove_unless(text, Veto::Nobody).await.map(drop)
    }

    /// The same, unless somebody uses an image that would go.
    pub(crate) async fn remove_unused(self: &Arc<Self>, text: &str) -> Result<Removed> {
        Ok(self.remove_unless(text, Veto::Used).await?.0)
    }

    /// Removes an image with all its names unless somebody uses it or has pinned it; how many bytes that gave back if it
    /// went.
    pub(crate) async fn remove_idle(self: &Arc<Self>, id: &Digest) -> Result<Option<u64>> {
        match self.remove_unless(id.as_str(), Veto::UsedOrPinned).await {
            Ok((removed, freed)) => Ok(matches!(removed, Removed::Image(_)).then_some(freed)),
            Err(Error::InUse { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn remove_unless(self: &Arc<Self>, text: &str, veto: Veto) -> Result<(Removed, u64)> {
        let (store, text) = (Arc::clone(self), text.to_owned());
        // A task of its own, since half a removal would leave layers that only the next one finds.
        let work = async move {
            let removed = store.remove_gated(text, veto).await?;
            let freed = if matches!(removed, Removed::Image(_)) { store.collect().await? } else { 0 };
            Ok((removed, freed))
        };
        tokio::spawn(work).await.map_err(|_| Error::Stopped)?
    }

    /// Nobody can take hold of the image between the look at who uses it and its removal.
    async fn remove_gated(self: &Arc<Self>, text: String, veto: Veto) -> Result<Removed> {
        let _gate = self.gate.lock().await;
        let users = if veto == Veto::Nobody { None } else { Some(self.users().await?) };
        let store = Arc::clone(self);
        let check = move |image: &ImageRecord| {
            let by = users.map(|users| users.of(image)).unwrap_or_default();
            if by.is_empty() && !(image.pinned && veto == Veto::UsedOrPinned) {
                return Ok(());
            }
            let image = image.repo_tags.first().cloned().unwrap_or_else(|| image.id.to_string());
            Err(Error::InUse { image, by })
        };
        self.writing(move || store.remove_now(&text, check)).await
    }

    fn remove_now(&self, text: &str, veto: impl FnOnce(&ImageRecord) -> Result<()>) -> Result<Removed> {
        let _writer = lock(&self.writer);
        let (mut stored, named) = {
            let images = lock(&self.images);
            let Some(named) = names::find(&images, text)? else { return Ok(Removed::Nothing) };
            let Some(stored) = images.get(named.id()) else { return Ok(Removed::Nothing) };
            (stored.clone(), named)
        };
        let before = stored.record.clone();
        let (nameless, name) = match named {
            Named::Id(id) => (true, id.to_string()),
            Named::Tag(_, tag) => {
                stored.lose_tags(|t| t == tag);
                (names::drop_tag(&mut stored.record, &tag), tag)
            }
            Named::Digest(_, digest) => (names::drop_digest(&mut stored.record, &digest), digest),
        };
        if nameless {
            veto(&before)?;
            self.records.remove(&before.id)?;
            lock(&self.images).remove(&before.id);
            self.forget_manifest(stored.details.manifest);
            Ok(Removed::Image(Box::new(before)))
        } else {
            self.put(stored)?;
            Ok(Removed::Name(name))
        }
    }
}
