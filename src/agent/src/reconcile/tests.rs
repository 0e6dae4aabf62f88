#![allow(clippy::unwrap_used)]
use moxlet_cri::v1;
use moxlet_sandbox::{
    Engine,
    fake::{Call, FakeEngine},
};

use super::*;
use crate::{fake, ledger::SandboxRecord, rooms::Rooms};

/// An agent's rooms, and what comes to be reconciled.
struct Place {
    dir: tempfile::TempDir,
    engine: Arc<FakeEngine>,
    rooms: Rooms,
    work: Option<mpsc::UnboundedReceiver<Work>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.rooms.tasks.stop.cancel();
    }
}

impl Place {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(FakeEngine::default());
        let (rooms, work) = fake::rooms(dir.path(), engine.clone()).await;
        Self { dir, engine, rooms, work: Some(work) }
    }

    fn ledger(&self) -> Ledger {
        Ledger::open(&self.dir.path().join("ledger")).unwrap()
    }

    fn reconcile(&mut self) {
        self.rooms.reconciler.spawn(self.work.take().unwrap());
    }

    /// A pod's start that fails, and so do two removals of it.
    async fn fail(&self) {
        self.engine.refuse(Call::Start, 1);
        self.engine.refuse(Call::Delete, 2);
        self.rooms.pods.run(web(), "").await.unwrap_err();
    }

    async fn until(&self, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn until_gone(&self) {
        self.until(|p| p.rooms.state.sandboxes().is_empty()).await;
    }

    /// A pod's sandbox that is this far, and its CT, which does not run.
    async fn sandbox(&self, phase: SandboxPhase) -> Arc<Sandbox> {
        let mut record = SandboxRecord::new(SandboxId::random(), "uid-1".parse().unwrap(), 1);
        (record.name, record.phase) = ("web".to_owned(), phase);
        let sandbox = Sandbox::new(record);
        self.rooms.state.insert_sandbox(sandbox.clone());
        self.engine.create(&fake::spec(&sandbox.id)).await.unwrap();
        sandbox
    }
}

fn web() -> v1::PodSandboxConfig {
    let metadata = v1::PodSandboxMetadata { name: "web".into(), uid: "uid-1".into(), ..Default::default() };
    v1::PodSandboxConfig { metadata: Some(metadata), ..Default::default() }
}

#[tokio::test]
async fn a_failed_sandbox_that_cannot_be_removed_at_once_is_removed_while_the_agent_runs() {
    let mut place = Place::new().await;
    place.fail().await;
    let left = place.rooms.state.sandboxes();
    assert_eq!((left.len(), left[0].phase()), (1, SandboxPhase::Removing));
    assert!(place.engine.spec(&left[0].id).is_some());
    place.reconcile();
    place.until_gone().await;
    assert!(place.engine.spec(&left[0].id).is_none());
    assert!(place.ledger().load().unwrap().0.is_empty());
    assert!(!place.rooms.dirs.pod(&left[0].id).exists());
}

#[tokio::test]
async fn a_removal_that_somebody_asked_for_goes_on_when_nobody_asks_again() {
    let mut place = Place::new().await;
    place.fail().await;
    let id = place.rooms.state.sandboxes()[0].id.clone();
    place.rooms.pods.remove(id.as_str()).await.unwrap_err();
    place.reconcile();
    place.until_gone().await;
    // Whoever comes late finds nothing to do, and writes nothing down again.
    place.rooms.pods.remove(id.as_str()).await.unwrap();
    assert!(place.ledger().load().unwrap().0.is_empty());
}

#[tokio::test]
async fn an_agent_that_ends_does_not_wait_for_what_cannot_be_removed() {
    let mut place = Place::new().await;
    place.engine.refuse(Call::Delete, u32::MAX);
    place.rooms.pods.retries.add(Work::RemoveStray(SandboxId::random()));
    place.reconcile();
    tokio::time::sleep(Duration::from_millis(600)).await;
    place.rooms.tasks.stop.cancel();
    place.rooms.tasks.tracker.close();
    place.rooms.tasks.tracker.wait().await;
}

#[tokio::test]
async fn a_start_does_not_wait_for_an_engine_with_a_fault_to_remove_what_is_left() {
    let mut place = Place::new().await;
    let half_made = SandboxRecord::new(SandboxId::random(), "uid-1".parse().unwrap(), 1);
    place.ledger().put_sandbox(&half_made).unwrap();
    let stray = SandboxId::random();
    let of_stray = place.rooms.dirs.pod(&stray);
    fs::create_dir_all(&of_stray).unwrap();
    place.engine.break_down("the server is away");
    place.engine.refuse(Call::Delete, 2);
    place.engine.refuse(Call::Check, 1);
    place.rooms.reconciler.start().await.unwrap();
    assert!(place.rooms.state.knows(&half_made.id) && of_stray.exists());
    // Both are tried again for as long as it takes, and so is the engine.
    place.reconcile();
    place.until(|p| !p.rooms.state.knows(&half_made.id) && !of_stray.exists()).await;
    assert!(place.ledger().load().unwrap().0.is_empty());
    place.until(|p| p.engine.fault().is_none()).await;
}

#[tokio::test]
async fn new_pods_are_refused_with_the_engines_fault_until_a_check_finds_none() {
    let mut place = Place::new().await;
    place.engine.break_down("the server is away");
    place.engine.refuse(Call::Start, 1);
    place.rooms.reconciler.start().await.unwrap();
    let refused = place.rooms.pods.run(web(), "").await.unwrap_err();
    assert!(matches!(&refused, Error::Unfit(why) if why.contains("the server is away")), "{refused}");
    assert!(place.rooms.state.sandboxes().is_empty(), "nothing is half made");
    place.reconcile();
    place.until(|p| p.engine.fault().is_none()).await;
    // It gets as far as its start now.
    let error = place.rooms.pods.run(web(), "").await.unwrap_err();
    assert!(error.to_string().contains("Start"), "{error}");
}

#[tokio::test]
async fn a_ct_that_had_ended_and_was_started_by_a_backup_is_ended_again_when_nobody_holds_it() {
    let place = Place::new().await;
    let sandbox = place.sandbox(SandboxPhase::NotReady).await;
    let (engine, id) = (&place.engine, sandbox.id.clone());
    let work = Work::EndStarted(id.clone());
    let look_again = async || place.rooms.reconciler.attempt(&work).await;
    look_again().await.unwrap();
    assert!(place.rooms.notices.since(0).0.is_empty(), "it does not run");
    engine.start(&id).await.unwrap();
    engine.hold(&id, Some("backup"));
    look_again().await.unwrap();
    assert!(matches!(engine.state(&id).await.unwrap(), Some(SandboxState::Running { .. })));
    engine.hold(&id, None);
    look_again().await.unwrap();
    assert_eq!(engine.state(&id).await.unwrap(), Some(SandboxState::Stopped));
    look_again().await.unwrap();
    let (notices, _) = place.rooms.notices.since(0);
    let notices: Vec<_> = notices.iter().map(|n| (n.reason.as_str(), n.pod_name.as_str())).collect();
    assert_eq!(notices, [("CTStarted", "web")], "once");
}

#[tokio::test]
async fn a_ct_that_runs_for_its_pod_is_left_alone() {
    let place = Place::new().await;
    let sandbox = place.sandbox(SandboxPhase::Ready).await;
    place.engine.start(&sandbox.id).await.unwrap();
    place.rooms.reconciler.attempt(&Work::EndStarted(sandbox.id.clone())).await.unwrap();
    assert!(matches!(place.engine.state(&sandbox.id).await.unwrap(), Some(SandboxState::Running { .. })));
}
