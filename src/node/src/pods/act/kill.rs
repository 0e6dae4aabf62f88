//! The end of containers, of a pod's sandbox, and of the pod: the one way in which anything is stopped.
//!
//! As in the kubelet a container that cannot be stopped keeps no sandbox from being stopped: the agent then ends the whole CT
//! from the host, whatever its init does.

use std::time::Duration;

use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use moxlet_cri::{host, v1};
use tracing::warn;

use crate::model::names;
use crate::{
    error::{Result, chain},
    events::Kind,
    pods::{
        plan::{Goal, Input, Kill, KillReason, Now, Plan, SandboxAction},
        state::PodState,
        worker::{Desired, Next, Worker},
    },
};

/// How long a pass waits for the API server to accept the last status.
const SETTLED: Duration = Duration::from_secs(20);
/// After how long a pod is looked at that the API server does not say is gone.
const STILL_THERE: Duration = Duration::from_secs(30);

impl Worker {
    /// Kills containers side by side, each with the pod's grace; a shorter grace that is asked for meanwhile takes effect at
    /// once. Answers the first failure, after all have been tried.
    pub(in crate::pods) async fn kill(&mut self, pod: &Pod, kills: &[Kill]) -> Result<()> {
        for kill in kills {
            let text = match kill.reason {
                KillReason::ImageChanged => {
                    format!("Container {} definition changed, will be restarted", kill.name)
                }
                _ => format!("Stopping container {}", kill.name),
            };
            self.emit_event_once(pod, Some(&kill.name), Kind::Normal, "Killing", text);
        }
        let agent = self.shared.agent.clone();
        let mut watch = self.desired.clone();
        let mut grace = watch.borrow().grace_seconds();
        loop {
            let stops = join_all(kills.iter().map(|kill| agent.stop_container(&kill.id, grace)));
            let shorter = watch.wait_for(|d| d.grace_seconds() < grace);
            tokio::select! {
                done = stops => return done.into_iter().filter(not_gone).collect(),
                Ok(new) = shorter => grace = new.grace_seconds(),
            }
        }
    }

    /// Ends all of a pod that runs: its containers, then in any case its sandboxes.
    async fn kill_pod(&mut self, pod: &Pod, state: &PodState) -> Result<()> {
        let plan = self.plan(pod, Goal::End, state);
        let killed = self.kill(pod, &plan.kill).await;
        if let Err(error) = &killed {
            warn!(pod = %names::full(pod), error = %chain(error), "a container was not stopped; its sandbox is stopped nevertheless");
        }
        // A container that did not end may keep its sandbox from being reported as ready.
        let all = || state.sandboxes.iter().map(|s| s.id.clone()).collect();
        let stop = match plan.sandbox {
            SandboxAction::Stop(ids) => ids,
            _ if killed.is_err() => all(),
            _ => return Ok(()),
        };
        self.stop_sandboxes(&stop).await?;
        // A sandbox that is stopped has taken its containers with it; without one the failure stands.
        if stop.is_empty() { killed } else { Ok(()) }
    }

    /// Stops sandboxes, all of them also where one fails.
    pub(in crate::pods) async fn stop_sandboxes(&self, ids: &[String]) -> Result<()> {
        let agent = self.shared.agent.as_ref();
        let stops = ids
            .iter()
            .map(|id| agent.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: id.clone() }));
        join_all(stops).await.into_iter().map(|done| done.map(drop)).filter(not_gone).collect()
    }

    /// A pod that has ended: nothing of it runs, its logs stay until it is deleted.
    pub(in crate::pods) async fn finish(&mut self, pod: &Pod, state: PodState) -> Result<Next> {
        self.kill_pod(pod, &state).await?;
        self.shared.admission.release(pod);
        let state = PodState::read(self.shared.agent.as_ref(), names::uid(pod)).await?;
        self.report(pod, &state, true).await;
        Ok(Next::Wait(None))
    }

    /// Ends and removes the pod, then its object: containers stopped with their grace, last status taken by the API server,
    /// everything removed, the object deleted; in this order. Every step is idempotent, so that a pass that failed is simply done
    /// again.
    pub(in crate::pods) async fn terminate(&mut self, desired: &Desired, state: PodState) -> Result<Next> {
        let pod = &desired.pod;
        let uid = names::uid(pod).to_owned();
        let shared = self.shared.clone();
        let agent = shared.agent.as_ref();
        self.kill_pod(pod, &state).await?;
        let last = if state.sandboxes.is_empty() && state.containers.is_empty() {
            state
        } else {
            PodState::read(agent, &uid).await?
        };
        self.report(pod, &last, true).await;
        let removed = async {
            for s in &last.sandboxes {
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
            self.emit_event_once(pod, None, Kind::Warning, "FailedUpdateStatus", text);
        }
        let delete = shared.cluster.delete_pod(names::namespace(pod), names::name(pod), &uid);
        match tokio::time::timeout(SETTLED, delete).await {
            // The watch says when it is gone; if it does not, this is done again.
            Ok(done) => done.map(|()| Next::Wait(Some(STILL_THERE))),
            Err(_) => Ok(Next::Wait(Some(Duration::from_secs(1)))),
        }
    }

    /// What is to be done with the pod now.
    pub(in crate::pods) fn plan(&self, pod: &Pod, goal: Goal, report: &PodState) -> Plan {
        let now = Now::read();
        let (status, backoffs) = (&self.status, &self.backoffs);
        Plan::new(&Input { pod, goal, report, status, backoffs, now })
    }
}

/// What is gone needs no end.
fn not_gone(done: &Result<()>) -> bool {
    !matches!(done, Err(error) if error.code() == Some(tonic::Code::NotFound))
}
