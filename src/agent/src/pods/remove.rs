//! `RemovePodSandbox`: all that a sandbox had goes, its record in the ledger last.

use std::{fs, sync::Arc};

use moxlet_cri::v1;
use moxlet_ids::SandboxId;
use moxlet_storage::mounts;

use super::Pods;
use crate::{
    error::{Error, Result},
    ledger::SandboxPhase,
    retries::Work,
    state::Sandbox,
    tasks::blocking,
};

impl Pods {
    /// `RemovePodSandbox`. Of an unknown one: nothing, as CRI asks.
    pub(crate) async fn remove(self: &Arc<Self>, id: &str) -> Result<()> {
        let Ok(sandbox) = self.state.sandbox(id) else { return Ok(()) };
        let own = self.clone();
        self.tasks
            .whole(async move {
                let _guard = own.to_end(&sandbox).await?;
                // Somebody else may have removed it meanwhile.
                if !own.state.knows(&sandbox.id) {
                    return Ok(());
                }
                own.stop_parts(&sandbox).await?;
                let removed = own.remove_parts(&sandbox).await;
                if removed.is_err() {
                    own.retries.add(Work::Remove(sandbox.id.clone()));
                }
                removed
            })
            .await
    }

    /// Removes all of a sandbox, its containers first, its line in the ledger last. The caller holds it.
    pub(crate) async fn remove_parts(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        let id = &sandbox.id;
        self.state.change_sandbox(sandbox, |r| r.phase = SandboxPhase::Removing).await?;
        self.engine.delete(id).await?;
        self.ended(sandbox).await?;
        for container in self.state.containers_of(id) {
            self.containers.remove_parts(sandbox, &container).await?;
        }
        self.network.release(id).await?;
        self.remove_shared(id).await?;
        self.state.remove_sandbox(id).await?;
        self.events.send(id.as_str(), sandbox, v1::ContainerEventType::ContainerDeletedEvent);
        Ok(())
    }

    /// Removes a pod's shared directory with all that is mounted below it. Idempotent.
    pub(crate) async fn remove_shared(&self, id: &SandboxId) -> Result<()> {
        let dir = self.dirs.pod(id);
        blocking(move || {
            mounts::unmount_all_below(&dir)?;
            match fs::remove_dir_all(&dir) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    Err(Error::io(format!("cannot remove {}", dir.display()), e))
                }
                _ => Ok(()),
            }
        })
        .await
    }

    /// Removes what is left of a sandbox that the ledger does not know. Idempotent.
    pub(crate) async fn remove_stray(&self, id: &SandboxId) -> Result<()> {
        self.engine.delete(id).await?;
        self.network.release(id).await?;
        self.remove_shared(id).await
    }
}
