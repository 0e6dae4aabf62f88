//! The client against any endpoint: a real cluster, a simulator, somebody else's fake.
//!
//! It reads what there is, makes containers of its own in a range of VMIDs that it is given, and removes them. It touches
//! nothing that it did not make: a VMID is used only if it is free and its creation was accepted, every CT bears a mark of
//! this run in its notes, and clean-up looks for that mark first. What cannot be tried at an endpoint is said and counted.

mod ct;
pub mod differences;
mod lifecycle;
mod reading;

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use moxlet_pve::{
    Client, Error, NodeName, PoolId, StorageId, Upid, Vmid, VolumeId,
    api::{
        cluster::ResourceKind,
        ct::{ConfigChange, Ct, Delete},
        task::{TaskEnd, Wait},
    },
};

use crate::recorder::Recorder;

/// How long any task gets.
const TASK: Duration = Duration::from_secs(180);
/// How many CTs of others are looked at before and after.
const OTHERS: usize = 20;

/// Where and with what to run. What is `None` is looked for.
#[derive(Debug)]
pub struct Setup {
    /// The client; its observer is `recorder`.
    pub client: Client,
    /// The same endpoint with a token whose secret is wrong.
    pub stranger: Client,
    /// The same as `client` without the recorder, for a request that is wrong on purpose.
    pub unchecked: Client,
    /// What the client sends and gets.
    pub recorder: Recorder,
    /// The node.
    pub node: Option<NodeName>,
    /// The storage for root file systems.
    pub storage: Option<StorageId>,
    /// The archive that CTs are made from.
    pub template: Option<VolumeId>,
    /// VMIDs that may be used, first and last.
    pub vmids: (Vmid, Vmid),
}

/// How a test ended that did not pass.
#[derive(Debug)]
pub enum Trouble {
    /// It could not be tried, and why.
    NotTried(String),
    /// It failed.
    Failed(String),
}

/// The outcome of a test.
pub type Outcome = Result<(), Trouble>;

impl From<Error> for Trouble {
    /// A privilege that the token lacks is no fault of the client or the server.
    fn from(error: Error) -> Self {
        match error {
            Error::NotAllowed { .. } => Self::NotTried(format!("the token may not: {error}")),
            other => Self::Failed(other.to_string()),
        }
    }
}

/// Fails a test unless something holds.
fn ensure(holds: bool, what: impl FnOnce() -> String) -> Outcome {
    if holds { Ok(()) } else { Err(Trouble::Failed(what())) }
}

/// Fails a test unless a call ended in an error of some kind. That the token may not is an error of its own kind.
fn expect<T: std::fmt::Debug>(
    result: Result<T, Error>,
    wanted: &str,
    is: impl FnOnce(&Error) -> bool,
) -> Outcome {
    match result {
        Err(error) if is(error.reason()) => Ok(()),
        Err(error) => Err(Trouble::Failed(format!("{wanted} was expected, but: {error}"))),
        Ok(value) => Err(Trouble::Failed(format!("{wanted} was expected, but it succeeded: {value:?}"))),
    }
}

/// The figures of a run.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Tests that passed.
    pub passed: usize,
    /// Tests that failed.
    pub failed: usize,
    /// Tests that could not be tried.
    pub not_tried: usize,
    /// Known differences of the server from the real one.
    pub differences: usize,
}

struct Suite {
    setup: Setup,
    /// What the server calls itself, for the table of differences.
    server: String,
    mark: String,
    summary: Mutex<Summary>,
    /// The CTs that were made and are not yet removed, and where they are.
    made: Mutex<BTreeMap<Vmid, NodeName>>,
}

/// Runs all of it, prints a line for each test, and removes what it made, also when it is interrupted by SIGINT or SIGTERM.
pub async fn run(setup: Setup) -> Summary {
    let mark = format!("moxlet test suite {}-{:?}", std::process::id(), std::time::SystemTime::now());
    let server = setup.client.version().await.map(|v| v.repoid).unwrap_or_default();
    let (summary, made) = (Mutex::default(), Mutex::default());
    let suite = Suite { setup, server, mark, summary, made };
    let others = suite.others().await;
    tokio::select! {
        () = suite.tests() => {}
        () = interrupted() => suite.record("the_run_is_not_interrupted", Err(Trouble::Failed("a signal came".into()))),
    }
    suite.record("everything_made_is_removed", suite.clean_up().await);
    suite.record("the_cts_of_others_are_as_they_were", suite.untouched(others).await);
    suite.hold_against_schema();
    let summary = *suite.summary.lock().unwrap_or_else(PoisonError::into_inner);
    let Summary { passed, failed, not_tried, differences } = summary;
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("{not_tried} not tried, {differences} known differences of this server from Proxmox VE");
    println!("test result: {word}. {passed} passed; {failed} failed");
    summary
}

async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut term) = signal(SignalKind::terminate()) else { return std::future::pending().await };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = term.recv() => {}
    }
}

impl Suite {
    async fn tests(&self) {
        self.reading().await;
        self.containers().await;
    }

    /// Some CTs that are not ours, with the digests of their configurations.
    async fn others(&self) -> Result<BTreeMap<Vmid, (NodeName, Option<String>)>, Trouble> {
        let guests = self.client().resources(Some(ResourceKind::Guests)).await?;
        let mut others = BTreeMap::new();
        for guest in guests.into_iter().filter(|g| g.kind == "lxc").take(OTHERS) {
            let (Some(vmid), Some(node)) = (guest.vmid, guest.node) else { continue };
            if let Ok(config) = self.client().ct(&node, vmid).config().await {
                others.insert(vmid, (node, config.digest));
            }
        }
        Ok(others)
    }

    async fn untouched(
        &self,
        before: Result<BTreeMap<Vmid, (NodeName, Option<String>)>, Trouble>,
    ) -> Outcome {
        let before = before?;
        if before.is_empty() {
            return Err(Trouble::NotTried("there is no CT of others that the token may see".into()));
        }
        for (vmid, (node, digest)) in before {
            let now = self.client().ct(&node, vmid).config().await?.digest;
            ensure(now == digest, || format!("CT {vmid} on {node} was changed, by whomever"))?;
        }
        Ok(())
    }

    fn client(&self) -> &Client {
        &self.setup.client
    }

    async fn test(&self, name: &str, test: impl Future<Output = Outcome>) -> bool {
        let outcome = test.await;
        let passed = outcome.is_ok();
        self.record(name, outcome);
        passed
    }

    fn record(&self, name: &str, outcome: Outcome) {
        let mut summary = self.summary.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Ok(()) => {
                println!("test {name} ... ok");
                summary.passed += 1;
            }
            Err(Trouble::NotTried(why)) => {
                println!("NOT TRIED {name}: {why}");
                summary.not_tried += 1;
            }
            Err(Trouble::Failed(why)) => match differences::of_test(&self.server, name) {
                Some(known) => {
                    println!(
                        "DIFFERS {name}: {} (a real server: {}); seen: {why}",
                        known.server_does, known.real_does
                    );
                    summary.differences += 1;
                }
                None => {
                    println!("    {why}");
                    println!("test {name} ... FAILED");
                    summary.failed += 1;
                }
            },
        }
    }

    /// What was sent must agree with the schema; what came, too, but for what this server is known for.
    fn hold_against_schema(&self) {
        let wrong: Vec<String> =
            self.setup.recorder.wrong_requests().iter().map(ToString::to_string).collect();
        self.record(
            "every_request_agrees_with_the_schema",
            ensure(wrong.is_empty(), || wrong.join("\n    ")),
        );
        let mut unknown = Vec::new();
        for violation in self.setup.recorder.wrong_answers() {
            match differences::of_answer(&self.server, &violation) {
                Some(known) => {
                    println!(
                        "DIFFERS {violation}: {} (a real server: {})",
                        known.server_does, known.real_does
                    );
                    self.summary.lock().unwrap_or_else(PoisonError::into_inner).differences += 1;
                }
                None => unknown.push(violation.to_string()),
            }
        }
        self.record(
            "every_answer_agrees_with_the_schema",
            ensure(unknown.is_empty(), || unknown.join("\n    ")),
        );
        let calls = self.setup.recorder.calls();
        let all: u64 = calls.values().sum();
        println!("{all} requests of {} kinds were sent", calls.len());
    }

    async fn wait(&self, task: &Upid) -> Result<TaskEnd, Error> {
        self.client().wait(task, &Wait::within(TASK)).await
    }

    fn remember(&self, vmid: Vmid, node: &NodeName) {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).insert(vmid, node.clone());
    }

    fn forget(&self, vmid: Vmid) {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).remove(&vmid);
    }

    /// The name of the pool that a test makes.
    fn pool_name() -> Result<PoolId, Error> {
        Ok(format!("moxlet-suite-{}", std::process::id()).parse()?)
    }

    /// Removes what is left. A CT or pool without the mark of this run is not ours, whatever we remember.
    async fn clean_up(&self) -> Outcome {
        let left = self.made.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut trouble = Vec::new();
        for (vmid, node) in left {
            if let Err(why) = self.remove_ct(&self.client().ct(&node, vmid)).await {
                trouble.push(format!("CT {vmid} on {node}: {why}"));
            }
        }
        let name = Self::pool_name()?;
        match self.client().pool(&name).await {
            Ok(Some(pool)) if pool.comment.as_deref() == Some(self.mark.as_str()) => {
                self.client().delete_pool(&name).await?;
            }
            // That there is none may be an empty list or an error; without the privilege none was made.
            _ => {}
        }
        ensure(trouble.is_empty(), || trouble.join("; "))
    }

    async fn remove_ct(&self, ct: &Ct<'_>) -> Result<(), String> {
        // While it is being made it has no notes yet.
        let mut config = ct.config().await;
        for _ in 0..60 {
            match &config {
                Ok(c) if c.lock.as_deref() == Some("create") => {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                _ => break,
            }
            config = ct.config().await;
        }
        match config {
            Ok(config) if config.description.as_deref().is_some_and(|d| d.contains(&self.mark)) => {}
            Ok(_) => return Err("it does not bear the mark of this run and is left alone".to_owned()),
            Err(error) if error.is_gone() => return Ok(()),
            Err(error) => return Err(error.to_string()),
        }
        let change = ConfigChange { delete: vec!["protection".into()], ..ConfigChange::default() };
        // It may not be protected, it may not run: only the deletion counts.
        let _ = ct.set_config(&change).await;
        if let Ok(task) = ct.stop(false).await {
            let _ = self.wait(&task).await;
        }
        let delete = Delete { purge: true, ..Delete::default() };
        let task = ct.delete(delete).await.map_err(|e| e.to_string())?;
        self.wait(&task).await.map(drop).map_err(|e| e.to_string())
    }
}
