//! The cluster as a whole: version, members and quorum, resources, options, free VMIDs, log.

use std::net::IpAddr;

use moxlet_ids::Vmid;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    Client, Error, NEWEST_MAJOR, NodeName, OLDEST, PoolId, Result, StorageId, Tag, Upid, Version,
    http::Request, lenient,
};

/// What `/version` answers.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct VersionInfo {
    /// The version of pve-manager.
    pub version: Version,
    /// The release, such as `9.2`.
    #[serde(default, deserialize_with = "lenient::string")]
    pub release: String,
    /// The commit that it was built from.
    #[serde(default, deserialize_with = "lenient::string")]
    pub repoid: String,
}

/// An entry of `/cluster/status`: the cluster itself, or a member.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Member {
    /// The cluster. A node without a cluster has no such entry.
    Cluster {
        /// Its name.
        name: String,
        /// How many nodes it has.
        #[serde(default, deserialize_with = "lenient::u64")]
        nodes: u64,
        /// Whether the node that answered is in the part that has quorum.
        #[serde(default, deserialize_with = "lenient::bool")]
        quorate: bool,
        /// The version of the membership's configuration.
        #[serde(default, deserialize_with = "lenient::opt_u64")]
        version: Option<u64>,
    },
    /// A node.
    Node {
        /// Its name.
        name: NodeName,
        /// Its number.
        #[serde(default, deserialize_with = "lenient::opt_u64")]
        nodeid: Option<u64>,
        /// Its address in the cluster network.
        #[serde(default, deserialize_with = "lenient::readable")]
        ip: Option<IpAddr>,
        /// Whether it is the one that answered.
        #[serde(default, deserialize_with = "lenient::bool")]
        local: bool,
        /// Whether the one that answered sees it.
        #[serde(default, deserialize_with = "lenient::bool")]
        online: bool,
    },
}

/// What kinds of resources to list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResourceKind {
    /// Guests: CTs and virtual machines.
    Guests,
    /// Storages.
    Storages,
    /// Nodes.
    Nodes,
    /// Software-defined networks.
    Sdn,
}

/// An entry of `/cluster/resources`. It is up to ten seconds old; a guest that is younger is `unknown` and has no name.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Resource {
    /// Its id, such as `lxc/101`.
    pub id: String,
    /// What it is: `node`, `storage`, `pool`, `lxc`, `qemu`, `sdn`, `network`.
    #[serde(rename = "type")]
    pub kind: String,
    /// A guest's number.
    #[serde(default)]
    pub vmid: Option<Vmid>,
    /// The node that it is on.
    #[serde(default, deserialize_with = "lenient::opt_parsed")]
    pub node: Option<NodeName>,
    /// A guest's name.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub name: Option<String>,
    /// `running`, `stopped`, `unknown`; a node is `online` or `offline`, a storage `available`.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub status: Option<String>,
    /// Who works on a guest.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub lock: Option<String>,
    /// A guest's pool.
    #[serde(default, deserialize_with = "lenient::opt_parsed")]
    pub pool: Option<PoolId>,
    /// A storage's id.
    #[serde(default, deserialize_with = "lenient::opt_parsed")]
    pub storage: Option<StorageId>,
    /// A storage's kind, such as `zfspool`.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub plugintype: Option<String>,
    /// What a storage may hold, parted by commas.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub content: Option<String>,
    /// Whether a storage is the same on all nodes.
    #[serde(default, deserialize_with = "lenient::bool")]
    pub shared: bool,
    /// Whether a guest is a template.
    #[serde(default, deserialize_with = "lenient::bool")]
    pub template: bool,
    /// A guest's tags, parted by semicolons; see [`Resource::tags`].
    #[serde(default, rename = "tags", deserialize_with = "lenient::string")]
    pub tags_text: String,
    /// What HA makes of a guest.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub hastate: Option<String>,
    /// CPU use, 1 for all of `maxcpu`.
    #[serde(default, deserialize_with = "lenient::opt_f64")]
    pub cpu: Option<f64>,
    /// CPUs.
    #[serde(default, deserialize_with = "lenient::opt_f64")]
    pub maxcpu: Option<f64>,
    /// Memory used, in bytes.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub mem: Option<u64>,
    /// Memory, in bytes.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub maxmem: Option<u64>,
    /// Disk used, in bytes.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub disk: Option<u64>,
    /// Disk, in bytes.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub maxdisk: Option<u64>,
    /// Seconds since it started.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub uptime: Option<u64>,
}

impl Resource {
    /// The tags, without those that are none.
    #[must_use]
    pub fn tags(&self) -> Vec<Tag> {
        let parts = self.tags_text.split([';', ',', ' ']).filter(|t| !t.is_empty());
        parts.filter_map(|t| t.parse().ok()).collect()
    }
}

/// The datacenter's options (`/etc/pve/datacenter.cfg`).
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Options {
    /// The range that free VMIDs are looked for in: `lower=…,upper=…`, or an object.
    #[serde(default, rename = "next-id")]
    next_id: Value,
    /// All of them, as they come.
    #[serde(flatten)]
    pub all: Map<String, Value>,
}

impl Options {
    /// The range in which [`Client::next_id`] looks: from the first up to, but without, the second.
    #[must_use]
    pub fn next_id_range(&self) -> (u32, u32) {
        let field = |name: &str| {
            let own = &self.next_id[name];
            let in_text = || {
                let text = self.next_id.as_str()?;
                text.split(',').find_map(|p| p.trim().strip_prefix(name)?.strip_prefix('=')?.parse().ok())
            };
            let number = own.as_u64().and_then(|n| u32::try_from(n).ok());
            number.or_else(|| own.as_str()?.parse().ok()).or_else(in_text)
        };
        (field("lower").unwrap_or(100), field("upper").unwrap_or(1_000_000))
    }
}

/// A line of the cluster's log.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct LogLine {
    /// When, in seconds since 1970.
    #[serde(default, deserialize_with = "lenient::u64")]
    pub time: u64,
    /// The node that wrote it.
    #[serde(default, deserialize_with = "lenient::string")]
    pub node: String,
    /// The program.
    #[serde(default, deserialize_with = "lenient::string")]
    pub tag: String,
    /// On whose behalf.
    #[serde(default, deserialize_with = "lenient::string")]
    pub user: String,
    /// The message.
    #[serde(default, deserialize_with = "lenient::string")]
    pub msg: String,
}

/// An entry of `/cluster/tasks`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ClusterTask {
    /// The task.
    pub upid: Upid,
    /// How it ended; none while it runs.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub status: Option<String>,
    /// When it ended, in seconds since 1970.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub endtime: Option<u64>,
}

impl Client {
    /// The server's version.
    ///
    /// # Errors
    /// As every call.
    pub async fn version(&self) -> Result<VersionInfo> {
        self.get(Request::new("GET", "/version"), "a version").await
    }

    /// Whether we can work with the server. A newer major version than we know is logged as a warning.
    ///
    /// # Errors
    /// [`Error::TooOld`], or as every call.
    pub async fn check_version(&self) -> Result<VersionInfo> {
        let info = self.version().await?;
        if info.version < OLDEST {
            return Err(Error::TooOld { found: info.version, needed: OLDEST });
        }
        if info.version.major > NEWEST_MAJOR {
            tracing::warn!(version = %info.version, known = NEWEST_MAJOR, "Proxmox VE is newer than what this was written against");
        }
        Ok(info)
    }

    /// The cluster and its nodes, as the node that answers sees them. This, not HA's state, tells whether a host is there.
    ///
    /// # Errors
    /// As every call; wants Sys.Audit on `/`.
    pub async fn cluster_status(&self) -> Result<Vec<Member>> {
        self.list(Request::new("GET", "/cluster/status"), "the list of cluster members").await
    }

    /// All resources that we may see, or those of one kind. One call for the whole cluster.
    ///
    /// # Errors
    /// As every call.
    pub async fn resources(&self, kind: Option<ResourceKind>) -> Result<Vec<Resource>> {
        let kind = kind.map(|k| match k {
            ResourceKind::Guests => "vm",
            ResourceKind::Storages => "storage",
            ResourceKind::Nodes => "node",
            ResourceKind::Sdn => "sdn",
        });
        self.list(Request::new("GET", "/cluster/resources").maybe("type", kind), "the list of resources")
            .await
    }

    /// A VMID that is free now; it is not reserved.
    ///
    /// # Errors
    /// As every call.
    pub async fn next_id(&self) -> Result<Vmid> {
        self.scalar(Request::new("GET", "/cluster/nextid"), "a free VMID").await
    }

    /// Whether a VMID is free now; it is not reserved.
    ///
    /// # Errors
    /// As every call, but that it is taken is none.
    pub async fn is_free(&self, vmid: Vmid) -> Result<bool> {
        let request = Request::new("GET", "/cluster/nextid").with("vmid", vmid);
        match self.scalar::<Vmid>(request, "the VMID asked for").await {
            Ok(_) => Ok(true),
            Err(Error::AlreadyExists { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Tasks of the whole cluster, the latest first: ours, or with Sys.Audit all.
    ///
    /// # Errors
    /// As every call.
    pub async fn cluster_tasks(&self) -> Result<Vec<ClusterTask>> {
        self.list(Request::new("GET", "/cluster/tasks"), "the list of tasks").await
    }

    /// The datacenter's options.
    ///
    /// # Errors
    /// As every call; without Sys.Audit on `/` some are left out.
    pub async fn options(&self) -> Result<Options> {
        self.get(Request::new("GET", "/cluster/options"), "the datacenter's options").await
    }

    /// The latest lines of the cluster's log, at most 1000.
    ///
    /// # Errors
    /// As every call; without Sys.Syslog on `/` only lines of our own.
    pub async fn cluster_log(&self, max: u16) -> Result<Vec<LogLine>> {
        let request = Request::new("GET", "/cluster/log").with("max", max.clamp(1, 1000));
        self.list(request, "the lines of the log").await
    }
}
