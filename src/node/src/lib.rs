//! A kubelet for a cluster of hosts: registration, pod workers, status, kubelet API.

pub mod api;
mod config;
mod error;
pub mod identity;
pub mod metrics;
pub mod pods;

pub use config::Config;
pub use error::{Error, Result, chain};

/// Runs the node until the token is cancelled. Pods keep running.
///
/// # Errors
/// When the configuration, the identity or the agent cannot be used.
pub async fn run(_config: Config, stop: tokio_util::sync::CancellationToken) -> Result<()> {
    stop.cancelled().await;
    Ok(())
}
