//! The engine on plain liblxc.
//!
//! ```text
//! <dir>/root/             the CTs' common read-only root: mount points
//! <dir>/ct/<id>/config    one CT; written last, so a directory without it is half made
//! <dir>/ct/<id>/init.json the arguments of its init
//! <dir>/ct/<id>/lxc.log   what liblxc says about it, emptied at each start
//! ```
//!
//! `lxc-start` is the only program that is run. Its monitor outlives the agent in a session and cgroup of its own.
//! Everything about a running CT is read from cgroups and `/proc` (`find`) and done through pidfds.

mod config;
mod root;
mod tool;

pub use tool::LXC_PATH;

use std::{
    collections::HashMap,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use moxlet_ids::SandboxId;
use rustix::process::Signal;
use tokio::sync::OwnedMutexGuard;

use self::config::Surroundings;
use crate::{
    Engine, Error, IdMap, Result, SandboxInfo, SandboxSpec, SandboxState,
    cgroup::ContainerCgroups,
    error::io,
    find::{Found, find},
    process::{Process, read_bounded, tail},
    subid,
};

/// How long a killed process, or the monitor after its init, may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(10);
const ARGS_MAX: u64 = 1 << 20;
const LOCKS: &str = "/run/lxc/lock";

/// What the engine needs to know.
#[derive(Debug, Clone)]
pub struct LxcConfig {
    /// The engine's own directory: CT configurations and the CTs' common root.
    pub dir: PathBuf,
    /// The ids that CTs will use: their range is ensured in `/etc/subuid` and `/etc/subgid`.
    pub map: IdMap,
    /// Whether to add a missing range to those files (else it is an error).
    pub manage_subids: bool,
    /// How long a CT's start may take.
    pub start_timeout: Duration,
}

type Locks = Mutex<HashMap<SandboxId, Arc<tokio::sync::Mutex<()>>>>;

/// CTs by liblxc. Clones share their locks; two engines must not share a directory.
#[derive(Debug, Clone)]
pub struct LxcEngine {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    lxcpath: PathBuf,
    root: PathBuf,
    start_timeout: Duration,
    cgroups: ContainerCgroups,
    apparmor: bool,
    locks: Locks,
}

impl LxcEngine {
    /// Opens (and makes) the engine's directory, checks the host, clears what a crash left half made.
    pub async fn new(config: LxcConfig) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            return Err(Error::Host("CTs are started as root: run this as root".into()));
        }
        let dir = std::path::absolute(&config.dir).map_err(io("find", &config.dir))?;
        let (major, minor) = tool::version().await?;
        if major < 5 {
            return Err(Error::Host(format!("LXC {major}.{minor} is too old: install LXC 5.0 or newer")));
        }
        if read_bounded(Path::new("/proc/sys/user/max_user_namespaces"), 64)
            .is_ok_and(|text| text.trim() == "0")
        {
            return Err(Error::Host(
                "user namespaces are off: run `sysctl user.max_user_namespaces=65536`".into(),
            ));
        }
        subid::ensure(config.map, config.manage_subids)?;
        let (lxcpath, root) = (dir.join("ct"), dir.join("root"));
        root::make_dir(&dir, 0o711)?;
        root::make_dir(&lxcpath, 0o711)?;
        root::make(&root)?;
        root::check_reachable(&root.join("proc"))?;
        let apparmor = apparmor_enabled();
        if apparmor && !tool::is_installed("apparmor_parser") {
            return Err(Error::Host(
                "AppArmor is on but apparmor_parser is missing: install the package apparmor".into(),
            ));
        }
        let engine = Self {
            inner: Arc::new(Inner {
                lxcpath,
                root,
                start_timeout: config.start_timeout,
                cgroups: ContainerCgroups::detect()?,
                apparmor,
                locks: Locks::default(),
            }),
        };
        for id in engine.inner.ids()? {
            if !engine.inner.file(&id, "config").exists() {
                tracing::warn!(sandbox = %id, "removing a half-made CT");
                engine.delete(&id).await?;
            }
        }
        Ok(engine)
    }

    /// Removes the engine's directory and liblxc's lock files of it. Fails while there is a CT.
    pub async fn remove_directory(&self) -> Result<()> {
        if let Some(id) = self.inner.ids()?.first() {
            return Err(Error::Exists(id.to_string()));
        }
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            let locks = inner.lock_dir();
            for dir in [locks.as_path(), &inner.lxcpath, &inner.root] {
                remove_all(dir)?;
            }
            // Directories that liblxc made above its lock files, and our own: gone if nothing else is in them.
            for dir in
                locks.ancestors().skip(1).take_while(|d| d.starts_with(LOCKS) && *d != Path::new(LOCKS))
            {
                if fs::remove_dir(dir).is_err() {
                    break;
                }
            }
            if let Some(dir) = inner.root.parent() {
                let _ = fs::remove_dir(dir);
            }
            Ok(())
        })
        .await
    }
}

/// Runs what may block for some milliseconds (cgroup files, `/proc`) away from the runtime's threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(Error::Host(format!("a helper thread ended: {e}"))),
    }
}

fn apparmor_enabled() -> bool {
    read_bounded(Path::new("/sys/module/apparmor/parameters/enabled"), 16)
        .is_ok_and(|text| text.starts_with('Y'))
}

fn remove_all(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(io("remove", dir)(e)),
    }
}

impl Inner {
    fn dir(&self, id: &SandboxId) -> PathBuf {
        self.lxcpath.join(id.as_str())
    }

    fn file(&self, id: &SandboxId, name: &str) -> PathBuf {
        self.dir(id).join(name)
    }

    fn lock_dir(&self) -> PathBuf {
        Path::new(LOCKS).join(self.lxcpath.strip_prefix("/").unwrap_or(&self.lxcpath))
    }

    fn ids(&self) -> Result<Vec<SandboxId>> {
        let entries = fs::read_dir(&self.lxcpath).map_err(io("list", &self.lxcpath))?;
        Ok(entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
    }

    /// One operation on a CT at a time.
    async fn lock(&self, id: &SandboxId) -> OwnedMutexGuard<()> {
        let mutex = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(locks.entry(id.clone()).or_default())
        };
        mutex.lock_owned().await
    }

    fn write(&self, spec: &SandboxSpec) -> Result<()> {
        for path in [&spec.shared_dir, &spec.init_binary] {
            root::check_reachable(path)?;
        }
        let dir = self.dir(&spec.id);
        let (config, log) = (dir.join("config"), dir.join("lxc.log"));
        if config.exists() {
            return Err(Error::Exists(spec.id.to_string()));
        }
        let text = config::render(
            spec,
            &Surroundings {
                root: &self.root,
                log: &log,
                cgroup_v1: self.cgroups.is_v1(),
                limits: self.cgroups.lxc_limits(&spec.limits),
                apparmor: self.apparmor,
            },
        )?;
        let args = serde_json::to_vec(&spec.init_args).unwrap_or_default();
        root::make_dir(&dir, 0o700)?;
        let files = || {
            let (args_path, new) = (dir.join("init.json"), dir.join("config.new"));
            fs::write(&args_path, args).map_err(io("write", args_path))?;
            fs::write(&new, text).map_err(io("write", &new))?;
            fs::rename(&new, &config).map_err(io("write", &config))
        };
        files().inspect_err(|_| {
            let _ = fs::remove_dir_all(&dir);
        })
    }

    async fn start(self: &Arc<Self>, id: &SandboxId) -> Result<u32> {
        if !self.file(id, "config").exists() {
            return Err(Error::NotFound(id.to_string()));
        }
        if let Some(pid) = find(&self.cgroups, id).init {
            return Ok(pid);
        }
        let args_path = self.file(id, "init.json");
        let args = read_bounded(&args_path, ARGS_MAX).map_err(io("read", &args_path))?;
        let args: Vec<String> = serde_json::from_str(&args).map_err(|e| io("read", &args_path)(e.into()))?;
        self.clear(id).await?;
        let log = self.file(id, "lxc.log");
        let started = tool::start(&tool::Start {
            lxcpath: &self.lxcpath,
            id,
            init_args: &args,
            log: &log,
            errors: &self.file(id, "start.log"),
            limit: self.start_timeout,
        })
        .await;
        let found = started.and_then(|()| match find(&self.cgroups, id).init {
            Some(pid) if self.cgroups.is_in_place(id, pid) => Ok(pid),
            Some(_) => {
                Err(Error::Host(format!("liblxc did not put CT {id} into the cgroup lxc.payload.{id}")))
            }
            None => Err(Error::Tool {
                program: "init".into(),
                ct: id.to_string(),
                status: "ended at once".into(),
                tail: tail(&log, 1500),
            }),
        });
        if found.is_err() {
            self.clear(id).await?;
        }
        found
    }

    /// Kills whatever is left of a CT and removes its cgroups.
    async fn clear(self: &Arc<Self>, id: &SandboxId) -> Result<()> {
        let (inner, id) = (Arc::clone(self), id.clone());
        blocking(move || inner.cgroups.clear_sandbox(&id)).await
    }

    /// Opens the init of a CT so that it cannot be mistaken for another process.
    fn open_init(&self, id: &SandboxId) -> Result<Option<Process>> {
        let Found { init: Some(pid), .. } = find(&self.cgroups, id) else { return Ok(None) };
        let process = Process::open(pid).map_err(io("open the process", format!("/proc/{pid}")))?;
        // The number may have passed on to another process between the look and the opening.
        Ok(process.filter(|_| find(&self.cgroups, id).init == Some(pid)))
    }

    /// Kills a CT's init, waits for the monitor to tidy up, and does what it left undone.
    async fn kill(self: &Arc<Self>, id: &SandboxId) -> Result<()> {
        let monitors = find(&self.cgroups, id).monitors;
        if let Some(process) = self.open_init(id)? {
            process.signal(Signal::KILL).map_err(io("kill", self.dir(id)))?;
            if !process.ended_within(KILL_LIMIT).await {
                let seconds = KILL_LIMIT.as_secs();
                return Err(Error::Timeout {
                    what: "the end of the init",
                    ct: id.to_string(),
                    seconds,
                    tail: String::new(),
                });
            }
        }
        for pid in monitors {
            if let Ok(Some(process)) = Process::open(pid)
                && find(&self.cgroups, id).monitors.contains(&pid)
                && !process.ended_within(KILL_LIMIT).await
            {
                tracing::warn!(sandbox = %id, pid, "liblxc's monitor did not end; killing it");
            }
        }
        self.clear(id).await
    }
}

#[async_trait]
impl Engine for LxcEngine {
    async fn create(&self, spec: &SandboxSpec) -> Result<()> {
        let _lock = self.inner.lock(&spec.id).await;
        self.inner.write(spec)
    }

    async fn start(&self, id: &SandboxId) -> Result<u32> {
        let _lock = self.inner.lock(id).await;
        self.inner.start(id).await
    }

    async fn stop(&self, id: &SandboxId, grace: Duration) -> Result<()> {
        if !self.inner.dir(id).exists() {
            return Ok(());
        }
        // Not under the lock: a delete in the meantime shall not wait for the grace time.
        if !grace.is_zero()
            && let Some(process) = self.inner.open_init(id)?
        {
            process.signal(Signal::TERM).map_err(io("signal", self.inner.dir(id)))?;
            process.ended_within(grace).await;
        }
        let _lock = self.inner.lock(id).await;
        self.inner.kill(id).await
    }

    async fn delete(&self, id: &SandboxId) -> Result<()> {
        let _lock = self.inner.lock(id).await;
        let dir = self.inner.dir(id);
        if !dir.exists() {
            return Ok(());
        }
        self.inner.kill(id).await?;
        remove_all(&dir)?;
        let _ = fs::remove_file(self.inner.lock_dir().join(format!(".{id}")));
        Ok(())
    }

    async fn list(&self) -> Result<Vec<SandboxInfo>> {
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            let mut all: Vec<_> =
                inner.ids()?.into_iter().map(|id| SandboxInfo { state: inner.state(&id), id }).collect();
            all.sort_by(|a, b| a.id.cmp(&b.id));
            Ok(all)
        })
        .await
    }

    async fn state(&self, id: &SandboxId) -> Result<Option<SandboxState>> {
        Ok(self.inner.dir(id).exists().then(|| self.inner.state(id)))
    }

    async fn wait(&self, id: &SandboxId) -> Result<()> {
        while let Some(process) = self.inner.open_init(id)? {
            process.ended().await.map_err(io("wait for", self.inner.dir(id)))?;
        }
        Ok(())
    }
}

impl Inner {
    fn state(&self, id: &SandboxId) -> SandboxState {
        find(&self.cgroups, id).init.map_or(SandboxState::Stopped, |pid| SandboxState::Running { pid })
    }
}
