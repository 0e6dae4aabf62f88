//! Containers of a sandbox: made from an image's root and an OCI spec, run by the CT's init, removed with all they had.
//!
//! ```text
//! CreateContainer: ledger ▶ root (mounted below the pod's directory) ▶ mounts ▶ spec          (see `prepare`)
//! StartContainer:  cgroup ▶ init: create ▶ oom_score_adj ▶ init: start
//! the init's word or the CT's end ▶ Exited, in the ledger
//! RemoveContainer: init ▶ mounts ▶ root ▶ cgroup ▶ log ▶ ledger
//! ```
//! What a spec holds (environment among it) stays in memory until the start and then in the CT's tmpfs; it is never on a
//! disk. A container that was made and not started when the agent ended is therefore made anew by whoever wanted it.

use std::{
    fs,
    path::{Component, Path},
    sync::Arc,
    time::Duration,
};

use moxlet_cri::v1;
use moxlet_ids::ContainerId;
use moxlet_init_proto::{ContainerState, ErrorClass, Status, read_exit_record};
use moxlet_sandbox::{Limits, cgroup};
use moxlet_storage::mounts;
use rustix::fs::AtFlags;
use tracing::{debug, info, warn};

use crate::{
    beneath,
    core::{Container, Core, RunState, Sandbox, blocking, now_ns},
    error::{Error, Result, chain},
    ledger::{ContainerRecord, Exit, Phase},
    notices, prepare, sandboxes,
};

/// How long a killed container may take to be gone.
const KILLED: Duration = Duration::from_secs(10);
/// How long an init may take over an answer that needs no work of a container.
const ANSWER: Duration = Duration::from_secs(10);
/// How long it may take to make a container, or to have its command executed.
const MADE: Duration = Duration::from_secs(60);
/// The exit code of a container that could not be started, as containerd has it.
const START_ERROR: i32 = 128;

/// CRI's limits as the engine takes them; what is not set is not limited.
pub(crate) fn limits(resources: &v1::LinuxContainerResources) -> Limits {
    let positive = |value: i64| u64::try_from(value).ok().filter(|v| *v > 0);
    Limits {
        memory_bytes: positive(resources.memory_limit_in_bytes),
        cpu_quota_us: (resources.cpu_quota != 0).then_some(resources.cpu_quota),
        cpu_period_us: positive(resources.cpu_period),
        cpu_shares: positive(resources.cpu_shares),
        pids: resources.unified.get("pids.max").and_then(|v| v.parse().ok()),
    }
}

/// `CreateContainer`.
pub(crate) async fn create(core: &Arc<Core>, request: v1::CreateContainerRequest) -> Result<ContainerId> {
    let sandbox = core.sandbox(&request.pod_sandbox_id)?;
    let config = request.config.ok_or_else(|| Error::Invalid("the container has no config".into()))?;
    let of_pod = request.sandbox_config.unwrap_or_default();
    let core = core.clone();
    core.clone()
        .whole(async move {
            let _guard = sandbox.change.lock().await;
            if sandbox.phase() != Phase::Ready {
                return Err(Error::State(format!("sandbox {} is not ready", sandbox.id)));
            }
            let (record, hold) = prepare::record(&core, &sandbox, &config).await?;
            let container = Container::new(record);
            core.change_container(&container, |_| {}).await?;
            core.insert_container(container.clone());
            match prepare::make(&core, &sandbox, &container, &config, &of_pod, hold.record()).await {
                Ok(()) => {
                    core.say(container.id.as_str(), &sandbox, v1::ContainerEventType::ContainerCreatedEvent);
                    Ok(container.id.clone())
                }
                Err(error) => {
                    if let Err(second) = remove_parts(&core, &sandbox, &container).await {
                        warn!(container = %container.id, error = chain(&second), "a failed container is not wholly removed; the next start tries again");
                    }
                    Err(error)
                }
            }
        })
        .await
}

/// `StartContainer`.
pub(crate) async fn start(core: &Arc<Core>, id: &str) -> Result<()> {
    let container = core.container(id)?;
    let sandbox = core.sandbox(container.sandbox.as_str())?;
    let core = core.clone();
    core.clone()
        .whole(async move {
            let _guard = sandbox.change.lock().await;
            if container.run_state() != RunState::Created {
                return Err(Error::State(format!("container {} was started before", container.id)));
            }
            let pending = container.take_pending();
            let pending = pending
                .ok_or_else(|| Error::State(format!("container {} cannot be started", container.id)))?;
            core.change_container(&container, |r| r.started = true).await?;
            let outcome = run(&core, &sandbox, &container, pending).await;
            if let Err(error) = &outcome {
                not_started(&core, &sandbox, &container, error).await?;
            }
            notices::describe(&core, &sandbox);
            outcome
        })
        .await
}

async fn run(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    container: &Arc<Container>,
    pending: prepare::Pending,
) -> Result<()> {
    let client = sandbox.client()?;
    let (cgroups, of, id) = (core.cgroups.clone(), sandbox.id.clone(), container.id.clone());
    let (limits, map) = (pending.limits, core.config.map);
    blocking("making a cgroup", move || Ok(cgroups.create(&of, &id, &limits, map)?)).await?;
    sandbox.answer("create", MADE, client.create(pending.request)).await?;
    if let Some(adj) = pending.oom_score_adj {
        let (cgroups, of, id) = (core.cgroups.clone(), sandbox.id.clone(), container.id.clone());
        blocking("setting oom_score_adj", move || {
            for pid in cgroups.processes_of(&of, &id) {
                cgroup::set_oom_score_adj(pid, adj)?;
            }
            Ok(())
        })
        .await?;
    }
    let state = sandbox.answer("start", MADE, client.start(container.id.as_str())).await?;
    let record = container.record();
    info!(container = %container.id, name = record.name, sandbox = %sandbox.id, image = record.user_image, "container runs");
    reported(core, sandbox, state).await
}

/// A container that could not be started has ended with containerd's code and reason; what the init made of it goes.
pub(crate) async fn not_started(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    container: &Arc<Container>,
    error: &Error,
) -> Result<()> {
    if let Ok(client) = sandbox.client() {
        let id = container.id.as_str();
        let killed = async {
            let _ = client.signal(id, libc_kill(), true).await;
            client.remove(id).await
        };
        if let Err(error) = sandbox.answer("remove", ANSWER, killed).await {
            debug!(
                container = id,
                error = chain(&error),
                "what was begun of a container stays until it is removed"
            );
        }
    }
    let exit = Exit {
        code: START_ERROR,
        reason: "StartError".into(),
        message: chain(error),
        started_at_ns: 0,
        finished_at_ns: now_ns(),
    };
    exited(core, sandbox, container, exit).await
}

fn libc_kill() -> i32 {
    rustix::process::Signal::KILL.as_raw()
}

/// What the init says about a container.
pub(crate) async fn reported(core: &Arc<Core>, sandbox: &Arc<Sandbox>, state: ContainerState) -> Result<()> {
    let Ok(container) = core.container(&state.id) else { return Ok(()) };
    if container.sandbox != sandbox.id {
        return Ok(());
    }
    match state.status {
        Status::Created => Ok(()),
        Status::Running { started_at_ns, .. } => {
            let mut fresh = false;
            container.state.send_if_modified(|now| {
                let told = RunState::Running { started_at_ns };
                fresh = *now == RunState::Created;
                let changed = !now.has_ended() && *now != told;
                if changed {
                    *now = told;
                }
                changed
            });
            if fresh {
                core.say(container.id.as_str(), sandbox, v1::ContainerEventType::ContainerStartedEvent);
            }
            Ok(())
        }
        Status::Exited { code, started_at_ns, finished_at_ns, message, .. } => {
            if container.record().exit.is_some() {
                return Ok(());
            }
            let (reason, message) = match message {
                Some(message) => ("StartError", message),
                None if code == 0 => ("Completed", String::new()),
                None if oom_killed(core, sandbox, &container).await => ("OOMKilled", String::new()),
                None => ("Error", String::new()),
            };
            let exit = Exit { code, reason: reason.into(), message, started_at_ns, finished_at_ns };
            exited(core, sandbox, &container, exit).await
        }
    }
}

async fn oom_killed(core: &Arc<Core>, sandbox: &Arc<Sandbox>, container: &Arc<Container>) -> bool {
    let (cgroups, of, id) = (core.cgroups.clone(), sandbox.id.clone(), container.id.clone());
    let read = move || Ok(cgroups.oom_kills(&of, Some(&id)).unwrap_or(0) > 0);
    blocking("reading a cgroup", read).await.unwrap_or(false)
}

/// Writes down an end, once, and tells.
async fn exited(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    container: &Arc<Container>,
    exit: Exit,
) -> Result<()> {
    let mut first = false;
    core.change_container(container, |r| {
        first = r.exit.is_none();
        r.exit.get_or_insert(exit);
    })
    .await?;
    let record = container.record();
    if let (true, Some(exit)) = (first, record.exit) {
        info!(container = %container.id, name = record.name, code = exit.code, reason = exit.reason, "container has ended");
        core.say(container.id.as_str(), sandbox, v1::ContainerEventType::ContainerStoppedEvent);
    }
    Ok(())
}

/// The CT has ended: a container that ran has the end that its init wrote down, or an unknown one.
pub(crate) async fn lost(core: &Arc<Core>, sandbox: &Arc<Sandbox>, container: &Arc<Container>) -> Result<()> {
    let record = container.record();
    if record.exit.is_some() || !record.started {
        return Ok(());
    }
    let path = sandboxes::shared_dir(core, &sandbox.id).join("state").join(format!("{}.json", container.id));
    let written = blocking("reading an exit record", move || Ok(read_exit_record(&path)?)).await;
    match written {
        Ok(Some(state)) if matches!(state.status, Status::Exited { .. }) => {
            return reported(core, sandbox, state).await;
        }
        Ok(_) => {}
        Err(error) => warn!(container = %container.id, error = chain(&error), "an exit record is not used"),
    }
    let started_at_ns = match container.run_state() {
        RunState::Running { started_at_ns } => started_at_ns,
        _ => 0,
    };
    let exit = Exit {
        code: 137,
        reason: "ContainerStatusUnknown".into(),
        message: "The pod's CT ended before the container's end could be written down".into(),
        started_at_ns,
        finished_at_ns: now_ns(),
    };
    exited(core, sandbox, container, exit).await
}

/// `StopContainer`: the stop signal, SIGKILL after `seconds`; of one that does not run: nothing.
///
/// # Errors
/// [`Error::Timeout`] where it has not ended 10 s after that, as when its init hangs.
/// [`Error::Held`]: somebody else holds the CT. It is not even asked to end then.
pub(crate) async fn stop(core: &Arc<Core>, id: &str, seconds: i64) -> Result<()> {
    let Ok(container) = core.container(id) else { return Ok(()) };
    if !matches!(container.run_state(), RunState::Running { .. }) {
        return Ok(());
    }
    let sandbox = core.sandbox(container.sandbox.as_str())?;
    sandboxes::not_held(core, &sandbox).await?;
    let Ok(client) = sandbox.client() else {
        // Its CT is going or gone; the watch writes down its end.
        return within(&container, KILLED, async {
            container.ended().await;
            Ok(())
        })
        .await;
    };
    let name = container.id.as_str();
    let seconds = u64::try_from(seconds).unwrap_or(0);
    let end = async |signal, all| {
        send(client.signal(name, signal, all).await)?;
        container.ended().await;
        Ok(())
    };
    if seconds > 0 {
        let asked = end(container.record().stop_signal, false);
        if let Ok(ended) = tokio::time::timeout(Duration::from_secs(seconds), asked).await {
            return ended;
        }
        // It may be held only since a moment ago.
        sandboxes::not_held(core, &sandbox).await?;
        info!(container = name, seconds, "container did not end in time and is killed");
    }
    // Whoever waits has StopPodSandbox, which needs no answer of an init.
    within(&container, KILLED, end(libc_kill(), true)).await
}

async fn within(
    container: &Container,
    limit: Duration,
    ended: impl Future<Output = Result<()>>,
) -> Result<()> {
    let text = || format!("container {} did not end within {} s of SIGKILL", container.id, limit.as_secs());
    tokio::time::timeout(limit, ended).await.map_err(|_| Error::Timeout(text()))?
}

/// A signal that finds no process any more has done its work.
fn send(outcome: moxlet_init_proto::Result<()>) -> Result<()> {
    match outcome {
        Err(e) if matches!(e.class(), Some(ErrorClass::InvalidState | ErrorClass::NotFound)) => Ok(()),
        other => Ok(other?),
    }
}

/// `RemoveContainer`; one that runs is killed. Of an unknown one: nothing, as CRI asks.
pub(crate) async fn remove(core: &Arc<Core>, id: &str) -> Result<()> {
    let Ok(container) = core.container(id) else { return Ok(()) };
    let sandbox = core.sandbox(container.sandbox.as_str())?;
    let core = core.clone();
    core.clone()
        .whole(async move {
            sandboxes::not_held(&core, &sandbox).await?;
            stop(&core, container.id.as_str(), 0).await?;
            let _guard = sandbox.change.lock().await;
            remove_parts(&core, &sandbox, &container).await
        })
        .await
}

/// Removes all of a container, its line in the ledger last. The caller holds the sandbox; it may be repeated.
pub(crate) async fn remove_parts(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    container: &Arc<Container>,
) -> Result<()> {
    let id = container.id.clone();
    if let Ok(client) = sandbox.client() {
        let remove = async || sandbox.answer("remove", ANSWER, client.remove(id.as_str())).await;
        match remove().await {
            Err(e) if matches!(e.class(), Some(ErrorClass::InvalidState)) => {
                let killed = client.signal(id.as_str(), libc_kill(), true);
                let _ = sandbox.answer("signal", ANSWER, killed).await;
                let _ = tokio::time::timeout(KILLED, container.ended()).await;
                remove().await?;
            }
            Err(e) if e.class().is_none() => {
                // The CT is on its way out; what is the host's is removed all the same.
                debug!(container = %id, error = chain(&e), "the init does not answer");
            }
            _ => {}
        }
    }
    let shared = sandboxes::shared_dir(core, &sandbox.id);
    let target = shared.join("ctr").join(id.as_str());
    core.driver.unmount_root(&id, &target.join("rootfs")).await?;
    core.images.used(&container.record().image_id).await?;
    core.driver.remove_root(&id).await?;
    let (cgroups, of, record) = (core.cgroups.clone(), sandbox.id.clone(), container.record());
    blocking("removing a container", move || {
        cgroups.remove(&of, &record.id)?;
        remove_files(&shared, &record)
    })
    .await?;
    core.remove_container(container).await?;
    core.say(id.as_str(), sandbox, v1::ContainerEventType::ContainerDeletedEvent);
    Ok(())
}

/// A container's mounts and files below the pod's directory, and its log.
fn remove_files(shared: &Path, record: &ContainerRecord) -> Result<()> {
    let id = record.id.as_str();
    let gone = |path: &Path, done: std::io::Result<()>| match done {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("cannot remove {}", path.display()), e))
        }
        _ => Ok(()),
    };
    let mounted = shared.join("mnt").join(id);
    mounts::unmount_all_below(&mounted)?;
    // Only mount points of ours are in there; the directories belong to the host.
    gone(&mounted, fs::remove_dir_all(&mounted))?;
    let target = shared.join("ctr").join(id);
    gone(&target, fs::remove_dir_all(&target))?;
    let message = shared.join("term").join(id);
    gone(&message, fs::remove_file(&message))?;
    // The CT's root writes in the directory of the records: no link of it is followed.
    if let Ok(state) = beneath::open_dir(&shared.join("state")) {
        let _ = rustix::fs::unlinkat(&state, format!("{id}.json"), AtFlags::empty());
    }
    remove_log(record)
}

/// Removes the log with what was rotated away of it, and its directory if nothing else is in it.
fn remove_log(record: &ContainerRecord) -> Result<()> {
    let Some(file) = &record.log_file else { return Ok(()) };
    let (Some(dir), Some(name)) = (file.parent(), file.file_name().and_then(|n| n.to_str())) else {
        return Ok(());
    };
    let failed = |e: std::io::Error| Error::io(format!("cannot remove the log {}", file.display()), e);
    let Some(base) = dir.parent() else { return Ok(()) };
    let below = dir.components().next_back().filter(|c| matches!(c, Component::Normal(_)));
    let Some(below) = below.map(|c| c.as_os_str().to_owned()) else { return Ok(()) };
    let base = match beneath::open_dir(base) {
        Ok(base) => base,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(e)),
    };
    let Ok(opened) = beneath::open_dir_below(&base, Path::new(&below)) else { return Ok(()) };
    for entry in rustix::fs::Dir::read_from(&opened).map_err(|e| failed(e.into()))? {
        let entry = entry.map_err(|e| failed(e.into()))?;
        let found = entry.file_name().to_string_lossy();
        if found == name || found.strip_prefix(name).is_some_and(|rest| rest.starts_with('.')) {
            let _ = rustix::fs::unlinkat(&opened, entry.file_name(), AtFlags::empty());
        }
    }
    let _ = rustix::fs::unlinkat(&base, &below, AtFlags::REMOVEDIR);
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::net::UnixListener;

    use moxlet_ids::SandboxId;
    use moxlet_init_proto::client::Client;
    use moxlet_sandbox::fake::FakeEngine;

    use super::*;
    use crate::{fake, ledger::SandboxRecord};

    #[tokio::test]
    async fn a_container_of_a_ct_that_somebody_holds_is_neither_stopped_nor_removed() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(FakeEngine::default());
        let core = fake::core(dir.path(), engine.clone()).await;
        let socket = dir.path().join("init.sock");
        let init = UnixListener::bind(&socket).unwrap();
        init.set_nonblocking(true).unwrap();
        let sandbox = Sandbox::new(SandboxRecord::new(SandboxId::random(), "uid-1".parse().unwrap(), 1));
        sandbox.set_client(Some(Client::new(&socket)));
        core.insert_sandbox(sandbox.clone());
        let image = format!("sha256:{}", "0".repeat(64)).parse().unwrap();
        let record = ContainerRecord::new(ContainerId::random(), sandbox.id.clone(), image, 1);
        let container = Container::new(record);
        core.insert_container(container.clone());
        engine.hold(&sandbox.id, Some("backup"));
        let id = container.id.as_str();
        for state in [RunState::Created, RunState::Running { started_at_ns: 1 }] {
            container.state.send_replace(state);
            let error = remove(&core, id).await.unwrap_err();
            assert!(matches!(&error, Error::Held { by, .. } if by == "backup"), "{error}");
        }
        let error = stop(&core, id, 30).await.unwrap_err();
        assert!(error.to_string().contains("backup"), "{error}");
        assert_eq!(init.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "no signal was sent");
        assert!(core.container(id).is_ok());
        container.state.send_replace(RunState::Created);
        engine.hold(&sandbox.id, None);
        sandbox.set_client(None);
        remove(&core, id).await.unwrap();
        assert!(core.container(id).is_err());
    }
}
