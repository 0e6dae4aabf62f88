//! `RunPodSandbox`: a CT with its network whose init answers.

use std::{
    fs,
    os::unix::fs::{DirBuilderExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use moxlet_cri::{annotations::GRACE_PERIOD, v1};
use moxlet_errors::chain;
use moxlet_ids::SandboxId;
use moxlet_init_proto::client::Client;
use moxlet_network::resolver;
use moxlet_sandbox::SandboxSpec;
use moxlet_storage::{IdMap, idmap, mounts};
use rustix::mount::{MountFlags, mount};
use tracing::{info, warn};

use super::{Pods, STOP_GRACE};
use crate::{
    clock::now_ns,
    error::{Error, Result},
    ledger::{SandboxPhase, SandboxRecord},
    limits,
    retries::Work,
    state::Sandbox,
    tasks::blocking,
};

/// How long a CT may take until its init answers.
const INIT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a pod's containers may take to end when their host goes down and nobody said.
const HOST_DOWN_GRACE: Duration = Duration::from_secs(30);
/// `/dev/shm` of a pod, as container runtimes size it.
const SHM: &std::ffi::CStr = c"size=65536k,mode=1777";

impl Pods {
    /// `RunPodSandbox`.
    pub(crate) async fn run(
        self: &Arc<Self>,
        config: v1::PodSandboxConfig,
        handler: &str,
    ) -> Result<SandboxId> {
        if !matches!(handler, "" | "moxlet") {
            return Err(Error::Invalid(format!(
                "no runtime for {handler:?} is configured (RuntimeClass handler)"
            )));
        }
        let share_pids = check(&config, self.settings.map)?;
        let record = record(&config, share_pids)?;
        if let Some(why) = self.engine.fault() {
            return Err(Error::Unfit(format!("no new pod can run on this host now: {why}")));
        }
        let sandbox = Sandbox::new(record);
        self.state.add_sandbox(sandbox.clone())?;
        let own = self.clone();
        self.tasks
        .whole(async move {
            let _guard = sandbox.change.lock().await;
            match own.make(&sandbox, &config).await {
                Ok(()) => Ok(sandbox.id.clone()),
                Err(error) => {
                    if let Err(second) = own.remove_parts(&sandbox).await {
                        warn!(sandbox = %sandbox.id, error = chain(&second), "a failed sandbox is not wholly removed; it is tried again");
                        own.retries.add(Work::Remove(sandbox.id.clone()));
                    }
                    Err(error)
                }
            }
        })
        .await
    }

    async fn make(self: &Arc<Self>, sandbox: &Arc<Sandbox>, config: &v1::PodSandboxConfig) -> Result<()> {
        self.state.change_sandbox(sandbox, |_| {}).await?;
        let record = sandbox.record();
        let (dir, map) = (self.dirs.pod(&sandbox.id), self.settings.map);
        let (logs, host, resolv) =
            (record.log_directory.clone(), record.hostname.clone(), self.resolv_conf(config));
        let (shared, own) = (dir.clone(), self.clone());
        blocking(move || own.make_shared(&shared, logs.as_deref(), &host, &resolv)).await?;
        // Where the host stops CTs by itself when it goes down, their containers get their time.
        let stop_grace = host_down_grace(&record)?;
        let by_signal = if self.settings.host_stops_cts { stop_grace } else { STOP_GRACE };
        let linux = config.linux.as_ref();
        let spec = SandboxSpec {
            id: sandbox.id.clone(),
            pod_namespace: record.namespace.clone(),
            pod_name: record.name.clone(),
            pod_uid: record.uid.clone(),
            attempt: record.attempt,
            hostname: record.hostname.clone(),
            map,
            shared_dir: dir.clone(),
            init_binary: self.settings.init_binary.clone(),
            init_args: vec!["--grace".into(), by_signal.as_secs().to_string()],
            limits: limits::of_sandbox(
                linux.and_then(|l| l.resources.as_ref()),
                linux.and_then(|l| l.overhead.as_ref()),
            ),
            sysctls: config.linux.iter().flat_map(|l| l.sysctls.clone()).collect(),
            stop_grace,
            nics: self.network.nics(&record).await?,
        };
        self.engine.create(&spec).await?;
        if self.tasks.stop.is_cancelled() {
            // A host that goes down starts nothing more; the next start of the agent removes what is half made.
            return Err(Error::Unfit("the agent is stopping".into()));
        }
        let pid = self.engine.start(&sandbox.id).await?;
        let socket = self.dirs.init_socket(&sandbox.id);
        let (ips, client) = tokio::join!(
            self.network.attach(&*self.engine, &record, pid),
            Client::connect(&socket, INIT_TIMEOUT)
        );
        let (ips, client) = (ips?, client?);
        self.state
            .change_sandbox(sandbox, |r| {
                r.ips = ips;
                r.phase = SandboxPhase::Ready;
            })
            .await?;
        sandbox.set_client(Some(client));
        self.watch(sandbox);
        info!(sandbox = %sandbox.id, pod = format!("{}/{}", record.namespace, record.name), pid, "sandbox runs");
        self.events.send(sandbox.id.as_str(), sandbox, v1::ContainerEventType::ContainerStartedEvent);
        Ok(())
    }

    /// What a pod's resolv.conf says.
    fn resolv_conf(&self, config: &v1::PodSandboxConfig) -> String {
        match &config.dns_config {
            Some(dns) => moxlet_network::files::resolv_conf(&dns.servers, &dns.searches, &dns.options),
            None => resolver::of_host(self.settings.resolv_conf.as_deref()).text,
        }
    }

    /// Makes the shared directory.
    fn make_shared(&self, dir: &Path, logs: Option<&Path>, hostname: &str, resolv: &str) -> Result<()> {
        let base = self.settings.map.host_base;
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
            mount(
                "shm",
                &shm,
                "tmpfs",
                MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
                Some(SHM),
            )
            .map_err(|e| Error::io(format!("cannot mount a tmpfs at {}", shm.display()), e))?;
            chown(&shm, Some(base), Some(base)).map_err(|e| Error::io("cannot own /dev/shm", e))?;
        }
        if let Some(logs) = logs {
            bind_logs(&self.shifted, logs, &dir.join("logs"))?;
        }
        Ok(())
    }
}

/// Refuses by name what a CT cannot be.
fn check(config: &v1::PodSandboxConfig, map: IdMap) -> Result<bool> {
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
    if !linux.cgroup_parent.is_empty() {
        return Err(Error::Refused(format!(
            "cgroup_parent {:?}: a CT has a cgroup of its own (a kubelet with cgroupsPerQOS: false names none)",
            linux.cgroup_parent
        )));
    }
    check_user_namespace(names.userns_options.as_ref(), map)?;
    if config.port_mappings.iter().any(|p| p.host_port != 0) {
        return Err(Error::Refused("hostPort".to_owned()));
    }
    Ok(names.pid == v1::NamespaceMode::Pod as i32)
}

/// A pod has the user namespace of its CT in any case; one with other ids cannot be had.
fn check_user_namespace(options: Option<&v1::UserNamespace>, map: IdMap) -> Result<()> {
    let Some(options) = options else { return Ok(()) };
    let ours =
        |ids: &v1::IdMapping| (ids.container_id, ids.host_id, ids.length) == (0, map.host_base, map.size);
    match options.uids.iter().chain(&options.gids).find(|ids| !ours(ids)) {
        None => Ok(()),
        Some(ids) => Err(Error::Refused(format!(
            "userns_options {} to {} for {} ids: a CT's ids are {} to {}",
            ids.container_id, ids.host_id, ids.length, map.host_base, map.size
        ))),
    }
}

/// Shows a CT its pod's log directory. What is written there lies on disk as its root's, so no user of the host may reach it, nothing runs
/// from it and no device of it opens.
fn bind_logs(shifted: &idmap::Namespace, logs: &Path, at: &Path) -> Result<()> {
    fs::create_dir_all(logs)
        .and_then(|()| fs::set_permissions(logs, fs::Permissions::from_mode(0o700)))
        .map_err(|e| Error::io(format!("cannot make {}", logs.display()), e))?;
    Ok(shifted.bind(logs, at, idmap::BindOptions::data())?)
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_a_ct_cannot_have_is_refused_by_its_name_in_cri() {
        let map = IdMap::default();
        let refused = |linux: v1::LinuxPodSandboxConfig| {
            let config = v1::PodSandboxConfig { linux: Some(linux), ..Default::default() };
            check(&config, map).err().map(|e| e.to_string())
        };
        let parent = v1::LinuxPodSandboxConfig { cgroup_parent: "/kubepods".into(), ..Default::default() };
        assert!(refused(parent).unwrap().contains("cgroup_parent \"/kubepods\""));
        let ids = |host_id| {
            let uids = vec![v1::IdMapping { host_id, container_id: 0, length: map.size }];
            let userns = v1::UserNamespace { uids, ..Default::default() };
            let names = v1::NamespaceOption { userns_options: Some(userns), ..Default::default() };
            let security_context =
                v1::LinuxSandboxSecurityContext { namespace_options: Some(names), ..Default::default() };
            v1::LinuxPodSandboxConfig { security_context: Some(security_context), ..Default::default() }
        };
        assert!(refused(ids(200_000)).unwrap().contains("userns_options"));
        assert_eq!(refused(ids(map.host_base)), None);
        assert_eq!(refused(v1::LinuxPodSandboxConfig::default()), None);
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
