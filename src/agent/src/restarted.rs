//! CTs that have ended and were started again by somebody else, as a backup does with what it has stopped: their containers are gone
//! for good, and the pod has another CT or is to have none. They are ended again, as soon as nobody holds them.

use std::sync::Arc;

use moxlet_sandbox::{Observation, SandboxState};
use tracing::debug;

use crate::{
    core::{Core, Sandbox, now_ns},
    error::{Result, chain},
    ledger::Phase,
    notices, sandboxes,
};

/// Looks for such CTs and ends them, beside the caller.
pub(crate) fn end(core: &Arc<Core>) {
    for sandbox in core.sandboxes().into_iter().filter(|s| s.phase() == Phase::NotReady) {
        let core = core.clone();
        core.tasks.clone().spawn(async move {
            if let Err(error) = core.clone().whole(ended_again(core, sandbox.clone())).await {
                debug!(sandbox = %sandbox.id, error = chain(&error), "not ended, will try again");
            }
        });
    }
}

async fn ended_again(core: Arc<Core>, sandbox: Arc<Sandbox>) -> Result<()> {
    // Whoever is at it already does the same, or removes it.
    let Ok(_guard) = sandbox.change.try_lock() else { return Ok(()) };
    let runs = matches!(core.engine.state(&sandbox.id).await?, Some(SandboxState::Running { .. }));
    if !runs || sandbox.phase() != Phase::NotReady || core.engine.held_by(&sandbox.id).await?.is_some() {
        return Ok(());
    }
    sandboxes::stop_parts(&core, &sandbox).await?;
    let message = "the pod's CT had ended and was started again on the host; it has none of the pod's containers and was ended";
    let observation = Observation {
        sandbox: Some(sandbox.id.clone()),
        reason: "CTStarted",
        warning: false,
        message: message.to_owned(),
        at_ns: now_ns(),
    };
    notices::tell(&core, &sandbox, observation).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use moxlet_ids::SandboxId;
    use moxlet_sandbox::{Engine, fake::FakeEngine};

    use super::*;
    use crate::{fake, ledger::SandboxRecord};

    /// A pod's sandbox that is this far, and its CT, which does not run.
    async fn sandbox(core: &Arc<Core>, engine: &FakeEngine, phase: Phase) -> Arc<Sandbox> {
        let mut record = SandboxRecord::new(SandboxId::random(), "uid-1".parse().unwrap(), 1);
        (record.name, record.phase) = ("web".to_owned(), phase);
        let sandbox = Sandbox::new(record);
        core.insert_sandbox(sandbox.clone());
        engine.create(&fake::spec(&sandbox.id)).await.unwrap();
        sandbox
    }

    #[tokio::test]
    async fn a_ct_that_had_ended_and_was_started_by_a_backup_is_ended_again_when_nobody_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(FakeEngine::default());
        let core = fake::core(dir.path(), engine.clone()).await;
        let sandbox = sandbox(&core, &engine, Phase::NotReady).await;
        let id = sandbox.id.clone();
        let look_again = async || ended_again(core.clone(), sandbox.clone()).await;
        look_again().await.unwrap();
        assert!(core.notices.since(0).0.is_empty(), "it does not run");
        engine.start(&id).await.unwrap();
        engine.hold(&id, Some("backup"));
        look_again().await.unwrap();
        assert!(matches!(engine.state(&id).await.unwrap(), Some(SandboxState::Running { .. })));
        engine.hold(&id, None);
        look_again().await.unwrap();
        assert_eq!(engine.state(&id).await.unwrap(), Some(SandboxState::Stopped));
        look_again().await.unwrap();
        let (told, _) = core.notices.since(0);
        let told: Vec<_> = told.iter().map(|n| (n.reason.as_str(), n.pod_name.as_str())).collect();
        assert_eq!(told, [("CTStarted", "web")], "once");
    }

    #[tokio::test]
    async fn a_ct_that_runs_for_its_pod_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(FakeEngine::default());
        let core = fake::core(dir.path(), engine.clone()).await;
        let sandbox = sandbox(&core, &engine, Phase::Ready).await;
        engine.start(&sandbox.id).await.unwrap();
        end(&core);
        core.tasks.close();
        core.tasks.wait().await;
        assert!(matches!(engine.state(&sandbox.id).await.unwrap(), Some(SandboxState::Running { .. })));
    }
}
