//! The node as the cluster sees it: registration, lease, certificates, who may call its API, metrics.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use moxlet_tests_e2e::{Cluster, Kubectl, Namespace, eventually};
use serde_json::Value;

fn node() -> Value {
    Kubectl::new(None, &["get", "node", &Cluster::get().node, "-o", "json"]).json()
}

#[test]
fn the_node_is_ready_with_its_labels_taint_and_capacity() {
    let node = node();
    let (labels, name) = (&node["metadata"]["labels"], Cluster::get().node.as_str());
    assert_eq!(labels["type"], "virtual-kubelet");
    assert_eq!(labels["kubernetes.io/os"], "linux");
    assert!(matches!(labels["kubernetes.io/arch"].as_str(), Some("amd64" | "arm64")));
    assert_eq!(labels["kubernetes.io/hostname"], name);
    let taints = node["spec"]["taints"].as_array().unwrap();
    assert!(taints.iter().any(|t| t["key"] == "virtual-kubelet.io/provider"
        && t["value"] == "proxmox"
        && t["effect"] == "NoSchedule"));
    for resource in ["cpu", "memory", "pods", "ephemeral-storage"] {
        assert!(node["status"]["capacity"][resource].is_string(), "{resource}");
        assert!(node["status"]["allocatable"][resource].is_string(), "{resource}");
    }
    let info = &node["status"]["nodeInfo"];
    assert!(info["kubeletVersion"].as_str().unwrap().starts_with("v1."), "{info}");
    assert!(info["containerRuntimeVersion"].as_str().unwrap().starts_with("moxlet://"), "{info}");
    let port = Cluster::get().kubelet.rsplit_once(':').unwrap().1;
    assert_eq!(node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"].to_string(), port);
    for kind in ["MemoryPressure", "DiskPressure", "PIDPressure"] {
        let conditions = node["status"]["conditions"].as_array().unwrap();
        assert!(conditions.iter().any(|c| c["type"] == kind && c["status"] == "False"), "{kind}");
    }
}

#[test]
fn the_lease_is_renewed() {
    let renewed = || {
        let lease =
            Kubectl::new(Some("kube-node-lease"), &["get", "lease", &Cluster::get().node, "-o", "json"])
                .json();
        assert_eq!(lease["spec"]["leaseDurationSeconds"], 40);
        lease["spec"]["renewTime"].as_str().unwrap().to_owned()
    };
    let first = renewed();
    eventually("a renewal", || if renewed() > first { Ok(()) } else { Err(first.clone()) });
}

#[test]
fn an_anonymous_caller_gets_401() {
    for path in ["/metrics", "/pods", "/metrics/resource"] {
        assert_eq!(Cluster::get().node_api(path, None).0, 401, "{path}");
    }
}

#[test]
fn a_wrong_token_gets_401() {
    assert_eq!(Cluster::get().node_api("/metrics", Some("not.a.token")).0, 401);
}

#[test]
fn a_serviceaccount_without_rights_gets_403() {
    let ns = Namespace::new("forbidden");
    let token = ns.kubectl(&["create", "token", "default"]).ok();
    assert_eq!(Cluster::get().node_api("/metrics", Some(token.trim())).0, 403);
}

#[test]
fn a_serviceaccount_with_the_right_scrapes_metrics_and_nothing_else() {
    let ns = Namespace::new("scrape");
    let manifest =
        std::fs::read_to_string(Cluster::project().join("manifests/rbac/metrics-reader.yaml")).unwrap();
    Kubectl::new(None, &["apply", "-f", "-"]).stdin(manifest).run().ok();
    ns.running("measured", "while true; do sleep 1; done");
    let token = Kubectl::new(Some("default"), &["create", "token", "metrics-reader"]).run().ok();
    let cluster = Cluster::get();
    eventually("the pod in /metrics/resource", || {
        let (status, body) = cluster.node_api("/metrics/resource", Some(token.trim()));
        let pod = format!("namespace=\"{}\",pod=\"measured\"", ns.name);
        let all = [
            "node_cpu_usage_seconds_total",
            "node_memory_working_set_bytes",
            "container_cpu_usage_seconds_total",
            "pod_memory_working_set_bytes",
        ]
        .iter()
        .all(|m| body.contains(m));
        if status == 200 && all && body.contains(&pod) { Ok(()) } else { Err(format!("{status}\n{body}")) }
    });
    let (status, body) = cluster.node_api("/metrics", Some(token.trim()));
    assert_eq!(status, 200);
    assert!(body.contains("kubelet_running_pods"), "{body}");
    assert_eq!(cluster.node_api("/pods", Some(token.trim())).0, 403);
    let exec = format!("/exec/{}/measured/main?command=true&output=1", ns.name);
    assert_eq!(cluster.node_api(&exec, Some(token.trim())).0, 403);
}

#[test]
fn the_serving_certificate_was_approved_and_is_the_clusters() {
    // curl checks it against the cluster's CA; a self-signed one would give status 0.
    assert_ne!(Cluster::get().node_api("/healthz", None).0, 0);
    let requests = Kubectl::new(None, &["get", "csr", "-o", "json"]).json();
    let issued = requests["items"].as_array().unwrap().iter().any(|r| {
        r["spec"]["signerName"] == "kubernetes.io/kubelet-serving" && r["status"]["certificate"].is_string()
    });
    assert!(issued, "{requests}");
}

#[test]
fn keys_are_readable_by_root_only() {
    use std::os::unix::fs::PermissionsExt;
    let dir = Cluster::get().root_dir().join("node/pki");
    let mut seen = 0;
    for entry in std::fs::read_dir(&dir).unwrap().flatten() {
        let metadata = entry.metadata().unwrap();
        if metadata.is_file() {
            seen += 1;
            assert_eq!(metadata.permissions().mode() & 0o077, 0, "{}", entry.path().display());
        }
    }
    assert!(seen > 0, "no files in {}", dir.display());
}
