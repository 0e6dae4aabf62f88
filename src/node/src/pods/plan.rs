//! What is to be done with a pod: a pure function of its spec, what the agent reports of it, its back-offs and the clock.
//!
//! ```text
//!  pod, goal ──┐                      ┌─▶ containers to kill, then sandbox to stop or to create
//!  report ─────┼─▶ Plan::new ─────────┼─▶ containers to start, in this order
//!  back-offs ──┤   (no I/O, no tokio) ├─▶ what containers wait for, and when to look again
//!  clock ──────┘                      └─▶ dead containers and sandboxes to remove
//! ```
//!
//! The worker carries a plan out, asks the agent again and makes the next one, until a plan is settled. A crash at any point is
//! resumed by doing that again. The kubelet's `computePodActions` decides the same things.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container as Spec, Pod, PodStatus};

use super::{
    backoffs::{Backoffs, Waiting, go_duration},
    restart,
    state::{Container, Phase, PodState},
};
use crate::model::{names, resources};

/// How many dead containers of a name are kept beside the newest one (the kubelet's `MaxPerPodContainer`).
const KEPT_DEAD: usize = 1;

/// What is wanted of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goal {
    /// It shall run.
    Run,
    /// Its containers and its sandbox shall end: it is deleted, has failed, or has come to its own end.
    End,
}

/// The time by both clocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    /// The host's clock, which may be set.
    pub(crate) time: Timestamp,
    /// The monotonic one.
    pub(crate) instant: Instant,
}

impl Now {
    /// The present.
    pub(crate) fn read() -> Self {
        Self { time: Timestamp::now(), instant: Instant::now() }
    }
}

/// What a plan is made of.
pub(crate) struct Input<'a> {
    /// The pod as the API has it.
    pub(crate) pod: &'a Pod,
    /// What is wanted of it.
    pub(crate) goal: Goal,
    /// The pod as the agent reports it.
    pub(crate) report: &'a PodState,
    /// Its status as last computed, for containers that the agent knows no more.
    pub(crate) status: &'a PodStatus,
    /// What waits.
    pub(crate) backoffs: &'a Backoffs,
    /// The clocks.
    pub(crate) now: Now,
}

/// Why a container is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KillReason {
    /// The whole pod ends.
    PodEnds,
    /// Its image was changed; it is started anew.
    ImageChanged,
    /// It runs in a sandbox that was replaced.
    SandboxReplaced,
    /// A newer one of its name exists.
    Superseded,
    /// The agent cannot tell whether it runs; it is started anew.
    StateUnknown,
}

/// A container to be killed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kill {
    /// CRI id.
    pub(crate) id: String,
    /// Its name in the pod.
    pub(crate) name: String,
    /// Why.
    pub(crate) reason: KillReason,
}

/// What is to be done about the sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SandboxAction {
    /// It is as it shall be, or there is none and none is wanted.
    Keep,
    /// These are stopped.
    Stop(Vec<String>),
    /// A new one is made, after these are stopped. Those without containers are removed first: what came of a start that failed
    /// has an address and a number that the new one may need.
    Create {
        /// How many were before it.
        attempt: u32,
        /// Sandboxes of before, by CRI id.
        stop: Vec<String>,
        /// Those of them that hold no container.
        remove: Vec<String>,
    },
}

/// A container to be started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Start {
    /// Its name in the pod.
    pub(crate) name: String,
    /// How many were before it.
    pub(crate) attempt: u32,
    /// Made under that number and never started: it is removed first.
    pub(crate) discard: Option<String>,
    /// When the one before it in this sandbox ended, where there was one: this is a restart.
    pub(crate) ended: Option<Timestamp>,
}

/// What is to be done with a pod; see the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Containers to kill, side by side, before anything else.
    pub(crate) kill: Vec<Kill>,
    /// What happens to the sandbox, after the kills.
    pub(crate) sandbox: SandboxAction,
    /// Containers to start in a running sandbox, in this order.
    pub(crate) start: Vec<Start>,
    /// Why containers wait, by name: what their `state.waiting` says.
    pub(crate) waiting: BTreeMap<String, Waiting>,
    /// Dead containers that nobody needs any more, by CRI id.
    pub(crate) remove_containers: Vec<String>,
    /// Sandboxes of before whose containers are all gone, by CRI id.
    pub(crate) remove_sandboxes: Vec<String>,
    /// After how long something waits no more.
    pub(crate) wake: Option<Duration>,
}

impl Plan {
    fn idle() -> Self {
        Self {
            kill: Vec::new(),
            sandbox: SandboxAction::Keep,
            start: Vec::new(),
            waiting: BTreeMap::new(),
            remove_containers: Vec::new(),
            remove_sandboxes: Vec::new(),
            wake: None,
        }
    }

    /// What is to be done now.
    pub(crate) fn new(input: &Input<'_>) -> Self {
        let mut plan = Self::idle();
        match input.goal {
            Goal::End => plan.end(input),
            Goal::Run => plan.run(input),
        }
        plan
    }

    /// Whether there is nothing to do.
    #[cfg(test)]
    fn is_settled(&self) -> bool {
        self.kill.is_empty()
            && self.sandbox == SandboxAction::Keep
            && self.start.is_empty()
            && self.remove_containers.is_empty()
            && self.remove_sandboxes.is_empty()
    }

    fn wake_after(&mut self, pause: Duration) {
        self.wake = Some(self.wake.map_or(pause, |now| now.min(pause)));
    }

    fn end(&mut self, input: &Input<'_>) {
        for c in input.report.containers.iter().filter(|c| may_run(c)) {
            self.kill(c, KillReason::PodEnds);
        }
        let ready: Vec<_> = input.report.sandboxes.iter().filter(|s| s.ready).map(|s| s.id.clone()).collect();
        if !ready.is_empty() {
            self.sandbox = SandboxAction::Stop(ready);
        }
    }

    fn kill(&mut self, c: &Container, reason: KillReason) {
        self.kill.push(Kill { id: c.id.clone(), name: c.name.clone(), reason });
    }

    fn run(&mut self, input: &Input<'_>) {
        let Some(current) = input.report.sandbox().filter(|s| s.ready && !s.ips.is_empty()) else {
            return self.create_sandbox(input);
        };
        for c in input.report.containers.iter().filter(|c| may_run(c)) {
            if c.sandbox != current.id {
                self.kill(c, KillReason::SandboxReplaced);
            } else if input.report.newest(&c.name).is_some_and(|newest| newest.id != c.id) {
                self.kill(c, KillReason::Superseded);
            }
        }
        let spec = input.pod.spec.as_ref();
        let containers = spec.map(|s| s.containers.as_slice()).unwrap_or_default();
        let inits = spec.and_then(|s| s.init_containers.as_deref()).unwrap_or_default();
        let in_current = |name: &str| input.report.newest(name).filter(|c| c.sandbox == current.id);
        let begun = containers.iter().any(|c| in_current(&c.name).is_some());
        if !begun {
            for init in inits {
                match in_current(&init.name) {
                    Some(c) if c.phase == Phase::Exited && c.exit_code == 0 => continue,
                    Some(c) if !restart::wanted_init(input.pod, c) => {}
                    newest => self.start_anew(input, init, newest),
                }
                return self.collect(input);
            }
        }
        for container in containers {
            self.container(input, container, &current.id);
        }
        self.collect(input);
    }

    fn create_sandbox(&mut self, input: &Input<'_>) {
        let report = input.report;
        for c in report.containers.iter().filter(|c| may_run(c)) {
            self.kill(c, KillReason::SandboxReplaced);
        }
        for c in resources::all_containers(input.pod) {
            if let Some((waiting, _)) = input.backoffs.held(c, input.now.instant) {
                self.waiting.insert(c.name.clone(), waiting.clone());
            }
        }
        if let Some(left) = input.backoffs.sandbox.remaining(input.now.instant) {
            return self.wake_after(left);
        }
        let empty = |id: &str| !report.containers.iter().any(|c| c.sandbox == id);
        self.sandbox = SandboxAction::Create {
            attempt: report.sandbox().map_or(0, |s| s.attempt.saturating_add(1)),
            stop: report.sandboxes.iter().map(|s| s.id.clone()).collect(),
            remove: report.sandboxes.iter().filter(|s| empty(&s.id)).map(|s| s.id.clone()).collect(),
        };
    }

    /// One of the pod's main containers in a running sandbox.
    fn container(&mut self, input: &Input<'_>, spec: &Spec, current: &str) {
        let newest = input.report.newest(&spec.name);
        let here = newest.filter(|c| c.sandbox == current);
        if let Some(running) = here.filter(|c| c.phase == Phase::Running) {
            // The image is the one thing of a running pod's container that may be changed.
            if Some(&running.image) != spec.image.as_ref() {
                self.kill(running, KillReason::ImageChanged);
                self.start(input, spec, Some(running));
            }
            return;
        }
        // With OnFailure what has succeeded is not run again in a new sandbox.
        let over = newest.is_some_and(|c| {
            c.phase == Phase::Exited
                && (c.sandbox == current || restart::policy(input.pod) == "OnFailure")
                && !restart::wanted(input.pod, c)
        });
        if !over {
            self.start_anew(input, spec, here);
        }
    }

    /// Starts a container; what may still run of the one before is killed first.
    fn start_anew(&mut self, input: &Input<'_>, spec: &Spec, newest: Option<&Container>) {
        if let Some(unknown) = newest.filter(|c| may_run(c)) {
            self.kill(unknown, KillReason::StateUnknown);
        }
        self.start(input, spec, newest);
    }

    /// Starts a container, or says what it waits for; `newest` is the newest of its name in the current sandbox.
    fn start(&mut self, input: &Input<'_>, spec: &Spec, newest: Option<&Container>) {
        let ended = newest.filter(|c| c.phase == Phase::Exited).map(|c| {
            let nanos = i128::from(c.finished_at.max(c.created_at));
            Timestamp::from_nanosecond(nanos).unwrap_or(input.now.time)
        });
        if let Some((left, delay)) = ended.and_then(|at| input.backoffs.restart(spec, at, input.now.time)) {
            let message = format!(
                "back-off {} restarting failed container={} pod={}",
                go_duration(delay),
                spec.name,
                names::full(input.pod)
            );
            self.waiting.insert(spec.name.clone(), Waiting { reason: "CrashLoopBackOff", message });
            return self.wake_after(left);
        }
        if let Some((waiting, left)) = input.backoffs.held(spec, input.now.instant) {
            self.waiting.insert(spec.name.clone(), waiting.clone());
            // What failed before the start is tried again at its own pace, whatever else happens to the pod meanwhile.
            if !left.is_zero() {
                return self.wake_after(left);
            }
        }
        let (attempt, discard) = attempt(input, spec);
        self.start.push(Start { name: spec.name.clone(), attempt, discard, ended });
    }

    /// Keeps the newest container of each name and the one before it; sandboxes of before go with their last container.
    fn collect(&mut self, input: &Input<'_>) {
        let report = input.report;
        let mut kept: BTreeSet<&str> = BTreeSet::new();
        for spec in resources::all_containers(input.pod) {
            for (index, c) in report.history(&spec.name).enumerate() {
                if index <= KEPT_DEAD || may_run(c) {
                    kept.insert(&c.sandbox);
                } else {
                    self.remove_containers.push(c.id.clone());
                }
            }
        }
        let old = report.sandboxes.iter().skip(1).filter(|s| !kept.contains(s.id.as_str()));
        self.remove_sandboxes.extend(old.map(|s| s.id.clone()));
    }
}

/// Whether something of a container may be running: one whose state is unknown may.
fn may_run(c: &Container) -> bool {
    matches!(c.phase, Phase::Running | Phase::Unknown)
}

/// The number of a container's next attempt, and what has it already: made and never started, it is made again under it.
fn attempt(input: &Input<'_>, spec: &Spec) -> (u32, Option<String>) {
    if let Some(newest) = input.report.newest(&spec.name) {
        return match newest.phase {
            Phase::Created => (newest.attempt, Some(newest.id.clone())),
            _ => (newest.attempt.saturating_add(1), None),
        };
    }
    // The agent knows nothing of it, as after its state was lost: the API's count goes on.
    let statuses = input.status.container_statuses.iter().chain(&input.status.init_container_statuses);
    let old = statuses.flatten().find(|s| s.name == spec.name && s.container_id.is_some());
    (old.map_or(0, |old| u32::try_from(old.restart_count).unwrap_or(0).saturating_add(1)), None)
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts: Vec<String> = Vec::new();
        for kill in &self.kill {
            let why = match kill.reason {
                KillReason::PodEnds => "the pod ends",
                KillReason::ImageChanged => "image changed",
                KillReason::SandboxReplaced => "sandbox replaced",
                KillReason::Superseded => "superseded",
                KillReason::StateUnknown => "state unknown",
            };
            parts.push(format!("kill {} ({why})", kill.name));
        }
        match &self.sandbox {
            SandboxAction::Keep => {}
            SandboxAction::Stop(ids) => parts.push(format!("stop sandbox {}", ids.join(", "))),
            SandboxAction::Create { attempt, .. } => parts.push(format!("create sandbox {attempt}")),
        }
        parts.extend(self.start.iter().map(|s| format!("start {} {}", s.name, s.attempt)));
        parts.extend(self.waiting.iter().map(|(name, w)| format!("{name} waits ({})", w.reason)));
        parts.extend(self.remove_containers.iter().map(|id| format!("remove container {id}")));
        parts.extend(self.remove_sandboxes.iter().map(|id| format!("remove sandbox {id}")));
        if parts.is_empty() {
            parts.push("nothing to do".to_owned());
        }
        if let Some(wake) = self.wake {
            parts.push(format!("look again in {:.1} s", wake.as_secs_f64()));
        }
        f.write_str(&parts.join(", "))
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
