//! One container's start: back-off, image, configuration, create, start; each step with the kubelet's reasons.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};
use moxlet_cri::v1;

use super::{
    backoff::go_duration,
    container::{self, Given},
    names,
    state::{Phase, PodState, Sandbox},
    worker::Worker,
};
use crate::{
    env,
    error::{Error, Result, chain},
    events::Kind,
};

/// The pause after what somebody may mend meanwhile.
const SOON: Duration = Duration::from_secs(10);

/// Why a container waits, and how long.
pub(super) struct Held {
    pub(super) reason: &'static str,
    pub(super) message: String,
    pub(super) pause: Duration,
}

fn least(a: &mut Option<Duration>, b: Duration) {
    *a = Some(a.map_or(b, |a| a.min(b)));
}

/// The agent's own words, without the name of the call.
pub(super) fn words(error: &Error) -> String {
    match error {
        Error::Agent { status, .. } => status.message().to_owned(),
        other => chain(other),
    }
}

impl Worker {
    /// Starts a container, or notes why it waits. An error means that the agent cannot be asked.
    pub(super) async fn start(
        &mut self,
        pod: &Pod,
        c: &Container,
        state: &mut PodState,
        ips: &[String],
        hosts_path: &str,
        next: &mut Option<Duration>,
    ) -> Result<()> {
        let now = Timestamp::now();
        let newest = state.newest(&c.name).cloned();
        let in_sandbox = newest.as_ref().filter(|n| state.sandbox().is_some_and(|s| s.id == n.sandbox));
        if let Some(dead) = in_sandbox.filter(|n| n.phase == Phase::Exited) {
            let failed_at =
                Timestamp::from_nanosecond(i128::from(dead.finished_at.max(dead.created_at))).unwrap_or(now);
            if let Some((left, delay)) = self.backoff.remaining(&c.name, failed_at, now) {
                let place = names::full(pod);
                self.shared.events.pod(
                    pod,
                    Some(&c.name),
                    Kind::Warning,
                    "BackOff",
                    format!("Back-off restarting failed container {} in pod {place}", c.name),
                );
                let message = format!(
                    "back-off {} restarting failed container={} pod={place}",
                    go_duration(delay),
                    c.name
                );
                self.waiting.insert(c.name.clone(), ("CrashLoopBackOff".into(), message));
                least(next, left);
                return Ok(());
            }
            self.backoff.raise(&c.name, failed_at, now);
        } else if let Some(until) = self.held.get(&c.name) {
            // What failed before the start is tried again at its own pace, whatever else happens to the pod meanwhile.
            let left = until.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                least(next, left);
                return Ok(());
            }
        }
        match self.try_start(pod, c, state, ips, hosts_path).await {
            Ok(()) => {
                self.waiting.remove(&c.name);
                self.held.remove(&c.name);
                Ok(())
            }
            Err(held) => {
                self.held.insert(c.name.clone(), Instant::now() + held.pause);
                self.waiting.insert(c.name.clone(), (held.reason.to_owned(), held.message));
                least(next, held.pause);
                Ok(())
            }
        }
    }

    fn fail(&self, pod: &Pod, c: &Container, reason: &'static str, message: String, pause: Duration) -> Held {
        self.shared.events.pod(pod, Some(&c.name), Kind::Warning, "Failed", format!("Error: {message}"));
        Held { reason, message, pause }
    }

    async fn try_start(
        &mut self,
        pod: &Pod,
        c: &Container,
        state: &mut PodState,
        ips: &[String],
        hosts_path: &str,
    ) -> Result<(), Held> {
        let shared = self.shared.clone();
        let agent = shared.agent.as_ref();
        let (image, variables) = self.image_and_variables(pod, c, ips).await?;
        let Some(sandbox) = state.sandbox().cloned() else {
            return Err(Held { reason: "ContainerCreating", message: String::new(), pause: SOON });
        };
        let create_error = |e: &Error| self.fail(pod, c, "CreateContainerError", words(e), SOON);
        let (attempt, unstarted) = self.attempt(c, state);
        if let Some(container_id) = unstarted {
            let request = v1::RemoveContainerRequest { container_id };
            agent.remove_container(request).await.map_err(|e| create_error(&e))?;
        }
        let given = Given {
            variables,
            image_ref: image.id.clone(),
            image_user: (image.uid.as_ref().map(|u| u.value), image.username.clone()),
            volumes: &self.volumes,
            hosts_path: hosts_path.to_owned(),
            attempt,
            memory_capacity: shared.info.borrow().memory_bytes,
        };
        let request = self
            .create_request(pod, c, &sandbox, given)
            .await
            .map_err(|e| self.fail(pod, c, "CreateContainerConfigError", words(&e), SOON))?;
        let id = agent.create_container(request).await.map_err(|e| create_error(&e))?.container_id;
        shared.events.pod(pod, Some(&c.name), Kind::Normal, "Created", "Container created");
        let started = agent.start_container(v1::StartContainerRequest { container_id: id }).await;
        let read = PodState::read(agent, names::uid(pod)).await;
        if let Ok(read) = read {
            *state = read;
        }
        match started {
            Ok(_) => {
                shared.events.pod(pod, Some(&c.name), Kind::Normal, "Started", "Container started");
                Ok(())
            }
            Err(e) => Err(self.fail(pod, c, "RunContainerError", words(&e), Duration::from_millis(100))),
        }
    }

    /// A container's image and environment, which are seen to side by side. Keys that cannot be names of variables are told.
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

    /// The number of a container's next attempt, and what has it already: made and never started, it is made again under it.
    fn attempt(&self, c: &Container, state: &PodState) -> (u32, Option<String>) {
        if let Some(newest) = state.newest(&c.name) {
            return match newest.phase {
                Phase::Created => (newest.attempt, Some(newest.id.clone())),
                _ => (newest.attempt + 1, None),
            };
        }
        let statuses = self.status.container_statuses.iter().chain(&self.status.init_container_statuses);
        let old = statuses.flatten().find(|s| s.name == c.name && s.container_id.is_some());
        (old.map_or(0, |old| u32::try_from(old.restart_count).unwrap_or(0) + 1), None)
    }

    async fn create_request(
        &self,
        pod: &Pod,
        c: &Container,
        sandbox: &Sandbox,
        given: Given<'_>,
    ) -> crate::error::Result<v1::CreateContainerRequest> {
        let config = container::config(pod, c, given)?;
        let info = self.shared.info.borrow().clone();
        let sandbox_config = super::sandbox::config(
            pod,
            sandbox.attempt,
            &self.shared.config,
            &info.pod_logs_dir,
            info.sandbox_overhead_memory_bytes,
            &info.resolv_conf,
        )?;
        Ok(v1::CreateContainerRequest {
            pod_sandbox_id: sandbox.id.clone(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        })
    }
}
