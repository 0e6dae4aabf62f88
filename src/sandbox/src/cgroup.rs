//! Limits and figures of a CT's containers, seen from the host (signatures; the bodies follow).
use moxlet_ids::{ContainerId, SandboxId};

use crate::{IdMap, Limits, Result};

/// What a CT or container uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// CPU time since the start.
    pub cpu_ns: u64,
    /// All memory charged, page cache included.
    pub memory_usage: u64,
    /// Memory without the page cache that can go at once.
    pub memory_working_set: u64,
    /// Anonymous memory.
    pub memory_rss: u64,
    /// Processes and threads.
    pub pids: u64,
}

/// The cgroups of CTs on this host.
#[derive(Debug, Clone)]
pub struct ContainerCgroups {}

impl ContainerCgroups {
    /// Finds out how this host's cgroups are mounted.
    pub fn detect() -> Result<Self> {
        Ok(Self {})
    }
    /// Whether cgroup v1 controllers are in use.
    #[must_use]
    pub fn is_v1(&self) -> bool {
        true
    }
    /// v1: makes the container's cgroup with its limits below its CT's; v2: nothing.
    pub fn create(&self, _s: &SandboxId, _c: &ContainerId, _l: &Limits, _m: IdMap) -> Result<()> {
        Ok(())
    }
    /// Changes limits of a container, or of the CT as a whole.
    pub fn update(&self, _s: &SandboxId, _c: Option<&ContainerId>, _l: &Limits) -> Result<()> {
        Ok(())
    }
    /// Removes the container's cgroup. Idempotent.
    pub fn remove(&self, _s: &SandboxId, _c: &ContainerId) -> Result<()> {
        Ok(())
    }
    /// What a container, or the CT as a whole, uses.
    pub fn stats(&self, _s: &SandboxId, _c: Option<&ContainerId>) -> Result<Stats> {
        Ok(Stats::default())
    }
    /// How many of its processes the OOM killer took.
    pub fn oom_kills(&self, _s: &SandboxId, _c: Option<&ContainerId>) -> Result<u64> {
        Ok(0)
    }
}

/// Sets a process' `oom_score_adj` from the host; returns what was really set (clamped where the kernel refuses).
pub fn set_oom_score_adj(_pid: u32, adj: i32) -> Result<i32> {
    Ok(adj)
}
