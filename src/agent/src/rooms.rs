//! The rooms of an agent, put together: each gets what it needs, and none knows all.

use std::{path::PathBuf, sync::Arc};

use moxlet_image::ImageStore;
use moxlet_sandbox::{Engine, cgroup::ContainerCgroups};
use moxlet_storage::{Driver, idmap};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    Config,
    config::EngineSettings,
    containers::{self, Containers},
    dirs::Dirs,
    events::Events,
    ledger::Ledger,
    network::Network,
    notices::Notices,
    pods::{self, Pods},
    rates::Rates,
    reconcile::Reconciler,
    retries::{Retries, Work},
    state::State,
    tasks::Tasks,
    usage::Usages,
    volumes::Volumes,
};

/// What is opened on a host before there are rooms.
pub(crate) struct Opened {
    pub(crate) config: Config,
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) network: Network,
    pub(crate) images: Arc<ImageStore>,
    pub(crate) cgroups: ContainerCgroups,
    pub(crate) volumes: Volumes,
    pub(crate) shifted: idmap::Namespace,
    pub(crate) ledger: Ledger,
    pub(crate) init_binary: PathBuf,
    pub(crate) stop: CancellationToken,
}

/// The rooms, for whoever serves them.
#[derive(Clone)]
pub(crate) struct Rooms {
    pub(crate) config: Arc<Config>,
    pub(crate) tasks: Tasks,
    pub(crate) dirs: Dirs,
    pub(crate) state: Arc<State>,
    pub(crate) events: Events,
    pub(crate) containers: Arc<Containers>,
    pub(crate) pods: Arc<Pods>,
    pub(crate) notices: Arc<Notices>,
    pub(crate) reconciler: Arc<Reconciler>,
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) network: Arc<Network>,
    pub(crate) images: Arc<ImageStore>,
    pub(crate) cgroups: Arc<ContainerCgroups>,
    pub(crate) volumes: Arc<Volumes>,
    pub(crate) usages: Arc<Usages>,
    pub(crate) rates: Arc<Rates>,
}

impl Rooms {
    /// Puts the rooms together; and what is to be [reconciled](Reconciler::spawn).
    pub(crate) fn new(opened: Opened) -> (Self, mpsc::UnboundedReceiver<Work>) {
        let Opened { driver, engine, images, init_binary, .. } = opened;
        let (config, ledger) = (Arc::new(opened.config), Arc::new(opened.ledger));
        let on_proxmox_ve = matches!(config.engine, EngineSettings::Pve(_));
        let (dirs, tasks) = (Dirs::below(&config.root_dir), Tasks::new(opened.stop));
        let (cgroups, volumes) = (Arc::new(opened.cgroups), Arc::new(opened.volumes));
        let (shifted, network) = (Arc::new(opened.shifted), Arc::new(opened.network));
        let state = State::new(ledger.clone());
        let events = Events::new(state.clone());
        let containers = Arc::new(Containers {
            state: state.clone(),
            events: events.clone(),
            tasks: tasks.clone(),
            dirs: dirs.clone(),
            engine: engine.clone(),
            cgroups: cgroups.clone(),
            driver: driver.clone(),
            images: images.clone(),
            volumes: volumes.clone(),
            shifted: shifted.clone(),
            settings: containers::Settings {
                map: config.map,
                root_quota: config.container_root_quota,
                log_max_bytes: config.log_max_bytes,
                log_max_files: config.log_max_files,
            },
        });
        let (retries, work) = Retries::new();
        let pods = Arc::new(Pods {
            state: state.clone(),
            events: events.clone(),
            tasks: tasks.clone(),
            dirs: dirs.clone(),
            engine: engine.clone(),
            network: network.clone(),
            containers: containers.clone(),
            retries,
            shifted,
            settings: pods::Settings {
                map: config.map,
                init_binary,
                resolv_conf: config.resolv_conf.clone(),
                host_stops_cts: on_proxmox_ve,
            },
        });
        let notices = Arc::new(Notices::open(ledger.clone()));
        let reconciler = Arc::new(Reconciler {
            pods: pods.clone(),
            ledger,
            driver: driver.clone(),
            notices: notices.clone(),
            others_start_cts: on_proxmox_ve,
        });
        let usages = Arc::new(Usages::new(driver.clone(), state.clone()));
        let rooms = Self {
            config,
            tasks,
            dirs,
            state,
            events,
            containers,
            pods,
            notices,
            reconciler,
            driver,
            engine,
            network,
            images,
            cgroups,
            volumes,
            usages,
            rates: Arc::default(),
        };
        (rooms, work)
    }
}
