//! What can go wrong in a store.

use std::{fmt, io, path::PathBuf};

use moxlet_ids::{ChainId, ContainerId};

use crate::IdMap;

/// The result of a storage operation.
pub type Result<T> = std::result::Result<T, Error>;

/// What keeps a layer in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerUser {
    /// A container's root stands on it.
    Root(ContainerId),
    /// Another layer stands on it.
    Layer(ChainId),
    /// A layer that is being made on it.
    Draft,
    /// Somebody reads it, or has it mounted.
    View,
    /// A dataset that is not ours was cloned from it, or one of ours that is still busy.
    Dataset(String),
}

impl fmt::Display for LayerUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root(id) => write!(f, "the root of container {id}"),
            Self::Layer(chain) => write!(f, "layer {chain}"),
            Self::Draft => f.write_str("a layer that is being made"),
            Self::View => f.write_str("somebody who reads it"),
            Self::Dataset(name) => write!(f, "dataset {name}"),
        }
    }
}

/// A `zfs` or `zpool` command that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandFailure {
    /// The command line.
    pub command: String,
    /// Its exit code; none if a signal ended it.
    pub exit: Option<i32>,
    /// What it wrote to its standard error, cut at a few kilobytes.
    pub stderr: String,
}

impl fmt::Display for CommandFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.exit {
            Some(code) => write!(f, "`{}` failed (exit code {code}): {}", self.command, self.stderr),
            None => write!(f, "`{}` was ended by a signal: {}", self.command, self.stderr),
        }
    }
}

/// Why a storage operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such layer.
    #[error("layer {0} is not in the store")]
    LayerNotFound(ChainId),
    /// Something stands on the layer.
    #[error("layer {layer} is in use by {by}")]
    LayerInUse {
        /// The layer.
        layer: ChainId,
        /// One of those who use it.
        by: LayerUser,
    },
    /// Layers that were not made on one another.
    #[error("layer {layer} was not made on {}", below.as_ref().map_or("nothing".to_owned(), ToString::to_string))]
    NotAStack {
        /// The upper one.
        layer: ChainId,
        /// What should be right below it; none for the bottom.
        below: Option<ChainId>,
    },
    /// No such root.
    #[error("container {0} has no root in the store")]
    RootNotFound(ContainerId),
    /// A root of that name is another one.
    #[error("container {0} already has a root on other layers, with another id map or with another quota")]
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
    /// An image has a file whose owner the map does not have.
    #[error("{} belongs to id {id}, beyond the {} ids that the container has", path.display(), map.size)]
    IdBeyondMap {
        /// The file, within the image.
        path: PathBuf,
        /// Its user or group.
        id: u32,
        /// The container's ids.
        map: IdMap,
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
    /// The file system or pool is full.
    #[error("no space left: could not {doing} (free some, or remove images that are not needed)")]
    NoSpace {
        /// What was attempted.
        doing: String,
    },
    /// A quota of a container, a dataset or a project is used up.
    #[error("a quota is used up: could not {doing} (raise the quota or free some space below it)")]
    QuotaExceeded {
        /// What was attempted.
        doing: String,
    },
    /// The file system, dataset or pool is read-only.
    #[error("read-only: could not {doing} (see `zfs get readonly` or the mount options of the store)")]
    ReadOnly {
        /// What was attempted.
        doing: String,
    },
    /// A file of ours does not read as it should.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// A record in the store was written by a newer version.
    #[error(
        "{what} was written by a newer Moxlet (format {version}, this one knows {known}): upgrade this one"
    )]
    TooNew {
        /// The record.
        what: String,
        /// Its version.
        version: u32,
        /// The newest one that is known here.
        known: u32,
    },
    /// The file system cannot hold a store.
    #[error("{} lies on {filesystem}, which cannot hold container roots: {reason}. Put it on ext4, xfs, btrfs or tmpfs, \
             or use `storage = \"zfs\"`", path.display())]
    UnfitFileSystem {
        /// The store's directory.
        path: PathBuf,
        /// The file system's name.
        filesystem: String,
        /// What it lacks.
        reason: String,
    },
    /// A quota was asked for where none can be kept.
    #[error("{} lies on {filesystem} without project quota, so that a container's root cannot have a quota: mount ext4 \
             (made with `-O quota,project`) or xfs with `prjquota`, use `storage = \"zfs\"`, or ask for no quota",
            path.display())]
    NoProjectQuota {
        /// The store's directory.
        path: PathBuf,
        /// The file system's name.
        filesystem: String,
    },
    /// All project ids of the range are taken.
    #[error("all project ids of the store's range are taken on the file system of {}", .0.display())]
    NoProjectId(PathBuf),
    /// `zfs` or `zpool` is not installed.
    #[error("the program `{0}` is not installed (Debian: apt install zfsutils-linux)")]
    NoProgram(&'static str),
    /// A dataset's name that cannot hold a store.
    #[error("{name:?} cannot be the store's dataset: {reason}")]
    BadDataset {
        /// The name.
        name: String,
        /// Why.
        reason: &'static str,
    },
    /// No such pool or dataset.
    #[error("there is no such pool or dataset: {0} (`zpool import` lists pools that are not imported)")]
    NoSuchDataset(CommandFailure),
    /// There is a dataset, but no store on it.
    #[error("dataset {0} holds no store of Moxlet (`zfs get -r dev.moxlet:owner` tells what is ours)")]
    NoStore(String),
    /// A dataset of that name is there already.
    #[error("{0}")]
    DatasetExists(CommandFailure),
    /// A dataset is in use.
    #[error("{0} (`grep {dataset} /proc/*/mountinfo` tells who has it mounted)", dataset = .1)]
    DatasetBusy(CommandFailure, String),
    /// A dataset has snapshots, clones or children.
    #[error("{0}")]
    DatasetHasDependents(CommandFailure),
    /// A dataset or snapshot in the store's tree is not ours.
    #[error("{dataset} was not made by Moxlet and is in the way: {what} (rename or remove it)")]
    Foreign {
        /// Its name.
        dataset: String,
        /// What it hinders.
        what: &'static str,
    },
    /// The pool has stopped all input and output.
    #[error(
        "pool {pool} is suspended, since its devices do not answer: could not {doing} (see `zpool status {pool}`; \
         once they answer again, `zpool clear {pool}` lets it go on)"
    )]
    PoolSuspended {
        /// The pool.
        pool: String,
        /// What was attempted.
        doing: String,
    },
    /// The caller may not do this.
    #[error("{0}: permission denied (the agent runs as root; on a delegated dataset see `zfs allow`)")]
    NotPermitted(CommandFailure),
    /// A dataset's name is longer than ZFS takes.
    #[error("{0}: choose a shorter name for the store's dataset")]
    NameTooLong(CommandFailure),
    /// The key of an encrypted dataset is not loaded.
    #[error("{0}: load its key with `zfs load-key`")]
    KeyNotLoaded(CommandFailure),
    /// Another failure of `zfs` or `zpool`.
    #[error("{0}")]
    Zfs(CommandFailure),
    /// A program did not end in time.
    #[error(
        "`{command}` did not end within {seconds} s; is the pool suspended, or a device failing (`zpool status`)?"
    )]
    TimedOut {
        /// The command line.
        command: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A program wrote more than is believed.
    #[error("`{0}` wrote more than can be true")]
    TooMuchOutput(String),
    /// What a program printed is not what it should be.
    #[error("`{command}` printed something unexpected: {line:?}")]
    BadOutput {
        /// The command line.
        command: String,
        /// The line.
        line: String,
    },
    /// A worker of the runtime died.
    #[error("the storage worker was stopped")]
    Stopped,
}

impl Error {
    /// Whether a file system, pool or quota is full.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self, Self::NoSpace { .. } | Self::QuotaExceeded { .. })
    }
}

/// Adds what was attempted on what to a system error.
pub(crate) trait Attempt<T> {
    fn attempt(self, what: &'static str, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T, E: Into<io::Error>> Attempt<T> for std::result::Result<T, E> {
    fn attempt(self, what: &'static str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|e| {
            let (source, path): (io::Error, PathBuf) = (e.into(), path.into());
            let doing = || format!("{what} {}", path.display());
            match source.kind() {
                io::ErrorKind::StorageFull => Error::NoSpace { doing: doing() },
                io::ErrorKind::QuotaExceeded => Error::QuotaExceeded { doing: doing() },
                io::ErrorKind::ReadOnlyFilesystem => Error::ReadOnly { doing: doing() },
                _ => Error::Io { what, path, source },
            }
        })
    }
}
