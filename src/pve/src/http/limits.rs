//! How many calls a server is given at once. The API daemon of a node has three workers; who fills them keeps the
//! administrator's browser waiting, and a call that waits too long for one fails. What changes and what reads, of one node or of
//! the cluster, comes to the same workers, so there is one bound for all of it.

use tokio::sync::{Semaphore, SemaphorePermit};

/// Calls at once, for each server that is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// All calls, reading and changing; at least one.
    pub calls: usize,
}

impl Default for Limits {
    /// Two: a worker is left for everybody else.
    fn default() -> Self {
        Self { calls: 2 }
    }
}

/// The places at a server.
#[derive(Debug)]
pub(crate) struct Gate(Semaphore);

impl Gate {
    pub(crate) fn new(limits: Limits) -> Self {
        Self(Semaphore::new(limits.calls.clamp(1, Semaphore::MAX_PERMITS)))
    }

    /// Waits for a place. First come, first served.
    pub(crate) async fn enter(&self) -> Option<SemaphorePermit<'_>> {
        // It is never closed.
        self.0.acquire().await.ok()
    }
}
