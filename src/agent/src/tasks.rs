//! The tasks of an agent: all belong to one tracker and end by one token.

use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::error::{Error, Result};

/// Where a part of the agent starts its tasks, and how it learns that the agent ends. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tasks {
    /// Everything that runs.
    pub(crate) tracker: TaskTracker,
    /// The end.
    pub(crate) stop: CancellationToken,
}

impl Tasks {
    /// No task yet; this token ends those to come.
    pub(crate) fn new(stop: CancellationToken) -> Self {
        Self { tracker: TaskTracker::new(), stop }
    }

    /// Starts a task.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tracker.spawn(task);
    }

    /// Runs a change to its end even when the caller goes away: half a change is none.
    ///
    /// # Errors
    /// Those of the change.
    pub(crate) async fn whole<T: Send + 'static>(
        &self,
        change: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        match self.tracker.spawn(change).await {
            Ok(done) => done,
            Err(error) => Err(Error::io("a task of the agent failed", std::io::Error::other(error))),
        }
    }
}

/// Runs something that waits for the kernel outside the async threads.
///
/// # Errors
/// Those of the work.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    moxlet_files::blocking(work).await
}
