//! Pod sandboxes: a CT, its network, the directory that host and CT share.
//!
//! ```text
//! RunPodSandbox:    ledger ▶ directory ▶ CT ▶ start ▶ network, init ▶ Ready                        (`create`)
//! while it runs:    the init's events ▶ containers; the CT's end ▶ NotReady                          (`watch`)
//! StopPodSandbox:   the init ends its containers and itself, or the CT is killed ▶ network released  (`stop`)
//! RemovePodSandbox: CT ▶ containers ▶ addresses ▶ directory ▶ ledger                                (`remove`)
//! ```
//! Every step may be repeated; a sandbox that was not completed is removed by the same steps as one that is not wanted.

mod create;
mod remove;
mod stop;
mod watch;

use std::{path::PathBuf, sync::Arc, time::Duration};

use moxlet_sandbox::Engine;
use moxlet_storage::{IdMap, idmap};

use crate::{
    containers::Containers, dirs::Dirs, events::Events, network::Network, retries::Retries, state::State,
    tasks::Tasks,
};

/// How long a CT's init may take to end its containers when the sandbox is stopped.
const STOP_GRACE: Duration = Duration::from_secs(3);

/// What the sandboxes' lives need.
pub(crate) struct Pods {
    pub(crate) state: Arc<State>,
    pub(crate) events: Events,
    pub(crate) tasks: Tasks,
    pub(crate) dirs: Dirs,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) network: Arc<Network>,
    pub(crate) containers: Arc<Containers>,
    /// Removes what could not be removed at once.
    pub(crate) retries: Retries,
    /// Shifts the ids of the pods' log directories.
    pub(crate) shifted: Arc<idmap::Namespace>,
    pub(crate) settings: Settings,
}

/// How CTs are made.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// The CTs' ids on the host.
    pub(crate) map: IdMap,
    /// moxlet-init on the host, a copy that no upgrade replaces.
    pub(crate) init_binary: PathBuf,
    /// The resolver's configuration for pods, in place of the host's own.
    pub(crate) resolv_conf: Option<PathBuf>,
    /// Whether the host stops CTs by itself when it goes down.
    pub(crate) host_stops_cts: bool,
}
