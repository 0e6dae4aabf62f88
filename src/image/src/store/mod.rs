//! The images of a host: names and records, and the removal of layers that nothing needs any more.
//!
//! A pull *pins* its layers before it looks which of them are there, and keeps them pinned until its record names
//! them; [`Store::collect`] removes what is neither named nor pinned. Both hold the gate while they do that, so that
//! no layer goes between the look and the pin.

mod names;
mod records;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use moxlet_ids::{ChainId, Digest};
use moxlet_storage::Driver;
use oci_spec::image::ImageConfiguration;

use crate::{Config, Error, ImageRecord, Result, registry::Registry};
use names::Named;
use records::{Images, Records, Stored};

/// One at a time for each layer.
type Turn = tokio::sync::Mutex<()>;

/// What all operations share.
pub(crate) struct Store {
    pub(crate) settings: Config,
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) registry: Registry,
    records: Records,
    images: Mutex<Images>,
    /// Held while records are changed, on disk and then in `images`.
    writer: Mutex<()>,
    /// How many pulls need a layer.
    pinned: Mutex<HashMap<ChainId, usize>>,
    gate: tokio::sync::Mutex<()>,
    turns: Mutex<HashMap<ChainId, Weak<Turn>>>,
}

/// What a pull has brought.
pub(crate) struct NewImage {
    pub(crate) id: Digest,
    pub(crate) tag: Option<String>,
    /// `docker.io/library/busybox@sha256:…`.
    pub(crate) digest: String,
    pub(crate) size_bytes: u64,
    pub(crate) layers: Vec<ChainId>,
    pub(crate) config: ImageConfiguration,
    /// The bytes of the config, where they are not here yet.
    pub(crate) blob: Option<Vec<u8>>,
}

/// Keeps layers from being collected.
pub(crate) struct Pins {
    store: Arc<Store>,
    layers: Vec<ChainId>,
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut pinned = lock(&self.store.pinned);
        for layer in &self.layers {
            if let Some(count) = pinned.get_mut(layer) {
                *count -= 1;
                if *count == 0 {
                    pinned.remove(layer);
                }
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    pub(crate) async fn open(settings: Config, driver: Arc<dyn Driver>) -> Result<Arc<Self>> {
        let registry = Registry::new(&settings)?;
        let layers: HashSet<ChainId> = driver.layers().await?.into_iter().collect();
        let dir = settings.dir.clone();
        let (records, images) = blocking(move || {
            let records = Records::open(dir)?;
            let images = records.load(&layers)?;
            Ok((records, images))
        })
        .await?;
        let store = Arc::new(Self {
            settings,
            driver,
            registry,
            records,
            images: Mutex::new(images),
            writer: Mutex::default(),
            pinned: Mutex::default(),
            gate: tokio::sync::Mutex::default(),
            turns: Mutex::default(),
        });
        // Left by a crash, or in use when its image was removed. What cannot go now does not keep images from running.
        if let Err(error) = store.collect().await {
            tracing::warn!(%error, "layers that no image names stay for now");
        }
        Ok(store)
    }

    /// The config of an image that is here.
    pub(crate) fn config(&self, id: &Digest) -> Option<ImageConfiguration> {
        lock(&self.images).get(id).map(|s| s.record.config.clone())
    }

    /// All images, in the order of their ids.
    pub(crate) fn list(&self) -> Vec<ImageRecord> {
        let mut all: Vec<_> = lock(&self.images).values().map(|s| s.record.clone()).collect();
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all
    }

    /// The image that a name or id stands for.
    pub(crate) fn resolve(&self, text: &str) -> Result<Option<ImageRecord>> {
        let images = lock(&self.images);
        let named = names::find(&images, text)?;
        Ok(named.and_then(|n| images.get(n.id())).map(|s| s.record.clone()))
    }

    /// Keeps layers, whether they are here yet or not.
    pub(crate) async fn pin(self: &Arc<Self>, layers: &[ChainId]) -> Pins {
        let _gate = self.gate.lock().await;
        let mut pinned = lock(&self.pinned);
        for layer in layers {
            *pinned.entry(layer.clone()).or_default() += 1;
        }
        Pins { store: Arc::clone(self), layers: layers.to_vec() }
    }

    /// The lock of a layer that is being made.
    pub(crate) fn turn(&self, layer: &ChainId) -> Arc<Turn> {
        let mut turns = lock(&self.turns);
        if let Some(turn) = turns.get(layer).and_then(Weak::upgrade) {
            return turn;
        }
        turns.retain(|_, t| t.strong_count() > 0);
        let turn = Arc::new(Turn::default());
        turns.insert(layer.clone(), Arc::downgrade(&turn));
        turn
    }

    /// Records an image whose layers are all here and pinned. It is done even if the caller goes away.
    pub(crate) async fn add(self: &Arc<Self>, image: NewImage, pins: Pins) -> Result<ImageRecord> {
        let store = Arc::clone(self);
        blocking(move || {
            let record = store.add_now(image);
            drop(pins);
            record
        })
        .await
    }

    fn add_now(&self, image: NewImage) -> Result<ImageRecord> {
        let _writer = lock(&self.writer);
        let (known, serial, losers) = {
            let images = lock(&self.images);
            let serial = images.values().map(|s| s.serial).max().map_or(1, |s| s + 1);
            let loses = |s: &&Stored| {
                s.record.id != image.id && image.tag.as_ref().is_some_and(|t| s.record.repo_tags.contains(t))
            };
            let losers: Vec<Stored> = images.values().filter(loses).cloned().collect();
            (images.get(&image.id).map(|s| s.record.clone()), serial, losers)
        };
        let mut record = known.unwrap_or_else(|| ImageRecord {
            id: image.id,
            repo_tags: Vec::new(),
            repo_digests: Vec::new(),
            size_bytes: 0,
            layers: Vec::new(),
            config: image.config,
        });
        if let Some(tag) = &image.tag
            && !record.repo_tags.contains(tag)
        {
            record.repo_tags.push(tag.clone());
        }
        if !record.repo_digests.contains(&image.digest) {
            record.repo_digests.push(image.digest);
        }
        (record.size_bytes, record.layers) = (image.size_bytes, image.layers);
        if let Some(blob) = &image.blob {
            self.records.write_config(&record.id, blob)?;
        }
        let stored = Stored { record: record.clone(), serial };
        self.records.write(&stored)?;
        lock(&self.images).insert(record.id.clone(), stored);
        for mut loser in losers {
            loser.record.repo_tags.retain(|t| Some(t) != image.tag.as_ref());
            self.records.write(&loser)?;
            lock(&self.images).insert(loser.record.id.clone(), loser);
        }
        Ok(record)
    }

    /// Takes a name from its image, or removes the image; then the layers that nothing needs any more.
    pub(crate) async fn remove(self: &Arc<Self>, text: &str) -> Result<()> {
        let (store, text) = (Arc::clone(self), text.to_owned());
        // A task of its own, since half a removal would leave layers that only the next one finds.
        let work = async move {
            let changing = Arc::clone(&store);
            if blocking(move || changing.remove_now(&text)).await? {
                store.collect().await?;
            }
            Ok(())
        };
        tokio::spawn(work).await.map_err(|_| Error::Stopped)?
    }

    /// Whether an image went.
    fn remove_now(&self, text: &str) -> Result<bool> {
        let _writer = lock(&self.writer);
        let (mut stored, named) = {
            let images = lock(&self.images);
            let Some(named) = names::find(&images, text)? else { return Ok(false) };
            let Some(stored) = images.get(named.id()) else { return Ok(false) };
            (stored.clone(), named)
        };
        let id = stored.record.id.clone();
        let nameless = match named {
            Named::Id(_) => true,
            Named::Tag(_, tag) => names::drop_tag(&mut stored.record, &tag),
            Named::Digest(_, digest) => names::drop_digest(&mut stored.record, &digest),
        };
        if nameless {
            self.records.remove(&id)?;
            lock(&self.images).remove(&id);
        } else {
            self.records.write(&stored)?;
            lock(&self.images).insert(id, stored);
        }
        Ok(nameless)
    }

    /// Removes the layers that no image names and no pull needs. One that a container's root stands on stays until
    /// the next time.
    pub(crate) async fn collect(&self) -> Result<()> {
        let _gate = self.gate.lock().await;
        let mut needed: HashSet<ChainId> = lock(&self.pinned).keys().cloned().collect();
        needed.extend(lock(&self.images).values().flat_map(|s| s.record.layers.iter().cloned()));
        let mut outcome = Ok(());
        for layer in self.driver.layers().await? {
            if needed.contains(&layer) {
                continue;
            }
            match self.driver.remove_layer(&layer).await {
                Ok(()) => tracing::debug!(%layer, "layer removed"),
                Err(moxlet_storage::Error::LayerInUse { by, .. }) => {
                    tracing::debug!(%layer, container = %by, "a layer without an image is in use");
                }
                Err(error) if outcome.is_ok() => outcome = Err(error.into()),
                Err(error) => tracing::warn!(%layer, %error, "a layer could not be removed"),
            }
        }
        outcome
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::Stopped)?
}
