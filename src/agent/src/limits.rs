//! CRI's resources of containers and sandboxes as the engine takes them, and what of a change can be made. What cannot is refused by
//! its name in CRI.

use moxlet_cri::v1;
use moxlet_sandbox::Limits;

use crate::{
    error::{Error, Result},
    ledger::ResourcesRecord,
};

/// The one setting of cgroup v2 that the agent writes itself, in both versions.
const PIDS_MAX: &str = "pids.max";
/// No bound, as a number that the kernel cuts to its own largest.
const UNLIMITED: u64 = u64::MAX;

/// Processes and threads of a pod where the sandbox says nothing of them (`pids.max` of its `unified` resources, by which a node
/// passes its `podPidsLimit`; `max` is no limit).
const POD_PIDS: u64 = 4096;

/// Limits of a container; what is not set is not limited.
pub(crate) fn of_container(resources: &v1::LinuxContainerResources) -> Limits {
    let positive = |value: i64| u64::try_from(value).ok().filter(|v| *v > 0);
    Limits {
        memory_bytes: positive(resources.memory_limit_in_bytes),
        cpu_quota_us: (resources.cpu_quota != 0).then_some(resources.cpu_quota),
        cpu_period_us: positive(resources.cpu_period),
        cpu_shares: positive(resources.cpu_shares),
        pids: resources.unified.get(PIDS_MAX).and_then(|v| if v == "max" { Some(0) } else { v.parse().ok() }),
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
    limits.pids = limits.pids.or(Some(POD_PIDS));
    limits
}

/// What a new container has, for `ContainerStatus` and later changes.
///
/// # Errors
/// [`Error::Refused`] what cgroup v1 does not do as the agent writes it; the rest is judged with the OCI spec.
pub(crate) fn of_new(resources: &v1::LinuxContainerResources, cgroup_v1: bool) -> Result<ResourcesRecord> {
    if cgroup_v1 {
        no_swap(resources.memory_swap_limit_in_bytes, resources.memory_limit_in_bytes)?;
        if let Some(file) = resources.unified.keys().find(|file| *file != PIDS_MAX) {
            return Err(Error::Refused(format!("unified {file:?} on cgroup v1")));
        }
    }
    Ok(ResourcesRecord {
        cpu_period: resources.cpu_period,
        cpu_quota: resources.cpu_quota,
        cpu_shares: resources.cpu_shares,
        memory_limit: resources.memory_limit_in_bytes,
        memory_swap_limit: resources.memory_swap_limit_in_bytes,
        oom_score_adj: resources.oom_score_adj,
        unified: resources.unified.clone().into_iter().collect(),
    })
}

/// A change of a running container.
#[derive(Debug, PartialEq)]
pub(crate) struct Change {
    /// What is written into its cgroup.
    pub(crate) limits: Limits,
    /// What its processes get.
    pub(crate) oom_score_adj: Option<i32>,
    /// What it has then.
    pub(crate) resources: ResourcesRecord,
}

/// A change of what a container has now, as `UpdateContainerResources` asks for it: 0 and empty leave what there is.
///
/// # Errors
/// [`Error::Refused`] with the field that cannot be changed, [`Error::Invalid`] with one that makes no sense.
pub(crate) fn change(now: &ResourcesRecord, asked: &v1::LinuxContainerResources) -> Result<Change> {
    refuse(now, asked)?;
    let mut resources = now.clone();
    let mut limits = Limits::default();
    match asked.memory_limit_in_bytes {
        0 => {}
        -1 => (resources.memory_limit, limits.memory_bytes) = (-1, Some(UNLIMITED)),
        bytes => {
            let limit = u64::try_from(bytes);
            let limit = limit.map_err(|_| Error::Invalid(format!("memory_limit_in_bytes {bytes}")))?;
            (resources.memory_limit, limits.memory_bytes) = (bytes, Some(limit));
        }
    }
    if asked.cpu_quota != 0 || asked.cpu_period != 0 {
        let period = if asked.cpu_period == 0 { now.cpu_period } else { asked.cpu_period };
        let quota = match (asked.cpu_quota, now.cpu_quota) {
            (0, 0) => -1,
            (0, quota) | (quota, _) => quota,
        };
        limits.cpu_period_us = match u64::try_from(period) {
            Ok(0) => None,
            Ok(period) => Some(period),
            Err(_) => return Err(Error::Invalid(format!("cpu_period {period}"))),
        };
        limits.cpu_quota_us = Some(quota);
        (resources.cpu_period, resources.cpu_quota) = (period, quota);
    }
    if asked.cpu_shares != 0 {
        let shares = u64::try_from(asked.cpu_shares);
        limits.cpu_shares =
            Some(shares.map_err(|_| Error::Invalid(format!("cpu_shares {}", asked.cpu_shares)))?);
        resources.cpu_shares = asked.cpu_shares;
    }
    if let Some(text) = asked.unified.get(PIDS_MAX) {
        // 0 is "max" to the engine.
        let pids = if text == "max" { Ok(0) } else { text.parse() };
        limits.pids =
            Some(pids.map_err(|_| Error::Invalid(format!("unified {PIDS_MAX} {text:?} is no number")))?);
        resources.unified.insert(PIDS_MAX.to_owned(), text.clone());
    }
    let mut oom_score_adj = None;
    if asked.oom_score_adj != 0 && asked.oom_score_adj != now.oom_score_adj {
        let adj = i32::try_from(asked.oom_score_adj).ok().filter(|adj| (-1000..=1000).contains(adj));
        oom_score_adj =
            Some(adj.ok_or_else(|| Error::Invalid(format!("oom_score_adj {}", asked.oom_score_adj)))?);
        resources.oom_score_adj = asked.oom_score_adj;
    }
    Ok(Change { limits, oom_score_adj, resources })
}

/// What no running container can be given.
fn refuse(now: &ResourcesRecord, asked: &v1::LinuxContainerResources) -> Result<()> {
    if !asked.cpuset_cpus.is_empty() || !asked.cpuset_mems.is_empty() {
        return Err(Error::Refused(format!(
            "cpuset_cpus {:?}, cpuset_mems {:?}",
            asked.cpuset_cpus, asked.cpuset_mems
        )));
    }
    if let Some(limit) = asked.hugepage_limits.iter().find(|l| l.limit > 0) {
        return Err(Error::Refused(format!("hugepage_limits of {}", limit.page_size)));
    }
    for (file, value) in &asked.unified {
        if file != PIDS_MAX && now.unified.get(file) != Some(value) {
            return Err(Error::Refused(format!("a change of unified {file:?}")));
        }
    }
    let limit = if asked.memory_limit_in_bytes == 0 { now.memory_limit } else { asked.memory_limit_in_bytes };
    if asked.memory_swap_limit_in_bytes == now.memory_swap_limit {
        return Ok(());
    }
    no_swap(asked.memory_swap_limit_in_bytes, limit)
}

/// Memory and swap together are no more than the memory alone.
fn no_swap(swap: i64, memory: i64) -> Result<()> {
    if swap == 0 || swap == memory {
        return Ok(());
    }
    Err(Error::Refused(format!("memory_swap_limit_in_bytes {swap} beside a memory limit of {memory}")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    type Asked = v1::LinuxContainerResources;

    #[test]
    fn no_pod_takes_all_processes_of_its_host_unless_that_is_asked_for() {
        let asked = |value: &str| Asked {
            unified: [(PIDS_MAX.to_owned(), value.to_owned())].into(),
            ..Asked::default()
        };
        assert_eq!(of_sandbox(None, None).pids, Some(POD_PIDS));
        assert_eq!(of_sandbox(Some(&asked("100")), None).pids, Some(100));
        assert_eq!(of_sandbox(Some(&asked("max")), None).pids, Some(0), "no limit");
        assert_eq!(of_container(&Asked::default()).pids, None);
    }

    fn now() -> ResourcesRecord {
        let asked = Asked {
            cpu_period: 50_000,
            cpu_quota: 20_000,
            memory_limit_in_bytes: 64 << 20,
            ..Asked::default()
        };
        of_new(&asked, true).unwrap()
    }

    #[test]
    fn what_can_be_changed_is_and_the_rest_stays() {
        let nothing = change(&now(), &Asked::default()).unwrap();
        assert_eq!((nothing.limits, nothing.resources), (Limits::default(), now()));
        let unlimited = change(&now(), &Asked { memory_limit_in_bytes: -1, ..Asked::default() }).unwrap();
        assert_eq!((unlimited.limits.memory_bytes, unlimited.resources.memory_limit), (Some(u64::MAX), -1));
        let period = change(&now(), &Asked { cpu_period: 100_000, ..Asked::default() }).unwrap().limits;
        assert_eq!((period.cpu_period_us, period.cpu_quota_us), (Some(100_000), Some(20_000)));
        let quota = change(&now(), &Asked { cpu_quota: -1, ..Asked::default() }).unwrap();
        assert_eq!((quota.limits.cpu_period_us, quota.limits.cpu_quota_us), (Some(50_000), Some(-1)));
        let fresh = change(&ResourcesRecord::default(), &Asked { cpu_period: 70_000, ..Asked::default() });
        assert_eq!(fresh.unwrap().limits.cpu_quota_us, Some(-1), "a period without a quota is no quota");
        let score = change(&now(), &Asked { oom_score_adj: 500, ..Asked::default() }).unwrap();
        assert_eq!((score.oom_score_adj, score.resources.oom_score_adj), (Some(500), 500));
        let pids = Asked { unified: [(PIDS_MAX.to_owned(), "max".to_owned())].into(), ..Asked::default() };
        assert_eq!(change(&now(), &pids).unwrap().limits.pids, Some(0));
    }

    #[test]
    fn what_cannot_be_changed_is_refused_by_its_name() {
        let unified = [("memory.high".to_owned(), "1".to_owned())];
        for (name, asked) in [
            ("cpuset_cpus", Asked { cpuset_cpus: "0".into(), ..Asked::default() }),
            ("memory_swap_limit_in_bytes", Asked { memory_swap_limit_in_bytes: 1 << 30, ..Asked::default() }),
            ("memory.high", Asked { unified: unified.into(), ..Asked::default() }),
            ("oom_score_adj", Asked { oom_score_adj: 2000, ..Asked::default() }),
            ("memory_limit_in_bytes", Asked { memory_limit_in_bytes: -2, ..Asked::default() }),
        ] {
            let error = change(&now(), &asked).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
        let same = Asked { memory_swap_limit_in_bytes: 64 << 20, ..Asked::default() };
        assert!(change(&now(), &same).is_ok(), "no swap beyond the memory is what there is");
        let unified =
            Asked { unified: [("memory.high".to_owned(), "1".to_owned())].into(), ..Asked::default() };
        assert!(of_new(&unified, true).is_err() && of_new(&unified, false).is_ok());
    }
}
