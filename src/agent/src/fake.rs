//! The rooms of an agent for tests: an engine in memory, stores below a directory, no network.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use moxlet_ids::SandboxId;
use moxlet_network::{Cni, CniConfig};
use moxlet_sandbox::{Limits, SandboxSpec, cgroup::ContainerCgroups, fake::FakeEngine};
use moxlet_storage::{IdMap, OverlayDriver, idmap};
use tokio_util::sync::CancellationToken;

use crate::{
    Config,
    ledger::Ledger,
    network::Network,
    retries::Work,
    rooms::{Opened, Rooms},
    volumes::Volumes,
};

/// Rooms with all of it below this directory, and what comes to be reconciled.
pub(crate) async fn rooms(
    root: &Path,
    engine: Arc<FakeEngine>,
) -> (Rooms, tokio::sync::mpsc::UnboundedReceiver<Work>) {
    let driver = Arc::new(OverlayDriver::open(&root.join("storage")).await.unwrap());
    let images = moxlet_image::Config {
        dir: root.join("images"),
        max_parallel_downloads: 1,
        ..moxlet_image::Config::default()
    };
    let config = Config { root_dir: root.to_owned(), ..Config::default() };
    let cni = CniConfig {
        conf_dir: root.join("net.d"),
        bin_dirs: Vec::new(),
        cache_dir: root.join("cni"),
        ipam_dir: root.join("ipam"),
        pod_cidr: None,
        bridge_name: "moxlet0".to_owned(),
        network_name: "moxlet".to_owned(),
        ip_masq: false,
        write_default: false,
        timeout: Duration::from_secs(30),
    };
    std::fs::create_dir_all(root.join("pods")).unwrap();
    std::fs::create_dir_all(root.join("run")).unwrap();
    Rooms::new(Opened {
        shifted: idmap::Namespace::new(IdMap::default()).unwrap(),
        images: moxlet_image::ImageStore::open(images, driver.clone()).await.unwrap(),
        driver,
        engine,
        network: Network::Cni(Box::new(Cni::new(cni).await.unwrap())),
        cgroups: ContainerCgroups::detect().unwrap(),
        volumes: Volumes::open(root.join("volumes"), config.map).unwrap(),
        ledger: Ledger::open(&root.join("ledger")).unwrap(),
        init_binary: root.join("init"),
        stop: CancellationToken::new(),
        config,
    })
}

/// What the engine is asked for of a sandbox that says nothing else.
pub(crate) fn spec(id: &SandboxId) -> SandboxSpec {
    SandboxSpec {
        id: id.clone(),
        pod_namespace: "default".into(),
        pod_name: "web".into(),
        pod_uid: "uid-1".parse().unwrap(),
        attempt: 0,
        hostname: "web".into(),
        map: IdMap::default(),
        shared_dir: "/x".into(),
        init_binary: "/x".into(),
        init_args: Vec::new(),
        limits: Limits::default(),
        sysctls: BTreeMap::new(),
        stop_grace: Duration::ZERO,
        nics: Vec::new(),
    }
}
