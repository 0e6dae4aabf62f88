//! The serving certificate: signed by itself until the cluster has issued one, then that, renewed in time and when
//! the node's addresses change. TLS asks for it at each handshake, so a new one counts at once.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use rustls::{
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    keys,
    keys::{Leaf, Pair},
    names::ServingNames,
    request::{self, Purpose},
    store::Store,
};
use crate::Result;

/// Pause after a request that was refused.
const AFTER_REFUSAL: Duration = Duration::from_secs(900);
/// Pause after a request that failed for another reason.
const AFTER_FAILURE: Duration = Duration::from_secs(15);

/// The certificate that TLS shows now.
#[derive(Debug)]
pub struct ServingCertificate {
    current: RwLock<Arc<CertifiedKey>>,
}

impl ServingCertificate {
    pub(super) fn new(pair: &Pair) -> Self {
        Self { current: RwLock::new(pair.certified.clone()) }
    }

    fn show(&self, pair: &Pair) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = pair.certified.clone();
    }

    /// The chain and key that are shown now.
    #[must_use]
    pub fn current(&self) -> Arc<CertifiedKey> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ResolvesServerCert for ServingCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

/// Whether a stored certificate will do for those names.
pub(super) fn usable(leaf: &Leaf, node: &str, names: &ServingNames, now: i64) -> bool {
    leaf.is_node(node) && leaf.valid_at(now) && leaf.covers(names)
}

/// What is shown before any name is known: what is stored, else one signed by itself for the node's name.
pub(super) fn first(store: &Store, node: &str) -> Result<Pair> {
    let none = ServingNames::default();
    match store.pair(Purpose::Serving.file())?.filter(|p| usable(&p.leaf, node, &none, keys::now())) {
        Some(pair) => Ok(pair),
        None => keys::self_signed(node, &ServingNames { dns: vec![node.to_owned()], ips: Vec::new() }),
    }
}

/// Keeps the certificate fresh until the token is cancelled.
pub(super) async fn keep_fresh(
    shown: Arc<ServingCertificate>,
    client: Option<kube::Client>,
    store: Store,
    node: String,
    mut names: watch::Receiver<Option<ServingNames>>,
    stop: CancellationToken,
) {
    loop {
        let wanted = names.borrow_and_update().clone();
        let step = async {
            match (&client, &wanted) {
                (_, None) => std::future::pending().await,
                (None, Some(wanted)) => {
                    match keys::self_signed(&node, wanted) {
                        Ok(pair) => shown.show(&pair),
                        Err(error) => tracing::warn!(%error, "no serving certificate for these names"),
                    }
                    std::future::pending::<()>().await;
                }
                (Some(client), Some(wanted)) => provide(&shown, client, &store, &node, wanted).await,
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            changed = names.changed() => if changed.is_err() { return },
            () = step => {}
        }
    }
}

/// One certificate's time: shows what is stored, waits until it must be renewed, gets the next.
async fn provide(
    shown: &ServingCertificate,
    client: &kube::Client,
    store: &Store,
    node: &str,
    names: &ServingNames,
) {
    match store.pair(Purpose::Serving.file()) {
        Ok(Some(pair)) if usable(&pair.leaf, node, names, keys::now()) => {
            shown.show(&pair);
            keys::sleep_until(pair.leaf.renew_at(rand::random())).await;
        }
        Ok(Some(pair)) if pair.leaf.valid_at(keys::now()) => {
            tracing::info!("the node's names have changed: a new serving certificate is requested");
        }
        Ok(_) => match keys::self_signed(node, names) {
            Ok(pair) => shown.show(&pair),
            Err(error) => tracing::warn!(%error, "no serving certificate for these names"),
        },
        Err(error) => {
            tracing::warn!(error = crate::chain(&error), "stored serving certificate cannot be read");
        }
    }
    match request::obtain(client, store, Purpose::Serving, node, Some(names)).await {
        Ok(pair) => shown.show(&pair),
        Err(error) => {
            let refused = matches!(error, crate::Error::Certificate { .. });
            let pause = if refused { AFTER_REFUSAL } else { AFTER_FAILURE };
            tracing::warn!(error = crate::chain(&error), retry_after = ?pause, "no serving certificate from the cluster");
            tokio::time::sleep(pause).await;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn names(ip: &str) -> ServingNames {
        ServingNames { dns: vec!["n1".into()], ips: vec![ip.parse().unwrap()] }
    }

    #[test]
    fn a_stored_certificate_must_fit() {
        let leaf = keys::self_signed("n1", &names("10.0.0.1")).unwrap().leaf;
        let now = keys::now();
        assert!(usable(&leaf, "n1", &names("10.0.0.1"), now));
        assert!(!usable(&leaf, "n2", &names("10.0.0.1"), now));
        assert!(!usable(&leaf, "n1", &names("10.0.0.2"), now));
        assert!(!usable(&leaf, "n1", &names("10.0.0.1"), leaf.not_after));
    }

    #[tokio::test]
    async fn without_a_cluster_it_signs_for_new_names_itself() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let shown = Arc::new(ServingCertificate::new(&first(&store, "n1").unwrap()));
        let (send, receive) = watch::channel(None);
        let stop = CancellationToken::new();
        let task = tokio::spawn(keep_fresh(shown.clone(), None, store, "n1".into(), receive, stop.clone()));
        send.send_replace(Some(names("10.9.8.7")));
        let mut seen = false;
        for _ in 0..200 {
            let leaf = Leaf::parse(&shown.current().cert[0]).unwrap();
            seen = leaf.covers(&names("10.9.8.7"));
            if seen {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(seen);
        stop.cancel();
        task.await.unwrap();
    }
}
