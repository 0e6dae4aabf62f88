//! Limits and figures of a CT's containers, seen from the host.
//!
//! liblxc puts a CT's processes into the cgroup `lxc.payload.<sandbox>` (its monitor into `lxc.monitor.<sandbox>`)
//! below the cgroup of the host's PID 1; a container of the pod has the cgroup `<container>` in it.
//!
//! On Proxmox VE a CT has its limits in `lxc/<vmid>`, and `lxc/<vmid>/ns` is what it takes for its root.
//!
//! * cgroup v1 (and the hybrid layout): a CT's root would own the limits of what it makes itself, so the host makes
//!   the container's cgroup, writes the limits and gives the CT's root only `cgroup.procs` and `tasks`.
//! * cgroup v2: moxlet-init hands the controllers down and libcontainer writes the limits; here are only figures.

mod hierarchy;
pub(crate) mod memory;

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use moxlet_ids::{ContainerId, SandboxId, Vmid};

use self::hierarchy::{Hierarchy, Names};
use crate::{
    Error, IdMap, Limits, Result,
    process::{kill_now, read_bounded},
};

/// The CFS period where none is given.
pub const DEFAULT_PERIOD_US: u64 = 100_000;
const FILE_MAX: u64 = 64 * 1024;

/// What a CT or container uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// CPU time since the start.
    pub cpu_ns: u64,
    /// All memory charged, page cache included.
    pub memory_usage: u64,
    /// Memory without the page cache that can go at once.
    pub memory_working_set: u64,
    /// Anonymous memory.
    pub memory_rss: u64,
    /// Processes and threads.
    pub pids: u64,
}

/// The cgroups of CTs on this host.
#[derive(Debug, Clone)]
pub struct ContainerCgroups {
    hierarchies: Vec<Hierarchy>,
    v1: bool,
    /// The numbers of CTs whose cgroups are named by them; none: they are named by their sandboxes.
    numbers: Option<Numbers>,
}

/// Which CT of Proxmox VE a sandbox has. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Numbers(Arc<RwLock<HashMap<SandboxId, Vmid>>>);

impl Numbers {
    /// The number of a sandbox' CT.
    #[must_use]
    pub fn get(&self, sandbox: &SandboxId) -> Option<Vmid> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(sandbox).copied()
    }

    pub(crate) fn put(&self, sandbox: &SandboxId, vmid: Vmid) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(sandbox.clone(), vmid);
    }

    pub(crate) fn remove(&self, sandbox: &SandboxId) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(sandbox);
    }
}

impl ContainerCgroups {
    /// Finds out how this host's cgroups are mounted; those of CTs are named as liblxc does by itself.
    pub fn detect() -> Result<Self> {
        let hierarchies = hierarchy::detect()?;
        let v1 = hierarchies.iter().any(|h| !h.v2 && h.has("memory"));
        Ok(Self { hierarchies, v1, numbers: None })
    }

    /// The same for CTs of Proxmox VE, which are named by their numbers.
    pub fn numbered(numbers: Numbers) -> Result<Self> {
        Ok(Self { numbers: Some(numbers), ..Self::detect()? })
    }

    fn names(&self, sandbox: &SandboxId) -> Names {
        match &self.numbers {
            None => Names::of_lxc(sandbox),
            Some(numbers) => numbers.get(sandbox).map_or_else(Names::of_nothing, Names::of_pve),
        }
    }

    /// Whether a CT is frozen as a whole.
    pub(crate) fn is_frozen(&self, sandbox: &SandboxId) -> bool {
        let names = self.names(sandbox);
        let v2 = self.hierarchies.iter().filter(|h| h.v2);
        // A frozen ancestor freezes as well, so either of the two may have been told.
        v2.flat_map(|h| [h.whole(&names), h.payload(&names)])
            .any(|dir| read(&dir.join("cgroup.events")).is_ok_and(|text| field(&text, "frozen") == 1))
    }

    /// Whether cgroup v1 controllers are in use (alone or in the hybrid layout).
    #[must_use]
    pub fn is_v1(&self) -> bool {
        self.v1
    }

    /// v1: makes the container's cgroup with its limits below its CT's; v2: nothing. Made again it gets the limits anew.
    pub fn create(
        &self,
        sandbox: &SandboxId,
        container: &ContainerId,
        limits: &Limits,
        map: IdMap,
    ) -> Result<()> {
        if !self.v1 {
            return Ok(());
        }
        let made = self
            .hierarchies
            .iter()
            .filter(|h| h.holds_controllers())
            .try_for_each(|h| create_in(h, &h.payload(&self.names(sandbox)), container, map))
            .and_then(|()| self.update(sandbox, Some(container), limits));
        if made.is_err() {
            let _ = self.remove(sandbox, container);
        }
        made
    }

    /// Changes the limits of a container, or of the CT as a whole; what is `None` stays as it is. A CT of Proxmox VE gets what it
    /// would have by its configuration.
    pub fn update(
        &self,
        sandbox: &SandboxId,
        container: Option<&ContainerId>,
        limits: &Limits,
    ) -> Result<()> {
        let mut rest = *limits;
        let of_pve = container.is_none() && self.numbers.is_some() && !self.v1;
        if of_pve && let Some(bytes) = rest.memory_bytes.take() {
            memory::resize(&self.dir("memory", sandbox, None)?, bytes)?;
        }
        for (controller, file, value) in limit_files(&rest, self.v1) {
            let dir = self.dir(controller, sandbox, container)?;
            let path = dir.join(file);
            if file.contains("memsw") || file.contains("swap") {
                // A kernel without swap accounting has no such file.
                if path.exists() {
                    write(&path, &value)?;
                }
                continue;
            }
            let written = write(&path, &value);
            if let (Err(Error::Cgroup { source, .. }), "memory.limit_in_bytes") = (&written, file)
                && source.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error())
            {
                // v1 refuses a limit over that of memory and swap: raise that one first.
                write(&dir.join("memory.memsw.limit_in_bytes"), &value)?;
                write(&path, &value)?;
            } else {
                written?;
            }
        }
        Ok(())
    }

    /// Removes the container's cgroup, killing what is still in it. Idempotent; may block for some milliseconds.
    pub fn remove(&self, sandbox: &SandboxId, container: &ContainerId) -> Result<()> {
        self.hierarchies
            .iter()
            .try_for_each(|h| clear(&h.payload(&self.names(sandbox)).join(container.as_str())))
    }

    /// What a container, or the CT as a whole, uses. [`Error::NoCgroup`] if it does not run (any more).
    pub fn stats(&self, sandbox: &SandboxId, container: Option<&ContainerId>) -> Result<Stats> {
        let memory = self.dir("memory", sandbox, container)?;
        let stat = read(&memory.join("memory.stat"))?;
        let (usage, inactive, anon) = if self.v1 {
            ("memory.usage_in_bytes", "total_inactive_file", "total_rss")
        } else {
            ("memory.current", "inactive_file", "anon")
        };
        let memory_usage = number(&memory.join(usage))?;
        let cpu_ns = if self.v1 {
            number(&self.dir("cpuacct", sandbox, container)?.join("cpuacct.usage"))?
        } else {
            field(&read(&self.dir("cpu", sandbox, container)?.join("cpu.stat"))?, "usage_usec") * 1000
        };
        Ok(Stats {
            cpu_ns,
            memory_usage,
            memory_working_set: memory_usage.saturating_sub(field(&stat, inactive)),
            memory_rss: field(&stat, anon),
            pids: number(&self.dir("pids", sandbox, container)?.join("pids.current"))?,
        })
    }

    /// How many processes of a container (or, v1, of the CT outside containers; v2, of the whole CT) the OOM killer took.
    pub fn oom_kills(&self, sandbox: &SandboxId, container: Option<&ContainerId>) -> Result<u64> {
        let file = if self.v1 { "memory.oom_control" } else { "memory.events" };
        Ok(field(&read(&self.dir("memory", sandbox, container)?.join(file))?, "oom_kill"))
    }

    /// The LXC configuration keys and values that put `limits` on a whole CT.
    pub(crate) fn lxc_limits(&self, limits: &Limits) -> Vec<(String, String)> {
        let prefix = if self.v1 { "lxc.cgroup" } else { "lxc.cgroup2" };
        limit_files(limits, self.v1)
            .into_iter()
            .filter(|(controller, file, _)| {
                let swap = file.contains("memsw") || file.contains("swap");
                !swap || self.hierarchies.iter().any(|h| h.has(controller) && h.swap_accounting)
            })
            .map(|(_, file, value)| (format!("{prefix}.{file}"), value))
            .collect()
    }

    /// Kills what is left in a CT's cgroups (monitor included) and removes them. Idempotent.
    pub(crate) fn clear_sandbox(&self, sandbox: &SandboxId) -> Result<()> {
        for hierarchy in &self.hierarchies {
            for dir in hierarchy.all_of(&self.names(sandbox)) {
                clear(&dir)?;
            }
        }
        Ok(())
    }

    /// Whether a process is in the CT's payload cgroup under the very name that the other functions look for.
    pub(crate) fn is_in_place(&self, sandbox: &SandboxId, pid: u32) -> bool {
        let wanted = format!("/lxc.payload.{sandbox}");
        read_bounded(Path::new(&format!("/proc/{pid}/cgroup")), FILE_MAX).is_ok_and(|text| {
            !text.is_empty()
                && text.lines().all(|line| line.contains(&wanted) && !line.contains(&format!("{wanted}-")))
        })
    }

    /// The processes of liblxc's monitors of a CT.
    pub(crate) fn monitor_processes(&self, sandbox: &SandboxId) -> Vec<u32> {
        let Some(hierarchy) = self.hierarchies.first() else { return Vec::new() };
        hierarchy.monitors(&self.names(sandbox)).iter().flat_map(|dir| processes(dir)).collect()
    }

    /// The processes of a CT, those of its containers included, in no useful order.
    pub(crate) fn payload_processes(&self, sandbox: &SandboxId) -> Vec<u32> {
        let Some(hierarchy) = self.hierarchies.first() else { return Vec::new() };
        let mut dirs = Vec::new();
        for dir in hierarchy.payloads(&self.names(sandbox)) {
            collect(&dir, &mut dirs, 0);
        }
        dirs.iter().flat_map(|dir| processes(dir)).collect()
    }

    /// The processes of a container as the host numbers them; none if it has no cgroup.
    #[must_use]
    pub fn processes_of(&self, sandbox: &SandboxId, container: &ContainerId) -> Vec<u32> {
        self.dir("memory", sandbox, Some(container)).map(|dir| processes(&dir)).unwrap_or_default()
    }

    /// A container's cgroup as seen in its CT, whose cgroup namespace begins at the CT's own cgroup: the OCI spec's
    /// `linux.cgroupsPath`.
    #[must_use]
    pub fn path_in_ct(container: &ContainerId) -> String {
        format!("/{container}")
    }

    fn dir(&self, controller: &str, sandbox: &SandboxId, container: Option<&ContainerId>) -> Result<PathBuf> {
        let hierarchy = self
            .hierarchies
            .iter()
            .find(|h| if self.v1 { !h.v2 && h.has(controller) } else { h.v2 })
            .ok_or_else(|| Error::Host(format!("the kernel has no cgroup controller {controller}")))?;
        let names = self.names(sandbox);
        Ok(match container {
            Some(container) => hierarchy.payload(&names).join(container.as_str()),
            None => hierarchy.whole(&names),
        })
    }
}

/// Sets a process' `oom_score_adj` from the host. Where the kernel refuses to go that low (no `CAP_SYS_RESOURCE`) it
/// goes as low as allowed. Returns what the process has now.
pub fn set_oom_score_adj(pid: u32, adj: i32) -> Result<i32> {
    let adj = adj.clamp(-1000, 1000);
    let path = PathBuf::from(format!("/proc/{pid}/oom_score_adj"));
    let put = |value: i32| std::fs::write(&path, value.to_string());
    match put(adj) {
        Ok(()) => return Ok(adj),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {}
        Err(e) => return Err(crate::error::io("write", path)(e)),
    }
    let now: i32 =
        read_bounded(&path, 64).map_err(crate::error::io("read", &path))?.trim().parse().unwrap_or(0);
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        tracing::warn!(
            wanted = adj,
            "the kernel refuses to lower oom_score_adj that far; it is set as low as allowed"
        );
    });
    if now > 0 && put(adj.max(0)).is_ok() {
        return Ok(adj.max(0));
    }
    Ok(now)
}

/// cgroup v1 CPU shares as a v2 weight, the conversion of the OCI runtimes.
#[must_use]
pub fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// Controller, file and text of each limit, in the order in which they can be written to a new cgroup.
fn limit_files(limits: &Limits, v1: bool) -> Vec<(&'static str, &'static str, String)> {
    let mut files = Vec::new();
    if let Some(bytes) = limits.memory_bytes {
        if v1 {
            files.push(("memory", "memory.limit_in_bytes", bytes.to_string()));
            files.push(("memory", "memory.memsw.limit_in_bytes", bytes.to_string()));
        } else {
            files.push(("memory", "memory.max", bytes.to_string()));
            files.push(("memory", "memory.swap.max", "0".to_owned()));
        }
    }
    let period = limits.cpu_period_us.unwrap_or(DEFAULT_PERIOD_US);
    match (limits.cpu_quota_us, v1) {
        (Some(quota), true) => {
            files.push(("cpu", "cpu.cfs_period_us", period.to_string()));
            files.push(("cpu", "cpu.cfs_quota_us", if quota > 0 { quota.to_string() } else { "-1".into() }));
        }
        (Some(quota), false) => {
            let quota = if quota > 0 { quota.to_string() } else { "max".into() };
            files.push(("cpu", "cpu.max", format!("{quota} {period}")));
        }
        (None, _) => {}
    }
    match (limits.cpu_shares.filter(|s| *s > 0), v1) {
        (Some(shares), true) => files.push(("cpu", "cpu.shares", shares.clamp(2, 262_144).to_string())),
        (Some(shares), false) => files.push(("cpu", "cpu.weight", weight_of_shares(shares).to_string())),
        (None, _) => {}
    }
    if let Some(pids) = limits.pids {
        files.push(("pids", "pids.max", if pids == 0 { "max".into() } else { pids.to_string() }));
    }
    files
}

fn create_in(hierarchy: &Hierarchy, parent: &Path, container: &ContainerId, map: IdMap) -> Result<()> {
    let dir = parent.join(container.as_str());
    match std::fs::create_dir(&dir) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            // One that the CT made itself would have limits that the CT owns.
            let owner = std::fs::metadata(&dir).map_err(|e| cgroup_error("look at", &dir, e))?;
            if std::os::unix::fs::MetadataExt::uid(&owner) != 0 {
                clear(&dir)?;
                std::fs::create_dir(&dir).map_err(|e| cgroup_error("create", &dir, e))?;
            }
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(Error::NoCgroup(parent.to_owned())),
        Err(e) => return Err(cgroup_error("create", &dir, e)),
    }
    if hierarchy.has("cpuset") {
        for file in ["cpuset.cpus", "cpuset.mems"] {
            write(&dir.join(file), read(&parent.join(file))?.trim())?;
        }
    }
    for file in ["cgroup.procs", "tasks"] {
        let path = dir.join(file);
        std::os::unix::fs::chown(&path, Some(map.host_base), Some(map.host_base))
            .map_err(|e| cgroup_error("hand over", &path, e))?;
    }
    Ok(())
}

/// Removes a cgroup and those below it, killing what is in them.
fn clear(dir: &Path) -> Result<()> {
    const TRIES: u32 = 200;
    for attempt in 0..TRIES {
        let mut dirs = Vec::new();
        collect(dir, &mut dirs, 0);
        // Deepest first.
        let mut busy = None;
        for dir in dirs.iter().rev() {
            match std::fs::remove_dir(dir) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) if e.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => {
                    busy = Some(cgroup_error("remove", dir, e));
                    processes(dir).into_iter().for_each(kill_now);
                }
                Err(e) => return Err(cgroup_error("remove", dir, e)),
            }
        }
        match busy {
            None => return Ok(()),
            Some(error) if attempt + 1 == TRIES => return Err(error),
            Some(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    Ok(())
}

fn processes(dir: &Path) -> Vec<u32> {
    let text = read(&dir.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.trim().parse().ok()).filter(|pid| *pid != 0).collect()
}

fn collect(dir: &Path, into: &mut Vec<PathBuf>, depth: u32) {
    if depth > 32 || into.len() > 10_000 {
        return;
    }
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    into.push(dir.to_owned());
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            collect(&entry.path(), into, depth + 1);
        }
    }
}

fn cgroup_error(what: &'static str, path: &Path, source: io::Error) -> Error {
    if source.kind() == io::ErrorKind::NotFound
        && let Some(dir) = path.parent()
        && !dir.exists()
    {
        return Error::NoCgroup(dir.to_owned());
    }
    Error::Cgroup { what, path: path.to_owned(), source }
}

fn write(path: &Path, value: &str) -> Result<()> {
    std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
        .map_err(|e| cgroup_error("write", path, e))
}

fn read(path: &Path) -> Result<String> {
    read_bounded(path, FILE_MAX).map_err(|e| {
        let gone = e.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error());
        match path.parent() {
            Some(dir) if gone => Error::NoCgroup(dir.to_owned()),
            _ => cgroup_error("read", path, e),
        }
    })
}

fn number(path: &Path) -> Result<u64> {
    Ok(read(path)?.trim().parse().unwrap_or(0))
}

/// The value of a `name value` line, 0 if there is none.
fn field(text: &str, name: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find_map(|(key, value)| (key == name).then(|| value.trim().parse().unwrap_or(0)))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn all() -> Limits {
        Limits {
            memory_bytes: Some(64 << 20),
            cpu_quota_us: Some(50_000),
            cpu_period_us: None,
            cpu_shares: Some(512),
            pids: Some(100),
        }
    }

    #[test]
    fn limits_become_the_files_of_each_version() {
        let v1: Vec<_> = limit_files(&all(), true).into_iter().map(|(_, f, v)| format!("{f}={v}")).collect();
        assert_eq!(
            v1,
            [
                "memory.limit_in_bytes=67108864",
                "memory.memsw.limit_in_bytes=67108864",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=50000",
                "cpu.shares=512",
                "pids.max=100"
            ]
        );
        let v2: Vec<_> = limit_files(&all(), false).into_iter().map(|(_, f, v)| format!("{f}={v}")).collect();
        assert_eq!(
            v2,
            [
                "memory.max=67108864",
                "memory.swap.max=0",
                "cpu.max=50000 100000",
                "cpu.weight=20",
                "pids.max=100"
            ]
        );
        assert!(limit_files(&Limits::default(), true).is_empty());
        let unlimited = Limits { cpu_quota_us: Some(-1), ..Limits::default() };
        assert_eq!(limit_files(&unlimited, false)[0].2, "max 100000");
    }

    /// A CT of Proxmox VE whose cgroup is a directory of files.
    fn of_pve(base: &Path) -> (ContainerCgroups, SandboxId, PathBuf) {
        let (numbers, id) = (Numbers::default(), SandboxId::random());
        numbers.put(&id, Vmid::MIN);
        let dir = base.join("lxc/100");
        std::fs::create_dir_all(dir.join("ns")).unwrap();
        for file in ["memory.max", "memory.high", "cpu.max", "cpu.weight", "pids.max"] {
            std::fs::write(dir.join(file), "max").unwrap();
        }
        (
            ContainerCgroups {
                hierarchies: vec![Hierarchy::unified(base)],
                v1: false,
                numbers: Some(numbers),
            },
            id,
            dir,
        )
    }

    #[test]
    fn a_ct_of_proxmox_ve_that_is_resized_has_both_bounds_as_after_a_start() {
        let base = tempfile::tempdir().unwrap();
        let (cgroups, id, dir) = of_pve(base.path());
        let has = |file: &str| std::fs::read_to_string(dir.join(file)).unwrap();
        // 64 MiB of memory.high are 65 MiB of memory.max, which is written in whole MiB.
        cgroups.update(&id, None, &all()).unwrap();
        assert_eq!((has("memory.max"), has("memory.high")), ("68157440".into(), "67624960".into()));
        assert_eq!((has("cpu.max"), has("pids.max")), ("50000 100000".into(), "100".into()));
        let others = Limits { pids: Some(200), ..Limits::default() };
        cgroups.update(&id, None, &others).unwrap();
        assert_eq!((has("memory.high"), has("pids.max")), ("67624960".into(), "200".into()));
    }

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "total_rss_huge 1\ntotal_rss 4096\noom_kill 2\n";
        assert_eq!(field(text, "total_rss"), 4096);
        assert_eq!(field(text, "oom_kill"), 2);
        assert_eq!(field(text, "none"), 0);
    }

    #[test]
    fn the_default_weight_is_that_of_the_default_shares() {
        assert_eq!(weight_of_shares(2), 1);
        assert_eq!(weight_of_shares(1024), 39);
        assert_eq!(weight_of_shares(1_000_000), 10_000);
    }

    #[test]
    fn an_absent_cgroup_is_told_from_an_error() {
        let cgroups = ContainerCgroups::detect().unwrap();
        let id = SandboxId::random();
        assert!(matches!(cgroups.stats(&id, None), Err(Error::NoCgroup(_))));
        assert!(cgroups.remove(&id, &ContainerId::random()).is_ok());
    }
}
