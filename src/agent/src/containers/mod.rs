//! Containers of a sandbox: made from an image's root and an OCI spec, run by the CT's init, removed with all they had.
//!
//! ```text
//! CreateContainer: ledger ▶ root (mounted below the pod's directory) ▶ mounts ▶ spec          (`prepare`, `mounts`)
//! StartContainer:  cgroup ▶ init: create ▶ oom_score_adj ▶ init: start                         (`start`)
//! the init's event or the CT's end ▶ Exited, in the ledger                                      (`exits`)
//! UpdateContainerResources: cgroup ▶ oom_score_adj ▶ ledger                                   (`update`)
//! StopContainer:   the stop signal ▶ SIGKILL, both by the init                                  (`stop`)
//! RemoveContainer: init ▶ mounts ▶ root ▶ cgroup ▶ log ▶ ledger                                (`remove`)
//! ```
//! What a spec holds (environment among it) stays in memory until the start and then in the CT's tmpfs; it is never on a
//! disk. A container that was made and not started when the agent ended is therefore made anew by whoever wanted it.

mod exits;
mod mounts;
mod prepare;
mod remove;
mod start;
mod stop;
mod update;

use std::{sync::Arc, time::Duration};

use moxlet_image::ImageStore;
use moxlet_sandbox::{Engine, cgroup::ContainerCgroups};
use moxlet_storage::{Driver, IdMap, idmap};

use crate::{dirs::Dirs, events::Events, state::State, tasks::Tasks, volumes::Volumes};

/// How long a killed container may take to be gone.
const KILLED: Duration = Duration::from_secs(10);
/// How long an init may take over an answer that needs no work of a container.
const ANSWER: Duration = Duration::from_secs(10);

/// What the containers' lives need.
pub(crate) struct Containers {
    pub(crate) state: Arc<State>,
    pub(crate) events: Events,
    pub(crate) tasks: Tasks,
    pub(crate) dirs: Dirs,
    /// Knows who else holds a CT.
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) cgroups: Arc<ContainerCgroups>,
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) images: Arc<ImageStore>,
    /// Knows which mounts' sources are volumes of ours.
    pub(crate) volumes: Arc<Volumes>,
    /// Shifts the ids of what is mounted.
    pub(crate) shifted: Arc<idmap::Namespace>,
    pub(crate) settings: Settings,
}

/// How containers are made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    /// The CTs' ids on the host.
    pub(crate) map: IdMap,
    /// The most bytes that a container may write into its root.
    pub(crate) root_quota: Option<u64>,
    /// A log is rotated before it is longer, in bytes.
    pub(crate) log_max_bytes: u64,
    /// Log files kept of a container, the live one included.
    pub(crate) log_max_files: u32,
}
