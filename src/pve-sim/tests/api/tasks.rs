//! UPIDs, logs, who sees what, what fails at once and what only in the task.

use serde_json::json;

use super::cluster::{CONF, Cluster, TEMPLATE, percent};

#[tokio::test]
async fn what_is_wrong_at_once_is_500_and_what_a_lock_holds_up_fails_in_the_task() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, CONF);
    let at = |verb: &str| format!("/nodes/pve1/lxc/100/status/{verb}");
    assert_eq!(cluster.call("POST", &at("stop"), &[]).await.refused(500), "CT 100 not running");
    cluster.done("POST", &at("start"), &[]).await;
    assert_eq!(cluster.call("POST", &at("start"), &[]).await.refused(500), "CT 100 already running");
    cluster.done("POST", &at("stop"), &[]).await;
    cluster.write_conf("pve1", 100, &format!("{CONF}lock: backup\n"));
    let upid = cluster.call("POST", &at("start"), &[]).await.data();
    assert_eq!(cluster.ended(&upid).await, "CT is locked (backup)");
}

#[tokio::test]
async fn a_missing_template_fails_only_in_the_task_and_leaves_nothing() {
    let cluster = Cluster::start(1).await;
    let params = [
        ("vmid", "100"),
        ("ostemplate", "local:vztmpl/none.tar.zst"),
        ("storage", "local-zfs"),
        ("unprivileged", "1"),
    ];
    let upid = cluster.call("POST", "/nodes/pve1/lxc", &params).await.data();
    assert!(cluster.ended(&upid).await.contains("volume 'local:vztmpl/none.tar.zst' does not exist"));
    assert!(!cluster.conf("pve1", 100).exists());
    let content = cluster.call("GET", "/nodes/pve1/storage/local-zfs/content", &[]).await.data();
    assert_eq!(content, json!([]));
}

#[tokio::test]
async fn a_log_is_read_in_parts_with_line_numbers_and_the_total() {
    let cluster = Cluster::start(1).await;
    let params = [("vmid", "100"), ("ostemplate", TEMPLATE), ("storage", "local-zfs"), ("unprivileged", "1")];
    let upid = cluster.call("POST", "/nodes/pve1/lxc", &params).await.data();
    assert_eq!(cluster.ended(&upid).await, "OK");
    let path = format!("/nodes/pve1/tasks/{}/log", percent(upid.as_str().unwrap()));
    let all = cluster.call("GET", &path, &[]).await.json();
    let lines = all["data"].as_array().unwrap();
    assert_eq!(all["total"], lines.len());
    assert_eq!(lines.last().unwrap()["t"], "TASK OK");
    let last = (lines.len() - 1).to_string();
    let part = cluster.call("GET", &path, &[("start", &last), ("limit", "5")]).await.data();
    assert_eq!(part, json!([{ "n": lines.len(), "t": "TASK OK" }]));
}

#[tokio::test]
async fn a_token_sees_its_own_tasks_only_unless_it_may_audit_the_host() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, CONF);
    let upid = cluster.call("POST", "/nodes/pve1/lxc/100/status/start", &[]).await.data();
    cluster.ended(&upid).await;
    let other = "vmadmin@pve!tok";
    let status = format!("/nodes/pve1/tasks/{}/status", percent(upid.as_str().unwrap()));
    assert_eq!(
        cluster.call_as(other, "GET", &status, &[]).await.refused(403),
        "Permission check failed (/nodes/pve1, Sys.Audit)"
    );
    assert_eq!(cluster.call_as(other, "GET", "/nodes/pve1/tasks", &[]).await.data(), json!([]));
    let own = cluster.call_as(other, "POST", "/nodes/pve1/lxc/100/status/stop", &[]).await.data();
    cluster.ended(&own).await;
    let listed = cluster.call_as(other, "GET", "/nodes/pve1/tasks", &[]).await.data();
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!((&listed[0]["user"], &listed[0]["tokenid"]), (&json!("vmadmin@pve"), &json!("tok")));
    cluster
        .call("PUT", "/access/acl", &[("path", "/nodes"), ("users", "vmadmin@pve"), ("roles", "PVEAuditor")])
        .await
        .data();
    let listed = cluster.call_as(other, "GET", "/nodes/pve1/tasks", &[]).await.data();
    assert_eq!(listed.as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_running_task_can_be_cancelled() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, CONF);
    cluster.admin("POST", "/faults/tasks", json!({ "kind": "vzstart", "do": "never-ends" })).await;
    let upid = cluster.call("POST", "/nodes/pve1/lxc/100/status/start", &[]).await.data();
    let path = format!("/nodes/pve1/tasks/{}", percent(upid.as_str().unwrap()));
    assert_eq!(cluster.call("GET", &format!("{path}/status"), &[]).await.data()["status"], "running");
    let active = cluster.call("GET", "/nodes/pve1/tasks", &[("source", "active")]).await.data();
    assert_eq!(active[0]["upid"], upid);
    cluster.call("DELETE", &path, &[]).await.data();
    assert_eq!(cluster.ended(&upid).await, "received interrupt");
}

#[tokio::test]
async fn odd_upids_are_refused_parameters() {
    let cluster = Cluster::start(1).await;
    for upid in ["nonsense", "UPID:pve1:00000001:00000001:00000001:vzstart:100:a@pve:"] {
        let answer = cluster.call("GET", &format!("/nodes/pve1/tasks/{}/status", percent(upid)), &[]).await;
        assert!(["unable to parse worker upid", "no such task"].contains(&answer.field("upid").as_str()));
    }
}

#[tokio::test]
async fn template_answers_null_while_its_task_runs() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, CONF);
    assert!(cluster.call("POST", "/nodes/pve1/lxc/100/template", &[]).await.data().is_null());
    super::lifecycle::until(async || cluster.read_conf("pve1", 100).contains("template: 1")).await;
    let upid = cluster.call("POST", "/nodes/pve1/lxc/100/status/start", &[]).await.data();
    assert_eq!(cluster.ended(&upid).await, "you can't start a CT if it's a template");
}
