//! The configuration: the keys of the file, and the flags that override them. [`read`] is the file's text, [`check`] what must hold.
//!
//! `docs/configuration.md` is the reference; a test compares its list of keys with this one.

mod check;
mod read;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use anyhow::{Result, bail};
use clap::parser::ValueSource;
use moxlet_cri::link::{CertificateFiles, Endpoint};
use serde::Deserialize;

use crate::{
    args::{AgentArgs, HostArgs, KubeletArgs, LogFormat, NodeArgs, ProgramArgs, UpArgs},
    duration::Span,
    pve_config::Pve,
    quantity::Bytes,
};

/// How pods become CTs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Engine {
    /// Plain LXC on this machine.
    #[default]
    Lxc,
    /// Proxmox VE, of which this machine is a host.
    Pve,
}

/// Where images and container roots live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Storage {
    /// OverlayFS below `root_dir`.
    #[default]
    Overlay,
    /// ZFS, in the dataset that `zfs_dataset` names.
    Zfs,
}

/// Which program reads the configuration. One file may serve several: each reads the keys that are its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Node and agent in one process.
    Up,
    /// The node alone.
    Node,
    /// The agent alone.
    Agent,
}

/// The file's keys, as written.
#[derive(Debug, Deserialize, Clone)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// Everything Moxlet keeps lies below it.
    pub(crate) root_dir: PathBuf,
    pub(crate) engine: Engine,
    pub(crate) storage: Storage,
    pub(crate) zfs_dataset: Option<String>,
    pub(crate) container_root_quota: Option<Bytes>,
    pub(crate) log: String,
    pub(crate) log_format: LogFormat,
    pub(crate) stop_pods: bool,

    pub(crate) node_name: Option<String>,
    pub(crate) kubeconfig: Option<PathBuf>,
    pub(crate) bootstrap_kubeconfig: Option<PathBuf>,
    pub(crate) allow_any_identity: bool,
    pub(crate) client_ca_file: Option<PathBuf>,
    pub(crate) listen: SocketAddr,
    pub(crate) node_ip: Option<IpAddr>,
    pub(crate) static_pod_dir: Option<PathBuf>,
    pub(crate) register_taints: Vec<String>,
    pub(crate) node_labels: BTreeMap<String, String>,
    pub(crate) max_pods: u32,
    pub(crate) pod_pids_limit: u32,
    pub(crate) cluster_dns: Vec<IpAddr>,
    pub(crate) cluster_domain: String,

    pub(crate) image_gc_high_threshold_percent: u8,
    pub(crate) image_gc_low_threshold_percent: u8,
    pub(crate) image_minimum_gc_age: Span,
    pub(crate) image_maximum_gc_age: Option<Span>,
    #[serde(deserialize_with = "read::pressure_thresholds")]
    pub(crate) pressure_thresholds: moxlet_node::PressureThresholds,
    pub(crate) image_prefetch_max_bytes: Bytes,

    #[serde(deserialize_with = "read::endpoint")]
    pub(crate) agent_endpoint: Option<Endpoint>,
    pub(crate) agent_listen: Option<SocketAddr>,
    pub(crate) link_certificate_file: Option<PathBuf>,
    pub(crate) link_key_file: Option<PathBuf>,
    pub(crate) link_ca_file: Option<PathBuf>,

    pub(crate) cri_socket: Option<PathBuf>,
    pub(crate) stream_listen: Option<SocketAddr>,
    pub(crate) init_binary: Option<PathBuf>,
    pub(crate) plain_http_registries: Vec<String>,
    pub(crate) registry_config_dir: Option<PathBuf>,
    pub(crate) docker_config: Option<PathBuf>,
    pub(crate) container_log_max_bytes: Bytes,
    pub(crate) container_log_max_files: u32,
    pub(crate) sandbox_overhead_memory_bytes: Bytes,
    pub(crate) system_reserved_memory_bytes: Option<Bytes>,

    pub(crate) pod_cidr: Option<String>,
    pub(crate) bridge: String,
    pub(crate) resolv_conf: Option<PathBuf>,
    pub(crate) cni_conf_dir: Option<PathBuf>,
    pub(crate) cni_bin_dirs: Vec<PathBuf>,

    pub(crate) pve: Option<Pve>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root_dir: PathBuf::from("/var/lib/moxlet"),
            engine: Engine::Lxc,
            storage: Storage::Overlay,
            zfs_dataset: None,
            container_root_quota: None,
            log: "info".to_owned(),
            log_format: LogFormat::Text,
            stop_pods: false,
            node_name: None,
            kubeconfig: None,
            bootstrap_kubeconfig: None,
            allow_any_identity: false,
            client_ca_file: None,
            listen: SocketAddr::from(([0, 0, 0, 0], 10250)),
            node_ip: None,
            static_pod_dir: None,
            register_taints: vec!["virtual-kubelet.io/provider=proxmox:NoSchedule".to_owned()],
            node_labels: BTreeMap::new(),
            max_pods: 110,
            pod_pids_limit: moxlet_node::Config::default().pod_pids_limit,
            cluster_dns: Vec::new(),
            cluster_domain: "cluster.local".to_owned(),
            image_gc_high_threshold_percent: 85,
            image_gc_low_threshold_percent: 80,
            image_minimum_gc_age: Span(std::time::Duration::from_secs(120)),
            image_maximum_gc_age: None,
            pressure_thresholds: moxlet_node::PressureThresholds::default(),
            image_prefetch_max_bytes: Bytes(moxlet_agent::Config::default().image_prefetch_max_bytes),
            agent_endpoint: None,
            agent_listen: None,
            link_certificate_file: None,
            link_key_file: None,
            link_ca_file: None,
            cri_socket: None,
            stream_listen: None,
            init_binary: None,
            plain_http_registries: Vec::new(),
            registry_config_dir: None,
            docker_config: None,
            container_log_max_bytes: Bytes(10 << 20),
            container_log_max_files: 5,
            sandbox_overhead_memory_bytes: Bytes(16 << 20),
            system_reserved_memory_bytes: None,
            pod_cidr: None,
            bridge: "moxlet0".to_owned(),
            resolv_conf: None,
            cni_conf_dir: None,
            cni_bin_dirs: vec![PathBuf::from("/usr/lib/cni"), PathBuf::from("/opt/cni/bin")],
            pve: None,
        }
    }
}

impl Config {
    /// The configuration of `moxlet up`: file and flags.
    ///
    /// # Errors
    /// The file cannot be read, is over 1 MiB, or has a bad key; the message names file, line and key.
    pub(crate) fn up(args: &UpArgs) -> Result<Self> {
        let mut config = Self::of_program(&args.host.program)?;
        config.override_host(&args.host);
        config.override_kubelet(&args.kubelet);
        config.checked(Role::Up)
    }

    /// That of `moxlet node`.
    ///
    /// # Errors
    /// As of [`Self::up`].
    pub(crate) fn node(args: &NodeArgs) -> Result<Self> {
        let mut config = Self::of_program(&args.program)?;
        config.override_kubelet(&args.kubelet);
        if args.agent_endpoint.is_some() {
            config.agent_endpoint.clone_from(&args.agent_endpoint);
        }
        config.checked(Role::Node)
    }

    /// That of `moxlet agent`.
    ///
    /// # Errors
    /// As of [`Self::up`].
    pub(crate) fn agent(args: &AgentArgs) -> Result<Self> {
        let mut config = Self::of_program(&args.host.program)?;
        config.override_host(&args.host);
        if args.agent_listen.is_some() {
            config.agent_listen = args.agent_listen;
        }
        config.checked(Role::Agent)
    }

    /// That of the agent which ran on this host, for a program that works on what it left.
    ///
    /// # Errors
    /// As of [`Self::up`].
    pub(crate) fn host(args: &HostArgs) -> Result<Self> {
        let mut config = Self::of_program(&args.program)?;
        config.override_host(args);
        // How it was reached is the same to what it left.
        (config.agent_listen, config.agent_endpoint) = (None, None);
        (config.link_certificate_file, config.link_key_file, config.link_ca_file) = (None, None, None);
        config.checked(Role::Agent)
    }

    /// That of a file alone, before anything is checked of it.
    ///
    /// # Errors
    /// The file cannot be read, is over 1 MiB, or has a bad key.
    pub(crate) fn unchecked(file: &std::path::Path) -> Result<Self> {
        read::read(file)
    }

    /// Reads the file named by `--config` (or none) and lays the flags of every program over it.
    fn of_program(flags: &ProgramArgs) -> Result<Self> {
        let mut config = match &flags.config {
            Some(path) => read::read(path)?,
            None => Self::default(),
        };
        set(&mut config.root_dir, flags.root_dir.clone());
        set(&mut config.log, flags.log.clone());
        set(&mut config.log_format, flags.log_format);
        Ok(config)
    }

    fn override_host(&mut self, flags: &HostArgs) {
        if flags.cri_socket.is_some() {
            self.cri_socket.clone_from(&flags.cri_socket);
        }
        self.plain_http_registries.extend(flags.plain_http_registries.iter().cloned());
        self.stop_pods |= flags.stop_pods;
    }

    fn override_kubelet(&mut self, flags: &KubeletArgs) {
        for (key, flag) in [
            (&mut self.bootstrap_kubeconfig, &flags.bootstrap_kubeconfig),
            (&mut self.static_pod_dir, &flags.static_pod_dir),
        ] {
            if flag.is_some() {
                key.clone_from(flag);
            }
        }
        // KUBECONFIG is often set for another purpose: what is said to Moxlet itself comes first.
        let file_says = self.kubeconfig.is_some() || self.bootstrap_kubeconfig.is_some();
        let from_flag = flags.kubeconfig_source == Some(ValueSource::CommandLine);
        if flags.kubeconfig.is_some() && (from_flag || !file_says) {
            self.kubeconfig.clone_from(&flags.kubeconfig);
        }
        if flags.node_name.is_some() {
            self.node_name.clone_from(&flags.node_name);
        }
        set(&mut self.listen, flags.listen);
        if flags.node_ip.is_some() {
            self.node_ip = flags.node_ip;
        }
    }

    /// What this program proves itself with on the link.
    ///
    /// # Errors
    /// Some of the three files are given, and not all.
    pub(crate) fn link_files(&self) -> Result<Option<CertificateFiles>> {
        match (&self.link_certificate_file, &self.link_key_file, &self.link_ca_file) {
            (Some(certificate), Some(key), Some(ca)) => Ok(Some(CertificateFiles {
                certificate: certificate.clone(),
                key: key.clone(),
                ca: ca.clone(),
            })),
            (None, None, None) => Ok(None),
            _ => bail!(
                "link_certificate_file, link_key_file and link_ca_file belong together: give all three or none"
            ),
        }
    }

    /// Where the node finds its agent.
    pub(crate) fn agent_endpoint(&self) -> Endpoint {
        self.agent_endpoint.clone().unwrap_or_else(|| Endpoint::Unix(self.cri_socket()))
    }

    /// Where the CRI socket is served.
    pub(crate) fn cri_socket(&self) -> PathBuf {
        self.cri_socket.clone().unwrap_or_else(|| self.root_dir.join("run/agent.sock"))
    }
}

fn set<T>(key: &mut T, flag: Option<T>) {
    if let Some(value) = flag {
        *key = value;
    }
}

#[cfg(test)]
mod tests;
