//! The sandboxes and containers of an agent in memory, each with its record in the ledger; nothing else.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use moxlet_ids::{ContainerId, SandboxId};
use moxlet_init_proto::{CreateRequest, client::Client};
use moxlet_sandbox::Limits;
use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{sleep, timeout},
};

use crate::{
    error::{Error, Result},
    ledger::{ContainerRecord, Exit, Ledger, SandboxPhase, SandboxRecord},
    tasks::blocking,
};

/// Commands that `Exec` and `ExecSync` run in a pod at one time. Each takes one of the init's 256 threads for as long as it runs; the rest
/// stays free for what a pod is run, watched and stopped by.
pub(crate) const MAX_EXECS: usize = 128;
/// How long an init may take over an answer once its sandbox is being stopped.
const LAST_ANSWER: Duration = Duration::from_secs(3);

/// What a start needs; in memory only.
pub(crate) struct Prepared {
    /// What the init is asked.
    pub(crate) request: CreateRequest,
    /// Limits of the container.
    pub(crate) limits: Limits,
    /// Set from the host between create and start.
    pub(crate) oom_score_adj: Option<i32>,
}

/// What a container does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RunState {
    /// Made, not started.
    Created,
    /// Running since then (nanoseconds since 1970).
    Running { started_at_ns: i64 },
    /// Ended.
    Exited(Exit),
}

impl RunState {
    /// Whether it has ended.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self, Self::Exited(_))
    }
}

/// A sandbox in memory.
pub(crate) struct Sandbox {
    /// Its id.
    pub(crate) id: SandboxId,
    /// What is on disk of it.
    record: Mutex<SandboxRecord>,
    /// The init of its CT while that runs.
    client: Mutex<Option<Client>>,
    /// Who else holds its CT, so that it cannot be changed now.
    held: Mutex<Option<String>>,
    /// How many calls are about to end it.
    stopping: watch::Sender<usize>,
    /// Room for commands in its containers.
    execs: Arc<Semaphore>,
    /// Held through every change of the sandbox as a whole and of its containers, and while its record is written.
    pub(crate) change: tokio::sync::Mutex<()>,
}

impl Sandbox {
    /// A sandbox of this record, its CT not (yet) reached.
    pub(crate) fn new(record: SandboxRecord) -> Arc<Self> {
        Arc::new(Self {
            id: record.id.clone(),
            record: Mutex::new(record),
            client: Mutex::new(None),
            held: Mutex::new(None),
            stopping: watch::Sender::new(0),
            execs: Arc::new(Semaphore::new(MAX_EXECS)),
            change: tokio::sync::Mutex::new(()),
        })
    }

    /// A copy of its record.
    pub(crate) fn record(&self) -> SandboxRecord {
        self.record.lock().clone()
    }

    /// How far it is.
    pub(crate) fn phase(&self) -> SandboxPhase {
        self.record.lock().phase
    }

    /// Its CT's init.
    ///
    /// # Errors
    /// When the CT does not run.
    pub(crate) fn client(&self) -> Result<Client> {
        let client = self.client.lock().clone();
        client.ok_or_else(|| Error::State(format!("sandbox {} is not running", self.id)))
    }

    /// Who else holds its CT: `backup`, `frozen`, ….
    pub(crate) fn held_by(&self) -> Option<String> {
        self.held.lock().clone()
    }

    /// Says who holds its CT.
    pub(crate) fn set_held_by(&self, holder: Option<String>) {
        *self.held.lock() = holder;
    }

    /// An answer of its init, which has to come within `limit`. Once the sandbox is being stopped little time is left: a change that waits for
    /// an init that hangs must not keep the CT from being ended.
    ///
    /// # Errors
    /// What the init says; [`moxlet_init_proto::Error::Timeout`] without an answer.
    pub(crate) async fn answer<T>(
        &self,
        request: &'static str,
        limit: Duration,
        answer: impl Future<Output = moxlet_init_proto::Result<T>>,
    ) -> moxlet_init_proto::Result<T> {
        let mut stopping = self.stopping.subscribe();
        let stopped = async {
            // The sender lives in `self`, so the wait cannot fail.
            let _ = stopping.wait_for(|calls| *calls > 0).await;
            sleep(LAST_ANSWER).await;
        };
        let late = |limit: Duration| moxlet_init_proto::Error::Timeout { seconds: limit.as_secs(), request };
        tokio::select! {
            biased;
            answer = timeout(limit, answer) => answer.map_err(|_| late(limit))?,
            () = stopped => Err(late(LAST_ANSWER)),
        }
    }

    /// Says that a call is about to end it, for as long as the guard lives.
    pub(crate) fn stopping(self: &Arc<Self>) -> Stopping {
        self.stopping.send_modify(|calls| *calls += 1);
        Stopping(self.clone())
    }

    /// Room for one more command in its containers, taken until it is dropped.
    ///
    /// # Errors
    /// [`Error::Exhausted`]: [`MAX_EXECS`] run.
    pub(crate) fn exec_slot(&self) -> Result<OwnedSemaphorePermit> {
        let full = || Error::Exhausted(format!("{MAX_EXECS} commands run in sandbox {} already", self.id));
        self.execs.clone().try_acquire_owned().map_err(|_| full())
    }

    /// Says that its init is reached, or gone.
    pub(crate) fn set_client(&self, client: Option<Client>) {
        *self.client.lock() = client;
    }
}

/// A call that is about to end a sandbox.
pub(crate) struct Stopping(Arc<Sandbox>);

impl Drop for Stopping {
    fn drop(&mut self) {
        self.0.stopping.send_modify(|calls| *calls -= 1);
    }
}

/// A container in memory.
pub(crate) struct Container {
    /// Its id.
    pub(crate) id: ContainerId,
    /// Its sandbox.
    pub(crate) sandbox: SandboxId,
    record: Mutex<ContainerRecord>,
    /// What it does; waited for by stop, logs and streams.
    pub(crate) state: watch::Sender<RunState>,
    /// What its start needs.
    prepared: Mutex<Option<Prepared>>,
    /// Held while its record is written; whether the record is gone for good.
    writing: Arc<tokio::sync::Mutex<bool>>,
}

impl Container {
    /// A container of this record.
    pub(crate) fn new(record: ContainerRecord) -> Arc<Self> {
        let state = match &record.exit {
            Some(exit) => RunState::Exited(exit.clone()),
            // Until its init or its CT's end says otherwise; the init also knows since when.
            None if record.started => RunState::Running { started_at_ns: record.created_at_ns },
            None => RunState::Created,
        };
        Arc::new(Self {
            id: record.id.clone(),
            sandbox: record.sandbox.clone(),
            record: Mutex::new(record),
            state: watch::Sender::new(state),
            prepared: Mutex::default(),
            writing: Arc::default(),
        })
    }

    /// Keeps what its start needs.
    pub(crate) fn set_prepared(&self, prepared: Prepared) {
        *self.prepared.lock() = Some(prepared);
    }

    /// Takes what its start needs; nothing the second time.
    pub(crate) fn take_prepared(&self) -> Option<Prepared> {
        self.prepared.lock().take()
    }

    /// Whether it has what its start needs.
    pub(crate) fn is_prepared(&self) -> bool {
        self.prepared.lock().is_some()
    }

    /// A copy of its record.
    pub(crate) fn record(&self) -> ContainerRecord {
        self.record.lock().clone()
    }

    /// Takes over a record that is on disk. An end is seen at once by all who wait for it.
    fn put(&self, record: ContainerRecord) {
        let exit = record.exit.clone();
        *self.record.lock() = record;
        if let Some(exit) = exit {
            self.state.send_if_modified(|now| {
                let first = !now.has_ended();
                if first {
                    *now = RunState::Exited(exit);
                }
                first
            });
        }
    }

    /// What it does.
    pub(crate) fn run_state(&self) -> RunState {
        self.state.borrow().clone()
    }

    /// Waits until it has ended.
    pub(crate) async fn ended(&self) {
        // The sender lives in `self`, so the wait cannot fail.
        let _ = self.state.subscribe().wait_for(RunState::has_ended).await;
    }
}

/// The sandboxes and containers.
pub(crate) struct State {
    ledger: Arc<Ledger>,
    sandboxes: Mutex<BTreeMap<SandboxId, Arc<Sandbox>>>,
    containers: Mutex<BTreeMap<ContainerId, Arc<Container>>>,
}

impl State {
    /// None yet, with this ledger.
    pub(crate) fn new(ledger: Arc<Ledger>) -> Arc<Self> {
        Arc::new(Self { ledger, sandboxes: Mutex::default(), containers: Mutex::default() })
    }

    /// Adds a sandbox of the ledger.
    pub(crate) fn insert_sandbox(&self, sandbox: Arc<Sandbox>) {
        self.sandboxes.lock().insert(sandbox.id.clone(), sandbox);
    }

    /// Adds a new sandbox.
    ///
    /// # Errors
    /// There is one of the same pod and attempt.
    pub(crate) fn add_sandbox(&self, sandbox: Arc<Sandbox>) -> Result<()> {
        let mut all = self.sandboxes.lock();
        let new = sandbox.record();
        let same = |r: &SandboxRecord| {
            r.uid == new.uid && r.name == new.name && r.namespace == new.namespace && r.attempt == new.attempt
        };
        if let Some(other) = all.values().map(|s| s.record()).find(same) {
            return Err(Error::State(format!(
                "sandbox {} of pod {}/{} has attempt {} already",
                other.id, other.namespace, other.name, other.attempt
            )));
        }
        all.insert(sandbox.id.clone(), sandbox);
        Ok(())
    }

    /// Removes a sandbox's record from disk and the sandbox from memory. Idempotent.
    ///
    /// # Errors
    /// The ledger cannot be written.
    pub(crate) async fn remove_sandbox(&self, id: &SandboxId) -> Result<()> {
        let (ledger, own) = (self.ledger.clone(), id.clone());
        blocking(move || ledger.remove_sandbox(&own)).await?;
        self.sandboxes.lock().remove(id);
        Ok(())
    }

    /// Whether there is such a sandbox (still).
    pub(crate) fn knows(&self, id: &SandboxId) -> bool {
        self.sandboxes.lock().contains_key(id)
    }

    /// All sandboxes.
    pub(crate) fn sandboxes(&self) -> Vec<Arc<Sandbox>> {
        self.sandboxes.lock().values().cloned().collect()
    }

    /// A sandbox by its id, or by a beginning of it that no other shares (as crictl gives it).
    pub(crate) fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>> {
        let all = self.sandboxes.lock();
        unique(all.iter(), id).cloned().ok_or_else(|| Error::NotFound(format!("sandbox {id:?}")))
    }

    /// Adds a container.
    pub(crate) fn insert_container(&self, container: Arc<Container>) {
        self.containers.lock().insert(container.id.clone(), container);
    }

    /// All containers.
    pub(crate) fn containers(&self) -> Vec<Arc<Container>> {
        self.containers.lock().values().cloned().collect()
    }

    /// The containers of a sandbox.
    pub(crate) fn containers_of(&self, sandbox: &SandboxId) -> Vec<Arc<Container>> {
        self.containers.lock().values().filter(|c| c.sandbox == *sandbox).cloned().collect()
    }

    /// A container by its id or a beginning of it that no other shares.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>> {
        let all = self.containers.lock();
        unique(all.iter(), id).cloned().ok_or_else(|| Error::NotFound(format!("container {id:?}")))
    }

    /// Changes a sandbox's record on disk, then in memory; both even when the caller goes away meanwhile.
    pub(crate) async fn change_sandbox(
        &self,
        sandbox: &Arc<Sandbox>,
        change: impl FnOnce(&mut SandboxRecord),
    ) -> Result<()> {
        let mut record = sandbox.record();
        change(&mut record);
        let (ledger, sandbox) = (self.ledger.clone(), sandbox.clone());
        blocking(move || {
            ledger.put_sandbox(&record)?;
            *sandbox.record.lock() = record;
            Ok(())
        })
        .await
    }

    /// Changes a container's record on disk, then in memory; both even when the caller goes away meanwhile. Once it is
    /// removed nothing is written any more.
    pub(crate) async fn change_container(
        &self,
        container: &Arc<Container>,
        change: impl FnOnce(&mut ContainerRecord),
    ) -> Result<()> {
        // The watch writes an end while a start writes that it began, or a removal that it is over.
        let writing = container.writing.clone().lock_owned().await;
        if *writing {
            return Ok(());
        }
        let mut record = container.record();
        change(&mut record);
        let (ledger, container) = (self.ledger.clone(), container.clone());
        blocking(move || {
            ledger.put_container(&record)?;
            container.put(record);
            drop(writing);
            Ok(())
        })
        .await
    }

    /// Removes a container's record from disk and the container from memory. Idempotent.
    pub(crate) async fn remove_container(&self, container: &Arc<Container>) -> Result<()> {
        let mut writing = container.writing.clone().lock_owned().await;
        let (ledger, id) = (self.ledger.clone(), container.id.clone());
        blocking(move || {
            ledger.remove_container(&id)?;
            *writing = true;
            Ok(())
        })
        .await?;
        self.containers.lock().remove(&container.id);
        Ok(())
    }
}

/// The one entry whose key is or begins with `id`.
fn unique<'a, K: std::fmt::Display + 'a, V: 'a>(
    all: impl Iterator<Item = (&'a K, &'a V)>,
    id: &str,
) -> Option<&'a V> {
    let mut found = None;
    for (key, value) in all {
        let key = key.to_string();
        if key == id {
            return Some(value);
        }
        if id.len() >= 3 && key.starts_with(id) {
            if found.is_some() {
                return None;
            }
            found = Some(value);
        }
    }
    found
}
