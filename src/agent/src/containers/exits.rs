//! How containers end, or are found to run: what the init reports, what it wrote down, and what is known without either.

use std::sync::Arc;

use moxlet_cri::v1;
use moxlet_errors::chain;
use moxlet_init_proto::{ContainerState, Status, read_exit_record};
use tracing::{debug, info, warn};

use super::{ANSWER, Containers};
use crate::{
    clock::now_ns,
    error::{Error, Result},
    ledger::Exit,
    signals::KILL,
    state::{Container, RunState, Sandbox},
    tasks::blocking,
};

/// The exit code of a container that could not be started, as containerd has it.
const START_ERROR: i32 = 128;

impl Containers {
    /// A container that could not be started has ended with containerd's code and reason; what the init made of it goes.
    pub(crate) async fn not_started(
        &self,
        sandbox: &Arc<Sandbox>,
        container: &Arc<Container>,
        error: &Error,
    ) -> Result<()> {
        if let Ok(client) = sandbox.client() {
            let id = container.id.as_str();
            let killed = async {
                let _ = client.signal(id, KILL, true).await;
                client.remove(id).await
            };
            if let Err(error) = sandbox.answer("remove", ANSWER, killed).await {
                debug!(
                    container = id,
                    error = chain(&error),
                    "what was begun of a container stays until it is removed"
                );
            }
        }
        let exit = Exit {
            code: START_ERROR,
            reason: "StartError".into(),
            message: chain(error),
            started_at_ns: 0,
            finished_at_ns: now_ns(),
        };
        self.exited(sandbox, container, exit).await
    }

    /// What the init says about a container.
    pub(crate) async fn reported(&self, sandbox: &Arc<Sandbox>, state: ContainerState) -> Result<()> {
        let Ok(container) = self.state.container(&state.id) else { return Ok(()) };
        if container.sandbox != sandbox.id {
            return Ok(());
        }
        match state.status {
            Status::Created => Ok(()),
            Status::Running { started_at_ns, .. } => {
                let mut fresh = false;
                container.state.send_if_modified(|now| {
                    let reported = RunState::Running { started_at_ns };
                    fresh = *now == RunState::Created;
                    let changed = !now.has_ended() && *now != reported;
                    if changed {
                        *now = reported;
                    }
                    changed
                });
                if fresh {
                    self.events.send(
                        container.id.as_str(),
                        sandbox,
                        v1::ContainerEventType::ContainerStartedEvent,
                    );
                }
                Ok(())
            }
            Status::Exited { code, started_at_ns, finished_at_ns, message, .. } => {
                if container.record().exit.is_some() {
                    return Ok(());
                }
                let (reason, message) = match message {
                    Some(message) => ("StartError", message),
                    None if code == 0 => ("Completed", String::new()),
                    None if self.oom_killed(sandbox, &container).await => ("OOMKilled", String::new()),
                    None => ("Error", String::new()),
                };
                let exit = Exit { code, reason: reason.into(), message, started_at_ns, finished_at_ns };
                self.exited(sandbox, &container, exit).await
            }
        }
    }

    pub(super) async fn oom_killed(&self, sandbox: &Arc<Sandbox>, container: &Arc<Container>) -> bool {
        let (cgroups, of, id) = (self.cgroups.clone(), sandbox.id.clone(), container.id.clone());
        let read = move || Ok(cgroups.oom_kills(&of, Some(&id)).unwrap_or(0) > 0);
        blocking(read).await.unwrap_or(false)
    }

    /// Writes down an end, once, and sends the event.
    async fn exited(&self, sandbox: &Arc<Sandbox>, container: &Arc<Container>, exit: Exit) -> Result<()> {
        let mut first = false;
        self.state
            .change_container(container, |r| {
                first = r.exit.is_none();
                r.exit.get_or_insert(exit);
            })
            .await?;
        let record = container.record();
        if let (true, Some(exit)) = (first, record.exit) {
            info!(container = %container.id, name = record.name, code = exit.code, reason = exit.reason, "container has ended");
            self.events.send(container.id.as_str(), sandbox, v1::ContainerEventType::ContainerStoppedEvent);
        }
        Ok(())
    }

    /// The CT has ended: a container that ran has the end that its init wrote down, or an unknown one.
    pub(crate) async fn lost(&self, sandbox: &Arc<Sandbox>, container: &Arc<Container>) -> Result<()> {
        let record = container.record();
        if record.exit.is_some() || !record.started {
            return Ok(());
        }
        let path = self.dirs.pod(&sandbox.id).join("state").join(format!("{}.json", container.id));
        let written = blocking(move || Ok(read_exit_record(&path)?)).await;
        match written {
            Ok(Some(state)) if matches!(state.status, Status::Exited { .. }) => {
                return self.reported(sandbox, state).await;
            }
            Ok(_) => {}
            Err(error) => {
                warn!(container = %container.id, error = chain(&error), "an exit record is not used");
            }
        }
        let started_at_ns = match container.run_state() {
            RunState::Running { started_at_ns } => started_at_ns,
            _ => 0,
        };
        let exit = Exit {
            code: 137,
            reason: "ContainerStatusUnknown".into(),
            message: "The pod's CT ended before the container's end could be written down".into(),
            started_at_ns,
            finished_at_ns: now_ns(),
        };
        self.exited(sandbox, container, exit).await
    }
}
