//! One pod's worker: compares what the pod shall be with what the agent reports and has done what is missing.
//!
//! ```text
//!            ┌────── desired pod changes, agent reports, a wait is over ──────┐
//!            ▼                                                                │
//!   read the report ─▶ plan ─▶ status ─▶ kill ─▶ volumes ─▶ sandbox ─▶ start ─┘   until the plan is settled
//!            │
//!            └─ deleted, failed or at its own end ─▶ kill, status, (remove, DELETE) ─▶ done
//! ```

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use moxlet_cri::{host, v1};
use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{
    admission::{Admission, Rejection},
    backoffs::Backoffs,
    plan::{Goal, Plan, SandboxAction},
    registry::PodRegistry,
    state::PodState,
};
use crate::model::{names, resources};
use crate::{
    cluster::Cluster,
    config::Config,
    cri_client::Runtime,
    env::{fields::Facts, services::Services},
    error::{Error, Result, chain},
    events::{Kind, Recorder},
    metrics,
    status::{Publisher, Target},
    support,
    volumes::{Volumes, hosts},
};

/// How long the API server may take for the objects that a pod's volumes or environment are made of.
pub(super) const OBJECTS_DEADLINE: Duration = Duration::from_secs(30);
/// How many plans are carried out in a row before the worker looks up: more than the longest start needs.
const ROUNDS: usize = 256;

/// What all workers share.
pub(crate) struct Shared {
    /// The configuration.
    pub(crate) config: Config,
    /// The agent.
    pub(crate) agent: Arc<dyn Runtime>,
    /// The API server.
    pub(crate) cluster: Arc<dyn Cluster>,
    /// Services, for their variables.
    pub(crate) services: Services,
    /// The published copy.
    pub(crate) registry: PodRegistry,
    /// Events.
    pub(crate) events: Recorder,
    /// Facts of the host.
    pub(crate) info: watch::Receiver<Arc<host::InfoResponse>>,
    /// How many sandboxes and containers may be made at one time. Held through neither a pull nor a call of the API server.
    pub(crate) slots: Semaphore,
    /// The pods that the host has room for.
    pub(crate) admission: Admission,
}

impl Shared {
    /// Addresses of the node, most useful first.
    pub(crate) fn host_ips(&self) -> Vec<String> {
        match self.config.node_ip {
            Some(ip) => vec![ip.to_string()],
            None => self.info.borrow().addresses.iter().take(1).cloned().collect(),
        }
    }
}

/// What a pod shall be.
#[derive(Clone)]
pub(crate) struct Desired {
    /// The pod, as last seen.
    pub(crate) pod: Arc<Pod>,
    /// There is no such object any more.
    pub(crate) gone: bool,
    /// How long its containers have to end, where nobody asked for anything else.
    pub(crate) grace: Option<i64>,
    /// Name and UID under which its status is written.
    pub(crate) target: Target,
}

impl Desired {
    /// Whether the pod is to end.
    pub(crate) fn terminating(&self) -> bool {
        self.gone || self.pod.metadata.deletion_timestamp.is_some()
    }

    /// The grace its containers get.
    pub(crate) fn grace_seconds(&self) -> i64 {
        let spec = self.pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds);
        let asked = self.grace.or(self.pod.metadata.deletion_grace_period_seconds);
        asked.or(spec).unwrap_or(30).max(1)
    }
}

/// What comes after a pass.
pub(crate) enum Next {
    /// Wait for a change, or at most so long.
    Wait(Option<Duration>),
    /// The pod is gone, nothing is left of it.
    Done,
}

/// One pod's worker.
pub(crate) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) desired: watch::Receiver<Desired>,
    poke: Arc<Notify>,
    pub(super) backoffs: Backoffs,
    pub(super) waiting: HashMap<String, (String, String)>,
    pub(super) volumes: Volumes,
    pub(super) messages: HashMap<String, String>,
    pub(super) status: PodStatus,
    pub(super) publisher: Publisher,
    emitted: HashSet<String>,
    volumes_at: Option<Instant>,
    /// What the API server's objects had come to then.
    volumes_revision: u64,
    pub(super) first_seen: Instant,
    pub(super) counted: bool,
    pub(super) failure: Option<(String, String)>,
}

/// The sooner of two pauses.
fn sooner(a: Option<Duration>, b: Option<Duration>) -> Option<Duration> {
    a.into_iter().chain(b).min()
}

impl Worker {
    /// A worker that has not begun.
    pub(crate) fn new(shared: Arc<Shared>, desired: watch::Receiver<Desired>, poke: Arc<Notify>) -> Self {
        let first = desired.borrow().clone();
        let status = first.pod.status.clone().unwrap_or_default();
        let publisher = Publisher::new(shared.cluster.clone(), first.target);
        let counted = status.phase.as_deref().is_some_and(|p| p != "Pending");
        let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        if !ended && !first.gone && status.start_time.is_some() {
            shared.admission.keep(&first.pod);
        }
        Self {
            shared,
            desired,
            poke,
            backoffs: Backoffs::default(),
            waiting: HashMap::new(),
            volumes: Volumes::default(),
            messages: HashMap::new(),
            status,
            publisher,
            emitted: HashSet::new(),
            volumes_at: None,
            volumes_revision: 0,
            first_seen: Instant::now(),
            counted,
            failure: None,
        }
    }

    /// Works until the pod is gone or the node stops.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        loop {
            let desired = self.desired.borrow_and_update().clone();
            self.publisher.retarget(desired.target.clone());
            self.publisher.shown(&desired.pod);
            if let Some(why) = self.publisher.rejection() {
                let text = format!("The API server refuses the status of this pod: {why}");
                self.emit_event_once(&desired.pod, None, Kind::Warning, "FailedUpdateStatus", text);
            }
            let begun = Instant::now();
            let outcome = tokio::select! {
                () = stop.cancelled() => return,
                outcome = self.pass(&desired) => outcome,
            };
            let operation = if desired.terminating() { "kill" } else { "sync" };
            metrics::pod_synced(operation, begun.elapsed(), outcome.is_err());
            let pause = match outcome {
                Ok(Next::Done) => {
                    let pod = &desired.pod;
                    self.shared.admission.release(pod);
                    self.shared.registry.forget(names::namespace(pod), names::name(pod), names::uid(pod));
                    return;
                }
                Ok(Next::Wait(pause)) => {
                    self.backoffs.agent.succeeded();
                    pause
                }
                Err(error) => Some(self.pass_failed(&desired, &error)),
            };
            let timer = async {
                match pause {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                changed = self.desired.changed() => if changed.is_err() { return },
                () = self.poke.notified() => {}
                () = timer => {}
            }
        }
    }

    /// Makes known why a pass failed; how long the next one waits.
    fn pass_failed(&mut self, desired: &Desired, error: &Error) -> Duration {
        let text = chain(error);
        if desired.terminating() {
            let text = format!("error killing pod: {text}");
            self.shared.events.pod(&desired.pod, None, Kind::Warning, "FailedKillPod", text);
        }
        warn!(pod = %names::full(&desired.pod), error = %text, "the pod could not be synced; it is tried again");
        self.backoffs.agent.failed(Instant::now())
    }

    async fn pass(&mut self, desired: &Desired) -> Result<Next> {
        let state = PodState::read(self.shared.agent.as_ref(), names::uid(&desired.pod)).await?;
        if desired.terminating() {
            return Box::pin(self.terminate(desired, state)).await;
        }
        if self.has_ended() {
            return Box::pin(self.finish(&desired.pod, state)).await;
        }
        Box::pin(self.sync(&desired.pod, state)).await
    }

    fn has_ended(&self) -> bool {
        matches!(self.status.phase.as_deref(), Some("Succeeded" | "Failed"))
    }

    /// Emits an event of this pod, unless the same was emitted before.
    pub(super) fn emit_event_once(
        &mut self,
        pod: &Pod,
        container: Option<&str>,
        kind: Kind,
        reason: &'static str,
        message: String,
    ) {
        if self.emitted.len() < 1024
            && self.emitted.insert(format!("{reason}/{}/{message}", container.unwrap_or_default()))
        {
            self.shared.events.pod(pod, container, kind, reason, message);
        }
    }

    /// What the downward API may say.
    pub(super) fn facts(&self, ips: &[String]) -> Facts {
        let info = self.shared.info.borrow();
        Facts {
            node_name: self.shared.config.node_name.clone(),
            host_ips: self.shared.host_ips(),
            pod_ips: ips.to_vec(),
            allocatable_cpus: info.cpus,
            allocatable_memory: info.memory_bytes.saturating_sub(info.memory_reserved_bytes),
            allocatable_storage: info.ephemeral_storage_bytes,
        }
    }

    /// Whether the pod asks for what this node cannot honour: it then waits, and says why, before anything of it is made.
    async fn refuse(&mut self, pod: &Pod, state: &PodState) -> bool {
        let refused = support::refusals(pod);
        if refused.is_empty() {
            return false;
        }
        let message = format!("not supported by this node: {}", refused.join(", "));
        self.emit_event_once(pod, None, Kind::Warning, "UnsupportedField", message.clone());
        for c in resources::all_containers(pod) {
            self.waiting.insert(c.name.clone(), ("UnsupportedField".into(), message.clone()));
        }
        self.report(pod, state, false).await;
        true
    }

    /// Why the pod is failed before anything of it is made.
    fn rejected(&self, pod: &Pod) -> Option<Rejection> {
        let shared = &self.shared;
        let fits = || shared.admission.admit(pod, &shared.info.borrow(), shared.config.max_pods).err();
        support::rejection(pod).or_else(fits)
    }

    /// How long the pod may still be active, where it has a deadline.
    fn deadline(&self, pod: &Pod) -> Option<Duration> {
        let seconds = pod.spec.as_ref()?.active_deadline_seconds?;
        let begun = self.status.start_time.as_ref()?.0;
        let passed = Timestamp::now().as_second() - begun.as_second();
        Some(Duration::from_secs(u64::try_from(seconds - passed).unwrap_or(0)))
    }

    async fn sync(&mut self, pod: &Pod, mut state: PodState) -> Result<Next> {
        if state.sandboxes.is_empty() {
            if let Some(rejection) = self.rejected(pod) {
                let text = rejection.message.clone();
                self.emit_event_once(pod, None, Kind::Warning, rejection.reason, text);
                let message = format!("Pod was rejected: {}", rejection.message);
                self.failure = Some((rejection.reason.to_owned(), message));
                return self.finish(pod, state).await;
            }
            if self.refuse(pod, &state).await {
                return Ok(Next::Wait(None));
            }
        }
        let deadline = self.deadline(pod);
        if deadline.is_some_and(|left| left.is_zero()) {
            let message = "Pod was active on the node longer than the specified deadline";
            self.shared.events.pod(pod, None, Kind::Normal, "DeadlineExceeded", message);
            self.failure = Some(("DeadlineExceeded".into(), message.into()));
            return self.finish(pod, state).await;
        }
        for _ in 0..ROUNDS {
            let plan = self.plan_and_report(pod, &state).await;
            if self.has_ended() {
                return self.finish(pod, state).await;
            }
            if !plan.kill.is_empty() {
                self.kill(pod, &plan.kill).await?;
            }
            let ips = state.sandbox().filter(|s| s.ready).map(|s| s.ips.clone()).unwrap_or_default();
            if let Some(pause) = self.volumes_missing(pod, &ips).await {
                return Ok(Next::Wait(sooner(Some(pause), deadline)));
            }
            if let SandboxAction::Create { attempt, stop, remove } = &plan.sandbox {
                if !self.create_sandbox(pod, *attempt, stop, remove).await {
                    let pause = self.backoffs.sandbox.remaining(Instant::now()).unwrap_or_default();
                    return Ok(Next::Wait(sooner(Some(pause), deadline)));
                }
            } else if ips.is_empty() {
                return Ok(Next::Wait(sooner(plan.wake, deadline)));
            }
            let acted =
                !plan.kill.is_empty() || plan.sandbox != SandboxAction::Keep || !plan.start.is_empty();
            self.start_containers(pod, &plan, &mut state, &ips).await?;
            self.collect(&plan).await;
            if self.desired.borrow().terminating() {
                return Ok(Next::Wait(None));
            }
            if !acted {
                let refresh = Some(self.shared.config.volume_refresh);
                return Ok(Next::Wait(sooner(sooner(plan.wake, deadline), refresh)));
            }
            state = PodState::read(self.shared.agent.as_ref(), names::uid(pod)).await?;
        }
        // Something undoes what is done: the others come first.
        Ok(Next::Wait(Some(self.backoffs.agent.failed(Instant::now()))))
    }

    /// Plans, and makes the status known that goes with it.
    async fn plan_and_report(&mut self, pod: &Pod, state: &PodState) -> Plan {
        let plan = self.plan(pod, Goal::Run, state);
        debug!(pod = %names::full(pod), %plan, "planned");
        let waiting = plan.waiting.iter();
        self.waiting =
            waiting.map(|(name, w)| (name.clone(), (w.reason.to_owned(), w.message.clone()))).collect();
        self.report(pod, state, false).await;
        for (name, _) in plan.waiting.iter().filter(|(_, w)| w.reason == "CrashLoopBackOff") {
            self.emit_back_off(pod, name);
        }
        plan
    }

    /// Starts what the plan says, in a sandbox that runs; the report is newer afterwards.
    async fn start_containers(
        &mut self,
        pod: &Pod,
        plan: &Plan,
        state: &mut PodState,
        ips: &[String],
    ) -> Result<()> {
        if ips.is_empty() {
            return Ok(());
        }
        let agent = self.shared.agent.clone();
        let text = hosts::hosts_file(pod, ips, &self.shared.config.cluster_domain);
        let hosts_path = self.volumes.apply_hosts(agent.as_ref(), pod, text).await?;
        for start in &plan.start {
            if self.desired.borrow().terminating() {
                return Ok(());
            }
            let Some(spec) = resources::all_containers(pod).find(|c| c.name == start.name) else { continue };
            self.start(pod, spec, start, state, &hosts_path).await;
            *state = PodState::read(agent.as_ref(), names::uid(pod)).await?;
            self.plan_and_report(pod, state).await;
        }
        Ok(())
    }

    /// Makes the pod's volumes or refreshes them where they are due. Answers how long to wait where they are missing.
    async fn volumes_missing(&mut self, pod: &Pod, ips: &[String]) -> Option<Duration> {
        let shared = self.shared.clone();
        let refresh = shared.config.volume_refresh;
        let revision = shared.cluster.revision(names::uid(pod));
        let changed = std::mem::replace(&mut self.volumes_revision, revision) != revision;
        if !ips.is_empty() && !changed && self.volumes_at.is_some_and(|at| at.elapsed() < refresh) {
            return None;
        }
        // What was missing may be there now.
        if let Some(left) = self.backoffs.volumes.remaining(Instant::now()).filter(|_| !changed) {
            return Some(left);
        }
        if ips.is_empty() {
            // What the agent has may have gone with its host.
            self.volumes.forget_sent();
        }
        let facts = self.facts(ips);
        let applied = self.volumes.apply(shared.agent.as_ref(), shared.cluster.as_ref(), pod, &facts);
        let outcome = match tokio::time::timeout(OBJECTS_DEADLINE, applied).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::Deadline { what: "the pod's volumes", seconds: OBJECTS_DEADLINE.as_secs() }),
        };
        match outcome {
            Ok(()) => {
                self.backoffs.volumes.succeeded();
                self.volumes_at = Some(Instant::now());
                None
            }
            Err(error) if self.volumes_at.is_some() => {
                // A refresh that fails leaves what is there; containers go on.
                debug!(pod = %names::full(pod), error = %chain(&error), "volumes are not refreshed");
                self.volumes_at = Some(Instant::now());
                None
            }
            Err(error) => {
                // A pod may be seen here before the API server knows it everywhere, as where its token is asked for: a first failure
                // is tried again without a word.
                if self.backoffs.volumes.has_failed() {
                    shared.events.pod(pod, None, Kind::Warning, "FailedMount", chain(&error));
                } else {
                    debug!(pod = %names::full(pod), error = %chain(&error), "volumes are not there yet");
                }
                Some(self.backoffs.volumes.failed(Instant::now()))
            }
        }
    }

    /// Removes dead containers and sandboxes that nobody needs; what cannot be removed is tried again at the next pass.
    async fn collect(&self, plan: &Plan) {
        let agent = self.shared.agent.as_ref();
        for id in &plan.remove_containers {
            let request = v1::RemoveContainerRequest { container_id: id.clone() };
            if let Err(error) = agent.remove_container(request).await {
                debug!(error = %chain(&error), "an old container is not removed");
            }
        }
        for id in &plan.remove_sandboxes {
            let request = v1::RemovePodSandboxRequest { pod_sandbox_id: id.clone() };
            if let Err(error) = agent.remove_pod_sandbox(request).await {
                debug!(error = %chain(&error), "an old sandbox is not removed");
            }
        }
    }
}
