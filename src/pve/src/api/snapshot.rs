//! The snapshots of a CT.

use serde::Deserialize;

use super::ct::Ct;
use crate::{Result, SnapshotName, Upid, http::Request, lenient};

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Snapshot {
    /// Its name; `current` is no snapshot but the CT as it is.
    pub name: String,
    /// For people.
    #[serde(default, deserialize_with = "lenient::string")]
    pub description: String,
    /// The one before it.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub parent: Option<String>,
    /// When it was made, in seconds since 1970.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub snaptime: Option<u64>,
}

impl Ct<'_> {
    /// The snapshots, without the entry for the CT as it is.
    ///
    /// # Errors
    /// As every call; wants VM.Audit on `/vms/VMID`.
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>> {
        let request = self.request("GET", "/nodes/{node}/lxc/{vmid}/snapshot");
        let mut all: Vec<Snapshot> = self.client().list(request, "the list of snapshots").await?;
        all.retain(|s| s.name != "current");
        Ok(all)
    }

    /// Takes a snapshot.
    ///
    /// # Errors
    /// As every call; wants VM.Snapshot on `/vms/VMID`.
    pub async fn create_snapshot(&self, name: &SnapshotName, description: Option<&str>) -> Result<Upid> {
        let request: Request = self.request("POST", "/nodes/{node}/lxc/{vmid}/snapshot");
        self.client().task(request.with("snapname", name).maybe("description", description)).await
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// As every call; wants VM.Snapshot on `/vms/VMID`.
    pub async fn delete_snapshot(&self, name: &SnapshotName) -> Result<Upid> {
        let request =
            self.request("DELETE", "/nodes/{node}/lxc/{vmid}/snapshot/{snapname}").at("snapname", name);
        self.client().task(request).await
    }
}
