//! What can go wrong with an image.

/// The result of an image operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an image operation failed.
#[derive(Debug, thiserror::Error)]
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
    /// The store below.
    #[error(transparent)]
    Storage(#[from] moxlet_storage::Error),
    /// Pulling is not built yet.
    #[error("cannot pull {0:?}: pulling is not built yet")]
    NotBuilt(String),
}
