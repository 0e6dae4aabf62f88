//! Nodes: the hosts of the cluster.

use serde::Deserialize;

use crate::{Client, Fingerprint, NodeName, Result, http::Request, lenient};

/// An entry of the list of nodes.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct NodeEntry {
    /// Its name.
    pub node: NodeName,
    /// `online`, `offline` or `unknown`.
    #[serde(default, deserialize_with = "lenient::string")]
    pub status: String,
    /// CPU use, 1 for all.
    #[serde(default, deserialize_with = "lenient::opt_f64")]
    pub cpu: Option<f64>,
    /// CPUs.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub maxcpu: Option<u64>,
    /// Memory used, in bytes.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub mem: Option<u64>,
    /// Memory, in bytes.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub maxmem: Option<u64>,
    /// Seconds since it started.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub uptime: Option<u64>,
    /// Its certificate.
    #[serde(default, deserialize_with = "lenient::readable")]
    pub ssl_fingerprint: Option<Fingerprint>,
}

impl NodeEntry {
    /// Whether it is there, as the node that answered sees it.
    #[must_use]
    pub fn is_online(&self) -> bool {
        self.status == "online"
    }
}

/// Used and there, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct Usage {
    /// All of it.
    #[serde(deserialize_with = "lenient::u64")]
    pub total: u64,
    /// In use.
    #[serde(deserialize_with = "lenient::u64")]
    pub used: u64,
    /// Not in use.
    #[serde(deserialize_with = "lenient::u64")]
    pub free: u64,
    /// Of memory: free, with what caches would give back.
    #[serde(deserialize_with = "lenient::opt_u64")]
    pub available: Option<u64>,
    /// Of disks: free, without what is reserved.
    #[serde(deserialize_with = "lenient::opt_u64")]
    pub avail: Option<u64>,
}

/// The processors.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct CpuInfo {
    /// Hardware threads.
    #[serde(deserialize_with = "lenient::u64")]
    pub cpus: u64,
    /// Cores in a socket.
    #[serde(deserialize_with = "lenient::u64")]
    pub cores: u64,
    /// Sockets.
    #[serde(deserialize_with = "lenient::u64")]
    pub sockets: u64,
    /// The model.
    #[serde(deserialize_with = "lenient::string")]
    pub model: String,
}

/// The kernel, as uname has it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct Kernel {
    /// `x86_64`, ….
    #[serde(deserialize_with = "lenient::string")]
    pub machine: String,
    /// `6.17.2-1-pve`, ….
    #[serde(deserialize_with = "lenient::string")]
    pub release: String,
    /// `Linux`.
    #[serde(deserialize_with = "lenient::string")]
    pub sysname: String,
    /// When it was built.
    #[serde(deserialize_with = "lenient::string")]
    pub version: String,
}

/// How a node does.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NodeStatus {
    /// CPU use, 1 for all.
    #[serde(default, deserialize_with = "lenient::opt_f64")]
    pub cpu: Option<f64>,
    /// The processors.
    #[serde(default)]
    pub cpuinfo: CpuInfo,
    /// The kernel.
    #[serde(default)]
    pub current_kernel: Kernel,
    /// Over one, five and fifteen minutes.
    #[serde(default, deserialize_with = "lenient::list")]
    pub loadavg: Vec<serde_json::Value>,
    /// Memory.
    #[serde(default)]
    pub memory: Usage,
    /// Swap.
    #[serde(default)]
    pub swap: Usage,
    /// The root file system.
    #[serde(default)]
    pub rootfs: Usage,
    /// Such as `pve-manager/9.2.11/…`.
    #[serde(default, deserialize_with = "lenient::string")]
    pub pveversion: String,
    /// Seconds since it started.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub uptime: Option<u64>,
}

impl Client {
    /// The nodes.
    ///
    /// # Errors
    /// As every call; figures only with Sys.Audit.
    pub async fn nodes(&self) -> Result<Vec<NodeEntry>> {
        self.list(Request::new("GET", "/nodes"), "the list of nodes").await
    }

    /// How a node does.
    ///
    /// # Errors
    /// As every call; wants Sys.Audit on `/nodes/NODE`.
    pub async fn node_status(&self, node: &NodeName) -> Result<NodeStatus> {
        let request = Request::new("GET", "/nodes/{node}/status").at("node", node);
        self.get(request, "a node's status").await
    }
}
