//! `/configz`: the node's configuration in the words of a KubeletConfiguration, as tools of a cluster read it.

use std::sync::Arc;

use axum::{Json, extract::State};

use super::Api;
use crate::Config;

pub(super) async fn configz(State(api): State<Arc<Api>>) -> Json<serde_json::Value> {
    Json(serde_json::json!({"kubeletconfig": kubelet_config(&api.config)}))
}

/// Only what holds here: a field that Moxlet does not know is left out.
fn kubelet_config(config: &Config) -> serde_json::Value {
    let seconds = |d: std::time::Duration| format!("{}s", d.as_secs());
    serde_json::json!({
        "kind": "KubeletConfiguration",
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "address": config.listen.ip().to_string(),
        "port": config.listen.port(),
        "readOnlyPort": 0,
        "staticPodPath": config.static_pod_dir,
        "fileCheckFrequency": "2s",
        "nodeStatusUpdateFrequency": "10s",
        "nodeStatusReportFrequency": "5m0s",
        "nodeLeaseDurationSeconds": 40,
        "maxPods": config.max_pods,
        "podPidsLimit": config.pod_pids_limit,
        "clusterDNS": config.cluster_dns,
        "clusterDomain": config.cluster_domain,
        "imageGCHighThresholdPercent": config.image_gc.high_percent,
        "imageGCLowThresholdPercent": config.image_gc.low_percent,
        "imageMinimumGCAge": seconds(config.image_gc.min_age),
        "imageMaximumGCAge": seconds(config.image_gc.max_age.unwrap_or_default()),
        "registerWithTaints": config.register_taints,
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true, "cacheTTL": "2m0s"},
            "x509": {"clientCAFile": config.client_ca_file},
        },
        "authorization": {
            "mode": "Webhook",
            "webhook": {"cacheAuthorizedTTL": "5m0s", "cacheUnauthorizedTTL": "30s"},
        },
        "enableServer": true,
        "failSwapOn": false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_names_what_holds_and_no_credential() {
        let shown = kubelet_config(&Config { max_pods: 7, ..Config::default() });
        assert_eq!(shown["maxPods"], 7);
        assert_eq!(shown["imageMinimumGCAge"], "120s");
        assert!(!shown.to_string().contains("ubeconfig\":"), "{shown}");
    }
}
