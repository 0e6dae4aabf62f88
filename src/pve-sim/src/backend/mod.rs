//! What a CT is: the contract of the back ends.
//!
//! [`records::Records`] keeps states on disk and runs nothing; [`lxc::Lxc`] runs real containers on ZFS volumes.

pub(crate) mod lxc;
pub(crate) mod records;
mod tool;

use std::{
    fmt::Debug,
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{
    Result,
    config::Storage,
    guest::{CtConf, backup::Compression},
    tasks::TaskLog,
};

/// Whether a CT runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RunState {
    Stopped,
    Running {
        /// Of its init on the host.
        pid: u32,
        /// Seconds since 1970.
        since: i64,
        /// Frozen by a suspend.
        frozen: bool,
    },
}

impl RunState {
    pub(crate) fn is_running(self) -> bool {
        matches!(self, Self::Running { .. })
    }
}

/// One CT.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ct<'a> {
    pub(crate) node: &'a str,
    pub(crate) vmid: u32,
    pub(crate) conf: &'a CtConf,
}

/// Something that is mounted in a CT before its init runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Mount {
    pub(crate) source: MountSource,
    /// Below the CT's root; empty: it is the root.
    pub(crate) target: String,
    pub(crate) read_only: bool,
    /// Ids on disk are ids in the CT.
    pub(crate) passthrough: bool,
}

/// What is mounted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum MountSource {
    /// A volume of a zfspool: made sure that it is mounted, then the directory where the storage has its volumes is bound.
    /// Where else it may be mounted is not looked at.
    Subvolume { dataset: String, path: String },
    /// A directory of the host.
    Dir(String),
}

/// A network interface of a running CT.
#[derive(Debug, Clone)]
pub(crate) struct Interface {
    pub(crate) name: String,
    pub(crate) mac: String,
    /// With prefix length.
    pub(crate) addresses: Vec<(std::net::IpAddr, u8)>,
}

/// What a CT uses now.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Usage {
    /// Share of one CPU.
    pub(crate) cpu: f64,
    pub(crate) memory: u64,
    pub(crate) swap: u64,
    pub(crate) disk: u64,
    pub(crate) net_in: u64,
    pub(crate) net_out: u64,
}

/// A volume of a storage.
#[derive(Debug, Clone)]
pub(crate) struct VolumeInfo {
    pub(crate) name: String,
    pub(crate) content: &'static str,
    pub(crate) format: &'static str,
    pub(crate) size: u64,
    pub(crate) used: u64,
    pub(crate) vmid: Option<u32>,
}

/// Bytes of a storage.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    pub(crate) total: u64,
    pub(crate) used: u64,
}

/// A volume that is in a backup.
#[derive(Debug, Clone)]
pub(crate) struct BackedUp {
    pub(crate) storage: Storage,
    pub(crate) volume: String,
    /// Where it is in the CT: `/` is the root.
    pub(crate) target: String,
}

/// What goes into a backup's archive, and where that is written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Backup<'a> {
    /// The root first.
    pub(crate) volumes: &'a [BackedUp],
    /// The snapshot that is read; none: the volumes as they are.
    pub(crate) snapshot: Option<&'a str>,
    /// Below it lie the files of `etc/vzdump`.
    pub(crate) meta: &'a Path,
    /// Names with wildcards that are left out, from the CT's root on.
    pub(crate) excluded: &'a [&'a str],
    pub(crate) unprivileged: bool,
    pub(crate) compression: Compression,
    pub(crate) file: &'a Path,
}

/// How a CT is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Killed.
    Kill,
    /// Asked by its halt signal.
    Shutdown {
        seconds: u64,
        /// Killed when it has not ended by then.
        then_kill: bool,
    },
}

/// Runs CTs and holds their volumes. Everything can be called again after a crash.
#[async_trait]
pub(crate) trait Backend: Debug + Send + Sync {
    async fn state(&self, node: &str, vmid: u32) -> Result<RunState>;
    /// Starts a CT with the config that is in force.
    async fn start(&self, ct: Ct<'_>, mounts: &[Mount], log: &TaskLog) -> Result<()>;
    /// Stops a CT; of a stopped one: nothing.
    async fn stop(&self, node: &str, vmid: u32, how: Stop, log: &TaskLog) -> Result<()>;
    /// Freezes or thaws.
    async fn freeze(&self, node: &str, vmid: u32, frozen: bool) -> Result<()>;
    /// Applies changed limits to a running CT.
    async fn reconfigure(&self, ct: Ct<'_>) -> Result<()>;
    /// Interfaces of a running CT.
    async fn interfaces(&self, ct: Ct<'_>) -> Result<Vec<Interface>>;
    /// What a running CT uses.
    async fn usage(&self, ct: Ct<'_>) -> Result<Usage>;
    /// Removes what a stopped CT has beside its volumes and config.
    async fn forget(&self, node: &str, vmid: u32) -> Result<()>;

    /// Volumes of a storage.
    async fn volumes(&self, node: &str, storage: &Storage) -> Result<Vec<VolumeInfo>>;
    /// Makes a CT's volume (`subvol-<vmid>-disk-N`) of so many bytes and returns its name.
    async fn create_volume(&self, node: &str, storage: &Storage, vmid: u32, size: u64) -> Result<String>;
    /// Copies a volume for another CT and returns the copy's name.
    async fn copy_volume(
        &self,
        node: &str,
        storage: &Storage,
        volume: &str,
        vmid: u32,
        size: u64,
    ) -> Result<String>;
    /// Fills a volume from a template.
    async fn unpack(
        &self,
        node: &str,
        storage: &Storage,
        volume: &str,
        archive: &Path,
        unprivileged: bool,
        log: &TaskLog,
    ) -> Result<()>;
    /// The directory of a storage's backups.
    fn dump_dir(&self, node: &str, storage: &Storage) -> Result<PathBuf>;
    /// Writes a backup's archive.
    async fn back_up(&self, backup: Backup<'_>) -> Result<()>;
    /// Snapshots a volume.
    async fn snapshot_volume(&self, node: &str, storage: &Storage, volume: &str, name: &str) -> Result<()>;
    /// Removes a snapshot of a volume; one that is gone: nothing.
    async fn delete_snapshot(&self, node: &str, storage: &Storage, volume: &str, name: &str) -> Result<()>;
    /// Removes a volume with all below it; one that is gone: nothing.
    async fn destroy_volume(&self, node: &str, storage: &Storage, volume: &str) -> Result<()>;
    /// A storage's room.
    async fn room(&self, node: &str, storage: &Storage) -> Result<Room>;
}
