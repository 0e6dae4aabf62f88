//! The end of a pod: containers stopped with their grace, last status taken by the API server, everything removed,
//! the object deleted; in this order.

use std::time::Duration;

use moxlet_cri::{host, v1};

use super::{
    names,
    state::{Phase, PodState},
    worker::{Desired, Next, Worker},
};
use crate::{error::Result, events::Kind};

/// How long a pass waits for the API server to accept the last status.
const SETTLED: Duration = Duration::from_secs(20);

impl Worker {
    /// Ends the pod; every step is idempotent, so that a pass that failed is simply done again.
    pub(super) async fn terminate(&mut self, desired: &Desired, state: PodState) -> Result<Next> {
        let pod = &desired.pod;
        let uid = names::uid(pod).to_owned();
        let shared = self.shared.clone();
        let agent = shared.agent.as_ref();
        for c in state.containers.iter().filter(|c| c.phase == Phase::Running) {
            self.say_once(
                pod,
                Some(&c.name),
                Kind::Normal,
                "Killing",
                format!("Stopping container {}", c.name),
            );
        }
        // A shorter grace that is asked for meanwhile takes effect at once.
        let mut watch = self.desired.clone();
        let mut grace = desired.grace_seconds();
        loop {
            let stops = futures::future::try_join_all(
                state
                    .containers
                    .iter()
                    .filter(|c| c.phase == Phase::Running)
                    .map(|c| agent.stop_container(&c.id, grace)),
            );
            let shorter = watch.wait_for(|d| d.grace_seconds() < grace);
            tokio::select! {
                done = stops => {
                    done?;
                    break;
                }
                Ok(new) = shorter => {
                    grace = new.grace_seconds();
                }
            }
        }
        for s in state.sandboxes.iter().filter(|s| s.ready) {
            agent.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: s.id.clone() }).await?;
        }
        if !state.sandboxes.is_empty() || !state.containers.is_empty() {
            let last = PodState::read(agent, &uid).await?;
            self.report(pod, &last, true).await;
        } else {
            self.report(pod, &state, true).await;
        }
        let removed = async {
            for s in &state.sandboxes {
                agent
                    .remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: s.id.clone() })
                    .await?;
            }
            agent.remove_pod_volumes(host::RemovePodVolumesRequest { pod_uid: uid.clone() }).await
        };
        if desired.gone {
            removed.await?;
            return Ok(Next::Done);
        }
        let settled = tokio::time::timeout(SETTLED, self.publisher.settled());
        let (removed, settled) = tokio::join!(removed, settled);
        removed?;
        if settled.is_err() {
            // The API server is away: the object stays until it has the last status, but the worker looks up.
            return Ok(Next::Wait(Some(Duration::from_secs(1))));
        }
        if let Some(why) = self.publisher.rejection() {
            let text = format!(
                "The API server refuses the last status of this pod, which is deleted without it: {why}"
            );
            self.say_once(pod, None, Kind::Warning, "FailedUpdateStatus", text);
        }
        shared.cluster.delete_pod(names::namespace(pod), names::name(pod), &uid).await?;
        // The watch says when it is gone; if it does not, this is done again.
        Ok(Next::Wait(Some(Duration::from_secs(30))))
    }
}
