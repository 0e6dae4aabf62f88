//! How many calls a node is given at once. The API daemon of a node has three workers; who fills them keeps the
//! administrator's browser waiting, and a call that waits too long for one fails.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// More nodes than a cluster can have; beyond it what nobody uses is forgotten.
const MAX_NODES: usize = 256;

/// Calls at once, for each node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Calls that change something.
    pub writes: usize,
    /// Calls that read.
    pub reads: usize,
}

impl Default for Limits {
    /// Two of each.
    fn default() -> Self {
        Self { writes: 2, reads: 2 }
    }
}

#[derive(Debug)]
pub(crate) struct Gate {
    limits: Limits,
    nodes: Mutex<HashMap<String, Arc<Places>>>,
}

#[derive(Debug)]
struct Places {
    writes: Arc<Semaphore>,
    reads: Arc<Semaphore>,
}

impl Gate {
    pub(crate) fn new(limits: Limits) -> Self {
        let limits = Limits { writes: limits.writes.max(1), reads: limits.reads.max(1) };
        Self { limits, nodes: Mutex::default() }
    }

    /// Waits for a place at a node; `""` is whichever node answers. First come, first served.
    pub(crate) async fn enter(&self, node: &str, write: bool) -> Option<OwnedSemaphorePermit> {
        let places = self.places(node);
        let semaphore = if write { &places.writes } else { &places.reads };
        // It is never closed.
        Arc::clone(semaphore).acquire_owned().await.ok()
    }

    fn places(&self, node: &str) -> Arc<Places> {
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        if nodes.len() >= MAX_NODES {
            let limits = self.limits;
            nodes.retain(|_, p| {
                Arc::strong_count(p) > 1
                    || p.writes.available_permits() < limits.writes
                    || p.reads.available_permits() < limits.reads
            });
        }
        let places = nodes.entry(node.to_owned()).or_insert_with(|| {
            Arc::new(Places {
                writes: Arc::new(Semaphore::new(self.limits.writes)),
                reads: Arc::new(Semaphore::new(self.limits.reads)),
            })
        });
        Arc::clone(places)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[tokio::test]
    async fn a_node_has_so_many_places_and_another_has_its_own() {
        let gate = Gate::new(Limits { writes: 1, reads: 1 });
        let held = gate.enter("a", true).await.unwrap();
        assert_eq!(gate.places("a").writes.available_permits(), 0);
        let others = (gate.enter("b", true).await, gate.enter("a", false).await);
        assert!(others.0.is_some() && others.1.is_some());
        drop(held);
        assert!(gate.enter("a", true).await.is_some());
    }

    #[tokio::test]
    async fn nodes_that_nobody_asks_are_forgotten() {
        let gate = Gate::new(Limits::default());
        let _held = gate.enter("held", true).await.unwrap();
        for i in 0..1000 {
            drop(gate.enter(&format!("n{i}"), false).await);
        }
        assert!(gate.nodes.lock().unwrap().len() <= MAX_NODES);
        assert_eq!(gate.places("held").writes.available_permits(), 1);
    }
}
