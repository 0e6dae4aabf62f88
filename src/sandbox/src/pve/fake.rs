//! Volumes and processes as a simulator without LXC keeps them, for tests: a volume is a file with its size in it, a CT runs
//! when a file says so.

use std::{
    fs,
    io::ErrorKind,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use moxlet_ids::SandboxId;
use moxlet_pve::NodeName;

use super::{Inits, VolumeOwner, Volumes};
use crate::{Error, IdMap, Result, cgroup::Numbers, error::io, process::read_bounded};

/// A file of this name among the owners: the storage has no room for a new volume.
pub const FULL: &str = ".full";

/// Volumes as files.
#[derive(Debug)]
pub struct FileVolumes {
    dir: PathBuf,
    owners: PathBuf,
}

impl FileVolumes {
    /// Volumes in this directory; whose they are is kept in the other.
    ///
    /// # Errors
    /// They cannot be made.
    pub fn open(dir: &Path, owners: &Path) -> Result<Self> {
        for dir in [dir, owners] {
            fs::create_dir_all(dir).map_err(io("create", dir))?;
        }
        Ok(Self { dir: dir.to_owned(), owners: owners.to_owned() })
    }
}

#[async_trait]
impl Volumes for FileVolumes {
    async fn create(&self, name: &str, bytes: u64, owner: &SandboxId, _map: IdMap) -> Result<()> {
        match self.owner(name).await? {
            VolumeOwner::Other => return Err(Error::VolumeTaken(name.to_owned())),
            VolumeOwner::Sandbox(id) if id != *owner => return Err(Error::VolumeTaken(name.to_owned())),
            _ => {}
        }
        if self.owners.join(FULL).exists() {
            return Err(Error::Zfs {
                command: format!("zfs create {name}"),
                stderr: format!("cannot create '{name}': out of space"),
            });
        }
        // At once or not at all, as a property of a dataset.
        let (draft, path) = (self.owners.with_file_name(format!(".owner-{name}")), self.owners.join(name));
        let write = || fs::write(&draft, owner.as_str()).and_then(|()| fs::rename(&draft, &path));
        write().map_err(io("write", &path))?;
        let path = self.dir.join(name);
        fs::write(&path, bytes.to_string()).map_err(io("write", path))
    }

    async fn owner(&self, name: &str) -> Result<VolumeOwner> {
        if !self.dir.join(name).exists() {
            return Ok(VolumeOwner::Nobody);
        }
        let owner = read_bounded(&self.owners.join(name), 128).unwrap_or_default();
        Ok(owner.parse().map_or(VolumeOwner::Other, VolumeOwner::Sandbox))
    }

    async fn destroy(&self, name: &str, owner: &SandboxId) -> Result<()> {
        let ours = self.owner(name).await? == VolumeOwner::Sandbox(owner.clone());
        let noted = read_bounded(&self.owners.join(name), 128).is_ok_and(|id| id == owner.as_str());
        for (path, remove) in [(self.dir.join(name), ours), (self.owners.join(name), ours || noted)] {
            if remove
                && let Err(e) = fs::remove_file(&path)
                && e.kind() != ErrorKind::NotFound
            {
                return Err(io("remove", path)(e));
            }
        }
        Ok(())
    }
}

/// Processes by the simulator's files `<node>-<vmid>.json`.
#[derive(Debug)]
pub struct FileInits {
    dir: PathBuf,
    node: NodeName,
    numbers: Numbers,
}

impl FileInits {
    /// CTs of this node whose files are in this directory.
    #[must_use]
    pub fn new(dir: &Path, node: NodeName, numbers: Numbers) -> Self {
        Self { dir: dir.to_owned(), node, numbers }
    }

    fn run(&self, id: &SandboxId) -> Option<serde_json::Value> {
        let path = self.dir.join(format!("{}-{}.json", self.node, self.numbers.get(id)?));
        serde_json::from_str(&read_bounded(&path, 4096).ok()?).ok()
    }
}

#[async_trait]
impl Inits for FileInits {
    fn init(&self, id: &SandboxId) -> Option<u32> {
        u32::try_from(self.run(id)?["pid"].as_u64()?).ok()
    }

    fn has_begun(&self, _pid: u32) -> bool {
        true
    }

    fn is_frozen(&self, id: &SandboxId) -> bool {
        self.run(id).is_some_and(|run| run["frozen"].as_bool() == Some(true))
    }

    async fn ended(&self, id: &SandboxId) -> Result<()> {
        while self.init(id).is_some() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    fn addresses(&self, _pid: u32) -> Vec<IpAddr> {
        vec![IpAddr::from([192, 0, 2, 7])]
    }
}
