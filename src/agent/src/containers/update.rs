//! `UpdateContainerResources`.

use moxlet_cri::v1;
use moxlet_sandbox::cgroup;

use super::Containers;
use crate::{
    error::{Error, Result},
    limits,
    state::RunState,
    tasks::blocking,
};

impl Containers {
    /// Changes what a running container may use.
    ///
    /// # Errors
    /// It does not run, or a field cannot be changed; nothing is changed then.
    pub(crate) async fn update(&self, id: &str, asked: &v1::LinuxContainerResources) -> Result<()> {
        let container = self.state.container(id)?;
        let sandbox = self.state.sandbox(container.sandbox.as_str())?;
        let _guard = sandbox.change.lock().await;
        if !matches!(container.run_state(), RunState::Running { .. }) {
            return Err(Error::State(format!("container {} is not running", container.id)));
        }
        let limits::Change { limits, oom_score_adj, resources } =
            limits::change(&container.record().resources, asked)?;
        let (cgroups, of, id) = (self.cgroups.clone(), sandbox.id.clone(), container.id.clone());
        blocking(move || {
            cgroups.update(&of, Some(&id), &limits)?;
            for pid in oom_score_adj.iter().flat_map(|_| cgroups.processes_of(&of, &id)) {
                cgroup::set_oom_score_adj(pid, oom_score_adj.unwrap_or_default())?;
            }
            Ok(())
        })
        .await?;
        self.state
            .change_container(&container, |r| {
                // An older version's record has a limit and no resources.
                if resources.memory_limit != r.resources.memory_limit {
                    r.memory_limit = u64::try_from(resources.memory_limit).ok().filter(|limit| *limit > 0);
                }
                r.resources = resources;
            })
            .await
    }
}
