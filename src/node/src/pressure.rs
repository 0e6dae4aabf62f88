//! When the host counts as short of memory or disk: thresholds as a kubelet's `evictionHard` knows them, and the Node's
//! conditions that tell of it. The scheduler keeps pods away from a Node under pressure; nothing is evicted here.

use std::str::FromStr;

use jiff::Timestamp;
use k8s_openapi::{api::core::v1::NodeCondition, apimachinery::pkg::apis::meta::v1::Time};
use moxlet_cri::{host, v1};

use crate::error::{Error, Result};
use crate::model::resources::units;

const KEY: &str = "pressure_thresholds";

/// What has to be left of something: less is pressure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threshold {
    /// So many bytes or inodes; 0 is never reached.
    Amount(u64),
    /// So many hundredths of all there is, 0 to 100; 0 is never reached.
    Percent(u8),
}

impl Threshold {
    /// Whether `free` of `all` is less. Never where nothing is known of it, `all` being 0.
    fn above(self, free: u64, all: u64) -> bool {
        all > 0
            && match self {
                Self::Amount(least) => free < least,
                Self::Percent(least) => u128::from(free) * 100 < u128::from(all) * u128::from(least),
            }
    }
}

impl FromStr for Threshold {
    type Err = String;

    /// Reads a quantity (`100Mi`) or a percentage (`10%`).
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wrong =
            || format!("{text:?} is neither a quantity such as 100Mi nor a percentage from 0% to 100%");
        match text.strip_suffix('%') {
            Some(number) => match number.parse() {
                Ok(percent @ 0..=100) => Ok(Self::Percent(percent)),
                _ => Err(wrong()),
            },
            None => units(text).and_then(|n| u64::try_from(n).ok()).map(Self::Amount).ok_or_else(wrong),
        }
    }
}

/// The thresholds of all that is measured, by default the kubelet's; of process ids, for which that has none, a tenth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PressureThresholds {
    memory_available: Threshold,
    disk_available: Threshold,
    inodes_free: Threshold,
    pid_available: Threshold,
}

impl Default for PressureThresholds {
    fn default() -> Self {
        Self {
            memory_available: Threshold::Amount(100 << 20),
            disk_available: Threshold::Percent(10),
            inodes_free: Threshold::Percent(5),
            pid_available: Threshold::Percent(10),
        }
    }
}

impl PressureThresholds {
    /// The defaults with those replaced that are given by signal: `memory.available`, `nodefs.available`,
    /// `nodefs.inodesFree`, `pid.available`.
    ///
    /// # Errors
    /// [`Error::Config`] names a signal that is not measured, or a value that is no threshold.
    pub fn of<'a>(given: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self> {
        let mut all = Self::default();
        for (signal, text) in given {
            let slot = match signal {
                "memory.available" => &mut all.memory_available,
                "nodefs.available" => &mut all.disk_available,
                "nodefs.inodesFree" => &mut all.inodes_free,
                "pid.available" => &mut all.pid_available,
                _ => {
                    let reason = format!(
                        "{signal:?} is not measured; memory.available, nodefs.available, nodefs.inodesFree and pid.available are"
                    );
                    return Err(Error::Config { key: KEY, reason });
                }
            };
            *slot = text
                .parse()
                .map_err(|reason| Error::Config { key: KEY, reason: format!("{signal}: {reason}") })?;
        }
        Ok(all)
    }

    fn memory_is_short(&self, info: &host::InfoResponse) -> bool {
        let free = info.memory_bytes.saturating_sub(info.memory_working_set_bytes);
        self.memory_available.above(free, info.memory_bytes)
    }

    fn pids_are_short(&self, info: &host::InfoResponse) -> bool {
        self.pid_available.above(info.threads_max.saturating_sub(info.threads), info.threads_max)
    }

    fn disk_is_short(&self, info: &host::InfoResponse) -> bool {
        self.disk_available.above(info.ephemeral_storage_available_bytes, info.ephemeral_storage_bytes)
            || self.inodes_free.above(info.ephemeral_storage_inodes_free, info.ephemeral_storage_inodes)
    }
}

/// The Node's conditions, worded as a kubelet's; `not_ready` is why it is not ready, `others` is what the agent says beside
/// that. What did not change keeps the time of `old`.
pub(crate) fn conditions(
    info: &host::InfoResponse,
    thresholds: &PressureThresholds,
    not_ready: Option<&str>,
    others: &[v1::RuntimeCondition],
    old: &[NodeCondition],
) -> Vec<NodeCondition> {
    let now = Time(Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default());
    let condition = |kind: &str, holds: bool, reason: &str, message: &str| {
        let status = if holds { "True" } else { "False" };
        let before = old.iter().find(|c| c.type_ == kind && c.status == status);
        NodeCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            last_heartbeat_time: Some(now.clone()),
            last_transition_time: before
                .and_then(|c| c.last_transition_time.clone())
                .or_else(|| Some(now.clone())),
        }
    };
    let memory = match thresholds.memory_is_short(info) {
        true => ("KubeletHasInsufficientMemory", "the host is short of memory"),
        false => ("KubeletHasSufficientMemory", "the host has sufficient memory available"),
    };
    let disk = match thresholds.disk_is_short(info) {
        true => ("KubeletHasDiskPressure", "the host's disk is nearly full"),
        false => ("KubeletHasNoDiskPressure", "the host has no disk pressure"),
    };
    let pids = match thresholds.pids_are_short(info) {
        true => ("KubeletHasInsufficientPID", "the host has insufficient PID available"),
        false => ("KubeletHasSufficientPID", "the host has sufficient PID available"),
    };
    let mut all = vec![
        condition("MemoryPressure", thresholds.memory_is_short(info), memory.0, memory.1),
        condition("DiskPressure", thresholds.disk_is_short(info), disk.0, disk.1),
        condition("PIDPressure", thresholds.pids_are_short(info), pids.0, pids.1),
        match not_ready {
            None => condition("Ready", true, "KubeletReady", "moxlet is posting ready status"),
            Some(why) => condition("Ready", false, "KubeletNotReady", why),
        },
    ];
    let reason = |c: &v1::RuntimeCondition| if c.status { c.r#type.clone() } else { c.reason.clone() };
    all.extend(others.iter().map(|c| condition(&c.r#type, c.status, &reason(c), &c.message)));
    all
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn nearly_full() -> host::InfoResponse {
        host::InfoResponse {
            memory_bytes: 1 << 30,
            memory_working_set_bytes: (1 << 30) - (101 << 20),
            ephemeral_storage_bytes: 1000,
            ephemeral_storage_available_bytes: 100,
            ..host::InfoResponse::default()
        }
    }

    #[test]
    fn pressure_begins_at_the_kubelets_thresholds() {
        let (mut info, kubelet) = (nearly_full(), PressureThresholds::default());
        assert!(!kubelet.memory_is_short(&info) && !kubelet.disk_is_short(&info));
        info.memory_working_set_bytes += 2 << 20;
        info.ephemeral_storage_available_bytes = 99;
        assert!(kubelet.memory_is_short(&info) && kubelet.disk_is_short(&info));
    }

    #[test]
    fn a_host_that_runs_out_of_process_ids_has_pid_pressure() {
        let (mut info, thresholds) = (nearly_full(), PressureThresholds::default());
        let pressure = |info: &host::InfoResponse| {
            let all = conditions(info, &thresholds, None, &[], &[]);
            all.into_iter().find(|c| c.type_ == "PIDPressure").unwrap().status
        };
        assert_eq!(pressure(&info), "False", "an agent that does not measure it");
        (info.threads, info.threads_max) = (899, 1000);
        assert_eq!(pressure(&info), "False");
        info.threads = 901;
        assert_eq!(pressure(&info), "True");
        let given = PressureThresholds::of([("pid.available", "50")]).unwrap();
        assert!(!given.pids_are_short(&info));
    }

    #[test]
    fn thresholds_are_quantities_or_percentages_and_zero_switches_off() {
        let info = host::InfoResponse { ephemeral_storage_available_bytes: 0, ..nearly_full() };
        let given =
            PressureThresholds::of([("nodefs.available", "0%"), ("memory.available", "0.5Gi")]).unwrap();
        assert!(given.memory_is_short(&info) && !given.disk_is_short(&info));
        assert_eq!(given.inodes_free, Threshold::Percent(5), "what is not given stays at its default");
        assert!(PressureThresholds::of([("nodefs.available", "1Ki")]).unwrap().disk_is_short(&info));
    }

    #[test]
    fn what_is_not_measured_or_no_threshold_is_refused_by_name() {
        let why = |signal, text| PressureThresholds::of([(signal, text)]).unwrap_err().to_string();
        assert!(why("imagefs.available", "1%").contains("imagefs.available"));
        for bad in ["", "%", "101%", "-1", "10 %", "1.5%", "many"] {
            assert!(why("nodefs.available", bad).contains("nodefs.available"), "{bad}");
        }
    }

    #[test]
    fn a_condition_keeps_the_time_of_its_last_change() {
        let then = Time(Timestamp::from_second(1).unwrap());
        let thresholds = PressureThresholds::default();
        let mut old = conditions(&nearly_full(), &thresholds, None, &[], &[]);
        old.iter_mut().for_each(|c| c.last_transition_time = Some(then.clone()));
        let proxmox = v1::RuntimeCondition {
            r#type: "ProxmoxReady".into(),
            reason: "ProxmoxNotReady".into(),
            message: "unreachable".into(),
            ..Default::default()
        };
        let now = conditions(&nearly_full(), &thresholds, Some("no agent"), &[proxmox], &old);
        let kept = |kind: &str| {
            now.iter().find(|c| c.type_ == kind).unwrap().last_transition_time == Some(then.clone())
        };
        assert!(kept("DiskPressure") && kept("MemoryPressure") && kept("PIDPressure") && !kept("Ready"));
        let last = now.last().unwrap();
        assert_eq!((last.type_.as_str(), last.status.as_str()), ("ProxmoxReady", "False"));
        assert_eq!(last.message.as_deref(), Some("unreachable"));
    }
}
