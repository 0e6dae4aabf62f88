//! A pod's status as a strategic merge patch. Such a patch removes no key by leaving it out: what is not there is `null`.

use k8s_openapi::api::core::v1::PodStatus;
use serde_json::{Map, Value, json};

use super::CONDITIONS;

/// What of a status may come and go.
const OPTIONAL: [&str; 6] =
    ["reason", "message", "podIP", "podIPs", "initContainerStatuses", "ephemeralContainerStatuses"];
/// What of a condition may come and go.
const OPTIONAL_OF_CONDITION: [&str; 2] = ["reason", "message"];

fn nulls(map: &mut Map<String, Value>, keys: &[&str]) {
    for key in keys {
        map.entry(*key).or_insert(Value::Null);
    }
}

/// The patch that brings a pod's status there; conditions of other controllers are left alone.
pub(super) fn patch(uid: &str, status: &PodStatus) -> Value {
    let mut value = serde_json::to_value(status).unwrap_or_default();
    if let Some(map) = value.as_object_mut() {
        nulls(map, &OPTIONAL);
        for key in ["podIPs", "hostIPs"] {
            if let Some(list) = map.get_mut(key).and_then(Value::as_array_mut) {
                list.insert(0, json!({"$patch": "replace"}));
            }
        }
        let conditions = map.entry("conditions").or_insert_with(|| json!([]));
        if let Some(list) = conditions.as_array_mut() {
            list.iter_mut().filter_map(Value::as_object_mut).for_each(|c| nulls(c, &OPTIONAL_OF_CONDITION));
            let missing: Vec<_> =
                CONDITIONS.iter().filter(|kind| !list.iter().any(|c| c["type"] == **kind)).collect();
            list.extend(missing.into_iter().map(|kind| json!({"$patch": "delete", "type": kind})));
        }
    }
    json!({"metadata": {"uid": uid}, "status": value})
}
