//! What sandboxes and containers use, from their cgroups and the storage driver.

use std::path::PathBuf;

use moxlet_cri::v1;
use moxlet_ids::{ContainerId, SandboxId};
use moxlet_sandbox::{SandboxState, cgroup::Stats};

use crate::{
    clock::now_ns,
    error::Result,
    ledger::SandboxPhase,
    rooms::Rooms,
    state::{Container, RunState, Sandbox},
    tasks::blocking,
};

/// The interface that a pod has its first address on.
const DEFAULT_INTERFACE: &str = "eth0";
/// The largest table of interfaces that is read, in bytes.
const MAX_NET_DEV: u64 = 64 << 10;

fn number(value: u64) -> Option<v1::UInt64Value> {
    Some(v1::UInt64Value { value })
}

fn cpu(stats: &Stats, timestamp: i64, rate: Option<u64>) -> v1::CpuUsage {
    v1::CpuUsage {
        timestamp,
        usage_core_nano_seconds: number(stats.cpu_ns),
        usage_nano_cores: rate.and_then(number),
        ..v1::CpuUsage::default()
    }
}

fn memory(stats: &Stats, timestamp: i64, limit: Option<u64>) -> v1::MemoryUsage {
    v1::MemoryUsage {
        timestamp,
        working_set_bytes: number(stats.memory_working_set),
        available_bytes: limit.and_then(|l| number(l.saturating_sub(stats.memory_working_set))),
        usage_bytes: number(stats.memory_usage),
        rss_bytes: number(stats.memory_rss),
        ..v1::MemoryUsage::default()
    }
}

/// What a CT or container uses now; nothing once its cgroup is gone.
async fn read(rooms: &Rooms, sandbox: &SandboxId, container: Option<&ContainerId>) -> Result<Option<Stats>> {
    let (cgroups, sandbox, container) = (rooms.cgroups.clone(), sandbox.clone(), container.cloned());
    blocking(move || match cgroups.stats(&sandbox, container.as_ref()) {
        Ok(stats) => Ok(Some(stats)),
        Err(moxlet_sandbox::Error::NoCgroup(_)) => Ok(None),
        Err(error) => Err(error.into()),
    })
    .await
}

/// What passed through the interfaces of a CT; nothing once it does not run.
async fn network(rooms: &Rooms, id: &SandboxId, timestamp: i64) -> Result<Option<v1::NetworkUsage>> {
    let Some(SandboxState::Running { pid }) = rooms.engine.state(id).await? else { return Ok(None) };
    let path = PathBuf::from(format!("/proc/{pid}/net/dev"));
    let read = blocking(move || Ok(moxlet_files::read_text_bounded(&path, MAX_NET_DEV).ok())).await?;
    let Some(text) = read else { return Ok(None) };
    let interfaces = interfaces(&text);
    let default_interface = interfaces.iter().find(|i| i.name == DEFAULT_INTERFACE).cloned();
    Ok(Some(v1::NetworkUsage { timestamp, default_interface, interfaces }))
}

/// The interfaces of `/proc/<pid>/net/dev`, the loopback apart: two lines of headings, then the name and 16 counters of each.
fn interfaces(text: &str) -> Vec<v1::NetworkInterfaceUsage> {
    let interface = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        let counters: Vec<u64> = counters.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        let [rx_bytes, _, rx_errors, _, _, _, _, _, tx_bytes, _, tx_errors, ..] = counters[..] else {
            return None;
        };
        Some(v1::NetworkInterfaceUsage {
            name: name.trim().to_owned(),
            rx_bytes: number(rx_bytes),
            rx_errors: number(rx_errors),
            tx_bytes: number(tx_bytes),
            tx_errors: number(tx_errors),
        })
    };
    text.lines().skip(2).filter_map(interface).filter(|i| i.name != "lo").collect()
}

/// `ContainerStats`. One that does not run has only its writable layer.
///
/// # Errors
/// A cgroup that cannot be read.
pub(crate) async fn container(rooms: &Rooms, container: &Container) -> Result<v1::ContainerStats> {
    let record = container.record();
    let now = now_ns();
    let running = matches!(container.run_state(), RunState::Running { .. });
    let stats = if running { read(rooms, &container.sandbox, Some(&container.id)).await? } else { None };
    let key = (container.sandbox.clone(), Some(container.id.clone()));
    let rate = stats.as_ref().and_then(|s| rooms.rates.rate(key, s.cpu_ns, now));
    let written = rooms.usages.of(&container.id);
    let mountpoint = rooms.config.store_dir().display().to_string();
    Ok(v1::ContainerStats {
        attributes: Some(v1::ContainerAttributes {
            id: record.id.to_string(),
            metadata: Some(v1::ContainerMetadata { name: record.name, attempt: record.attempt }),
            labels: record.labels.into_iter().collect(),
            annotations: record.annotations.into_iter().collect(),
        }),
        cpu: stats.as_ref().map(|s| cpu(s, now, rate)),
        memory: stats.as_ref().map(|s| memory(s, now, record.memory_limit)),
        writable_layer: written.map(|(w, measured_at)| v1::FilesystemUsage {
            timestamp: measured_at,
            fs_id: Some(v1::FilesystemIdentifier { mountpoint }),
            used_bytes: number(w.bytes),
            inodes_used: number(w.inodes),
        }),
        ..v1::ContainerStats::default()
    })
}

/// `PodSandboxStats`, its containers included.
///
/// # Errors
/// A cgroup that cannot be read, or that the engine does not tell whether the CT runs.
pub(crate) async fn sandbox(rooms: &Rooms, sandbox: &Sandbox) -> Result<v1::PodSandboxStats> {
    let record = sandbox.record();
    let now = now_ns();
    let stats =
        if record.phase == SandboxPhase::Ready { read(rooms, &sandbox.id, None).await? } else { None };
    let rate = stats.as_ref().and_then(|s| rooms.rates.rate((sandbox.id.clone(), None), s.cpu_ns, now));
    let network = if stats.is_some() { network(rooms, &sandbox.id, now).await? } else { None };
    let mut containers = Vec::new();
    for container in rooms.state.containers_of(&sandbox.id) {
        if matches!(container.run_state(), RunState::Running { .. }) {
            containers.push(self::container(rooms, &container).await?);
        }
    }
    Ok(v1::PodSandboxStats {
        attributes: Some(v1::PodSandboxAttributes {
            id: record.id.to_string(),
            metadata: Some(v1::PodSandboxMetadata {
                name: record.name,
                uid: record.uid.to_string(),
                namespace: record.namespace,
                attempt: record.attempt,
            }),
            labels: record.labels.into_iter().collect(),
            annotations: record.annotations.into_iter().collect(),
        }),
        linux: stats.map(|s| v1::LinuxPodSandboxStats {
            cpu: Some(cpu(&s, now, rate)),
            memory: Some(memory(&s, now, None)),
            process: Some(v1::ProcessUsage { timestamp: now, process_count: number(s.pids) }),
            containers,
            network,
            ..v1::LinuxPodSandboxStats::default()
        }),
        windows: None,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn interfaces_have_their_bytes_and_errors_and_the_loopback_is_left_out() {
        let text = "Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0
  eth0:    2000      20    3    0    0     0          0         0     4000      40    5    0    0     0       0          0
  bad: 1 2
";
        let all = interfaces(text);
        assert_eq!(all.len(), 1);
        let value = |n: &Option<v1::UInt64Value>| n.unwrap().value;
        let eth0 = &all[0];
        assert_eq!(
            (value(&eth0.rx_bytes), value(&eth0.rx_errors), value(&eth0.tx_bytes), value(&eth0.tx_errors)),
            (2000, 3, 4000, 5)
        );
    }
}
