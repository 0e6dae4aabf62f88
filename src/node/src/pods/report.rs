//! What a worker makes known of its pod: the status for the API server, the published copy for the kubelet API.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::core::v1::Pod;
use moxlet_cri::host;

use super::{
    registry::{ContainerView, PodView},
    state::{Phase, PodState},
    status,
    worker::Worker,
};
use crate::metrics;
use crate::model::{names, resources};

impl Worker {
    /// Reads termination messages that are not known yet.
    async fn read_messages(&mut self, pod: &Pod, state: &PodState) {
        for c in state.containers.iter().filter(|c| c.phase == Phase::Exited) {
            if self.messages.contains_key(&c.id) {
                continue;
            }
            let agent = self.shared.agent.as_ref();
            let request = host::TerminationMessageRequest { container_id: c.id.clone() };
            let Ok(answer) = agent.termination_message(request).await else { continue };
            let mut data = answer.data;
            data.truncate(4096);
            let falls_back = resources::all_containers(pod).any(|s| {
                s.name == c.name && s.termination_message_policy.as_deref() == Some("FallbackToLogsOnError")
            });
            if data.is_empty() && falls_back && c.exit_code != 0 {
                data = agent.log_tail(&c.id, 80, 2048).await.unwrap_or_default();
            }
            self.messages.insert(c.id.clone(), String::from_utf8_lossy(&data).into_owned());
        }
        self.messages.retain(|id, _| state.containers.iter().any(|c| c.id == *id));
    }

    /// Computes the status and publishes it, to the API server and to the registry.
    pub(super) async fn report(&mut self, pod: &Pod, state: &PodState, ended: bool) {
        self.read_messages(pod, state).await;
        let host_ips = self.shared.host_ips();
        let runtime =
            self.shared.info.borrow().runtime_version.split("://").next().unwrap_or("moxlet").to_owned();
        let inputs = status::Inputs {
            waiting: self.waiting.clone(),
            messages: self.messages.clone(),
            host_ips: &host_ips,
            ended,
            failure: self.failure.clone(),
            runtime: if runtime.is_empty() { "moxlet" } else { &runtime },
        };
        let new = status::build(pod, state, &self.status, &inputs);
        self.status = new.clone();
        self.publisher.publish(Arc::new(new.clone()));
        let up = new.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
        if up && !self.counted {
            self.counted = true;
            metrics::pod_started(self.first_seen.elapsed());
        }
        let containers: BTreeMap<_, _> = resources::all_containers(pod)
            .map(|c| {
                let mut history = state.history(&c.name);
                let (current, previous) = (history.next(), history.next());
                let log =
                    |attempt| format!("{}/{}", names::log_directory(pod), names::log_file(&c.name, attempt));
                let view = ContainerView {
                    current: current.map(|c| c.id.clone()),
                    previous: previous.map(|c| c.id.clone()),
                    log_path: current.map(|c| log(c.attempt)),
                    previous_log_path: previous.map(|c| log(c.attempt)),
                };
                (c.name.clone(), view)
            })
            .collect();
        let mut shown = pod.clone();
        shown.status = Some(new);
        self.shared.registry.publish(PodView {
            pod: Arc::new(shown),
            sandbox_id: state.sandbox().map(|s| s.id.clone()),
            containers,
        });
    }
}
