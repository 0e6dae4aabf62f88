//! What can go wrong with an image. The texts are what a kubelet shows in a pod's events.

use std::{io, path::PathBuf, sync::Arc};

use crate::User;

/// The result of an image operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an image operation failed. It can be cloned, since all who wait for one pull get its outcome.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The name is none (the kubelet's `InvalidImageName`).
    #[error("could not parse image reference {reference:?}: {reason}")]
    InvalidName {
        /// What was asked for.
        reference: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The registry does not have it.
    #[error("failed to resolve image {reference:?}: {reference}: not found ({reason})")]
    NotFound {
        /// The image.
        reference: String,
        /// The registry's word.
        reason: String,
    },
    /// The registry does not let us.
    #[error("failed to pull image {reference:?}: authorization failed: {reason}")]
    Denied {
        /// The image.
        reference: String,
        /// The registry's word.
        reason: String,
    },
    /// The registry does not answer.
    #[error("failed to pull image {reference:?}: registry {registry} is unreachable: {reason}")]
    Unreachable {
        /// The image.
        reference: String,
        /// The host.
        registry: String,
        /// The cause.
        reason: String,
    },
    /// A `config.json`, or a pull secret, cannot be read.
    #[error("the registry credentials cannot be read: {0}")]
    BadCredentials(String),
    /// An image could not be brought into a registry.
    #[error("failed to push image {reference:?}: {reason}")]
    Push {
        /// The image.
        reference: String,
        /// The registry's word, or the cause.
        reason: String,
        /// Whether the registry does not let us.
        denied: bool,
    },
    /// The settings of a registry cannot be used.
    #[error("registry settings {}{}: {reason}", path.display(), line.map(|l| format!(", line {l}")).unwrap_or_default())]
    Settings {
        /// The file or directory.
        path: PathBuf,
        /// Where in it.
        line: Option<usize>,
        /// What is wrong with it.
        reason: String,
    },
    /// What came is not what was announced.
    #[error("failed to pull image {reference:?}: {part} has digest {actual}, expected {expected}")]
    DigestMismatch {
        /// The image.
        reference: String,
        /// Which part: `manifest`, `config`, `layer 3 (sha256:…)`.
        part: String,
        /// What it should be.
        expected: String,
        /// What it is.
        actual: String,
    },
    /// The image is damaged, hostile, or of a kind that we do not run.
    #[error("failed to pull image {reference:?}: {part}: {reason}")]
    BadImage {
        /// The image.
        reference: String,
        /// Which part: `manifest`, `config`, `layer 3 (sha256:…)`.
        part: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An operation on a file of the store failed.
    #[error("could not {what} {}", path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// The store has no room for an image.
    #[error(
        "no space left for {image}: the layers that are missing have {needed_bytes} bytes in the registry, and more unpacked; \
         {available_bytes} bytes are available on the file system of {} (`moxlet image prune` removes what nobody uses)",
        place.display()
    )]
    Full {
        /// The image.
        image: String,
        /// What the missing layers take at least.
        needed_bytes: u64,
        /// What was left when it failed.
        available_bytes: u64,
        /// A directory on the file system that is full.
        place: PathBuf,
        /// What failed.
        #[source]
        source: Box<Error>,
    },
    /// A file of the store was written by a newer version.
    #[error("{} has version {version}, which this program does not know: it was written by a newer one", path.display())]
    TooNew {
        /// The file.
        path: PathBuf,
        /// What it says.
        version: u32,
    },
    /// The beginning of an id that several images share.
    #[error("image id {0:?} is ambiguous: give more digits")]
    Ambiguous(String),
    /// It is not here (or not for everybody), and must not be pulled (the kubelet's `ErrImageNeverPull`).
    #[error("Container image {0:?} is not present with pull policy of Never")]
    NeverPull(String),
    /// An archive is damaged, hostile, or of a kind that we do not read.
    #[error("failed to import: {part}: {reason}")]
    BadArchive {
        /// Which part of it.
        part: String,
        /// What is wrong.
        reason: String,
    },
    /// The archive of a layer cannot be made again.
    #[error(
        "layer {layer} of image {image} has no tape, from which its archive is made again: it is lost, or came with a version that \
         kept none; remove every image that has this layer, and the containers on them, and pull the image again"
    )]
    NotRestorable {
        /// The image.
        image: String,
        /// The layer.
        layer: moxlet_ids::ChainId,
    },
    /// No compression.
    #[error("{0:?} is no compression of layers: gzip or zstd")]
    Compression(String),
    /// No pull policy.
    #[error("{0:?} is no pull policy: Always, IfNotPresent or Never")]
    PullPolicy(String),
    /// The image is not here.
    #[error("image {0:?} is not in the store (`moxlet image list` shows what is)")]
    Missing(String),
    /// It cannot be removed.
    #[error("image {image} is in use by {}: remove these first", list(by))]
    InUse {
        /// The image.
        image: String,
        /// Who uses it.
        by: Vec<User>,
    },
    /// What the store has of an image is not what it should be.
    #[error(
        "image {image} is damaged: {reason}; `moxlet image verify --repair` removes it, the next pull brings it again"
    )]
    Damaged {
        /// The image.
        image: String,
        /// What is wrong.
        reason: String,
    },
    /// The store is open elsewhere.
    #[error("the image store {} is in use by {holder}: work through it with --socket, or stop it first", dir.display())]
    Locked {
        /// Its directory.
        dir: PathBuf,
        /// Who holds it.
        holder: String,
    },
    /// Nothing can be mounted or unmounted there.
    #[error("{}: {reason}", path.display())]
    MountPoint {
        /// The directory.
        path: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// No TLS in this process.
    #[error("could not set up the registry client: {0}")]
    Client(String),
    /// A worker of the runtime died.
    #[error("the image worker was stopped")]
    Stopped,
    /// The store below.
    #[error(transparent)]
    Storage(Arc<moxlet_storage::Error>),
}

impl From<moxlet_storage::Error> for Error {
    fn from(error: moxlet_storage::Error) -> Self {
        Self::Storage(Arc::new(error))
    }
}

impl Error {
    /// Whether a file system, pool or quota is full.
    #[must_use]
    pub fn is_full(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        match self {
            Self::Full { .. } => true,
            Self::Io { source, .. } => matches!(source.kind(), StorageFull | QuotaExceeded),
            Self::Storage(error) => error.is_full(),
            _ => false,
        }
    }
}

/// A list for a message, not longer than people read.
fn list(users: &[User]) -> String {
    let shown: Vec<String> = users.iter().take(5).map(ToString::to_string).collect();
    let more = users.len().saturating_sub(shown.len());
    let shown = shown.join(", ");
    if more > 0 { format!("{shown} and {more} more") } else { shown }
}

/// Adds what was attempted on what to a system error.
pub(crate) trait Attempt<T> {
    fn attempt(self, what: &'static str, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T, E: Into<io::Error>> Attempt<T> for std::result::Result<T, E> {
    fn attempt(self, what: &'static str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|e| Error::Io { what, path: path.into(), source: Arc::new(e.into()) })
    }
}

/// An error with all its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}
