//! `StopContainer`.

use std::time::Duration;

use moxlet_init_proto::ErrorClass;
use tracing::info;

use super::{Containers, KILLED};
use crate::{
    engine::not_held,
    error::{Error, Result},
    signals::KILL,
    state::{Container, RunState},
};

/// The longest grace, in seconds.
const LONGEST: u64 = 10 * 365 * 86_400;

impl Containers {
    /// `StopContainer`: the stop signal, SIGKILL after `seconds`; of one that does not run: nothing.
    ///
    /// # Errors
    /// [`Error::Timeout`] where it has not ended 10 s after that, as when its init hangs.
    /// [`Error::Held`]: somebody else holds the CT. It is not even asked to end then.
    pub(crate) async fn stop(&self, id: &str, seconds: i64) -> Result<()> {
        let Ok(container) = self.state.container(id) else { return Ok(()) };
        if !matches!(container.run_state(), RunState::Running { .. }) {
            return Ok(());
        }
        let sandbox = self.state.sandbox(container.sandbox.as_str())?;
        not_held(&*self.engine, &sandbox.id).await?;
        let Ok(client) = sandbox.client() else {
            // Its CT is going or gone; the watch writes down its end.
            return within(&container, KILLED, async {
                container.ended().await;
                Ok(())
            })
            .await;
        };
        let name = container.id.as_str();
        let seconds = u64::try_from(seconds).unwrap_or(0).min(LONGEST);
        let end = async |signal, all| {
            send(client.signal(name, signal, all).await)?;
            container.ended().await;
            Ok(())
        };
        if seconds > 0 {
            let asked = end(container.record().stop_signal, false);
            if let Ok(ended) = tokio::time::timeout(Duration::from_secs(seconds), asked).await {
                return ended;
            }
            // It may be held only since a moment ago.
            not_held(&*self.engine, &sandbox.id).await?;
            info!(container = name, seconds, "container did not end in time and is killed");
        }
        // Whoever waits has StopPodSandbox, which needs no answer of an init.
        within(&container, KILLED, end(KILL, true)).await
    }
}

async fn within(
    container: &Container,
    limit: Duration,
    ended: impl Future<Output = Result<()>>,
) -> Result<()> {
    let text = || format!("container {} did not end within {} s of SIGKILL", container.id, limit.as_secs());
    tokio::time::timeout(limit, ended).await.map_err(|_| Error::Timeout(text()))?
}

/// A signal that finds no process any more has done its work.
fn send(outcome: moxlet_init_proto::Result<()>) -> Result<()> {
    match outcome {
        Err(e) if matches!(e.class(), Some(ErrorClass::InvalidState | ErrorClass::NotFound)) => Ok(()),
        other => Ok(other?),
    }
}
