//! The tests of the agent on a host of Proxmox VE, or of its simulator: where `MOXLET_TEST_PVE` names a directory with
//! `url`, `token`, `ca.pem`, and `etc` and `lock` (the cluster's file system and the CTs' locks), each agent has the engine for it, with a range of VMIDs
//! and addresses of its own.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::Command,
};

use moxlet_agent::{AddressSource, Config, EngineSettings, PveSettings};

/// VMIDs of one agent.
const NUMBERS: u32 = 100;

fn place() -> Option<PathBuf> {
    std::env::var_os("MOXLET_TEST_PVE").map(PathBuf::from)
}

/// The engine of the agent of this number.
#[must_use]
pub fn engine(number: u8) -> EngineSettings {
    let Some(dir) = place() else { return EngineSettings::Lxc };
    let address = |last: u8| IpAddr::from([10, 10, number, last]);
    let vmid_min = 1_000_000 + u32::from(number) * NUMBERS;
    EngineSettings::Pve(Box::new(PveSettings {
        endpoints: vec![fs::read_to_string(dir.join("url")).unwrap().trim().to_owned()],
        token_file: dir.join("token"),
        ca_file: Some(dir.join("ca.pem")),
        fingerprints: Vec::new(),
        node: Some("pve1".into()),
        storage: "local-zfs".into(),
        bridge: "vmbr0".into(),
        extra_bridges: Vec::new(),
        vmid_min,
        vmid_max: vmid_min + NUMBERS - 1,
        addresses: AddressSource::Range {
            first: address(1),
            last: address(254),
            prefix: 16,
            gateway: Some([10, 10, 0, 1].into()),
        },
        mtu: None,
        vlan: None,
        firewall: false,
        protection: false,
        pool: None,
        config_dir: dir.join("etc"),
        lock_dir: dir.join("lock"),
    }))
}

/// Whether the agents of the tests have this engine.
#[must_use]
pub fn is_engine() -> bool {
    place().is_some()
}

/// The number of a sandbox' CT, from the agent's record.
#[must_use]
pub fn vmid(root: &Path, sandbox: &str) -> Option<String> {
    let text = fs::read_to_string(root.join(format!("pve/ct/{sandbox}.json"))).ok()?;
    let record: serde_json::Value = serde_json::from_str(&text).ok()?;
    Some(record["vmid"].to_string())
}

/// The addresses that an agent has given out.
#[must_use]
pub fn allotted(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root.join("addresses")).into_iter().flatten().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

/// What an agent's CTs have left on the host.
#[must_use]
pub fn traces(config: &Config) -> Vec<String> {
    let EngineSettings::Pve(settings) = &config.engine else { return Vec::new() };
    let mut left = Vec::new();
    let mut note = |dir: PathBuf, wanted: &dyn Fn(&str) -> bool| {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if wanted(&name) {
                left.push(format!("{}/{name}", dir.display()));
            }
        }
    };
    for dir in ["pve/ct", "pve/include", "pve/guard", "addresses"] {
        note(config.root_dir.join(dir), &|_| true);
    }
    let numbers: Vec<String> = (settings.vmid_min..=settings.vmid_max).map(|n| n.to_string()).collect();
    let own = |name: &str| numbers.iter().any(|n| name.contains(n.as_str()));
    note(settings.config_dir.join("nodes/pve1/lxc"), &own);
    for dir in ["/var/lib/lxc", "/sys/class/net", "/sys/fs/cgroup/lxc", "/sys/fs/cgroup/lxc.monitor"] {
        note(PathBuf::from(dir), &own);
    }
    if let Ok(zfs) = Command::new("zfs").args(["list", "-H", "-o", "name"]).output() {
        let text = String::from_utf8_lossy(&zfs.stdout);
        left.extend(text.lines().filter(|name| own(name)).map(|name| format!("dataset {name}")));
    }
    left
}
