//! The configuration file: one TOML table, unknown keys refused by name and line.
//!
//! `docs/configuration.md` is the reference; a test compares its list of keys with this one.

use std::{
    collections::BTreeMap,
    io::Read as _,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::parser::ValueSource;
use moxlet_cri::link::{CertificateFiles, Endpoint};
use serde::Deserialize;

use crate::{
    cli::{AgentArgs, HostArgs, KubeletArgs, LogFormat, NodeArgs, ProgramArgs, UpArgs},
    duration::Span,
    pve_config::Pve,
};

/// The largest configuration file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

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
    pub(crate) container_root_quota: Option<u64>,
    pub(crate) log: String,
    pub(crate) log_format: LogFormat,
    pub(crate) stop_pods: bool,

    pub(crate) node_name: Option<String>,
    pub(crate) kubeconfig: Option<PathBuf>,
    pub(crate) bootstrap_kubeconfig: Option<PathBuf>,
    pub(crate) client_ca_file: Option<PathBuf>,
    pub(crate) listen: SocketAddr,
    pub(crate) node_ip: Option<IpAddr>,
    pub(crate) static_pod_dir: Option<PathBuf>,
    pub(crate) register_taints: Vec<String>,
    pub(crate) node_labels: BTreeMap<String, String>,
    pub(crate) max_pods: u32,
    pub(crate) cluster_dns: Vec<IpAddr>,
    pub(crate) cluster_domain: String,

    pub(crate) image_gc_high_threshold_percent: u8,
    pub(crate) image_gc_low_threshold_percent: u8,
    pub(crate) image_minimum_gc_age: Span,
    pub(crate) image_maximum_gc_age: Option<Span>,
    #[serde(deserialize_with = "pressure_thresholds")]
    pub(crate) pressure_thresholds: moxlet_node::PressureThresholds,
    pub(crate) image_prefetch_max_bytes: u64,

    #[serde(deserialize_with = "endpoint")]
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
    pub(crate) container_log_max_bytes: u64,
    pub(crate) container_log_max_files: u32,
    pub(crate) sandbox_overhead_memory_bytes: u64,
    pub(crate) system_reserved_memory_bytes: Option<u64>,

    pub(crate) pod_cidr: Option<String>,
    pub(crate) bridge: String,
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
            client_ca_file: None,
            listen: SocketAddr::from(([0, 0, 0, 0], 10250)),
            node_ip: None,
            static_pod_dir: None,
            register_taints: vec!["virtual-kubelet.io/provider=proxmox:NoSchedule".to_owned()],
            node_labels: BTreeMap::new(),
            max_pods: 110,
            cluster_dns: Vec::new(),
            cluster_domain: "cluster.local".to_owned(),
            image_gc_high_threshold_percent: 85,
            image_gc_low_threshold_percent: 80,
            image_minimum_gc_age: Span(std::time::Duration::from_secs(120)),
            image_maximum_gc_age: None,
            pressure_thresholds: moxlet_node::PressureThresholds::default(),
            image_prefetch_max_bytes: moxlet_agent::Config::default().image_prefetch_max_bytes,
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
            container_log_max_bytes: 10 << 20,
            container_log_max_files: 5,
            sandbox_overhead_memory_bytes: 16 << 20,
            system_reserved_memory_bytes: None,
            pod_cidr: None,
            bridge: "moxlet0".to_owned(),
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

    /// Reads the file named by `--config` (or none) and lays the flags of every program over it.
    fn of_program(flags: &ProgramArgs) -> Result<Self> {
        let mut config = match &flags.config {
            Some(path) => Self::read(path)?,
            None => Self::default(),
        };
        set(&mut config.root_dir, flags.root_dir.clone());
        set(&mut config.log, flags.log.clone());
        set(&mut config.log_format, flags.log_format);
        Ok(config)
    }

    fn read(path: &Path) -> Result<Self> {
        let context = || format!("cannot read the configuration file {}", path.display());
        let mut text = String::new();
        let file = std::fs::File::open(path).with_context(context)?;
        file.take(MAX_FILE + 1).read_to_string(&mut text).with_context(context)?;
        if text.len() as u64 > MAX_FILE {
            bail!("{}: it has more than {MAX_FILE} bytes", context());
        }
        toml::from_str(&text).map_err(|e| {
            let line = e.span().map(|s| text[..s.start.min(text.len())].matches('\n').count() + 1);
            let at = line.map_or_else(String::new, |l| format!(", line {l}"));
            anyhow::anyhow!(
                "configuration file {}{at}: {} (docs/configuration.md lists every key)",
                path.display(),
                e.message().trim()
            )
        })
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

    fn checked(self, role: Role) -> Result<Self> {
        if !self.root_dir.is_absolute() {
            bail!("root_dir {} is not an absolute path", self.root_dir.display());
        }
        if role != Role::Agent {
            self.check_node()?;
        }
        if role != Role::Node {
            self.check_agent()?;
        }
        self.check_link(role)?;
        Ok(self)
    }

    /// What the node reads.
    fn check_node(&self) -> Result<()> {
        // A node's own kubeconfig may not exist before the bootstrap has written it.
        let made_later = self.bootstrap_kubeconfig.is_some();
        must_exist("kubeconfig", self.kubeconfig.as_deref().filter(|_| !made_later))?;
        must_exist("bootstrap_kubeconfig", self.bootstrap_kubeconfig.as_deref())?;
        must_exist("client_ca_file", self.client_ca_file.as_deref())?;
        must_exist("static_pod_dir", self.static_pod_dir.as_deref())?;
        let (low, high) = (self.image_gc_low_threshold_percent, self.image_gc_high_threshold_percent);
        if high > 100 || low > high {
            bail!(
                "image_gc_high_threshold_percent ({high}) must be at most 100 and image_gc_low_threshold_percent ({low}) not above it"
            );
        }
        if self.max_pods == 0 {
            bail!("max_pods must be at least 1");
        }
        Ok(())
    }

    /// What the agent reads.
    fn check_agent(&self) -> Result<()> {
        must_exist("init_binary", self.init_binary.as_deref())?;
        must_exist("cni_conf_dir", self.cni_conf_dir.as_deref())?;
        must_exist("registry_config_dir", self.registry_config_dir.as_deref())?;
        must_exist("docker_config", self.docker_config.as_deref())?;
        match (self.storage, &self.zfs_dataset) {
            (Storage::Zfs, None) => {
                bail!("storage = \"zfs\" needs zfs_dataset, such as zfs_dataset = \"rpool/moxlet\"");
            }
            (Storage::Overlay, Some(dataset)) => {
                bail!("zfs_dataset = {dataset:?} is of no use without storage = \"zfs\"");
            }
            _ => {}
        }
        if self.container_root_quota == Some(0) {
            bail!("container_root_quota must be at least 1 byte; leave it out for no quota");
        }
        match (self.engine, &self.pve) {
            (Engine::Lxc, Some(_)) => bail!("there is a section [pve], but engine is not \"pve\""),
            (Engine::Pve, pve) => drop(pve.clone().unwrap_or_default().settings()?),
            (Engine::Lxc, None) => {}
        }
        if self.container_log_max_files < 2 {
            bail!("container_log_max_files must be at least 2, as the kubelet's containerLogMaxFiles");
        }
        Ok(())
    }

    /// What node and agent read of the link between them.
    fn check_link(&self, role: Role) -> Result<()> {
        match role {
            Role::Up if self.agent_listen.is_some() || self.agent_endpoint.is_some() => bail!(
                "agent_listen and agent_endpoint are for node and agent apart (`moxlet node`, `moxlet agent`); with `moxlet up` they \
                 are one process"
            ),
            Role::Agent if self.agent_listen.is_some() => self.need_link_files("agent_listen"),
            Role::Node if matches!(self.agent_endpoint, Some(Endpoint::Tls { .. })) => {
                self.need_link_files("an agent_endpoint of https://")
            }
            _ if self.link_files()?.is_some() => bail!(
                "link_certificate_file and the like are of no use without {}",
                match role {
                    Role::Agent => "agent_listen",
                    Role::Node => "an agent_endpoint of https://",
                    Role::Up => "`moxlet node` or `moxlet agent`: with `moxlet up` they are one process",
                }
            ),
            _ => Ok(()),
        }
    }

    fn need_link_files(&self, what: &str) -> Result<()> {
        if self.link_files()?.is_none() {
            bail!(
                "{what} needs link_certificate_file, link_key_file and link_ca_file, by which node and agent know one another \
                 (`moxlet certificates` makes them)"
            );
        }
        Ok(())
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

/// A file that a key names must be there.
fn must_exist(key: &str, path: Option<&Path>) -> Result<()> {
    match path {
        Some(path) if !path.exists() => bail!("{key}: {} does not exist", path.display()),
        _ => Ok(()),
    }
}

fn endpoint<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Endpoint>, D::Error> {
    let text = <String as serde::Deserialize>::deserialize(from)?;
    text.parse().map(Some).map_err(serde::de::Error::custom)
}

/// A table of signals and thresholds, over the kubelet's defaults.
fn pressure_thresholds<'de, D: serde::Deserializer<'de>>(
    from: D,
) -> Result<moxlet_node::PressureThresholds, D::Error> {
    let given = <BTreeMap<String, String> as serde::Deserialize>::deserialize(from)?;
    let given = given.iter().map(|(signal, text)| (signal.as_str(), text.as_str()));
    moxlet_node::PressureThresholds::of(given).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests;
