//! One task a running sandbox: what its init reports becomes the containers' states, and the CT's end is noticed.

use std::{sync::Arc, time::Duration};

use moxlet_errors::chain;
use moxlet_init_proto::{ContainerState, Event, client::Client};
use moxlet_sandbox::SandboxState;
use tracing::{debug, warn};

use super::Pods;
use crate::{error::Result, state::Sandbox};

/// How long to wait before an init that runs and does not answer is asked again.
const PAUSE: Duration = Duration::from_millis(100);

impl Pods {
    /// Watches a sandbox until its CT has ended or the agent stops.
    pub(crate) fn watch(self: &Arc<Self>, sandbox: &Arc<Sandbox>) {
        let (own, sandbox) = (self.clone(), sandbox.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                () = own.tasks.stop.cancelled() => {}
                () = own.until_ended(&sandbox) => {}
            }
        });
    }

    async fn until_ended(self: &Arc<Self>, sandbox: &Arc<Sandbox>) {
        loop {
            let Ok(client) = sandbox.client() else { return };
            tokio::select! {
                done = self.follow(sandbox, &client) => {
                    if let Err(error) = done {
                        debug!(sandbox = %sandbox.id, error = chain(&error), "the init's events have ended");
                    }
                }
                _ = self.engine.wait(&sandbox.id) => {}
            }
            match self.engine.state(&sandbox.id).await {
                Ok(Some(SandboxState::Running { .. })) => {}
                Ok(_) => break,
                Err(error) => {
                    warn!(sandbox = %sandbox.id, error = chain(&error), "cannot tell whether a CT runs");
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
        let (own, of) = (self.clone(), sandbox.clone());
        let noted = self.tasks.whole(async move {
            let _guard = of.change.lock().await;
            own.ended(&of).await
        });
        if let Err(error) = noted.await {
            warn!(sandbox = %sandbox.id, error = chain(&error), "cannot note that a CT has ended");
        }
    }

    /// Listens first, lists then: nothing falls between.
    async fn follow(self: &Arc<Self>, sandbox: &Arc<Sandbox>, client: &Client) -> Result<()> {
        let mut events = client.events().await?;
        for state in client.list().await? {
            self.note(sandbox, state).await?;
        }
        while let Some(event) = events.next().await? {
            match event {
                Event::Started { container } | Event::Exited { container } => {
                    self.note(sandbox, container).await?;
                }
                Event::Unknown => {}
            }
        }
        Ok(())
    }

    /// Takes over what the init says, to its end even when the CT's own end is noticed meanwhile: the listeners must hear of it.
    async fn note(self: &Arc<Self>, sandbox: &Arc<Sandbox>, state: ContainerState) -> Result<()> {
        let (own, of) = (self.clone(), sandbox.clone());
        self.tasks.whole(async move { own.containers.reported(&of, state).await }).await
    }
}
