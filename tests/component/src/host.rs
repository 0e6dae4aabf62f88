//! An agent in this process with everything real below it, and a CRI client on its socket.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicU8, Ordering},
    },
};

use hyper_util::rt::TokioIo;
use moxlet_agent::{Agent, CniSettings, Config};
use moxlet_cri::{
    host::{self, host_service_client::HostServiceClient},
    v1::{self, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Status,
    transport::{Channel, Endpoint, Uri},
};

use crate::{
    forwarding::Forwarding,
    init_binary, pve, registry, repository,
    store::{self, Bed},
    traces,
    wait::{slowness, until},
};

/// A sandbox that was made.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its id.
    pub id: String,
    /// What it was made from.
    pub config: v1::PodSandboxConfig,
}

/// A host of its own for one test: directory, bridge, range of addresses, agent.
pub struct Host {
    /// How its agent is set up.
    pub config: Config,
    agent: Option<(Agent, CancellationToken)>,
    channel: Channel,
    /// All sandboxes that were ever made here.
    made: Mutex<BTreeSet<String>>,
    dir: Option<tempfile::TempDir>,
    bed: Bed,
    _forwarding: Forwarding,
}

/// The clients' channel to a socket; it connects when it is first used.
fn channel(socket: PathBuf) -> Channel {
    let connect = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://agent.invalid").connect_with_connector_lazy(connect)
}

impl Host {
    /// An agent with an empty directory of its own; busybox is pulled.
    pub async fn start() -> Self {
        Self::start_on(Bed::chosen(), |_| ()).await
    }

    /// The same with its store on this, and with settings that are changed.
    pub async fn start_on(bed: Bed, change: impl FnOnce(&mut Config)) -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        assert!(rustix::process::geteuid().is_root(), "component tests run as root");
        let forwarding = Forwarding::keep();
        let dir = tempfile::Builder::new().prefix("moxlet-agent-").tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let storage = bed.make(&root, number);
        fs::set_permissions(&root, fs::Permissions::from_mode(0o711)).unwrap();
        let (init, registry) =
            tokio::task::spawn_blocking(|| (init_binary(), registry::address())).await.unwrap();
        let bridge = format!("mxt{}n{number}", std::process::id());
        let mut config = Config {
            storage,
            cri_socket: root.join("run/agent.sock"),
            root_dir: root,
            init_binary: Some(init.to_owned()),
            pod_cidr: Some(format!("10.248.{number}.0/24")),
            cni: CniSettings { bridge, ..CniSettings::default() },
            plain_http_registries: vec![registry.to_owned()],
            engine: pve::engine(number),
            ..Config::default()
        };
        change(&mut config);
        let (channel, made) = (channel(config.cri_socket.clone()), Mutex::default());
        let mut host =
            Self { config, agent: None, channel, made, dir: Some(dir), bed, _forwarding: forwarding };
        host.start_agent().await;
        let image = v1::ImageSpec { image: registry::busybox(), ..v1::ImageSpec::default() };
        let request = v1::PullImageRequest { image: Some(image), ..v1::PullImageRequest::default() };
        host.images().pull_image(request).await.unwrap();
        host
    }

    /// Starts the agent (again).
    pub async fn start_agent(&mut self) {
        let stop = CancellationToken::new();
        let agent = Agent::start(self.config.clone(), stop.clone()).await.unwrap();
        self.agent = Some((agent, stop));
        self.channel = channel(self.config.cri_socket.clone());
    }

    /// Ends the agent as SIGTERM does; pods stay.
    pub async fn stop_agent(&mut self) {
        let (agent, stop) = self.agent.take().unwrap();
        stop.cancel();
        agent.join().await;
    }

    /// Where the agent's files are.
    pub fn root(&self) -> &Path {
        &self.config.root_dir
    }

    /// CRI's RuntimeService.
    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// CRI's ImageService.
    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }

    /// `moxlet.host.v1`.
    pub fn service(&self) -> HostServiceClient<Channel> {
        HostServiceClient::new(self.channel.clone())
    }

    /// What a node asks for a pod of this name.
    pub fn pod_config(&self, name: &str) -> v1::PodSandboxConfig {
        let uid = format!("uid-{name}");
        v1::PodSandboxConfig {
            log_directory: self.root().join(format!("logs/default_{name}_{uid}")).display().to_string(),
            metadata: Some(v1::PodSandboxMetadata {
                name: name.into(),
                uid,
                namespace: "default".into(),
                attempt: 0,
            }),
            hostname: name.into(),
            linux: Some(v1::LinuxPodSandboxConfig::default()),
            ..v1::PodSandboxConfig::default()
        }
    }

    /// `RunPodSandbox`.
    pub async fn try_pod(&self, config: v1::PodSandboxConfig) -> Result<Pod, Status> {
        let request =
            v1::RunPodSandboxRequest { config: Some(config.clone()), ..v1::RunPodSandboxRequest::default() };
        let id = self.runtime().run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
        self.made.lock().unwrap().insert(id.clone());
        Ok(Pod { id, config })
    }

    /// A running sandbox.
    pub async fn pod(&self, name: &str) -> Pod {
        self.try_pod(self.pod_config(name)).await.unwrap()
    }

    /// `PodSandboxStatus`.
    pub async fn pod_status(&self, id: &str) -> Result<v1::PodSandboxStatus, Status> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: false };
        Ok(self.runtime().pod_sandbox_status(request).await?.into_inner().status.unwrap())
    }

    /// `StopPodSandbox`.
    pub async fn stop_pod(&self, id: &str) -> Result<(), Status> {
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: id.into() };
        self.runtime().stop_pod_sandbox(request).await.map(drop)
    }

    /// `RemovePodSandbox`.
    pub async fn remove_pod(&self, id: &str) -> Result<(), Status> {
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: id.into() };
        self.runtime().remove_pod_sandbox(request).await.map(drop)
    }

    /// `CreateContainer`.
    pub async fn create(&self, pod: &Pod, config: v1::ContainerConfig) -> Result<String, Status> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        Ok(self.runtime().create_container(request).await?.into_inner().container_id)
    }

    /// `StartContainer`.
    pub async fn start_container(&self, id: &str) -> Result<(), Status> {
        self.runtime().start_container(v1::StartContainerRequest { container_id: id.into() }).await.map(drop)
    }

    /// A started container.
    pub async fn run(&self, pod: &Pod, config: v1::ContainerConfig) -> String {
        let id = self.create(pod, config).await.unwrap();
        self.start_container(&id).await.unwrap();
        id
    }

    /// `StopContainer`.
    pub async fn stop_container(&self, id: &str, seconds: i64) -> Result<(), Status> {
        let request = v1::StopContainerRequest { container_id: id.into(), timeout: seconds };
        self.runtime().stop_container(request).await.map(drop)
    }

    /// `RemoveContainer`.
    pub async fn remove_container(&self, id: &str) -> Result<(), Status> {
        self.runtime()
            .remove_container(v1::RemoveContainerRequest { container_id: id.into() })
            .await
            .map(drop)
    }

    /// `ContainerStatus`.
    pub async fn status(&self, id: &str) -> Result<v1::ContainerStatus, Status> {
        let request = v1::ContainerStatusRequest { container_id: id.into(), verbose: false };
        Ok(self.runtime().container_status(request).await?.into_inner().status.unwrap())
    }

    /// The status of a container once it has ended.
    pub async fn exited(&self, id: &str) -> v1::ContainerStatus {
        until("a container's end", async || {
            let status = self.status(id).await.map_err(|e| e.to_string())?;
            let ended = status.state() == v1::ContainerState::ContainerExited;
            if ended { Ok(status) } else { Err(format!("{:?}", status.state())) }
        })
        .await
    }

    /// `ExecSync`: exit code, stdout, stderr.
    pub async fn exec(&self, id: &str, command: &[&str]) -> Result<(i32, String, String), Status> {
        let cmd = command.iter().map(|c| (*c).to_owned()).collect();
        let timeout = 20 * i64::from(slowness());
        let request = v1::ExecSyncRequest { container_id: id.into(), cmd, timeout };
        let answer = self.runtime().exec_sync(request).await?.into_inner();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ok((answer.exit_code, text(answer.stdout), text(answer.stderr)))
    }

    /// What a line of shell prints in a container, without the last newline; it has to succeed.
    pub async fn sh(&self, id: &str, script: &str) -> String {
        let (code, out, err) = self.exec(id, &["sh", "-c", script]).await.unwrap();
        assert_eq!(code, 0, "{script}: {out}{err}");
        out.trim_end().to_owned()
    }

    /// `StreamLogs` to its end.
    pub async fn logs(&self, request: host::StreamLogsRequest) -> Result<String, Status> {
        let mut stream = self.service().stream_logs(request).await?.into_inner();
        let mut all = Vec::new();
        while let Some(chunk) = stream.message().await? {
            all.extend(chunk.data);
        }
        Ok(String::from_utf8(all).unwrap())
    }

    /// A container's log as it is now.
    pub async fn log(&self, id: &str) -> String {
        self.logs(host::StreamLogsRequest { container_id: id.into(), ..Default::default() }).await.unwrap()
    }

    /// `ApplyVolume` for a pod; the volume's path on the host.
    pub async fn volume(
        &self,
        pod: &v1::PodSandboxConfig,
        request: host::ApplyVolumeRequest,
    ) -> Result<String, Status> {
        let pod_uid = pod.metadata.as_ref().unwrap().uid.clone();
        let request = host::ApplyVolumeRequest { pod_uid, ..request };
        Ok(self.service().apply_volume(request).await?.into_inner().host_path)
    }

    /// What is left of all sandboxes.
    pub fn traces(&self) -> Vec<String> {
        let mut left = traces::of(self.root(), &self.config.cni.bridge, &self.made.lock().unwrap());
        left.extend(pve::traces(&self.config));
        left.extend(store::traces(&self.config));
        left
    }

    /// Waits until nothing is left of any sandbox; the kernel takes its time with an interface.
    pub async fn nothing_is_left(&self) {
        until("nothing to be left", async || match self.traces() {
            left if left.is_empty() => Ok(()),
            left => Err(left.join("\n")),
        })
        .await;
    }

    /// Removes all pods with their volumes; nothing may be left. Then the agent ends and its directory goes.
    pub async fn end(mut self) {
        let all =
            self.runtime().list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap().into_inner();
        for item in all.items {
            self.remove_pod(&item.id).await.unwrap();
        }
        for pod_uid in self.service().list_pods(host::ListPodsRequest {}).await.unwrap().into_inner().pod_uids
        {
            self.service().remove_pod_volumes(host::RemovePodVolumesRequest { pod_uid }).await.unwrap();
        }
        self.nothing_is_left().await;
        self.stop_agent().await;
        assert_eq!(store::mounts(&self.config), Vec::<PathBuf>::new(), "the agent has closed its store");
    }
}

impl Drop for Host {
    /// By force: a test that failed has not removed its pods.
    fn drop(&mut self) {
        if let Some((_, stop)) = self.agent.take() {
            stop.cancel();
        }
        let script = r#". "$1/scripts/lib/common.sh"; . "$1/scripts/lib/clean.sh"; clean "$2" "$3" 2>/dev/null
            nft delete table ip "moxlet_$3" 2>/dev/null || true; rm -rf "/run/lxc/lock$2"
            [ ! -d /run/lxc/lock ] || { cd /run/lxc/lock && rmdir -p --ignore-fail-on-non-empty ".${2%/*}" 2>/dev/null || true; }"#;
        let shell = Command::new("bash")
            .args(["-c", script, "clean"])
            .arg(repository())
            .arg(self.root())
            .arg(&self.config.cni.bridge)
            .status();
        if !shell.is_ok_and(|s| s.success()) {
            eprintln!("{} is not wholly removed", self.root().display());
        }
        self.bed.unmake(&self.config);
        drop(self.dir.take());
    }
}

/// A container of busybox that runs a line of shell.
#[must_use]
pub fn container(name: &str, script: &str) -> v1::ContainerConfig {
    let profile = v1::SecurityProfile {
        profile_type: v1::security_profile::ProfileType::RuntimeDefault as i32,
        ..v1::SecurityProfile::default()
    };
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(v1::ImageSpec { image: registry::busybox(), ..v1::ImageSpec::default() }),
        command: ["sh", "-c", script].map(Into::into).to_vec(),
        log_path: format!("{name}/0.log"),
        linux: Some(v1::LinuxContainerConfig {
            security_context: Some(v1::LinuxContainerSecurityContext {
                seccomp: Some(profile),
                // As a kubelet says it: a PID namespace of its own, the others the pod's.
                namespace_options: Some(v1::NamespaceOption {
                    pid: v1::NamespaceMode::Container as i32,
                    ..v1::NamespaceOption::default()
                }),
                ..v1::LinuxContainerSecurityContext::default()
            }),
            ..v1::LinuxContainerConfig::default()
        }),
        ..v1::ContainerConfig::default()
    }
}

/// As [`container`], asleep until it is killed.
#[must_use]
pub fn sleeper(name: &str) -> v1::ContainerConfig {
    container(name, "exec sleep 1000")
}

/// A mount of a volume.
#[must_use]
pub fn mounted(host_path: &str, container_path: &str) -> v1::Mount {
    v1::Mount { host_path: host_path.into(), container_path: container_path.into(), ..v1::Mount::default() }
}
