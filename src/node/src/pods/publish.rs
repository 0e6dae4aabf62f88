//! Sends a pod's status to the API server: at once, newest only, again until it is taken; one task a pod.

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::PodStatus;
use tokio::{sync::watch, task::JoinHandle};
use tracing::warn;

use super::status;
use crate::cluster::Cluster;

const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(10);

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

#[derive(Clone)]
struct Wanted {
    number: u64,
    target: Target,
    status: Option<Arc<PodStatus>>,
}

/// A pod's status on its way.
pub(crate) struct Publisher {
    wanted: watch::Sender<Wanted>,
    done: watch::Receiver<u64>,
    task: JoinHandle<()>,
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Publisher {
    /// Starts the task; `sent` is what the API server is known to have.
    pub(crate) fn new(cluster: Arc<dyn Cluster>, target: Target, sent: PodStatus) -> Self {
        let (wanted, receiver) = watch::channel(Wanted { number: 0, target, status: None });
        let (finished, done) = watch::channel(0);
        let task = tokio::spawn(send(cluster, receiver, finished, sent));
        Self { wanted, done, task }
    }

    /// Names the object anew.
    pub(crate) fn retarget(&self, target: Target) {
        self.wanted.send_if_modified(|w| {
            let changed = w.target != target;
            if changed {
                w.target = target;
                w.number += 1;
            }
            changed
        });
    }

    /// Has a status sent.
    pub(crate) fn publish(&self, status: Arc<PodStatus>) {
        self.wanted.send_if_modified(|w| {
            let changed = w.status.as_ref() != Some(&status);
            if changed {
                w.number += 1;
                w.status = Some(status);
            }
            changed
        });
    }

    /// Waits until the newest status was taken, or its object is gone.
    pub(crate) async fn settled(&self) {
        let number = self.wanted.borrow().number;
        // An error means that the task has ended.
        let _ = self.done.clone().wait_for(|done| *done >= number).await;
    }
}

async fn send(
    cluster: Arc<dyn Cluster>,
    mut wanted: watch::Receiver<Wanted>,
    finished: watch::Sender<u64>,
    mut sent: PodStatus,
) {
    let mut uid = wanted.borrow().target.uid.clone();
    let mut pause = FIRST_RETRY;
    loop {
        let now = wanted.borrow_and_update().clone();
        if uid != now.target.uid {
            uid = now.target.uid.clone();
            sent = PodStatus::default();
        }
        let fresh = now.status.as_deref().filter(|s| **s != sent && !uid.is_empty());
        if let Some(status) = fresh {
            let patch = status::patch(&uid, status);
            match cluster.patch_status(&now.target.namespace, &now.target.name, &patch).await {
                Ok(_) => {
                    sent = status.clone();
                    pause = FIRST_RETRY;
                }
                Err(error) => {
                    warn!(pod = now.target.name, error = %crate::error::chain(&error), "status not taken, will try again");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LAST_RETRY);
                    continue;
                }
            }
        }
        finished.send_replace(now.number);
        if wanted.changed().await.is_err() {
            return;
        }
    }
}
