//! Container roots and layers on disk: the storage contract and its drivers.
//!
//! A *layer* is the extracted content of one image layer, keyed by its chain ID and kept unshifted (uid 0 is 0 on
//! disk). A *root* is a container's writable copy on top of a stack of layers; it is mounted with its ids shifted by
//! an [`IdMap`]. Half-made things lie apart from finished ones and are removed when a driver is opened, so the state
//! of a store is what is on disk.

mod error;
pub mod fake;
pub mod idmap;
pub mod mounts;
mod overlay;
mod tree;
mod zfs;

use std::{
    fmt,
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use moxlet_ids::{ChainId, ContainerId};
use serde::{Deserialize, Serialize};

pub use error::{CommandFailure, Error, LayerUser, Result};
pub use overlay::OverlayDriver;
pub use zfs::{IdStyle, ZfsConfig, ZfsDriver, mount_dataset};

/// Removes a file or a tree that a container wrote, of whatever depth, by way of `scratch` (a directory on the same file
/// system). Links are not followed. Idempotent.
///
/// # Errors
/// What the system says of which path.
pub fn remove_tree(path: &Path, scratch: &Path) -> Result<()> {
    tree::remove(path, scratch)
}

/// Which ids of the host a pod's ids 0..size become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct IdMap {
    /// The host id of id 0.
    pub host_base: u32,
    /// How many ids the map has.
    pub size: u32,
}

impl Default for IdMap {
    fn default() -> Self {
        Self { host_base: 100_000, size: 65_536 }
    }
}

impl IdMap {
    /// The host id of an id within the pod; none beyond the map.
    #[must_use]
    pub fn host_id(&self, id: u32) -> Option<u32> {
        if id < self.size { self.host_base.checked_add(id) } else { None }
    }

    /// Whether the map names at least one id and ends within the ids that the kernel has.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.size > 0 && self.host_base.checked_add(self.size).is_some()
    }
}

/// How a driver wants the whiteouts of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhiteoutStyle {
    /// A draft holds only its own layer: a whiteout is a character device 0/0, an opaque directory has
    /// `trusted.overlay.opaque=y`.
    Overlay,
    /// A draft starts as a copy of its parent: a whiteout removes the file at once.
    Apply,
}

/// What is done when something that a driver lent is given back.
type Undo = Box<dyn FnOnce() + Send + Sync>;

/// A layer that is being made. Dropped without [`Driver::commit_layer`] it is removed, at the latest when the
/// driver is opened again.
///
/// Its chain ID is told at the end, since that of an archive without a promise is known only when it has been read.
pub struct LayerDraft {
    parent: Option<ChainId>,
    path: PathBuf,
    undo: Option<Undo>,
}

impl LayerDraft {
    /// The directory to extract into.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The layer below.
    #[must_use]
    pub fn parent(&self) -> Option<&ChainId> {
        self.parent.as_ref()
    }
}

impl fmt::Debug for LayerDraft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerDraft")
            .field("parent", &self.parent)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Drop for LayerDraft {
    fn drop(&mut self) {
        // Large trees take seconds to remove and drop may run on a runtime's thread.
        if let Some(undo) = self.undo.take() {
            std::thread::spawn(undo);
        }
    }
}

/// A finished layer's content, to be read for as long as this is held.
///
/// With [`WhiteoutStyle::Overlay`] that is what the layer itself brings, with [`WhiteoutStyle::Apply`] what the layers
/// below bring as well.
pub struct LayerView {
    path: PathBuf,
    release: Option<Undo>,
}

impl LayerView {
    /// Where it is. Ids are unshifted; nothing is written there.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl fmt::Debug for LayerView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerView").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Drop for LayerView {
    fn drop(&mut self) {
        if let Some(release) = self.release.take() {
            release();
        }
    }
}

/// A layer that was taken out of its place: nobody finds it any more, and it may be made anew. What it takes on disk is given
/// back by [`Self::remove`], or in the background if this is dropped.
pub struct TakenLayer {
    chain: ChainId,
    remove: Option<Removal>,
}

/// The removal of what was set aside; it blocks.
type Removal = Box<dyn FnOnce() -> Result<()> + Send + Sync>;

impl TakenLayer {
    /// One that `remove` gives back, which blocks.
    #[must_use]
    pub fn new(chain: ChainId, remove: impl FnOnce() -> Result<()> + Send + Sync + 'static) -> Self {
        Self { chain, remove: Some(Box::new(remove)) }
    }

    /// One of which nothing is left.
    #[must_use]
    pub fn gone(chain: ChainId) -> Self {
        Self { chain, remove: None }
    }

    /// Gives back what it takes on disk.
    ///
    /// # Errors
    /// What the system says; the rest goes when the driver is opened again.
    pub async fn remove(mut self) -> Result<()> {
        let Some(remove) = self.remove.take() else { return Ok(()) };
        tokio::task::spawn_blocking(remove).await.map_err(|_| Error::Stopped)?
    }
}

impl fmt::Debug for TakenLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TakenLayer").field("chain", &self.chain).finish_non_exhaustive()
    }
}

impl Drop for TakenLayer {
    fn drop(&mut self) {
        let Some(remove) = self.remove.take() else { return };
        let chain = self.chain.clone();
        std::thread::spawn(move || {
            if let Err(error) = remove() {
                tracing::warn!(layer = %chain, %error, "a part of a removed layer stays until the next start");
            }
        });
    }
}

/// How a container's root is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootOptions {
    /// Which ids of the host its ids become.
    pub map: IdMap,
    /// Bytes that the container may write beside what its image brings; none is no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota_bytes: Option<u64>,
}

impl From<IdMap> for RootOptions {
    fn from(map: IdMap) -> Self {
        Self { map, quota_bytes: None }
    }
}

/// What a layer, a container or a store takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes on disk.
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
}

/// Figures of the file system that the store lies on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsUsage {
    /// Bytes in use, by anybody.
    pub used_bytes: u64,
    /// Inodes in use, by anybody.
    pub inodes_used: u64,
    /// Size in bytes.
    pub capacity_bytes: u64,
    /// Bytes that can still be written.
    pub available_bytes: u64,
    /// Inodes in all; 0 where the file system has no fixed number.
    pub inodes: u64,
    /// Inodes that are free.
    pub inodes_free: u64,
    /// The store's directory, which names the file system.
    pub mountpoint: PathBuf,
}

/// A place for layers and container roots.
#[async_trait]
pub trait Driver: Send + Sync {
    /// How the drafts of this driver want their whiteouts.
    fn whiteouts(&self) -> WhiteoutStyle;
    /// Whether a finished layer is here.
    async fn has_layer(&self, chain: &ChainId) -> Result<bool>;
    /// Starts a layer on top of `parent`, which a driver with [`WhiteoutStyle::Apply`] needs to have.
    async fn begin_layer(&self, parent: Option<&ChainId>) -> Result<LayerDraft>;
    /// Finishes a layer: all of it is on disk, then it appears at once as `chain`. A layer that somebody else has
    /// finished in the meantime wins and the draft is removed. `usage` is what the layer brought, as far as the driver
    /// does not know better.
    async fn commit_layer(&self, draft: LayerDraft, chain: &ChainId, usage: Usage) -> Result<()>;
    /// The content of a finished layer.
    async fn open_layer(&self, chain: &ChainId) -> Result<LayerView>;
    /// Takes a layer out of its place, which takes no longer for one with millions of files; [`Error::LayerInUse`] while a
    /// root, a view or another layer of a driver with [`WhiteoutStyle::Apply`] stands on it. Idempotent.
    async fn take_layer(&self, chain: &ChainId) -> Result<TakenLayer>;
    /// Removes a layer: takes it out of its place and gives back what it takes. Idempotent.
    async fn remove_layer(&self, chain: &ChainId) -> Result<()> {
        self.take_layer(chain).await?.remove().await
    }
    /// The finished layers, each before those that it was made on, so that removing them in this order can succeed.
    async fn layers(&self) -> Result<Vec<ChainId>>;
    /// What the removal of a layer would give back; nothing for one that is not here.
    async fn layer_usage(&self, chain: &ChainId) -> Result<Usage>;
    /// What all layers take.
    async fn layers_usage(&self) -> Result<Usage>;
    /// Mounts a stack of layers at `target` (made if missing), merged, read-only and with ids as they are in the image;
    /// the bottom layer comes first. [`mounts::unmount`] takes it away.
    async fn mount_layers(&self, layers: &[ChainId], target: &Path) -> Result<()>;
    /// Makes a container's writable root on a stack of layers, the bottom one first; none is an empty root.
    /// Repeating it with the same layers and options changes nothing. A quota that the store cannot keep is refused.
    async fn create_root(&self, id: &ContainerId, layers: &[ChainId], options: RootOptions) -> Result<()>;
    /// Mounts a root at `target` (made if missing) in the caller's mount namespace. Idempotent.
    async fn mount_root(&self, id: &ContainerId, target: &Path) -> Result<()>;
    /// Unmounts a root. Idempotent; a busy one is detached.
    async fn unmount_root(&self, id: &ContainerId, target: &Path) -> Result<()>;
    /// Removes a root and what was written in it. Idempotent. It must not be mounted.
    async fn remove_root(&self, id: &ContainerId) -> Result<()>;
    /// The roots that are here.
    async fn roots(&self) -> Result<Vec<ContainerId>>;
    /// The layers that a root stands on, the bottom one first.
    async fn root_layers(&self, id: &ContainerId) -> Result<Vec<ChainId>>;
    /// What was written in a root.
    async fn root_usage(&self, id: &ContainerId) -> Result<Usage>;
    /// Figures of the file system below.
    async fn fs_usage(&self) -> Result<FsUsage>;
    /// Ends when the store has ceased to answer, with the reason: whoever writes to its files waits in vain then.
    async fn stalled(&self) -> Error {
        std::future::pending().await
    }
    /// Takes down the mounts that the driver keeps for itself. Roots must be unmounted before.
    async fn close(&self) -> Result<()>;
}

#[cfg(test)]
mod tests {
    use super::IdMap;

    #[test]
    fn a_map_ends_where_it_says() {
        let map = IdMap::default();
        assert_eq!(map.host_id(0), Some(100_000));
        assert_eq!(map.host_id(65_535), Some(165_535));
        assert_eq!(map.host_id(65_536), None);
        assert!(!IdMap { host_base: u32::MAX, size: 1 }.is_valid());
        assert!(!IdMap { host_base: 0, size: 0 }.is_valid());
    }
}
