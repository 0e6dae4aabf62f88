//! A cluster whose hosts are served one by one, each as a process of its own would: they share the state directory, and a call
//! for another host is passed on to it.

use moxlet_pve_sim::{Simulator, config::Host};
use serde_json::json;

use super::cluster::{ADMIN, CONF, Cluster, config};

/// The second host alone, on the state of a cluster of two; then a cluster that serves the first and knows where the second is.
async fn two_processes() -> (Cluster, Simulator) {
    let dir = tempfile::tempdir().unwrap();
    let mut second = config(dir.path(), 2);
    second.hosts[0].listen = None;
    let second = Simulator::start(second).await.unwrap();
    let address = second.hosts()[0].url.strip_prefix("https://").unwrap().parse().unwrap();
    let mut first = config(dir.path(), 2);
    first.hosts[1] = Host { listen: None, remote: Some(address), ..first.hosts[1].clone() };
    let simulator = Simulator::start(first).await.unwrap();
    let client = super::cluster::client(&std::fs::read(simulator.ca_file()).unwrap());
    (Cluster { simulator, dir, client }, second)
}

#[tokio::test]
async fn a_call_for_a_host_of_another_process_is_passed_on_to_it() {
    let (cluster, second) = two_processes().await;
    cluster.write_conf("pve2", 100, CONF);
    // It starts there, with a task that only that process knows to be running and to have ended.
    cluster.done("POST", "/nodes/pve2/lxc/100/status/start", &[]).await;
    let status = cluster.call("GET", "/nodes/pve2/lxc/100/status/current", &[]).await.data();
    assert_eq!(status["status"], "running");
    let tasks = cluster.call("GET", "/nodes/pve2/tasks", &[("limit", "5")]).await.data();
    assert!(tasks[0]["upid"].as_str().unwrap().starts_with("UPID:pve2:"), "{tasks}");
    cluster.call("PUT", "/nodes/pve2/lxc/100/config", &[("memory", "128")]).await.data();
    assert!(cluster.read_conf("pve2", 100).contains("memory: 128"));
    // Refusals come through with their words, and rights are judged on both sides.
    let again = cluster.call("POST", "/nodes/pve2/lxc/100/status/start", &[]).await;
    assert_eq!(again.refused(500), "CT 100 already running");
    let field = cluster.call("PUT", "/nodes/pve2/lxc/100/config", &[("memory", "much")]).await;
    assert!(!field.field("memory").is_empty());
    let token = "auditor@pve!tok";
    assert_eq!(cluster.call_as(token, "DELETE", "/nodes/pve2/lxc/100", &[]).await.status, 403);
    second.stop().await;
    assert_eq!(cluster.call_as(ADMIN, "GET", "/nodes/pve2/status", &[]).await.status, 595);
    assert_eq!(cluster.call("GET", "/nodes/pve1/status", &[]).await.status, 200);
}

#[tokio::test]
async fn what_one_process_writes_of_the_cluster_the_other_reads() {
    let (cluster, second) = two_processes().await;
    cluster.call("POST", "/pools", &[("poolid", "pods")]).await.data();
    let other =
        Cluster { simulator: second, dir: tempfile::tempdir().unwrap(), client: cluster.client.clone() };
    let pools = other.call("GET", "/pools", &[]).await.data();
    assert_eq!(pools, json!([{"poolid": "pods"}]));
    other.simulator.stop().await;
}
