//! Sandboxes and containers as CRI shows them.

use std::collections::{BTreeMap, HashMap};

use moxlet_cri::v1;

use crate::{
    ledger::{ContainerRecord, ResourcesRecord, SandboxPhase},
    signals,
    state::{Container, RunState, Sandbox},
};

fn sandbox_state(phase: SandboxPhase) -> i32 {
    match phase {
        SandboxPhase::Ready => v1::PodSandboxState::SandboxReady as i32,
        SandboxPhase::Creating | SandboxPhase::NotReady | SandboxPhase::Removing => {
            v1::PodSandboxState::SandboxNotready as i32
        }
    }
}

/// Says who else holds the CT of a pod (`backup`, `frozen`, …): the node leaves it alone meanwhile.
const HELD_BY: &str = "moxlet.dev/held-by";

fn annotations(given: BTreeMap<String, String>, holder: Option<String>) -> HashMap<String, String> {
    // The request's own under this name would be a lie.
    let own = given.into_iter().filter(|(key, _)| key != HELD_BY);
    own.chain(holder.map(|by| (HELD_BY.to_owned(), by))).collect()
}

/// `PodSandboxStatus`.
pub(crate) fn sandbox(sandbox: &Sandbox) -> v1::PodSandboxStatus {
    let record = sandbox.record();
    let mut ips = record.ips.iter().map(ToString::to_string);
    let network = v1::PodSandboxNetworkStatus {
        ip: ips.next().unwrap_or_default(),
        additional_ips: ips.map(|ip| v1::PodIp { ip }).collect(),
    };
    let pid = if record.share_pids { v1::NamespaceMode::Pod } else { v1::NamespaceMode::Container };
    let options = v1::NamespaceOption { pid: pid as i32, ..v1::NamespaceOption::default() };
    v1::PodSandboxStatus {
        id: record.id.to_string(),
        metadata: Some(v1::PodSandboxMetadata {
            name: record.name,
            uid: record.uid.to_string(),
            namespace: record.namespace,
            attempt: record.attempt,
        }),
        state: sandbox_state(record.phase),
        created_at: record.created_at_ns,
        network: Some(network),
        linux: Some(v1::LinuxPodSandboxStatus { namespaces: Some(v1::Namespace { options: Some(options) }) }),
        labels: record.labels.into_iter().collect(),
        annotations: annotations(record.annotations, sandbox.held_by()),
        ..v1::PodSandboxStatus::default()
    }
}

/// An item of `ListPodSandbox`.
pub(crate) fn sandbox_item(item: &Sandbox) -> v1::PodSandbox {
    let status = sandbox(item);
    v1::PodSandbox {
        id: status.id,
        metadata: status.metadata,
        state: status.state,
        created_at: status.created_at,
        labels: status.labels,
        annotations: status.annotations,
        runtime_handler: String::new(),
    }
}

fn container_state(state: &RunState) -> v1::ContainerState {
    match state {
        RunState::Created => v1::ContainerState::ContainerCreated,
        RunState::Running { .. } => v1::ContainerState::ContainerRunning,
        RunState::Exited(_) => v1::ContainerState::ContainerExited,
    }
}

fn image(record: &ContainerRecord) -> v1::ImageSpec {
    v1::ImageSpec {
        image: record.image.clone(),
        user_specified_image: record.user_image.clone(),
        ..v1::ImageSpec::default()
    }
}

fn resources(record: ResourcesRecord) -> v1::LinuxContainerResources {
    v1::LinuxContainerResources {
        cpu_period: record.cpu_period,
        cpu_quota: record.cpu_quota,
        cpu_shares: record.cpu_shares,
        memory_limit_in_bytes: record.memory_limit,
        memory_swap_limit_in_bytes: record.memory_swap_limit,
        oom_score_adj: record.oom_score_adj,
        unified: record.unified.into_iter().collect(),
        ..v1::LinuxContainerResources::default()
    }
}

/// `ContainerStatus`.
pub(crate) fn container(container: &Container) -> v1::ContainerStatus {
    let record = container.record();
    let state = container.run_state();
    let mut status = v1::ContainerStatus {
        id: record.id.to_string(),
        metadata: Some(v1::ContainerMetadata { name: record.name.clone(), attempt: record.attempt }),
        state: container_state(&state) as i32,
        created_at: record.created_at_ns,
        image: Some(image(&record)),
        image_ref: record.image_ref.clone(),
        image_id: record.image_id.to_string(),
        log_path: record.log_file.as_ref().map(|p| p.display().to_string()).unwrap_or_default(),
        ..v1::ContainerStatus::default()
    };
    status.mounts = record
        .mounts
        .into_iter()
        .map(|m| v1::Mount {
            container_path: m.container_path,
            host_path: m.host_path,
            readonly: m.read_only,
            ..v1::Mount::default()
        })
        .collect();
    status.user = record.user.map(|user| v1::ContainerUser {
        linux: Some(v1::LinuxContainerUser {
            uid: user.uid.into(),
            gid: user.gid.into(),
            supplemental_groups: user.groups.into_iter().map(Into::into).collect(),
        }),
    });
    status.resources =
        Some(v1::ContainerResources { linux: Some(resources(record.resources)), windows: None });
    status.stop_signal = signals::as_cri(record.stop_signal) as i32;
    status.labels = record.labels.into_iter().collect();
    status.annotations = record.annotations.into_iter().collect();
    match state {
        RunState::Created => {}
        RunState::Running { started_at_ns } => status.started_at = started_at_ns,
        RunState::Exited(exit) => {
            status.started_at = exit.started_at_ns;
            status.finished_at = exit.finished_at_ns;
            status.exit_code = exit.code;
            status.reason = exit.reason;
            status.message = exit.message;
        }
    }
    status
}

/// An item of `ListContainers`.
pub(crate) fn container_item(item: &Container) -> v1::Container {
    let record = item.record();
    v1::Container {
        id: record.id.to_string(),
        pod_sandbox_id: record.sandbox.to_string(),
        metadata: Some(v1::ContainerMetadata { name: record.name.clone(), attempt: record.attempt }),
        image: Some(image(&record)),
        image_ref: record.image_ref.clone(),
        image_id: record.image_id.to_string(),
        state: container_state(&item.run_state()) as i32,
        created_at: record.created_at_ns,
        labels: record.labels.into_iter().collect(),
        annotations: record.annotations.into_iter().collect(),
    }
}
