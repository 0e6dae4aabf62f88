//! The status of one pod at the API server: what should stand there, what was sent, what is shown; patched until they agree.
//!
//! Controllers write into the same status: kube-controller-manager sets Ready=False on the pods of a node that is away. So what the
//! watch shows is compared at each change with what the server answered to the last patch, and is patched also when nothing changed
//! here. The answer, not the wish, is what is compared: a server that leaves out a field it does not know is not asked for ever.
//!
//! ```text
//!   worker: Publisher::publish ─▶ wanted ┐
//!   watch:  Publisher::shown ───▶ shown ─┴▶ differs? ─▶ patch ─▶ answer ─▶ settled
//!                                               ▲          └─ fault, rejection ─ pause ─┐
//!                                               └───────────────────────────────────────┘
//! ```

mod compare;
mod patch;
mod sender;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::{sync::watch, task::JoinHandle};

use crate::cluster::Cluster;

/// Condition: whether this node can honour all fields of the pod. It stands only where it is False.
pub(crate) const SUPPORTED: &str = "moxlet.dev/Supported";
/// Condition: containers do not have the resources that the pod asks for now. It stands only where it is True.
pub(crate) const RESIZE_PENDING: &str = "PodResizePending";
/// The conditions that a node writes; all others are other controllers'.
pub(crate) const CONDITIONS: [&str; 7] = [
    "PodScheduled",
    "PodReadyToStartContainers",
    "Initialized",
    "ContainersReady",
    "Ready",
    RESIZE_PENDING,
    SUPPORTED,
];

/// The object whose status is written: the pod itself, or the mirror of a static pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// Its namespace.
    pub(crate) namespace: String,
    /// Its name.
    pub(crate) name: String,
    /// Its UID; empty: there is none yet.
    pub(crate) uid: String,
}

/// A status as the API server has it, at a version.
#[derive(Clone, Debug, PartialEq)]
struct Shown {
    uid: String,
    /// The object's resourceVersion, where it is a number.
    version: Option<u64>,
    status: Arc<PodStatus>,
}

impl Shown {
    fn of(pod: &Pod) -> Self {
        Self {
            uid: pod.metadata.uid.clone().unwrap_or_default(),
            version: pod.metadata.resource_version.as_deref().and_then(|v| v.parse().ok()),
            status: Arc::new(pod.status.clone().unwrap_or_default()),
        }
    }
}

/// What a sender works with.
#[derive(Clone)]
struct Inputs {
    /// Counts what was published.
    number: u64,
    target: Target,
    wanted: Option<Arc<PodStatus>>,
    shown: Option<Shown>,
}

/// How far the sender is.
#[derive(Clone, Debug, Default)]
struct Progress {
    /// The number of the newest status that is settled.
    number: u64,
    /// Why the API server refused it, if it did.
    rejected: Option<String>,
}

/// A pod's status on its way: one task, which ends with this.
pub(crate) struct Publisher {
    inputs: watch::Sender<Inputs>,
    progress: watch::Receiver<Progress>,
    task: JoinHandle<()>,
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Publisher {
    /// Starts the task.
    pub(crate) fn new(cluster: Arc<dyn Cluster>, target: Target) -> Self {
        let (inputs, receiver) = watch::channel(Inputs { number: 0, target, wanted: None, shown: None });
        let (done, progress) = watch::channel(Progress::default());
        let task = tokio::spawn(sender::run(cluster, receiver, done));
        Self { inputs, progress, task }
    }

    /// Names the object anew.
    pub(crate) fn retarget(&self, target: Target) {
        self.inputs.send_if_modified(|i| {
            let changed = i.target != target;
            if changed {
                i.target = target;
                i.number += 1;
            }
            changed
        });
    }

    /// Notes what the API server shows. Copies of other objects than the target are left out.
    pub(crate) fn shown(&self, pod: &Pod) {
        let shown = Shown::of(pod);
        self.inputs.send_if_modified(|i| {
            let changed = shown.uid == i.target.uid && i.shown.as_ref() != Some(&shown);
            if changed {
                i.shown = Some(shown);
            }
            changed
        });
    }

    /// Has a status stand there.
    pub(crate) fn publish(&self, status: Arc<PodStatus>) {
        self.inputs.send_if_modified(|i| {
            let changed = i.wanted.as_ref() != Some(&status);
            if changed {
                i.number += 1;
                i.wanted = Some(status);
            }
            changed
        });
    }

    /// Why the API server refuses the newest status, if it does.
    pub(crate) fn rejection(&self) -> Option<String> {
        self.progress.borrow().rejected.clone()
    }

    /// Waits until the newest status was accepted or refused, or its object is gone. It may take as long as the API server is away.
    pub(crate) async fn settled(&self) {
        let number = self.inputs.borrow().number;
        // An error means that the task has ended.
        let _ = self.progress.clone().wait_for(|p| p.number >= number).await;
    }
}
