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

/// What the rooms that change pods have in common.
struct Common {
    config: Arc<Config>,
    tasks: Tasks,
    dirs: Dirs,
    state: Arc<State>,
    events: Events,
    engine: Arc<dyn Engine>,
    shifted: Arc<idmap::Namespace>,
}

impl Common {
    fn containers(
        &self,
        driver: Arc<dyn Driver>,
        images: Arc<ImageStore>,
        cgroups: Arc<ContainerCgroups>,
        volumes: Arc<Volumes>,
    ) -> Containers {
        Containers {
            state: self.state.clone(),
            events: self.events.clone(),
            tasks: self.tasks.clone(),
            dirs: self.dirs.clone(),
            engine: self.engine.clone(),
            cgroups,
            driver,
            images,
            volumes,
            shifted: self.shifted.clone(),
            settings: containers::Settings {
                map: self.config.map,
                root_quota: self.config.container_root_quota,
                log_max_bytes: self.config.log_max_bytes,
                log_max_files: self.config.log_max_files,
            },
        }
    }

    fn pods(
        &self,
        containers: Arc<Containers>,
        network: Arc<Network>,
        retries: Retries,
        init_binary: PathBuf,
    ) -> Pods {
        Pods {
            state: self.state.clone(),
            events: self.events.clone(),
            tasks: self.tasks.clone(),
            dirs: self.dirs.clone(),
            engine: self.engine.clone(),
            network,
            containers,
            retries,
            shifted: self.shifted.clone(),
            settings: pods::Settings {
                map: self.config.map,
                init_binary,
                resolv_conf: self.config.resolv_conf.clone(),
                host_stops_cts: self.on_proxmox_ve(),
            },
        }
    }

    fn on_proxmox_ve(&self) -> bool {
        matches!(self.config.engine, EngineSettings::Pve(_))
    }
}

impl Rooms {
    /// Puts the rooms together; and what is to be [reconciled](Reconciler::spawn).
    pub(crate) fn new(opened: Opened) -> (Self, mpsc::UnboundedReceiver<Work>) {
        let Opened { driver, images, .. } = opened;
        let ledger = Arc::new(opened.ledger);
        let state = State::new(ledger.clone());
        let common = Common {
            dirs: Dirs::below(&opened.config.root_dir),
            config: Arc::new(opened.config),
            tasks: Tasks::new(opened.stop),
            events: Events::new(state.clone()),
            state,
            engine: opened.engine,
            shifted: Arc::new(opened.shifted),
        };
        let (cgroups, volumes) = (Arc::new(opened.cgroups), Arc::new(opened.volumes));
        let network = Arc::new(opened.network);
        let containers =
            Arc::new(common.containers(driver.clone(), images.clone(), cgroups.clone(), volumes.clone()));
        let (retries, work) = Retries::new();
        let pods = Arc::new(common.pods(containers.clone(), network.clone(), retries, opened.init_binary));
        let notices = Arc::new(Notices::open(ledger.clone()));
        let reconciler = Arc::new(Reconciler {
            pods: pods.clone(),
            ledger,
            driver: driver.clone(),
            notices: notices.clone(),
            others_start_cts: common.on_proxmox_ve(),
        });
        let usages = Arc::new(Usages::new(driver.clone(), common.state.clone()));
        let Common { config, tasks, dirs, state, events, engine, .. } = common;
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
