//! Mirror pods: the copies of static pods on the API server, by which people see them and to which their status is written.
//!
//! One task compares the static pods of this node with the mirrors that the API server shows: a missing one is created, one of
//! another version, of no static pod, or that is being deleted is removed. A mirror is owned by the Node, as the API server demands
//! (NodeRestriction); a refusal is logged and is an event of the Node.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::OwnerReference};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::model::names;
use crate::{
    cluster::Cluster,
    error::chain,
    events::{self, Kind, Recorder},
    pods::updates::Update,
};

/// How often all mirrors are compared.
const PERIOD: Duration = Duration::from_secs(10);
/// How long the API server may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The pauses after a mirror could not be created: each is twice the one before it.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Namespace and name.
type Key = (String, String);

/// What is seen of static pods and of mirrors.
pub(crate) enum Input {
    /// All static pods.
    Static(Vec<Arc<Pod>>),
    /// A mirror as the API server shows it.
    Shown(Arc<Pod>),
    /// The API server removed a mirror.
    Removed(Arc<Pod>),
    /// These are the UIDs of all pods that the API server shows.
    Listed(std::collections::HashSet<String>),
}

/// Whether a pod of the API server is a mirror.
pub(crate) fn is_mirror(pod: &Pod) -> bool {
    names::get(pod.metadata.annotations.as_ref(), names::MIRROR).is_some()
}

fn key(pod: &Pod) -> Key {
    (names::namespace(pod).to_owned(), names::name(pod).to_owned())
}

/// A static pod's mirror, owned by the Node.
fn mirror(pod: &Pod, node: &str, node_uid: &str) -> Pod {
    let mut copy = pod.clone();
    copy.metadata.uid = None;
    copy.metadata.resource_version = None;
    copy.metadata.owner_references = Some(vec![OwnerReference {
        api_version: "v1".into(),
        kind: "Node".into(),
        name: node.to_owned(),
        uid: node_uid.to_owned(),
        controller: Some(true),
        block_owner_deletion: None,
    }]);
    let hash = names::uid(pod).to_owned();
    copy.metadata.annotations.get_or_insert_default().insert(names::MIRROR.to_owned(), hash);
    copy.status = None;
    copy
}

/// What is to be done about one name.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    Create,
    Delete,
}

fn step(own: Option<&Pod>, shown: Option<&Pod>, node_uid: &str) -> Step {
    let Some(shown) = shown else { return if own.is_some() { Step::Create } else { Step::Nothing } };
    let hash = names::get(shown.metadata.annotations.as_ref(), names::MIRROR);
    let owned =
        shown.metadata.owner_references.iter().flatten().any(|o| o.kind == "Node" && o.uid == node_uid);
    let fits = own.is_some_and(|own| Some(names::uid(own)) == hash);
    if fits && owned && shown.metadata.deletion_timestamp.is_none() { Step::Nothing } else { Step::Delete }
}

/// After a mirror could not be created.
struct Failure {
    error: String,
    pause: Duration,
    next: Instant,
}

/// Keeps the mirrors; see the module.
pub(crate) struct Mirrors {
    /// The API server.
    pub(crate) cluster: Arc<dyn Cluster>,
    /// The node's name.
    pub(crate) node: String,
    /// UID of the Node, once it is registered.
    pub(crate) node_uid: watch::Receiver<Option<String>>,
    /// Where failures are told.
    pub(crate) events: Recorder,
    /// The manager, which learns to which object a static pod's status goes.
    pub(crate) updates: mpsc::Sender<Update>,
}

/// What is known of both sides.
#[derive(Default)]
struct State {
    /// None until the manifests were read.
    own: Option<BTreeMap<Key, Arc<Pod>>>,
    /// Whether the API server has listed all.
    listed: bool,
    shown: BTreeMap<Key, Arc<Pod>>,
    failures: BTreeMap<Key, Failure>,
}

impl Mirrors {
    /// Works until stopped.
    pub(crate) async fn run(self, mut inputs: mpsc::Receiver<Input>, stop: CancellationToken) {
        let mut state = State::default();
        let mut period = tokio::time::interval(PERIOD);
        let mut node_uid = self.node_uid.clone();
        loop {
            let soonest = state.failures.values().map(|f| f.next).min();
            let retry = async {
                match soonest {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                Some(input) = inputs.recv() => {
                    state.take(input);
                    while let Ok(more) = inputs.try_recv() {
                        state.take(more);
                    }
                }
                Ok(()) = node_uid.changed() => {}
                () = retry => {}
                _ = period.tick() => {}
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.compare(&mut state) => {}
            }
        }
    }

    async fn compare(&self, state: &mut State) {
        let Some(node_uid) = self.node_uid.borrow().clone() else { return };
        let Some(own) = state.own.clone().filter(|_| state.listed) else { return };
        let keys: BTreeSet<Key> = own.keys().chain(state.shown.keys()).cloned().collect();
        state.failures.retain(|key, _| own.contains_key(key) || state.shown.contains_key(key));
        for key in keys {
            if state.failures.get(&key).is_some_and(|f| Instant::now() < f.next) {
                continue;
            }
            let (own, shown) = (own.get(&key), state.shown.get(&key).cloned());
            let outcome = match (step(own.map(Arc::as_ref), shown.as_deref(), &node_uid), own, &shown) {
                (Step::Create, Some(own), _) => {
                    timeout(PATIENCE, self.cluster.create_pod(&mirror(own, &self.node, &node_uid))).await
                }
                (Step::Delete, _, Some(shown)) => {
                    let uid = names::uid(shown);
                    timeout(PATIENCE, self.cluster.delete_pod(&key.0, &key.1, uid)).await
                }
                _ => {
                    state.failures.remove(&key);
                    self.publish(&key, shown.as_deref()).await;
                    continue;
                }
            };
            let error = match outcome {
                // What came of it is seen by the watch; until then it is not tried again.
                Ok(Ok(())) => String::new(),
                Ok(Err(error)) => chain(&error),
                Err(_) => format!("no answer of the API server in {} s", PATIENCE.as_secs()),
            };
            self.note(state, key, error);
        }
    }

    /// The manager learns which object a static pod's status goes to.
    async fn publish(&self, key: &Key, shown: Option<&Pod>) {
        let uid = shown.map(|s| names::uid(s).to_owned()).unwrap_or_default();
        let _ =
            self.updates.send(Update::Mirror { namespace: key.0.clone(), name: key.1.clone(), uid }).await;
    }

    /// Remembers an attempt; a new error is logged and an event.
    fn note(&self, state: &mut State, key: Key, error: String) {
        let known = state.failures.get(&key);
        let pause = known.map_or(FIRST_PAUSE, |f| (f.pause * 2).min(LONGEST_PAUSE));
        if !error.is_empty() && known.is_none_or(|f| f.error != error) {
            warn!(
                namespace = key.0,
                pod = key.1,
                error,
                "the mirror of a static pod could not be brought up to date"
            );
            let message = format!("Mirror of static pod {}/{}: {error}", key.0, key.1);
            self.events.emit(events::node_reference(&self.node), Kind::Warning, "FailedMirrorPod", message);
        }
        state.failures.insert(key, Failure { error, pause, next: Instant::now() + pause });
    }
}

impl State {
    fn take(&mut self, input: Input) {
        match input {
            Input::Static(pods) => {
                let own = self.own.get_or_insert_default();
                // Another version of a pod is worth a try at once.
                let same =
                    |pod: &Arc<Pod>| own.get(&key(pod)).is_some_and(|o| names::uid(o) == names::uid(pod));
                let kept: BTreeSet<Key> = pods.iter().filter(|p| same(p)).map(|p| key(p)).collect();
                self.failures.retain(|key, _| kept.contains(key));
                *own = pods.into_iter().map(|pod| (key(&pod), pod)).collect();
            }
            Input::Shown(pod) => {
                self.failures.remove(&key(&pod)).filter(|f| !f.error.is_empty()).map(|f| {
                    // A change of the object is no answer to a refusal.
                    self.failures.insert(key(&pod), f)
                });
                self.shown.insert(key(&pod), pod);
            }
            Input::Removed(pod) => {
                let same = |shown: &Arc<Pod>| names::uid(shown) == names::uid(&pod);
                if self.shown.get(&key(&pod)).is_some_and(same) {
                    self.shown.remove(&key(&pod));
                    self.failures.remove(&key(&pod));
                }
            }
            Input::Listed(uids) => {
                self.shown.retain(|_, pod| uids.contains(names::uid(pod)));
                self.listed = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn own(hash: &str) -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "web-n1", "namespace": "d", "uid": hash, "annotations": {names::SOURCE: "file"}},
            "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]}}))
        .unwrap()
    }

    #[test]
    fn a_mirror_is_what_node_restriction_admits() {
        let copy = mirror(&own("h1"), "n1", "node-uid");
        let owners = serde_json::to_value(&copy.metadata.owner_references).unwrap();
        assert_eq!(
            owners,
            serde_json::json!([{"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "node-uid", "controller": true}])
        );
        assert_eq!(copy.metadata.annotations.as_ref().unwrap()[names::MIRROR], "h1");
        assert!(copy.metadata.uid.is_none() && copy.status.is_none() && is_mirror(&copy));
    }

    #[test]
    fn a_mirror_of_another_version_node_or_of_nobody_is_replaced() {
        let (one, two) = (own("h1"), own("h2"));
        let shown = mirror(&one, "n1", "u");
        assert_eq!(step(Some(&one), None, "u"), Step::Create);
        assert_eq!(step(Some(&one), Some(&shown), "u"), Step::Nothing);
        assert_eq!(step(Some(&two), Some(&shown), "u"), Step::Delete);
        assert_eq!(step(Some(&one), Some(&shown), "another node's"), Step::Delete);
        assert_eq!(step(None, Some(&shown), "u"), Step::Delete);
        assert_eq!(step(None, None, "u"), Step::Nothing);
        let mut deleted = shown.clone();
        deleted.metadata.deletion_timestamp =
            Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::UNIX_EPOCH));
        assert_eq!(step(Some(&one), Some(&deleted), "u"), Step::Delete);
    }
}
