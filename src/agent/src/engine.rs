//! Which engine an agent has, opened: the engine, the cgroups of its CTs, and who attaches their networks; and who
//! else holds a CT.

use std::sync::Arc;

use crate::{
    Config, PATIENCE,
    config::{EngineSettings, PveSettings},
    error::{Error, Result},
    facts,
    network::{EngineNetwork, Network, parse_bridge},
};
use moxlet_ids::SandboxId;
use moxlet_network::{Cni, CniConfig, forwarding};
use moxlet_sandbox::{Engine, LxcConfig, LxcEngine, cgroup::ContainerCgroups, pve::PveHost};

/// An engine and what goes with it.
pub(crate) struct Opened {
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) cgroups: ContainerCgroups,
    pub(crate) network: Network,
}

/// Opens the engine of the configuration.
///
/// # Errors
/// The host is not fit for it, with a hint where there is one.
pub(crate) async fn open(config: &Config) -> Result<Opened> {
    match &config.engine {
        EngineSettings::Lxc => lxc(config).await,
        EngineSettings::Pve(settings) => pve(config, settings).await,
    }
}

/// Refuses a change of a CT, or of what is in it, that somebody else holds: a backup relies on its state.
///
/// # Errors
/// [`Error::Held`], or what the engine says where it does not know.
pub(crate) async fn not_held(engine: &dyn Engine, id: &SandboxId) -> Result<()> {
    match engine.held_by(id).await? {
        Some(by) => Err(Error::Held { sandbox: id.to_string(), by }),
        None => Ok(()),
    }
}

async fn lxc(config: &Config) -> Result<Opened> {
    let engine = LxcEngine::new(LxcConfig {
        dir: config.root_dir.join("lxc"),
        map: config.map,
        manage_subids: true,
        start_timeout: PATIENCE,
    })
    .await?;
    forwarding::record(&config.root_dir.join("ip_forward"))?;
    Ok(Opened {
        engine: Arc::new(engine),
        cgroups: ContainerCgroups::detect()?,
        network: Network::Cni(Box::new(Cni::new(cni(config)).await?)),
    })
}

async fn pve(config: &Config, settings: &PveSettings) -> Result<Opened> {
    let short = || facts::hostname().split('.').next().unwrap_or_default().to_owned();
    let mut bridges = vec![settings.bridge.clone()];
    for entry in &settings.extra_bridges {
        let (bridge, _) = parse_bridge(entry).map_err(|e| Error::Unfit(format!("pve.extra_bridges: {e}")))?;
        bridges.push(bridge);
    }
    let facts = facts::read(&config.root_dir, config.resolv_conf.as_deref());
    let host = PveHost {
        endpoints: settings.endpoints.clone(),
        token_file: settings.token_file.clone(),
        ca_file: settings.ca_file.clone(),
        fingerprints: settings.fingerprints.clone(),
        node: settings.node.clone().unwrap_or_else(short),
        storage: settings.storage.clone(),
        vmids: (settings.vmid_min, settings.vmid_max),
        bridges,
        mtu: settings.mtu,
        protection: settings.protection,
        pool: settings.pool.clone(),
        config_dir: settings.config_dir.clone(),
        lock_dir: settings.lock_dir.clone(),
        dir: config.root_dir.join("pve"),
        memory_bytes: facts.memory_bytes - config.reserved_memory(facts.memory_bytes),
        cores: facts.cpus,
        start_timeout: PATIENCE,
    };
    let (engine, cgroups) = host.open().await?;
    let network = EngineNetwork::open(settings.clone(), &config.root_dir.join("addresses"))?;
    Ok(Opened { engine: Arc::new(engine), cgroups, network: Network::Engine(Box::new(network)) })
}

/// How pods are attached on the engine `lxc`.
pub(crate) fn cni(config: &Config) -> CniConfig {
    let root = &config.root_dir;
    CniConfig {
        conf_dir: config.cni.use_host_conf.clone().unwrap_or_else(|| root.join("cni/net.d")),
        bin_dirs: config.cni.bin_dirs.clone(),
        cache_dir: root.join("cni/cache"),
        ipam_dir: root.join("cni/ipam"),
        pod_cidr: config.pod_cidr.clone(),
        bridge_name: config.cni.bridge.clone(),
        network_name: "moxlet".to_owned(),
        ip_masq: true,
        write_default: config.cni.use_host_conf.is_none(),
        timeout: PATIENCE,
    }
}
