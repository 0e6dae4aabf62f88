//! `StartContainer`: the container's cgroup, then the init makes it and executes its command.

use std::{sync::Arc, time::Duration};

use moxlet_sandbox::{Limits, cgroup};
use tracing::info;

use super::Containers;
use crate::{
    error::{Error, Result},
    state::{Container, Prepared, RunState, Sandbox},
    tasks::blocking,
};

/// With less memory, in bytes, a container fails before its command, in whatever words.
const LEAST_MEMORY: u64 = 2 << 20;
/// How long an init may take to make a container, or to have its command executed.
const MADE: Duration = Duration::from_secs(60);

impl Containers {
    /// `StartContainer`.
    pub(crate) async fn start(self: &Arc<Self>, id: &str) -> Result<()> {
        let container = self.state.container(id)?;
        let sandbox = self.state.sandbox(container.sandbox.as_str())?;
        let own = self.clone();
        self.tasks
            .whole(async move {
                let _guard = sandbox.change.lock().await;
                if container.run_state() != RunState::Created {
                    return Err(Error::State(format!("container {} was started before", container.id)));
                }
                let prepared = container.take_prepared();
                let prepared = prepared
                    .ok_or_else(|| Error::State(format!("container {} cannot be started", container.id)))?;
                own.state.change_container(&container, |r| r.started = true).await?;
                let outcome = own.run(&sandbox, &container, prepared).await;
                if let Err(error) = &outcome {
                    own.not_started(&sandbox, &container, error).await?;
                }
                outcome
            })
            .await
    }

    async fn run(
        &self,
        sandbox: &Arc<Sandbox>,
        container: &Arc<Container>,
        prepared: Prepared,
    ) -> Result<()> {
        let client = sandbox.client()?;
        let (cgroups, of, id) = (self.cgroups.clone(), sandbox.id.clone(), container.id.clone());
        let (limits, map) = (prepared.limits, self.settings.map);
        blocking(move || Ok(cgroups.create(&of, &id, &limits, map)?)).await?;
        if let Err(error) = sandbox.answer("create", MADE, client.create(prepared.request)).await {
            return Err(self
                .too_little_memory(sandbox, container, &limits)
                .await
                .unwrap_or_else(|| error.into()));
        }
        if let Some(adj) = prepared.oom_score_adj {
            let (cgroups, of, id) = (self.cgroups.clone(), sandbox.id.clone(), container.id.clone());
            blocking(move || {
                for pid in cgroups.processes_of(&of, &id) {
                    cgroup::set_oom_score_adj(pid, adj)?;
                }
                Ok(())
            })
            .await?;
        }
        let state = sandbox.answer("start", MADE, client.start(container.id.as_str())).await?;
        let record = container.record();
        info!(container = %container.id, name = record.name, sandbox = %sandbox.id, image = record.user_image, "container runs");
        self.reported(sandbox, state).await
    }

    /// The reason why a container could not be made, if it is its limit of memory: what makes it runs under that limit already and was
    /// killed before the command.
    async fn too_little_memory(
        &self,
        sandbox: &Arc<Sandbox>,
        container: &Arc<Container>,
        limits: &Limits,
    ) -> Option<Error> {
        let limit = limits.memory_bytes?;
        if limit >= LEAST_MEMORY && !self.oom_killed(sandbox, container).await {
            return None;
        }
        Some(Error::Invalid(format!(
            "the memory limit of {limit} bytes is too low: nothing starts with less than some {} MiB",
            LEAST_MEMORY >> 20
        )))
    }
}
