//! All images of a ZFS store to another one, usually on another pool.
//!
//! Image after image goes: the tapes of its layers, the layers, config and manifest, at last the record, which makes it an
//! image of the other store. Whatever moment a run is cut off at, the next one finds the images and layers that came before
//! and goes on with the layer that was on its way. The source is only read. Roots of containers stay where they are.

use std::{collections::HashSet, path::PathBuf, sync::Arc};

use moxlet_ids::{ChainId, Digest};
use moxlet_storage::{Driver, ZfsConfig, ZfsDriver};

use crate::{
    Config, Error, ImageRecord, Result,
    place::{ZfsPlace, lock_dataset},
    store::{Adopted, SourceRecords, Store},
};

/// What became of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigratedImage {
    /// Its id.
    pub id: Digest,
    /// Its tags in the source.
    pub tags: Vec<String>,
    /// How many layers it has.
    pub layers: usize,
    /// How many of them had to be copied.
    pub copied: usize,
    /// What was done.
    pub outcome: MigrationOutcome,
    /// Its tags that are another image's in the target, and stay so.
    pub tags_left: Vec<String>,
    /// Whether pods with pull secrets have to show these to the registry again: the target tells credentials apart by a salt
    /// of its own.
    pub access_left: bool,
}

/// What a migration did with an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MigrationOutcome {
    /// The target did not have it.
    Copied,
    /// The target had it, and got what it did not know of it: names, a pin, who may have it.
    Completed,
    /// The target had it and knew all of it.
    Present,
}

/// A record of the source that cannot be used: its image was left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// The record.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// Brings all images of a store to another one, and says of each what was done as soon as it is. It can be run again from
/// whatever point it was interrupted at. Returns the records of the source that are damaged.
///
/// # Errors
/// Somebody else has one of the stores open, there is no store at `from`, or what a store says, or ZFS; the images that were
/// told before are in the target.
pub async fn migrate(
    from: &ZfsConfig,
    to: &ZfsConfig,
    tell: impl FnMut(&MigratedImage),
) -> Result<Vec<LeftOut>> {
    // Both, before either is opened: a driver that is opened removes what another process may be making.
    let (lock, other_lock) = (lock_dataset(from).await?, lock_dataset(to).await?);
    let source = ZfsPlace::new(ZfsDriver::open_existing(from.clone()).await?, lock);
    let driver = source.driver.clone();
    let outcome = match ZfsDriver::open(to.clone()).await {
        Ok(other) => {
            let target = ZfsPlace::new(other.clone(), other_lock);
            let outcome = copy_all(source, target, tell).await;
            let closed = other.close().await;
            outcome.and_then(|left_out| Ok(closed.map(|()| left_out)?))
        }
        Err(error) => Err(error.into()),
    };
    let closed = driver.close().await;
    outcome.and_then(|left_out| Ok(closed.map(|()| left_out)?))
}

async fn copy_all(
    from: ZfsPlace,
    to: ZfsPlace,
    mut tell: impl FnMut(&MigratedImage),
) -> Result<Vec<LeftOut>> {
    let layers: HashSet<ChainId> = from.driver.layers().await?.into_iter().collect();
    // Those that a run has brought whose record did not come any more are no garbage.
    let keep: Vec<ChainId> = layers.iter().cloned().collect();
    let source = SourceRecords::read(from.records, from.lock, layers).await?;
    let config = Config { dir: to.records, ..Config::default() };
    let (store, _pins) = Store::open_keeping(config, Arc::new(to.driver.clone()), to.lock, &keep).await?;
    let same_salt = store.adopt_salt(&source).await?;
    for image in source.images() {
        store.adopt_tapes(&source, image.layers.clone()).await?;
        let copied = from.driver.copy_layers_to(&to.driver, &image.layers).await?.len();
        let adopted = store.adopt(&source, &image, same_salt).await?;
        tell(&told(image, copied, adopted.ok_or(Error::Stopped)?));
    }
    Ok(source.damaged.into_iter().map(|(path, reason)| LeftOut { path, reason }).collect())
}

fn told(image: ImageRecord, copied: usize, adopted: Adopted) -> MigratedImage {
    MigratedImage {
        id: image.id,
        tags: image.repo_tags,
        layers: image.layers.len(),
        copied,
        outcome: match (adopted.known, adopted.written) {
            (false, _) => MigrationOutcome::Copied,
            (true, true) => MigrationOutcome::Completed,
            (true, false) => MigrationOutcome::Present,
        },
        tags_left: adopted.tags_left,
        access_left: adopted.access_left,
    }
}
