//! Which engine an agent has, opened: the engine, the cgroups of its CTs, and who attaches their networks. An engine that
//! could not be sure of all that it needs is asked again until it is.

use std::{sync::Arc, time::Duration};

use moxlet_network::{Cni, CniConfig, forwarding};
use moxlet_sandbox::{Engine, LxcConfig, LxcEngine, cgroup::ContainerCgroups, pve::PveHost};

use tracing::{debug, info};

use crate::{
    Config, PATIENCE,
    config::{EngineSettings, PveSettings},
    core::Core,
    error::{Error, Result, chain},
    facts,
    network::{EngineNetwork, Network, parse_bridge},
};

/// The first pause before an engine with a fault is asked again, doubled each time.
const FIRST: Duration = Duration::from_secs(1);
/// The longest.
const LONGEST: Duration = Duration::from_secs(60);

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

/// Has an engine with a fault look again until it has none or the agent ends.
pub(crate) fn spawn(core: &Arc<Core>) {
    let core = core.clone();
    core.tasks.clone().spawn(async move {
        let mut pause = FIRST;
        while core.engine.fault().is_some() {
            let look = async {
                tokio::time::sleep(pause).await;
                core.engine.check().await
            };
            let looked = tokio::select! {
                () = core.stop.cancelled() => return,
                looked = look => looked,
            };
            match looked {
                Ok(()) => info!("what was in the way of new pods is over"),
                Err(error) => debug!(error = chain(&error), "new pods have to wait still"),
            }
            pause = (pause * 2).min(LONGEST);
        }
    });
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
    let facts = facts::read(&config.root_dir);
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use moxlet_cri::v1;
    use moxlet_sandbox::fake::{Call, FakeEngine};

    use super::*;
    use crate::{fake, sandboxes, status};

    fn condition(core: &Core) -> Option<(bool, String)> {
        let found = status::conditions(core, None).into_iter().find(|c| c.r#type == status::PROXMOX)?;
        Some((found.status, found.message))
    }

    #[tokio::test]
    async fn new_pods_are_refused_with_the_engines_fault_until_a_look_finds_none() {
        let dir = tempfile::tempdir().unwrap();
        let faulty = Arc::new(FakeEngine::default());
        let core = fake::core(dir.path(), faulty.clone()).await;
        assert_eq!(condition(&core), None, "an engine of another kind says nothing of it");
        faulty.break_down("the server is away");
        faulty.refuse(Call::Check, 1);
        faulty.refuse(Call::Start, 1);
        spawn(&core);
        let metadata =
            v1::PodSandboxMetadata { name: "web".into(), uid: "uid-1".into(), ..Default::default() };
        let web = v1::PodSandboxConfig { metadata: Some(metadata), ..Default::default() };
        let refused = sandboxes::run(&core, web.clone(), "").await.unwrap_err();
        assert!(matches!(&refused, Error::Unfit(why) if why.contains("the server is away")), "{refused}");
        assert!(core.sandboxes().is_empty(), "nothing is half made");
        assert_eq!(condition(&core), Some((false, "the server is away".into())));
        core.tasks.close();
        core.tasks.wait().await;
        assert_eq!(core.engine.fault(), None);
        // It gets as far as its start now.
        let error = sandboxes::run(&core, web, "").await.unwrap_err();
        assert!(error.to_string().contains("Start"), "{error}");
    }
}
