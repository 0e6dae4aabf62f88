//! What sandboxes and containers use, from their cgroups and the storage driver.

use moxlet_cri::v1;
use moxlet_ids::{ContainerId, SandboxId};
use moxlet_sandbox::cgroup::Stats;

use crate::{
    clock::now_ns,
    error::Result,
    ledger::SandboxPhase,
    rooms::Rooms,
    state::{Container, RunState, Sandbox},
    tasks::blocking,
};

fn number(value: u64) -> Option<v1::UInt64Value> {
    Some(v1::UInt64Value { value })
}

fn cpu(stats: &Stats, timestamp: i64) -> v1::CpuUsage {
    v1::CpuUsage { timestamp, usage_core_nano_seconds: number(stats.cpu_ns), ..v1::CpuUsage::default() }
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

/// `ContainerStats`. One that does not run has only its writable layer.
///
/// # Errors
/// A cgroup that cannot be read.
pub(crate) async fn container(rooms: &Rooms, container: &Container) -> Result<v1::ContainerStats> {
    let record = container.record();
    let now = now_ns();
    let running = matches!(container.run_state(), RunState::Running { .. });
    let stats = if running { read(rooms, &container.sandbox, Some(&container.id)).await? } else { None };
    // A root that is just being removed has nothing to tell.
    let written = rooms.driver.root_usage(&container.id).await.ok();
    let mountpoint = rooms.config.store_dir().display().to_string();
    Ok(v1::ContainerStats {
        attributes: Some(v1::ContainerAttributes {
            id: record.id.to_string(),
            metadata: Some(v1::ContainerMetadata { name: record.name, attempt: record.attempt }),
            labels: record.labels.into_iter().collect(),
            annotations: record.annotations.into_iter().collect(),
        }),
        cpu: stats.as_ref().map(|s| cpu(s, now)),
        memory: stats.as_ref().map(|s| memory(s, now, record.memory_limit)),
        writable_layer: written.map(|w| v1::FilesystemUsage {
            timestamp: now,
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
/// A cgroup that cannot be read.
pub(crate) async fn sandbox(rooms: &Rooms, sandbox: &Sandbox) -> Result<v1::PodSandboxStats> {
    let record = sandbox.record();
    let now = now_ns();
    let stats =
        if record.phase == SandboxPhase::Ready { read(rooms, &sandbox.id, None).await? } else { None };
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
            cpu: Some(cpu(&s, now)),
            memory: Some(memory(&s, now, None)),
            process: Some(v1::ProcessUsage { timestamp: now, process_count: number(s.pids) }),
            containers,
            ..v1::LinuxPodSandboxStats::default()
        }),
        windows: None,
    })
}
