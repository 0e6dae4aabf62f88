//! What a client meets at the HTTP level.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::cluster::{ADMIN, Cluster, read};

#[tokio::test]
async fn a_missing_ct_is_500_with_the_reason_in_the_status_line_and_the_connection_closes() {
    let cluster = Cluster::start(1).await;
    let answer = cluster.call("GET", "/nodes/pve1/lxc/100/config", &[]).await;
    assert_eq!(answer.refused(500), "Configuration file 'nodes/pve1/lxc/100.conf' does not exist");
    assert!(answer.closes);
    assert!(!cluster.call("GET", "/version", &[]).await.closes);
}

#[tokio::test]
async fn a_connection_that_is_idle_is_closed_within_seconds() {
    let cluster = Cluster::start(1).await;
    let mut stream = cluster.connect(0).await;
    let request = "GET /api2/json/version HTTP/1.1\r\nHost: x\r\nAuthorization: PVEAPIToken=";
    stream.write_all(format!("{request}{ADMIN}=secret-of-moxlet-pve-sim\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let end = stream.read_to_end(&mut answer);
    // Far below the half minute that a slow handshake may take: this is another bound.
    let ended = tokio::time::timeout(Duration::from_secs(20), end).await;
    assert!(ended.is_ok() && answer.starts_with(b"HTTP/1.1 200 OK"), "{ended:?}");
}

#[tokio::test]
async fn refused_parameters_are_400_and_named() {
    let cluster = Cluster::start(1).await;
    let answer = cluster.call("POST", "/nodes/pve1/lxc", &[("vmid", "12"), ("colour", "red")]).await;
    assert_eq!(answer.field("vmid"), "value must have a minimum value of 100");
    assert_eq!(answer.field("ostemplate"), "property is missing and it is not optional");
    assert!(answer.field("colour").starts_with("property is not defined in schema"));
    assert!(answer.closes);
}

#[tokio::test]
async fn a_caller_that_is_not_known_is_401_with_an_empty_body_after_a_delay() {
    let cluster = Cluster::start(1).await;
    let url = format!("{}/api2/json/version", cluster.url(0));
    let since = std::time::Instant::now();
    let answer = read(cluster.client.get(&url).send().await.unwrap()).await;
    assert!(since.elapsed() >= std::time::Duration::from_millis(50));
    assert_eq!((answer.status, answer.text.as_str(), answer.reason.as_str()), (401, "", "No ticket"));
    for (value, reason) in [
        ("PVEAPIToken=moxlet@pve!sim=wrong", "invalid token value!"),
        ("PVEAPIToken=moxlet@pve!none=x", "no such token 'none' for user 'moxlet@pve'"),
        ("PVEAPIToken=nobody@pve!none=x", "no such user ('nobody@pve')"),
    ] {
        let answer =
            read(cluster.client.get(&url).header("Authorization", value).send().await.unwrap()).await;
        assert_eq!((answer.status, answer.text.as_str(), answer.reason.as_str()), (401, "", reason));
    }
}

#[tokio::test]
async fn an_unknown_path_is_501() {
    let cluster = Cluster::start(1).await;
    let answer = cluster.call("GET", "/nodes/pve1/nothing", &[]).await;
    assert_eq!(answer.refused(501), "Method 'GET /nodes/pve1/nothing' not implemented");
    cluster.call("DELETE", "/version", &[]).await.refused(501);
}

#[tokio::test]
async fn a_body_on_get_or_delete_a_chunked_body_and_a_body_over_512_kib_are_501() {
    let cluster = Cluster::start(1).await;
    let url = |path: &str| format!("{}/api2/json{path}", cluster.url(0));
    let auth = format!("PVEAPIToken={ADMIN}=secret-of-moxlet-pve-sim");
    for method in ["GET", "DELETE"] {
        let request =
            cluster.client.request(method.parse().unwrap(), url("/version")).header("Authorization", &auth);
        let answer = read(request.body("a=b").send().await.unwrap()).await;
        assert_eq!(answer.refused(501), format!("Unexpected content for method '{method}'"));
    }
    let put = || cluster.client.put(url("/nodes/pve1/lxc/100/config")).header("Authorization", &auth);
    let chunked = put()
        .header("Transfer-Encoding", "chunked")
        .body(reqwest::Body::wrap_stream(futures::stream::iter([Ok::<_, std::io::Error>("a=b")])));
    let answer = read(chunked.send().await.unwrap()).await;
    assert_eq!(answer.refused(501), "chunked transfer encoding not supported");
    let answer = read(put().body(vec![b'a'; 512 * 1024 + 1]).send().await.unwrap()).await;
    answer.refused(501);
}

#[tokio::test]
async fn json_bodies_work_with_numbers_and_booleans() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, super::cluster::CONF);
    let url = format!("{}/api2/json/nodes/pve1/lxc/100/config", cluster.url(0));
    let request = cluster
        .client
        .put(url)
        .header("Authorization", format!("PVEAPIToken={ADMIN}=secret-of-moxlet-pve-sim"))
        .header("Content-Type", "application/json")
        .body(json!({ "memory": 128, "onboot": true }).to_string());
    read(request.send().await.unwrap()).await.data();
    let text = cluster.read_conf("pve1", 100);
    assert!(text.contains("memory: 128\n") && text.contains("onboot: 1\n"), "{text}");
}

#[tokio::test]
async fn any_host_answers_for_all() {
    let cluster = Cluster::start(3).await;
    cluster.write_conf("pve3", 100, super::cluster::CONF);
    for host in 0..3 {
        let config = cluster.call_at(host, ADMIN, "GET", "/nodes/pve3/lxc/100/config", &[]).await.data();
        assert_eq!(config["hostname"], "web");
        let status = cluster.call_at(host, ADMIN, "GET", "/cluster/status", &[]).await.data();
        let local: Vec<_> = status.as_array().unwrap().iter().filter(|n| n["local"] == 1).collect();
        assert_eq!(local.len(), 1);
        assert_eq!(local[0]["name"], format!("pve{}", host + 1));
    }
}

#[tokio::test]
async fn integers_come_as_strings_here_and_there_and_lists_may_be_null() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, super::cluster::CONF);
    assert!(cluster.call("GET", "/cluster/nextid", &[]).await.data().is_string());
    assert!(cluster.call("GET", "/nodes/pve1/lxc", &[]).await.data()[0]["vmid"].is_string());
    assert!(cluster.call("GET", "/nodes/pve1/lxc/100/interfaces", &[]).await.data().is_null());
    let cluster = Cluster::with(1, |c| c.behaviour.types = moxlet_pve_sim::config::Types::Schema).await;
    assert!(cluster.call("GET", "/cluster/nextid", &[]).await.data().is_number());
}

#[tokio::test]
async fn every_list_of_the_cluster_and_of_a_host_is_as_the_schema_says() {
    let cluster = Cluster::start(2).await;
    cluster.write_conf("pve1", 100, super::cluster::CONF);
    cluster.done("POST", "/nodes/pve1/lxc/100/status/start", &[]).await;
    cluster.call("POST", "/cluster/ha/resources", &[("sid", "ct:100")]).await.data();
    cluster.call("POST", "/pools", &[("poolid", "pods"), ("comment", "a: b")]).await.data();
    cluster
        .call("PUT", "/pools", &[("poolid", "pods"), ("vms", "100"), ("storage", "local-zfs")])
        .await
        .data();
    for path in [
        "/version",
        "/nodes",
        "/nodes/pve1/status",
        "/nodes/pve1/version",
        "/nodes/pve1/time",
        "/nodes/pve1/dns",
        "/nodes/pve1/network",
        "/nodes/pve1/network/vmbr0",
        "/nodes/pve1/lxc",
        "/nodes/pve1/lxc/100",
        "/nodes/pve1/lxc/100/config",
        "/nodes/pve1/lxc/100/status/current",
        "/nodes/pve1/lxc/100/pending",
        "/nodes/pve1/lxc/100/interfaces",
        "/nodes/pve1/lxc/100/snapshot",
        "/nodes/pve1/lxc/100/migrate",
        "/nodes/pve1/lxc/100/firewall/options",
        "/nodes/pve1/lxc/100/firewall/rules",
        "/nodes/pve1/storage",
        "/nodes/pve1/storage/local-zfs/status",
        "/nodes/pve1/storage/local/content",
        "/nodes/pve1/tasks",
        "/cluster/resources",
        "/cluster/status",
        "/cluster/tasks",
        "/cluster/options",
        "/cluster/log",
        "/cluster/ha/resources",
        "/cluster/ha/resources/ct:100",
        "/cluster/ha/status/current",
        "/cluster/ha/status/manager_status",
        "/cluster/ha/rules",
        "/storage",
        "/storage/local-zfs",
        "/pools",
        "/pools/pods",
        "/access/acl",
        "/access/roles",
        "/access/roles/PVEAdmin",
        "/access/users",
        "/access/users/moxlet@pve",
        "/access/users/moxlet@pve/token",
        "/access/users/moxlet@pve/token/sim",
        "/access/permissions",
    ] {
        cluster.call("GET", path, &[]).await.data();
    }
    cluster.call("GET", "/nodes/pve1/lxc/100/feature", &[("feature", "snapshot")]).await.data();
    cluster
        .call("GET", "/nodes/pve1/tasks", &[("source", "all"), ("vmid", "100"), ("limit", "1")])
        .await
        .data();
}
