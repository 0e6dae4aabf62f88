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
    refusals: Mutex<BTreeMap<Call, u32>>,
    holders: Mutex<BTreeMap<SandboxId, String>>,
    fault: Mutex<Option<String>>,
}

/// A call that can be refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    /// [`Engine::start`].
    Start,
    /// [`Engine::delete`].
    Delete,
    /// [`Engine::check`].
    Check,
}

fn own<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeEngine {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<SandboxId, (SandboxSpec, SandboxState)>> {
        own(&self.sandboxes)
    }

    /// Refuses the next so many calls of this kind.
    pub fn refuse(&self, call: Call, times: u32) {
        own(&self.refusals).insert(call, times);
    }

    fn allowed(&self, call: Call) -> Result<()> {
        match own(&self.refusals).get_mut(&call).filter(|left| **left > 0) {
            Some(left) => {
                *left -= 1;
                Err(Error::Host(format!("{call:?} is refused")))
            }
            None => Ok(()),
        }
    }

    /// Has a fault until a check is allowed.
    pub fn break_down(&self, why: &str) {
        *own(&self.fault) = Some(why.to_owned());
    }

    /// As if somebody else held a CT, or did not any more.
    pub fn hold(&self, id: &SandboxId, holder: Option<&str>) {
        let mut holders = own(&self.holders);
        match holder {
            Some(holder) => holders.insert(id.clone(), holder.to_owned()),
            None => holders.remove(id),
        };
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
        self.allowed(Call::Start)?;
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
        self.allowed(Call::Delete)?;
        self.lock().remove(id);
        Ok(())
    }

    async fn list(&self) -> Result<Vec<SandboxInfo>> {
        Ok(self.lock().iter().map(|(id, (_, state))| SandboxInfo { id: id.clone(), state: *state }).collect())
    }

    async fn state(&self, id: &SandboxId) -> Result<Option<SandboxState>> {
        Ok(self.lock().get(id).map(|(_, state)| *state))
    }

    fn fault(&self) -> Option<String> {
        own(&self.fault).clone()
    }

    async fn check(&self) -> Result<()> {
        self.allowed(Call::Check)?;
        *own(&self.fault) = None;
        Ok(())
    }

    async fn held_by(&self, id: &SandboxId) -> Result<Option<String>> {
        Ok(own(&self.holders).get(id).cloned())
    }

    async fn wait(&self, id: &SandboxId) -> Result<()> {
        while matches!(self.state(id).await?, Some(SandboxState::Running { .. })) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }
}
