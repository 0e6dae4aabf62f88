//! The Node object: registered, registered again when someone deletes it, its status kept true.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::{
    api::core::v1::{
        DaemonEndpoint, Node, NodeAddress, NodeDaemonEndpoints, NodeFeatures, NodeSpec, NodeStatus,
        NodeSystemInfo, Taint,
    },
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::ObjectMeta},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use moxlet_cri::{host, v1};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    config::Config,
    cri_client::Runtime,
    error::{Error, Result, chain},
    pressure,
};

/// How often the agent is asked and a changed status is sent.
const PERIOD: Duration = Duration::from_secs(10);
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

/// Tells the agent's facts and keeps the Node.
pub(crate) struct Registrar {
    /// The configuration.
    pub(crate) config: Config,
    /// The agent.
    pub(crate) agent: Arc<dyn Runtime>,
    /// The API server, if there is one.
    pub(crate) client: Option<Client>,
    /// Facts of the host, published to all.
    pub(crate) info: watch::Sender<Arc<host::InfoResponse>>,
}

struct Health {
    /// Why the Node is not ready, if it is not.
    agent: std::result::Result<(), String>,
    /// What the agent says of itself beside that: conditions of the Node that cost it no pod.
    others: Vec<v1::RuntimeCondition>,
}

impl Health {
    /// The agent does not say anything.
    fn silent(why: String) -> Self {
        Self { agent: Err(why), others: Vec::new() }
    }

    /// CRI's two conditions are what a Node has to have to be ready.
    fn of(conditions: Vec<v1::RuntimeCondition>) -> Self {
        let (needed, others): (Vec<_>, Vec<_>) = conditions
            .into_iter()
            .partition(|c| matches!(c.r#type.as_str(), "RuntimeReady" | "NetworkReady"));
        let bad: Vec<_> = needed
            .iter()
            .filter(|c| !c.status)
            .map(|c| format!("{} is not ready: {} {}", c.r#type, c.reason, c.message).trim().to_owned())
            .collect();
        Self { agent: if bad.is_empty() { Ok(()) } else { Err(bad.join("; ")) }, others }
    }
}

impl Registrar {
    /// Works until stopped.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut sent: Option<(NodeStatus, Instant)> = None;
        let mut cidr = String::new();
        let mut period = tokio::time::interval(PERIOD);
        let mut soon = false;
        let mut looks = 0;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = period.tick() => {}
                () = tokio::time::sleep(Duration::from_secs(1)), if soon => {}
            }
            let health = self.ask().await;
            let Some(client) = &self.client else { continue };
            let outcome =
                tokio::time::timeout(PERIOD, self.keep(client, &health, &mut sent, &mut cidr)).await;
            soon = match outcome {
                // A new Node gets its range a moment later.
                Ok(Ok(())) => {
                    looks += u32::from(cidr.is_empty());
                    cidr.is_empty() && looks < FIRST_LOOKS
                }
                Ok(Err(error)) => {
                    warn!(error = %chain(&error), "node status not sent");
                    true
                }
                Err(_) => true,
            };
        }
    }

    async fn ask(&self) -> Health {
        match self.agent.info(host::InfoRequest {}).await {
            Ok(info) => {
                self.info.send_if_modified(|known| {
                    let changed = **known != info;
                    *known = Arc::new(info);
                    changed
                });
            }
            Err(error) => {
                return Health::silent(format!("the agent does not answer: {}", chain(&error)));
            }
        }
        match self.agent.status(v1::StatusRequest { verbose: false }).await {
            Ok(answer) => Health::of(answer.status.map(|s| s.conditions).unwrap_or_default()),
            Err(error) => Health::silent(format!("the agent does not answer: {}", chain(&error))),
        }
    }

    async fn keep(
        &self,
        client: &Client,
        health: &Health,
        sent: &mut Option<(NodeStatus, Instant)>,
        cidr: &mut String,
    ) -> Result<()> {
        let nodes: Api<Node> = Api::all(client.clone());
        let name = &self.config.node_name;
        if sent.is_none() {
            self.register(&nodes).await?;
        }
        let old = sent.as_ref().map(|(s, _)| s.clone()).unwrap_or_default();
        let status = self.status(health, &old);
        let same = without_heartbeats(&status) == without_heartbeats(&old);
        if same && sent.as_ref().is_some_and(|(_, at)| at.elapsed() < HEARTBEAT) && !cidr.is_empty() {
            // Someone may have deleted it.
            return match nodes.get_opt(name).await.map_err(Error::api(format!("get node {name}")))? {
                Some(_) => Ok(()),
                None => {
                    info!("the Node is gone, registering again");
                    *sent = None;
                    Box::pin(self.keep(client, health, sent, cidr)).await
                }
            };
        }
        let patch = serde_json::json!({"status": replacing_lists(&status)});
        match nodes.patch_status(name, &PatchParams::default(), &Patch::Strategic(&patch)).await {
            Ok(node) => {
                let now = node.spec.and_then(|s| s.pod_cidr).unwrap_or_default();
                if !now.is_empty() && now != *cidr {
                    let network_config = Some(v1::NetworkConfig { pod_cidr: now.clone() });
                    let runtime_config = Some(v1::RuntimeConfig { network_config });
                    self.agent
                        .update_runtime_config(v1::UpdateRuntimeConfigRequest { runtime_config })
                        .await?;
                    info!(pod_cidr = now, "the cluster allotted a pod CIDR");
                    *cidr = now;
                }
                *sent = Some((status, Instant::now()));
                Ok(())
            }
            Err(kube::Error::Api(e)) if e.code == 404 => {
                *sent = None;
                Err(Error::NotFound { kind: "node", name: name.clone() })
            }
            Err(e) => Err(Error::api(format!("patch the status of node {name}"))(e)),
        }
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

    async fn register(&self, nodes: &Api<Node>) -> Result<()> {
        let name = &self.config.node_name;
        let taints = self.config.register_taints.iter().map(|t| taint(t)).collect::<Result<Vec<_>>>()?;
        let node = Node {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                labels: Some(self.labels()),
                ..ObjectMeta::default()
            },
            spec: Some(NodeSpec { taints: Some(taints), ..NodeSpec::default() }),
            status: Some(self.status(&Health::silent("starting".into()), &NodeStatus::default())),
        };
        match nodes.create(&PostParams::default(), &node).await {
            Ok(_) => {
                info!(node = name, "registered");
                Ok(())
            }
            Err(kube::Error::Api(status)) if status.code == 409 => {
                let patch = serde_json::json!({"metadata": {"labels": self.labels()}});
                let answer = nodes.patch(name, &PatchParams::default(), &Patch::Strategic(&patch)).await;
                answer.map(drop).map_err(Error::api(format!("label node {name}")))
            }
            Err(e) => Err(Error::api(format!("register node {name}"))(e)),
        }
    }

    /// The node's own address: as configured, or the most useful one of the host.
    fn address(&self) -> Option<String> {
        let info = self.info.borrow();
        self.config.node_ip.as_ref().map(IpAddr::to_string).or_else(|| info.addresses.first().cloned())
    }

    fn status(&self, health: &Health, old: &NodeStatus) -> NodeStatus {
        let info = self.info.borrow().clone();
        let resources = BTreeMap::from([
            ("cpu".to_owned(), Quantity(info.cpus.to_string())),
            ("memory".to_owned(), Quantity(format!("{}Ki", info.memory_bytes / 1024))),
            ("ephemeral-storage".to_owned(), Quantity(format!("{}Ki", info.ephemeral_storage_bytes / 1024))),
            ("pods".to_owned(), Quantity(self.config.max_pods.to_string())),
        ]);
        // What is kept for the host is no pod's.
        let mut allocatable = resources.clone();
        let memory = info.memory_bytes.saturating_sub(info.memory_reserved_bytes);
        allocatable.insert("memory".to_owned(), Quantity(format!("{}Ki", memory / 1024)));
        let address = |kind: &str, address: String| NodeAddress { type_: kind.to_owned(), address };
        let addresses = self
            .address()
            .map(|a| address("InternalIP", a))
            .into_iter()
            .chain([address("Hostname", self.config.node_name.clone())]);
        NodeStatus {
            capacity: Some(resources),
            allocatable: Some(allocatable),
            addresses: Some(addresses.collect()),
            conditions: Some(pressure::conditions(
                &info,
                &self.config.pressure,
                health.agent.as_ref().err().map(String::as_str),
                &health.others,
                old.conditions.as_deref().unwrap_or_default(),
            )),
            daemon_endpoints: Some(NodeDaemonEndpoints {
                kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(self.config.listen.port()) }),
            }),
            features: Some(NodeFeatures { supplemental_groups_policy: Some(true) }),
            declared_features: Some(vec!["ExtendWebSocketsToKubelet".to_owned()]),
            node_info: Some(NodeSystemInfo {
                architecture: info.architecture.clone(),
                boot_id: info.boot_id.clone(),
                container_runtime_version: info.runtime_version.clone(),
                kernel_version: info.kernel_version.clone(),
                kubelet_version: self.config.kubelet_version.clone(),
                kube_proxy_version: String::new(),
                machine_id: info.machine_id.clone(),
                operating_system: "linux".to_owned(),
                os_image: info.os_image.clone(),
                system_uuid: info.system_uuid.clone(),
                swap: None,
            }),
            ..NodeStatus::default()
        }
    }
}

fn without_heartbeats(status: &NodeStatus) -> NodeStatus {
    let mut status = status.clone();
    for c in status.conditions.iter_mut().flatten() {
        c.last_heartbeat_time = None;
    }
    status
}

/// Addresses merge by type in a patch: the list is replaced as a whole.
fn replacing_lists(status: &NodeStatus) -> serde_json::Value {
    let mut value = serde_json::to_value(status).unwrap_or_default();
    if let Some(list) = value.get_mut("addresses").and_then(serde_json::Value::as_array_mut) {
        list.insert(0, serde_json::json!({"$patch": "replace"}));
    }
    value
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn only_cris_own_conditions_make_a_node_not_ready() {
        let condition = |kind: &str, status| v1::RuntimeCondition {
            r#type: kind.into(),
            status,
            reason: "Why".into(),
            message: "words".into(),
        };
        let health = Health::of(vec![
            condition("RuntimeReady", true),
            condition("NetworkReady", true),
            condition("ProxmoxReady", false),
        ]);
        assert_eq!(health.agent, Ok(()));
        assert_eq!(health.others, [condition("ProxmoxReady", false)]);
        let health = Health::of(vec![condition("NetworkReady", false)]);
        assert_eq!(health.agent, Err("NetworkReady is not ready: Why words".into()));
    }

    #[test]
    fn what_is_kept_for_the_host_is_not_allocatable() {
        let info = host::InfoResponse {
            memory_bytes: 8 << 30,
            memory_reserved_bytes: 1 << 30,
            ..host::InfoResponse::default()
        };
        let registrar = Registrar {
            config: Config::default(),
            agent: Arc::new(crate::cri_client::fake::FakeRuntime::new(|_, _| None)),
            client: None,
            info: watch::Sender::new(Arc::new(info)),
        };
        let status = registrar.status(&Health::silent("starting".into()), &NodeStatus::default());
        let memory = |of: Option<BTreeMap<String, Quantity>>| of.unwrap()["memory"].0.clone();
        assert_eq!(memory(status.capacity), "8388608Ki");
        assert_eq!(memory(status.allocatable), "7340032Ki");
    }

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
}
