//! The published copy of all pods: workers write it, the kubelet API and the metrics only read it.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use k8s_openapi::api::core::v1::Pod;

/// What is known of one container of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerView {
    /// CRI id of the newest container.
    pub current: Option<String>,
    /// CRI id of the one before it, for `--previous`.
    pub previous: Option<String>,
    /// Log of the newest one, relative to the agent's `pod_logs_dir`.
    pub log_path: Option<String>,
    /// Log of the one before it, likewise.
    pub previous_log_path: Option<String>,
}

/// What is known of one pod.
#[derive(Clone, Debug)]
pub struct PodView {
    /// The pod with its current status.
    pub pod: Arc<Pod>,
    /// CRI id of its newest sandbox.
    pub sandbox_id: Option<String>,
    /// Its containers by name, init containers included.
    pub containers: BTreeMap<String, ContainerView>,
}

/// By namespace and name.
type Pods = BTreeMap<(String, String), Arc<PodView>>;

/// All pods of the node, by namespace and name.
#[derive(Clone, Default)]
pub struct PodRegistry {
    pods: Arc<RwLock<Pods>>,
}

impl PodRegistry {
    /// The pod of that name.
    #[must_use]
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<PodView>> {
        let pods = self.pods.read().unwrap_or_else(PoisonError::into_inner);
        pods.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    /// All pods.
    #[must_use]
    pub fn list(&self) -> Vec<Arc<PodView>> {
        self.pods.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Publishes a pod.
    pub(crate) fn publish(&self, view: PodView) {
        let meta = &view.pod.metadata;
        let key = (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default());
        self.pods.write().unwrap_or_else(PoisonError::into_inner).insert(key, Arc::new(view));
    }

    /// Forgets a pod, unless another of the same name has taken its place.
    pub(crate) fn forget(&self, namespace: &str, name: &str, uid: &str) {
        let key = (namespace.to_owned(), name.to_owned());
        let mut pods = self.pods.write().unwrap_or_else(PoisonError::into_inner);
        if pods.get(&key).is_some_and(|v| v.pod.metadata.uid.as_deref() == Some(uid)) {
            pods.remove(&key);
        }
    }
}
