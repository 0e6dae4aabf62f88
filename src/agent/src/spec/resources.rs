//! Limits of a container as the OCI spec names them, for cgroup v2, where moxlet-init writes them in the CT.

use moxlet_cri::v1;
use oci_spec::runtime::{LinuxCpu, LinuxMemoryBuilder, LinuxResources};

use super::oci;
use crate::error::{Error, Result};

/// Controllers whose files a request may set by name; they act in the container's own cgroup only.
const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// The spec's `linux.resources`; none if there are none.
pub(super) fn of(resources: Option<&v1::LinuxContainerResources>) -> Result<Option<LinuxResources>> {
    let Some(resources) = resources else { return Ok(None) };
    if let Some(limit) = resources.hugepage_limits.iter().find(|l| l.limit > 0) {
        return Err(Error::Refused(format!("a limit of huge pages ({})", limit.page_size)));
    }
    if !resources.cpuset_cpus.is_empty() || !resources.cpuset_mems.is_empty() {
        return Err(Error::Refused("a set of CPUs or memory nodes".to_owned()));
    }
    let positive = |value: i64| (value > 0).then_some(value);
    let unsigned = |value: i64| u64::try_from(value).ok().filter(|v| *v > 0);
    let mut all = LinuxResources::default();
    if let Some(limit) = positive(resources.memory_limit_in_bytes) {
        // Memory and swap together; without a word no swap, so no more than memory.
        let swap = positive(resources.memory_swap_limit_in_bytes).map_or(limit, |swap| swap.max(limit));
        all.set_memory(Some(oci(LinuxMemoryBuilder::default().limit(limit).swap(swap).build())?));
    }
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(unsigned(resources.cpu_shares).map(|shares| shares.clamp(2, 262_144)));
    if let Some(quota) = positive(resources.cpu_quota) {
        cpu.set_quota(Some(quota)).set_period(Some(unsigned(resources.cpu_period).unwrap_or(100_000)));
    }
    if cpu != LinuxCpu::default() {
        all.set_cpu(Some(cpu));
    }
    for (file, value) in &resources.unified {
        let known = file.split_once('.').is_some_and(|(controller, rest)| {
            CONTROLLERS.contains(&controller)
                && !rest.is_empty()
                && rest.bytes().all(|b| b.is_ascii_lowercase() || b == b'.' || b == b'_')
        });
        if !known || value.len() > 256 {
            return Err(Error::Refused(format!("cgroup setting {file:?}")));
        }
    }
    if !resources.unified.is_empty() {
        all.set_unified(Some(resources.unified.clone()));
    }
    Ok((all != LinuxResources::default()).then_some(all))
}
