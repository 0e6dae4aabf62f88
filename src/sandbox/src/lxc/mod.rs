//! The engine on plain liblxc (signatures; the bodies follow).
use std::{path::PathBuf, time::Duration};

use async_trait::async_trait;
use moxlet_ids::SandboxId;

use crate::{Engine, IdMap, Result, SandboxInfo, SandboxSpec, SandboxState};

/// What the engine needs to know.
#[derive(Debug, Clone)]
pub struct LxcConfig {
    /// The engine's own directory: CT configurations and the CTs' common root.
    pub dir: PathBuf,
    /// The ids that CTs will use: their range is ensured in `/etc/subuid` and `/etc/subgid`.
    pub map: IdMap,
    /// Whether to add a missing range to those files (else it is an error).
    pub manage_subids: bool,
    /// How long a CT's start may take.
    pub start_timeout: Duration,
}

/// CTs by liblxc.
#[derive(Debug, Clone)]
pub struct LxcEngine {}

impl LxcEngine {
    /// Opens (and makes) the engine's directory, checks the host, clears what a crash left half made.
    pub async fn new(_config: LxcConfig) -> Result<Self> {
        Ok(Self {})
    }
}

#[async_trait]
impl Engine for LxcEngine {
    async fn create(&self, _spec: &SandboxSpec) -> Result<()> {
        Ok(())
    }
    async fn start(&self, _id: &SandboxId) -> Result<u32> {
        Ok(0)
    }
    async fn stop(&self, _id: &SandboxId, _grace: Duration) -> Result<()> {
        Ok(())
    }
    async fn delete(&self, _id: &SandboxId) -> Result<()> {
        Ok(())
    }
    async fn list(&self) -> Result<Vec<SandboxInfo>> {
        Ok(vec![])
    }
    async fn state(&self, _id: &SandboxId) -> Result<Option<SandboxState>> {
        Ok(None)
    }
}
