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
fn dashboards_find_cadvisors_names_and_the_configuration() {
    let ns = Namespace::new("cadvisor");
    ns.running("measured", "while true; do sleep 1; done");
    // The API server's own proxy does not go to a node on loopback.
    let (binding, account) = (format!("reads-{}", ns.name), format!("--serviceaccount={}:default", ns.name));
    let role = "--clusterrole=system:kubelet-api-admin";
    Kubectl::new(None, &["create", "clusterrolebinding", &binding, role, &account]).run().ok();
    let token = ns.kubectl(&["create", "token", "default"]).ok();
    let read = |path: &str| Cluster::get().node_api(path, Some(token.trim()));
    eventually("the pod in /metrics/cadvisor", || {
        let (_, text) = read("/metrics/cadvisor");
        let pod = format!("namespace=\"{}\",pod=\"measured\"", ns.name);
        let has = |name: &str| text.lines().any(|l| l.starts_with(name) && l.contains(&pod));
        let all = ["container_memory_working_set_bytes{", "container_cpu_usage_seconds_total{"];
        if all.iter().all(|name| has(name)) { Ok(()) } else { Err(text) }
    });
    let config: Value = serde_json::from_str(&read("/configz").1).unwrap();
    assert_eq!(config["kubeletconfig"]["kind"], "KubeletConfiguration");
    for path in ["/metrics/probes", "/pods/"] {
        assert_eq!(read(path).0, 200, "{path}");
    }
    Kubectl::new(None, &["delete", "clusterrolebinding", &binding]).run().ok();
}

/// Runs `moxlet node` for some seconds, or until it ends, at the cluster's own agent, with this configuration; its log.
fn second_node(config: &str, until: &str) -> (Option<i32>, String) {
    let dir = tempfile::tempdir().unwrap();
    let (cluster, log) = (Cluster::get(), dir.path().join("log"));
    let agent = cluster.root_dir().join("run/agent.sock");
    let file = dir.path().join("moxlet.toml");
    let common = format!(
        "root_dir = {:?}\nagent_endpoint = \"unix://{}\"\nlisten = \"127.0.0.1:0\"\n{config}\n",
        dir.path().join("root"),
        agent.display()
    );
    std::fs::write(&file, common).unwrap();
    let mut command = std::process::Command::new(cluster.bin.join("moxlet"));
    command.env_remove("KUBECONFIG").args(["node", "--config"]).arg(&file).stdin(std::process::Stdio::null());
    let mut child = command.stderr(std::fs::File::create(&log).unwrap()).spawn().unwrap();
    let (code, text) = eventually(&format!("{until:?} in the log of a second node"), || {
        let code = child.try_wait().unwrap().and_then(|status| status.code());
        let text = std::fs::read_to_string(&log).unwrap();
        if text.contains(until) { Ok((code, text)) } else { Err(text) }
    });
    let code = code.or_else(|| child.try_wait().unwrap().and_then(|status| status.code()));
    let _ = child.kill();
    let _ = child.wait();
    (code, text)
}

#[test]
fn a_second_process_of_the_same_name_waits_and_names_the_first() {
    let cluster = Cluster::get();
    let lease = || {
        let args = ["get", "lease", &cluster.node, "-o", "json"];
        Kubectl::new(Some("kube-node-lease"), &args).json()["metadata"]["annotations"].clone()
    };
    let before = lease();
    let holder = before["moxlet.dev/instance"].as_str().unwrap().to_owned();
    let bootstrap = cluster.dir.join("control-plane/bootstrap.kubeconfig");
    let config = format!("node_name = {:?}\nbootstrap_kubeconfig = {bootstrap:?}", cluster.node);
    let (_, log) = second_node(&config, "held by another instance");
    assert!(log.contains(&holder), "{log}");
    assert_eq!(lease(), before, "the Lease is still the first one's");
}

#[test]
fn an_administrators_kubeconfig_makes_no_node() {
    let config = format!("node_name = \"stranger\"\nkubeconfig = {:?}", Cluster::get().kubeconfig);
    let (_, log) = second_node(&config, "not for \"system:node:stranger\"");
    assert!(log.contains("allow_any_identity"), "{log}");
    let nodes = Kubectl::new(None, &["get", "nodes", "-o", "name"]).run().ok();
    assert!(!nodes.contains("stranger"), "{nodes}");
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
