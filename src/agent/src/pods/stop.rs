//! `StopPodSandbox`: a CT is ended by its init, or killed from the host where that does not answer.

use std::{sync::Arc, time::Duration};

use moxlet_cri::v1;
use moxlet_errors::chain;
use moxlet_sandbox::SandboxState;
use tracing::{info, warn};

use super::{Pods, STOP_GRACE};
use crate::{engine::not_held, error::Result, ledger::SandboxPhase, state::Sandbox};

impl Pods {
    /// Stops all pods at once, each with this grace.
    pub(crate) async fn stop_all(self: &Arc<Self>, grace: Duration) {
        let seconds = i64::try_from(grace.as_secs()).unwrap_or(i64::MAX);
        let all = self.state.sandboxes().into_iter().map(|sandbox| async move {
            let containers = self.state.containers_of(&sandbox.id);
            let stops = containers.iter().map(|c| self.containers.stop(c.id.as_str(), seconds));
            futures::future::join_all(stops).await;
            if let Err(error) = self.stop(sandbox.id.as_str()).await {
                warn!(sandbox = %sandbox.id, error = chain(&error), "a pod could not be stopped");
            }
        });
        futures::future::join_all(all).await;
    }

    /// `StopPodSandbox`. Of an unknown one: nothing, as CRI asks.
    pub(crate) async fn stop(self: &Arc<Self>, id: &str) -> Result<()> {
        let Ok(sandbox) = self.state.sandbox(id) else { return Ok(()) };
        let own = self.clone();
        self.tasks
            .whole(async move {
                let _guard = own.to_end(&sandbox).await?;
                own.stop_parts(&sandbox).await
            })
            .await
    }

    /// Takes a sandbox for its end: a change that waits for its init gives up soon.
    pub(super) async fn to_end<'a>(
        &self,
        sandbox: &'a Arc<Sandbox>,
    ) -> Result<tokio::sync::MutexGuard<'a, ()>> {
        // What somebody holds goes on as it is.
        let _stopping = match self.engine.held_by(&sandbox.id).await? {
            None => Some(sandbox.stopping()),
            Some(_) => None,
        };
        Ok(sandbox.change.lock().await)
    }

    /// Stops a CT and releases its network; the caller holds the sandbox.
    pub(crate) async fn stop_parts(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        let running = matches!(self.engine.state(&sandbox.id).await?, Some(SandboxState::Running { .. }));
        if running {
            not_held(&*self.engine, &sandbox.id).await?;
            self.engine.ending(&sandbox.id).await;
            if let Ok(client) = sandbox.client() {
                // It kills its containers and writes how they ended; what goes wrong here the engine ends.
                let _ = tokio::time::timeout(STOP_GRACE, client.shutdown(Duration::ZERO)).await;
            }
            self.engine.stop(&sandbox.id, STOP_GRACE).await?;
        }
        self.ended(sandbox).await?;
        self.network.detach(&sandbox.id).await?;
        Ok(())
    }

    /// Notes that a CT does not run any more; the caller holds the sandbox.
    pub(crate) async fn ended(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        sandbox.set_client(None);
        for container in self.state.containers_of(&sandbox.id) {
            self.containers.lost(sandbox, &container).await?;
        }
        if sandbox.phase() == SandboxPhase::Ready {
            self.state.change_sandbox(sandbox, |r| r.phase = SandboxPhase::NotReady).await?;
            info!(sandbox = %sandbox.id, "sandbox has stopped");
            self.events.send(sandbox.id.as_str(), sandbox, v1::ContainerEventType::ContainerStoppedEvent);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::net::UnixListener;

    use moxlet_ids::{ContainerId, SandboxId};
    use moxlet_init_proto::client::Client;
    use moxlet_sandbox::{Engine, fake::FakeEngine};

    use super::*;
    use crate::{
        fake,
        ledger::{ContainerRecord, SandboxRecord},
        state::{Container, RunState},
    };

    #[tokio::test(flavor = "multi_thread")]
    async fn a_sandbox_is_stopped_though_its_init_hangs_in_the_middle_of_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(FakeEngine::default());
        let (rooms, _work) = fake::rooms(dir.path(), engine.clone()).await;
        let socket = dir.path().join("init.sock");
        // It takes connections and answers none.
        let init = UnixListener::bind(&socket).unwrap();
        let sandbox = Sandbox::new(SandboxRecord::new(SandboxId::random(), "uid-1".parse().unwrap(), 1));
        sandbox.set_client(Some(Client::new(&socket)));
        rooms.state.insert_sandbox(sandbox.clone());
        engine.create(&fake::spec(&sandbox.id)).await.unwrap();
        engine.start(&sandbox.id).await.unwrap();
        let changed = tokio::spawn({
            let sandbox = sandbox.clone();
            async move {
                let _guard = sandbox.change.lock().await;
                let client = sandbox.client().unwrap();
                sandbox.answer("start", Duration::from_secs(3600), client.start("a")).await
            }
        });
        let (_asked, _) = tokio::task::spawn_blocking(move || init.accept()).await.unwrap().unwrap();
        rooms.pods.stop(sandbox.id.as_str()).await.unwrap();
        assert_eq!(engine.state(&sandbox.id).await.unwrap(), Some(SandboxState::Stopped));
        assert!(matches!(
            changed.await.unwrap(),
            Err(moxlet_init_proto::Error::Timeout { request: "start", .. })
        ));
    }

    #[tokio::test]
    async fn a_container_whose_init_hangs_is_given_up_with_deadline_exceeded() {
        let dir = tempfile::tempdir().unwrap();
        let (rooms, _work) = fake::rooms(dir.path(), Arc::default()).await;
        let socket = dir.path().join("init.sock");
        let _init = UnixListener::bind(&socket).unwrap();
        let sandbox = Sandbox::new(SandboxRecord::new(SandboxId::random(), "uid-1".parse().unwrap(), 1));
        sandbox.set_client(Some(Client::new(&socket)));
        rooms.state.insert_sandbox(sandbox.clone());
        let image = format!("sha256:{}", "0".repeat(64)).parse().unwrap();
        let record = ContainerRecord::new(ContainerId::random(), sandbox.id.clone(), image, 1);
        let container = Container::new(record);
        container.state.send_replace(RunState::Running { started_at_ns: 1 });
        rooms.state.insert_container(container.clone());
        let error = rooms.containers.stop(container.id.as_str(), 1).await.unwrap_err();
        assert_eq!(tonic::Status::from(error).code(), tonic::Code::DeadlineExceeded);
    }
}
