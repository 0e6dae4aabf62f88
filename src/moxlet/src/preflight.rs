//! What the machine must have before anything is started: each lack is one sentence that says what to do.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use moxlet_agent::{LXC_PATH, PROGRAM_PATH};

use crate::config::{Config, Engine};

/// Checks the machine.
///
/// # Errors
/// All that is missing, in one message.
pub(crate) fn check(config: &Config) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("it must run as root: it makes mounts, cgroups and LXC containers (try: sudo moxlet …)");
    }
    let mut missing = Vec::new();
    missing.extend(kernel());
    // On Proxmox VE its own tasks start a CT, whose configuration attaches it.
    if config.engine == Engine::Lxc {
        let own_network = config.cni_conf_dir.is_none();
        missing.extend(programs(own_network));
        missing.extend(plugins(&config.cni_bin_dirs, own_network));
    }
    if missing.is_empty() {
        return Ok(());
    }
    bail!("this machine lacks what Moxlet needs:\n  - {}", missing.join("\n  - "))
}

/// Whether the kubelet API can listen, before anything is made on the machine.
///
/// # Errors
/// The address is taken or not this machine's.
pub(crate) fn can_listen(address: std::net::SocketAddr) -> Result<()> {
    match std::net::TcpListener::bind(address) {
        Ok(_) => Ok(()),
        Err(e) => bail!(
            "the kubelet API cannot listen on {address}: {e}; end what listens there (`ss -ltnp` names it), or choose \
             another address (--listen, or `listen` in the configuration)"
        ),
    }
}

fn kernel() -> Vec<String> {
    let mut missing = Vec::new();
    for kind in ["user", "pid", "mnt", "net", "cgroup", "ipc", "uts"] {
        if !Path::new("/proc/self/ns").join(kind).exists() {
            missing.push(format!("the kernel has no {kind} namespaces: boot a kernel that has them"));
        }
    }
    // An absent module is loaded by the first mount; only a kernel that lists neither is hopeless.
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let module = Path::new("/lib/modules").join(&release);
    if !filesystems.lines().any(|l| l.trim_start_matches("nodev").trim() == "overlay") && !module.exists() {
        missing.push("the kernel has no OverlayFS: load the module `overlay`".to_owned());
    }
    if older_than(&release, (6, 8)) {
        missing.push(format!(
            "the kernel is {release}; 6.8 or newer is needed, from which on the layers of OverlayFS are named one by one: upgrade the kernel (Debian 12 has one in bookworm-backports)"
        ));
    }
    missing
}

fn older_than(release: &str, (major, minor): (u32, u32)) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(a), Some(b)) => (a, b) < (major, minor),
        _ => false,
    }
}

fn programs(own_network: bool) -> Vec<String> {
    let mut missing = Vec::new();
    if !is_in(LXC_PATH, "lxc-start") {
        missing.push(format!(
            "the program lxc-start is in none of {LXC_PATH}: install LXC (apt-get install lxc uidmap)"
        ));
    }
    if own_network && !is_in(PROGRAM_PATH, "ip") {
        missing.push(format!(
            "the program ip is in none of {PROGRAM_PATH}: install it (apt-get install iproute2)"
        ));
    }
    missing
}

fn is_in(path: &str, program: &str) -> bool {
    path.split(':').any(|dir| Path::new(dir).join(program).is_file())
}

/// The CNI plugins that are missing. Every pod gets `loopback`, also where somebody else's configuration attaches it.
pub(crate) fn plugins(dirs: &[PathBuf], own_network: bool) -> Vec<String> {
    let own: &[&str] = if own_network { &["bridge", "host-local"] } else { &[] };
    own.iter()
        .chain(&["loopback"])
        .filter(|p| !dirs.iter().any(|d| d.join(p).is_file()))
        .map(|p| {
            format!(
                "the CNI plugin {p} is in none of cni_bin_dirs: install it (apt-get install containernetworking-plugins)"
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn programs_are_looked_for_where_they_are_run_from() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ip"), "").unwrap();
        let path = format!("/nonexistent:{}", dir.path().display());
        assert!(is_in(&path, "ip") && !is_in(&path, "lxc-start"));
    }

    #[test]
    fn each_plugin_that_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = ["/nonexistent".into(), dir.path().to_owned()];
        let names = |own| plugins(&dirs, own).concat();
        for plugin in ["bridge", "host-local", "loopback"] {
            assert!(names(true).contains(&format!("plugin {plugin} ")));
        }
        assert!(names(false).contains("loopback") && !names(false).contains("bridge"));
        for plugin in ["bridge", "host-local", "loopback"] {
            std::fs::write(dir.path().join(plugin), "").unwrap();
        }
        assert_eq!(names(true), "");
    }

    #[test]
    fn kernel_releases_are_compared_as_numbers() {
        assert!(older_than("5.4.0-generic", (5, 19)));
        assert!(!older_than("6.17.2-1-pve", (5, 19)));
        assert!(!older_than("5.19.0", (5, 19)));
        assert!(!older_than("unheard-of", (5, 19)));
    }
}
