//! An engine in memory, for tests of those who use one; it keeps the contract of [`Engine`] and runs nothing.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use moxlet_ids::SandboxId;

use crate::{Engine, Error, Result, SandboxInfo, SandboxSpec, SandboxState};

/// CTs that are only remembered.
#[derive(Debug, Default)]
pub struct FakeEngine {
    sandboxes: Mutex<BTreeMap<SandboxId, (SandboxSpec, SandboxState)>>,
}

impl FakeEngine {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<SandboxId, (SandboxSpec, SandboxState)>> {
        self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The spec that a CT was created with.
    #[must_use]
    pub fn spec(&self, id: &SandboxId) -> Option<SandboxSpec> {
        self.lock().get(id).map(|(spec, _)| spec.clone())
    }

    /// As if the CT's init had died.
    pub fn kill(&self, id: &SandboxId) {
        if let Some((_, state)) = self.lock().get_mut(id) {
            *state = SandboxState::Stopped;
        }
    }
}

#[async_trait]
impl Engine for FakeEngine {
    async fn create(&self, spec: &SandboxSpec) -> Result<()> {
        let mut all = self.lock();
        if all.contains_key(&spec.id) {
            return Err(Error::Exists(spec.id.to_string()));
        }
        all.insert(spec.id.clone(), (spec.clone(), SandboxState::Stopped));
        Ok(())
    }

    async fn start(&self, id: &SandboxId) -> Result<u32> {
        let mut all = self.lock();
        let pid = 1_000_000 + u32::try_from(all.len()).unwrap_or(0);
        let (_, state) = all.get_mut(id).ok_or_else(|| Error::NotFound(id.to_string()))?;
        match state {
            SandboxState::Running { pid } => Ok(*pid),
            SandboxState::Stopped => {
                *state = SandboxState::Running { pid };
                Ok(pid)
            }
        }
    }

    async fn stop(&self, id: &SandboxId, _grace: Duration) -> Result<()> {
        self.kill(id);
        Ok(())
    }

    async fn delete(&self, id: &SandboxId) -> Result<()> {
        self.lock().remove(id);
        Ok(())
    }

    async fn list(&self) -> Result<Vec<SandboxInfo>> {
        Ok(self.lock().iter().map(|(id, (_, state))| SandboxInfo { id: id.clone(), state: *state }).collect())
    }

    async fn state(&self, id: &SandboxId) -> Result<Option<SandboxState>> {
        Ok(self.lock().get(id).map(|(_, state)| *state))
    }

    async fn wait(&self, id: &SandboxId) -> Result<()> {
        while matches!(self.state(id).await?, Some(SandboxState::Running { .. })) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }
}
