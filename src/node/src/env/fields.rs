//! The downward API: a pod's own fields and its containers' resources, as variables and as files.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceFieldSelector};

use crate::model::{names, resources};

/// What of the node and the running sandbox a pod may ask for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    /// The node's name.
    pub(crate) node_name: String,
    /// Addresses of the node.
    pub(crate) host_ips: Vec<String>,
    /// Addresses of the pod.
    pub(crate) pod_ips: Vec<String>,
    /// What stands for a CPU limit that is not set.
    pub(crate) allocatable_cpus: u32,
    /// What stands for a memory limit that is not set.
    pub(crate) allocatable_memory: u64,
    /// What stands for a storage limit that is not set.
    pub(crate) allocatable_storage: u64,
}

fn lines(map: Option<&BTreeMap<String, String>>) -> String {
    let parts: Vec<_> = map.into_iter().flatten().map(|(k, v)| format!("{k}={}", go_quote(v))).collect();
    parts.join("\n")
}

/// A string as Go's `%q` writes it.
fn go_quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if u32::from(c) < 0x20 || c == '\u{7f}' => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// The value of a field path; nothing for a path that is not supported.
pub(crate) fn field(pod: &Pod, facts: &Facts, path: &str) -> Option<String> {
    let meta = &pod.metadata;
    if let Some((map, key)) = path.split_once("['").and_then(|(m, k)| Some((m, k.strip_suffix("']")?))) {
        let map = match map {
            "metadata.labels" => meta.labels.as_ref(),
            "metadata.annotations" => meta.annotations.as_ref(),
            _ => return None,
        };
        return Some(names::get(map, key).unwrap_or_default().to_owned());
    }
    let spec = pod.spec.as_ref();
    Some(match path {
        "metadata.name" => names::name(pod).to_owned(),
        "metadata.namespace" => names::namespace(pod).to_owned(),
        "metadata.uid" => names::uid(pod).to_owned(),
        "metadata.labels" => lines(meta.labels.as_ref()),
        "metadata.annotations" => lines(meta.annotations.as_ref()),
        "spec.nodeName" => facts.node_name.clone(),
        "spec.serviceAccountName" => spec.and_then(|s| s.service_account_name.clone()).unwrap_or_default(),
        "status.hostIP" => facts.host_ips.first().cloned().unwrap_or_default(),
        "status.hostIPs" => facts.host_ips.join(","),
        "status.podIP" => facts.pod_ips.first().cloned().unwrap_or_default(),
        "status.podIPs" => facts.pod_ips.join(","),
        _ => return None,
    })
}

/// The value of a container's request or limit; nothing for a resource that is not supported.
pub(crate) fn resource(
    pod: &Pod,
    own: Option<&Container>,
    facts: &Facts,
    selector: &ResourceFieldSelector,
) -> Option<String> {
    let container = match selector.container_name.as_deref().filter(|n| !n.is_empty()) {
        Some(name) => resources::all_containers(pod).find(|c| c.name == name)?,
        None => own?,
    };
    let (kind, key) = selector.resource.split_once('.')?;
    let r = container.resources.as_ref();
    let set = match kind {
        "limits" => resources::limit(r, key),
        "requests" => resources::request(r, key),
        _ => return None,
    };
    let milli = match (set, kind, key) {
        (Some(quantity), _, _) => resources::milli(quantity)?,
        (None, "limits", "cpu") => i128::from(facts.allocatable_cpus) * 1000,
        (None, "limits", "memory") => i128::from(facts.allocatable_memory) * 1000,
        (None, "limits", "ephemeral-storage") => i128::from(facts.allocatable_storage) * 1000,
        (None, "requests", "cpu" | "memory" | "ephemeral-storage") => 0,
        _ => return None,
    };
    let divisor =
        selector.divisor.as_ref().and_then(|d| resources::milli(&d.0)).filter(|d| *d > 0).unwrap_or(1000);
    Some((milli.div_euclid(divisor) + i128::from(milli.rem_euclid(divisor) != 0)).to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u", "labels": {"b": "2", "a": "one \"1\""}},
            "spec": {"containers": [{"name": "c", "resources": {"limits": {"cpu": "1500m", "memory": "64Mi"}}}]}
        }))
        .unwrap()
    }

    #[test]
    fn fields_of_the_pod() {
        let facts = Facts { pod_ips: vec!["10.0.0.2".into(), "fd00::2".into()], ..Facts::default() };
        assert_eq!(field(&pod(), &facts, "metadata.labels").unwrap(), "a=\"one \\\"1\\\"\"\nb=\"2\"");
        assert_eq!(field(&pod(), &facts, "metadata.labels['b']").unwrap(), "2");
        assert_eq!(field(&pod(), &facts, "metadata.annotations['none']").unwrap(), "");
        assert_eq!(field(&pod(), &facts, "status.podIPs").unwrap(), "10.0.0.2,fd00::2");
        assert!(field(&pod(), &facts, "spec.containers").is_none());
    }

    #[test]
    fn resources_of_a_container() {
        let facts = Facts { allocatable_cpus: 4, ..Facts::default() };
        let pod = pod();
        let own = &pod.spec.as_ref().unwrap().containers[0];
        let ask = |resource: &str, divisor: Option<&str>| {
            let selector =
                serde_json::from_value(serde_json::json!({"resource": resource, "divisor": divisor}))
                    .unwrap();
            super::resource(&pod, Some(own), &facts, &selector)
        };
        assert_eq!(ask("limits.cpu", None).unwrap(), "2");
        assert_eq!(ask("limits.cpu", Some("1m")).unwrap(), "1500");
        assert_eq!(ask("limits.memory", Some("1Mi")).unwrap(), "64");
        assert_eq!(ask("limits.cpu", Some("0")).unwrap(), "2");
        assert!(ask("limits.gpu", None).is_none());
    }
}
