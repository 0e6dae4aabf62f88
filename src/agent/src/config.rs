//! How an agent is set up; every path of its own lies below `root_dir`.

use std::{net::SocketAddr, path::PathBuf};

use moxlet_storage::IdMap;

/// Which network pods get.
#[derive(Debug, Clone)]
pub struct CniSettings {
    /// A directory of conflists to use instead of our own network, e.g. `/etc/cni/net.d`.
    pub use_host_conf: Option<PathBuf>,
    /// Where plugins are searched.
    pub bin_dirs: Vec<PathBuf>,
    /// The bridge of our own network, at most 15 characters.
    pub bridge: String,
}

impl Default for CniSettings {
    fn default() -> Self {
        let bin_dirs = vec![PathBuf::from("/usr/lib/cni"), PathBuf::from("/opt/cni/bin")];
        Self { use_host_conf: None, bin_dirs, bridge: "moxlet0".to_owned() }
    }
}

/// Where images and container roots lie.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Storage {
    /// OverlayFS below the agent's directory.
    #[default]
    Overlay,
    /// ZFS, in this dataset.
    Zfs(String),
}

/// How an agent is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where everything of the agent lies.
    pub root_dir: PathBuf,
    /// The CRI socket.
    pub cri_socket: PathBuf,
    /// Where the streaming server listens for clients of the CRI socket such as crictl; loopback only.
    pub stream_listen: Option<SocketAddr>,
    /// moxlet-init; without, it is searched beside the program.
    pub init_binary: Option<PathBuf>,
    /// The ids of pods on the host.
    pub map: IdMap,
    /// Where images and container roots lie.
    pub storage: Storage,
    /// Bytes that a container may write in its root; none is no bound.
    pub container_root_quota: Option<u64>,
    /// The range of pods' addresses, until the cluster says another.
    pub pod_cidr: Option<String>,
    /// Which network pods get.
    pub cni: CniSettings,
    /// Registries (`host` or `host:port`) that are spoken to without TLS.
    pub plain_http_registries: Vec<String>,
    /// A directory of registries' `hosts.toml` files and certificates, as containerd's `certs.d`.
    pub registry_config_dir: Option<PathBuf>,
    /// Docker's `config.json` of the host, whose credentials are tried after those of a pull.
    pub docker_config: Option<PathBuf>,
    /// Layers of one image that come at once.
    pub max_parallel_downloads: usize,
    /// A container's log is rotated at this size in bytes.
    pub log_max_bytes: u64,
    /// Log files kept of a container, the live one included.
    pub log_max_files: u32,
    /// Added to the sum of the containers' memory limits for the CT, in bytes.
    pub sandbox_overhead_memory_bytes: u64,
}

impl Config {
    /// A directory on the file system of images and roots, as the store's own figures name it.
    pub(crate) fn store_dir(&self) -> PathBuf {
        let dir = self.root_dir.join("storage");
        match self.storage {
            Storage::Overlay => dir,
            Storage::Zfs(_) => dir.join("state"),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        let root_dir = PathBuf::from("/var/lib/moxlet");
        Self {
            cri_socket: root_dir.join("run/agent.sock"),
            root_dir,
            stream_listen: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
            init_binary: None,
            map: IdMap::default(),
            storage: Storage::default(),
            container_root_quota: None,
            pod_cidr: None,
            cni: CniSettings::default(),
            plain_http_registries: Vec::new(),
            registry_config_dir: None,
            docker_config: None,
            max_parallel_downloads: 4,
            log_max_bytes: 10 << 20,
            log_max_files: 5,
            sandbox_overhead_memory_bytes: 16 << 20,
        }
    }
}
