//! Which processes a CT has, read from cgroups and `/proc`: the same before and after a restart of the agent.
//!
//! liblxc's monitor sits alone in `lxc.monitor.<sandbox>`; the CT's init is its child and number 1 of a process
//! namespace just below ours. Where the monitor was killed the init is looked for among the CT's own processes.

use std::path::Path;

use moxlet_ids::SandboxId;

use crate::{cgroup::ContainerCgroups, process::read_bounded};

const STATUS_MAX: u64 = 64 * 1024;

/// The processes of a CT that matter from outside.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// PID 1 of the CT, by its number on the host.
    pub(crate) init: Option<u32>,
    /// liblxc's monitors.
    pub(crate) monitors: Vec<u32>,
}

/// Looks for a CT's processes.
pub(crate) fn find(cgroups: &ContainerCgroups, id: &SandboxId) -> Found {
    let monitors = cgroups.monitor_processes(id);
    let depth = status("self").map_or(1, |s| s.ns_pids.len());
    let is_init = |pid: &u32| {
        status(&pid.to_string())
            .is_some_and(|s| !s.dead && s.ns_pids.len() == depth + 1 && s.ns_pids.last() == Some(&1))
    };
    let of_monitors = monitors.iter().flat_map(|pid| children(*pid)).find(is_init);
    let init = of_monitors.or_else(|| cgroups.payload_processes(id).into_iter().find(is_init));
    Found { init, monitors }
}

fn children(pid: u32) -> Vec<u32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    read_bounded(Path::new(&path), STATUS_MAX)
        .map(|text| text.split_whitespace().filter_map(|p| p.parse().ok()).collect())
        .unwrap_or_default()
}

#[derive(Debug, PartialEq, Eq)]
struct Status {
    dead: bool,
    ns_pids: Vec<u32>,
}

fn status(pid: &str) -> Option<Status> {
    read_bounded(Path::new(&format!("/proc/{pid}/status")), STATUS_MAX).ok().map(|text| parse(&text))
}

fn parse(text: &str) -> Status {
    let value = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)).unwrap_or_default().trim();
    Status {
        dead: value("State:").starts_with(['Z', 'X']),
        ns_pids: value("NSpid:").split_whitespace().filter_map(|p| p.parse().ok()).collect(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_status_is_read() {
        let text = "Name:\tx\nState:\tS (sleeping)\nNSpid:\t120\t1\n";
        assert_eq!(parse(text), Status { dead: false, ns_pids: vec![120, 1] });
        assert!(parse("State:\tZ (zombie)\n").dead);
        assert!(status("self").unwrap().ns_pids.contains(&std::process::id()));
    }

    #[test]
    fn a_ct_that_is_not_there_has_no_processes() {
        let cgroups = ContainerCgroups::detect().unwrap();
        assert_eq!(find(&cgroups, &SandboxId::random()), Found::default());
    }
}
