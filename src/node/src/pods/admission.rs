//! Whether a pod that was bound to this node fits on it, as a kubelet admits pods: kube-scheduler counts before it binds, but a
//! pod may name its node itself, and a scheduler may be late.
//!
//! What was once admitted stays so, also when the node is restarted or has become smaller.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::{Container, Pod};
use moxlet_cri::host::InfoResponse;
use parking_lot::Mutex;

use crate::model::{names, resources};

/// Why a pod is failed before anything of it is made: `status.reason` and `status.message`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rejection {
    /// The kubelet's word, such as `OutOfcpu`.
    pub(crate) reason: &'static str,
    /// What a person needs to know.
    pub(crate) message: String,
}

/// What the pods of a host ask for, or what it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Amount {
    pods: i128,
    /// Thousandths of a CPU.
    milli_cpu: i128,
    /// Bytes.
    memory: i128,
}

impl Amount {
    fn of(pod: &Pod) -> Self {
        let spec = pod.spec.as_ref();
        let containers = spec.map(|s| s.containers.as_slice()).unwrap_or_default();
        let inits = spec.and_then(|s| s.init_containers.as_deref()).unwrap_or_default();
        // The larger of the sum of containers and any init container, and the pod's overhead (kube-scheduler's formula).
        let total = |key: &str| {
            let want = |c: &Container| {
                resources::request(c.resources.as_ref(), key).and_then(resources::milli).unwrap_or(0)
            };
            let sum: i128 = containers.iter().map(want).sum();
            let most = inits.iter().map(want).max().unwrap_or(0);
            let overhead = spec.and_then(|s| s.overhead.as_ref()).and_then(|o| o.get(key));
            sum.max(most) + overhead.and_then(|q| resources::milli(&q.0)).unwrap_or(0)
        };
        Self { pods: 1, milli_cpu: total("cpu"), memory: total("memory").div_euclid(1000) }
    }

    fn of_host(info: &InfoResponse, max_pods: u32) -> Self {
        Self {
            pods: i128::from(max_pods),
            milli_cpu: i128::from(info.cpus) * 1000,
            memory: i128::from(info.memory_bytes.saturating_sub(info.memory_reserved_bytes)),
        }
    }
}

/// The pods that a host has room for.
#[derive(Debug, Default)]
pub(crate) struct Admission {
    admitted: Mutex<HashMap<String, Amount>>,
}

impl Admission {
    /// Counts a pod that was admitted before.
    pub(crate) fn keep(&self, pod: &Pod) {
        self.admitted.lock().insert(names::uid(pod).to_owned(), Amount::of(pod));
    }

    /// Admits a pod, and counts it until it is released.
    ///
    /// # Errors
    /// What the host has not enough of, in the kubelet's words.
    pub(crate) fn admit(&self, pod: &Pod, info: &InfoResponse, max_pods: u32) -> Result<(), Rejection> {
        let (wanted, capacity) = (Amount::of(pod), Amount::of_host(info, max_pods));
        let mut admitted = self.admitted.lock();
        if admitted.contains_key(names::uid(pod)) {
            return Ok(());
        }
        let used = admitted.values().fold(Amount::default(), |a, b| Amount {
            pods: a.pods + b.pods,
            milli_cpu: a.milli_cpu + b.milli_cpu,
            memory: a.memory + b.memory,
        });
        let rows = [
            ("OutOfpods", "pods", wanted.pods, used.pods, capacity.pods),
            ("OutOfcpu", "cpu", wanted.milli_cpu, used.milli_cpu, capacity.milli_cpu),
            ("OutOfmemory", "memory", wanted.memory, used.memory, capacity.memory),
        ];
        for (reason, resource, wanted, used, capacity) in rows {
            if wanted > 0 && wanted + used > capacity {
                let message = format!(
                    "Node didn't have enough resource: {resource}, requested: {wanted}, used: {used}, capacity: {capacity}"
                );
                return Err(Rejection { reason, message });
            }
        }
        admitted.insert(names::uid(pod).to_owned(), wanted);
        Ok(())
    }

    /// A pod runs no more.
    pub(crate) fn release(&self, pod: &Pod) {
        self.admitted.lock().remove(names::uid(pod));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    fn pod(uid: &str, cpu: &str, memory: &str) -> Pod {
        let requests = json!({"requests": {"cpu": cpu, "memory": memory}});
        serde_json::from_value(json!({"metadata": {"uid": uid},
            "spec": {"containers": [{"name": "a", "resources": requests}], "initContainers": [{"name": "i", "resources": requests}]}}))
        .unwrap()
    }

    fn host() -> InfoResponse {
        InfoResponse {
            cpus: 2,
            memory_bytes: 3 << 30,
            memory_reserved_bytes: 1 << 30,
            ..InfoResponse::default()
        }
    }

    #[test]
    fn what_a_host_has_not_enough_of_is_named_as_a_kubelet_names_it() {
        let admission = Admission::default();
        let admit = |pod: &Pod| admission.admit(pod, &host(), 3).map_err(|r| (r.reason, r.message));
        assert_eq!(admit(&pod("1", "1500m", "1Gi")), Ok(()));
        let (reason, message) = admit(&pod("2", "1", "1Mi")).unwrap_err();
        assert_eq!(
            (reason, message.as_str()),
            (
                "OutOfcpu",
                "Node didn't have enough resource: cpu, requested: 1000, used: 1500, capacity: 2000"
            )
        );
        assert_eq!(admit(&pod("2", "100m", "2Gi")).unwrap_err().0, "OutOfmemory");
        assert_eq!(admit(&pod("2", "0", "0")), Ok(()));
        assert_eq!(admit(&pod("3", "0", "0")), Ok(()));
        assert_eq!(admit(&pod("4", "0", "0")).unwrap_err().0, "OutOfpods");
        // What has ended makes room; what was admitted stays so.
        admission.release(&pod("1", "1500m", "1Gi"));
        assert_eq!(admit(&pod("4", "1", "1Gi")), Ok(()));
        assert_eq!(admission.admit(&pod("4", "1", "1Gi"), &InfoResponse::default(), 0), Ok(()));
    }

    #[test]
    fn a_pod_of_before_is_counted_whether_it_fits_or_not() {
        let admission = Admission::default();
        admission.keep(&pod("1", "64", "64Gi"));
        assert_eq!(admission.admit(&pod("2", "1", "1Mi"), &host(), 10).unwrap_err().reason, "OutOfcpu");
        assert!(admission.admit(&pod("3", "0", "0"), &host(), 10).is_ok());
    }
}
