//! What can go wrong in a store.

use std::{io, path::PathBuf};

use moxlet_ids::{ChainId, ContainerId};

/// The result of a storage operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a storage operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such layer.
    #[error("layer {0} is not in the store")]
    LayerNotFound(ChainId),
    /// A container's root stands on the layer.
    #[error("layer {layer} is in use by the root of container {by}")]
    LayerInUse {
        /// The layer.
        layer: ChainId,
        /// One of the roots on it.
        by: ContainerId,
    },
    /// No such root.
    #[error("container {0} has no root in the store")]
    RootNotFound(ContainerId),
    /// A root of that name stands on other layers.
    #[error("container {0} already has a root on other layers or with another id map")]
    RootExists(ContainerId),
    /// A root has more layers than the kernel can stack.
    #[error("the image has {layers} layers, OverlayFS takes {max}")]
    TooManyLayers {
        /// How many there are.
        layers: usize,
        /// How many go.
        max: usize,
    },
    /// A map that names no ids or ids past the kernel's.
    #[error("the id map {host_base} + {size} is not valid")]
    BadIdMap {
        /// The map's first host id.
        host_base: u32,
        /// Its length.
        size: u32,
    },
    /// An operation of the kernel failed.
    #[error("could not {what} {}", path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file of ours does not read as it should.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// A worker of the runtime died.
    #[error("the storage worker was stopped")]
    Stopped,
}

/// Adds what was attempted on what to a system error.
pub(crate) trait Attempt<T> {
    fn attempt(self, what: &'static str, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T, E: Into<io::Error>> Attempt<T> for std::result::Result<T, E> {
    fn attempt(self, what: &'static str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|e| Error::Io { what, path: path.into(), source: e.into() })
    }
}
