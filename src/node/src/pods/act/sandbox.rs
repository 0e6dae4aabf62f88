//! A pod's sandbox: made once its volumes are there, made anew where it has ended.

use k8s_openapi::api::core::v1::Pod;
use moxlet_cri::v1;

use crate::model::names;
use crate::{
    error::{Error, Result, chain},
    events::Kind,
    pods::{sandbox_config, state::PodState, worker::Worker},
};

impl Worker {
    /// Makes a sandbox in place of those to stop, and says why where it cannot be made. Answers whether it was.
    pub(in crate::pods) async fn create_sandbox(
        &mut self,
        pod: &Pod,
        attempt: u32,
        stop: &[String],
        remove: &[String],
    ) -> bool {
        if attempt > 0 {
            let text = "Pod sandbox changed, it will be killed and re-created.";
            self.shared.events.pod(pod, None, Kind::Normal, "SandboxChanged", text);
        }
        match self.replace_sandbox(pod, attempt, stop, remove).await {
            Ok(()) => {
                self.backoffs.sandbox.succeeded();
                true
            }
            Err(error) => {
                let text = format!("Failed to create pod sandbox: {}", chain(&error));
                self.shared.events.pod(pod, None, Kind::Warning, "FailedCreatePodSandBox", text);
                self.backoffs.sandbox.failed(std::time::Instant::now());
                false
            }
        }
    }

    async fn replace_sandbox(
        &self,
        pod: &Pod,
        attempt: u32,
        stop: &[String],
        remove: &[String],
    ) -> Result<()> {
        let shared = self.shared.clone();
        self.stop_sandboxes(stop).await?;
        for id in remove {
            let request = v1::RemovePodSandboxRequest { pod_sandbox_id: id.clone() };
            shared.agent.remove_pod_sandbox(request).await?;
        }
        let info = shared.info.borrow().clone();
        let config = sandbox_config::config(
            pod,
            attempt,
            &shared.config,
            &info.pod_logs_dir,
            info.sandbox_overhead_memory_bytes,
            &info.resolv_conf,
        )?;
        let _slot = shared.slots.acquire().await;
        let request = v1::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
        shared.agent.run_pod_sandbox(request).await?;
        let state = PodState::read(shared.agent.as_ref(), names::uid(pod)).await?;
        match state.sandbox().filter(|s| s.ready) {
            Some(_) => Ok(()),
            None => Err(Error::AgentAnswer { call: "PodSandboxStatus", what: "a running sandbox" }),
        }
    }
}
