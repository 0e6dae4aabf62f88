//! Where the cgroup hierarchies are mounted and where in them liblxc puts CTs.

use std::path::{Path, PathBuf};

use moxlet_ids::{SandboxId, Vmid};

use crate::{Error, Result, error::io, process::read_bounded};

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hierarchy {
    /// The directory below which liblxc makes CTs' cgroups: that of the host's PID 1.
    base: PathBuf,
    /// The v1 controllers of it (or `name=…`); empty for v2.
    controllers: Vec<String>,
    /// Whether it is the v2 hierarchy.
    pub(super) v2: bool,
    /// Whether swap can be limited in it.
    pub(super) swap_accounting: bool,
}

impl Hierarchy {
    /// One of v2 whose CTs are below this directory.
    #[cfg(test)]
    pub(super) fn unified(base: &Path) -> Self {
        Self { base: base.to_owned(), controllers: Vec::new(), v2: true, swap_accounting: false }
    }

    /// Whether a controller belongs to it; the v2 hierarchy claims all.
    pub(super) fn has(&self, controller: &str) -> bool {
        self.v2 || self.controllers.iter().any(|c| c == controller)
    }

    /// Whether it is a v1 hierarchy that limits something, not a named one.
    pub(super) fn holds_controllers(&self) -> bool {
        !self.v2 && !self.controllers.iter().any(|c| c.starts_with("name="))
    }

    /// The cgroup of a CT's processes.
    pub(super) fn payload(&self, names: &Names) -> PathBuf {
        self.base.join(&names.payload)
    }

    /// The cgroup that has a CT's limits.
    pub(super) fn whole(&self, names: &Names) -> PathBuf {
        self.base.join(&names.whole)
    }

    /// All cgroups of a CT that are there, monitor and numbered ones (liblxc's evasion of left ones) included.
    pub(super) fn all_of(&self, names: &Names) -> Vec<PathBuf> {
        self.existing(names, &[&names.whole, &names.monitor])
    }

    /// The cgroups of a CT's processes without those of its containers; numbered ones included.
    pub(super) fn payloads(&self, names: &Names) -> Vec<PathBuf> {
        self.existing(names, &[&names.payload])
    }

    /// The cgroups of a CT's monitors.
    pub(super) fn monitors(&self, names: &Names) -> Vec<PathBuf> {
        self.existing(names, &[&names.monitor])
    }

    fn existing(&self, names: &Names, wanted: &[&String]) -> Vec<PathBuf> {
        if !names.numbered {
            return wanted.iter().map(|name| self.base.join(name)).filter(|dir| dir.is_dir()).collect();
        }
        let Ok(entries) = std::fs::read_dir(&self.base) else { return Vec::new() };
        entries
            .flatten()
            .filter(|entry| {
                let name = entry.file_name();
                let Some(name) = name.to_str() else { return false };
                wanted.iter().any(|n| {
                    name.strip_prefix(n.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
                })
            })
            .map(|entry| entry.path())
            .collect()
    }
}

/// What the cgroups of a CT are called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Names {
    /// What has the limits.
    whole: String,
    /// What the CT takes for its root: `whole`, or below it.
    payload: String,
    /// Of the monitor.
    monitor: String,
    /// Whether liblxc may have appended a number.
    numbered: bool,
}

impl Names {
    /// As liblxc names them by itself.
    pub(super) fn of_lxc(sandbox: &SandboxId) -> Self {
        let whole = format!("lxc.payload.{sandbox}");
        Self { payload: whole.clone(), whole, monitor: format!("lxc.monitor.{sandbox}"), numbered: true }
    }

    /// As Proxmox VE names them.
    pub(super) fn of_pve(vmid: Vmid) -> Self {
        Self {
            whole: format!("lxc/{vmid}"),
            payload: format!("lxc/{vmid}/ns"),
            monitor: format!("lxc.monitor/{vmid}"),
            numbered: false,
        }
    }

    /// Of a CT that there is none of.
    pub(super) fn of_nothing() -> Self {
        Self {
            whole: "lxc/none".into(),
            payload: "lxc/none/ns".into(),
            monitor: "lxc.monitor/none".into(),
            numbered: false,
        }
    }
}

/// Reads this host's layout.
pub(super) fn detect() -> Result<Vec<Hierarchy>> {
    let mounts = Path::new("/proc/self/mountinfo");
    let first = Path::new("/proc/1/cgroup");
    let mut found = parse(
        &read_bounded(mounts, 4 << 20).map_err(io("read", mounts))?,
        &read_bounded(first, 64 << 10).map_err(io("read", first))?,
    );
    if found.is_empty() {
        return Err(Error::Host("no cgroup hierarchy is mounted below /sys/fs/cgroup".into()));
    }
    for hierarchy in &mut found {
        hierarchy.swap_accounting = swap_accounting(hierarchy);
    }
    Ok(found)
}

/// The root of v1 has the file; in v2 only the cgroups below it, if there are any.
fn swap_accounting(hierarchy: &Hierarchy) -> bool {
    if !hierarchy.v2 {
        return hierarchy.base.join("memory.memsw.limit_in_bytes").exists();
    }
    let Ok(entries) = std::fs::read_dir(&hierarchy.base) else { return false };
    entries.flatten().any(|entry| entry.path().join("memory.swap.max").exists())
}

fn parse(mountinfo: &str, cgroup_of_first: &str) -> Vec<Hierarchy> {
    let base_of = |wanted: &dyn Fn(&str) -> bool| {
        cgroup_of_first.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            wanted(controllers)
                .then(|| path.trim_end_matches("/init.scope").trim_start_matches('/').to_owned())
        })
    };
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let left: Vec<&str> = left.split(' ').collect();
        let right: Vec<&str> = right.split(' ').collect();
        let (Some(root), Some(target), Some(kind), Some(options)) =
            (left.get(3), left.get(4), right.first(), right.get(2))
        else {
            continue;
        };
        let v2 = *kind == "cgroup2";
        if *root != "/" || (*kind != "cgroup" && !v2) || !target.starts_with("/sys/fs/cgroup") {
            continue;
        }
        let known = ["rw", "ro", "none", "xattr", "clone_children", "nsdelegate", "noprefix"];
        let controllers: Vec<String> = if v2 {
            Vec::new()
        } else {
            options
                .split(',')
                .filter(|o| !known.contains(o) && !o.starts_with("release_agent="))
                .map(str::to_owned)
                .collect()
        };
        let base = if v2 {
            base_of(&str::is_empty)
        } else {
            base_of(&|names: &str| controllers.iter().any(|c| names.split(',').any(|n| n == c)))
        };
        let base = Path::new(target).join(base.unwrap_or_default());
        if found.iter().all(|h| h.base != base) {
            found.push(Hierarchy { base, controllers, v2, swap_accounting: false });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_hybrid_layout_is_read() {
        let mounts = "30 25 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
            31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
            32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
            33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n\
            34 30 0:30 /x /mnt/other rw - cgroup cgroup rw,memory\n";
        let first = "2:cpu,cpuacct:/\n1:name=systemd:/init.scope\n0::/init.scope\n";
        let found = parse(mounts, first);
        assert_eq!(found.len(), 3);
        assert!(found[0].has("cpuacct") && found[0].holds_controllers());
        assert!(!found[1].holds_controllers());
        assert!(found[2].v2);
        let id: SandboxId = "ab".parse().unwrap();
        assert_eq!(found[2].payload(&Names::of_lxc(&id)), Path::new("/sys/fs/cgroup/unified/lxc.payload.ab"));
        assert_eq!(found[1].payload(&Names::of_lxc(&id)), Path::new("/sys/fs/cgroup/systemd/lxc.payload.ab"));
        let names = Names::of_pve(Vmid::MIN);
        assert_eq!(found[2].payload(&names), Path::new("/sys/fs/cgroup/unified/lxc/100/ns"));
        assert_eq!(found[2].whole(&names), Path::new("/sys/fs/cgroup/unified/lxc/100"));
    }

    #[test]
    fn a_unified_layout_is_read() {
        let found = parse("1 2 0:3 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "0::/init.scope\n");
        assert_eq!(found.len(), 1);
        assert!(found[0].v2 && found[0].has("memory"));
    }
}
