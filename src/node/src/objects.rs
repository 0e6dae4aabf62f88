//! ConfigMaps and Secrets that pods of this node name: each is watched by itself, as long as a pod names it.
//!
//! A node may list and watch such an object only by its name (Node authorizer), so there is one watch an object. Workers read the
//! copy that the watch keeps; when it changes, the pods that name the object are looked at again, so that a change is in their
//! volumes within seconds. Where there is no copy (the watch has not answered, or there are too many) the API server is asked.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fmt::Debug,
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, stream::BoxStream};
use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvFromSource, EnvVar, Pod, Secret, Volume};
use kube::{
    Api, Client, Resource,
    runtime::watcher::{self, Event},
};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};

use crate::model::names;
use crate::{
    error::{Error, Result, chain},
    pods::updates::Update,
    relist,
};

/// The most objects that are watched at one time.
const MAX_WATCHES: usize = 1024;
/// How long a new watch may take to its first answer before the API server is asked otherwise.
const FIRST_ANSWER: Duration = Duration::from_secs(2);

/// An object's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Kind {
    ConfigMap,
    Secret,
}

/// An object's kind, namespace and name.
type Id = (Kind, String, String);

/// What is known of an object.
#[derive(Clone, Debug, Default)]
enum Copy {
    /// The watch has not answered yet.
    #[default]
    Unknown,
    /// There is none.
    Missing,
    ConfigMap(Arc<ConfigMap>),
    Secret(Arc<Secret>),
}

impl Copy {
    /// Differs for each content; none before the first answer.
    fn version(&self) -> Option<&str> {
        match self {
            Self::Unknown => None,
            Self::Missing => Some(""),
            Self::ConfigMap(map) => map.metadata.resource_version.as_deref(),
            Self::Secret(secret) => secret.metadata.resource_version.as_deref(),
        }
    }
}

struct Watched {
    /// UIDs of the pods that name it.
    pods: BTreeSet<String>,
    copy: watch::Receiver<Copy>,
    /// The watch ends with this.
    _task: AbortOnDropHandle<()>,
}

#[derive(Default)]
struct State {
    watched: HashMap<Id, Watched>,
    /// What each pod names, by UID.
    pods: HashMap<String, BTreeSet<Id>>,
    /// How often something that a pod names has changed, by UID.
    revisions: HashMap<String, u64>,
}

/// The watched objects; clones share them.
#[derive(Clone)]
pub(crate) struct Objects {
    client: Client,
    state: Arc<Mutex<State>>,
    updates: mpsc::Sender<Update>,
}

/// The objects that a pod's volumes, variables and pull secrets name.
fn named_by(pod: &Pod) -> BTreeSet<Id> {
    let namespace = names::namespace(pod);
    let mut ids = BTreeSet::new();
    let mut name = |kind, name: &str| {
        if !name.is_empty() {
            ids.insert((kind, namespace.to_owned(), name.to_owned()));
        }
    };
    let Some(spec) = &pod.spec else { return ids };
    spec.image_pull_secrets.iter().flatten().for_each(|s| name(Kind::Secret, &s.name));
    spec.volumes.iter().flatten().for_each(|v| volume(v, &mut name));
    for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
        variables(container, &mut name);
    }
    ids
}

fn volume(volume: &Volume, name: &mut impl FnMut(Kind, &str)) {
    if let Some(source) = &volume.config_map {
        name(Kind::ConfigMap, &source.name);
    }
    if let Some(source) = &volume.secret {
        name(Kind::Secret, source.secret_name.as_deref().unwrap_or_default());
    }
    for part in volume.projected.iter().flat_map(|p| p.sources.iter().flatten()) {
        if let Some(source) = &part.config_map {
            name(Kind::ConfigMap, &source.name);
        }
        if let Some(source) = &part.secret {
            name(Kind::Secret, &source.name);
        }
    }
}

fn variables(container: &Container, name: &mut impl FnMut(Kind, &str)) {
    for EnvFromSource { config_map_ref, secret_ref, .. } in container.env_from.iter().flatten() {
        config_map_ref.iter().for_each(|r| name(Kind::ConfigMap, &r.name));
        secret_ref.iter().for_each(|r| name(Kind::Secret, &r.name));
    }
    for EnvVar { value_from, .. } in container.env.iter().flatten() {
        let Some(from) = value_from else { continue };
        from.config_map_key_ref.iter().for_each(|r| name(Kind::ConfigMap, &r.name));
        from.secret_key_ref.iter().for_each(|r| name(Kind::Secret, &r.name));
    }
}

impl Objects {
    /// Watches nothing yet. Pods whose objects change are named by `updates`.
    pub(crate) fn new(client: Client, updates: mpsc::Sender<Update>) -> Self {
        Self { client, state: Arc::default(), updates }
    }

    /// A pod as it is now: what it names is watched from now on, what it no longer names is not for its sake.
    pub(crate) fn set(&self, pod: &Pod) {
        let uid = names::uid(pod);
        let finished = pod
            .status
            .as_ref()
            .and_then(|s| s.phase.as_deref())
            .is_some_and(|p| p == "Succeeded" || p == "Failed");
        let ids = if finished { BTreeSet::new() } else { named_by(pod) };
        let mut state = self.state.lock();
        let before = state.pods.get(uid).cloned().unwrap_or_default();
        if before == ids {
            return;
        }
        for id in before.difference(&ids) {
            state.release(uid, id);
        }
        for id in ids.difference(&before) {
            self.watch(&mut state, uid, id);
        }
        if ids.is_empty() {
            state.pods.remove(uid);
        } else {
            state.pods.insert(uid.to_owned(), ids);
        }
    }

    /// A pod is gone.
    pub(crate) fn remove(&self, uid: &str) {
        let mut state = self.state.lock();
        for id in state.pods.remove(uid).unwrap_or_default() {
            state.release(uid, &id);
        }
        state.revisions.remove(uid);
    }

    /// All pods but these are gone.
    pub(crate) fn keep(&self, uids: &HashSet<String>) {
        let gone: Vec<_> =
            self.state.lock().pods.keys().filter(|uid| !uids.contains(*uid)).cloned().collect();
        gone.iter().for_each(|uid| self.remove(uid));
    }

    /// How often something that the pod names has changed.
    pub(crate) fn revision(&self, uid: &str) -> u64 {
        self.state.lock().revisions.get(uid).copied().unwrap_or_default()
    }

    /// One ConfigMap.
    ///
    /// # Errors
    /// [`Error::NotFound`]; the API server's.
    pub(crate) async fn config_map(&self, namespace: &str, name: &str) -> Result<ConfigMap> {
        match self.copy(Kind::ConfigMap, namespace, name).await {
            Copy::ConfigMap(map) => Ok(map.as_ref().clone()),
            Copy::Missing => Err(Error::NotFound { kind: "configmap", name: name.to_owned() }),
            _ => found("configmap", name, Api::namespaced(self.client.clone(), namespace).get(name).await),
        }
    }

    /// One Secret.
    ///
    /// # Errors
    /// [`Error::NotFound`]; the API server's.
    pub(crate) async fn secret(&self, namespace: &str, name: &str) -> Result<Secret> {
        match self.copy(Kind::Secret, namespace, name).await {
            Copy::Secret(secret) => Ok(secret.as_ref().clone()),
            Copy::Missing => Err(Error::NotFound { kind: "secret", name: name.to_owned() }),
            _ => found("secret", name, Api::namespaced(self.client.clone(), namespace).get(name).await),
        }
    }

    async fn copy(&self, kind: Kind, namespace: &str, name: &str) -> Copy {
        let id = (kind, namespace.to_owned(), name.to_owned());
        let Some(mut copy) = self.state.lock().watched.get(&id).map(|w| w.copy.clone()) else {
            return Copy::Unknown;
        };
        let known = copy.wait_for(|copy| !matches!(copy, Copy::Unknown));
        match tokio::time::timeout(FIRST_ANSWER, known).await {
            Ok(Ok(copy)) => copy.clone(),
            _ => Copy::Unknown,
        }
    }

    /// Counts a pod among those that name an object; its watch begins with the first.
    fn watch(&self, state: &mut State, uid: &str, id: &Id) {
        if let Some(watched) = state.watched.get_mut(id) {
            watched.pods.insert(uid.to_owned());
            return;
        }
        if state.watched.len() >= MAX_WATCHES {
            warn!(kind = ?id.0, namespace = id.1, name = id.2, "too many objects are watched: this one is not");
            return;
        }
        let (sender, copy) = watch::channel(Copy::Unknown);
        let (objects, stream, of) = (self.clone(), self.stream(id), id.clone());
        let task = AbortOnDropHandle::new(tokio::spawn(objects.follow(of, stream, sender)));
        state
            .watched
            .insert(id.clone(), Watched { pods: BTreeSet::from([uid.to_owned()]), copy, _task: task });
    }

    fn stream(&self, (kind, namespace, name): &Id) -> BoxStream<'static, watcher::Result<Copy>> {
        let client = self.client.clone();
        match kind {
            Kind::ConfigMap => {
                one(Api::namespaced(client, namespace), name, |map| Copy::ConfigMap(Arc::new(map)))
            }
            Kind::Secret => {
                one(Api::namespaced(client, namespace), name, |secret| Copy::Secret(Arc::new(secret)))
            }
        }
    }

    /// Keeps the copy until it is aborted; a watch that fails leaves it as it was.
    async fn follow(
        self,
        id: Id,
        mut stream: BoxStream<'static, watcher::Result<Copy>>,
        copy: watch::Sender<Copy>,
    ) {
        while let Some(seen) = stream.next().await {
            match seen {
                Ok(seen) => {
                    let changed = copy.borrow().version() != seen.version();
                    copy.send_replace(seen);
                    if !changed {
                        continue;
                    }
                    for uid in self.state.lock().changed(&id) {
                        // A full queue only delays it to the pod's next pass.
                        let _ = self.updates.try_send(Update::Content(uid));
                    }
                }
                Err(error) => {
                    let error = chain(&error);
                    debug!(kind = ?id.0, namespace = id.1, name = id.2, error, "an object cannot be watched");
                }
            }
        }
    }
}

impl State {
    fn release(&mut self, uid: &str, id: &Id) {
        if let Some(watched) = self.watched.get_mut(id) {
            watched.pods.remove(uid);
            if watched.pods.is_empty() {
                self.watched.remove(id);
            }
        }
    }

    /// The pods that name an object which has changed; each has a new revision.
    fn changed(&mut self, id: &Id) -> Vec<String> {
        let pods: Vec<_> = self.watched.get(id).map(|w| w.pods.iter().cloned().collect()).unwrap_or_default();
        for uid in &pods {
            *self.revisions.entry(uid.clone()).or_default() += 1;
        }
        pods
    }
}

/// One object by its name, as it is and each time that it changes.
fn one<K>(api: Api<K>, name: &str, copy: fn(K) -> Copy) -> BoxStream<'static, watcher::Result<Copy>>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut listed = false;
    let events = relist::watch(api, config).filter_map(move |event| {
        let seen = match event {
            Ok(Event::Init) => {
                listed = false;
                None
            }
            Ok(Event::InitApply(object)) => {
                listed = true;
                Some(Ok(copy(object)))
            }
            Ok(Event::InitDone) => (!listed).then_some(Ok(Copy::Missing)),
            Ok(Event::Apply(object)) => Some(Ok(copy(object))),
            Ok(Event::Delete(_)) => Some(Ok(Copy::Missing)),
            Err(error) => Some(Err(error)),
        };
        std::future::ready(seen)
    });
    events.boxed()
}

fn found<T>(kind: &'static str, name: &str, answer: kube::Result<T>) -> Result<T> {
    answer.map_err(|e| match e {
        kube::Error::Api(status) if status.code == 404 => Error::NotFound { kind, name: name.to_owned() },
        other => Error::api(format!("get {kind} {name:?}"))(other),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn pod(uid: &str, spec: &serde_json::Value) -> Pod {
        serde_json::from_value(
            serde_json::json!({"metadata": {"name": uid, "namespace": "d", "uid": uid}, "spec": spec}),
        )
        .unwrap()
    }

    /// An API server that has one ConfigMap in each namespace and remembers what it was asked.
    fn objects() -> (Objects, mpsc::Receiver<Update>, Arc<Mutex<Vec<String>>>) {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let remembered = asked.clone();
        let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
            remembered.lock().push(request.uri().to_string());
            let watches = request.uri().query().is_some_and(|q| q.contains("watch=true"));
            async move {
                if watches {
                    std::future::pending::<()>().await;
                }
                let map = serde_json::json!({"metadata": {"name": "m", "namespace": "d", "uid": "u", "resourceVersion": "1"},
                    "data": {"k": "v"}});
                let list = serde_json::json!({"kind": "ConfigMapList", "apiVersion": "v1",
                    "metadata": {"resourceVersion": "1"}, "items": [map]});
                let body = kube::client::Body::from(serde_json::to_vec(&list).unwrap());
                Ok::<_, std::convert::Infallible>(http::Response::new(body))
            }
        });
        let (updates, queue) = mpsc::channel(16);
        (Objects::new(Client::new(service, "default"), updates), queue, asked)
    }

    #[test]
    fn all_that_a_pod_names_is_found() {
        let pod = pod(
            "p",
            &serde_json::json!({
                "imagePullSecrets": [{"name": "pull"}],
                "volumes": [
                    {"name": "a", "configMap": {"name": "m1"}}, {"name": "b", "secret": {"secretName": "s1"}},
                    {"name": "c", "projected": {"sources": [{"configMap": {"name": "m2"}}, {"secret": {"name": "s2"}}]}}],
                "initContainers": [{"name": "i", "envFrom": [{"configMapRef": {"name": "m3"}}]}],
                "containers": [{"name": "c", "env": [
                    {"name": "X", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "k"}}}]}]}),
        );
        let names: Vec<_> = named_by(&pod).into_iter().map(|(_, _, name)| name).collect();
        assert_eq!(names, ["m1", "m2", "m3", "pull", "s1", "s2", "s3"]);
    }

    #[tokio::test]
    async fn one_watch_serves_all_pods_that_name_an_object_and_ends_with_the_last() {
        let (objects, mut updates, asked) = objects();
        let spec =
            serde_json::json!({"containers": [], "volumes": [{"name": "a", "configMap": {"name": "m"}}]});
        objects.set(&pod("p1", &spec));
        objects.set(&pod("p2", &spec));
        let map = objects.config_map("d", "m").await.unwrap();
        assert_eq!(map.data.unwrap()["k"], "v");
        objects.config_map("d", "m").await.unwrap();
        let mut told = Vec::new();
        for _ in 0..2 {
            let Some(Update::Content(uid)) = updates.recv().await else { panic!() };
            told.push(uid);
        }
        assert_eq!(told, ["p1", "p2"]);
        assert_eq!((objects.revision("p1"), objects.revision("p3")), (1, 0));
        let gets = asked.lock().iter().filter(|uri| !uri.contains("fieldSelector=metadata.name%3Dm")).count();
        assert_eq!(gets, 0, "{:?}", asked.lock());
        objects.remove("p1");
        assert_eq!(objects.state.lock().watched.len(), 1);
        objects.keep(&HashSet::new());
        assert!(objects.state.lock().watched.is_empty() && objects.state.lock().pods.is_empty());
    }

    #[tokio::test]
    async fn a_pod_that_has_finished_watches_nothing() {
        let (objects, _updates, _) = objects();
        let spec =
            serde_json::json!({"containers": [], "volumes": [{"name": "a", "configMap": {"name": "m"}}]});
        let mut pod = pod("p", &spec);
        objects.set(&pod);
        assert_eq!(objects.state.lock().watched.len(), 1);
        pod.status = serde_json::from_value(serde_json::json!({"phase": "Succeeded"})).unwrap();
        objects.set(&pod);
        assert!(objects.state.lock().watched.is_empty());
    }
}
