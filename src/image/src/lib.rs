//! OCI images: registry client, layer pipeline, image store.
//!
//! A pull streams every layer from its registry through digest check, decompression and digest check again into a
//! directory of the storage driver; no layer is ever in memory as a whole, and none stays on disk as a blob. What an image is
//! called lies in small records beside its config.

mod credentials;
mod download;
mod ensure;
mod error;
mod export;
mod fetch;
#[cfg(any(feature = "fuzzing", test))]
#[doc(hidden)]
pub mod fuzzing;
mod garbage;
mod image_config;
mod import;
mod inspect;
mod layer;
mod migrate;
mod mount;
mod place;
mod progress;
mod pull;
mod push;
mod reference;
mod registry;
mod restore;
mod store;
#[cfg(test)]
mod tests;
mod verify;

use std::{
    collections::HashMap,
    future::Future,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};
use moxlet_ids::{ChainId, Digest};
use moxlet_storage::Driver;

pub use credentials::{Credentials, Keyring};
pub use ensure::PullPolicy;
use ensure::Taker;
pub use error::{Error, Result};
pub use garbage::{Garbage, GarbagePolicy};
pub use image_config::ImageConfig;
pub use import::{Feed, Imported, RootfsOptions, Source, feed};
pub use inspect::{InspectedLayer, InspectedManifest, Inspection, ListedImage};
pub use migrate::{LeftOut, MigratedImage, MigrationOutcome, migrate};
pub use moxlet_storage::ZfsConfig;
pub use place::{OpenPlace, Place, dataset_dir};
pub use progress::{LayerProgress, LayerState, PullProgress};
pub use reference::Reference;
use registry::Registry;
pub use registry::check_registry_config;
pub use restore::Compression;
pub use store::{ImageHold, User};
pub use verify::{Verification, VerifyReport};

use progress::Reporter;
use serde::{Deserialize, Serialize};
use store::{DirLock, Store};
use tokio::sync::watch;

/// How a store is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the records of images and their config blobs lie.
    pub dir: PathBuf,
    /// Registries (`host` or `host:port`) that are spoken to without TLS; those on loopback are as well.
    pub plain_http_hosts: Vec<String>,
    /// How many layers of one image come at once.
    pub max_parallel_downloads: usize,
    /// Docker's `config.json` of the host: its credentials are tried after those that a pull comes with. It is read again
    /// when it has changed.
    pub docker_config: Option<PathBuf>,
    /// A directory of `hosts.toml` files and certificates, as containerd's `certs.d`; they are read at each pull.
    pub registry_config_dir: Option<PathBuf>,
    /// How many blobs come from one host at once, over all pulls; at least 1.
    pub max_parallel_per_host: usize,
    /// How many bytes of one pull may be fetched ahead, on disk, where layers are applied one after the other; 0 is none.
    pub prefetch_max_bytes: u64,
    /// How long a registry may say nothing before a download is taken up anew.
    pub stall_timeout: Duration,
    /// The pause before something is tried again; each further one is twice as long.
    pub retry_pause: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            dir: PathBuf::from("/var/lib/moxlet/images"),
            plain_http_hosts: Vec::new(),
            max_parallel_downloads: 4,
            docker_config: None,
            registry_config_dir: None,
            max_parallel_per_host: 6,
            prefetch_max_bytes: 512 << 20,
            stall_timeout: Duration::from_secs(30),
            retry_pause: Duration::from_millis(500),
        }
    }
}

/// An image of the store.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageRecord {
    /// The digest of its config: the image's id.
    pub id: Digest,
    /// `docker.io/library/busybox:latest`.
    pub repo_tags: Vec<String>,
    /// `docker.io/library/busybox@sha256:…`.
    pub repo_digests: Vec<String>,
    /// What config and layers took in the registry.
    pub size_bytes: u64,
    /// Its layers, the bottom one first.
    pub layers: Vec<ChainId>,
    /// Whether garbage collection passes it by.
    pub pinned: bool,
    /// What its config says.
    pub config: Arc<ImageConfig>,
}

/// A layer as it lies in a registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LayerBlob {
    /// The digest of the blob.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Its media type.
    pub media_type: String,
}

/// Where an image of the store is from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// It came with a version that did not note it.
    #[default]
    Unknown,
    /// From a registry.
    Pulled,
    /// From an archive, or from a root file system.
    Imported,
}

/// What a removal has taken away.
#[derive(Debug, Clone, PartialEq)]
pub enum Removed {
    /// There is no such image.
    Nothing,
    /// A name; the image has others.
    Name(String),
    /// The image.
    Image(Box<ImageRecord>),
}

/// Who pulls what for whom. Credentials are part of it: one caller must not get what only another one may have.
type Wanted = (Reference, Vec<Credentials>, Taker);
type Pull = BoxFuture<'static, Result<ImageRecord>>;

/// A pull that is under way.
struct Under {
    pull: WeakShared<Pull>,
    progress: watch::Receiver<PullProgress>,
}

/// The images of a host.
pub struct ImageStore {
    store: Arc<Store>,
    registry: Arc<Registry>,
    /// The pulls that somebody waits for; the last one who goes takes the pull along.
    pulls: Mutex<HashMap<Wanted, Under>>,
    /// One garbage collection at a time.
    collecting: tokio::sync::Mutex<()>,
}

impl ImageStore {
    /// Opens the store; its layers lie in `driver`, which holds no others. What a crash left half-made is removed.
    ///
    /// # Errors
    /// Another process has it open ([`Error::Locked`]), the directory or the driver cannot be read, or a record was
    /// written by a newer version ([`Error::TooNew`]). Images that turn out to be damaged are reported in the log and
    /// forgotten.
    pub async fn open(config: Config, driver: Arc<dyn Driver>) -> Result<Arc<Self>> {
        let dir = config.dir.clone();
        let lock = store::blocking(move || DirLock::take(&dir)).await?;
        Self::open_locked(config, driver, lock).await
    }

    /// The same for who has the lock of the directory already.
    async fn open_locked(config: Config, driver: Arc<dyn Driver>, lock: DirLock) -> Result<Arc<Self>> {
        let registry = Arc::new(Registry::new(&config)?);
        let store = Store::open(config, driver, lock).await?;
        Ok(Arc::new(Self {
            store,
            registry,
            pulls: Mutex::default(),
            collecting: tokio::sync::Mutex::default(),
        }))
    }

    /// Takes down the mounts that the driver keeps for itself. Container roots must be unmounted before.
    ///
    /// # Errors
    /// What the driver says.
    pub async fn close(&self) -> Result<()> {
        Ok(self.store.driver.close().await?)
    }

    /// Brings an image from its registry. Pulls of one image with the same credentials at the same time become one,
    /// which ends early only when all who wait for it have gone.
    ///
    /// # Errors
    /// [`Error::InvalidName`]; what the registry answers ([`Error::NotFound`], [`Error::Denied`],
    /// [`Error::Unreachable`]); what is wrong with the image ([`Error::DigestMismatch`], [`Error::BadImage`]); a failure
    /// of the store.
    pub async fn pull(&self, reference: &str, auths: &[Credentials]) -> Result<ImageRecord> {
        let (_, pull) = self.pull_with_progress(reference, auths)?;
        pull.await
    }

    /// The same, and how far it has come; several who wait for one pull see the same.
    ///
    /// # Errors
    /// [`Error::InvalidName`]; the future's are those of [`Self::pull`].
    pub fn pull_with_progress(
        &self,
        reference: &str,
        auths: &[Credentials],
    ) -> Result<(watch::Receiver<PullProgress>, impl Future<Output = Result<ImageRecord>> + Send + 'static)>
    {
        let wanted = (Reference::parse(reference)?, auths.to_vec(), Taker::Host);
        Ok(self.join(wanted))
    }

    /// The image of a reference, an id (or three or more of its hexadecimal digits) or a digest reference.
    ///
    /// # Errors
    /// [`Error::InvalidName`] for a text that is nothing of the kind, [`Error::Ambiguous`] for the beginning of several
    /// ids.
    pub async fn resolve(&self, reference: &str) -> Result<Option<ImageRecord>> {
        self.store.resolve(reference)
    }

    /// The same for somebody who is going to use the image: until the hold is dropped none of its layers goes. It counts
    /// as a use.
    ///
    /// # Errors
    /// As [`Self::resolve`].
    pub async fn hold(&self, reference: &str) -> Result<Option<ImageHold>> {
        let hold = self.store.hold(reference).await?;
        if let Some(hold) = &hold {
            self.used(&hold.record().id).await?;
        }
        Ok(hold)
    }

    /// Says that an image was in use until now. One that is not here is nobody's concern.
    ///
    /// # Errors
    /// The runtime ends.
    pub async fn used(&self, id: &Digest) -> Result<()> {
        let (store, id) = (Arc::clone(&self.store), id.clone());
        let touched = move || {
            store.touch(&id);
            Ok(())
        };
        self.store.writing(touched).await
    }

    /// Gives an image a further tag, which goes from whoever had it.
    ///
    /// # Errors
    /// [`Error::InvalidName`] where the tag is none, [`Error::Missing`] where the image is not here.
    pub async fn tag(&self, reference: &str, tag: &str) -> Result<ImageRecord> {
        self.store.tag(reference, &Reference::parse(tag)?).await
    }

    /// Has garbage collection pass an image by, or not any more. By a tag, that goes with the tag when it moves to another
    /// image; by an id or digest it stays.
    ///
    /// # Errors
    /// [`Error::Missing`] where the image is not here.
    pub async fn set_pinned(&self, reference: &str, pinned: bool) -> Result<ImageRecord> {
        self.store.set_pinned(reference, pinned).await
    }

    /// All images.
    ///
    /// # Errors
    /// None at present.
    pub async fn list(&self) -> Result<Vec<ImageRecord>> {
        Ok(self.store.list())
    }

    /// Takes a tag or digest from an image, or removes an image named by its id with all its names. With the last name
    /// the image goes, and its layers as far as no other image or container needs them. Idempotent.
    ///
    /// # Errors
    /// As [`Self::resolve`], or a failure of the store. Layers that could not be removed are tried again at the next
    /// removal or opening.
    pub async fn remove(&self, reference: &str) -> Result<()> {
        self.store.remove(reference).await
    }

    /// As [`Self::remove`], but an image that a container or a mount stands on does not lose its last name.
    ///
    /// # Errors
    /// [`Error::InUse`] with who uses it; else as [`Self::remove`].
    pub async fn remove_unused(&self, reference: &str) -> Result<Removed> {
        self.store.remove_unused(reference).await
    }

    /// The pull that is under way, or a new one.
    fn join(&self, wanted: Wanted) -> (watch::Receiver<PullProgress>, Shared<Pull>) {
        let mut pulls = self.pulls.lock().unwrap_or_else(PoisonError::into_inner);
        pulls.retain(|_, under| under.pull.upgrade().is_some_and(|p| p.peek().is_none()));
        if let Some(under) = pulls.get(&wanted)
            && let Some(pull) = under.pull.upgrade()
        {
            return (under.progress.clone(), pull);
        }
        let (reference, auths, taker) = wanted.clone();
        let (reporter, progress) = Reporter::new();
        let (store, registry) = (Arc::clone(&self.store), Arc::clone(&self.registry));
        let pull = async move {
            let pull = pull::pull(Arc::clone(&store), registry, reference, auths, taker, reporter);
            store.unless_stalled(pull).await
        };
        let pull = pull.boxed().shared();
        if let Some(weak) = pull.downgrade() {
            pulls.insert(wanted, Under { pull: weak, progress: progress.clone() });
        }
        (progress, pull)
    }
}
