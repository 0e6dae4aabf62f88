//! CRI's resources of containers and sandboxes as the engine takes them.

use moxlet_cri::v1;
use moxlet_sandbox::Limits;

/// Limits of a container; what is not set is not limited.
pub(crate) fn of_container(resources: &v1::LinuxContainerResources) -> Limits {
    let positive = |value: i64| u64::try_from(value).ok().filter(|v| *v > 0);
    Limits {
        memory_bytes: positive(resources.memory_limit_in_bytes),
        cpu_quota_us: (resources.cpu_quota != 0).then_some(resources.cpu_quota),
        cpu_period_us: positive(resources.cpu_period),
        cpu_shares: positive(resources.cpu_shares),
        pids: resources.unified.get("pids.max").and_then(|v| v.parse().ok()),
    }
}

/// Limits of a CT: those that the node sums up, with the overhead.
pub(crate) fn of_sandbox(
    resources: Option<&v1::LinuxContainerResources>,
    overhead: Option<&v1::LinuxContainerResources>,
) -> Limits {
    let mut limits = resources.map(of_container).unwrap_or_default();
    let extra = overhead.map(of_container).unwrap_or_default().memory_bytes.unwrap_or(0);
    limits.memory_bytes = limits.memory_bytes.map(|m| m.saturating_add(extra));
    limits
}
