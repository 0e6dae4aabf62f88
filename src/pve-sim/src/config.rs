//! The configuration: which hosts, storages, bridges, users and tokens there are, and how the server behaves.
//!
//! What stands here about users, roles, ACLs, pools and storages fills the state directory at its first use; afterwards
//! the state directory holds the truth, as /etc/pve does, apart from tokens of the configuration, which are always made
//! sure of.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{Error, Result, error::io};

const MAX_BYTES: u64 = 1024 * 1024;

/// Everything that the simulator is told.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the state lies: `etc/pve`, tasks, certificate.
    pub state_dir: PathBuf,
    /// The admin port's address (plain HTTP; loopback only).
    pub admin: Option<SocketAddr>,
    /// Whether the folder is a mount of its own, which is read-only for all without quorum; needs root.
    pub cfs_mount: bool,
    /// Where the flock files of CT configs lie; `<state_dir>/run/lock/lxc` if absent.
    pub lock_dir: Option<PathBuf>,
    /// The version that `/version` tells.
    pub version: Version,
    /// The cluster's hosts.
    pub hosts: Vec<Host>,
    /// Storages, for all hosts or some.
    pub storages: Vec<Storage>,
    /// Bridges of every host.
    pub bridges: Vec<Bridge>,
    /// Roles beside the built-in ones: name → privileges.
    pub roles: BTreeMap<String, Vec<String>>,
    /// Users, `name@realm`. `root@pam` always is.
    pub users: Vec<String>,
    /// API tokens.
    pub tokens: Vec<Token>,
    /// Access control list.
    pub acl: Vec<Acl>,
    /// Resource pools.
    pub pools: Vec<String>,
    /// The range of `/cluster/nextid`.
    pub next_id: Option<NextId>,
    /// How the server behaves.
    pub behaviour: Behaviour,
    /// What CTs are.
    pub backend: BackendConfig,
    /// A cluster's name; without one a single host is no cluster.
    pub cluster_name: String,
}

/// What `/version` tells.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Version {
    /// Such as `9.2.11`.
    pub version: String,
    /// Such as `9.2`.
    pub release: String,
    /// Hexadecimal.
    pub repoid: String,
}

/// One host.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Host {
    /// Its node name.
    pub name: String,
    /// Where its HTTPS server listens; port 0 picks one. Without it only the other hosts answer for this one.
    pub listen: Option<SocketAddr>,
    /// Served by another process that shares the state directory, at this address: calls are passed on.
    pub remote: Option<SocketAddr>,
    /// The address that `/cluster/status` tells.
    pub ip: String,
    /// Logical processors.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// One storage.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Storage {
    /// Its id.
    pub name: String,
    /// `zfspool` or `dir`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Content types.
    pub content: Vec<String>,
    /// Of a zfspool: the dataset that holds the volumes.
    #[serde(default)]
    pub pool: Option<String>,
    /// Of a zfspool: where its volumes are mounted, if not at `/` and the pool's name.
    #[serde(default)]
    pub mountpoint: Option<PathBuf>,
    /// Of a dir: its path.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// Hosts that have it; empty: all.
    #[serde(default)]
    pub nodes: Vec<String>,
    /// Whether all hosts see the same volumes.
    #[serde(default)]
    pub shared: bool,
    /// Its size in MiB (back end `records`).
    #[serde(default = "default_storage_mib")]
    pub total_mib: u64,
    /// Volumes of the content type `vztmpl` that are there from the start.
    #[serde(default)]
    pub templates: Vec<String>,
}

fn default_storage_mib() -> u64 {
    1024 * 1024
}

/// One bridge.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bridge {
    /// Such as `vmbr0`.
    pub name: String,
    /// Its address with prefix length.
    #[serde(default)]
    pub cidr: Option<String>,
    /// Largest packet.
    #[serde(default = "default_mtu")]
    pub mtu: u32,
    /// Whether it knows VLANs.
    #[serde(default)]
    pub vlan_aware: bool,
}

fn default_mtu() -> u32 {
    1500
}

/// An API token.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// `user@realm!id`.
    pub id: String,
    /// Its secret; made up if absent.
    #[serde(default)]
    pub secret: Option<String>,
    /// Whether its rights are the intersection of its own and the user's.
    #[serde(default)]
    pub privsep: bool,
    /// A file that gets `user@realm!id=secret`, 0600.
    #[serde(default)]
    pub file: Option<PathBuf>,
}

/// One entry of the access control list.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Acl {
    /// Such as `/vms/100`.
    pub path: String,
    /// A user, a token or `@group`.
    pub who: String,
    /// The role.
    pub role: String,
    /// Whether paths below inherit it.
    #[serde(default = "yes")]
    pub propagate: bool,
}

fn yes() -> bool {
    true
}

/// Range of free VMIDs that `/cluster/nextid` looks in: `lower` included, `upper` not.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NextId {
    /// The first.
    pub lower: u32,
    /// The first beyond.
    pub upper: u32,
}

/// How the server behaves; times are in milliseconds.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Behaviour {
    /// Delay of an answer 401.
    pub auth_delay_ms: u64,
    /// How many calls one host works on at once; more wait, as for a free pvedaemon worker.
    pub workers: usize,
    /// How long a call waits for a worker before the proxy gives up with 596.
    pub worker_wait_ms: u64,
    /// How many calls wait at once; beyond, connections are closed as by a full listen queue.
    pub worker_backlog: usize,
    /// How long each task takes at least.
    pub task_ms: u64,
    /// How often `/cluster/resources` learns of changes; 0: always current.
    pub resources_ms: u64,
    /// How long a lock (CT config, user.cfg) is waited for.
    pub lock_wait_ms: u64,
    /// How types in answers look.
    pub types: Types,
}

/// How types in answers look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Types {
    /// As the real one: some integers as strings, booleans as 0/1, null for some lists.
    Real,
    /// As the schema says, apart from booleans, which always are 0/1.
    Schema,
    /// Every integer as a string.
    Strings,
}

/// What CTs are.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum BackendConfig {
    /// Records in the state directory: nothing runs.
    Records,
    /// LXC containers on ZFS volumes.
    Lxc(LxcBackend),
}

/// Where the real containers are.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LxcBackend {
    /// liblxc's directory of CTs.
    pub lxcpath: PathBuf,
    /// Starts CTs through a systemd unit of this name, `@ID` appended; empty: `lxc-start` as a child.
    pub unit: String,
    /// The `pve-sim` program that CTs call as their hook; this program if absent.
    pub hook: Option<PathBuf>,
}

impl Default for LxcBackend {
    fn default() -> Self {
        Self { lxcpath: "/var/lib/lxc".into(), unit: "pve-container".into(), hook: None }
    }
}

impl LxcBackend {
    /// The program that CTs call as their hook.
    pub(crate) fn hook_program(&self) -> String {
        let own = || std::env::current_exe().unwrap_or_else(|_| "pve-sim".into());
        self.hook.clone().unwrap_or_else(own).display().to_string()
    }
}

impl Default for Version {
    fn default() -> Self {
        Self { version: "9.2.11".into(), release: "9.2".into(), repoid: "5f4a3d2c1b0a9988".into() }
    }
}

impl Default for Host {
    fn default() -> Self {
        Self {
            name: String::new(),
            listen: None,
            remote: None,
            ip: "127.0.0.1".into(),
            cpus: 8,
            memory_mib: 32 * 1024,
        }
    }
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            auth_delay_ms: 3000,
            workers: 4,
            worker_wait_ms: 30_000,
            worker_backlog: 1024,
            task_ms: 0,
            resources_ms: 10_000,
            lock_wait_ms: 10_000,
            types: Types::Real,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        let storage = |name: &str, kind: &str, content: &[&str]| Storage {
            name: name.into(),
            kind: kind.into(),
            content: content.iter().map(ToString::to_string).collect(),
            pool: None,
            mountpoint: None,
            path: None,
            nodes: vec![],
            shared: false,
            total_mib: default_storage_mib(),
            templates: vec![],
        };
        Self {
            state_dir: "/var/lib/pve-sim".into(),
            admin: None,
            cfs_mount: false,
            lock_dir: None,
            version: Version::default(),
            hosts: vec![Host { name: "pve1".into(), ..Host::default() }],
            storages: vec![
                Storage {
                    path: Some("/var/lib/vz".into()),
                    templates: vec!["debian-13-standard_13.1-1_amd64.tar.zst".into()],
                    ..storage("local", "dir", &["vztmpl", "iso", "backup", "snippets"])
                },
                Storage {
                    pool: Some("rpool/data".into()),
                    ..storage("local-zfs", "zfspool", &["rootdir", "images"])
                },
            ],
            bridges: vec![Bridge {
                name: "vmbr0".into(),
                cidr: Some("10.10.0.1/16".into()),
                mtu: 1500,
                vlan_aware: true,
            }],
            roles: BTreeMap::new(),
            users: vec!["moxlet@pve".into()],
            tokens: vec![Token { id: "moxlet@pve!sim".into(), secret: None, privsep: false, file: None }],
            acl: vec![Acl {
                path: "/".into(),
                who: "moxlet@pve".into(),
                role: "Administrator".into(),
                propagate: true,
            }],
            pools: vec![],
            next_id: None,
            behaviour: Behaviour::default(),
            backend: BackendConfig::Records,
            cluster_name: "sim".into(),
        }
    }
}

impl Config {
    /// Reads a configuration file; what it leaves out is as in [`Config::default`].
    ///
    /// # Errors
    /// The file cannot be read, is larger than 1 MiB, or is not of the expected form.
    pub fn load(path: &Path) -> Result<Self> {
        let size = std::fs::metadata(path).map_err(io("read", path))?.len();
        if size > MAX_BYTES {
            return Err(Error::Config(format!("{} is larger than 1 MiB", path.display())));
        }
        let text = std::fs::read_to_string(path).map_err(io("read", path))?;
        let config: Self =
            toml::from_str(&text).map_err(|source| Error::Parse { path: path.to_path_buf(), source })?;
        config.check()?;
        Ok(config)
    }

    /// Whether the parts fit together.
    ///
    /// # Errors
    /// A name is used twice, is unknown, or is not one that Proxmox VE takes.
    pub fn check(&self) -> Result<()> {
        if self.hosts.is_empty() {
            return Err(Error::Config("there is no host".into()));
        }
        let mut seen = std::collections::BTreeSet::new();
        for host in &self.hosts {
            let name_is_good = !host.name.is_empty()
                && host.name.len() <= 63
                && host.name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
            if !name_is_good || !seen.insert(&host.name) {
                return Err(Error::Config(format!("host name {:?} is empty, odd or used twice", host.name)));
            }
            if host.listen.is_some() && host.remote.is_some() {
                return Err(Error::Config(format!("host {} has both `listen` and `remote`", host.name)));
            }
        }
        for storage in &self.storages {
            if !matches!(storage.kind.as_str(), "zfspool" | "dir") {
                return Err(Error::Config(format!(
                    "storage {}: type {:?} is not simulated (zfspool, dir)",
                    storage.name, storage.kind
                )));
            }
            if storage.kind == "zfspool" && storage.pool.is_none() {
                return Err(Error::Config(format!("storage {}: a zfspool needs `pool`", storage.name)));
            }
        }
        for token in &self.tokens {
            let user = token.id.split_once('!').map(|(user, _)| user);
            match user {
                Some(user) if user == "root@pam" || self.users.iter().any(|u| u == user) => {}
                _ => return Err(Error::Config(format!("token {:?} is of no user of `users`", token.id))),
            }
        }
        if let Some(admin) = self.admin
            && !admin.ip().is_loopback()
        {
            return Err(Error::Config(format!("the admin port must be on loopback, not {admin}")));
        }
        Ok(())
    }

    /// The host of a name.
    #[must_use]
    pub fn host(&self, name: &str) -> Option<&Host> {
        self.hosts.iter().find(|h| h.name == name)
    }
}
