//! Who the node is: its client of the API server, its serving certificate, and the CA of its callers.
//!
//! Three ways lead to a client: a ready kubeconfig; a bootstrap kubeconfig, with which a client certificate is
//! requested, kept in the state directory and renewed; or none (standalone). The client that is handed out stays
//! valid when its certificate is replaced: it sends each request through the newest inner client.
//!
//! Tasks: one renews the client certificate (or looks whether the kubeconfig has changed), one the serving one.

mod client;
mod keys;
mod kubeconfig;
mod names;
mod request;
mod serving;
mod store;

use std::{path::Path, sync::Arc};

use rustls::RootCertStore;
use rustls_pki_types::{CertificateDer, pem::PemObject};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::{client::Rotating, store::Store};
pub use self::{names::ServingNames, serving::ServingCertificate};
use crate::{Config, Error, Result};

/// The node's identity; clones share it.
#[derive(Clone)]
pub struct Identity {
    client: Option<kube::Client>,
    serving: Arc<ServingCertificate>,
    client_ca: Option<Arc<RootCertStore>>,
    names: Arc<watch::Sender<Option<ServingNames>>>,
}

impl Identity {
    /// The client of the API server, if there is one. It stays valid over rotations: keep it, clone it.
    #[must_use]
    pub fn client(&self) -> Option<kube::Client> {
        self.client.clone()
    }

    /// The certificate of the kubelet API; its content changes when it is renewed.
    #[must_use]
    pub fn serving(&self) -> Arc<ServingCertificate> {
        self.serving.clone()
    }

    /// The certificates that sign callers of the kubelet API, if any are known.
    #[must_use]
    pub fn client_ca(&self) -> Option<Arc<RootCertStore>> {
        self.client_ca.clone()
    }

    /// Says which names and addresses the serving certificate must hold; call it once they are known and when
    /// they change. Nothing is requested before the first call.
    pub fn set_serving_names(&self, names: ServingNames) {
        self.names.send_if_modified(|now| {
            let changed = now.as_ref() != Some(&names);
            *now = Some(names);
            changed
        });
    }
}

/// Finds or requests the node's identity and keeps it fresh until the token is cancelled.
///
/// With a bootstrap kubeconfig this waits until the certificate is issued.
///
/// # Errors
/// When a kubeconfig cannot be used, the API server refuses the bootstrap token, or state cannot be kept.
pub async fn establish(config: &Config, stop: &CancellationToken) -> Result<Identity> {
    // kube builds its TLS from the process's provider; the second of two calls fails and changes nothing.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let store = Store::open(&config.state_dir)?;
    let rotating = Rotating::establish(config, &store, stop).await?;
    let client_ca = match (&config.client_ca_file, &rotating) {
        (Some(path), _) => Some(Arc::new(roots_from_file(path)?)),
        (None, Some(rotating)) => {
            rotating.ca().map(|ca| roots(ca.iter().cloned().map(CertificateDer::from))).transpose()?
        }
        (None, None) => None,
    };
    let client = rotating.as_ref().map(Rotating::client);
    if let Some(rotating) = rotating {
        tokio::spawn(rotating.keep_fresh(store.clone(), stop.clone()));
    }
    let serving = Arc::new(ServingCertificate::new(&serving::first(&store, &config.node_name)?));
    let (names, receive) = watch::channel(None);
    let task = serving::keep_fresh(
        serving.clone(),
        client.clone(),
        store,
        config.node_name.clone(),
        receive,
        stop.clone(),
    );
    tokio::spawn(task);
    Ok(Identity { client, serving, client_ca, names: Arc::new(names) })
}

fn roots(certificates: impl Iterator<Item = CertificateDer<'static>>) -> Result<Arc<RootCertStore>> {
    let mut store = RootCertStore::empty();
    for certificate in certificates {
        store
            .add(certificate)
            .map_err(|e| Error::Certificate { what: "use the CA of the callers", reason: e.to_string() })?;
    }
    Ok(Arc::new(store))
}

fn roots_from_file(path: &Path) -> Result<RootCertStore> {
    let pem =
        std::fs::read(path).map_err(|source| Error::File { what: "read", path: path.to_owned(), source })?;
    let bad = |reason: String| Error::Config {
        key: "client_ca_file",
        reason: format!("{}: {reason}", path.display()),
    };
    let certificates = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| bad(e.to_string()))?;
    if certificates.is_empty() {
        return Err(bad("there is no certificate in it".into()));
    }
    let mut store = RootCertStore::empty();
    for certificate in certificates {
        store.add(certificate).map_err(|e| bad(e.to_string()))?;
    }
    Ok(store)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[tokio::test]
    async fn standalone_has_a_certificate_and_no_client() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { state_dir: dir.path().into(), node_name: "n1".into(), ..Config::default() };
        let stop = CancellationToken::new();
        let identity = establish(&config, &stop).await.unwrap();
        assert!(identity.client().is_none() && identity.client_ca().is_none());
        assert_eq!(identity.serving().current().cert.len(), 1);
        stop.cancel();
    }

    #[tokio::test]
    async fn the_callers_ca_comes_from_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ca.crt");
        let names = ServingNames { dns: vec!["ca".into()], ips: vec![] };
        std::fs::write(&file, &keys::self_signed("ca", &names).unwrap().chain_pem).unwrap();
        assert_eq!(roots_from_file(&file).unwrap().len(), 1);
        std::fs::write(&file, "").unwrap();
        assert!(roots_from_file(&file).unwrap_err().to_string().contains("client_ca_file"));
        assert!(roots_from_file(&dir.path().join("none")).is_err());
    }

    #[tokio::test]
    async fn a_ready_kubeconfig_makes_a_client() {
        let dir = tempfile::tempdir().unwrap();
        let path = kubeconfig::tests::write(dir.path(), "https://127.0.0.1:1");
        let config = Config {
            state_dir: dir.path().into(),
            kubeconfig: Some(path),
            node_name: "n1".into(),
            ..Config::default()
        };
        let stop = CancellationToken::new();
        assert!(establish(&config, &stop).await.unwrap().client().is_some());
        stop.cancel();
    }
}
