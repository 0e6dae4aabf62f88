//! The CRI runtime whose pod sandboxes are CTs.
//!
//! | room | what it does |
//! |---|---|
//! | `core` | sandboxes and containers in memory, the parts below, the stream of events |
//! | `ledger` | what must survive: one small file for each sandbox and container |
//! | `again` | what could not be removed is tried again in the background |
//! | `recover` | at the start: ledger and host are brought in line |
//! | `sandboxes`, `containers`, `prepare`, `spec` | their lives, and what a container is made of |
//! | `engine`, `network` | which engine makes the CTs, and who attaches them |
//! | `notices` | what somebody else did to CTs on the host |
//! | `watch` | one task a running sandbox: what its init reports, and its end |
//! | `volumes`, `logs`, `stats`, `facts` | what a node asks of a host besides CRI |
//! | `service` | the gRPC services, on the unix socket and on a port for a node elsewhere |
//! | `streaming` | exec, attach and port-forward |
//! | `uninstall` | what Moxlet made on a host is taken from it |
//!
//! Tasks that live as long as the agent: the gRPC server, the streaming server's listeners, a watch for each running
//! sandbox, a retry for each that could not be removed, the look at what others do, and at an engine with a fault. All belong to one tracker and end by one token; [`Agent::join`] waits for them. Pods outlive all of it.

mod again;
mod beneath;
mod config;
mod containers;
mod core;
mod engine;
mod error;
mod facts;
#[cfg(test)]
mod fake;
mod init_binary;
mod ledger;
mod logs;
mod network;
mod notices;
mod prepare;
mod recover;
mod restarted;
mod sandboxes;
mod service;
mod spec;
mod stats;
mod status;
mod streaming;
mod uninstall;
mod volumes;
mod watch;

use std::{os::unix::fs::DirBuilderExt, path::Path, sync::Arc, time::Duration};

use moxlet_image::{Place, ZfsConfig};
use moxlet_storage::{idmap, mounts};
use tokio_util::sync::CancellationToken;

pub use config::{AddressSource, CniSettings, Config, EngineSettings, LinkSettings, PveSettings, Storage};
pub use error::{Error, Result};
pub use moxlet_network::PROGRAM_PATH;
pub use moxlet_sandbox::LXC_PATH;
pub use service::ImageStoreService;
pub use uninstall::{Step, uninstall};

use crate::{
    core::{Core, Parts, blocking},
    engine::Opened,
    ledger::Ledger,
    service::Service,
    streaming::Streaming,
    volumes::Volumes,
};

/// A running agent.
pub struct Agent {
    core: Arc<Core>,
}

/// How long changes that are under way may take when the agent ends.
const AT_THE_END: Duration = Duration::from_secs(30);
/// How long a CT's start or a CNI plugin may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

impl Agent {
    /// Opens the parts of the agent, each of which checks what it needs of the host, takes over what runs, and serves.
    ///
    /// # Errors
    /// The host is not fit, with a hint where there is one; or the ledger cannot be read.
    pub async fn start(config: Config, stop: CancellationToken) -> Result<Self> {
        in_first_mount_namespace()?;
        let root = config.root_dir.clone();
        // CTs reach what is mounted for them as an unprivileged user: each directory on the way lets them pass.
        for (dir, mode) in [("", 0o711), ("run", 0o711), ("pods", 0o711), ("logs", 0o711), ("ledger", 0o700)]
        {
            make_dir(&root.join(dir), mode)?;
        }
        let pods = root.join("pods");
        blocking("making the pods' directory shared", move || Ok(mounts::make_shared_dir(&pods)?)).await?;
        let init_binary = init_binary::install(config.init_binary.as_deref(), &root.join("init"))?;
        // Proxmox VE activates its storage when the engine asks after it, and takes a pool for active of which anything is mounted: the
        // store's own mounts come after.
        let Opened { engine, cgroups, network } = engine::open(&config).await?;
        let place = place(&config).open().await?;
        let driver = place.driver();
        let images = place
            .images(moxlet_image::Config {
                plain_http_hosts: config.plain_http_registries.clone(),
                max_parallel_downloads: config.max_parallel_downloads,
                docker_config: config.docker_config.clone(),
                registry_config_dir: config.registry_config_dir.clone(),
                prefetch_max_bytes: config.image_prefetch_max_bytes,
                ..moxlet_image::Config::default()
            })
            .await?;
        let core = Core::new(Parts {
            network,
            volumes: Volumes::open(root.join("volumes"), config.map)?,
            shifted: idmap::Namespace::new(config.map)?,
            ledger: Ledger::open(&root.join("ledger"))?,
            cgroups,
            driver,
            engine,
            images,
            init_binary,
            stop,
            config,
        });
        recover::recover(&core).await?;
        notices::spawn(&core);
        engine::spawn(&core);
        let streaming = Streaming::start(core.clone()).await?;
        service::serve(&core, streaming).await?;
        Ok(Self { core })
    }

    /// Where the CRI socket is: `unix:///…`.
    #[must_use]
    pub fn cri_endpoint(&self) -> String {
        format!("unix://{}", self.core.config.cri_socket.display())
    }

    /// Stops all pods, each with this grace.
    pub async fn stop_pods(&self, grace: Duration) {
        Service::stop_all(&self.core, grace).await;
    }

    /// Waits until all tasks have ended, after the token that the agent was started with is cancelled. A change that hangs in
    /// the kernel or in a program is given up after 30 s: the next start takes it up from what is on disk.
    pub async fn join(self) {
        self.core.tasks.close();
        if tokio::time::timeout(AT_THE_END, self.core.tasks.wait()).await.is_err() {
            tracing::warn!(
                tasks = self.core.tasks.len(),
                "some changes did not end in time; the next start takes them up"
            );
        }
        // What pods have mounted stays. Without them nothing of ours keeps a pool or file system busy then.
        match tokio::time::timeout(AT_THE_END, self.core.driver.close()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the store's own mounts stay until the next start"),
            Err(_) => tracing::warn!("the store's own mounts are not taken down in time"),
        }
    }
}

/// Where images and container roots lie.
fn place(config: &Config) -> Place {
    match &config.storage {
        Storage::Overlay => Place::Overlay(config.root_dir.clone()),
        Storage::Zfs(dataset) => Place::Zfs(ZfsConfig {
            dataset: dataset.clone(),
            run_dir: config.root_dir.join("storage"),
            ids: None,
        }),
    }
}

fn make_dir(path: &Path, mode: u32) -> Result<()> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(mode).create(path);
    made.map_err(|e| Error::io(format!("cannot make {}", path.display()), e))
}

/// What an agent mounts for a pod reaches the pod only from the mount namespace that the CTs come from.
fn in_first_mount_namespace() -> Result<()> {
    let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt"));
    match (of("self"), of("1")) {
        (Ok(own), Ok(first)) if own != first => Err(Error::Unfit(
            "this program runs in a mount namespace of its own, from which no mount reaches a pod: remove Private*, \
             Protect*, ReadOnlyPaths and the like from its systemd unit, or run it outside of `unshare` and `ip netns exec`"
                .into(),
        )),
        _ => Ok(()),
    }
}
