//! Which engine an agent has, opened: the engine, the cgroups of its CTs, and who attaches their networks.

use std::{path::Path, sync::Arc};

use moxlet_network::{Cni, CniConfig, forwarding};
use moxlet_pve::{Client, Endpoint, Fingerprint, NodeName, Token, Trust, Vmid};
use moxlet_sandbox::{
    Engine, LxcConfig, LxcEngine,
    cgroup::{ContainerCgroups, Numbers},
    pve::{CgroupInits, PveConfig, PveEngine, Requirements, VmidRange, ZfsVolumes},
};

use crate::{
    Config, PATIENCE,
    config::{EngineSettings, PveSettings},
    error::{Error, Result},
    facts,
    network::{EngineNetwork, Network, parse_bridge},
};

/// A token's file is not larger, nor is a list of certificates.
const MAX_FILE: u64 = 1 << 20;

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
    let unfit = |key: &str, e: &dyn std::fmt::Display| Error::Unfit(format!("pve.{key}: {e}"));
    let node: NodeName = match &settings.node {
        Some(name) => name.parse().map_err(|e| unfit("node", &e))?,
        None => {
            let name = facts::hostname();
            let short = name.split('.').next().unwrap_or_default();
            short.parse().map_err(|e| unfit("node", &e))?
        }
    };
    let number = |key: &'static str, n: u32| Vmid::new(n).map_err(|e| unfit(key, &e));
    let range =
        VmidRange::new(number("vmid_min", settings.vmid_min)?, number("vmid_max", settings.vmid_max)?)?;
    let storage = settings.storage.parse().map_err(|e| unfit("storage", &e))?;
    let client = client(settings)?;
    let mut bridges = vec![settings.bridge.clone()];
    for entry in &settings.extra_bridges {
        bridges.push(parse_bridge(entry).map_err(|e| unfit("extra_bridges", &e))?.0);
    }
    let required = Requirements {
        client: &client,
        node: &node,
        storage: &storage,
        bridges: &bridges,
        range,
        config_dir: &settings.config_dir,
        net_dir: Path::new("/sys/class/net"),
    };
    let pool = required.check().await?;
    let numbers = Numbers::default();
    let cgroups = ContainerCgroups::numbered(numbers.clone())?;
    let facts = facts::read(&config.root_dir);
    let engine = PveEngine::new(
        PveConfig {
            dir: config.root_dir.join("pve"),
            config_dir: settings.config_dir.clone(),
            lock_dir: settings.lock_dir.clone(),
            node,
            storage,
            range,
            protection: settings.protection,
            memory_bytes: facts.memory_bytes,
            cores: facts.cpus,
            start_timeout: PATIENCE,
        },
        client,
        Arc::new(ZfsVolumes::open(&pool).await?),
        Arc::new(CgroupInits::new(cgroups.clone())),
        numbers,
    )?;
    let network = EngineNetwork::open(settings.clone(), &config.root_dir.join("addresses"))?;
    Ok(Opened { engine: Arc::new(engine), cgroups, network: Network::Engine(Box::new(network)) })
}

/// A client of the API, from the files that the configuration names.
fn client(settings: &PveSettings) -> Result<Client> {
    let text = |key: &str, path: &Path| {
        let size = std::fs::metadata(path).map_or(0, |m| m.len());
        if size > MAX_FILE {
            return Err(Error::Unfit(format!("pve.{key}: {} is too large", path.display())));
        }
        std::fs::read_to_string(path)
            .map_err(|e| Error::io(format!("pve.{key}: cannot read {}", path.display()), e))
    };
    let token: Token = text("token_file", &settings.token_file)?
        .trim()
        .parse()
        .map_err(|e| Error::Unfit(format!("pve.token_file: {}: {e}", settings.token_file.display())))?;
    let trust = match (&settings.fingerprint, &settings.ca_file) {
        (Some(fingerprint), _) => {
            let fingerprint: Fingerprint =
                fingerprint.parse().map_err(|e| Error::Unfit(format!("pve.fingerprint: {e}")))?;
            Trust::Fingerprint(fingerprint)
        }
        (None, Some(path)) => Trust::Authorities(text("ca_file", path)?.into_bytes()),
        (None, None) => Trust::System,
    };
    let mut builder = Client::builder(token);
    for url in &settings.endpoints {
        let endpoint = Endpoint::new(url, trust.clone());
        builder = builder.endpoint(endpoint.map_err(|e| Error::Unfit(format!("pve.endpoints: {url}: {e}")))?);
    }
    builder.build().map_err(|e| Error::Unfit(e.to_string()))
}

fn cni(config: &Config) -> CniConfig {
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
