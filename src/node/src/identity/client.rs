//! The client of the API server, exchanged under its users' hands when its certificate is renewed.

use std::{
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use http::Request;
use kube::client::Body;
use tokio_util::sync::CancellationToken;

use super::{
    keys,
    keys::{Pair, sleep_until},
    kubeconfig,
    request::{self, Purpose},
    store::Store,
};
use crate::{Config, Error, Result};

/// Pause after a failed attempt to get a certificate.
const RETRY: Duration = Duration::from_secs(5);
/// How often a ready kubeconfig is looked at.
const LOOK: Duration = Duration::from_secs(60);

/// Where the client's credentials come from.
enum Source {
    /// A kubeconfig that somebody else keeps.
    Ready { path: PathBuf, fingerprint: u64 },
    /// Server and CA of a bootstrap kubeconfig, and the node's own certificate.
    Own { base: Box<kube::Config>, path: PathBuf, pair: Box<Pair>, node: String },
}

/// The present client and where the next comes from.
pub(super) struct Rotating {
    current: Arc<RwLock<kube::Client>>,
    namespace: String,
    ca: Option<Vec<Vec<u8>>>,
    source: Source,
}

impl Rotating {
    /// The way that the configuration asks for; none without any kubeconfig.
    pub(super) async fn establish(
        config: &Config,
        store: &Store,
        stop: &CancellationToken,
    ) -> Result<Option<Self>> {
        match (&config.kubeconfig, &config.bootstrap_kubeconfig) {
            (Some(ready), bootstrap) if bootstrap.is_none() || ready.exists() => {
                Self::ready(ready.clone()).await.map(Some)
            }
            (_, Some(bootstrap)) => Self::bootstrap(bootstrap.clone(), config, store, stop).await.map(Some),
            _ => Ok(None),
        }
    }

    async fn ready(path: PathBuf) -> Result<Self> {
        let fingerprint = kubeconfig::fingerprint(&path);
        let base = kubeconfig::load(&path).await?;
        let (namespace, ca) = (base.default_namespace.clone(), base.root_cert.clone());
        let client = kubeconfig::client(base, &path)?;
        Ok(Self {
            current: Arc::new(RwLock::new(client)),
            namespace,
            ca,
            source: Source::Ready { path, fingerprint },
        })
    }

    async fn bootstrap(
        path: PathBuf,
        config: &Config,
        store: &Store,
        stop: &CancellationToken,
    ) -> Result<Self> {
        let base = kubeconfig::load(&path).await?;
        let node = config.node_name.clone();
        let stored = store.pair(Purpose::Client.file())?;
        let pair = match stored.filter(|p| p.leaf.is_node(&node) && p.leaf.valid_at(keys::now())) {
            Some(pair) => pair,
            None => {
                let client = kubeconfig::client(base.clone(), &path)?;
                tokio::select! {
                    pair = first_certificate(&client, store, &node, &path, &base) => pair?,
                    () = stop.cancelled() => return Err(Error::Certificate {
                        what: "get a client certificate from the cluster",
                        reason: "stopped before it was issued".into(),
                    }),
                }
            }
        };
        let client = kubeconfig::client(kubeconfig::with_certificate(&base, &pair)?, &path)?;
        let (namespace, ca) = (base.default_namespace.clone(), base.root_cert.clone());
        let source = Source::Own { base: Box::new(base), path, pair: Box::new(pair), node };
        Ok(Self { current: Arc::new(RwLock::new(client)), namespace, ca, source })
    }

    /// The CA of the API server, DER.
    pub(super) fn ca(&self) -> Option<&[Vec<u8>]> {
        self.ca.as_deref()
    }

    /// A client that sends each request through the present one.
    pub(super) fn client(&self) -> kube::Client {
        let current = self.current.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let client = current.read().unwrap_or_else(PoisonError::into_inner).clone();
            async move { client.send(request).await }
        });
        kube::Client::new(service, self.namespace.clone())
    }

    fn exchange(&self, client: kube::Client) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = client;
    }

    /// Exchanges the client in time until the token is cancelled.
    pub(super) async fn keep_fresh(mut self, store: Store, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                outcome = self.next(&store) => if let Err(error) = outcome {
                    tracing::warn!(error = crate::chain(&error), "the client certificate could not be renewed");
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(LOOK) => {}
                    }
                }
            }
        }
    }

    async fn next(&mut self, store: &Store) -> Result<()> {
        match &mut self.source {
            Source::Ready { path, fingerprint } => {
                tokio::time::sleep(LOOK).await;
                let now = kubeconfig::fingerprint(path);
                if now == *fingerprint {
                    return Ok(());
                }
                let client = kubeconfig::client(kubeconfig::load(path).await?, path)?;
                *fingerprint = now;
                tracing::info!(kubeconfig = %path.display(), "kubeconfig has changed and is used anew");
                self.exchange(client);
            }
            Source::Own { base, path, pair, node } => {
                sleep_until(pair.leaf.renew_at(rand::random())).await;
                let present = self.current.read().unwrap_or_else(PoisonError::into_inner).clone();
                // An expired certificate opens no door: then the bootstrap token must do once more.
                let asking = if pair.leaf.valid_at(keys::now()) {
                    present
                } else {
                    kubeconfig::client((**base).clone(), path)?
                };
                let renewed = request::obtain(&asking, store, Purpose::Client, node, None).await?;
                let client = kubeconfig::client(kubeconfig::with_certificate(base, &renewed)?, path)?;
                **pair = renewed;
                self.exchange(client);
            }
        }
        Ok(())
    }
}

/// Asks with the bootstrap token, again while the API server is away.
async fn first_certificate(
    client: &kube::Client,
    store: &Store,
    node: &str,
    path: &std::path::Path,
    base: &kube::Config,
) -> Result<Pair> {
    loop {
        let error = match request::obtain(client, store, Purpose::Client, node, None).await {
            Ok(pair) => return Ok(pair),
            Err(error) => error,
        };
        if let Some(reason) = hopeless(&error, &base.cluster_url) {
            return Err(Error::Kubeconfig { path: path.to_owned(), reason });
        }
        if matches!(error, Error::File { .. } | Error::Certificate { .. }) {
            return Err(error);
        }
        tracing::warn!(error = crate::chain(&error), retry_after = ?RETRY, "no client certificate yet");
        tokio::time::sleep(RETRY).await;
    }
}

/// Why trying again is of no use, in words that say what to do.
fn hopeless(error: &Error, server: &http::Uri) -> Option<String> {
    let Error::Api { source, .. } = error else { return None };
    let kube::Error::Api(status) = source.as_ref() else { return None };
    match status.code {
        401 => Some(format!(
            "the API server {server} refused its bootstrap token: it has expired or was deleted; make a new one (kubeadm token create) and write it there"
        )),
        403 => Some(format!(
            "the API server {server} took its token but does not let it request certificates ({}): bind the group system:bootstrappers to the ClusterRole system:node-bootstrapper",
            status.message
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn api_error(code: u16) -> Error {
        let status: kube::core::Status = serde_json::from_value(
            serde_json::json!({"status": "Failure", "message": "m", "reason": "r", "code": code}),
        )
        .unwrap();
        Error::api("x")(kube::Error::Api(Box::new(status)))
    }

    #[test]
    fn a_refused_token_is_told_and_an_absent_server_waited_for() {
        let server = http::Uri::from_static("https://10.0.0.1:6443");
        assert!(hopeless(&api_error(401), &server).unwrap().contains("kubeadm token create"));
        assert!(hopeless(&api_error(403), &server).unwrap().contains("system:node-bootstrapper"));
        assert!(hopeless(&api_error(503), &server).is_none());
    }

    #[tokio::test]
    async fn users_of_the_client_see_an_exchanged_one() {
        let fixed = |code: u16| {
            let service = tower::service_fn(move |_: Request<Body>| async move {
                let answer = http::Response::builder().status(code).body(Body::empty()).unwrap();
                Ok::<_, std::io::Error>(answer)
            });
            kube::Client::new(service, "default")
        };
        let rotating = Rotating {
            current: Arc::new(RwLock::new(fixed(201))),
            namespace: "default".into(),
            ca: None,
            source: Source::Ready { path: PathBuf::new(), fingerprint: 0 },
        };
        let user = rotating.client();
        let ask = || async { user.send(Request::new(Body::empty())).await.unwrap().status().as_u16() };
        assert_eq!(ask().await, 201);
        rotating.exchange(fixed(202));
        assert_eq!(ask().await, 202);
    }
}
