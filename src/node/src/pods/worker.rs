//! One pod's worker: compares what the pod shall be with what the agent reports and does what is missing.
//!
//! ```text
//!            ┌────────── desired pod changes, agent reports, a wait is over ─────────┐
//!            ▼                                                                       │
//!   read state ─▶ refused? ─▶ ended? ─▶ sandbox ∥ volumes ─▶ init containers ─▶ containers
//!            │                  │
//!            └─ being deleted ──┴─▶ stop, status, remove, DELETE ─▶ done
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
    backoff::Backoff,
    names,
    registry::PodRegistry,
    resources, restart, sandbox,
    state::{Phase, PodState, Sandbox},
};
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

/// The key of a pod's sandbox among its containers' names, none of which it can be.
const SANDBOX: &str = "\0sandbox";

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
    /// How many pods may be worked on at one time.
    pub(crate) slots: Semaphore,
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
    pub(super) backoff: Backoff,
    pub(super) image_backoff: Backoff,
    pub(super) image_failures: HashMap<String, (Timestamp, String)>,
    pub(super) waiting: HashMap<String, (String, String)>,
    /// Until when a container that could not be made is not tried again.
    pub(super) held: HashMap<String, Instant>,
    pub(super) volumes: Volumes,
    pub(super) messages: HashMap<String, String>,
    pub(super) status: PodStatus,
    pub(super) publisher: Publisher,
    pub(super) said: HashSet<String>,
    volumes_at: Option<Instant>,
    /// What the API server's objects had come to then.
    volumes_revision: u64,
    pub(super) first_seen: Instant,
    pub(super) counted: bool,
    pub(super) failure: Option<(String, String)>,
    failures: u32,
    sandbox_failures: u32,
}

fn least(a: &mut Option<Duration>, b: Duration) {
    *a = Some(a.map_or(b, |a| a.min(b)));
}

impl Worker {
    /// A worker that has not begun.
    pub(crate) fn new(shared: Arc<Shared>, desired: watch::Receiver<Desired>, poke: Arc<Notify>) -> Self {
        let first = desired.borrow().clone();
        let status = first.pod.status.clone().unwrap_or_default();
        let publisher = Publisher::new(shared.cluster.clone(), first.target);
        let counted = status.phase.as_deref().is_some_and(|p| p != "Pending");
        Self {
            shared,
            desired,
            poke,
            backoff: Backoff::default(),
            image_backoff: Backoff::default(),
            image_failures: HashMap::new(),
            waiting: HashMap::new(),
            held: HashMap::new(),
            volumes: Volumes::default(),
            messages: HashMap::new(),
            status,
            publisher,
            said: HashSet::new(),
            volumes_at: None,
            volumes_revision: 0,
            first_seen: Instant::now(),
            counted,
            failure: None,
            failures: 0,
            sandbox_failures: 0,
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
                self.say_once(&desired.pod, None, Kind::Warning, "FailedUpdateStatus", text);
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
                    self.shared.registry.forget(names::namespace(pod), names::name(pod), names::uid(pod));
                    return;
                }
                Ok(Next::Wait(pause)) => {
                    self.failures = 0;
                    pause
                }
                Err(error) => {
                    self.failures = (self.failures + 1).min(6);
                    if desired.terminating() {
                        let text = format!("error killing pod: {}", chain(&error));
                        self.shared.events.pod(&desired.pod, None, Kind::Warning, "FailedKillPod", text);
                    }
                    warn!(pod = %names::full(&desired.pod), error = %chain(&error), "pass failed, will try again");
                    Some(Duration::from_millis(250) * 2_u32.pow(self.failures))
                }
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

    async fn pass(&mut self, desired: &Desired) -> Result<Next> {
        let shared = self.shared.clone();
        let state = PodState::read(shared.agent.as_ref(), names::uid(&desired.pod)).await?;
        if desired.terminating() {
            return self.terminate(desired, state).await;
        }
        if matches!(self.status.phase.as_deref(), Some("Succeeded" | "Failed")) {
            return self.finish(&desired.pod, state).await;
        }
        let _slot = shared.slots.acquire().await;
        self.sync(&desired.pod, state).await
    }

    /// A pod that has ended: its sandbox is stopped, its logs stay until it is deleted.
    async fn finish(&mut self, pod: &Pod, state: PodState) -> Result<Next> {
        let running: Vec<_> =
            state.containers.iter().filter(|c| c.phase == Phase::Running).map(|c| c.id.clone()).collect();
        let grace = self.desired.borrow().grace_seconds();
        futures::future::try_join_all(running.iter().map(|id| self.shared.agent.stop_container(id, grace)))
            .await?;
        for s in state.sandboxes.iter().filter(|s| s.ready) {
            self.shared
                .agent
                .stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: s.id.clone() })
                .await?;
        }
        let state = if running.is_empty() && !state.sandboxes.iter().any(|s| s.ready) {
            state
        } else {
            PodState::read(self.shared.agent.as_ref(), names::uid(pod)).await?
        };
        self.report(pod, &state, true).await;
        Ok(Next::Wait(None))
    }

    /// Says something to this pod once.
    pub(super) fn say_once(
        &mut self,
        pod: &Pod,
        container: Option<&str>,
        kind: Kind,
        reason: &'static str,
        message: String,
    ) {
        if self.said.len() < 1024
            && self.said.insert(format!("{reason}/{}/{message}", container.unwrap_or_default()))
        {
            self.shared.events.pod(pod, container, kind, reason, message);
        }
    }

    /// What the downward API may tell.
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

    async fn sync(&mut self, pod: &Pod, mut state: PodState) -> Result<Next> {
        let mut next = None;
        if state.sandboxes.is_empty() {
            let refused = support::refusals(pod);
            if !refused.is_empty() {
                let message = format!("not supported by this node: {}", refused.join(", "));
                self.say_once(pod, None, Kind::Warning, "UnsupportedField", message.clone());
                for c in resources::all_containers(pod) {
                    self.waiting.insert(c.name.clone(), ("UnsupportedField".into(), message.clone()));
                }
                self.report(pod, &state, false).await;
                return Ok(Next::Wait(None));
            }
        }
        if pod.spec.as_ref().is_some_and(|s| s.ephemeral_containers.as_ref().is_some_and(|e| !e.is_empty())) {
            let message = "not supported by this node: spec.ephemeralContainers".to_owned();
            self.say_once(pod, None, Kind::Warning, "UnsupportedField", message);
        }
        if let Some(left) = self.deadline(pod) {
            if left.is_zero() {
                let message = "Pod was active on the node longer than the specified deadline";
                self.shared.events.pod(pod, None, Kind::Normal, "DeadlineExceeded", message);
                self.failure = Some(("DeadlineExceeded".into(), message.into()));
                return self.finish(pod, state).await;
            }
            least(&mut next, left);
        }
        self.report(pod, &state, false).await;
        if matches!(self.status.phase.as_deref(), Some("Succeeded" | "Failed")) {
            return self.finish(pod, state).await;
        }

        let changed = self.sandbox_and_volumes(pod, &mut state).await?;
        let ips = match changed {
            Ready::Yes(ips) => ips,
            Ready::Later(pause) => {
                self.report(pod, &state, false).await;
                least(&mut next, pause);
                return Ok(Next::Wait(next));
            }
        };
        let text = hosts::hosts_file(pod, &ips, &self.shared.config.cluster_domain);
        let agent = self.shared.agent.clone();
        let hosts_path = self.volumes.apply_hosts(agent.as_ref(), pod, text).await?;
        self.run_containers(pod, &mut state, &ips, &hosts_path, &mut next).await?;
        self.collect(pod, &state).await;
        self.report(pod, &state, false).await;
        if matches!(self.status.phase.as_deref(), Some("Succeeded" | "Failed")) {
            return self.finish(pod, state).await;
        }
        least(&mut next, self.shared.config.volume_refresh);
        Ok(Next::Wait(next))
    }

    fn deadline(&self, pod: &Pod) -> Option<Duration> {
        let seconds = pod.spec.as_ref()?.active_deadline_seconds?;
        let begun = self.status.start_time.as_ref()?.0;
        let passed = Timestamp::now().as_second() - begun.as_second();
        Some(Duration::from_secs(u64::try_from(seconds - passed).unwrap_or(0)))
    }

    /// Sees to a running sandbox and, beside it, to the volumes.
    async fn sandbox_and_volumes(&mut self, pod: &Pod, state: &mut PodState) -> Result<Ready> {
        let running = state.sandbox().filter(|s| s.ready && !s.ips.is_empty()).map(|s| s.ips.clone());
        let shared = self.shared.clone();
        if let (None, Some(until)) = (&running, self.held.get(SANDBOX)) {
            let left = until.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                return Ok(Ready::Later(left));
            }
        }
        let facts = self.facts(running.as_deref().unwrap_or_default());
        let revision = shared.cluster.revision(names::uid(pod));
        let due = running.is_none()
            || self.volumes_at.is_none_or(|at| at.elapsed() >= shared.config.volume_refresh)
            || self.volumes_revision != revision;
        let mut volumes = std::mem::take(&mut self.volumes);
        if running.is_none() {
            volumes.forget_sent();
        }
        let volumes_done = async {
            if due {
                volumes.apply(shared.agent.as_ref(), shared.cluster.as_ref(), pod, &facts).await
            } else {
                Ok(())
            }
        };
        let (volumes_outcome, sandbox_outcome) = match running {
            Some(ips) => (volumes_done.await, Ok(ips)),
            None => tokio::join!(volumes_done, self.make_sandbox(pod, state)),
        };
        self.volumes = volumes;
        let ips = match sandbox_outcome {
            Ok(ips) => ips,
            Err(error) => {
                let text = format!("Failed to create pod sandbox: {}", chain(&error));
                shared.events.pod(pod, None, Kind::Warning, "FailedCreatePodSandBox", text);
                let left = self.retry_sandbox();
                self.held.insert(SANDBOX.to_owned(), Instant::now() + left);
                return Ok(Ready::Later(left));
            }
        };
        self.sandbox_failures = 0;
        self.held.remove(SANDBOX);
        match volumes_outcome {
            Ok(()) => {
                if due {
                    self.volumes_at = Some(Instant::now());
                    self.volumes_revision = revision;
                }
                Ok(Ready::Yes(ips))
            }
            Err(error) if self.volumes_at.is_some() => {
                // A refresh that fails leaves what is there; containers go on.
                debug!(error = %chain(&error), "volumes not refreshed");
                self.volumes_at = Some(Instant::now());
                self.volumes_revision = revision;
                Ok(Ready::Yes(ips))
            }
            Err(error) => {
                shared.events.pod(pod, None, Kind::Warning, "FailedMount", chain(&error));
                let pause = self.retry_volumes();
                Ok(Ready::Later(pause))
            }
        }
    }

    /// A second, doubling to a minute: what a sandbox lacks is often the node's own that is just being made.
    fn retry_sandbox(&mut self) -> Duration {
        self.sandbox_failures = (self.sandbox_failures + 1).min(7);
        Duration::from_secs(60).min(Duration::from_secs(1) * 2_u32.pow(self.sandbox_failures - 1))
    }

    /// The kubelet's pace for mounts: half a second, doubling to two minutes.
    fn retry_volumes(&mut self) -> Duration {
        self.failures = (self.failures + 1).min(8);
        Duration::from_millis(500) * 2_u32.pow(self.failures - 1)
    }

    async fn make_sandbox(&mut self, pod: &Pod, state: &mut PodState) -> Result<Vec<String>> {
        let shared = self.shared.clone();
        let agent = shared.agent.as_ref();
        let mut attempt = 0;
        if let Some(newest) = state.sandbox() {
            attempt = newest.attempt + 1;
            shared.events.pod(
                pod,
                None,
                Kind::Normal,
                "SandboxChanged",
                "Pod sandbox changed, it will be killed and re-created.",
            );
            for s in &state.sandboxes {
                agent.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: s.id.clone() }).await?;
            }
            // What came of a start that failed has an address and a number that the next one may need.
            self.remove_emptied(&state.sandboxes, state).await?;
        }
        let info = shared.info.borrow().clone();
        let config = sandbox::config(
            pod,
            attempt,
            &shared.config,
            &info.pod_logs_dir,
            info.sandbox_overhead_memory_bytes,
            &info.resolv_conf,
        )?;
        agent
            .run_pod_sandbox(v1::RunPodSandboxRequest {
                config: Some(config),
                runtime_handler: String::new(),
            })
            .await?;
        *state = PodState::read(agent, names::uid(pod)).await?;
        self.remove_emptied(state.sandboxes.get(1..).unwrap_or_default(), state).await?;
        match state.sandbox().filter(|s| s.ready) {
            Some(s) => Ok(s.ips.clone()),
            None => Err(Error::AgentAnswer { call: "PodSandboxStatus", what: "a running sandbox" }),
        }
    }

    /// Removes those of the stopped sandboxes that have no containers: the others are kept for as long as their containers are
    /// anybody's last state.
    async fn remove_emptied(&self, stopped: &[Sandbox], state: &PodState) -> Result<()> {
        for s in stopped.iter().filter(|s| !state.containers.iter().any(|c| c.sandbox == s.id)) {
            let request = v1::RemovePodSandboxRequest { pod_sandbox_id: s.id.clone() };
            self.shared.agent.remove_pod_sandbox(request).await?;
        }
        Ok(())
    }

    /// Init containers in their order, then all others.
    async fn run_containers(
        &mut self,
        pod: &Pod,
        state: &mut PodState,
        ips: &[String],
        hosts_path: &str,
        next: &mut Option<Duration>,
    ) -> Result<()> {
        let Some(current) = state.sandbox().map(|s| s.id.clone()) else { return Ok(()) };
        let spec = pod.spec.clone().unwrap_or_default();
        let begun =
            spec.containers.iter().any(|c| state.newest(&c.name).is_some_and(|n| n.sandbox == current));
        if !begun {
            for container in spec.init_containers.iter().flatten() {
                let newest = state.newest(&container.name).filter(|n| n.sandbox == current).cloned();
                match newest {
                    Some(n) if n.phase == Phase::Exited && n.exit_code == 0 => continue,
                    Some(n) if !restart::wanted_init(pod, &n) => return Ok(()),
                    _ => {}
                }
                self.start(pod, container, state, ips, hosts_path, next).await?;
                return Ok(());
            }
        }
        for container in &spec.containers {
            let newest = state.newest(&container.name);
            // With OnFailure what has succeeded is not run again in a new sandbox.
            let over = newest.is_some_and(|n| {
                n.phase == Phase::Exited
                    && (n.sandbox == current || restart::policy(pod) == "OnFailure")
                    && !restart::wanted(pod, n)
            });
            let running = newest.filter(|n| n.sandbox == current && n.phase == Phase::Running).cloned();
            // The image is the one thing of a running pod's container that may be changed.
            let outdated = running.as_ref().filter(|n| Some(&n.image) != container.image.as_ref());
            if let Some(outdated) = outdated {
                let text = format!("Container {} definition changed, will be restarted", container.name);
                self.shared.events.pod(pod, Some(&container.name), Kind::Normal, "Killing", text);
                let grace = self.desired.borrow().grace_seconds();
                self.shared.agent.stop_container(&outdated.id, grace).await?;
                *state = PodState::read(self.shared.agent.as_ref(), names::uid(pod)).await?;
            }
            if (!over && running.is_none()) || outdated.is_some() {
                self.start(pod, container, state, ips, hosts_path, next).await?;
                self.report(pod, state, false).await;
            }
            if self.desired.borrow().terminating() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Keeps one dead container of each name beside the newest, removes the older ones and emptied sandboxes.
    async fn collect(&self, pod: &Pod, state: &PodState) {
        let agent = self.shared.agent.as_ref();
        let mut kept = HashSet::new();
        for c in resources::all_containers(pod) {
            let history: Vec<_> = state.history(&c.name).collect();
            let keep = if history.first().is_some_and(|n| n.phase == Phase::Exited) { 1 } else { 2 };
            // A newest one that has ended is itself the one to look back at, but its status shows the one before it.
            for (index, old) in history.iter().enumerate() {
                if index < keep.max(2) || old.phase == Phase::Running {
                    kept.insert(old.sandbox.clone());
                } else if let Err(error) =
                    agent.remove_container(v1::RemoveContainerRequest { container_id: old.id.clone() }).await
                {
                    debug!(error = %chain(&error), "old container not removed");
                    kept.insert(old.sandbox.clone());
                }
            }
        }
        for s in state.sandboxes.iter().skip(1).filter(|s| !kept.contains(&s.id)) {
            if let Err(error) =
                agent.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: s.id.clone() }).await
            {
                debug!(error = %chain(&error), "old sandbox not removed");
            }
        }
    }
}

enum Ready {
    Yes(Vec<String>),
    Later(Duration),
}
