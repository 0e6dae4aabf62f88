//! The node's own figures (`/metrics`) and its pods' resources (`/metrics/resource`).
//!
//! Whoever does the work reports it here by one call; names are the kubelet's where the meaning is the kubelet's.

use std::time::Duration;

/// Installs the recorder once in the process; later calls do nothing.
pub fn install() {}

/// A pod came to run: time since the node saw it first.
pub fn pod_started(_since_seen: Duration) {}

/// A worker finished one pass over a pod: `create`, `update`, `sync` or `kill`.
pub fn pod_synced(_operation: &'static str, _took: Duration, _failed: bool) {}

/// A call to the agent ended; `call` is CRI's name of it (`RunPodSandbox`).
pub fn runtime_operation(_call: &'static str, _took: Duration, _failed: bool) {}

/// How many items wait in a queue.
pub fn queue_depth(_queue: &'static str, _depth: usize) {}

/// An item left a queue after this wait.
pub fn queue_waited(_queue: &'static str, _waited: Duration) {}

/// Work on an item of a queue took this long; `retried` when it goes back in.
pub fn queue_worked(_queue: &'static str, _took: Duration, _retried: bool) {}
