//! The crate's error: one variant an operation, saying what was attempted on what.

use std::{io, path::PathBuf};

use moxlet_ids::Vmid;

/// Result with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with a CT.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No CT of this id.
    #[error("there is no CT {0}")]
    NotFound(String),
    /// A CT of this id exists already.
    #[error("CT {0} exists already")]
    Exists(String),
    /// A value that must not get into the CT's configuration, or cannot work.
    #[error("{what} {value:?} cannot be used: {reason}")]
    Invalid {
        /// Which value.
        what: String,
        /// The value, cut.
        value: String,
        /// Why not.
        reason: String,
    },
    /// All VMIDs of the range are taken.
    #[error("all VMIDs from {first} to {last} are taken: delete guests, or widen vmid_min and vmid_max")]
    NoVmid {
        /// The first of the range.
        first: Vmid,
        /// The last.
        last: Vmid,
    },
    /// What should be ours is somebody else's, or not as we left it; nothing of it is touched.
    #[error("CT {vmid} is not Moxlet's: {reason}; it is left as it is")]
    Foreign {
        /// Its number.
        vmid: Vmid,
        /// What differs.
        reason: String,
    },
    /// A CT has an address by its configuration that a pod was to get.
    #[error("the address {address} is in the configuration of CT {vmid}; the next try is with another")]
    AddressTaken {
        /// Which address.
        address: std::net::IpAddr,
        /// Whose it is.
        vmid: Vmid,
    },
    /// Somebody works on the CT.
    #[error("CT {vmid} is locked ({lock}); it is left alone until that is over")]
    Locked {
        /// Its number.
        vmid: Vmid,
        /// By what: `backup`, `migrate`, `snapshot`, …, or `frozen`.
        lock: String,
    },
    /// A lock could not be had in time.
    #[error("CT {vmid} is busy: {what}")]
    Busy {
        /// Its number.
        vmid: Vmid,
        /// Who or what.
        what: String,
    },
    /// The CT is on another host now.
    #[error("CT {vmid} is on host {node} now; only an agent there could do anything about it")]
    Moved {
        /// Its number.
        vmid: Vmid,
        /// Where.
        node: String,
    },
    /// The cluster's file system takes no changes.
    #[error("could not write {}: the cluster has no quorum", path.display())]
    NoQuorum {
        /// Which file.
        path: PathBuf,
    },
    /// The cluster's file system is not there, so that nothing can be told of what is in it.
    #[error("{} is not there: the cluster's file system is not mounted; is the service pve-cluster up?", path.display())]
    NoClusterFs {
        /// What is missing of it.
        path: PathBuf,
    },
    /// A CT's configuration cannot be read or written.
    #[error("the configuration {} cannot be used", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: moxlet_pve::config::InvalidConfig,
    },
    /// A call to Proxmox VE failed.
    #[error("could not {what} CT {vmid}")]
    Pve {
        /// What was attempted, a verb.
        what: &'static str,
        /// Which CT.
        vmid: Vmid,
        /// Why not.
        source: Box<moxlet_pve::Error>,
    },
    /// A dataset of the name is there and is not ours.
    #[error("the dataset {0} exists and is not Moxlet's")]
    VolumeTaken(String),
    /// The `zfs` program failed.
    #[error("`{command}` failed: {stderr}")]
    Zfs {
        /// What was run.
        command: String,
        /// What it said.
        stderr: String,
    },
    /// The host lacks something; the text says what to do.
    #[error("this host cannot run CTs: {0}")]
    Host(String),
    /// A file operation failed.
    #[error("could not {what} {}", path.display())]
    Io {
        /// What was attempted, a verb.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The dataset of a CT's root could not be mounted.
    #[error("the root of a CT could not be mounted: {0}")]
    Mount(#[from] moxlet_storage::Error),
    /// A host tool could not be run at all.
    #[error("could not run {program}: is the package {package} installed?")]
    Spawn {
        /// The tool.
        program: String,
        /// What brings it.
        package: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A host tool failed.
    #[error("{program} of CT {ct} failed ({status}): {tail}")]
    Tool {
        /// The tool.
        program: String,
        /// The CT.
        ct: String,
        /// How it ended.
        status: String,
        /// The end of what it wrote.
        tail: String,
    },
    /// Something took too long.
    #[error("{what} of CT {ct} took longer than {seconds} s{tail}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// The CT.
        ct: String,
        /// How long.
        seconds: u64,
        /// `: ` and the end of what was written, or nothing.
        tail: String,
    },
    /// A limit or a figure of a cgroup could not be written or read.
    #[error("could not {what} the cgroup file {}", path.display())]
    Cgroup {
        /// What was attempted.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The cgroup does not exist (any more).
    #[error("there is no cgroup {}", .0.display())]
    NoCgroup(PathBuf),
}

impl Error {
    /// Whether the same may well succeed later without anybody changing anything.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Locked { .. }
            | Self::AddressTaken { .. }
            | Self::Busy { .. }
            | Self::NoQuorum { .. }
            | Self::NoClusterFs { .. } => true,
            Self::Pve { source, .. } => source.is_temporary(),
            _ => false,
        }
    }
}

pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io { what, path, source }
}
