//! A pod's status, computed from its spec, what the agent reports and what holds its containers up; nothing is asked here.

use std::collections::HashMap;

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{
        Container as Spec, ContainerState, ContainerStateRunning, ContainerStateTerminated,
        ContainerStateWaiting, ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodStatus,
        VolumeMountStatus,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};

use super::{
    restart,
    state::{Container, Phase, PodState},
};
use crate::model::resources;
use crate::{
    status::{RESIZE_PENDING, SUPPORTED},
    support,
};

/// What a status is made of beside the pod and its state.
#[derive(Default)]
pub(crate) struct Inputs<'a> {
    /// Why containers wait: reason and message by name.
    pub(crate) waiting: HashMap<String, (String, String)>,
    /// Termination messages by container id.
    pub(crate) messages: HashMap<String, String>,
    /// Addresses of the node.
    pub(crate) host_ips: &'a [String],
    /// The pod has come to its end: its containers will not be started again.
    pub(crate) ended: bool,
    /// Why the pod as a whole failed: reason and message.
    pub(crate) failure: Option<(String, String)>,
    /// Name of the runtime in container ids.
    pub(crate) runtime: &'a str,
}

/// A UNIX time in nanoseconds as the API writes it; zero is no time.
pub(crate) fn time(nanos: i64) -> Option<Time> {
    if nanos <= 0 {
        return None;
    }
    Timestamp::from_second(nanos / 1_000_000_000).ok().map(Time)
}

fn now() -> Time {
    Time(Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default())
}

fn id(runtime: &str, container: &Container) -> String {
    format!("{runtime}://{}", container.id)
}

fn terminated(c: &Container, inputs: &Inputs<'_>) -> ContainerStateTerminated {
    let note = inputs.messages.get(&c.id).map_or("", String::as_str);
    let message = match (c.message.as_str(), note) {
        ("", note) => note.to_owned(),
        (own, "") => own.to_owned(),
        (own, note) => format!("{own}: {note}"),
    };
    let reason = match (c.reason.as_str(), c.exit_code) {
        ("", 0) => "Completed",
        ("", _) => "Error",
        (reason, _) => reason,
    };
    ContainerStateTerminated {
        exit_code: c.exit_code,
        reason: Some(reason.to_owned()),
        message: (!message.is_empty()).then_some(message),
        started_at: Some(time(c.started_at).unwrap_or(Time(Timestamp::UNIX_EPOCH))),
        finished_at: Some(time(c.finished_at).unwrap_or(Time(Timestamp::UNIX_EPOCH))),
        container_id: Some(id(inputs.runtime, c)),
        signal: None,
    }
}

fn waiting(reason: &str, message: &str) -> ContainerState {
    ContainerState {
        waiting: Some(ContainerStateWaiting {
            reason: Some(reason.to_owned()),
            message: (!message.is_empty()).then(|| message.to_owned()),
        }),
        ..ContainerState::default()
    }
}

fn lost() -> ContainerState {
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            reason: Some("ContainerStatusUnknown".into()),
            message: Some("The container could not be located when the pod was terminated".into()),
            exit_code: 137,
            ..ContainerStateTerminated::default()
        }),
        ..ContainerState::default()
    }
}

fn container(
    pod: &Pod,
    spec: &Spec,
    state: &PodState,
    old: Option<&ContainerStatus>,
    inputs: &Inputs<'_>,
    init: bool,
) -> ContainerStatus {
    let mut status = unmade(pod, spec);
    let mut all = state.history(&spec.name);
    let newest = all.next();
    if let Some(c) = newest {
        made(&mut status, c, inputs, init);
        // What a container has is what it was made with; resources that the pod asks for since then are not its own.
        if let Some(old) = old.filter(|o| o.container_id == status.container_id) {
            status.resources = old.resources.clone().or(status.resources);
            status.allocated_resources = old.allocated_resources.clone().or(status.allocated_resources);
        }
        status.last_state = all
            .find(|c| c.phase == Phase::Exited)
            .map(|c| ended(c, inputs))
            .or_else(|| old.filter(|o| o.restart_count == status.restart_count)?.last_state.clone());
    } else if let Some(old) = old {
        forgotten(&mut status, old, inputs.ended || restart::policy(pod) == "Never", init);
    }
    // What will be started again waits, with the reason; how it ended is its last state.
    let over = init && newest.is_some_and(|c| c.phase == Phase::Exited && c.exit_code == 0);
    let again = !inputs.ended && !over && newest.is_none_or(|c| restart::wanted(pod, c));
    if let (true, Some((reason, message))) = (again, inputs.waiting.get(&spec.name)) {
        if let Some(state) = status.state.take().filter(|s| s.terminated.is_some()) {
            status.last_state = Some(state);
        }
        status.state = Some(waiting(reason, message));
        status.ready = false;
    }
    if status.last_state.is_none() {
        status.last_state = Some(ContainerState::default());
    }
    status
}

/// What is known of a container by its pod alone.
fn unmade(pod: &Pod, spec: &Spec) -> ContainerStatus {
    let has_init =
        pod.spec.as_ref().is_some_and(|s| s.init_containers.as_ref().is_some_and(|i| !i.is_empty()));
    let mounts: Vec<_> = spec
        .volume_mounts
        .iter()
        .flatten()
        .map(|m| VolumeMountStatus {
            name: m.name.clone(),
            mount_path: m.mount_path.clone(),
            read_only: m.read_only,
            recursive_read_only: (m.read_only == Some(true)).then(|| "Disabled".to_owned()),
            ..VolumeMountStatus::default()
        })
        .collect();
    ContainerStatus {
        name: spec.name.clone(),
        image: spec.image.clone().unwrap_or_default(),
        state: Some(waiting(if has_init { "PodInitializing" } else { "ContainerCreating" }, "")),
        volume_mounts: (!mounts.is_empty()).then_some(mounts),
        started: Some(false),
        allocated_resources: spec.resources.as_ref().and_then(|r| r.requests.clone()),
        resources: Some(spec.resources.clone().unwrap_or_default()),
        ..ContainerStatus::default()
    }
}

/// What the agent says of a container.
fn made(status: &mut ContainerStatus, c: &Container, inputs: &Inputs<'_>, init: bool) {
    status.restart_count = i32::try_from(c.attempt).unwrap_or(i32::MAX);
    status.image = c.image.clone();
    status.image_id = c.image_ref.clone();
    status.container_id = Some(id(inputs.runtime, c));
    status.state = Some(match c.phase {
        Phase::Running => ContainerState {
            running: Some(ContainerStateRunning { started_at: time(c.started_at) }),
            ..ContainerState::default()
        },
        Phase::Exited => ended(c, inputs),
        Phase::Created => waiting("ContainerCreating", ""),
        Phase::Unknown => lost(),
    });
    let completed = c.phase == Phase::Exited && c.exit_code == 0;
    status.ready = if init { completed } else { c.phase == Phase::Running };
    status.started = Some(c.phase == Phase::Running);
}

fn ended(c: &Container, inputs: &Inputs<'_>) -> ContainerState {
    ContainerState { terminated: Some(terminated(c, inputs)), ..ContainerState::default() }
}

/// What the last status says of a container that the agent does not know; `over`: it is not made again.
fn forgotten(status: &mut ContainerStatus, old: &ContainerStatus, over: bool, init: bool) {
    status.restart_count = old.restart_count;
    status.last_state = old.last_state.clone();
    if let Some(t) = old.state.as_ref().and_then(|s| s.terminated.clone()) {
        status.state = old.state.clone();
        status.image_id = old.image_id.clone();
        status.container_id = old.container_id.clone();
        status.ready = init && t.exit_code == 0;
    } else if old.state.as_ref().is_some_and(|s| s.running.is_some()) {
        // It ran and is gone: that it ended is all that is known.
        if over {
            status.state = Some(lost());
        } else {
            status.last_state = Some(lost());
        }
    }
}

fn exit_code(state: Option<&ContainerState>) -> Option<i32> {
    state.and_then(|s| s.terminated.as_ref()).map(|t| t.exit_code)
}

/// Whether all init containers have come to a good end, or a container after them was started.
fn initialized(inits: &[ContainerStatus], mains: &[ContainerStatus]) -> bool {
    let begun = |s: &ContainerStatus| {
        exit_code(s.last_state.as_ref()).is_some() || s.state.as_ref().is_some_and(|s| s.waiting.is_none())
    };
    inits.is_empty()
        || mains.iter().any(begun)
        || inits.iter().all(|s| exit_code(s.state.as_ref()) == Some(0))
}

/// The pod's phase by its containers'.
fn phase(pod: &Pod, inits: &[ContainerStatus], mains: &[ContainerStatus], ended: bool) -> &'static str {
    let policy = restart::policy(pod);
    let again = |code: i32| policy == "Always" || policy == "OnFailure" && code != 0;
    let mut pending_init = false;
    for s in inits {
        let code = exit_code(s.state.as_ref()).or_else(|| {
            s.state.as_ref().filter(|s| s.waiting.is_some()).and(exit_code(s.last_state.as_ref()))
        });
        match code {
            Some(0) => {}
            Some(_) if policy == "Never" => return "Failed",
            Some(_) | None => pending_init = true,
        }
    }
    let (mut running, mut stopped, mut succeeded, mut final_, mut none) = (0, 0, 0, 0, 0);
    for s in mains {
        let state = s.state.clone().unwrap_or_default();
        if state.running.is_some() {
            running += 1;
        } else if let Some(code) = exit_code(s.state.as_ref()) {
            stopped += 1;
            succeeded += usize::from(code == 0);
            final_ += usize::from(!again(code));
        } else if let Some(code) = exit_code(s.last_state.as_ref()) {
            stopped += 1;
            final_ += usize::from(!again(code));
        } else {
            none += 1;
        }
    }
    if pending_init && !mains.iter().any(|s| s.state.as_ref().is_some_and(|s| s.waiting.is_none()))
        || none > 0
    {
        return "Pending";
    }
    if running > 0 {
        return "Running";
    }
    if stopped == 0 {
        return "Pending";
    }
    if !ended && stopped != final_ {
        return "Running";
    }
    if stopped == succeeded { "Succeeded" } else { "Failed" }
}

struct Conditions<'a> {
    old: &'a [PodCondition],
    new: Vec<PodCondition>,
    generation: Option<i64>,
}

impl Conditions<'_> {
    fn add(&mut self, kind: &str, holds: bool, reason: &str, message: &str) {
        let status = if holds { "True" } else { "False" };
        let old = self.old.iter().find(|c| c.type_ == kind);
        let since = old
            .filter(|c| c.status == status)
            .and_then(|c| c.last_transition_time.clone())
            .unwrap_or_else(now);
        self.new.push(PodCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            last_transition_time: Some(since),
            reason: (!reason.is_empty()).then(|| reason.to_owned()),
            message: (!message.is_empty()).then(|| message.to_owned()),
            observed_generation: self.generation,
            ..PodCondition::default()
        });
    }

    /// Those that stand only where this node does not do what the pod asks for; `resized` names containers with other resources.
    fn of_node(&mut self, inputs: &Inputs<'_>, resized: Option<String>) {
        if let Some((_, message)) = inputs.waiting.values().find(|(reason, _)| reason == "UnsupportedField") {
            let text = format!("{message}; docs/support.md lists every field of a pod");
            self.add(SUPPORTED, false, "UnsupportedField", &text);
        }
        if let Some(names) = resized {
            let text = format!(
                "this node does not resize running containers; the resources of [{names}] change at their next start"
            );
            self.add(RESIZE_PENDING, true, "Infeasible", &text);
        }
    }

    /// Whether init containers are in the way; once a main one has begun, they are not any more.
    fn initialized(&mut self, inits: &[ContainerStatus], begun: bool) {
        match unready(inits).filter(|_| !begun) {
            None => self.add("Initialized", true, "", ""),
            Some(open) => {
                let text = format!("containers with incomplete status: [{open}]");
                self.add("Initialized", false, "ContainersNotInitialized", &text);
            }
        }
    }

    /// Whether the containers are ready, and with the gates the pod.
    fn ready(&mut self, mains: &[ContainerStatus], phase: &str, begun: bool, gates: &[String]) {
        let unready = unready(mains);
        let (holds, reason, message) = if phase == "Failed" {
            (false, "PodFailed", String::new())
        } else if unready.is_none() && begun {
            (true, "", String::new())
        } else {
            let names = unready.unwrap_or_default();
            (false, "ContainersNotReady", format!("containers with unready status: [{names}]"))
        };
        if holds && !gates.is_empty() {
            self.add("Ready", false, "ReadinessGatesNotReady", &gates.join(", "));
        } else {
            self.add("Ready", holds, reason, &message);
        }
        self.add("ContainersReady", holds, reason, &message);
    }

    /// Those that follow from the containers.
    fn of_containers(
        &mut self,
        inits: &[ContainerStatus],
        mains: &[ContainerStatus],
        phase: &str,
        begun: bool,
        gates: &[String],
    ) {
        if phase == "Succeeded" {
            for kind in ["Initialized", "Ready", "ContainersReady"] {
                self.add(kind, kind == "Initialized", "PodCompleted", "");
            }
        } else {
            self.initialized(inits, begun);
            self.ready(mains, phase, begun, gates);
        }
    }
}

/// The statuses of a pod's init containers and of its containers.
fn containers(
    pod: &Pod,
    state: &PodState,
    old: &PodStatus,
    inputs: &Inputs<'_>,
) -> (Vec<ContainerStatus>, Vec<ContainerStatus>) {
    let of = |containers: &[Spec], old: Option<&Vec<ContainerStatus>>, init| -> Vec<ContainerStatus> {
        let status = |c: &Spec| {
            let old = old.into_iter().flatten().find(|o| o.name == c.name);
            container(pod, c, state, old, inputs, init)
        };
        containers.iter().map(status).collect()
    };
    let Some(spec) = &pod.spec else { return (Vec::new(), Vec::new()) };
    let inits = spec.init_containers.as_deref().unwrap_or_default();
    (
        of(inits, old.init_container_statuses.as_ref(), true),
        of(&spec.containers, old.container_statuses.as_ref(), false),
    )
}

/// Computes a pod's status; `old` is the last one.
pub(crate) fn build(pod: &Pod, state: &PodState, old: &PodStatus, inputs: &Inputs<'_>) -> PodStatus {
    let (mut inits, mut mains) = containers(pod, state, old, inputs);
    let spec = pod.spec.clone().unwrap_or_default();
    let begun = initialized(&inits, &mains);
    let settled = matches!(old.phase.as_deref(), Some("Succeeded" | "Failed"));
    let mut phase = phase(pod, &inits, &mains, inputs.ended);
    if inputs.failure.is_some() || inputs.ended && !matches!(phase, "Succeeded" | "Failed") {
        phase = "Failed";
    }
    if settled {
        phase = if old.phase.as_deref() == Some("Succeeded") { "Succeeded" } else { "Failed" };
    }
    if inputs.ended {
        end(&mut inits, &mut mains, begun);
    }
    let final_ = matches!(phase, "Succeeded" | "Failed");
    if final_ {
        for s in &mut mains {
            (s.ready, s.started) = (false, Some(false));
        }
    }
    let sandbox = state.sandboxes.first();
    let ips: Vec<String> = sandbox
        .filter(|s| s.ready)
        .map(|s| s.ips.clone())
        .filter(|i| !i.is_empty())
        .unwrap_or_else(|| old.pod_ips.iter().flatten().map(|i| i.ip.clone()).collect());

    let old_conditions = old.conditions.clone().unwrap_or_default();
    let mut conditions =
        Conditions { old: &old_conditions, new: Vec::new(), generation: pod.metadata.generation };
    let up = sandbox.is_some_and(|s| s.ready) && !final_ && !inputs.ended;
    conditions.add("PodReadyToStartContainers", up, "", "");
    conditions.of_containers(&inits, &mains, phase, begun, &gates(pod));
    conditions.add("PodScheduled", true, "", "");
    conditions.of_node(inputs, resize_pending(&spec.containers, &mains).filter(|_| !final_));
    let (reason, message) = match &inputs.failure {
        Some((reason, message)) => (Some(reason.clone()), Some(message.clone())),
        None => (old.reason.clone(), old.message.clone()),
    };
    PodStatus {
        phase: Some(phase.to_owned()),
        reason,
        message,
        conditions: Some(conditions.new),
        container_statuses: Some(mains),
        ephemeral_container_statuses: ephemeral(pod),
        init_container_statuses: (!inits.is_empty()).then_some(inits),
        host_ip: inputs.host_ips.first().cloned(),
        host_ips: Some(inputs.host_ips.iter().map(|ip| HostIP { ip: ip.clone() }).collect()),
        pod_ip: ips.first().cloned(),
        pod_ips: (!ips.is_empty()).then(|| ips.into_iter().map(|ip| PodIP { ip }).collect()),
        qos_class: Some(resources::qos(pod).as_str().to_owned()),
        start_time: old.start_time.clone().or_else(|| Some(now())),
        observed_generation: pod.metadata.generation,
        ..PodStatus::default()
    }
}

/// Names of the running containers whose resources are not those that the pod asks for.
fn resize_pending(specs: &[Spec], statuses: &[ContainerStatus]) -> Option<String> {
    let running = statuses.iter().filter(|s| s.state.as_ref().is_some_and(|s| s.running.is_some()));
    let asked =
        |name: &str| specs.iter().find(|c| c.name == name).map(|c| c.resources.clone().unwrap_or_default());
    let differs = |s: &&ContainerStatus| {
        let (has, asked) = (s.resources.clone().unwrap_or_default(), asked(&s.name).unwrap_or_default());
        (has.limits, has.requests) != (asked.limits, asked.requests)
    };
    let names: Vec<_> = running.filter(differs).map(|s| s.name.as_str()).collect();
    (!names.is_empty()).then(|| names.join(" "))
}

/// Containers of `kubectl debug` wait with the reason that this node starts none; the pod itself is not touched by them.
fn ephemeral(pod: &Pod) -> Option<Vec<ContainerStatus>> {
    let field = support::left_out(pod)?;
    let asked = pod.spec.as_ref()?.ephemeral_containers.as_ref()?;
    let why =
        format!("not supported by this node: {field}; use kubectl exec, or kubectl debug with --copy-to");
    let status = |name: &str, image: Option<&String>| ContainerStatus {
        name: name.to_owned(),
        image: image.cloned().unwrap_or_default(),
        state: Some(waiting("UnsupportedField", &why)),
        ..ContainerStatus::default()
    };
    Some(asked.iter().map(|c| status(&c.name, c.image.as_ref())).collect())
}

/// The last states of a pod that has ended: what had not ended for itself is lost.
fn end(inits: &mut [ContainerStatus], mains: &mut [ContainerStatus], begun: bool) {
    let unfinished = |s: &&mut ContainerStatus| s.state.as_ref().is_none_or(|s| s.terminated.is_none());
    let seen = inits.iter().rposition(|s| s.container_id.is_some()).map_or(0, |i| i + 1);
    let mains = if begun { mains } else { &mut [] };
    for s in mains.iter_mut().chain(&mut inits[..seen]).filter(unfinished) {
        s.state = Some(lost());
        (s.ready, s.started) = (false, Some(false));
    }
}

/// What stands in the way of a pod's readiness gates.
fn gates(pod: &Pod) -> Vec<String> {
    let gates = pod.spec.iter().flat_map(|s| s.readiness_gates.iter().flatten());
    let closed = |kind: &str| {
        let mut known = pod.status.iter().flat_map(|s| s.conditions.iter().flatten());
        match known.find(|c| c.type_ == kind) {
            None => Some(format!("corresponding condition of pod readiness gate \"{kind}\" does not exist.")),
            Some(c) if c.status != "True" => {
                Some(format!("the status of pod readiness gate \"{kind}\" is not \"True\", but {}", c.status))
            }
            Some(_) => None,
        }
    };
    gates.filter_map(|gate| closed(&gate.condition_type)).collect()
}

/// The names of those that are not ready, with a space between them.
fn unready(statuses: &[ContainerStatus]) -> Option<String> {
    let names: Vec<_> = statuses.iter().filter(|s| !s.ready).map(|s| s.name.as_str()).collect();
    (!names.is_empty()).then(|| names.join(" "))
}
