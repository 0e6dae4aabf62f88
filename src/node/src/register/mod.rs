//! The Node object: registered, registered again when someone deletes it, its status kept true.
//!
//! At each pass the Node as the API server shows it is compared with what it should be, and what differs is written at once:
//! a controller may have called it NotReady while this process was away. Passes are made every 10 s and whenever the Node
//! changes, which a watch of this one object tells. All intervals are monotonic; the wall clock is only written down.

mod status;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{StreamExt, stream::BoxStream};
use k8s_openapi::{
    api::core::v1::{Node, NodeSpec, NodeStatus, Taint},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
    runtime::{WatchStreamExt, watcher},
};
use moxlet_cri::{host, v1};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::status::Health;
use crate::{
    config::Config,
    cri_client::Runtime,
    error::{Error, Result, chain},
};

/// How often the agent is asked and the Node is compared.
const PERIOD: Duration = Duration::from_secs(10);
/// The shortest time between two passes.
const SHORTEST: Duration = Duration::from_secs(1);
/// How often a Node without a pod CIDR is looked at every second, before the usual pace.
const FIRST_LOOKS: u32 = 30;
/// How often an unchanged status is sent.
const HEARTBEAT: Duration = Duration::from_secs(300);

/// Parses `key=value:Effect` (or `key:Effect`).
pub(crate) fn taint(text: &str) -> Result<Taint> {
    let wrong = || Error::Config {
        key: "register_taints",
        reason: format!("{text:?} is not of the form key=value:Effect"),
    };
    let (pair, effect) = text.rsplit_once(':').ok_or_else(wrong)?;
    if !matches!(effect, "NoSchedule" | "PreferNoSchedule" | "NoExecute") {
        return Err(wrong());
    }
    let (key, value) = pair.split_once('=').map_or((pair, None), |(k, v)| (k, Some(v.to_owned())));
    if key.is_empty() {
        return Err(wrong());
    }
    Ok(Taint { key: key.to_owned(), value, effect: effect.to_owned(), time_added: None })
}

/// Publishes the agent's facts and keeps the Node.
pub(crate) struct Registrar {
    /// The configuration.
    pub(crate) config: Config,
    /// The agent.
    pub(crate) agent: Arc<dyn Runtime>,
    /// The API server, if there is one.
    pub(crate) client: Option<Client>,
    /// Facts of the host, published to all.
    pub(crate) info: watch::Sender<Arc<host::InfoResponse>>,
    /// Whether this process may act for the Node: see `membership`.
    pub(crate) admitted: watch::Receiver<bool>,
    /// UID of the Node, once it is registered.
    pub(crate) node_uid: watch::Sender<Option<String>>,
}

/// What is remembered from pass to pass.
#[derive(Default)]
struct Kept {
    /// When the status was written last.
    written: Option<Instant>,
    /// A status that was written and what the API server made of it, where that is not the same: no reason to write it again.
    settled: Option<(NodeStatus, NodeStatus)>,
    /// Whether the labels were set by this process.
    labelled: bool,
    /// The pod CIDR that the agent has.
    cidr: String,
    /// Passes without a pod CIDR.
    looks: u32,
}

impl Registrar {
    /// Works until stopped.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.passes() => {}
        }
    }

    async fn passes(&mut self) {
        let mut period = tokio::time::interval(PERIOD);
        period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut changes = self.changes();
        let mut kept = Kept::default();
        let mut soon = false;
        loop {
            // The Node as the watch shows it, where that is why.
            let mut shown = None;
            tokio::select! {
                _ = period.tick() => {}
                () = tokio::time::sleep(SHORTEST), if soon => {}
                Ok(()) = self.admitted.changed() => {}
                node = changes.next() => shown = node.flatten(),
            }
            let health = self.ask().await;
            let Some(client) = self.client.as_ref().filter(|_| *self.admitted.borrow()) else { continue };
            let nodes = Api::all(client.clone());
            soon = match timeout(PERIOD, Box::pin(self.keep(&nodes, &health, shown, &mut kept))).await {
                // A new Node gets its range a moment later.
                Ok(Ok(())) => {
                    kept.looks += u32::from(kept.cidr.is_empty());
                    kept.cidr.is_empty() && kept.looks < FIRST_LOOKS
                }
                Ok(Err(error)) => {
                    warn!(error = %chain(&error), "could not bring the Node up to date");
                    true
                }
                Err(_) => {
                    warn!(seconds = PERIOD.as_secs(), "the API server did not answer about the Node in time");
                    true
                }
            };
        }
    }

    /// The Node each time that it changes, at most once a second.
    fn changes(&self) -> BoxStream<'static, Option<Node>> {
        let Some(client) = self.client.clone() else { return futures::stream::pending().boxed() };
        let (mut admitted, name) = (self.admitted.clone(), self.config.node_name.clone());
        let watched = async move {
            // An error means that the program ends: then nobody polls this any more.
            let _ = admitted.wait_for(|yes| *yes).await;
            watcher::watch_object(Api::<Node>::all(client), &name).default_backoff()
        };
        let watched = futures::stream::once(watched).flatten();
        // Errors are those of the passes, too, which tell them.
        watched
            .filter_map(|node| std::future::ready(node.ok()))
            .then(|node| async move {
                tokio::time::sleep(SHORTEST).await;
                node
            })
            .boxed()
    }

    async fn ask(&self) -> Health {
        let silent = |why: &str| Health::silent(format!("the agent does not answer: {why}"));
        let asked = async {
            let info = self.agent.info(host::InfoRequest {}).await?;
            self.info.send_if_modified(|known| {
                let changed = **known != info;
                *known = Arc::new(info);
                changed
            });
            self.agent.status(v1::StatusRequest { verbose: false }).await
        };
        match timeout(PERIOD, asked).await {
            Ok(Ok(answer)) => Health::of(answer.status.map(|s| s.conditions).unwrap_or_default()),
            Ok(Err(error)) => silent(&chain(&error)),
            Err(_) => silent(&format!("no answer in {} s", PERIOD.as_secs())),
        }
    }

    /// One pass: what is missing or differs is written.
    async fn keep(
        &self,
        nodes: &Api<Node>,
        health: &Health,
        shown: Option<Node>,
        kept: &mut Kept,
    ) -> Result<()> {
        let name = &self.config.node_name;
        let found = match shown {
            Some(node) => Some(node),
            None => nodes.get_opt(name).await.map_err(Error::api(format!("get node {name}")))?,
        };
        let node = match found {
            Some(node) if kept.labelled => node,
            Some(_) => {
                let patch = serde_json::json!({"metadata": {"labels": self.labels()}});
                let answer = nodes.patch(name, &PatchParams::default(), &Patch::Strategic(&patch)).await;
                answer.map_err(Error::api(format!("label node {name}")))?
            }
            None => self.register(nodes).await?,
        };
        kept.labelled = true;
        self.publish_uid(&node);
        let shown = node.status.clone().unwrap_or_default();
        let info = self.info.borrow().clone();
        let wanted =
            status::wanted(&self.config, &info, health, shown.conditions.as_deref().unwrap_or_default());
        let plain = (status::without_times(&wanted), status::without_times(&shown));
        let stands = status::is_shown(&wanted, &shown) || kept.settled.as_ref() == Some(&plain);
        if stands && kept.written.is_some_and(|at| at.elapsed() < HEARTBEAT) {
            return self.hand_on_cidr(&node, kept).await;
        }
        let patch = status::patch(&wanted);
        let node = nodes
            .patch_status(name, &PatchParams::default(), &Patch::Strategic(&patch))
            .await
            .map_err(Error::api(format!("patch the status of node {name}")))?;
        kept.written = Some(Instant::now());
        let answer = node.status.clone().unwrap_or_default();
        kept.settled =
            (!status::is_shown(&wanted, &answer)).then(|| (plain.0, status::without_times(&answer)));
        self.hand_on_cidr(&node, kept).await
    }

    fn publish_uid(&self, node: &Node) {
        self.node_uid.send_if_modified(|known| {
            let changed = *known != node.metadata.uid;
            known.clone_from(&node.metadata.uid);
            changed
        });
    }

    /// The agent learns the range that the cluster allotted.
    async fn hand_on_cidr(&self, node: &Node, kept: &mut Kept) -> Result<()> {
        let cidr = node.spec.as_ref().and_then(|s| s.pod_cidr.clone()).unwrap_or_default();
        if cidr.is_empty() || cidr == kept.cidr {
            return Ok(());
        }
        let network_config = Some(v1::NetworkConfig { pod_cidr: cidr.clone() });
        let runtime_config = Some(v1::RuntimeConfig { network_config });
        self.agent.update_runtime_config(v1::UpdateRuntimeConfigRequest { runtime_config }).await?;
        info!(pod_cidr = cidr, "the cluster allotted a pod CIDR");
        kept.cidr = cidr;
        Ok(())
    }

    fn labels(&self) -> BTreeMap<String, String> {
        let arch = self.info.borrow().architecture.clone();
        let mut labels = BTreeMap::from([("type".to_owned(), "virtual-kubelet".to_owned())]);
        for prefix in ["kubernetes.io", "beta.kubernetes.io"] {
            labels.insert(format!("{prefix}/os"), "linux".to_owned());
            labels.insert(format!("{prefix}/arch"), arch.clone());
        }
        labels.insert("kubernetes.io/hostname".to_owned(), self.config.node_name.clone());
        labels.extend(self.config.labels.clone());
        labels
    }

    async fn register(&self, nodes: &Api<Node>) -> Result<Node> {
        let name = &self.config.node_name;
        let taints = self.config.register_taints.iter().map(|t| taint(t)).collect::<Result<Vec<_>>>()?;
        let info = self.info.borrow().clone();
        let node = Node {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                labels: Some(self.labels()),
                ..ObjectMeta::default()
            },
            spec: Some(NodeSpec { taints: Some(taints), ..NodeSpec::default() }),
            status: Some(status::wanted(&self.config, &info, &Health::silent("starting".into()), &[])),
        };
        let made = nodes.create(&PostParams::default(), &node).await;
        let made = made.map_err(Error::api(format!("register node {name}")))?;
        info!(node = name, "registered");
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn taints() {
        let t = taint("virtual-kubelet.io/provider=proxmox:NoSchedule").unwrap();
        assert_eq!(
            (t.key.as_str(), t.value.as_deref(), t.effect.as_str()),
            ("virtual-kubelet.io/provider", Some("proxmox"), "NoSchedule")
        );
        assert!(taint("a:NoExecute").is_ok());
        for bad in ["", "a=b", "a=b:Sometimes", "=b:NoSchedule"] {
            assert!(taint(bad).is_err(), "{bad}");
        }
    }

    /// An API server whose Node was called NotReady by a controller; writes are remembered and shown from then on.
    fn server(mut node: serde_json::Value) -> (Client, Arc<parking_lot::Mutex<Vec<String>>>) {
        let asked = Arc::new(parking_lot::Mutex::new(Vec::new()));
        let remembered = asked.clone();
        let node = Arc::new(parking_lot::Mutex::new(node.take()));
        let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
            let (node, asked) = (node.clone(), remembered.clone());
            async move {
                let (parts, body) = request.into_parts();
                asked.lock().push(format!("{} {}", parts.method, parts.uri.path()));
                let sent: serde_json::Value =
                    serde_json::from_slice(&body.collect_bytes().await.unwrap()).unwrap_or_default();
                let mut node = node.lock();
                if let Some(status) = sent.get("status") {
                    node["status"] = status.clone();
                    let addresses = node["status"]["addresses"].as_array_mut().unwrap();
                    addresses.retain(|a| a.get("$patch").is_none());
                }
                let answer = kube::client::Body::from(serde_json::to_vec(&*node).unwrap());
                Ok::<_, std::convert::Infallible>(http::Response::new(answer))
            }
        });
        (Client::new(service, "default"), asked)
    }

    #[tokio::test]
    async fn a_node_that_a_controller_called_not_ready_is_written_at_once_and_only_then() {
        let (client, asked) = server(serde_json::json!({
            "metadata": {"name": "n1", "uid": "u1"}, "spec": {"podCIDR": "10.0.0.0/24"},
            "status": {"conditions": [{"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown"}]}}));
        let registrar = Registrar {
            config: Config { node_name: "n1".into(), ..Config::default() },
            agent: Arc::new(crate::cri_client::fake::FakeRuntime::new(|_, _| None)),
            client: Some(client.clone()),
            info: watch::Sender::new(Arc::default()),
            admitted: watch::channel(true).1,
            node_uid: watch::Sender::new(None),
        };
        let nodes = Api::all(client);
        let health = Health { agent: Ok(()), others: Vec::new() };
        // Written a moment ago, as it seems to this process.
        let mut kept = Kept { written: Some(Instant::now()), labelled: true, ..Kept::default() };
        registrar.keep(&nodes, &health, None, &mut kept).await.unwrap();
        let writes = || asked.lock().iter().filter(|call| call.starts_with("PATCH")).count();
        assert_eq!(writes(), 1, "{:?}", asked.lock());
        assert_eq!(registrar.node_uid.borrow().as_deref(), Some("u1"));
        registrar.keep(&nodes, &health, None, &mut kept).await.unwrap();
        assert_eq!(writes(), 1, "{:?}", asked.lock());
        let silent = Health::silent("away".into());
        registrar.keep(&nodes, &silent, None, &mut kept).await.unwrap();
        assert_eq!(writes(), 2);
    }
}
