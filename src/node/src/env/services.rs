//! Service links: the variables that tell a container of the Services that exist when it starts.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use futures::TryStreamExt;
use k8s_openapi::api::core::v1::Service;
use kube::{Api, Client, runtime::watcher};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::relist;

type Known = BTreeMap<(String, String), Arc<Service>>;

/// A copy of all Services, kept by one task.
#[derive(Clone)]
pub(crate) struct Services {
    known: Arc<RwLock<Known>>,
    synced: watch::Receiver<bool>,
}

impl Services {
    /// For a node without an API server: there are none.
    pub(crate) fn none() -> Self {
        let (_, synced) = watch::channel(true);
        Self { known: Arc::default(), synced }
    }

    /// Keeps the copy until it is stopped.
    pub(crate) fn watch(client: Client, stop: CancellationToken) -> (Self, impl Future<Output = ()>) {
        let (done, synced) = watch::channel(false);
        let known: Arc<RwLock<Known>> = Arc::default();
        let services = Self { known: known.clone(), synced };
        let task = async move {
            let stream = relist::watch(Api::<Service>::all(client), watcher::Config::default());
            let mut stream = std::pin::pin!(stream);
            let mut fresh = Known::new();
            loop {
                let event = tokio::select! {
                    () = stop.cancelled() => return,
                    event = stream.try_next() => event,
                };
                match event {
                    Ok(Some(watcher::Event::Init)) => fresh.clear(),
                    Ok(Some(watcher::Event::InitApply(s))) => {
                        fresh.insert(key(&s), Arc::new(s));
                    }
                    Ok(Some(watcher::Event::InitDone)) => {
                        *known.write().unwrap_or_else(PoisonError::into_inner) = std::mem::take(&mut fresh);
                        done.send_replace(true);
                    }
                    Ok(Some(watcher::Event::Apply(s))) => {
                        known.write().unwrap_or_else(PoisonError::into_inner).insert(key(&s), Arc::new(s));
                    }
                    Ok(Some(watcher::Event::Delete(s))) => {
                        known.write().unwrap_or_else(PoisonError::into_inner).remove(&key(&s));
                    }
                    Ok(None) => return,
                    Err(error) => warn!(%error, "cannot watch services"),
                }
            }
        };
        (services, task)
    }

    /// Waits until the list was read once.
    pub(crate) async fn ready(&self) {
        // An error means that the watching task is gone: the program ends.
        let _ = self.synced.clone().wait_for(|done| *done).await;
    }

    /// Variables for a container in `namespace`; without `links` only those of the API server.
    pub(crate) fn variables(&self, namespace: &str, links: bool) -> BTreeMap<String, String> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let master = known.get(&("default".to_owned(), "kubernetes".to_owned()));
        let own = known.iter().filter(|((ns, _), _)| links && ns == namespace).map(|(_, s)| s);
        let mut out = BTreeMap::new();
        for service in master.into_iter().chain(own) {
            add(&mut out, service);
        }
        out
    }
}

fn key(s: &Service) -> (String, String) {
    (s.metadata.namespace.clone().unwrap_or_default(), s.metadata.name.clone().unwrap_or_default())
}

fn upper(name: &str) -> String {
    name.to_uppercase().replace('-', "_")
}

fn add(out: &mut BTreeMap<String, String>, service: &Service) {
    let Some(spec) = &service.spec else { return };
    let Some(ip) = spec.cluster_ip.as_deref().filter(|ip| !ip.is_empty() && *ip != "None") else { return };
    let ports = spec.ports.as_deref().unwrap_or_default();
    let Some(first) = ports.first() else { return };
    let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
    let prefix = upper(service.metadata.name.as_deref().unwrap_or_default());
    out.insert(format!("{prefix}_SERVICE_HOST"), ip.to_owned());
    out.insert(format!("{prefix}_SERVICE_PORT"), first.port.to_string());
    for port in ports {
        if let Some(name) = port.name.as_deref().filter(|n| !n.is_empty()) {
            out.insert(format!("{prefix}_SERVICE_PORT_{}", upper(name)), port.port.to_string());
        }
    }
    for (index, port) in ports.iter().enumerate() {
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let url = format!("{}://{host}:{}", protocol.to_lowercase(), port.port);
        if index == 0 {
            out.insert(format!("{prefix}_PORT"), url.clone());
        }
        let base = format!("{prefix}_PORT_{}_{protocol}", port.port);
        out.insert(base.clone(), url);
        out.insert(format!("{base}_PROTO"), protocol.to_lowercase());
        out.insert(format!("{base}_PORT"), port.port.to_string());
        out.insert(format!("{base}_ADDR"), ip.to_owned());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn variables_of_services() {
        let services = Services::none();
        let make = |ns: &str, name: &str, ip: &str| -> Service {
            serde_json::from_value(serde_json::json!({
                "metadata": {"namespace": ns, "name": name},
                "spec": {"clusterIP": ip, "ports": [{"name": "https", "port": 443, "protocol": "TCP"}]}
            }))
            .unwrap()
        };
        for s in [
            make("default", "kubernetes", "10.96.0.1"),
            make("n", "my-db", "10.96.0.2"),
            make("n", "headless", "None"),
        ] {
            services.known.write().unwrap().insert(key(&s), Arc::new(s));
        }
        let all = services.variables("n", true);
        assert_eq!(all["KUBERNETES_SERVICE_HOST"], "10.96.0.1");
        assert_eq!(all["MY_DB_SERVICE_PORT_HTTPS"], "443");
        assert_eq!(all["MY_DB_PORT_443_TCP"], "tcp://10.96.0.2:443");
        assert_eq!(all["MY_DB_PORT_443_TCP_ADDR"], "10.96.0.2");
        assert!(!all.keys().any(|k| k.starts_with("HEADLESS")));
        assert!(services.variables("n", false).keys().all(|k| k.starts_with("KUBERNETES_")));
    }
}
