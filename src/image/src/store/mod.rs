//! The images of a host: names and records, and the removal of layers that nothing needs any more.
//!
//! A pull *pins* its layers before it looks which of them are there, and keeps them pinned until its record names
//! them; [`Store::collect`] removes what is neither named nor pinned. Both hold the gate while they do that, so that
//! no layer goes between the look and the pin. A container that is being made holds its image in the same way.

mod adopt;
mod change;
mod details;
mod draft;
mod lock;
mod names;
mod records;
mod users;
mod views;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use jiff::Timestamp;
use moxlet_ids::{ChainId, Digest};
use moxlet_storage::{Driver, TakenLayer};
use tokio::sync::Semaphore;

use crate::{Config, Error, ImageConfig, ImageRecord, Reference, Result};
pub(crate) use adopt::{Adopted, SourceRecords};
pub(crate) use change::NewImage;
use details::Stored;
pub(crate) use details::{Access, Details};
pub(crate) use draft::TapeDraft;
pub(crate) use lock::DirLock;
use records::Images;
pub(crate) use records::Records;
pub use users::User;
pub(crate) use views::View;

/// Extractions at once, of all pulls of a store. There are more threads for what blocks than this.
pub(crate) const WORKERS: usize = 32;

/// One at a time for each layer.
type Turn = tokio::sync::Mutex<()>;

/// What all operations share.
pub(crate) struct Store {
    pub(crate) settings: Config,
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) records: Records,
    images: Mutex<Images>,
    /// Held while records are changed, on disk and then in `images`.
    writer: Mutex<()>,
    /// How many pulls and holds need a layer.
    pinned: Mutex<HashMap<ChainId, usize>>,
    /// How many holds an image has.
    held: Mutex<HashMap<Digest, usize>>,
    gate: tokio::sync::Mutex<()>,
    turns: Mutex<HashMap<ChainId, Weak<Turn>>>,
    /// Extractions at once.
    pub(crate) workers: Semaphore,
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
            uncount(&mut pinned, layer);
        }
    }
}

/// An image that is about to be used: as long as this is held none of its layers goes, whatever becomes of its names.
pub struct ImageHold {
    record: ImageRecord,
    pins: Pins,
}

impl ImageHold {
    /// The image.
    #[must_use]
    pub fn record(&self) -> &ImageRecord {
        &self.record
    }
}

impl Drop for ImageHold {
    fn drop(&mut self) {
        uncount(&mut lock(&self.pins.store.held), &self.record.id);
    }
}

fn uncount<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// Waits for work that writes to the driver's files, unless these do not answer any more. What was begun ends by itself
    /// when they do.
    pub(crate) async fn unless_stalled<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            done = work => done,
            error = self.driver.stalled() => Err(error.into()),
        }
    }

    /// The same for work that blocks on the records.
    pub(crate) async fn writing<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.unless_stalled(blocking(work)).await
    }

    pub(crate) async fn open(settings: Config, driver: Arc<dyn Driver>, lock: DirLock) -> Result<Arc<Self>> {
        Self::open_keeping(settings, driver, lock, &[]).await.map(|(store, _)| store)
    }

    /// The same, with layers that are kept even if no image names them.
    pub(crate) async fn open_keeping(
        settings: Config,
        driver: Arc<dyn Driver>,
        lock: DirLock,
        keep: &[ChainId],
    ) -> Result<(Arc<Self>, Pins)> {
        let layers: HashSet<ChainId> = driver.layers().await?.into_iter().collect();
        let dir = settings.dir.clone();
        let (records, images) = blocking(move || {
            let records = Records::open(dir, lock)?;
            let images = records.load(&layers)?;
            Ok((records, images))
        })
        .await?;
        let store = Arc::new(Self {
            settings,
            driver,
            records,
            images: Mutex::new(images),
            writer: Mutex::default(),
            pinned: Mutex::default(),
            held: Mutex::default(),
            gate: tokio::sync::Mutex::default(),
            turns: Mutex::default(),
            workers: Semaphore::new(WORKERS),
        });
        let pins = store.pin(keep).await;
        // Left by a crash, or in use when its image was removed. What cannot go now does not keep images from running.
        if let Err(error) = store.collect().await {
            tracing::warn!(%error, "layers that no image names stay for now");
        }
        Ok((store, pins))
    }

    /// What the config of an image says that is here.
    pub(crate) fn config(&self, id: &Digest) -> Option<Arc<ImageConfig>> {
        lock(&self.images).get(id).map(|s| Arc::clone(&s.record.config))
    }

    /// All images, in the order of their ids.
    pub(crate) fn list(&self) -> Vec<ImageRecord> {
        let mut all: Vec<_> = lock(&self.images).values().map(|s| s.record.clone()).collect();
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all
    }

    /// The image that a name or id stands for.
    pub(crate) fn resolve(&self, text: &str) -> Result<Option<ImageRecord>> {
        Ok(self.look_up(text)?.map(|(record, _)| record))
    }

    /// The same with all that is known of it.
    pub(crate) fn look_up(&self, text: &str) -> Result<Option<(ImageRecord, Details)>> {
        let images = lock(&self.images);
        let named = names::find(&images, text)?;
        Ok(named.and_then(|n| images.get(n.id())).map(|s| (s.record.clone(), s.details.clone())))
    }

    /// As [`Self::look_up`], for whom only a whole id (`sha256:…`) is one: what else a pod says is a name.
    pub(crate) fn look_up_name(&self, text: &str, reference: &Reference) -> Option<(ImageRecord, Details)> {
        let images = lock(&self.images);
        let id = names::find_name(&images, text, reference)?;
        images.get(&id).map(|s| (s.record.clone(), s.details.clone()))
    }

    /// The image that is here whole under a digest of a repository.
    pub(crate) fn look_up_digest(&self, digest: &str) -> Option<(ImageRecord, Details)> {
        let images = lock(&self.images);
        // What was written by the first versions is completed by a pull.
        let whole =
            |s: &&Stored| s.details.manifest.is_some() && s.details.blobs.len() == s.record.layers.len();
        let named = |s: &&Stored| s.record.repo_digests.iter().any(|d| d == digest);
        images.values().find(|s| named(s) && whole(s)).map(|s| (s.record.clone(), s.details.clone()))
    }

    /// When an image was used last: by a container, or by a pull.
    pub(crate) fn last_used(&self, id: &Digest) -> Option<Timestamp> {
        self.records.last_used(id)
    }

    /// Says that an image is used now. It looks at a disk.
    pub(crate) fn touch(&self, id: &Digest) {
        self.records.touch(id);
    }

    /// Keeps layers, whether they are here yet or not.
    pub(crate) async fn pin(self: &Arc<Self>, layers: &[ChainId]) -> Pins {
        let _gate = self.gate.lock().await;
        self.pin_now(layers)
    }

    fn pin_now(self: &Arc<Self>, layers: &[ChainId]) -> Pins {
        let mut pinned = lock(&self.pinned);
        for layer in layers {
            *pinned.entry(layer.clone()).or_default() += 1;
        }
        Pins { store: Arc::clone(self), layers: layers.to_vec() }
    }

    /// Finds an image and keeps its layers.
    pub(crate) async fn hold(self: &Arc<Self>, text: &str) -> Result<Option<ImageHold>> {
        let _gate = self.gate.lock().await;
        let Some(record) = self.resolve(text)? else { return Ok(None) };
        let pins = self.pin_now(&record.layers);
        *lock(&self.held).entry(record.id.clone()).or_default() += 1;
        Ok(Some(ImageHold { record, pins }))
    }

    /// The images that somebody holds.
    fn held(&self) -> HashSet<Digest> {
        lock(&self.held).keys().cloned().collect()
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

    /// Removes the layers that no image names, no mount shows and no pull needs; how many bytes that gave back. One that
    /// a container's root stands on stays until the next time.
    pub(crate) async fn collect(self: &Arc<Self>) -> Result<u64> {
        let (mut outcome, mut freed) = (Ok(()), 0_u64);
        for layer in self.driver.layers().await? {
            match self.remove_unneeded(&layer).await {
                Ok(bytes) => freed = freed.saturating_add(bytes.unwrap_or_default()),
                Err(error) if outcome.is_ok() => outcome = Err(error),
                Err(error) => tracing::warn!(%layer, %error, "a layer could not be removed"),
            }
        }
        let store = Arc::clone(self);
        for layer in self.writing(move || store.records.tapes()).await? {
            let removed = self.remove_tape_without_layer(&layer).await;
            outcome = outcome.and(removed);
        }
        outcome.map(|()| freed)
    }

    /// Removes a tape whose layer is neither here nor on its way. That is asked under the gate, at this moment: while layers
    /// were removed, pulls have brought others, and what could not be removed needs its tape still.
    async fn remove_tape_without_layer(self: &Arc<Self>, layer: &ChainId) -> Result<()> {
        let _gate = self.gate.lock().await;
        if lock(&self.pinned).contains_key(layer) || self.driver.has_layer(layer).await? {
            return Ok(());
        }
        let (store, layer) = (Arc::clone(self), layer.clone());
        self.writing(move || store.records.remove_tape(&layer)).await
    }

    /// What a layer gave back that is gone now. Under the gate it is only taken out of its place, one at a time: neither a
    /// large store nor a layer of millions of files keeps anybody waiting.
    async fn remove_unneeded(self: &Arc<Self>, layer: &ChainId) -> Result<Option<u64>> {
        if self.is_needed(layer) {
            return Ok(None);
        }
        // Of this layer alone: what all of them take changes with every pull that ends meanwhile.
        let freed = self.driver.layer_usage(layer).await.map_or(0, |usage| usage.bytes);
        let Some(taken) = self.take_unneeded(layer).await? else { return Ok(None) };
        self.unless_stalled(async { Ok(taken.remove().await?) }).await?;
        tracing::debug!(%layer, freed, "layer removed");
        Ok(Some(freed))
    }

    /// Whether an image names a layer, or a pull or hold needs it.
    fn is_needed(&self, layer: &ChainId) -> bool {
        let named = |s: &Stored| s.record.layers.contains(layer);
        lock(&self.pinned).contains_key(layer) || lock(&self.images).values().any(named)
    }

    /// Takes a layer that nothing needs out of its place.
    async fn take_unneeded(self: &Arc<Self>, layer: &ChainId) -> Result<Option<TakenLayer>> {
        let _gate = self.gate.lock().await;
        // Somebody else may have taken it since it was measured.
        if self.is_needed(layer) || !self.driver.has_layer(layer).await? {
            return Ok(None);
        }
        let store = Arc::clone(self);
        if self.writing(move || store.records.views()).await?.iter().any(|v| v.layers.contains(layer)) {
            return Ok(None);
        }
        match self.driver.take_layer(layer).await {
            Ok(taken) => Ok(Some(taken)),
            Err(moxlet_storage::Error::LayerInUse { by, .. }) => {
                tracing::debug!(%layer, container = %by, "a layer without an image is in use");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::Stopped)?
}
