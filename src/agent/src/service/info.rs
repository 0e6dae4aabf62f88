//! What CRI's verbose statuses tell beside the status itself, for people at `crictl`: one JSON text by the key `info`. No environment and
//! no secret is in it.

use std::{collections::HashMap, path::PathBuf};

use moxlet_sandbox::SandboxState;
use serde::Serialize;

use crate::{
    config::{EngineSettings, Storage},
    error::{Error, Result},
    ledger::SandboxPhase,
    rooms::Rooms,
    state::{Container, Sandbox},
};

/// Of a sandbox.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SandboxInfo {
    #[serde(rename = "sandboxID")]
    id: String,
    /// Of the init on the host.
    pid: Option<u32>,
    phase: SandboxPhase,
    hostname: String,
    shared_dir: PathBuf,
    log_directory: Option<PathBuf>,
    held_by: Option<String>,
}

/// Of a container.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ContainerInfo {
    #[serde(rename = "sandboxID")]
    sandbox: String,
    /// On the host.
    pids: Vec<u32>,
    root_dir: PathBuf,
    cgroup_path: String,
    image_id: String,
    tty: bool,
    stdin: bool,
}

/// Of the runtime.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct RuntimeInfo {
    version: &'static str,
    engine: &'static str,
    storage: &'static str,
    root_dir: PathBuf,
    cgroup_version: u8,
    sandboxes: usize,
    containers: usize,
}

type Info = HashMap<String, String>;

fn info(value: &impl Serialize) -> Result<Info> {
    let text = serde_json::to_string(value).map_err(|e| Error::io("making a text of a verbose status", e))?;
    Ok(HashMap::from([("info".to_owned(), text)]))
}

/// Of a sandbox.
///
/// # Errors
/// The engine does not tell whether its CT runs.
pub(super) async fn sandbox(rooms: &Rooms, sandbox: &Sandbox) -> Result<Info> {
    let record = sandbox.record();
    let pid = match rooms.engine.state(&sandbox.id).await? {
        Some(SandboxState::Running { pid }) => Some(pid),
        _ => None,
    };
    info(&SandboxInfo {
        id: record.id.to_string(),
        pid,
        phase: record.phase,
        hostname: record.hostname,
        shared_dir: rooms.dirs.pod(&sandbox.id),
        log_directory: record.log_directory,
        held_by: sandbox.held_by(),
    })
}

/// Of a container.
///
/// # Errors
/// None in practice: it is only written down.
pub(super) fn container(rooms: &Rooms, container: &Container) -> Result<Info> {
    let record = container.record();
    info(&ContainerInfo {
        sandbox: container.sandbox.to_string(),
        pids: rooms.cgroups.processes_of(&container.sandbox, &container.id),
        root_dir: rooms.dirs.pod(&container.sandbox).join("ctr").join(container.id.as_str()).join("rootfs"),
        cgroup_path: moxlet_sandbox::cgroup::ContainerCgroups::path_in_ct(&container.id),
        image_id: record.image_id.to_string(),
        tty: record.tty,
        stdin: record.stdin,
    })
}

/// Of the runtime.
///
/// # Errors
/// None in practice: it is only written down.
pub(super) fn runtime(rooms: &Rooms) -> Result<Info> {
    info(&RuntimeInfo {
        version: env!("CARGO_PKG_VERSION"),
        engine: match rooms.config.engine {
            EngineSettings::Lxc => "lxc",
            EngineSettings::Pve(_) => "pve",
        },
        storage: match rooms.config.storage {
            Storage::Overlay => "overlay",
            Storage::Zfs(_) => "zfs",
        },
        root_dir: rooms.config.root_dir.clone(),
        cgroup_version: if rooms.cgroups.is_v1() { 1 } else { 2 },
        sandboxes: rooms.state.sandboxes().len(),
        containers: rooms.state.containers().len(),
    })
}
