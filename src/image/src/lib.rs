//! OCI images: registry client, layer pipeline, image store.

mod error;

use std::{path::PathBuf, sync::Arc};

use moxlet_ids::{ChainId, Digest};
use moxlet_storage::Driver;

pub use error::{Error, Result};
pub use oci_spec::image::ImageConfiguration;

/// How a store is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the records of images and their config blobs lie.
    pub dir: PathBuf,
    /// Registries (`host` or `host:port`) that are spoken to without TLS; those on loopback are as well.
    pub plain_http_hosts: Vec<String>,
    /// How many layers of one image come at once.
    pub max_parallel_downloads: usize,
}

/// One way to log in at a registry; several are tried in turn.
#[derive(Clone, Default)]
pub struct Credentials {
    /// The user.
    pub username: String,
    /// The password.
    pub password: String,
    /// A token that the registry takes as it is, instead of a user and password.
    pub registry_token: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
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
    /// Its config.
    pub config: ImageConfiguration,
}

/// The images of a host.
pub struct ImageStore {
    #[allow(dead_code)]
    config: Config,
    #[allow(dead_code)]
    driver: Arc<dyn Driver>,
}

impl ImageStore {
    /// Opens the store; its layers lie in `driver`.
    pub async fn open(config: Config, driver: Arc<dyn Driver>) -> Result<Arc<Self>> {
        Ok(Arc::new(Self { config, driver }))
    }

    /// Brings an image from its registry. Pulls of one image at the same time become one.
    pub async fn pull(&self, reference: &str, _auths: &[Credentials]) -> Result<ImageRecord> {
        Err(Error::NotBuilt(reference.to_owned()))
    }

    /// The image of a reference, an id (or its hexadecimal digits) or a digest reference.
    pub async fn resolve(&self, _reference: &str) -> Result<Option<ImageRecord>> {
        Ok(None)
    }

    /// All images.
    pub async fn list(&self) -> Result<Vec<ImageRecord>> {
        Ok(Vec::new())
    }

    /// Takes a tag from an image, or removes an image named by its id with all tags. Idempotent.
    pub async fn remove(&self, _reference: &str) -> Result<()> {
        Ok(())
    }
}
