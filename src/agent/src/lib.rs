//! The CRI runtime whose pod sandboxes are CTs.
//!
//! A request goes down these rooms once and does not come back:
//!
//! | room | what it does |
//! |---|---|
//! | `service` | the gRPC services, on the unix socket and on a port for a node elsewhere |
//! | `streaming`, `logs`, `stats` (with `usage`, `rates`), `facts` | exec, attach and port-forward; what a node asks of a host besides CRI |
//! | `reconcile`, `retries` | ledger and host are brought in line; what failed is done again, from one queue |
//! | `pods` | sandboxes: `create`, `stop`, `remove`, and `watch`, which follows what runs |
//! | `containers` | containers: `prepare`, `mounts`, `start`, `stop`, `remove`, and `exits`, how they end |
//! | `spec` | the OCI spec of a container |
//! | `notices` | what somebody else did to CTs on the host |
//! | `events`, `status` | the stream of CRI's events; sandboxes and containers as CRI shows them |
//! | `state`, `ledger` | sandboxes and containers in memory, and what of them must survive |
//! | `engine`, `network`, `limits`, `volumes` | which engine makes the CTs, who attaches them, what they may use, what is mounted |
//! | `deletions` | what containers wrote is deleted beside everything else |
//! | `rooms` | the rooms put together: each gets what it needs |
//! | `uninstall` | what Moxlet made on a host is taken from it |
//!
//! Tasks that live as long as the agent, in the order in which they start:
//!
//! | task | takes | gives |
//! |---|---|---|
//! | a watch for each running sandbox (`pods::watch`) | its init's events, the end of its CT | states of containers, CRI events |
//! | the reconciler (`reconcile`) | work from `retries`; on Proxmox VE a look every 2 s | a task for each thing that is due |
//! | the measurements (`usage`) | containers of `state` | what each has written |
//! | the looks and the notes (`notices`), on Proxmox VE | what the engine sees; CRI events | notices; the notes of CTs |
//! | the thread of `deletions` | trees of volumes that were removed | |
//! | the streaming server's listeners (`streaming`) | connections of clients | a task for each |
//! | the gRPC servers (`service`) | requests | changes that run to their end in tasks of their own |
//!
//! All belong to one tracker and end by one token; [`Agent::join`] waits for them. Pods outlive all of it.

mod beneath;
mod clock;
mod config;
mod containers;
mod deletions;
mod dirs;
mod engine;
mod error;
mod events;
mod facts;
#[cfg(test)]
mod fake;
mod init_binary;
mod ledger;
mod limits;
mod logs;
mod network;
mod notices;
mod pods;
mod rates;
mod reconcile;
mod retries;
mod rooms;
mod service;
mod signals;
mod spec;
mod state;
mod stats;
mod status;
mod streaming;
mod tasks;
mod uninstall;
mod usage;
mod volumes;

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
    ledger::Ledger,
    notices::Watcher,
    rooms::{Opened, Rooms},
    streaming::Streaming,
    tasks::blocking,
    volumes::Volumes,
};

/// A running agent.
pub struct Agent {
    rooms: Rooms,
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
        for (dir, mode) in [("", 0o711), ("run", 0o711), ("pods", 0o711), ("logs", 0o700), ("ledger", 0o700)]
        {
            make_dir(&root.join(dir), mode)?;
        }
        let pods = root.join("pods");
        blocking(move || Ok(mounts::make_shared_dir(&pods)?)).await?;
        let init_binary = init_binary::install(config.init_binary.as_deref(), &root.join("init"))?;
        // Proxmox VE activates its storage when the engine asks after it, and takes a pool for active of which anything is mounted: the
        // store's own mounts come after.
        let engine::Opened { engine, cgroups, network } = engine::open(&config).await?;
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
        let (rooms, work) = Rooms::new(Opened {
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
        rooms.reconciler.start().await?;
        rooms.reconciler.spawn(work);
        rooms.usages.spawn(&rooms.tasks);
        let resolver = moxlet_network::resolver::of_host(rooms.config.resolv_conf.as_deref());
        if !resolver.left_out.is_empty() {
            tracing::warn!(
                servers = resolver.left_out.join(" "),
                "pods are not given these servers of the host's resolver, whose addresses would be the pod itself: set resolv_conf"
            );
        }
        network::restore_in_background(&rooms.network, &rooms.tasks);
        Self::serve(&rooms).await?;
        Ok(Self { rooms })
    }

    /// Starts what others speak to.
    async fn serve(rooms: &Rooms) -> Result<()> {
        // CTs of plain LXC are nobody else's business.
        if matches!(rooms.config.engine, EngineSettings::Pve(_)) {
            let watcher = Watcher {
                notices: rooms.notices.clone(),
                engine: rooms.engine.clone(),
                state: rooms.state.clone(),
                tasks: rooms.tasks.clone(),
            };
            Arc::new(watcher).spawn(&rooms.events);
        }
        let socket = rooms.config.root_dir.join("run/stream.sock");
        let listen = rooms.config.stream_listen;
        let streaming = Streaming::start(rooms.state.clone(), rooms.tasks.clone(), socket, listen)?;
        service::serve(rooms, streaming).await
    }

    /// Where the CRI socket is: `unix:///…`.
    #[must_use]
    pub fn cri_endpoint(&self) -> String {
        format!("unix://{}", self.rooms.config.cri_socket.display())
    }

    /// Stops all pods, each with this grace.
    pub async fn stop_pods(&self, grace: Duration) {
        self.rooms.pods.stop_all(grace).await;
    }

    /// Waits until all tasks have ended, after the token that the agent was started with is cancelled. A change that hangs in
    /// the kernel or in a program is given up after 30 s: the next start takes it up from what is on disk.
    pub async fn join(self) {
        self.rooms.tasks.tracker.close();
        if tokio::time::timeout(AT_THE_END, self.rooms.tasks.tracker.wait()).await.is_err() {
            tracing::warn!(
                tasks = self.rooms.tasks.tracker.len(),
                "some changes did not end in time; the next start takes them up"
            );
        }
        // What pods have mounted stays. Without them nothing of ours keeps a pool or file system busy then.
        match tokio::time::timeout(AT_THE_END, self.rooms.driver.close()).await {
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
