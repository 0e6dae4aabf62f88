//! What the node must be told; everything has a default, so that one machine needs no configuration.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use moxlet_cri::link::{CertificateFiles, Endpoint};

use crate::pressure::PressureThresholds;

/// The node's configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the Node object; the host's name in lower case by default.
    pub node_name: String,
    /// Where the agent listens.
    pub agent_endpoint: Endpoint,
    /// What the node proves itself with at an agent on another machine, and who signs agents' certificates.
    pub link_files: Option<CertificateFiles>,
    /// A ready identity. Without it and without a bootstrap kubeconfig only static pods run.
    pub kubeconfig: Option<PathBuf>,
    /// A kubeconfig with a bootstrap token, with which a client certificate is requested.
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// Whether the kubeconfig may be of somebody else than the node.
    pub allow_any_identity: bool,
    /// Certificates that sign callers of the kubelet API; default: the kubeconfig's CA.
    pub client_ca_file: Option<PathBuf>,
    /// Keys and certificates of the node, 0600.
    pub state_dir: PathBuf,
    /// Where the kubelet API listens.
    pub listen: SocketAddr,
    /// Address of the node; default: the most useful one that an agent on the same host names, and else the one from which an
    /// agent on another machine is reached.
    pub node_ip: Option<IpAddr>,
    /// A folder of pod manifests that run without any API server.
    pub static_pod_dir: Option<PathBuf>,
    /// Taints of a Node that is registered, `key=value:Effect`.
    pub register_taints: Vec<String>,
    /// Labels of the Node beside the usual ones.
    pub labels: BTreeMap<String, String>,
    /// The most pods that the scheduler may put here.
    pub max_pods: u32,
    /// The most processes and threads of one pod; 0: as many as the host takes.
    pub pod_pids_limit: u32,
    /// Addresses of the cluster's DNS service; without them pods get the host's resolver.
    pub cluster_dns: Vec<IpAddr>,
    /// The cluster's DNS domain.
    pub cluster_domain: String,
    /// The kubelet version that the Node reports; it must be semantic.
    pub kubelet_version: String,
    /// How many pods may be started or stopped at one time.
    pub max_parallel_syncs: usize,
    /// When images are removed for want of space or for their age.
    pub image_gc: ImageGc,
    /// From when on the Node tells of pressure.
    pub pressure: PressureThresholds,
    /// How often the contents of configMap, secret, downwardAPI and token volumes are looked at.
    pub volume_refresh: std::time::Duration,
}

/// When images are removed: the kubelet's `imageGC…` and `image…GCAge` settings with its defaults.
#[derive(Clone, Debug)]
pub struct ImageGc {
    /// Once the file system is this full, in percent; 100 turns it off.
    pub high_percent: u8,
    /// Down to this, in percent.
    pub low_percent: u8,
    /// What is younger stays.
    pub min_age: std::time::Duration,
    /// What was not used for so long goes in any case.
    pub max_age: Option<std::time::Duration>,
}

impl Default for ImageGc {
    fn default() -> Self {
        Self {
            high_percent: 85,
            low_percent: 80,
            min_age: std::time::Duration::from_secs(120),
            max_age: None,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node_name: default_node_name(),
            agent_endpoint: Endpoint::Unix(PathBuf::from("/run/moxlet/agent.sock")),
            link_files: None,
            kubeconfig: None,
            bootstrap_kubeconfig: None,
            allow_any_identity: false,
            client_ca_file: None,
            state_dir: PathBuf::from("/var/lib/moxlet/node"),
            listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 10250)),
            node_ip: None,
            static_pod_dir: None,
            register_taints: vec!["virtual-kubelet.io/provider=proxmox:NoSchedule".into()],
            labels: BTreeMap::new(),
            max_pods: 110,
            pod_pids_limit: 4096,
            cluster_dns: Vec::new(),
            cluster_domain: "cluster.local".into(),
            kubelet_version: format!("v1.36.0-moxlet.{}", env!("CARGO_PKG_VERSION")),
            max_parallel_syncs: 64,
            image_gc: ImageGc::default(),
            pressure: PressureThresholds::default(),
            volume_refresh: std::time::Duration::from_secs(60),
        }
    }
}

fn default_node_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().trim().to_lowercase()
}
