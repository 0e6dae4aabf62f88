//! Storages and what is on them.

use moxlet_ids::Vmid;
use serde::Deserialize;

use crate::{Client, NodeName, Result, StorageId, Upid, VolumeId, http::Request, lenient};

/// A storage as a node has it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct StorageStatus {
    /// Its id; in the list alone.
    #[serde(default)]
    pub storage: Option<StorageId>,
    /// Its kind, such as `zfspool`.
    #[serde(rename = "type", default, deserialize_with = "lenient::string")]
    pub kind: String,
    /// What it may hold, parted by commas.
    #[serde(default, deserialize_with = "lenient::string")]
    pub content: String,
    /// Whether it is there.
    #[serde(default, deserialize_with = "lenient::bool")]
    pub active: bool,
    /// Whether it is meant to be used.
    #[serde(default, deserialize_with = "lenient::bool")]
    pub enabled: bool,
    /// Whether it is the same on all nodes.
    #[serde(default, deserialize_with = "lenient::bool")]
    pub shared: bool,
    /// Bytes in all.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub total: Option<u64>,
    /// Bytes used.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub used: Option<u64>,
    /// Bytes to be had.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub avail: Option<u64>,
}

impl StorageStatus {
    /// Whether it may hold something, such as `rootdir`.
    #[must_use]
    pub fn holds(&self, content: &str) -> bool {
        self.content.split(',').any(|c| c.trim() == content)
    }
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct StorageVolume {
    /// Its id.
    pub volid: VolumeId,
    /// `subvol`, `raw`, `tgz`, ….
    #[serde(default, deserialize_with = "lenient::string")]
    pub format: String,
    /// The guest that it belongs to, by its name alone.
    #[serde(default)]
    pub vmid: Option<Vmid>,
    /// Its size in bytes.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub size: Option<u64>,
    /// Bytes used.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub used: Option<u64>,
    /// The volume that it is a clone of.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub parent: Option<String>,
    /// When it was made, in seconds since 1970.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub ctime: Option<u64>,
}

impl Client {
    /// The storages of a node, or those that may hold something.
    ///
    /// # Errors
    /// As every call. Those that we may neither see nor use are left out.
    pub async fn storages(&self, node: &NodeName, content: Option<&str>) -> Result<Vec<StorageStatus>> {
        let request = Request::new("GET", "/nodes/{node}/storage").at("node", node).maybe("content", content);
        self.list(request, "the list of storages").await
    }

    /// A storage of a node.
    ///
    /// # Errors
    /// As every call; wants Datastore.Audit or Datastore.AllocateSpace on `/storage/STORAGE`.
    pub async fn storage_status(&self, node: &NodeName, storage: &StorageId) -> Result<StorageStatus> {
        let request = Request::new("GET", "/nodes/{node}/storage/{storage}/status");
        self.get(request.at("node", node).at("storage", storage), "a storage's status").await
    }

    /// What is on a storage: all of it, or one kind, or a guest's.
    ///
    /// # Errors
    /// As every call; wants Datastore.Audit or Datastore.AllocateSpace on `/storage/STORAGE`.
    pub async fn storage_content(
        &self,
        node: &NodeName,
        storage: &StorageId,
        content: Option<&str>,
        vmid: Option<Vmid>,
    ) -> Result<Vec<StorageVolume>> {
        let request = Request::new("GET", "/nodes/{node}/storage/{storage}/content")
            .at("node", node)
            .at("storage", storage)
            .maybe("content", content)
            .maybe("vmid", vmid);
        self.list(request, "the list of volumes").await
    }

    /// Removes a volume.
    ///
    /// # Errors
    /// As every call; wants Datastore.Allocate on `/storage/STORAGE`, or for a guest's own volume its VM.Config.Disk.
    pub async fn delete_volume(&self, node: &NodeName, volume: &VolumeId) -> Result<Option<Upid>> {
        let request = Request::new("DELETE", "/nodes/{node}/storage/{storage}/content/{volume}")
            .at("node", node)
            .at("storage", volume.storage())
            .at("volume", volume);
        self.scalar(request, "the id of a task, or nothing").await
    }
}
