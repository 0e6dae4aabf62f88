//! Attaching a pod by CNI plugins (signatures; the bodies follow).

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use moxlet_ids::SandboxId;

use crate::{Attachment, Result};

/// Where plugins, configuration and memory lie, and what our own network is like.
#[derive(Debug, Clone)]
pub struct CniConfig {
    /// Where conflists are; the first by name is used. Ours is written here where `write_default` is set.
    pub conf_dir: PathBuf,
    /// Where plugins are, in the order of search.
    pub bin_dirs: Vec<PathBuf>,
    /// Where results are remembered for DEL.
    pub cache_dir: PathBuf,
    /// host-local's `dataDir` in our own conflist.
    pub ipam_dir: PathBuf,
    /// The range of our own network.
    pub pod_cidr: Option<String>,
    /// The bridge of our own network.
    pub bridge_name: String,
    /// The name of our own network.
    pub network_name: String,
    /// Whether pods' traffic leaves the host with the host's address.
    pub ip_masq: bool,
    /// Whether to write our own conflist.
    pub write_default: bool,
    /// How long one plugin call may take.
    pub timeout: Duration,
}

/// Runs CNI plugins.
#[derive(Debug)]
pub struct Cni {}

impl Cni {
    /// Opens (and makes) the directories; writes our conflist if `write_default` and a pod CIDR are set.
    pub async fn new(_config: CniConfig) -> Result<Self> {
        Ok(Self {})
    }
    /// Attaches a sandbox's network namespace.
    pub async fn add(&self, _sandbox: &SandboxId, _netns: &Path, _ns: &str, _name: &str) -> Result<Attachment> {
        Ok(Attachment { ips: vec![], interface: String::new(), mac: None })
    }
    /// Detaches it and releases its addresses. Idempotent; without a namespace where that is gone.
    pub async fn del(&self, _sandbox: &SandboxId, _netns: Option<&Path>) -> Result<()> {
        Ok(())
    }
    /// Asks the plugins whether the attachment is still as they made it.
    pub async fn check(&self, _sandbox: &SandboxId, _netns: &Path) -> Result<()> {
        Ok(())
    }
    /// Whether a pod could be attached now; the error says why not.
    pub async fn ready(&self) -> Result<()> {
        Ok(())
    }
    /// Sets the range of our own network; pods that have an address keep it.
    pub async fn set_pod_cidr(&self, _cidr: &str) -> Result<()> {
        Ok(())
    }
    /// What was attached and not detached yet, from disk.
    pub async fn attached(&self) -> Result<Vec<SandboxId>> {
        Ok(vec![])
    }
    /// What a sandbox was attached with, from disk.
    pub async fn attachment(&self, _sandbox: &SandboxId) -> Result<Option<Attachment>> {
        Ok(None)
    }
}
