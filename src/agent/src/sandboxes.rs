//! Pod sandboxes: a CT, its network, the directory that host and CT share.
//!
//! ```text
//! <root_dir>/pods/<sandbox>/      in the CT: /run/moxlet/pod
//!   run/init.sock  state/         the init's socket and exit records (the CT's root writes)
//!   etc/  shm/                    resolv.conf and hostname; /dev/shm of all containers
//!   logs/                         the pod's log directory, bound with the CT's ids
//!   ctr/<container>/rootfs        a container's root
//!   mnt/<container>/<n>           what is mounted in it
//! ```
//! Every step may be repeated; a sandbox that was not completed is removed by the same steps as one that is not wanted.

use std::{
    fs,
    os::unix::fs::{DirBuilderExt, chown},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use moxlet_cri::{annotations::GRACE_PERIOD, v1};
use moxlet_ids::SandboxId;
use moxlet_init_proto::client::Client;
use moxlet_sandbox::{Limits, SandboxSpec, SandboxState};
use moxlet_storage::mounts;
use rustix::mount::{MountFlags, mount};
use tracing::{info, warn};

use crate::{
    again,
    config::EngineSettings,
    containers,
    core::{Core, Sandbox, blocking, now_ns},
    error::{Error, Result, chain},
    ledger::{Phase, SandboxRecord},
    watch,
};

/// How long a CT may take until its init answers.
const INIT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a CT's init may take to end its containers when the sandbox is stopped.
const STOP_GRACE: Duration = Duration::from_secs(3);
/// How long a pod's containers may take to end when their host goes down and nobody said.
const HOST_DOWN_GRACE: Duration = Duration::from_secs(30);
/// `/dev/shm` of a pod, as container runtimes size it.
const SHM: &std::ffi::CStr = c"size=65536k,mode=1777";

/// Where a pod's shared directory is on the host.
pub(crate) fn shared_dir(core: &Core, id: &SandboxId) -> PathBuf {
    core.pods_dir.join(id.as_str())
}

/// Refuses by name what a CT cannot be.
fn check(config: &v1::PodSandboxConfig) -> Result<bool> {
    let linux = config.linux.clone().unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    let refuse = |what: &str| Err(Error::Refused(format!("{what} (a pod is an unprivileged container)")));
    if security.privileged {
        return refuse("a privileged pod sandbox");
    }
    let names = security.namespace_options.unwrap_or_default();
    for (mode, what) in [(names.network, "hostNetwork"), (names.pid, "hostPID"), (names.ipc, "hostIPC")] {
        if mode == v1::NamespaceMode::Node as i32 {
            return refuse(what);
        }
    }
    if config.port_mappings.iter().any(|p| p.host_port != 0) {
        return Err(Error::Refused("hostPort".to_owned()));
    }
    Ok(names.pid == v1::NamespaceMode::Pod as i32)
}

/// The CT's limits: those that the node sums up, with the overhead.
fn limits(config: &v1::PodSandboxConfig) -> Limits {
    let linux = config.linux.clone().unwrap_or_default();
    let mut limits = linux.resources.as_ref().map(containers::limits).unwrap_or_default();
    let extra = linux.overhead.as_ref().map(containers::limits).unwrap_or_default();
    limits.memory_bytes = limits.memory_bytes.map(|m| m.saturating_add(extra.memory_bytes.unwrap_or(0)));
    limits
}

fn make_dir(path: &Path, mode: u32, owner: Option<u32>) -> Result<()> {
    let made = match fs::DirBuilder::new().mode(mode).create(path) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    };
    made.and_then(|()| owner.map_or(Ok(()), |o| chown(path, Some(o), Some(o))))
        .map_err(|e| Error::io(format!("cannot make {}", path.display()), e))
}

fn put_file(path: &Path, text: &str, owner: u32) -> Result<()> {
    fs::write(path, text)
        .and_then(|()| chown(path, Some(owner), Some(owner)))
        .map_err(|e| Error::io(format!("cannot write {}", path.display()), e))
}

/// How long a pod's containers may take to end when their host goes down.
fn host_down_grace(record: &SandboxRecord) -> Result<Duration> {
    let Some(text) = record.annotations.get(GRACE_PERIOD) else { return Ok(HOST_DOWN_GRACE) };
    let seconds = text.parse::<u32>();
    seconds
        .map(|s| Duration::from_secs(s.into()))
        .map_err(|_| Error::Invalid(format!("annotation {GRACE_PERIOD} {text:?} is no number of seconds")))
}

/// What a pod's resolv.conf says.
fn resolv_conf(config: &v1::PodSandboxConfig) -> String {
    match &config.dns_config {
        Some(dns) => moxlet_network::files::resolv_conf(&dns.servers, &dns.searches, &dns.options),
        None => fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
    }
}

/// Makes the shared directory.
fn make_shared(core: &Core, dir: &Path, logs: Option<&Path>, hostname: &str, resolv: &str) -> Result<()> {
    let base = core.config.map.host_base;
    make_dir(dir, 0o711, None)?;
    for (name, mode, owner) in [
        ("run", 0o700, Some(base)),
        ("state", 0o700, Some(base)),
        ("ctr", 0o711, None),
        ("mnt", 0o711, None),
        ("etc", 0o755, None),
        ("shm", 0o1777, None),
        ("logs", 0o755, None),
    ] {
        make_dir(&dir.join(name), mode, owner)?;
    }
    put_file(&dir.join("etc/hostname"), &format!("{hostname}\n"), base)?;
    put_file(&dir.join("etc/resolv.conf"), resolv, base)?;
    let shm = dir.join("shm");
    if !mounts::is_mounted(&shm)? {
        mount("shm", &shm, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, Some(SHM))
            .map_err(|e| Error::io(format!("cannot mount a tmpfs at {}", shm.display()), e))?;
        chown(&shm, Some(base), Some(base)).map_err(|e| Error::io("cannot own /dev/shm", e))?;
    }
    if let Some(logs) = logs {
        fs::create_dir_all(logs).map_err(|e| Error::io(format!("cannot make {}", logs.display()), e))?;
        core.shifted.bind(logs, &dir.join("logs"), false, false)?;
    }
    Ok(())
}

/// The request's host name; without one the pod's name as a kubelet cuts it, or the sandbox' id where that is no host name.
fn hostname(asked: &str, record: &SandboxRecord) -> String {
    if !asked.is_empty() {
        return asked.to_owned();
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    let cut: String = record.name.chars().take(63).collect();
    let name = cut.trim_end_matches(['-', '.']);
    if name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(plain) {
        name.to_owned()
    } else {
        record.id.to_string()
    }
}

fn record(config: &v1::PodSandboxConfig, share_pids: bool) -> Result<SandboxRecord> {
    let meta = config.metadata.clone().ok_or_else(|| Error::Invalid("the sandbox has no metadata".into()))?;
    let mut record = SandboxRecord::new(SandboxId::random(), meta.uid.parse()?, now_ns());
    record.namespace = meta.namespace;
    record.name = meta.name;
    record.attempt = meta.attempt;
    record.hostname = hostname(&config.hostname, &record);
    if !config.log_directory.is_empty() {
        let dir = PathBuf::from(&config.log_directory);
        if !dir.is_absolute() || dir.components().any(|c| c == std::path::Component::ParentDir) {
            return Err(Error::Invalid(format!(
                "log_directory {:?} is no absolute path",
                config.log_directory
            )));
        }
        record.log_directory = Some(dir);
    }
    record.labels = config.labels.clone().into_iter().collect();
    record.annotations = config.annotations.clone().into_iter().collect();
    record.share_pids = share_pids;
    Ok(record)
}

/// `RunPodSandbox`.
pub(crate) async fn run(core: &Arc<Core>, config: v1::PodSandboxConfig, handler: &str) -> Result<SandboxId> {
    if !matches!(handler, "" | "moxlet") {
        return Err(Error::Invalid(format!(
            "no runtime for {handler:?} is configured (RuntimeClass handler)"
        )));
    }
    let share_pids = check(&config)?;
    let record = record(&config, share_pids)?;
    if let Some(why) = core.engine.fault() {
        return Err(Error::Unfit(format!("no new pod can run on this host now: {why}")));
    }
    let sandbox = Sandbox::new(record);
    core.add_sandbox(sandbox.clone())?;
    let core = core.clone();
    core.clone()
        .whole(async move {
            let _guard = sandbox.change.lock().await;
            match make(&core, &sandbox, &config).await {
                Ok(()) => Ok(sandbox.id.clone()),
                Err(error) => {
                    if let Err(second) = remove_parts(&core, &sandbox).await {
                        warn!(sandbox = %sandbox.id, error = chain(&second), "a failed sandbox is not wholly removed; it is tried again");
                        again::sandbox(&core, &sandbox);
                    }
                    Err(error)
                }
            }
        })
        .await
}

async fn make(core: &Arc<Core>, sandbox: &Arc<Sandbox>, config: &v1::PodSandboxConfig) -> Result<()> {
    core.change_sandbox(sandbox, |_| {}).await?;
    let record = sandbox.record();
    let (dir, map) = (shared_dir(core, &sandbox.id), core.config.map);
    let (logs, host, resolv) = (record.log_directory.clone(), record.hostname.clone(), resolv_conf(config));
    let (shared, own) = (dir.clone(), core.clone());
    blocking("making a pod's directory", move || make_shared(&own, &shared, logs.as_deref(), &host, &resolv))
        .await?;
    // Where the host stops CTs by itself when it goes down, their containers get their time.
    let stop_grace = host_down_grace(&record)?;
    let by_signal =
        if matches!(core.config.engine, EngineSettings::Pve(_)) { stop_grace } else { STOP_GRACE };
    let spec = SandboxSpec {
        id: sandbox.id.clone(),
        pod_namespace: record.namespace.clone(),
        pod_name: record.name.clone(),
        pod_uid: record.uid.clone(),
        attempt: record.attempt,
        hostname: record.hostname.clone(),
        map,
        shared_dir: dir.clone(),
        init_binary: core.init_binary.clone(),
        init_args: vec!["--grace".into(), by_signal.as_secs().to_string()],
        limits: limits(config),
        sysctls: config.linux.iter().flat_map(|l| l.sysctls.clone()).collect(),
        stop_grace,
        nics: core.network.nics(&record).await?,
    };
    core.engine.create(&spec).await?;
    if core.stop.is_cancelled() {
        // A host that goes down starts nothing more; the next start of the agent removes what is half made.
        return Err(Error::Unfit("the agent is stopping".into()));
    }
    let pid = core.engine.start(&sandbox.id).await?;
    let socket = dir.join("run/init.sock");
    let (ips, client) =
        tokio::join!(core.network.attach(core, &record, pid), Client::connect(&socket, INIT_TIMEOUT));
    let (ips, client) = (ips?, client?);
    core.change_sandbox(sandbox, |r| {
        r.ips = ips;
        r.phase = Phase::Ready;
    })
    .await?;
    sandbox.set_client(Some(client));
    watch::spawn(core, sandbox);
    info!(sandbox = %sandbox.id, pod = format!("{}/{}", record.namespace, record.name), pid, "sandbox runs");
    core.say(sandbox.id.as_str(), sandbox, v1::ContainerEventType::ContainerStartedEvent);
    Ok(())
}

/// `StopPodSandbox`. Of an unknown one: nothing, as CRI asks.
pub(crate) async fn stop(core: &Arc<Core>, id: &str) -> Result<()> {
    let Ok(sandbox) = core.sandbox(id) else { return Ok(()) };
    let core = core.clone();
    core.clone()
        .whole(async move {
            let _guard = to_end(&core, &sandbox).await?;
            stop_parts(&core, &sandbox).await
        })
        .await
}

/// Refuses a change of a CT, or of what is in it, that somebody else holds: a backup relies on its state.
pub(crate) async fn not_held(core: &Core, sandbox: &Sandbox) -> Result<()> {
    match core.engine.held_by(&sandbox.id).await? {
        Some(by) => Err(Error::Held { sandbox: sandbox.id.to_string(), by }),
        None => Ok(()),
    }
}

/// Takes a sandbox for its end: a change that waits for its init gives up soon.
async fn to_end<'a>(core: &Core, sandbox: &'a Arc<Sandbox>) -> Result<tokio::sync::MutexGuard<'a, ()>> {
    // What somebody holds goes on as it is.
    let _stopping = match core.engine.held_by(&sandbox.id).await? {
        None => Some(sandbox.stopping()),
        Some(_) => None,
    };
    Ok(sandbox.change.lock().await)
}

/// Stops a CT and releases its network; the caller holds the sandbox.
pub(crate) async fn stop_parts(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Result<()> {
    let running = matches!(core.engine.state(&sandbox.id).await?, Some(SandboxState::Running { .. }));
    if running {
        not_held(core, sandbox).await?;
        core.engine.ending(&sandbox.id).await;
        if let Ok(client) = sandbox.client() {
            // It kills its containers and writes how they ended; what goes wrong here the engine ends.
            let _ = tokio::time::timeout(STOP_GRACE, client.shutdown(Duration::ZERO)).await;
        }
        core.engine.stop(&sandbox.id, STOP_GRACE).await?;
    }
    ended(core, sandbox).await?;
    core.network.detach(&sandbox.id).await?;
    Ok(())
}

/// Notes that a CT does not run any more; the caller holds the sandbox.
pub(crate) async fn ended(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Result<()> {
    sandbox.set_client(None);
    for container in core.containers_of(&sandbox.id) {
        containers::lost(core, sandbox, &container).await?;
    }
    if sandbox.phase() == Phase::Ready {
        core.change_sandbox(sandbox, |r| r.phase = Phase::NotReady).await?;
        info!(sandbox = %sandbox.id, "sandbox has stopped");
        core.say(sandbox.id.as_str(), sandbox, v1::ContainerEventType::ContainerStoppedEvent);
    }
    Ok(())
}

/// `RemovePodSandbox`. Of an unknown one: nothing, as CRI asks.
pub(crate) async fn remove(core: &Arc<Core>, id: &str) -> Result<()> {
    let Ok(sandbox) = core.sandbox(id) else { return Ok(()) };
    let core = core.clone();
    core.clone()
        .whole(async move {
            let _guard = to_end(&core, &sandbox).await?;
            // Somebody else may have removed it meanwhile.
            if !core.knows(&sandbox.id) {
                return Ok(());
            }
            stop_parts(&core, &sandbox).await?;
            let removed = remove_parts(&core, &sandbox).await;
            if removed.is_err() {
                again::sandbox(&core, &sandbox);
            }
            removed
        })
        .await
}

/// Removes all of a sandbox, its containers first, its line in the ledger last. The caller holds it.
pub(crate) async fn remove_parts(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Result<()> {
    let id = &sandbox.id;
    core.change_sandbox(sandbox, |r| r.phase = Phase::Removing).await?;
    core.engine.delete(id).await?;
    ended(core, sandbox).await?;
    for container in core.containers_of(id) {
        containers::remove_parts(core, sandbox, &container).await?;
    }
    core.network.release(id).await?;
    remove_shared(core, id).await?;
    let (ledger, own) = (core.ledger.clone(), id.clone());
    blocking("writing the ledger", move || ledger.remove_sandbox(&own)).await?;
    core.say(id.as_str(), sandbox, v1::ContainerEventType::ContainerDeletedEvent);
    core.forget_sandbox(id);
    Ok(())
}

/// Removes a pod's shared directory with all that is mounted below it. Idempotent.
pub(crate) async fn remove_shared(core: &Core, id: &SandboxId) -> Result<()> {
    let dir = shared_dir(core, id);
    blocking("removing a pod's directory", move || {
        mounts::unmount_all_below(&dir)?;
        match fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("cannot remove {}", dir.display()), e))
            }
            _ => Ok(()),
        }
    })
    .await
}

/// Removes what is left of a sandbox that the ledger does not know. Idempotent.
pub(crate) async fn remove_stray(core: &Core, id: &SandboxId) -> Result<()> {
    core.engine.delete(id).await?;
    core.network.release(id).await?;
    remove_shared(core, id).await
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::net::UnixListener;

    use moxlet_ids::ContainerId;
    use moxlet_sandbox::{Engine, fake::FakeEngine};

    use super::*;
    use crate::{core::Container, fake, ledger::ContainerRecord};

    #[tokio::test(flavor = "multi_thread")]
    async fn a_sandbox_is_stopped_though_its_init_hangs_in_the_middle_of_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(FakeEngine::default());
        let core = fake::core(dir.path(), engine.clone()).await;
        let socket = dir.path().join("init.sock");
        // It takes connections and answers none.
        let init = UnixListener::bind(&socket).unwrap();
        let sandbox = Sandbox::new(SandboxRecord::new(SandboxId::random(), "uid-1".parse().unwrap(), 1));
        sandbox.set_client(Some(Client::new(&socket)));
        core.insert_sandbox(sandbox.clone());
        engine.create(&fake::spec(&sandbox.id)).await.unwrap();
        engine.start(&sandbox.id).await.unwrap();
        let changed = tokio::spawn({
            let sandbox = sandbox.clone();
            async move {
                let _guard = sandbox.change.lock().await;
                let client = sandbox.client().unwrap();
                sandbox.answer("start", Duration::from_secs(3600), client.start("a")).await
            }
        });
        let (_asked, _) = tokio::task::spawn_blocking(move || init.accept()).await.unwrap().unwrap();
        stop(&core, sandbox.id.as_str()).await.unwrap();
        assert_eq!(engine.state(&sandbox.id).await.unwrap(), Some(SandboxState::Stopped));
        assert!(matches!(
            changed.await.unwrap(),
            Err(moxlet_init_proto::Error::Timeout { request: "start", .. })
        ));
    }

    #[tokio::test]
    async fn a_container_whose_init_hangs_is_given_up_with_deadline_exceeded() {
        let dir = tempfile::tempdir().unwrap();
        let core = fake::core(dir.path(), Arc::default()).await;
        let socket = dir.path().join("init.sock");
        let _init = UnixListener::bind(&socket).unwrap();
        let sandbox = Sandbox::new(SandboxRecord::new(SandboxId::random(), "uid-1".parse().unwrap(), 1));
        sandbox.set_client(Some(Client::new(&socket)));
        core.insert_sandbox(sandbox.clone());
        let image = format!("sha256:{}", "0".repeat(64)).parse().unwrap();
        let record = ContainerRecord::new(ContainerId::random(), sandbox.id.clone(), image, 1);
        let container = Container::new(record);
        container.state.send_replace(crate::core::RunState::Running { started_at_ns: 1 });
        core.insert_container(container.clone());
        let error = containers::stop(&core, container.id.as_str(), 1).await.unwrap_err();
        assert_eq!(tonic::Status::from(error).code(), tonic::Code::DeadlineExceeded);
    }

    #[test]
    fn a_pods_grace_is_taken_from_its_sandbox_and_refused_by_name_where_it_is_none() {
        let mut record = SandboxRecord::new(SandboxId::random(), "u".parse().unwrap(), 0);
        assert_eq!(host_down_grace(&record).unwrap(), HOST_DOWN_GRACE);
        record.annotations.insert(GRACE_PERIOD.to_owned(), "600".to_owned());
        assert_eq!(host_down_grace(&record).unwrap(), Duration::from_secs(600));
        record.annotations.insert(GRACE_PERIOD.to_owned(), "-1".to_owned());
        assert!(host_down_grace(&record).unwrap_err().to_string().contains(GRACE_PERIOD));
    }
}
