//! The Node's status: what it should say by the agent's facts, and whether what the API server shows says the same.

use std::{collections::BTreeMap, net::IpAddr};

use k8s_openapi::{
    api::core::v1::{
        DaemonEndpoint, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeFeatures, NodeStatus,
        NodeSystemInfo,
    },
    apimachinery::pkg::api::resource::Quantity,
};
use moxlet_cri::{host, v1};

use crate::model::resources::units;
use crate::{config::Config, pressure};

/// What the agent says of itself.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Health {
    /// Why the Node is not ready, if it is not.
    pub(super) agent: std::result::Result<(), String>,
    /// What the agent says of itself beside that: conditions of the Node that cost it no pod.
    pub(super) others: Vec<v1::RuntimeCondition>,
}

impl Health {
    /// There is no answer of the agent.
    pub(super) fn silent(why: String) -> Self {
        Self { agent: Err(why), others: Vec::new() }
    }

    /// CRI's two conditions are what a Node has to have to be ready.
    pub(super) fn of(conditions: Vec<v1::RuntimeCondition>) -> Self {
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

/// The node's own address: as configured, or the most useful one of the host.
fn address(config: &Config, info: &host::InfoResponse) -> Option<String> {
    config.node_ip.as_ref().map(IpAddr::to_string).or_else(|| info.addresses.first().cloned())
}

/// What the Node's status should be; conditions that did not change keep the times of `shown`.
pub(super) fn wanted(
    config: &Config,
    info: &host::InfoResponse,
    health: &Health,
    shown: &[NodeCondition],
) -> NodeStatus {
    let resources = BTreeMap::from([
        ("cpu".to_owned(), Quantity(info.cpus.to_string())),
        ("memory".to_owned(), Quantity(format!("{}Ki", info.memory_bytes / 1024))),
        ("ephemeral-storage".to_owned(), Quantity(format!("{}Ki", info.ephemeral_storage_bytes / 1024))),
        ("pods".to_owned(), Quantity(config.max_pods.to_string())),
    ]);
    // What is kept for the host is no pod's.
    let mut allocatable = resources.clone();
    let memory = info.memory_bytes.saturating_sub(info.memory_reserved_bytes);
    allocatable.insert("memory".to_owned(), Quantity(format!("{}Ki", memory / 1024)));
    let entry = |kind: &str, address: String| NodeAddress { type_: kind.to_owned(), address };
    let addresses = address(config, info)
        .map(|a| entry("InternalIP", a))
        .into_iter()
        .chain([entry("Hostname", config.node_name.clone())]);
    let not_ready = health.agent.as_ref().err().map(String::as_str);
    NodeStatus {
        capacity: Some(resources),
        allocatable: Some(allocatable),
        addresses: Some(addresses.collect()),
        conditions: Some(pressure::conditions(info, &config.pressure, not_ready, &health.others, shown)),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(config.listen.port()) }),
        }),
        features: Some(NodeFeatures { supplemental_groups_policy: Some(true) }),
        declared_features: Some(vec!["ExtendWebSocketsToKubelet".to_owned()]),
        node_info: Some(system_info(config, info)),
        ..NodeStatus::default()
    }
}

fn system_info(config: &Config, info: &host::InfoResponse) -> NodeSystemInfo {
    NodeSystemInfo {
        architecture: info.architecture.clone(),
        boot_id: info.boot_id.clone(),
        container_runtime_version: info.runtime_version.clone(),
        kernel_version: info.kernel_version.clone(),
        kubelet_version: config.kubelet_version.clone(),
        kube_proxy_version: String::new(),
        machine_id: info.machine_id.clone(),
        operating_system: "linux".to_owned(),
        os_image: info.os_image.clone(),
        system_uuid: info.system_uuid.clone(),
        swap: None,
    }
}

/// Whether the API server shows all that `wanted` says. What others keep in a Node's status does not count, nor do the times
/// of heartbeats and transitions.
pub(super) fn is_shown(wanted: &NodeStatus, shown: &NodeStatus) -> bool {
    let conditions = |status: &NodeStatus| -> BTreeMap<String, (String, Option<String>, Option<String>)> {
        let all = status.conditions.iter().flatten();
        all.map(|c| (c.type_.clone(), (c.status.clone(), c.reason.clone(), c.message.clone()))).collect()
    };
    let theirs = conditions(shown);
    conditions(wanted).iter().all(|(kind, condition)| theirs.get(kind) == Some(condition))
        && quantities(wanted.capacity.as_ref(), shown.capacity.as_ref())
        && quantities(wanted.allocatable.as_ref(), shown.allocatable.as_ref())
        && wanted.addresses == shown.addresses
        && wanted.daemon_endpoints == shown.daemon_endpoints
        && wanted.node_info == shown.node_info
        && wanted.features == shown.features
        && wanted.declared_features == shown.declared_features
}

/// Whether all of these quantities are among those: the API server writes `8388608Ki` as `8Gi`.
fn quantities(
    wanted: Option<&BTreeMap<String, Quantity>>,
    shown: Option<&BTreeMap<String, Quantity>>,
) -> bool {
    wanted.into_iter().flatten().all(|(name, wanted)| {
        let shown = shown.and_then(|s| s.get(name));
        shown.is_some_and(|shown| shown == wanted || units(&shown.0) == units(&wanted.0))
    })
}

/// The status without what changes with each write.
pub(super) fn without_times(status: &NodeStatus) -> NodeStatus {
    let mut status = status.clone();
    for c in status.conditions.iter_mut().flatten() {
        (c.last_heartbeat_time, c.last_transition_time) = (None, None);
    }
    status
}

/// A strategic merge patch of the status. Addresses merge by type: the list is replaced as a whole.
pub(super) fn patch(status: &NodeStatus) -> serde_json::Value {
    let mut value = serde_json::to_value(status).unwrap_or_default();
    if let Some(list) = value.get_mut("addresses").and_then(serde_json::Value::as_array_mut) {
        list.insert(0, serde_json::json!({"$patch": "replace"}));
    }
    serde_json::json!({"status": value})
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn facts() -> host::InfoResponse {
        host::InfoResponse {
            memory_bytes: 8 << 30,
            memory_reserved_bytes: 1 << 30,
            cpus: 2,
            addresses: vec!["10.0.0.1".into()],
            ..host::InfoResponse::default()
        }
    }

    fn healthy() -> Health {
        Health { agent: Ok(()), others: Vec::new() }
    }

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
        let status = wanted(&Config::default(), &facts(), &Health::silent("starting".into()), &[]);
        let memory = |of: Option<BTreeMap<String, Quantity>>| of.unwrap()["memory"].0.clone();
        assert_eq!(memory(status.capacity), "8388608Ki");
        assert_eq!(memory(status.allocatable), "7340032Ki");
    }

    #[test]
    fn a_status_that_a_controller_has_changed_is_not_shown_any_more() {
        let wanted = wanted(&Config::default(), &facts(), &healthy(), &[]);
        let mut shown = wanted.clone();
        shown.capacity.as_mut().unwrap().insert("memory".into(), Quantity("8Gi".into()));
        shown.capacity.as_mut().unwrap().insert("example.com/fpga".into(), Quantity("2".into()));
        shown.images = Some(Vec::new());
        for c in shown.conditions.iter_mut().flatten() {
            c.last_heartbeat_time = None;
        }
        assert!(is_shown(&wanted, &shown), "other words for the same, and what others keep there");
        for kind in ["Ready", "MemoryPressure"] {
            let mut lost = shown.clone();
            let condition = lost.conditions.iter_mut().flatten().find(|c| c.type_ == kind).unwrap();
            condition.status = "Unknown".into();
            condition.reason = Some("NodeStatusUnknown".into());
            assert!(!is_shown(&wanted, &lost), "{kind}");
        }
        let moved = NodeStatus { addresses: None, ..shown.clone() };
        assert!(!is_shown(&wanted, &moved));
        let other_boot = NodeStatus {
            node_info: Some(NodeSystemInfo { boot_id: "2".into(), ..shown.node_info.clone().unwrap() }),
            ..shown
        };
        assert!(!is_shown(&wanted, &other_boot));
    }
}
