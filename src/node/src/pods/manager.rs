//! Owns the workers: one for each pod by UID, made when a pod is first seen, joined when nothing is left of it.
//!
//! Takes [`Update`]s from the sources (API server, manifests) and the agent's word that something changed. Pods on the
//! agent that no source knows are ended, but only once every source has given a complete list.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use moxlet_cri::{host, v1};
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    updates::{Source, Update},
    worker::{Desired, Shared, Worker},
};
use crate::model::names;
use crate::{error::chain, metrics, status::Target};

/// Orphans that are ended get this grace, as in the kubelet.
const ORPHAN_GRACE: i64 = 1;
/// How often all pods are looked at, events or not.
const RELIST: Duration = Duration::from_secs(10);

struct Handle {
    source: Option<Source>,
    desired: watch::Sender<Desired>,
    poke: Arc<Notify>,
}

/// The manager; see the module.
pub(crate) struct Manager {
    shared: Arc<Shared>,
    workers: HashMap<String, Handle>,
    tasks: JoinSet<String>,
    listed: BTreeSet<Source>,
    wanted: BTreeSet<Source>,
    /// UIDs of the API server's copies of static pods.
    mirrors: HashMap<(String, String), String>,
    /// Static pods that wait for their forerunner of the same name to end.
    queued: HashMap<(String, String), Arc<Pod>>,
    stop: CancellationToken,
}

fn key(pod: &Pod) -> (String, String) {
    (names::namespace(pod).to_owned(), names::name(pod).to_owned())
}

impl Manager {
    /// A manager that waits for these sources' lists.
    pub(crate) fn new(
        shared: Arc<Shared>,
        wanted: impl IntoIterator<Item = Source>,
        stop: CancellationToken,
    ) -> Self {
        Self {
            shared,
            workers: HashMap::new(),
            tasks: JoinSet::new(),
            listed: BTreeSet::new(),
            wanted: wanted.into_iter().collect(),
            mirrors: HashMap::new(),
            queued: HashMap::new(),
            stop,
        }
    }

    /// Works until the node stops; then all workers are joined. Pods keep running.
    pub(crate) async fn run(mut self, mut updates: mpsc::Receiver<Update>) {
        let (changed, mut changes) = mpsc::channel::<String>(1024);
        let watcher = tokio::spawn(watch_agent(self.shared.clone(), changed, self.stop.clone()));
        let mut relist = tokio::time::interval(RELIST);
        relist.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.stop.cancelled() => break,
                Some(update) = updates.recv() => self.take(update).await,
                Some(uid) = changes.recv() => self.poke(&uid),
                Some(done) = self.tasks.join_next(), if !self.tasks.is_empty() => match done {
                    Ok(uid) => self.ended(&uid),
                    Err(error) => warn!(%error, "a pod worker failed"),
                },
                _ = relist.tick() => {
                    self.poke("");
                    self.end_orphans().await;
                }
            }
            metrics::queue_depth("pods", updates.len());
        }
        watcher.abort();
        while self.tasks.join_next().await.is_some() {}
    }

    /// Has a worker look again; all of them where no pod is named.
    fn poke(&self, uid: &str) {
        for (_, worker) in self.workers.iter().filter(|(k, _)| uid.is_empty() || *k == uid) {
            worker.poke.notify_one();
        }
    }

    fn ended(&mut self, uid: &str) {
        self.workers.remove(uid);
        let free: Vec<_> = self.queued.keys().filter(|k| !self.occupied(k)).cloned().collect();
        for key in free {
            if let Some(pod) = self.queued.remove(&key) {
                self.apply(Some(Source::Files), pod);
            }
        }
    }

    fn occupied(&self, name: &(String, String)) -> bool {
        self.workers.values().any(|w| key(&w.desired.borrow().pod) == *name)
    }

    fn target(&self, pod: &Pod) -> Target {
        let (namespace, name) = key(pod);
        let uid = if names::is_static(pod) {
            self.mirrors.get(&key(pod)).cloned().unwrap_or_default()
        } else {
            names::uid(pod).to_owned()
        };
        Target { namespace, name, uid }
    }

    async fn take(&mut self, update: Update) {
        match update {
            Update::Apply(_, pod) if names::uid(&pod).is_empty() => {}
            Update::Content(uid) => self.poke(&uid),
            Update::Mirror { namespace, name, uid } => self.mirror(&(namespace, name), uid),
            Update::Apply(source, pod) => {
                let replaced = source == Source::Files && self.must_wait(&pod);
                if replaced {
                    self.queued.insert(key(&pod), pod);
                } else {
                    self.apply(Some(source), pod);
                }
            }
            Update::Gone(pod) => self.gone(names::uid(&pod), Some(pod.clone()), None),
            Update::Listed(source, uids) => {
                let missing: Vec<_> = self
                    .workers
                    .iter()
                    .filter(|(uid, w)| w.source == Some(source) && !uids.contains(*uid))
                    .map(|(uid, _)| uid.clone())
                    .collect();
                for uid in missing {
                    self.gone(&uid, None, None);
                }
                if self.listed.insert(source) {
                    self.end_orphans().await;
                }
            }
        }
    }

    /// Whether a static pod has to wait: for another of its name to end, or for its own end where its manifest came back meanwhile.
    fn must_wait(&self, pod: &Pod) -> bool {
        match self.workers.get(names::uid(pod)) {
            Some(own) => own.desired.borrow().gone,
            None => self.occupied(&key(pod)),
        }
    }

    fn mirror(&mut self, name: &(String, String), uid: String) {
        if uid.is_empty() {
            self.mirrors.remove(name);
        } else {
            self.mirrors.insert(name.clone(), uid);
        }
        for worker in self.workers.values().filter(|w| key(&w.desired.borrow().pod) == *name) {
            let target = self.target(&worker.desired.borrow().pod.clone());
            worker.desired.send_if_modified(|d| {
                let changed = names::is_static(&d.pod) && d.target.uid != target.uid;
                if changed {
                    d.target = target;
                }
                changed
            });
        }
    }

    fn apply(&mut self, source: Option<Source>, pod: Arc<Pod>) {
        let uid = names::uid(&pod).to_owned();
        let desired = Desired { target: self.target(&pod), pod, gone: false, grace: None };
        self.want(source, uid, desired);
    }

    fn want(&mut self, source: Option<Source>, uid: String, desired: Desired) {
        if let Some(handle) = self.workers.get_mut(&uid) {
            handle.source = source.or(handle.source);
            handle.desired.send_modify(|d| {
                // What is gone does not come back under the same UID, except an orphan that a source owns after all.
                let grace = d.grace.filter(|_| desired.gone);
                *d = Desired { grace: desired.grace.or(grace), ..desired };
            });
            return;
        }
        let (sender, receiver) = watch::channel(desired);
        let poke = Arc::new(Notify::new());
        let worker = Worker::new(self.shared.clone(), receiver, poke.clone());
        let stop = self.stop.clone();
        let id = uid.clone();
        self.tasks.spawn(async move {
            worker.run(stop).await;
            id
        });
        self.workers.insert(uid, Handle { source, desired: sender, poke });
    }

    fn gone(&mut self, uid: &str, last: Option<Arc<Pod>>, grace: Option<i64>) {
        self.queued.retain(|_, p| names::uid(p) != uid);
        if let Some(handle) = self.workers.get(uid) {
            handle.desired.send_modify(|d| {
                d.gone = true;
                d.grace = grace.or(d.grace);
                if let Some(last) = last {
                    d.pod = last;
                }
            });
        }
    }

    /// Ends what is on the agent and belongs to no pod of any source.
    async fn end_orphans(&mut self) {
        if !self.wanted.iter().all(|s| self.listed.contains(s)) {
            return;
        }
        let agent = self.shared.agent.clone();
        let asked = futures::try_join!(
            agent.list_pod_sandbox(v1::ListPodSandboxRequest::default()),
            agent.list_pods(host::ListPodsRequest {}),
        );
        let Ok((sandboxes, left)) = asked else { return };
        let mut orphans: HashMap<String, Pod> = HashMap::new();
        for sandbox in sandboxes.items {
            let meta = sandbox.metadata.unwrap_or_default();
            // A sandbox without our label is crictl's or another kubelet's: not ours to end.
            if sandbox.labels.get(names::POD_UID) != Some(&meta.uid) || meta.uid.is_empty() {
                continue;
            }
            let from_file = sandbox.annotations.get(names::SOURCE).is_some_and(|s| s == "file");
            if !self.wanted.contains(&Source::Api) && !from_file {
                continue;
            }
            let pod = orphans.entry(meta.uid.clone()).or_default();
            pod.metadata.uid = Some(meta.uid);
            pod.metadata.name = Some(meta.name);
            pod.metadata.namespace = Some(meta.namespace);
            pod.metadata.annotations = Some(sandbox.annotations.into_iter().collect());
            pod.spec = Some(PodSpec::default());
        }
        if self.wanted.contains(&Source::Api) {
            for uid in left.pod_uids {
                let pod = orphans.entry(uid.clone()).or_default();
                pod.metadata.uid = Some(uid);
                pod.spec.get_or_insert_default();
            }
        }
        for (uid, pod) in orphans {
            if self.workers.contains_key(&uid) || self.queued.values().any(|p| names::uid(p) == uid) {
                continue;
            }
            info!(pod = %names::full(&pod), "ending a pod that nobody wants any more");
            let (namespace, name) = key(&pod);
            let target = Target { namespace, name, uid: String::new() };
            let desired = Desired { pod: Arc::new(pod), gone: true, grace: Some(ORPHAN_GRACE), target };
            self.want(None, uid, desired);
        }
    }
}

/// Tells which pods the agent has news of; after a lost stream all are looked at.
async fn watch_agent(shared: Arc<Shared>, changed: mpsc::Sender<String>, stop: CancellationToken) {
    while !stop.is_cancelled() {
        match shared.agent.container_events().await {
            Ok(mut events) => {
                if changed.send(String::new()).await.is_err() {
                    return;
                }
                while let Some(Ok(event)) = events.next().await {
                    let uid = event
                        .pod_sandbox_status
                        .and_then(|s| s.metadata)
                        .map(|m| m.uid)
                        .or_else(|| {
                            event
                                .containers_statuses
                                .first()
                                .and_then(|c| c.labels.get(names::POD_UID).cloned())
                        })
                        .unwrap_or_default();
                    if changed.send(uid).await.is_err() {
                        return;
                    }
                }
                debug!("the agent's event stream ended");
            }
            Err(error) => debug!(error = %chain(&error), "no event stream from the agent"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
    }
}
