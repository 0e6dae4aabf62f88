//! The stream of CRI's container events: `GetContainerEvents`, and the agent's own parts that follow what happens.

use std::sync::Arc;

use moxlet_cri::v1;
use tokio::sync::broadcast;

use crate::{
    clock::now_ns,
    state::{Sandbox, State},
    status,
};

/// Events that wait for a slow reader before it loses some; a reader that lost some lists again.
const KEPT: usize = 1024;

/// The stream. Clones are the same.
#[derive(Clone)]
pub(crate) struct Events {
    state: Arc<State>,
    sender: broadcast::Sender<v1::ContainerEventResponse>,
}

impl Events {
    /// A stream of what happens to these sandboxes and containers.
    pub(crate) fn new(state: Arc<State>) -> Self {
        Self { state, sender: broadcast::Sender::new(KEPT) }
    }

    /// Sends an event; `id` is a container's or a sandbox's.
    pub(crate) fn send(&self, id: &str, sandbox: &Sandbox, kind: v1::ContainerEventType) {
        if self.sender.receiver_count() == 0 {
            return;
        }
        let statuses = self.state.containers_of(&sandbox.id).iter().map(|c| status::container(c)).collect();
        let _ = self.sender.send(v1::ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: kind as i32,
            created_at: now_ns(),
            pod_sandbox_status: Some(status::sandbox(sandbox)),
            containers_statuses: statuses,
        });
    }

    /// The events from now on.
    pub(crate) fn subscribe(&self) -> broadcast::Receiver<v1::ContainerEventResponse> {
        self.sender.subscribe()
    }
}
