//! The CT of a pod: the engine contract, plain LXC, cgroups of its containers.
//!
//! A sandbox is one unprivileged LXC container (*CT*) whose PID 1 is `moxlet-init`; the pod's containers are nested
//! in it. The states and who moves them:
//!
//! ```text
//!            create            start                 stop, or its init died
//!  (nothing) ──────▶ Stopped ────────▶ Running{pid} ──────────────────────▶ Stopped ──delete──▶ (nothing)
//! ```
//!
//! Nothing is remembered in this process: what exists is read from the engine's directory, what runs from `/proc`, so
//! a restarted agent sees the same as the one before. `delete` works from every state, also on what a crash left half
//! made, and may be called again.
//!
//! * [`Engine`]: the contract; [`LxcEngine`] fulfils it with plain liblxc, [`fake::FakeEngine`] in tests.
//! * [`cgroup`]: limits and figures of the CT's containers, seen from the host.
//! * [`subid`]: the host's `/etc/subuid` and `/etc/subgid` ranges.

pub mod cgroup;
mod error;
pub mod fake;
mod find;
mod lxc;
mod process;
pub mod pve;
pub mod subid;
mod text;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    time::Duration,
};

use async_trait::async_trait;
pub use error::{Error, Result};
pub use lxc::{LXC_PATH, LxcConfig, LxcEngine};
use moxlet_ids::{PodUid, SandboxId};
pub use moxlet_storage::IdMap;

/// Where the pod's shared directory lies in the CT.
pub const POD_DIR_IN_CT: &str = "/run/moxlet/pod";
/// Where moxlet-init lies in the CT.
pub const INIT_IN_CT: &str = "/sbin/moxlet-init";

/// What a CT is made of.
#[derive(Debug, Clone)]
pub struct SandboxSpec {
    /// Names the CT and its directory.
    pub id: SandboxId,
    /// The pod's namespace.
    pub pod_namespace: String,
    /// The pod's name.
    pub pod_name: String,
    /// The pod's UID.
    pub pod_uid: PodUid,
    /// The how-many-th sandbox of this pod it is.
    pub attempt: u32,
    /// The CT's UTS name, at most 63 characters.
    pub hostname: String,
    /// The CT's user and group ids on the host.
    pub map: IdMap,
    /// A host directory on a shared mount; appears in the CT at [`POD_DIR_IN_CT`] (`rbind,rslave`), so that what the
    /// host mounts below it later appears there, too.
    pub shared_dir: PathBuf,
    /// The host path of moxlet-init; appears read-only at [`INIT_IN_CT`].
    pub init_binary: PathBuf,
    /// moxlet-init's arguments.
    pub init_args: Vec<String>,
    /// Limits of the CT as a whole.
    pub limits: Limits,
    /// Namespaced sysctls, dotted names.
    pub sysctls: BTreeMap<String, String>,
    /// How long the pod may take to end when its host goes down.
    pub stop_grace: Duration,
    /// The interfaces that the engine attaches, in their order; see [`Engine::addresses`].
    pub nics: Vec<Nic>,
}

/// A network interface that the engine attaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Its name in the CT.
    pub name: String,
    /// The host's bridge, or a virtual network.
    pub bridge: String,
    /// Its hardware address; without one it has one that the same sandbox always gets.
    pub mac: Option<moxlet_pve::config::MacAddr>,
    /// Its IPv4 address.
    pub ipv4: Option<NicAddress<Ipv4Addr>>,
    /// Its IPv6 address.
    pub ipv6: Option<NicAddress<Ipv6Addr>>,
    /// At least 64 and no more than the bridge's; without one it is the bridge's.
    pub mtu: Option<u16>,
    /// The VLAN, 1 to 4094.
    pub vlan: Option<u16>,
    /// Whether the firewall rules of the CT hold for it.
    pub firewall: bool,
}

/// How an interface gets its address of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NicAddress<A> {
    /// By DHCP; the host asks for it.
    Dhcp,
    /// This one.
    Static {
        /// The address.
        address: A,
        /// The length of the subnet's prefix.
        prefix: u8,
        /// The default route's gateway.
        gateway: Option<A>,
    },
}

/// Limits of a CT or of a container in it; `None`: unlimited (or the kernel's default).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Memory with no swap beyond it.
    pub memory_bytes: Option<u64>,
    /// CFS quota; a value ≤ 0 is no quota.
    pub cpu_quota_us: Option<i64>,
    /// CFS period, 100 ms if absent.
    pub cpu_period_us: Option<u64>,
    /// CPU shares as cgroup v1 counts them (1024 = one CPU's request).
    pub cpu_shares: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
}

/// Whether a CT runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxState {
    /// Its init runs.
    Running {
        /// The init's pid on the host.
        pid: u32,
    },
    /// It exists on disk and does not run: not started yet, stopped, or killed.
    Stopped,
}

/// One line of [`Engine::list`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxInfo {
    /// Which CT.
    pub id: SandboxId,
    /// Whether it runs.
    pub state: SandboxState,
}

/// What makes, runs and removes CTs.
#[async_trait]
pub trait Engine: Send + Sync {
    /// Makes the CT's configuration; it does not run yet. [`Error::Exists`] if there is one of this id.
    async fn create(&self, spec: &SandboxSpec) -> Result<()>;
    /// Starts the CT and returns the host pid of its init. Of a running one: just its pid.
    async fn start(&self, id: &SandboxId) -> Result<u32>;
    /// Asks the CT's init to end (SIGTERM) and kills it when it has not after `grace`. Of a stopped or unknown one: nothing.
    async fn stop(&self, id: &SandboxId, grace: Duration) -> Result<()>;
    /// Hears that the caller is about to end the CT by its init, so that its end is not told as somebody else's doing.
    async fn ending(&self, _id: &SandboxId) {}
    /// Removes the CT, killing it first if it runs, and whatever a crash left of it. Idempotent.
    async fn delete(&self, id: &SandboxId) -> Result<()>;
    /// All CTs of this engine, from disk, half-made ones included (they are `Stopped`).
    async fn list(&self) -> Result<Vec<SandboxInfo>>;
    /// The state of one CT, `None` if it does not exist.
    async fn state(&self, id: &SandboxId) -> Result<Option<SandboxState>>;
    /// Returns when the CT does not run (any more); at once if it is stopped or unknown.
    async fn wait(&self, id: &SandboxId) -> Result<()>;
    /// The addresses of a running CT whose interfaces the engine attaches; `None` of an engine that leaves it to the caller.
    async fn addresses(&self, _id: &SandboxId) -> Result<Option<Vec<IpAddr>>> {
        Ok(None)
    }
    /// Who else holds a CT so that it cannot be changed now: `backup`, `frozen`, ….
    async fn held_by(&self, _id: &SandboxId) -> Result<Option<String>> {
        Ok(None)
    }
    /// Shows people which containers a CT has.
    async fn describe(&self, _id: &SandboxId, _containers: &[String]) -> Result<()> {
        Ok(())
    }
    /// Makes changed limits of a CT last beyond its next start; what is `None` stays. The cgroups of a running CT are the
    /// caller's.
    async fn resize(&self, _id: &SandboxId, _limits: &Limits) -> Result<()> {
        Ok(())
    }
    /// Why no new CT can run, as far as that is known without asking anybody; those that run go on.
    fn fault(&self) -> Option<String> {
        None
    }
    /// Looks again whether there is a [fault](Self::fault). Without one: nothing.
    async fn check(&self) -> Result<()> {
        Ok(())
    }
    /// What somebody else has done to CTs since the last look. What is of a sandbox is remembered with it until the next look: whoever
    /// is killed between finds it in the first look after the start, with the same time.
    async fn look(&self) -> Result<Vec<Observation>> {
        Ok(Vec::new())
    }
}

/// The most bytes of an observation's message: an event has no longer ones, and a raw line of an edited configuration, which is as long
/// as somebody likes, is kept in records that have to be read again.
pub const OBSERVATION_BYTES: usize = 1024;

/// What somebody else did to a CT, or to one that looks like ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observation {
    /// The sandbox of the CT; none if it is not ours.
    pub sandbox: Option<SandboxId>,
    /// A word for it, as the reason of an event: `CTEdited`, ….
    pub reason: &'static str,
    /// Whether somebody should do something about it.
    pub warning: bool,
    /// What was seen and what follows from it, of at most [`OBSERVATION_BYTES`].
    pub message: String,
    /// When it was seen, in nanoseconds since 1970.
    pub at_ns: i64,
}
