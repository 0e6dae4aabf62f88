//! One container's start: image, environment, configuration, create, start; each step with the kubelet's reasons.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};
use moxlet_cri::v1;

use crate::model::names;
use crate::{
    env,
    error::{Error, chain},
    events::Kind,
    pods::{
        backoffs::Waiting,
        container::{self, Given},
        plan::Start,
        sandbox_config,
        state::PodState,
        worker::{OBJECTS_DEADLINE, Worker},
    },
};

/// The pause after what somebody may mend meanwhile.
const SOON: Duration = Duration::from_secs(10);
/// The pause after a start that failed: the container then exists, and its back-off follows.
const AT_ONCE: Duration = Duration::from_millis(100);

/// Why a container could not be started, and how long until it is tried again.
pub(in crate::pods) struct Held {
    pub(in crate::pods) waiting: Waiting,
    pub(in crate::pods) pause: Duration,
}

impl Held {
    pub(in crate::pods) fn new(reason: &'static str, message: impl Into<String>, pause: Duration) -> Self {
        Self { waiting: Waiting { reason, message: message.into() }, pause }
    }
}

/// The agent's own words, without the name of the call.
pub(in crate::pods) fn words(error: &Error) -> String {
    match error {
        Error::Agent { status, .. } => status.message().to_owned(),
        other => chain(other),
    }
}

impl Worker {
    /// Starts a container as planned, or remembers why it waits. Answers whether it was started.
    pub(in crate::pods) async fn start(
        &mut self,
        pod: &Pod,
        c: &Container,
        start: &Start,
        state: &PodState,
        hosts_path: &str,
    ) -> bool {
        if let Some(ended) = start.ended {
            self.backoffs.restarting(c, ended, Timestamp::now());
        }
        match self.try_start(pod, c, start, state, hosts_path).await {
            Ok(()) => {
                self.backoffs.started(c);
                true
            }
            Err(held) => {
                self.backoffs.hold(c, held.waiting, held.pause, Instant::now());
                false
            }
        }
    }

    /// Says that a container waits in its back-off, as the kubelet does at each look.
    pub(in crate::pods) fn emit_back_off(&self, pod: &Pod, name: &str) {
        let text = format!("Back-off restarting failed container {name} in pod {}", names::full(pod));
        self.shared.events.pod(pod, Some(name), Kind::Warning, "BackOff", text);
    }

    fn fail(&self, pod: &Pod, c: &Container, reason: &'static str, message: String, pause: Duration) -> Held {
        self.shared.events.pod(pod, Some(&c.name), Kind::Warning, "Failed", format!("Error: {message}"));
        Held::new(reason, message, pause)
    }

    async fn try_start(
        &mut self,
        pod: &Pod,
        c: &Container,
        start: &Start,
        state: &PodState,
        hosts_path: &str,
    ) -> Result<(), Held> {
        let shared = self.shared.clone();
        let agent = shared.agent.as_ref();
        let Some(sandbox) = state.sandbox() else {
            return Err(Held::new("ContainerCreating", "", SOON));
        };
        let (image, variables) = self.image_and_variables(pod, c, &sandbox.ips).await?;
        let create_error = |e: &Error| self.fail(pod, c, "CreateContainerError", words(e), SOON);
        let _slot = shared.slots.acquire().await;
        if let Some(container_id) = start.discard.clone() {
            let request = v1::RemoveContainerRequest { container_id };
            agent.remove_container(request).await.map_err(|e| create_error(&e))?;
        }
        let given = Given {
            variables,
            image_ref: image.id.clone(),
            image_user: (image.uid.as_ref().map(|u| u.value), image.username.clone()),
            volumes: &self.volumes,
            hosts_path: hosts_path.to_owned(),
            attempt: start.attempt,
            memory_capacity: shared.info.borrow().memory_bytes,
        };
        let request = self
            .create_request(pod, c, (&sandbox.id, sandbox.attempt), given)
            .map_err(|e| self.fail(pod, c, "CreateContainerConfigError", words(&e), SOON))?;
        let id = agent.create_container(request).await.map_err(|e| create_error(&e))?.container_id;
        shared.events.pod(pod, Some(&c.name), Kind::Normal, "Created", "Container created");
        match agent.start_container(v1::StartContainerRequest { container_id: id }).await {
            Ok(_) => {
                shared.events.pod(pod, Some(&c.name), Kind::Normal, "Started", "Container started");
                Ok(())
            }
            Err(e) => Err(self.fail(pod, c, "RunContainerError", words(&e), AT_ONCE)),
        }
    }

    /// A container's image and environment, which are seen to side by side. Keys that cannot be names of variables are named in an
    /// event.
    async fn image_and_variables(
        &mut self,
        pod: &Pod,
        c: &Container,
        ips: &[String],
    ) -> Result<(v1::Image, Vec<(String, String)>), Held> {
        let shared = self.shared.clone();
        let facts = self.facts(ips);
        let environment = async {
            shared.services.ready().await;
            let wanted = pod.spec.as_ref().and_then(|s| s.enable_service_links) != Some(false);
            let links = shared.services.variables(names::namespace(pod), wanted);
            env::environment(shared.cluster.as_ref(), pod, c, &facts, links).await
        };
        let environment = async {
            let late = |_| Error::Deadline {
                what: "the container's environment",
                seconds: OBJECTS_DEADLINE.as_secs(),
            };
            tokio::time::timeout(OBJECTS_DEADLINE, environment).await.map_err(late)?
        };
        let (image, environment) = tokio::join!(self.image(pod, c), environment);
        let image = image?;
        let environment =
            environment.map_err(|e| self.fail(pod, c, "CreateContainerConfigError", words(&e), SOON))?;
        for (object, keys) in &environment.skipped {
            let text = format!(
                "Keys [{}] from the EnvFrom {object} were skipped since they are considered invalid environment variable names.",
                keys.join(", ")
            );
            shared.events.pod(pod, None, Kind::Warning, "InvalidEnvironmentVariableNames", text);
        }
        Ok((image, environment.variables))
    }

    fn create_request(
        &self,
        pod: &Pod,
        c: &Container,
        (sandbox_id, sandbox_attempt): (&str, u32),
        given: Given<'_>,
    ) -> crate::error::Result<v1::CreateContainerRequest> {
        let config = container::config(pod, c, given)?;
        let info = self.shared.info.borrow().clone();
        let sandbox_config = sandbox_config::config(
            pod,
            sandbox_attempt,
            &self.shared.config,
            &info.pod_logs_dir,
            info.sandbox_overhead_memory_bytes,
            &info.resolv_conf,
        )?;
        Ok(v1::CreateContainerRequest {
            pod_sandbox_id: sandbox_id.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        })
    }
}
