//! The engine on Proxmox VE: the CT of a pod is one that Proxmox VE sees, lists, limits, starts and removes.
//!
//! ```text
//! <dir>/ct/<sandbox>.json             a CT's record: written before all else of it, removed after all else of it
//! <dir>/include/<vmid>-<pod uid>.conf what its configuration includes; the mark that it is ours
//! <dir>/guard/                        empty; a mount point of every CT that keeps Proxmox VE from migrating or cloning it
//! /etc/pve/nodes/<node>/lxc/<vmid>.conf
//! <pool>/subvol-<vmid>-disk-0         its small root
//! ```
//!
//! The API cannot make such a CT, so its file is written here (`file`); it starts, stops and goes as tasks of Proxmox VE.
//! What runs is read from cgroups and `/proc`, never asked of the API: an idle host makes no calls.
//!
//! | module | subject |
//! |---|---|
//! | `config` | what a CT's files say; pure |
//! | `vmid` | its number |
//! | `file` | the cluster's file system: exclusive creation, replacement, locks, quorum |
//! | `marker` | whose a CT is |
//! | `standing` | how it stands, and whether what runs under its number is it |
//! | `record` | what is remembered |
//! | `volume` | its root |
//! | `make`, `remove` | its beginning and end, each to be repeated from any point |
//! | `task` | waiting for tasks with few calls |
//! | `seen` | what was seen of it, and what of that is still to be reported |
//! | `look` | what an administrator did to it |
//! | `inits` | its processes and addresses |
//! | `setup`, `check`, `bridge` | the engine from an administrator's words, and what host and token must have |

mod bridge;
mod check;
mod config;
mod file;
mod inits;
mod look;
mod make;
mod marker;
mod record;
mod remove;
mod seen;
mod setup;
mod standing;
mod task;
mod vmid;
mod volume;

pub mod fake;

use std::{
    collections::HashMap,
    fs,
    net::IpAddr,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use moxlet_ids::{SandboxId, Vmid};
use moxlet_pve::{Client, NodeName, PoolId, StorageId, Upid, config::LxcConfig};
use tokio::sync::{OwnedMutexGuard, Semaphore};

pub use check::{Checked, Requirements, StoragePlace};
pub use inits::{CgroupInits, Inits};
pub use setup::PveHost;
pub use vmid::VmidRange;
pub use volume::{VolumeOwner, Volumes, ZfsVolumes};

use self::{
    config::Layout,
    file::ConfigDir,
    look::Told,
    record::{Phase, Record, Records, Written},
    standing::Standing,
};
use crate::{
    Engine, Error, Limits, Observation, Result, SandboxInfo, SandboxSpec, SandboxState, cgroup::Numbers,
    error::io,
};

/// Removals at once: each takes a cluster-wide lock that is waited for only 10 s.
const DELETES: usize = 2;
/// Starts at once. The task of each is some Perl programs and a unit of systemd, which outlive the call: as many as there are pods
/// after a boot would have the host do nothing else.
const STARTS: usize = 8;
/// How long a start waits for its turn: what started it gives up after four minutes, of which the start itself may take two.
const TURN: Duration = Duration::from_secs(120);
/// The size of a CT's root: mount points alone.
const ROOT_BYTES: u64 = 64 << 20;
/// How long an address may take to come by DHCP.
const DHCP_WAIT: Duration = Duration::from_secs(30);
const DHCP_PAUSE: Duration = Duration::from_millis(200);

/// What the engine needs to know.
#[derive(Debug, Clone)]
pub struct PveConfig {
    /// The engine's own directory.
    pub dir: PathBuf,
    /// The cluster's file system, `/etc/pve`.
    pub config_dir: PathBuf,
    /// Where Proxmox VE locks CTs, `/run/lock/lxc`.
    pub lock_dir: PathBuf,
    /// This host's name in the cluster.
    pub node: NodeName,
    /// The storage of the CTs' roots, of type `zfspool`.
    pub storage: StorageId,
    /// The numbers of the pods' CTs.
    pub range: VmidRange,
    /// Whether CTs are written as protected.
    pub protection: bool,
    /// The pool that CTs are put into before their first start.
    pub pool: Option<PoolId>,
    /// Memory of a pod without a limit, in bytes.
    pub memory_bytes: u64,
    /// The host's processors.
    pub cores: u32,
    /// How long a start may take.
    pub start_timeout: Duration,
}

/// CTs by Proxmox VE. Clones share their locks; two engines must not share a directory.
#[derive(Debug, Clone)]
pub struct PveEngine {
    inner: Arc<Inner>,
}

type Locks = Mutex<HashMap<SandboxId, Arc<tokio::sync::Mutex<()>>>>;

#[derive(Debug)]
struct Inner {
    config: PveConfig,
    client: Client,
    volumes: Arc<dyn Volumes>,
    inits: Arc<dyn Inits>,
    folder: ConfigDir,
    layout: Layout,
    records: Records,
    numbers: Numbers,
    /// Held while a number is chosen and claimed.
    claiming: tokio::sync::Mutex<()>,
    deletes: Semaphore,
    starting: Semaphore,
    starts: Mutex<vmid::Starts>,
    told: Mutex<Told>,
    locks: Locks,
    /// What the API has not been asked yet, and why.
    unchecked: Mutex<Option<(Requirements, String)>>,
}

/// Runs something that waits for files outside the async threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(Error::Host(format!("a task failed: {error}"))),
    }
}

fn api(what: &'static str, vmid: Vmid) -> impl FnOnce(moxlet_pve::Error) -> Error {
    move |source| match source.reason() {
        moxlet_pve::Error::Locked { lock, .. } => Error::Locked { vmid, lock: lock.clone() },
        _ => Error::Pve { what, vmid, source: Box::new(source) },
    }
}

/// Whether a call that failed has certainly left the CT as it was: it was not sent, or was refused at once.
fn nothing_came_of(error: &Error) -> bool {
    match error {
        Error::Locked { .. } => true,
        Error::Pve { source, .. } => {
            !source.may_have_happened() && !matches!(**source, moxlet_pve::Error::AlreadyRunning { .. })
        }
        _ => false,
    }
}

impl PveEngine {
    /// Opens (and makes) the engine's directory and takes over its CTs. Nothing is asked of the API; see [`Requirements`].
    ///
    /// # Errors
    /// This is no host of Proxmox VE, or a record cannot be read or is of a CT outside the range.
    pub fn new(
        config: PveConfig,
        client: Client,
        volumes: Arc<dyn Volumes>,
        inits: Arc<dyn Inits>,
        numbers: Numbers,
    ) -> Result<Self> {
        fs::create_dir_all(&config.dir).map_err(io("create", &config.dir))?;
        // Without links: Proxmox VE follows none on the way to what it binds into a CT.
        let dir = fs::canonicalize(&config.dir).map_err(io("find", &config.dir))?;
        let layout = Layout::below(&dir);
        // The guard is bound by the CT's root, who passes through the directories above it.
        for (path, mode) in
            [(&dir, 0o711), (&layout.records, 0o700), (&layout.includes, 0o700), (&layout.guard, 0o755)]
        {
            fs::create_dir_all(path).map_err(io("create", path))?;
            fs::set_permissions(path, fs::Permissions::from_mode(mode))
                .map_err(io("set the mode of", path))?;
        }
        let folder = ConfigDir::open(&config.config_dir, config.node.clone(), &config.lock_dir)?;
        let records = Records::open(&layout.records);
        for record in records.all()? {
            if !config.range.contains(record.vmid) {
                return Err(Error::Host(format!(
                    "CT {} of pod {}/{} is outside the range {} to {}: let vmid_min and vmid_max hold all CTs of pods until they \
                     are gone",
                    record.vmid,
                    record.namespace,
                    record.name,
                    config.range.first(),
                    config.range.last()
                )));
            }
            numbers.put(&record.id, record.vmid);
        }
        let inner = Inner {
            config,
            client,
            volumes,
            inits,
            folder,
            layout,
            records,
            numbers,
            claiming: tokio::sync::Mutex::default(),
            deletes: Semaphore::new(DELETES),
            starting: Semaphore::new(STARTS),
            starts: Mutex::default(),
            told: Mutex::default(),
            locks: Mutex::default(),
            unchecked: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Has a [fault](Engine::fault) from now on, until what the API has to say is checked.
    pub fn unchecked(&self, required: Requirements, why: &Error) {
        self.inner.set_unchecked(Some((required, check::reason(why))));
    }

    /// The number of a sandbox' CT.
    #[must_use]
    pub fn vmid(&self, id: &SandboxId) -> Option<Vmid> {
        self.inner.numbers.get(id)
    }
}

impl Inner {
    fn set_unchecked(&self, unchecked: Option<(Requirements, String)>) {
        *self.unchecked.lock().unwrap_or_else(PoisonError::into_inner) = unchecked;
    }

    fn unchecked(&self) -> Option<(Requirements, String)> {
        self.unchecked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn starts(&self) -> MutexGuard<'_, vmid::Starts> {
        self.starts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn lock(&self, id: &SandboxId) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            locks.entry(id.clone()).or_default().clone()
        };
        lock.lock_owned().await
    }

    async fn record(self: &Arc<Self>, id: &SandboxId) -> Result<Option<Record>> {
        let (inner, id) = (Arc::clone(self), id.clone());
        blocking(move || inner.records.get(&id)).await
    }

    async fn existing(self: &Arc<Self>, id: &SandboxId) -> Result<Record> {
        self.record(id).await?.ok_or_else(|| Error::NotFound(id.to_string()))
    }

    /// Changes a record, whatever else was noted in it meanwhile.
    async fn note(
        self: &Arc<Self>,
        id: &SandboxId,
        change: impl FnOnce(&mut Record) + Send + 'static,
    ) -> Result<Record> {
        let (inner, id) = (Arc::clone(self), id.clone());
        blocking(move || inner.records.change(&id, change)).await
    }

    /// Changes the configuration of a CT that is ours and not locked. `change` says whether it changed anything, and may change
    /// the notes.
    async fn edit(
        self: &Arc<Self>,
        id: &SandboxId,
        change: impl FnOnce(&mut LxcConfig, &mut Record) -> bool + Send + 'static,
    ) -> Result<()> {
        let (inner, id) = (Arc::clone(self), id.clone());
        blocking(move || {
            let Some(mut record) = inner.records.get(&id)? else {
                return Err(Error::NotFound(id.to_string()));
            };
            let held = inner.folder.lock(record.vmid)?;
            let mut content = match inner.standing(&record)? {
                Standing::Ours(content) => content,
                other => return Err(other.error(&record)),
            };
            if let Some(lock) = content.config.lock.clone() {
                return Err(Error::Locked { vmid: record.vmid, lock });
            }
            // As the last write left it, which may have failed.
            let before = content.config.clone();
            record = inner.records.change(&id, |r| r.settle(&before))?;
            if !change(&mut content.config, &mut record) || content.config == before {
                return Ok(());
            }
            let path = inner.folder.path(record.vmid);
            let known = content.config.to_file().map_err(|source| Error::Config { path, source })?;
            let next = Written { known, notes: record.notes };
            inner.records.change(&id, |r| r.intend(next))?;
            inner.folder.replace(&held, &content)?;
            inner.records.change(&id, |r| r.settle(&content.config)).map(drop)
        })
        .await
    }

    /// Who holds a CT: a lock of Proxmox VE, or that it is frozen.
    async fn held_by(self: &Arc<Self>, record: &Record) -> Result<Option<String>> {
        let (inner, record) = (Arc::clone(self), record.clone());
        blocking(move || {
            let Standing::Ours(content) = inner.standing(&record)? else { return Ok(None) };
            let frozen = || inner.inits.is_frozen(&record.id).then(|| "frozen".to_owned());
            Ok(content.config.lock.or_else(frozen))
        })
        .await
    }

    async fn start(self: &Arc<Self>, id: &SandboxId) -> Result<u32> {
        let record = self.existing(id).await?;
        if let Some(pid) = self.running(&record).await? {
            return Ok(pid);
        }
        let vmid = record.vmid;
        if record.phase != Phase::Made {
            return Err(Error::Busy { vmid, what: "it is half made or half removed".into() });
        }
        // What is looked at below holds for the start that follows at once.
        let _turn = match tokio::time::timeout(TURN, self.starting.acquire()).await {
            Ok(turn) => turn.map_err(|_| Error::Host("the engine has ended".into()))?,
            Err(_) => {
                let what =
                    format!("it waits for its turn: {STARTS} CTs are being started at once, and take long");
                return Err(Error::Busy { vmid, what });
            }
        };
        if let Some(lock) = self.own(&record).await?.config.lock {
            return Err(Error::Locked { vmid, lock });
        }
        let inner = Arc::clone(self);
        if blocking(move || Ok(inner.folder.is_under_ha(vmid))).await? {
            return Err(Error::Foreign {
                vmid,
                reason: "HA looks after it and starts it; remove it from HA".into(),
            });
        }
        match self.ask_to_start(record.clone()).await {
            Ok(task) => self.until_running(&record, &task).await,
            // An earlier call of ours was taken up after all, or somebody else was quicker.
            Err(Error::Pve { source, .. }) if matches!(*source, moxlet_pve::Error::AlreadyRunning { .. }) => {
                self.already_running(&record).await
            }
            Err(error) => Err(error),
        }
    }

    /// Asks Proxmox VE to start a CT. One that it was never asked to start can go without it (see [`remove`]): so that is
    /// noted before, and taken back where nothing can have come of it.
    async fn ask_to_start(self: &Arc<Self>, record: Record) -> Result<Upid> {
        let (first, vmid) = (!record.needs_api, record.vmid);
        let (id, known) = (record.id.clone(), record.known.clone());
        let record = self.note(&id, |r| (r.needs_api, r.seen.asked_to_end) = (true, false)).await?;
        let asked = async {
            self.pooled(record).await?;
            self.starts().note(vmid, Instant::now());
            self.client.ct(&self.config.node, vmid).start().await.map_err(api("start", vmid))
        };
        let asked = asked.await;
        if let Err(error) = &asked
            && first
            && nothing_came_of(error)
        {
            // Unless somebody edited it meanwhile.
            self.note(&id, move |r| r.needs_api = r.pooled || r.known != known).await?;
        }
        asked
    }

    /// Has the CT in the pool that is configured. Proxmox VE takes it out when it removes the CT.
    async fn pooled(self: &Arc<Self>, record: Record) -> Result<()> {
        let Some(pool) = self.config.pool.as_ref().filter(|_| !record.pooled) else { return Ok(()) };
        let put = self.client.add_to_pool(pool, record.vmid).await;
        put.map_err(api("put into its pool", record.vmid))?;
        self.note(&record.id, |r| r.pooled = true).await.map(drop)
    }

    /// Notes that its end is ours, not an administrator's. A full disk keeps no pod from ending.
    async fn ending(self: &Arc<Self>, id: &SandboxId) {
        match self.note(id, |r| r.seen.asked_to_end = true).await {
            Ok(_) | Err(Error::NotFound(_)) => {}
            Err(error) => tracing::warn!(sandbox = %id, %error, "that a CT is ended by Moxlet is not noted"),
        }
    }

    async fn stop(self: &Arc<Self>, record: &Record, grace: Duration) -> Result<()> {
        let vmid = record.vmid;
        if self.running(record).await?.is_none() {
            return Ok(());
        }
        self.own(record).await?;
        if let Some(lock) = self.held_by(record).await? {
            return Err(Error::Locked { vmid, lock });
        }
        self.ending(&record.id).await;
        let ct = self.client.ct(&self.config.node, vmid);
        let asked = if grace.is_zero() {
            ct.stop(true).await
        } else {
            ct.shutdown(Some(grace.max(Duration::from_secs(1))), true).await
        };
        match asked {
            Ok(task) => self.until_stopped(record, &task, grace).await,
            Err(moxlet_pve::Error::NotRunning { .. } | moxlet_pve::Error::Gone { .. }) => Ok(()),
            Err(error) => Err(api("stop", vmid)(error)),
        }
    }
}

#[async_trait]
impl Engine for PveEngine {
    async fn create(&self, spec: &SandboxSpec) -> Result<()> {
        let _lock = self.inner.lock(&spec.id).await;
        self.inner.make(spec).await
    }

    async fn start(&self, id: &SandboxId) -> Result<u32> {
        let _lock = self.inner.lock(id).await;
        self.inner.start(id).await
    }

    async fn stop(&self, id: &SandboxId, grace: Duration) -> Result<()> {
        // Not under the lock: a delete in the meantime shall not wait for the grace time.
        match self.inner.record(id).await? {
            Some(record) => self.inner.stop(&record, grace).await,
            None => Ok(()),
        }
    }

    async fn ending(&self, id: &SandboxId) {
        self.inner.ending(id).await;
    }

    async fn delete(&self, id: &SandboxId) -> Result<()> {
        let _lock = self.inner.lock(id).await;
        self.inner.remove(id).await
    }

    async fn list(&self) -> Result<Vec<SandboxInfo>> {
        let inner = Arc::clone(&self.inner);
        let records = blocking(move || inner.records.all()).await?;
        let mut all = Vec::with_capacity(records.len());
        for record in records {
            let state = self.inner.state(&record).await?;
            all.push(SandboxInfo { id: record.id, state });
        }
        Ok(all)
    }

    async fn state(&self, id: &SandboxId) -> Result<Option<SandboxState>> {
        let Some(record) = self.inner.record(id).await? else { return Ok(None) };
        let state = self.inner.state(&record).await?;
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            // What cannot be looked for has not gone.
            let there = !matches!(inner.folder.read(record.vmid), Ok(None));
            Ok((there || state != SandboxState::Stopped).then_some(state))
        })
        .await
    }

    async fn wait(&self, id: &SandboxId) -> Result<()> {
        match self.inner.record(id).await? {
            Some(record) if self.inner.running(&record).await?.is_none() => Ok(()),
            _ => self.inner.inits.ended(id).await,
        }
    }

    async fn addresses(&self, id: &SandboxId) -> Result<Option<Vec<IpAddr>>> {
        let record = self.inner.existing(id).await?;
        if !record.dhcp {
            return Ok(Some(record.ips));
        }
        let since = tokio::time::Instant::now();
        loop {
            let Some(pid) = self.inner.running(&record).await? else {
                return Err(Error::NotFound(format!("a running CT of {id}")));
            };
            let found = self.inner.inits.addresses(pid);
            if !found.is_empty() {
                return Ok(Some(found));
            }
            if since.elapsed() >= DHCP_WAIT {
                let seconds = DHCP_WAIT.as_secs();
                let (ct, tail) =
                    (record.vmid.to_string(), ": does a DHCP server answer on the bridge?".to_owned());
                return Err(Error::Timeout { what: "an address by DHCP", ct, seconds, tail });
            }
            tokio::time::sleep(DHCP_PAUSE).await;
        }
    }

    async fn held_by(&self, id: &SandboxId) -> Result<Option<String>> {
        match self.inner.record(id).await? {
            Some(record) => self.inner.held_by(&record).await,
            None => Ok(None),
        }
    }

    async fn describe(&self, id: &SandboxId, containers: &[String]) -> Result<()> {
        let containers = containers.to_vec();
        let node = self.inner.config.node.clone();
        let change = move |config: &mut LxcConfig, record: &mut Record| {
            // What somebody else wrote there stays.
            if config.description.as_deref().unwrap_or_default() != record.notes {
                return false;
            }
            let notes = config::notes(&record.named(), &node, &containers);
            if notes == record.notes {
                return false;
            }
            config.description = Some(notes.clone());
            record.notes = notes;
            true
        };
        self.inner.edit(id, change).await
    }

    async fn resize(&self, id: &SandboxId, limits: &Limits) -> Result<()> {
        let (limits, all) = (*limits, self.inner.config.memory_bytes);
        let cores = self.inner.config.cores;
        self.inner.edit(id, move |config, _| config::resize(config, &limits, all, cores)).await
    }

    fn fault(&self) -> Option<String> {
        self.inner.unchecked().map(|(_, why)| why)
    }

    async fn check(&self) -> Result<()> {
        let Some((required, _)) = self.inner.unchecked() else { return Ok(()) };
        let checked = required.check_again().await;
        self.inner.set_unchecked(checked.as_ref().err().map(|why| (required, check::reason(why))));
        checked
    }

    async fn look(&self) -> Result<Vec<Observation>> {
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.look()).await
    }
}

impl Inner {
    async fn state(self: &Arc<Self>, record: &Record) -> Result<SandboxState> {
        let pid = self.running(record).await?;
        Ok(pid.map_or(SandboxState::Stopped, |pid| SandboxState::Running { pid }))
    }
}
