//! `/cluster/resources` and what it does not know yet.

use serde_json::{Value, json};

use super::cluster::{CONF, Cluster};

async fn ct(cluster: &Cluster) -> Value {
    let all = cluster.call("GET", "/cluster/resources", &[("type", "vm")]).await.data();
    all.as_array().unwrap().iter().find(|r| r["vmid"] == 100).cloned().unwrap_or_default()
}

#[tokio::test]
async fn a_new_ct_is_unknown_and_nameless_until_its_host_has_told_of_it() {
    let cluster = Cluster::with(1, |c| c.behaviour.resources_ms = 3_600_000).await;
    cluster.admin("POST", "/tell", json!({})).await;
    cluster.write_conf("pve1", 100, CONF);
    let new = ct(&cluster).await;
    assert_eq!((&new["status"], new.get("name")), (&json!("unknown"), None));
    cluster.admin("POST", "/tell", json!({})).await;
    let told = ct(&cluster).await;
    assert_eq!((&told["status"], &told["name"]), (&json!("stopped"), &json!("web")));
    cluster.done("POST", "/nodes/pve1/lxc/100/status/start", &[]).await;
    assert_eq!(ct(&cluster).await["status"], "stopped");
    cluster.admin("POST", "/tell", json!({})).await;
    assert_eq!(ct(&cluster).await["status"], "running");
}

#[tokio::test]
async fn cts_of_a_lost_host_stay_listed_and_calls_for_it_are_595() {
    let cluster = Cluster::start(3).await;
    cluster.write_conf("pve2", 100, CONF);
    cluster.admin("PUT", "/hosts/pve2", json!({ "offline": true })).await;
    let lost = ct(&cluster).await;
    assert_eq!((&lost["node"], &lost["status"]), (&json!("pve2"), &json!("unknown")));
    let answer = cluster.call("GET", "/nodes/pve2/lxc/100/config", &[]).await;
    assert_eq!(answer.refused(595), "No route to host");
    let status = cluster.call("GET", "/cluster/status", &[]).await.data();
    let pve2 = status.as_array().unwrap().iter().find(|n| n["name"] == "pve2").unwrap().clone();
    assert_eq!(pve2["online"], 0);
    assert!(cluster.client.get(cluster.url(1)).send().await.is_err());
    cluster.admin("PUT", "/hosts/pve2", json!({ "offline": false })).await;
    cluster.call("GET", "/nodes/pve2/lxc/100/config", &[]).await.data();
}

#[tokio::test]
async fn a_storage_can_be_full_inactive_or_missing() {
    let cluster = Cluster::start(1).await;
    let status = "/nodes/pve1/storage/local-zfs/status";
    let created = [
        ("vmid", "100"),
        ("ostemplate", super::cluster::TEMPLATE),
        ("storage", "local-zfs"),
        ("unprivileged", "1"),
    ];
    cluster.admin("PUT", "/storages/local-zfs", json!({ "fault": "full" })).await;
    assert_eq!(cluster.call("GET", status, &[]).await.data()["avail"], 0);
    let upid = cluster.call("POST", "/nodes/pve1/lxc", &created).await.data();
    assert!(cluster.ended(&upid).await.contains("out of space"));
    cluster.admin("PUT", "/storages/local-zfs", json!({ "fault": "inactive" })).await;
    assert_eq!(cluster.call("GET", status, &[]).await.data()["active"], 0);
    assert!(
        cluster
            .call("POST", "/nodes/pve1/lxc", &created)
            .await
            .refused(500)
            .starts_with("could not activate storage")
    );
    cluster.admin("PUT", "/storages/local-zfs", json!({ "fault": "missing" })).await;
    assert_eq!(cluster.call("GET", status, &[]).await.refused(500), "storage 'local-zfs' does not exist");
    cluster.write_conf("pve1", 101, CONF);
    let upid = cluster.call("POST", "/nodes/pve1/lxc/101/status/start", &[]).await.data();
    assert_eq!(cluster.ended(&upid).await, "storage 'local-zfs' does not exist");
}
