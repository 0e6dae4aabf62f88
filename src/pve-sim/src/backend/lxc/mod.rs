//! The back end with real containers: liblxc's programs, ZFS volumes, systemd units where systemd is PID 1.

pub(crate) mod archive;
mod config;
pub(crate) mod hook;
mod stats;
mod unit;
mod zfs;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use parking_lot::Mutex;

use super::{
    Backend, Backup, Ct, Interface, Mount, MountSource, Room, RunState, Stop, Usage, VolumeInfo, tool::run,
};
use crate::{
    Error, Result,
    config::{LxcBackend, Storage},
    error::io,
    tasks::TaskLog,
};

/// How long a CT may take to come up.
const START: Duration = Duration::from_secs(120);
const QUICK: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);
/// A start looks at its unit each so many times that it looks for the CT.
const UNIT_LOOKS: u32 = 8;

/// liblxc on this machine. All simulated hosts share it: VMIDs are unique in the cluster.
#[derive(Debug)]
pub(crate) struct Lxc {
    config: LxcBackend,
    cpu: Mutex<HashMap<u32, (Instant, u64)>>,
}

impl Lxc {
    /// Makes sure of the unit that starts CTs.
    pub(crate) async fn open(config: &LxcBackend) -> Result<Self> {
        fs::create_dir_all(&config.lxcpath).map_err(io("create", &config.lxcpath))?;
        if unit::has_systemd() && !config.unit.is_empty() {
            unit::install(&config.unit, &config.lxcpath).await?;
        }
        Ok(Self { config: config.clone(), cpu: Mutex::default() })
    }

    fn dir(&self, vmid: u32) -> PathBuf {
        self.config.lxcpath.join(vmid.to_string())
    }

    fn by_unit(&self) -> bool {
        unit::has_systemd() && !self.config.unit.is_empty()
    }

    /// The pid of a CT's init, `None` if it does not run.
    async fn pid(&self, vmid: u32) -> Result<Option<u32>> {
        if !stats::is_active(&self.config.lxcpath, vmid) {
            return Ok(None);
        }
        let path = self.config.lxcpath.display().to_string();
        let asked = run("lxc-info", &["-P", &path, "-n", &vmid.to_string(), "-p", "-H"], QUICK).await;
        // It may have ended between the two looks.
        Ok(asked.ok().and_then(|text| text.trim().parse().ok()))
    }

    async fn wait_until_running(&self, vmid: u32, child: Option<&unit::Child>) -> Result<()> {
        let since = Instant::now();
        let path = self.config.lxcpath.display().to_string();
        for round in 1_u32.. {
            if since.elapsed() >= START {
                break;
            }
            if stats::is_active(&self.config.lxcpath, vmid) {
                let state = run("lxc-info", &["-P", &path, "-n", &vmid.to_string(), "-s", "-H"], QUICK).await;
                if state.is_ok_and(|s| s.trim() == "RUNNING") {
                    return Ok(());
                }
            }
            let ended = match child {
                Some(child) => child.has_ended(),
                // A program each time, which shall not take the processor from the start.
                None => round % UNIT_LOOKS == 0 && unit::has_failed(&self.config.unit, vmid).await,
            };
            if ended {
                break;
            }
            tokio::time::sleep(POLL).await;
        }
        Err(Error::Backend(format!("startup for container '{vmid}' failed")))
    }
}

#[async_trait]
impl Backend for Lxc {
    async fn state(&self, _: &str, vmid: u32) -> Result<RunState> {
        Ok(match self.pid(vmid).await? {
            Some(pid) => {
                RunState::Running { pid, since: stats::started(pid), frozen: stats::is_frozen(vmid) }
            }
            None => RunState::Stopped,
        })
    }

    async fn start(&self, ct: Ct<'_>, mounts: &[Mount], log: &TaskLog) -> Result<()> {
        let dir = self.dir(ct.vmid);
        let rootfs = dir.join("rootfs");
        fs::create_dir_all(&rootfs).map_err(io("create", &rootfs))?;
        for mount in mounts {
            if let MountSource::Subvolume { dataset, .. } = &mount.source {
                zfs::activate(dataset).await?;
            }
        }
        hook::write_mounts(&dir, mounts)?;
        config::write(&self.config, &dir, ct)?;
        // What is left of an earlier run would be in the way: a failed unit, a log.
        let errors = dir.join("stderr");
        let _ = fs::remove_file(&errors);
        let child = if self.by_unit() {
            unit::start(&self.config.unit, ct.vmid).await?;
            None
        } else {
            Some(unit::spawn(&self.config.lxcpath, ct.vmid, &errors)?)
        };
        let started = self.wait_until_running(ct.vmid, child.as_ref()).await;
        if started.is_err() {
            for line in unit::said(&self.config.unit, ct.vmid, &errors, self.by_unit()).lines() {
                log.line(line);
            }
        }
        started
    }

    async fn stop(&self, _: &str, vmid: u32, how: Stop, _: &TaskLog) -> Result<()> {
        if self.pid(vmid).await?.is_none() {
            return Ok(());
        }
        let (path, id) = (self.config.lxcpath.display().to_string(), vmid.to_string());
        let mut args = vec!["-P", path.as_str(), "-n", id.as_str()];
        let (seconds, limit);
        match how {
            Stop::Kill => {
                args.push("--kill");
                limit = QUICK;
            }
            Stop::Shutdown { seconds: wait, then_kill } => {
                seconds = wait.to_string();
                args.extend(["--timeout", seconds.as_str()]);
                if !then_kill {
                    args.push("--nokill");
                }
                limit = Duration::from_secs(wait) + QUICK;
            }
        }
        let stopped = run("lxc-stop", &args, limit).await;
        let since = Instant::now();
        while stats::is_active(&self.config.lxcpath, vmid) {
            if since.elapsed() > Duration::from_secs(5) {
                let why = stopped.err().map(|e| format!(": {e}")).unwrap_or_default();
                return Err(Error::Backend(format!("container did not stop{why}")));
            }
            tokio::time::sleep(POLL).await;
        }
        if self.by_unit() {
            unit::wait_until_inactive(&self.config.unit, vmid).await;
        }
        Ok(())
    }

    async fn freeze(&self, _: &str, vmid: u32, frozen: bool) -> Result<()> {
        let path = self.config.lxcpath.display().to_string();
        let program = if frozen { "lxc-freeze" } else { "lxc-unfreeze" };
        run(program, &["-P", &path, "-n", &vmid.to_string()], QUICK).await.map(|_| ())
    }

    async fn reconfigure(&self, ct: Ct<'_>) -> Result<()> {
        config::apply_limits(ct)
    }

    async fn interfaces(&self, ct: Ct<'_>) -> Result<Vec<Interface>> {
        match self.pid(ct.vmid).await? {
            Some(pid) => stats::interfaces(pid).await,
            None => Ok(Vec::new()),
        }
    }

    async fn usage(&self, ct: Ct<'_>) -> Result<Usage> {
        let Some(pid) = self.pid(ct.vmid).await? else { return Ok(Usage::default()) };
        let mut usage = stats::usage(ct.vmid, pid);
        let used = stats::cpu_micros(ct.vmid);
        let before = {
            let mut cpu = self.cpu.lock();
            cpu.insert(ct.vmid, (Instant::now(), used))
        };
        if let Some((at, earlier)) = before {
            let elapsed = at.elapsed().as_micros().max(1) as f64;
            usage.cpu = used.saturating_sub(earlier) as f64 / elapsed;
        }
        Ok(usage)
    }

    async fn forget(&self, _: &str, vmid: u32) -> Result<()> {
        self.cpu.lock().remove(&vmid);
        let dir = self.dir(vmid);
        // Nothing is mounted below it: the CT's root is mounted in its monitor's namespace alone.
        match fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io("remove", &dir)(e)),
            _ => Ok(()),
        }
    }

    async fn volumes(&self, _: &str, storage: &Storage) -> Result<Vec<VolumeInfo>> {
        match &storage.pool {
            Some(pool) => zfs::volumes(pool).await,
            None => Ok(storage.path.as_deref().map(templates).unwrap_or_default()),
        }
    }

    async fn create_volume(&self, node: &str, storage: &Storage, vmid: u32, size: u64) -> Result<String> {
        let taken = self.volumes(node, storage).await?;
        zfs::create(zfs::pool(storage)?, vmid, size, &taken).await
    }

    async fn copy_volume(
        &self,
        node: &str,
        storage: &Storage,
        volume: &str,
        vmid: u32,
        size: u64,
    ) -> Result<String> {
        let taken = self.volumes(node, storage).await?;
        zfs::copy(zfs::pool(storage)?, volume, vmid, size, &taken).await
    }

    fn dump_dir(&self, _: &str, storage: &Storage) -> Result<PathBuf> {
        let none = || Error::Backend(format!("storage '{}' has no directory", storage.name));
        storage.path.as_ref().map(|path| path.join("dump")).ok_or_else(none)
    }

    async fn back_up(&self, backup: Backup<'_>) -> Result<()> {
        archive::write(&self.config.hook_program(), backup).await
    }

    async fn snapshot_volume(&self, _: &str, storage: &Storage, volume: &str, name: &str) -> Result<()> {
        zfs::snapshot(zfs::pool(storage)?, volume, name).await
    }

    async fn delete_snapshot(&self, _: &str, storage: &Storage, volume: &str, name: &str) -> Result<()> {
        zfs::destroy_snapshot(zfs::pool(storage)?, volume, name).await
    }

    async fn unpack(
        &self,
        _: &str,
        storage: &Storage,
        volume: &str,
        archive: &Path,
        unprivileged: bool,
        log: &TaskLog,
    ) -> Result<()> {
        log.line(&format!("extracting archive '{}'", archive.display()));
        zfs::unpack(zfs::pool(storage)?, volume, archive, unprivileged).await
    }

    async fn destroy_volume(&self, _: &str, storage: &Storage, volume: &str) -> Result<()> {
        zfs::destroy(zfs::pool(storage)?, volume).await
    }

    async fn room(&self, _: &str, storage: &Storage) -> Result<Room> {
        match (&storage.pool, &storage.path) {
            (Some(pool), _) => zfs::room(pool).await,
            (None, Some(path)) => {
                let stat = rustix::fs::statvfs(path).map_err(|e| io("look at", path)(e.into()))?;
                let total = stat.f_blocks * stat.f_frsize;
                Ok(Room { total, used: total - stat.f_bfree * stat.f_frsize })
            }
            (None, None) => Err(Error::Backend(format!("storage '{}' has no place", storage.name))),
        }
    }
}

/// Archives below `template/cache` of a directory storage.
fn templates(path: &Path) -> Vec<VolumeInfo> {
    fs::read_dir(path.join("template/cache"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let format = [(".tar.zst", "tzst"), (".tar.gz", "tgz"), (".tar.xz", "txz")]
                .into_iter()
                .find(|(end, _)| name.ends_with(end))?
                .1;
            let size = entry.metadata().map_or(0, |m| m.len());
            Some(VolumeInfo {
                name: format!("vztmpl/{name}"),
                content: "vztmpl",
                format,
                size,
                used: size,
                vmid: None,
            })
        })
        .collect()
}
