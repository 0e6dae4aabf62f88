//! The CRI runtime whose pod sandboxes are CTs.
//!
//! As built so far: its configuration, its error, and the opening of the parts below it (storage, CTs, network, images)
//! with the checks of the host that they make. The CRI service, the host service and the streaming server over them are
//! not there, so [`Agent::start`] ends by saying so instead of pretending.

mod config;
mod error;

use std::sync::Arc;

use moxlet_image::ImageStore;
use moxlet_network::{Cni, CniConfig};
use moxlet_sandbox::{LxcConfig, LxcEngine};
use moxlet_storage::OverlayDriver;
use tokio_util::sync::CancellationToken;

pub use config::{CniSettings, Config};
pub use error::{Error, Result};

/// A running agent.
pub struct Agent {
    config: Config,
}

/// How long a CT's start or a CNI plugin may take.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

impl Agent {
    /// Opens the parts of the agent, each of which checks what it needs of the host.
    ///
    /// # Errors
    /// The host is not fit, with a hint where there is one; else [`Error::Unfit`], as the services are not built yet.
    pub async fn start(config: Config, _stop: CancellationToken) -> Result<Self> {
        let root = &config.root_dir;
        let driver = Arc::new(OverlayDriver::open(&root.join("storage")).await?);
        let engine = LxcEngine::new(LxcConfig {
            dir: root.join("lxc"),
            map: config.map,
            manage_subids: true,
            start_timeout: PATIENCE,
        })
        .await?;
        let own = config.cni.use_host_conf.is_none();
        Cni::new(CniConfig {
            conf_dir: config.cni.use_host_conf.clone().unwrap_or_else(|| root.join("cni/net.d")),
            bin_dirs: config.cni.bin_dirs.clone(),
            cache_dir: root.join("cni/cache"),
            ipam_dir: root.join("cni/ipam"),
            pod_cidr: config.pod_cidr.clone(),
            bridge_name: config.cni.bridge.clone(),
            network_name: "moxlet".to_owned(),
            ip_masq: true,
            write_default: own,
            timeout: PATIENCE,
        })
        .await?;
        ImageStore::open(
            moxlet_image::Config {
                dir: root.join("images"),
                plain_http_hosts: config.plain_http_registries.clone(),
                max_parallel_downloads: config.max_parallel_downloads,
            },
            driver.clone(),
        )
        .await?;
        driver.close().await?;
        drop(engine);
        let text = "this version of Moxlet cannot run pods yet: the agent's CRI service is not built (see CHANGELOG.md)";
        Err(Error::Unfit(text.to_owned()))
    }

    /// Where the CRI socket is: `unix:///…`.
    #[must_use]
    pub fn cri_endpoint(&self) -> String {
        format!("unix://{}", self.config.cri_socket.display())
    }

    /// Stops all pods, each with this grace.
    pub async fn stop_pods(&self, _grace: std::time::Duration) {}

    /// Waits until all tasks have ended.
    pub async fn join(self) {}
}
