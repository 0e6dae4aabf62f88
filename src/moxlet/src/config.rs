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
use serde::Deserialize;

use crate::{
    cli::{CommonArgs, LogFormat, UpArgs},
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
    /// Reads the file named by `--config` (or none) and lays the flags over it.
    ///
    /// # Errors
    /// The file cannot be read, is over 1 MiB, or has a bad key; the message names file, line and key.
    pub(crate) fn load(common: &CommonArgs, up: Option<&UpArgs>) -> Result<Self> {
        let mut config = match &common.config {
            Some(path) => Self::read(path)?,
            None => Self::default(),
        };
        config.override_common(common);
        if let Some(up) = up {
            config.override_up(up);
        }
        config.check()?;
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

    fn override_common(&mut self, flags: &CommonArgs) {
        set(&mut self.root_dir, flags.root_dir.clone());
        set(&mut self.log, flags.log.clone());
        set(&mut self.log_format, flags.log_format);
        if flags.cri_socket.is_some() {
            self.cri_socket.clone_from(&flags.cri_socket);
        }
        self.plain_http_registries.extend(flags.plain_http_registries.iter().cloned());
        self.stop_pods |= flags.stop_pods;
    }

    fn override_up(&mut self, flags: &UpArgs) {
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

    fn check(&self) -> Result<()> {
        if !self.root_dir.is_absolute() {
            bail!("root_dir {} is not an absolute path", self.root_dir.display());
        }
        for (key, path) in [
            ("kubeconfig", &self.kubeconfig),
            ("bootstrap_kubeconfig", &self.bootstrap_kubeconfig),
            ("client_ca_file", &self.client_ca_file),
            ("static_pod_dir", &self.static_pod_dir),
            ("init_binary", &self.init_binary),
            ("cni_conf_dir", &self.cni_conf_dir),
            ("registry_config_dir", &self.registry_config_dir),
            ("docker_config", &self.docker_config),
        ] {
            let Some(path) = path else { continue };
            // A node's own kubeconfig may not exist before the bootstrap has written it.
            let made_later = key == "kubeconfig" && self.bootstrap_kubeconfig.is_some();
            if !made_later && !path.exists() {
                bail!("{key}: {} does not exist", path.display());
            }
        }
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

/// A table of signals and thresholds, over the kubelet's defaults.
fn pressure_thresholds<'de, D: serde::Deserializer<'de>>(
    from: D,
) -> Result<moxlet_node::PressureThresholds, D::Error> {
    let given = <BTreeMap<String, String> as serde::Deserialize>::deserialize(from)?;
    let given = given.iter().map(|(signal, text)| (signal.as_str(), text.as_str()));
    moxlet_node::PressureThresholds::of(given).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::io::Write;

    use super::*;

    fn load(text: &str) -> Result<Config> {
        let path =
            std::env::temp_dir().join(format!("moxlet-config-{}-{:x}", std::process::id(), text.len()));
        std::fs::File::create(&path).unwrap().write_all(text.as_bytes()).unwrap();
        let loaded = Config::load(&CommonArgs { config: Some(path.clone()), ..CommonArgs::default() }, None);
        std::fs::remove_file(path).unwrap();
        loaded
    }

    #[test]
    fn an_empty_file_gives_the_defaults() {
        assert_eq!(load("").unwrap().listen.port(), 10250);
    }

    #[test]
    fn a_file_that_is_too_large_is_refused_also_where_it_has_no_size() {
        let line = "# a comment of 32 bytes for once\n";
        let error = load(&line.repeat(40_000)).unwrap_err().to_string();
        assert!(error.contains("1048576 bytes"), "{error}");
        let error = Config::read(Path::new("/dev/zero")).unwrap_err().to_string();
        assert!(error.contains("/dev/zero") && error.contains("1048576 bytes"), "{error}");
    }

    #[test]
    fn the_environments_kubeconfig_gives_way_to_what_is_said_to_moxlet_itself() {
        let mut up = UpArgs { kubeconfig: Some("/env".into()), ..UpArgs::default() };
        up.kubeconfig_source = Some(ValueSource::EnvVariable);
        let over = |config: &Config, up: &UpArgs| {
            let mut config = config.clone();
            config.override_up(up);
            config.kubeconfig
        };
        let (nothing, mut file) = (Config::default(), Config::default());
        assert_eq!(over(&nothing, &up), Some("/env".into()));
        file.kubeconfig = Some("/file".into());
        assert_eq!(over(&file, &up), Some("/file".into()));
        up.kubeconfig_source = Some(ValueSource::CommandLine);
        assert_eq!(over(&file, &up), Some("/env".into()));
        up.kubeconfig_source = Some(ValueSource::EnvVariable);
        up.bootstrap_kubeconfig = Some("/join".into());
        assert_eq!(over(&nothing, &up), None, "a bootstrap's identity is kept elsewhere");
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let error = load("max_pods = 10\n\nmax_podz = 11\n").unwrap_err().to_string();
        assert!(error.contains("line 3") && error.contains("max_podz"), "{error}");
    }

    #[test]
    fn a_value_of_the_wrong_type_is_named_with_its_line() {
        let error = load("root_dir = \"/x\"\nmax_pods = \"many\"\n").unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
    }

    #[test]
    fn a_file_that_does_not_exist_is_named_with_its_key() {
        for key in ["client_ca_file", "docker_config", "registry_config_dir"] {
            let error = load(&format!("{key} = \"/nonexistent/file\"")).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("/nonexistent/file"), "{error}");
        }
    }

    #[test]
    fn a_store_on_zfs_needs_its_dataset_and_only_that_one_does() {
        let error = load("storage = \"zfs\"").unwrap_err().to_string();
        assert!(error.contains("zfs_dataset"), "{error}");
        let error = load("zfs_dataset = \"rpool/moxlet\"").unwrap_err().to_string();
        assert!(error.contains("storage"), "{error}");
        let config = load("storage = \"zfs\"\nzfs_dataset = \"rpool/moxlet\"\n").unwrap();
        assert_eq!((config.storage, config.zfs_dataset.as_deref()), (Storage::Zfs, Some("rpool/moxlet")));
        let error = load("container_root_quota = 0").unwrap_err().to_string();
        assert!(error.contains("container_root_quota"), "{error}");
    }

    #[test]
    fn the_reference_lists_every_key() {
        let reference = include_str!("../../../docs/configuration.md");
        let source = include_str!("config.rs");
        let (_, body) = source.split_once("pub(crate) struct Config {").unwrap();
        let (body, _) = body.split_once("\n}\n").unwrap();
        for line in body.lines().filter_map(|l| l.trim().strip_prefix("pub(crate) ")) {
            let key = line.split(':').next().unwrap();
            assert!(reference.contains(&format!("| `{key}` |")), "docs/configuration.md does not list {key}");
        }
    }
}
