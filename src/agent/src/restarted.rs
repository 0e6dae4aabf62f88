//! CTs that have ended and were started again by somebody else, as a backup does with what it has stopped: their containers are gone
//! for good, and the pod has another CT or is to have none. They are ended again, as soon as nobody holds them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use moxlet_ids::SandboxId;
use moxlet_sandbox::{Observation, SandboxState};
use tracing::{debug, warn};

use crate::{
    core::{Core, Sandbox, lock, now_ns},
    error::{Result, chain},
    ledger::Phase,
    notices, sandboxes,
};

/// The first pause after a failure, doubled each time.
const FIRST: Duration = Duration::from_secs(2);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(60);

/// When those that could not be ended are tried again.
#[derive(Debug, Default)]
pub(crate) struct Pauses(Mutex<HashMap<SandboxId, (Instant, Duration)>>);

impl Pauses {
    fn is_over(&self, id: &SandboxId, now: Instant) -> bool {
        lock(&self.0).get(id).is_none_or(|(next, _)| *next <= now)
    }

    /// Notes a failure; whether it is the first in a row.
    fn failed(&self, id: &SandboxId, now: Instant) -> bool {
        let mut all = lock(&self.0);
        let pause = all.get(id).map_or(FIRST, |(_, pause)| (*pause * 2).min(LONGEST));
        all.insert(id.clone(), (now + pause, pause)).is_none()
    }

    fn went_well(&self, id: &SandboxId) {
        lock(&self.0).remove(id);
    }

    fn keep(&self, ids: &[SandboxId]) {
        lock(&self.0).retain(|id, _| ids.contains(id));
    }
}

/// Looks for such CTs and ends them, beside the caller.
pub(crate) fn end(core: &Arc<Core>, pauses: &Arc<Pauses>) {
    let ended: Vec<_> = core.sandboxes().into_iter().filter(|s| s.phase() == Phase::NotReady).collect();
    pauses.keep(&ended.iter().map(|s| s.id.clone()).collect::<Vec<_>>());
    for sandbox in ended.into_iter().filter(|s| pauses.is_over(&s.id, Instant::now())) {
        let (core, pauses) = (core.clone(), pauses.clone());
        core.tasks.clone().spawn(async move {
            let id = &sandbox.id;
            match core.clone().whole(ended_again(core, sandbox.clone())).await {
                Ok(()) => pauses.went_well(id),
                Err(error) if pauses.failed(id, Instant::now()) => {
                    warn!(sandbox = %id, error = chain(&error), "a CT that was started again cannot be ended; it is tried again");
                }
                Err(error) => debug!(sandbox = %id, error = chain(&error), "not ended, will try again"),
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

    #[test]
    fn what_cannot_be_ended_is_tried_at_growing_intervals_and_told_once() {
        let (pauses, id, begun) = (Pauses::default(), SandboxId::random(), Instant::now());
        let after = |s| begun + Duration::from_secs(s);
        assert!(pauses.is_over(&id, begun) && pauses.failed(&id, begun), "the first is told");
        assert!(!pauses.is_over(&id, after(1)) && pauses.is_over(&id, after(2)));
        assert!(!pauses.failed(&id, after(2)));
        assert!(!pauses.is_over(&id, after(5)) && pauses.is_over(&id, after(6)));
        for _ in 0..9 {
            pauses.failed(&id, after(6));
        }
        assert!(!pauses.is_over(&id, after(65)) && pauses.is_over(&id, after(66)));
        pauses.keep(&[]);
        assert!(pauses.failed(&id, after(66)), "another time");
    }

    #[tokio::test]
    async fn a_ct_that_runs_for_its_pod_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(FakeEngine::default());
        let core = fake::core(dir.path(), engine.clone()).await;
        let sandbox = sandbox(&core, &engine, Phase::Ready).await;
        engine.start(&sandbox.id).await.unwrap();
        end(&core, &Arc::default());
        core.tasks.close();
        core.tasks.wait().await;
        assert!(matches!(engine.state(&sandbox.id).await.unwrap(), Some(SandboxState::Running { .. })));
    }
}
