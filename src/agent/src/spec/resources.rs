//! Limits of a container as the OCI spec names them, for cgroup v2, where moxlet-init writes them in the CT.

use moxlet_cri::v1;
use serde_json::{Value, json};

use crate::error::{Error, Result};

/// Controllers whose files a request may set by name; they act in the container's own cgroup only.
const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// The spec's `linux.resources`; an empty object if there are none.
pub(super) fn of(resources: Option<&v1::LinuxContainerResources>) -> Result<Value> {
    let mut all = json!({});
    let Some(resources) = resources else { return Ok(all) };
    if let Some(limit) = resources.hugepage_limits.iter().find(|l| l.limit > 0) {
        return Err(Error::Refused(format!("a limit of huge pages ({})", limit.page_size)));
    }
    if !resources.cpuset_cpus.is_empty() || !resources.cpuset_mems.is_empty() {
        return Err(Error::Refused("a set of CPUs or memory nodes".to_owned()));
    }
    let positive = |value: i64| (value > 0).then_some(value);
    if let Some(limit) = positive(resources.memory_limit_in_bytes) {
        // Memory and swap together; without a word no swap, so no more than memory.
        let swap = positive(resources.memory_swap_limit_in_bytes).map_or(limit, |swap| swap.max(limit));
        all["memory"] = json!({"limit": limit, "swap": swap});
    }
    if let Some(shares) = positive(resources.cpu_shares) {
        all["cpu"]["shares"] = json!(shares.clamp(2, 262_144));
    }
    if let Some(quota) = positive(resources.cpu_quota) {
        all["cpu"]["quota"] = json!(quota);
        all["cpu"]["period"] = json!(positive(resources.cpu_period).unwrap_or(100_000));
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
        all["unified"][file] = json!(value);
    }
    Ok(all)
}
