//! How an agent is set up; every path of its own lies below `root_dir`.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use moxlet_cri::link::CertificateFiles;
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

/// How pods become CTs.
#[derive(Debug, Clone, Default)]
pub enum EngineSettings {
    /// Plain LXC.
    #[default]
    Lxc,
    /// Proxmox VE.
    Pve(Box<PveSettings>),
}

/// What the engine on Proxmox VE needs; `docs/proxmox.md` explains each.
#[derive(Debug, Clone)]
pub struct PveSettings {
    /// The API's servers, this host's first.
    pub endpoints: Vec<String>,
    /// A file with `user@realm!id=secret`.
    pub token_file: PathBuf,
    /// Who signs the servers' certificates; without it and without a fingerprint the system's authorities.
    pub ca_file: Option<PathBuf>,
    /// The SHA-256 fingerprints of the servers' certificates, one for each; they go before `ca_file`.
    pub fingerprints: Vec<String>,
    /// This host's name in the cluster; the short host name if there is none.
    pub node: Option<String>,
    /// The storage of the CTs' roots, of type `zfspool`.
    pub storage: String,
    /// The bridge of the pods' first interface.
    pub bridge: String,
    /// `BRIDGE` or `BRIDGE/VLAN` that pods may ask for.
    pub extra_bridges: Vec<String>,
    /// The first VMID of pods.
    pub vmid_min: u32,
    /// The last VMID of pods.
    pub vmid_max: u32,
    /// Where addresses come from.
    pub addresses: AddressSource,
    /// Of the first interface.
    pub mtu: Option<u16>,
    /// Of the first interface.
    pub vlan: Option<u16>,
    /// Whether the CTs' firewall rules hold for their interfaces.
    pub firewall: bool,
    /// Whether CTs are protected from removal by others.
    pub protection: bool,
    /// The pool that CTs are put into.
    pub pool: Option<String>,
    /// The cluster's file system.
    pub config_dir: PathBuf,
    /// Where Proxmox VE locks CTs.
    pub lock_dir: PathBuf,
}

/// The agent's end of the link to a node on another machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkSettings {
    /// Where the agent listens.
    pub listen: SocketAddr,
    /// What it proves itself with, and who signs nodes' certificates.
    pub files: CertificateFiles,
}

/// Where pods' addresses come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AddressSource {
    /// A DHCP server on the bridge.
    Dhcp,
    /// This host gives them out, of this slice of the subnet.
    Range {
        /// The first.
        first: IpAddr,
        /// The last.
        last: IpAddr,
        /// The length of the subnet's prefix.
        prefix: u8,
        /// The subnet's gateway.
        gateway: Option<IpAddr>,
    },
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
    /// Where, and how, a node on another machine is served; without, there is the CRI socket alone.
    pub link: Option<LinkSettings>,
    /// moxlet-init; without, it is searched beside the program.
    pub init_binary: Option<PathBuf>,
    /// How pods become CTs.
    pub engine: EngineSettings,
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
    /// The resolver's configuration for pods, in place of the host's own.
    pub resolv_conf: Option<PathBuf>,
    /// Registries (`host` or `host:port`) that are spoken to without TLS.
    pub plain_http_registries: Vec<String>,
    /// A directory of registries' `hosts.toml` files and certificates, as containerd's `certs.d`.
    pub registry_config_dir: Option<PathBuf>,
    /// Docker's `config.json` of the host, whose credentials are tried after those of a pull.
    pub docker_config: Option<PathBuf>,
    /// Layers of one image that come at once.
    pub max_parallel_downloads: usize,
    /// Bytes of one pull that come ahead of the layer that is extracted, on disk; only on ZFS. 0 is none.
    pub image_prefetch_max_bytes: u64,
    /// A container's log is rotated at this size in bytes.
    pub log_max_bytes: u64,
    /// Log files kept of a container, the live one included.
    pub log_max_files: u32,
    /// Added to the sum of the containers' memory limits for the CT, in bytes.
    pub sandbox_overhead_memory_bytes: u64,
    /// Memory that is kept for the host itself, in bytes; without a word it depends on the engine.
    pub system_reserved_memory_bytes: Option<u64>,
}

/// The least and the share of a host of Proxmox VE's memory that is kept for it: its daemons, its other guests' overhead and the
/// cache of ZFS, which is a tenth of the memory by the installer's word.
const PVE_RESERVED: (u64, u64) = (1 << 30, 10);

impl Config {
    /// How much of the host's memory is kept for the host itself: never more than half of it.
    pub(crate) fn reserved_memory(&self, all: u64) -> u64 {
        let (least, share) = PVE_RESERVED;
        let usual = match self.engine {
            EngineSettings::Lxc => 0,
            EngineSettings::Pve(_) => least.max(all / share),
        };
        self.system_reserved_memory_bytes.unwrap_or(usual).min(all / 2)
    }

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
            link: None,
            init_binary: None,
            engine: EngineSettings::default(),
            map: IdMap::default(),
            storage: Storage::default(),
            container_root_quota: None,
            pod_cidr: None,
            cni: CniSettings::default(),
            resolv_conf: None,
            plain_http_registries: Vec::new(),
            registry_config_dir: None,
            docker_config: None,
            max_parallel_downloads: 4,
            image_prefetch_max_bytes: moxlet_image::Config::default().prefetch_max_bytes,
            log_max_bytes: 10 << 20,
            log_max_files: 5,
            sandbox_overhead_memory_bytes: 16 << 20,
            system_reserved_memory_bytes: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_of_proxmox_ve_keeps_a_tenth_and_a_gibibyte_at_least() {
        let pve = |reserved| Config {
            engine: EngineSettings::Pve(Box::new(settings())),
            system_reserved_memory_bytes: reserved,
            ..Config::default()
        };
        assert_eq!(Config::default().reserved_memory(64 << 30), 0);
        assert_eq!(pve(None).reserved_memory(8 << 30), 1 << 30);
        assert_eq!(pve(None).reserved_memory(640 << 30), 64 << 30);
        assert_eq!(pve(None).reserved_memory(1 << 30), 512 << 20, "pods get half in any case");
        assert_eq!(pve(Some(4 << 30)).reserved_memory(64 << 30), 4 << 30);
        assert_eq!(pve(Some(0)).reserved_memory(64 << 30), 0);
    }

    fn settings() -> PveSettings {
        PveSettings {
            endpoints: Vec::new(),
            token_file: PathBuf::new(),
            ca_file: None,
            fingerprints: Vec::new(),
            node: None,
            storage: String::new(),
            bridge: String::new(),
            extra_bridges: Vec::new(),
            vmid_min: 100,
            vmid_max: 199,
            addresses: AddressSource::Dhcp,
            mtu: None,
            vlan: None,
            firewall: false,
            protection: false,
            pool: None,
            config_dir: PathBuf::new(),
            lock_dir: PathBuf::new(),
        }
    }
}
