//! What sandboxes could leave on a machine.

use std::{collections::BTreeSet, fs, path::Path};

use moxlet_storage::mounts;

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// All directories of the cgroup hierarchies down to where LXC puts CTs.
fn cgroups() -> Vec<String> {
    fn collect(dir: &Path, depth: u32, into: &mut Vec<String>) {
        for name in names(dir) {
            let path = dir.join(&name);
            if path.is_dir() {
                into.push(name);
                if depth > 0 {
                    collect(&path, depth - 1, into);
                }
            }
        }
    }
    let mut all = Vec::new();
    collect(Path::new("/sys/fs/cgroup"), 2, &mut all);
    all
}

/// The addresses in use: host-local's allotments, or the agent's own.
#[must_use]
pub fn allotted(root: &Path) -> Vec<String> {
    let mut all = names(&root.join("cni/ipam/moxlet"));
    all.extend(crate::pve::allotted(root));
    all.into_iter().filter(|n| n.parse::<std::net::IpAddr>().is_ok()).collect()
}

/// What is left of these sandboxes (and of any other) below an agent's directory, on its bridge and in the cgroups, one line
/// each. What an agent that runs has itself is none.
#[must_use]
pub fn of(root: &Path, bridge: &str, sandboxes: &BTreeSet<String>) -> Vec<String> {
    let mut left = Vec::new();
    for dir in [
        "lxc/ct",
        "pods",
        "ledger/sandboxes",
        "ledger/containers",
        "storage/roots",
        "cni/cache",
        "volumes/.del",
    ] {
        left.extend(names(&root.join(dir)).into_iter().map(|name| format!("{dir}/{name}")));
    }
    left.extend(
        names(&root.join("volumes")).into_iter().filter(|n| n != ".del").map(|n| format!("volume {n}")),
    );
    left.extend(allotted(root).into_iter().map(|ip| format!("address {ip}")));
    let locks = names(&Path::new("/run/lxc/lock").join(root.join("lxc/ct").strip_prefix("/").unwrap()));
    left.extend(locks.into_iter().map(|name| format!("lock {name}")));
    let own = |path: &Path| {
        [root.join("pods"), root.join("storage"), root.join("storage/state")].iter().any(|own| path == own)
            || path.parent() == Some(&root.join("storage/mapped"))
    };
    let mounted = mounts::mounted_below(root).unwrap().into_iter().filter(|path| !own(path));
    left.extend(mounted.map(|path| format!("mount {}", path.display())));
    let ports = names(&Path::new("/sys/class/net").join(bridge).join("brif"));
    left.extend(ports.into_iter().map(|port| format!("interface {port} on {bridge}")));
    let of_sandbox = |name: &String| sandboxes.iter().any(|id| name.contains(id.as_str()));
    left.extend(cgroups().into_iter().filter(of_sandbox).map(|name| format!("cgroup {name}")));
    for pid in names(Path::new("/proc")).into_iter().filter(|n| n.parse::<u32>().is_ok()) {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if command.contains(&format!(" {}/", root.display())) {
            left.push(format!("process {pid} {command}"));
        }
    }
    left
}
