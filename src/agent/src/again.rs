//! What could not be removed is tried again in the background, at growing intervals, until it is gone. Proxmox VE's API or a
//! store may be away for a while; what a failed pod had (a CT, its number, its address) must not stay taken for as long as the
//! agent runs.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use moxlet_ids::SandboxId;
use tracing::{debug, info};

use crate::{
    core::{Core, Sandbox},
    error::{Result, chain},
    sandboxes,
};

/// The first pause, doubled each time.
const FIRST: Duration = Duration::from_millis(500);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(60);

/// Has a sandbox removed that is not wanted any more. The caller may hold it; there is one task for it at most.
pub(crate) fn sandbox(core: &Arc<Core>, sandbox: &Arc<Sandbox>) {
    if sandbox.goes.swap(true, Ordering::Relaxed) {
        return;
    }
    let (own, sandbox) = (core.clone(), sandbox.clone());
    until_removed(core, sandbox.id.clone(), move || {
        let (core, sandbox) = (own.clone(), sandbox.clone());
        async move {
            let _guard = sandbox.change.lock().await;
            if core.knows(&sandbox.id) { sandboxes::remove_parts(&core, &sandbox).await } else { Ok(()) }
        }
    });
}

/// Has removed what is left of a sandbox that the ledger does not know.
pub(crate) fn stray(core: &Arc<Core>, id: SandboxId) {
    let (own, stray) = (core.clone(), id.clone());
    until_removed(core, id, move || {
        let (core, id) = (own.clone(), stray.clone());
        async move { sandboxes::remove_stray(&core, &id).await }
    });
}

/// Removes until that succeeds or the agent ends; a removal that is under way then is ended as other changes are.
fn until_removed<F>(core: &Arc<Core>, id: SandboxId, remove: impl Fn() -> F + Send + 'static)
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let core = core.clone();
    core.tasks.clone().spawn(async move {
        let mut pause = FIRST;
        loop {
            tokio::select! {
                () = core.stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(LONGEST);
            let removed = tokio::select! {
                () = core.stop.cancelled() => return,
                removed = core.whole(remove()) => removed,
            };
            match removed {
                Ok(()) => return info!(sandbox = %id, "a sandbox that could not be removed is gone now"),
                Err(error) => debug!(sandbox = %id, error = chain(&error), "not removed, will try again"),
            }
        }
    });
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use moxlet_cri::v1;
    use moxlet_sandbox::fake::{Call, FakeEngine};

    use super::*;
    use crate::{fake, ledger::Phase};

    fn web() -> v1::PodSandboxConfig {
        let metadata =
            v1::PodSandboxMetadata { name: "web".into(), uid: "uid-1".into(), ..Default::default() };
        v1::PodSandboxConfig { metadata: Some(metadata), ..Default::default() }
    }

    /// A pod's start that fails, and so do two removals of it.
    async fn fail(core: &Arc<Core>, engine: &FakeEngine) {
        engine.refuse(Call::Start, 1);
        engine.refuse(Call::Delete, 2);
        sandboxes::run(core, web(), "").await.unwrap_err();
    }

    async fn until_gone(core: &Arc<Core>) {
        let mut events = core.listen();
        while !core.sandboxes().is_empty() {
            let _ = tokio::time::timeout(Duration::from_millis(20), events.recv()).await;
        }
    }

    #[tokio::test]
    async fn a_failed_sandbox_that_cannot_be_removed_at_once_is_removed_while_the_agent_runs() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(FakeEngine::default());
        let core = fake::core(dir.path(), engine.clone()).await;
        fail(&core, &engine).await;
        let left = core.sandboxes();
        assert_eq!((left.len(), left[0].phase()), (1, Phase::Removing));
        assert!(engine.spec(&left[0].id).is_some());
        until_gone(&core).await;
        assert!(engine.spec(&left[0].id).is_none());
        assert!(core.ledger.load().unwrap().0.is_empty());
        assert!(!sandboxes::shared_dir(&core, &left[0].id).exists());
    }

    #[tokio::test]
    async fn a_removal_that_somebody_asked_for_goes_on_when_nobody_asks_again() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(FakeEngine::default());
        let core = fake::core(dir.path(), engine.clone()).await;
        fail(&core, &engine).await;
        let id = core.sandboxes()[0].id.clone();
        sandboxes::remove(&core, id.as_str()).await.unwrap_err();
        until_gone(&core).await;
        // Whoever comes late finds nothing to do, and writes nothing down again.
        sandboxes::remove(&core, id.as_str()).await.unwrap();
        assert!(core.ledger.load().unwrap().0.is_empty());
    }

    #[tokio::test]
    async fn an_agent_that_ends_does_not_wait_for_what_cannot_be_removed() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(FakeEngine::default());
        let core = fake::core(dir.path(), engine.clone()).await;
        engine.refuse(Call::Delete, u32::MAX);
        stray(&core, SandboxId::random());
        core.stop.cancel();
        core.tasks.close();
        core.tasks.wait().await;
    }
}
