//! One task a running sandbox: what its init reports becomes the containers' states, and the CT's end is noticed.

use std::{sync::Arc, time::Duration};

use moxlet_init_proto::{ContainerState, Event, client::Client};
use moxlet_sandbox::SandboxState;
use tracing::{debug, warn};

use crate::{
    containers,
    core::{Core, Sandbox},
    error::{Result, chain},
    sandboxes,
};

/// How long to wait before an init that runs and does not answer is asked again.
const PAUSE: Duration = Duration::from_millis(100);

/// Watches a sandbox until its CT has ended or the agent stops.
pub(crate) fn spawn(core: &Arc<Core>, sandbox: &Arc<Sandbox>) {
    let (core, sandbox) = (core.clone(), sandbox.clone());
    core.tasks.clone().spawn(async move {
        tokio::select! {
            () = core.stop.cancelled() => {}
            () = watch(&core, &sandbox) => {}
        }
    });
}

async fn watch(core: &Arc<Core>, sandbox: &Arc<Sandbox>) {
    loop {
        let Ok(client) = sandbox.client() else { return };
        tokio::select! {
            done = follow(core, sandbox, &client) => {
                if let Err(error) = done {
                    debug!(sandbox = %sandbox.id, error = chain(&error), "the init's events have ended");
                }
            }
            _ = core.engine.wait(&sandbox.id) => {}
        }
        match core.engine.state(&sandbox.id).await {
            Ok(Some(SandboxState::Running { .. })) => {}
            Ok(_) => break,
            Err(error) => {
                warn!(sandbox = %sandbox.id, error = chain(&error), "cannot tell whether a CT runs");
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
    let (own, of) = (core.clone(), sandbox.clone());
    let noted = core.whole(async move {
        let _guard = of.change.lock().await;
        sandboxes::ended(&own, &of).await
    });
    if let Err(error) = noted.await {
        warn!(sandbox = %sandbox.id, error = chain(&error), "cannot note that a CT has ended");
    }
}

/// Listens first, lists then: nothing falls between.
async fn follow(core: &Arc<Core>, sandbox: &Arc<Sandbox>, client: &Client) -> Result<()> {
    let mut events = client.events().await?;
    for state in client.list().await? {
        note(core, sandbox, state).await?;
    }
    while let Some(event) = events.next().await? {
        match event {
            Event::Started { container } | Event::Exited { container } => {
                note(core, sandbox, container).await?;
            }
            Event::Unknown => {}
        }
    }
    Ok(())
}

/// Takes over what the init says, to its end even when the CT's own end is noticed meanwhile: the listeners must hear of it.
async fn note(core: &Arc<Core>, sandbox: &Arc<Sandbox>, state: ContainerState) -> Result<()> {
    let (own, of) = (core.clone(), sandbox.clone());
    core.whole(async move { containers::reported(&own, &of, state).await }).await
}
