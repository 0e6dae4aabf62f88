//! Faults on request, and the count of calls.

use std::time::{Duration, Instant};

use serde_json::json;

use super::cluster::{ADMIN, CONF, Cluster, percent};

#[tokio::test]
async fn calls_are_counted_by_method_path_and_token_and_the_counts_can_be_reset() {
    let cluster = Cluster::start(1).await;
    for _ in 0..3 {
        cluster.call("GET", "/nodes/pve1/lxc/100/config", &[]).await;
    }
    assert_eq!(cluster.count("GET", "/nodes/{node}/lxc/{vmid}/config").await, 3);
    let counts = cluster.admin("GET", "/counts", json!({})).await;
    assert_eq!(counts["by"][format!("GET /nodes/{{node}}/lxc/{{vmid}}/config {ADMIN}")]["status"]["500"], 3);
    cluster.admin("DELETE", "/counts", json!({})).await;
    assert_eq!(cluster.count("GET", "/nodes/{node}/lxc/{vmid}/config").await, 0);
}

#[tokio::test]
async fn errors_delays_broken_and_odd_answers_come_as_often_as_asked_for() {
    let cluster = Cluster::start(1).await;
    let rule = |what: serde_json::Value| {
        let mut rule = json!({ "path": "^/version$", "times": 1 });
        rule.as_object_mut().unwrap().extend(what.as_object().unwrap().clone());
        rule
    };
    let get = || async {
        cluster
            .client
            .get(format!("{}/api2/json/version", cluster.url(0)))
            .header("Authorization", format!("PVEAPIToken={ADMIN}=secret-of-moxlet-pve-sim"))
            .send()
            .await
    };
    cluster
        .admin(
            "POST",
            "/faults/calls",
            rule(json!({ "do": "error", "code": 596, "message": "Connection timed out" })),
        )
        .await;
    assert_eq!(cluster.call("GET", "/version", &[]).await.refused(596), "Connection timed out");
    cluster.call("GET", "/version", &[]).await.data();
    cluster.admin("POST", "/faults/calls", rule(json!({ "do": "delay", "ms": 120 }))).await;
    let since = Instant::now();
    cluster.call("GET", "/version", &[]).await.data();
    assert!(since.elapsed() >= Duration::from_millis(120));
    cluster.admin("POST", "/faults/calls", rule(json!({ "do": "drop" }))).await;
    assert!(get().await.is_err());
    cluster.admin("POST", "/faults/calls", rule(json!({ "do": "half-answer" }))).await;
    assert!(get().await.unwrap().text().await.is_err());
    cluster.admin("POST", "/faults/calls", rule(json!({ "do": "body", "text": "<html>" }))).await;
    assert_eq!(get().await.unwrap().text().await.unwrap(), "<html>");
    cluster.call("GET", "/version", &[]).await.data();
}

#[tokio::test]
async fn an_answer_can_be_lost_after_the_work_is_done() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, CONF);
    cluster.admin("POST", "/faults/calls", json!({ "method": "POST", "times": 1, "do": "error", "code": 599, "message": "Too many redirections", "after": true })).await;
    cluster.call("POST", "/nodes/pve1/lxc/100/status/start", &[]).await.refused(599);
    super::lifecycle::until(async || {
        cluster.call("GET", "/nodes/pve1/lxc/100/status/current", &[]).await.data()["status"] == "running"
    })
    .await;
}

#[tokio::test]
async fn tasks_fail_late_or_lose_the_end_of_their_log() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, CONF);
    let start = "/nodes/pve1/lxc/100/status/start";
    cluster
        .admin(
            "POST",
            "/faults/tasks",
            json!({ "id": "100", "times": 1, "do": "fails-before", "with": "no luck" }),
        )
        .await;
    let upid = cluster.call("POST", start, &[]).await.data();
    assert_eq!(cluster.ended(&upid).await, "no luck");
    cluster.admin("POST", "/faults/tasks", json!({ "times": 1, "do": "cut-log" })).await;
    let upid = cluster.call("POST", start, &[]).await.data();
    assert_eq!(cluster.ended(&upid).await, "unexpected status");
    cluster
        .admin("POST", "/faults/tasks", json!({ "kind": "vzstop", "times": 1, "do": "takes", "with": 200 }))
        .await;
    let upid = cluster.call("POST", "/nodes/pve1/lxc/100/status/stop", &[]).await.data();
    let path = format!("/nodes/pve1/tasks/{}/status", percent(upid.as_str().unwrap()));
    assert_eq!(cluster.call("GET", &path, &[]).await.data()["status"], "running");
    assert_eq!(cluster.ended(&upid).await, "OK");
}

#[tokio::test]
async fn calls_wait_for_a_worker_and_a_wait_that_is_too_long_is_596() {
    let cluster = Cluster::with(1, |c| {
        c.behaviour.workers = 2;
        c.behaviour.worker_wait_ms = 300;
    })
    .await;
    let call = || cluster.call("GET", "/version", &[]);
    cluster
        .admin(
            "POST",
            "/faults/calls",
            json!({ "path": "^/version$", "do": "delay", "ms": 50, "hold_worker": true }),
        )
        .await;
    let all = futures::future::join_all((0..6).map(|_| call())).await;
    assert!(all.iter().all(|a| a.status == 200));
    let counts = cluster.admin("GET", "/counts", json!({})).await;
    assert_eq!((&counts["most_at_once"], &counts["refused_for_want_of_a_worker"]), (&json!(2), &json!(0)));
    cluster.admin("DELETE", "/faults", json!({})).await;
    cluster
        .admin(
            "POST",
            "/faults/calls",
            json!({ "path": "^/version$", "do": "delay", "ms": 900, "hold_worker": true }),
        )
        .await;
    let all = futures::future::join_all((0..4).map(|_| call())).await;
    assert_eq!(all.iter().filter(|a| a.status == 596).count(), 2);
}

#[tokio::test]
async fn a_certificate_can_change_and_can_be_expired() {
    let cluster = Cluster::start(1).await;
    let old = cluster.simulator.hosts()[0].fingerprint.clone();
    let new = cluster.admin("PUT", "/certificates/pve1", json!({})).await["fingerprint"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_ne!(old, new);
    assert_eq!(cluster.call("GET", "/nodes", &[]).await.data()[0]["ssl_fingerprint"], new);
    cluster.admin("PUT", "/certificates/pve1", json!({ "expired": true })).await;
    // A connection that is open goes on; a new one is refused by the client.
    let fresh = super::cluster::client(&std::fs::read(cluster.simulator.ca_file()).unwrap());
    let error = fresh.get(format!("{}/api2/json/version", cluster.url(0))).send().await.unwrap_err();
    assert!(format!("{error:?}").to_lowercase().contains("expired"), "{error:?}");
}

#[tokio::test]
async fn the_version_can_be_another() {
    let cluster = Cluster::start(1).await;
    cluster.admin("PUT", "/version", json!({ "version": "8.4.1" })).await;
    let version = cluster.call("GET", "/version", &[]).await.data();
    assert_eq!((&version["version"], &version["release"]), (&json!("8.4.1"), &json!("8.4")));
}
