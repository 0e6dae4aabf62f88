//! Pools: groups of guests and storages that share permissions.

use moxlet_ids::Vmid;
use serde::Deserialize;

use crate::{Client, NodeName, PoolId, Result, StorageId, http::Request, lenient};

/// A pool.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Pool {
    /// Its id.
    pub poolid: PoolId,
    /// For people.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub comment: Option<String>,
    /// What is in it; where one pool is asked for.
    #[serde(default, deserialize_with = "lenient::list")]
    pub members: Vec<PoolMember>,
}

/// What is in a pool.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct PoolMember {
    /// Its id, such as `lxc/101`.
    pub id: String,
    /// `lxc`, `qemu` or `storage`.
    #[serde(rename = "type", default, deserialize_with = "lenient::string")]
    pub kind: String,
    /// The node that it is on.
    #[serde(default, deserialize_with = "lenient::opt_parsed")]
    pub node: Option<NodeName>,
    /// A guest's number.
    #[serde(default)]
    pub vmid: Option<Vmid>,
    /// A storage's id.
    #[serde(default, deserialize_with = "lenient::opt_parsed")]
    pub storage: Option<StorageId>,
}

impl Client {
    /// The pools, without their members.
    ///
    /// # Errors
    /// As every call. Those without Pool.Audit are left out.
    pub async fn pools(&self) -> Result<Vec<Pool>> {
        self.list(Request::new("GET", "/pools"), "the list of pools").await
    }

    /// A pool with its members.
    ///
    /// # Errors
    /// As every call; wants Pool.Audit on `/pool/POOL`.
    pub async fn pool(&self, pool: &PoolId) -> Result<Option<Pool>> {
        let request = Request::new("GET", "/pools").with("poolid", pool);
        Ok(self.list(request, "the list of one pool").await?.into_iter().next())
    }

    /// Makes a pool. It takes the cluster-wide lock of the user database: not one a guest.
    ///
    /// # Errors
    /// As every call; wants Pool.Allocate on `/pool/POOL`.
    pub async fn create_pool(&self, pool: &PoolId, comment: Option<&str>) -> Result<()> {
        let request = Request::new("POST", "/pools").with("poolid", pool).maybe("comment", comment);
        self.done(request).await
    }

    /// Puts a guest into a pool; one that is in it already stays. It takes the cluster-wide lock of the user database.
    ///
    /// # Errors
    /// As every call; wants Pool.Allocate on `/pool/POOL` and VM.Allocate on the guest. A guest that is in another pool stays there.
    pub async fn add_to_pool(&self, pool: &PoolId, vmid: Vmid) -> Result<()> {
        self.done(Request::new("PUT", "/pools").with("poolid", pool).with("vms", vmid)).await
    }

    /// Removes an empty pool.
    ///
    /// # Errors
    /// As every call; wants Pool.Allocate on `/pool/POOL`.
    pub async fn delete_pool(&self, pool: &PoolId) -> Result<()> {
        self.done(Request::new("DELETE", "/pools").with("poolid", pool)).await
    }
}
