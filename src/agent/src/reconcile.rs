//! Ledger and host are brought in line: at the start of an agent, and later for what failed or was changed by others.
//!
//! At the start running CTs are taken over as they are, half-made and half-removed things are removed, and what belongs to no sandbox of
//! the ledger goes. What cannot be done at once is done in the background, from the queue in `retries`: one task owns the queue, each
//! thing that is due runs in a task of its own and reports back.

use std::{collections::BTreeSet, fs, sync::Arc, time::Duration};

use moxlet_errors::chain;
use moxlet_ids::{ContainerId, SandboxId};
use moxlet_init_proto::{Status, client::Client};
use moxlet_sandbox::{Observation, SandboxState};
use moxlet_storage::Driver;
use tokio::{sync::mpsc, time::Instant};
use tracing::{debug, info, warn};

use crate::{
    PATIENCE,
    clock::now_ns,
    error::{Error, Result},
    ledger::{Ledger, SandboxPhase},
    notices::Notices,
    pods::Pods,
    retries::{Queue, Work},
    state::{Container, Sandbox},
    tasks::blocking,
};

/// How long an init that runs may take to answer before it is taken over without its hello.
const HELLO: Duration = Duration::from_secs(5);
/// How often is looked for CTs that somebody else has started. Only local files are read.
const LOOK: Duration = Duration::from_secs(2);
/// When addresses are looked at once more after the start: a CNI plugin that an agent had started before it was killed may outlive it,
/// and give out an address after the first look.
const LATE_ADDRESSES: Duration = Duration::from_secs(PATIENCE.as_secs() + 5);

/// What it takes.
pub(crate) struct Reconciler {
    pub(crate) pods: Arc<Pods>,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) notices: Arc<Notices>,
    /// Whether others start CTs on this host, as Proxmox VE does.
    pub(crate) others_start_cts: bool,
}

type Outcome = (Work, Result<()>);

impl Reconciler {
    /// Loads the ledger and brings the host in line with it.
    ///
    /// # Errors
    /// A ledger that cannot be read: to guess would be to lose a pod. Of a record that is damaged the sandbox is removed. What else goes wrong is logged and tried again in the background.
    pub(crate) async fn start(&self) -> Result<()> {
        let (ledger, state) = (self.ledger.clone(), &self.pods.state);
        let (sandboxes, containers) = blocking(move || ledger.load()).await?;
        for record in sandboxes {
            state.insert_sandbox(Sandbox::new(record));
        }
        for record in containers {
            if state.sandbox(record.sandbox.as_str()).is_ok() {
                state.insert_container(Container::new(record));
            } else {
                self.ledger.remove_container(&record.id)?;
            }
        }
        if self.pods.engine.fault().is_some() {
            self.pods.retries.add(Work::CheckEngine);
        }
        self.strays().await;
        let all = state.sandboxes().into_iter().map(|sandbox| async move {
            if let Err(error) = self.take_over(&sandbox).await {
                warn!(sandbox = %sandbox.id, error = chain(&error), "a sandbox is not wholly taken over; it is tried again");
                self.pods.retries.add(match sandbox.phase() {
                    SandboxPhase::Creating | SandboxPhase::Removing => Work::Remove(sandbox.id.clone()),
                    SandboxPhase::Ready | SandboxPhase::NotReady => Work::Recover(sandbox.id.clone()),
                });
            }
        });
        futures::future::join_all(all).await;
        self.stray_roots().await;
        Ok(())
    }

    /// Works on what comes until the agent ends.
    pub(crate) fn spawn(self: &Arc<Self>, work: mpsc::UnboundedReceiver<Work>) {
        self.pods.tasks.spawn(self.clone().run(work));
    }

    async fn run(self: Arc<Self>, mut work: mpsc::UnboundedReceiver<Work>) {
        let mut queue = Queue::default();
        let (report, mut reports) = mpsc::unbounded_channel();
        let mut look = tokio::time::interval(LOOK);
        let late_addresses = tokio::time::sleep(LATE_ADDRESSES);
        tokio::pin!(late_addresses);
        let mut addresses_seen = false;
        loop {
            let due = queue.next();
            let due = async {
                match due {
                    Some(due) => tokio::time::sleep_until(Instant::from_std(due)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.pods.tasks.stop.cancelled() => return,
                Some(new) = work.recv() => queue.add(new, std::time::Instant::now()),
                Some(outcome) = reports.recv() => finished(&mut queue, outcome),
                () = due => {
                    for work in queue.take_due(std::time::Instant::now()) {
                        self.attempt_beside(work, report.clone());
                    }
                }
                () = &mut late_addresses, if !addresses_seen => {
                    addresses_seen = true;
                    for id in self.late_addresses().await {
                        info!(sandbox = %id, "an address was given out after its sandbox was removed; it is taken back");
                        queue.add(Work::RemoveStray(id), std::time::Instant::now());
                    }
                }
                _ = look.tick(), if self.others_start_cts => {
                    for sandbox in self.pods.state.sandboxes() {
                        if sandbox.phase() == SandboxPhase::NotReady {
                            queue.add(Work::EndStarted(sandbox.id.clone()), std::time::Instant::now());
                        }
                    }
                }
            }
        }
    }

    /// Does something in a task of its own. When the agent ends it is ended as other changes are.
    fn attempt_beside(self: &Arc<Self>, work: Work, report: mpsc::UnboundedSender<Outcome>) {
        let own = self.clone();
        let tasks = self.pods.tasks.clone();
        self.pods.tasks.spawn(async move {
            let attempt = {
                let work = work.clone();
                async move { own.attempt(&work).await }
            };
            tokio::select! {
                () = tasks.stop.cancelled() => {}
                outcome = tasks.whole(attempt) => drop(report.send((work, outcome))),
            }
        });
    }

    async fn attempt(&self, work: &Work) -> Result<()> {
        match work {
            Work::Remove(id) => {
                let Ok(sandbox) = self.pods.state.sandbox(id.as_str()) else { return Ok(()) };
                let _guard = sandbox.change.lock().await;
                if self.pods.state.knows(id) { self.pods.remove_parts(&sandbox).await } else { Ok(()) }
            }
            Work::RemoveStray(id) => self.pods.remove_stray(id).await,
            Work::RemoveRoot(id) => Ok(self.driver.remove_root(id).await?),
            Work::Recover(id) => match self.pods.state.sandbox(id.as_str()) {
                Ok(sandbox) => self.take_over(&sandbox).await,
                Err(_) => Ok(()),
            },
            Work::EndStarted(id) => match self.pods.state.sandbox(id.as_str()) {
                Ok(sandbox) => self.end_started(&sandbox).await,
                Err(_) => Ok(()),
            },
            Work::CheckEngine => Ok(self.pods.engine.check().await?),
        }
    }

    /// Takes over a sandbox of the ledger as it is, or removes it.
    async fn take_over(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        let pods = &self.pods;
        let guard = sandbox.change.lock().await;
        if matches!(sandbox.phase(), SandboxPhase::Creating | SandboxPhase::Removing) {
            info!(sandbox = %sandbox.id, "removing a sandbox that was half made or half removed");
            if self.waits() {
                pods.retries.add(Work::Remove(sandbox.id.clone()));
                return Ok(());
            }
            return pods.remove_parts(sandbox).await;
        }
        match pods.engine.state(&sandbox.id).await? {
            Some(SandboxState::Running { .. }) if sandbox.phase() == SandboxPhase::Ready => {
                sandbox.set_client(Some(self.client(&sandbox.id).await));
            }
            state => {
                // Its CT ended while nobody looked; or a stop was cut short and is finished now.
                if matches!(state, Some(SandboxState::Running { .. })) {
                    pods.engine.stop(&sandbox.id, Duration::from_secs(3)).await?;
                }
                pods.ended(sandbox).await?;
                pods.network.detach(&sandbox.id).await?;
            }
        }
        for container in pods.state.containers_of(&sandbox.id) {
            let record = container.record();
            // What this agent has made itself waits for its start.
            if (!record.created || !record.started) && !container.is_prepared() {
                info!(container = %container.id, "removing a container that was not started");
                pods.containers.remove_parts(sandbox, &container).await?;
            }
        }
        if let Ok(client) = sandbox.client() {
            self.take_over_containers(sandbox, &client).await?;
            drop(guard);
            pods.watch(sandbox);
        }
        Ok(())
    }

    /// The init of a running CT, which may be one that hangs.
    async fn client(&self, id: &SandboxId) -> Client {
        let socket = self.pods.dirs.init_socket(id);
        Client::connect(&socket, HELLO).await.unwrap_or_else(|error| {
            warn!(sandbox = %id, %error, "the init of a running CT does not answer; it is asked again");
            Client::new(&socket)
        })
    }

    /// What the init knows of its containers, before anybody can ask: one that ran on must not look like one that never started.
    async fn take_over_containers(&self, sandbox: &Arc<Sandbox>, client: &Client) -> Result<()> {
        let Ok(known) = sandbox.answer("list", HELLO, client.list()).await else { return Ok(()) };
        let (state, containers) = (&self.pods.state, &self.pods.containers);
        let names: BTreeSet<String> = known.iter().map(|c| c.id.clone()).collect();
        for report in known {
            match state.container(&report.id) {
                Ok(container) if report.status == Status::Created => {
                    let cut = Error::State("the agent ended while the container was being started".into());
                    containers.not_started(sandbox, &container, &cut).await?;
                }
                Ok(_) => containers.reported(sandbox, report).await?,
                Err(_) => {
                    let Ok(id) = report.id.parse::<ContainerId>() else { continue };
                    warn!(sandbox = %sandbox.id, container = %id, "removing a container that the ledger does not know");
                    containers.remove_unknown(sandbox, &id).await?;
                }
            }
        }
        for container in state.containers_of(&sandbox.id) {
            if !names.contains(container.id.as_str()) {
                containers.lost(sandbox, &container).await?;
            }
        }
        Ok(())
    }

    /// Whether nothing is removed before pods are taken over: each removal would wait in vain for an engine with a fault.
    fn waits(&self) -> bool {
        self.pods.engine.fault().is_some()
    }

    /// Removes what no sandbox of the ledger owns.
    async fn strays(&self) {
        let pods = &self.pods;
        let known: BTreeSet<SandboxId> = pods.state.sandboxes().iter().map(|s| s.id.clone()).collect();
        for id in self.found().await.difference(&known) {
            info!(sandbox = %id, "removing what is left of a sandbox");
            if !self.waits() {
                match pods.remove_stray(id).await {
                    Ok(()) => continue,
                    Err(error) => {
                        warn!(sandbox = %id, error = chain(&error), "not wholly removed; it is tried again");
                    }
                }
            }
            pods.retries.add(Work::RemoveStray(id.clone()));
        }
    }

    /// Removes the roots that no container of the ledger owns: after sandboxes were taken over, since a container that the ledger does
    /// not know may run until then, and keeps its root busy.
    async fn stray_roots(&self) {
        let pods = &self.pods;
        let known: BTreeSet<ContainerId> = pods.state.containers().iter().map(|c| c.id.clone()).collect();
        let roots = match self.driver.roots().await {
            Ok(roots) => roots,
            Err(error) => return warn!(error = chain(&error), "cannot list the containers' roots"),
        };
        for id in roots.into_iter().filter(|id| !known.contains(id)) {
            info!(container = %id, "removing the root of a container that is gone");
            if let Err(error) = self.driver.remove_root(&id).await {
                warn!(container = %id, error = chain(&error), "not removed; it is tried again");
                pods.retries.add(Work::RemoveRoot(id));
            }
        }
    }

    /// Those that have an address and are no sandbox of the ledger, which is asked afterwards: one is in it before it has an address.
    async fn late_addresses(&self) -> Vec<SandboxId> {
        match self.pods.network.attached().await {
            Ok(all) => all.into_iter().filter(|id| !self.pods.state.knows(id)).collect(),
            Err(error) => {
                warn!(error = chain(&error), "cannot list the pods' addresses");
                Vec::new()
            }
        }
    }

    /// All sandboxes of which the host has something.
    async fn found(&self) -> BTreeSet<SandboxId> {
        let mut found = BTreeSet::new();
        match self.pods.engine.list().await {
            Ok(all) => found.extend(all.into_iter().map(|s| s.id)),
            Err(error) => warn!(error = chain(&error), "cannot list the CTs"),
        }
        if let Ok(entries) = fs::read_dir(&self.pods.dirs.pods) {
            found.extend(entries.flatten().filter_map(|e| e.file_name().to_str()?.parse::<SandboxId>().ok()));
        }
        match self.pods.network.attached().await {
            Ok(all) => found.extend(all),
            Err(error) => warn!(error = chain(&error), "cannot list the pods' addresses"),
        }
        found
    }

    /// Ends a CT that had ended and was started by somebody else, as a backup does with what it has stopped: its containers are gone for
    /// good, and the pod has another CT or is to have none. It is ended as soon as nobody holds it.
    async fn end_started(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        // Whoever changes it already does the same, or removes it.
        let Ok(_guard) = sandbox.change.try_lock() else { return Ok(()) };
        let engine = &*self.pods.engine;
        let runs = matches!(engine.state(&sandbox.id).await?, Some(SandboxState::Running { .. }));
        if !runs || sandbox.phase() != SandboxPhase::NotReady || engine.held_by(&sandbox.id).await?.is_some()
        {
            return Ok(());
        }
        self.pods.stop_parts(sandbox).await?;
        let message = "the pod's CT had ended and was started again on the host; it has none of the pod's containers and was ended";
        let observation = Observation {
            sandbox: Some(sandbox.id.clone()),
            reason: "CTStarted",
            warning: false,
            message: message.to_owned(),
            at_ns: now_ns(),
        };
        self.notices.tell(sandbox, observation).await;
        Ok(())
    }
}

/// Takes a report: what failed is done again later.
fn finished(queue: &mut Queue, (work, outcome): Outcome) {
    match outcome {
        Ok(()) => {
            queue.done(&work);
            match work {
                Work::EndStarted(_) => {}
                Work::CheckEngine => info!("the engine accepts new pods again"),
                work => info!("{work} has succeeded"),
            }
        }
        Err(error) if queue.failed(&work, std::time::Instant::now()) => {
            warn!(error = chain(&error), "{work} failed; it is tried again at growing intervals");
        }
        Err(error) => debug!(error = chain(&error), "{work} failed"),
    }
}

#[cfg(test)]
mod tests;
