//! A CT's life: made, started, moved, managed, destroyed.

use std::time::{Duration, Instant};

use serde_json::json;

use super::cluster::{CONF, Cluster, TEMPLATE};

/// Waits until something holds.
pub async fn until(mut holds: impl AsyncFnMut() -> bool) {
    let since = Instant::now();
    while !holds().await {
        assert!(since.elapsed() < Duration::from_secs(60), "it never held");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn status(cluster: &Cluster, node: &str) -> String {
    let data = cluster.call("GET", &format!("/nodes/{node}/lxc/100/status/current"), &[]).await.data();
    data["status"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_ct_is_made_started_listed_stopped_and_destroyed() {
    let cluster = Cluster::start(1).await;
    cluster
        .done(
            "POST",
            "/nodes/pve1/lxc",
            &[
                ("vmid", "100"),
                ("ostemplate", TEMPLATE),
                ("rootfs", "local-zfs:2"),
                ("hostname", "web"),
                ("unprivileged", "1"),
                ("net0", "name=eth0,bridge=vmbr0,ip=10.10.0.9/16"),
                ("start", "1"),
                ("tags", "a;b"),
            ],
        )
        .await;
    assert_eq!(status(&cluster, "pve1").await, "running");
    let config = cluster.call("GET", "/nodes/pve1/lxc/100/config", &[]).await.data();
    assert_eq!(config["rootfs"], "local-zfs:subvol-100-disk-0,size=2G");
    let interfaces = cluster.call("GET", "/nodes/pve1/lxc/100/interfaces", &[]).await.data();
    assert_eq!(interfaces[1]["ip-addresses"][0]["ip-address"], "10.10.0.9");
    let content =
        cluster.call("GET", "/nodes/pve1/storage/local-zfs/content", &[("vmid", "100")]).await.data();
    assert_eq!(content[0]["volid"], "local-zfs:subvol-100-disk-0");
    let answer = cluster.call("DELETE", "/nodes/pve1/lxc/100", &[]).await;
    assert_eq!(answer.refused(500), "unable to destroy CT 100 - container is running");
    cluster.done("POST", "/nodes/pve1/lxc/100/status/suspend", &[]).await;
    cluster.done("POST", "/nodes/pve1/lxc/100/status/resume", &[]).await;
    cluster.done("POST", "/nodes/pve1/lxc/100/status/reboot", &[]).await;
    cluster
        .done("POST", "/nodes/pve1/lxc/100/status/shutdown", &[("timeout", "5"), ("forceStop", "1")])
        .await;
    assert_eq!(status(&cluster, "pve1").await, "stopped");
    cluster.done("DELETE", "/nodes/pve1/lxc/100", &[("purge", "1")]).await;
    assert!(!cluster.conf("pve1", 100).exists());
    assert_eq!(cluster.call("GET", "/nodes/pve1/storage/local-zfs/content", &[]).await.data(), json!([]));
}

#[tokio::test]
async fn a_delete_that_does_not_get_the_cluster_lock_ends_at_lock_destroyed() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, CONF);
    cluster.admin("PUT", "/locks/user.cfg", json!({ "held": true })).await;
    let upid = cluster.call("DELETE", "/nodes/pve1/lxc/100", &[("purge", "1")]).await.data();
    assert_eq!(cluster.ended(&upid).await, "cfs-lock 'file-user_cfg' error: got lock request timeout");
    assert_eq!(cluster.read_conf("pve1", 100), "lock: destroyed\n");
    cluster.admin("PUT", "/locks/user.cfg", json!({ "held": false })).await;
    let answer = cluster.call("DELETE", "/nodes/pve1/lxc/100", &[("purge", "1")]).await;
    assert_eq!(answer.refused(500), "CT is locked (destroyed)");
}

#[tokio::test]
async fn protection_refuses_deletion() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, &format!("{CONF}protection: 1\n"));
    let answer = cluster.call("DELETE", "/nodes/pve1/lxc/100", &[]).await;
    assert_eq!(answer.refused(500), "can't remove CT 100 - protection mode enabled");
}

#[tokio::test]
async fn a_bind_mount_point_that_is_not_shared_refuses_migration_snapshot_and_clone_and_the_ct_runs_on() {
    let cluster = Cluster::start(2).await;
    cluster.write_conf("pve1", 100, &format!("{CONF}mp0: /var/empty,mp=/run/guard,ro=1\n"));
    cluster.done("POST", "/nodes/pve1/lxc/100/status/start", &[]).await;
    let upid = cluster
        .call("POST", "/nodes/pve1/lxc/100/migrate", &[("target", "pve2"), ("restart", "1")])
        .await
        .data();
    assert_eq!(cluster.ended(&upid).await, "cannot migrate local bind mount point 'mp0'");
    assert_eq!(status(&cluster, "pve1").await, "running");
    let upid = cluster.call("POST", "/nodes/pve1/lxc/100/snapshot", &[("snapname", "snap1")]).await.data();
    assert_eq!(cluster.ended(&upid).await, "snapshot feature is not available");
    let feature = cluster.call("GET", "/nodes/pve1/lxc/100/feature", &[("feature", "snapshot")]).await.data();
    assert_eq!(feature["hasFeature"], 0);
    let clone = cluster.call("POST", "/nodes/pve1/lxc/100/clone", &[("newid", "101")]).await;
    assert_eq!(clone.refused(500), "unable to clone mountpoint 'mp0' (type bind)");
}

#[tokio::test]
async fn migration_stops_moves_and_starts() {
    let cluster = Cluster::start(2).await;
    let created = [
        ("vmid", "100"),
        ("ostemplate", TEMPLATE),
        ("storage", "local-zfs"),
        ("unprivileged", "1"),
        ("start", "1"),
    ];
    cluster.done("POST", "/nodes/pve1/lxc", &created).await;
    let plain = cluster.call("POST", "/nodes/pve1/lxc/100/migrate", &[("target", "pve2")]).await;
    assert_eq!(plain.refused(500), "can't migrate running container without --online or --restart");
    cluster.done("POST", "/nodes/pve1/lxc/100/migrate", &[("target", "pve2"), ("restart", "1")]).await;
    assert_eq!(status(&cluster, "pve2").await, "running");
    let content = |node: &str| format!("/nodes/{node}/storage/local-zfs/content");
    assert_eq!(cluster.call("GET", &content("pve1"), &[]).await.data(), json!([]));
    assert_eq!(cluster.call("GET", &content("pve2"), &[]).await.data()[0]["vmid"], 100);
}

#[tokio::test]
async fn snapshots_are_taken_listed_and_removed_and_their_children_find_the_parent() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, CONF);
    let path = "/nodes/pve1/lxc/100/snapshot";
    for name in ["one", "two"] {
        cluster.done("POST", path, &[("snapname", name), ("description", "why")]).await;
    }
    let listed = cluster.call("GET", path, &[]).await.data();
    let names: Vec<_> = listed.as_array().unwrap().iter().map(|s| s["name"].clone()).collect();
    assert_eq!(names, ["one", "two", "current"]);
    cluster.done("DELETE", &format!("{path}/two"), &[]).await;
    assert!(cluster.read_conf("pve1", 100).contains("parent: one\n"));
    cluster.done("DELETE", &format!("{path}/one"), &[]).await;
    assert_eq!(cluster.read_conf("pve1", 100), CONF);
}

#[tokio::test]
async fn a_clone_carries_description_tags_and_raw_lines() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, &format!("#note\n{CONF}tags: moxlet\nlxc.include: /x/100-u.conf\n"));
    cluster.done("POST", "/nodes/pve1/lxc/100/clone", &[("newid", "200"), ("hostname", "copy")]).await;
    let text = cluster.read_conf("pve1", 200);
    for kept in
        ["#note\n", "tags: moxlet\n", "lxc.include: /x/100-u.conf\n", "hostname: copy\n", "subvol-200-disk-0"]
    {
        assert!(text.contains(kept), "{text}");
    }
}

#[tokio::test]
async fn start_and_stop_of_an_ha_managed_ct_end_when_the_request_is_queued() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, CONF);
    cluster.call("POST", "/cluster/ha/resources", &[("sid", "ct:100"), ("state", "stopped")]).await.data();
    let upid = cluster.call("POST", "/nodes/pve1/lxc/100/status/start", &[]).await.data();
    assert!(upid.as_str().unwrap().contains(":hastart:"));
    assert_eq!(cluster.ended(&upid).await, "OK");
    assert_eq!(status(&cluster, "pve1").await, "stopped");
    until(async || status(&cluster, "pve1").await == "running").await;
    let current = cluster.call("GET", "/nodes/pve1/lxc/100/status/current", &[]).await.data();
    assert_eq!(current["ha"], json!({ "managed": 1, "state": "started" }));
    cluster.done("POST", "/nodes/pve1/lxc/100/status/stop", &[]).await;
    until(async || status(&cluster, "pve1").await == "stopped").await;
    let refused = cluster.call("DELETE", "/nodes/pve1/lxc/100", &[]).await;
    assert_eq!(
        refused.refused(500),
        "unable to remove CT 100 - used in HA resources and purge parameter not set."
    );
    cluster.done("DELETE", "/nodes/pve1/lxc/100", &[("purge", "1")]).await;
    assert_eq!(cluster.call("GET", "/cluster/ha/resources", &[]).await.data(), json!([]));
}

#[tokio::test]
async fn a_missing_include_stops_the_start() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, &format!("{CONF}lxc.include: /nowhere/100-u.conf\n"));
    let upid = cluster.call("POST", "/nodes/pve1/lxc/100/status/start", &[]).await.data();
    assert_eq!(cluster.ended(&upid).await, "startup for container '100' failed");
}

#[tokio::test]
async fn stopall_stops_every_ct_of_the_host() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, &format!("{CONF}startup: down=7\n"));
    cluster.done("POST", "/nodes/pve1/lxc/100/status/start", &[]).await;
    let upid = cluster.call("POST", "/nodes/pve1/stopall", &[]).await.data();
    assert_eq!(cluster.ended(&upid).await, "OK");
    assert_eq!(status(&cluster, "pve1").await, "stopped");
}

#[tokio::test]
async fn firewall_options_and_rules_are_kept_in_order() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, CONF);
    let path = "/nodes/pve1/lxc/100/firewall";
    cluster.call("PUT", &format!("{path}/options"), &[("enable", "1"), ("policy_in", "DROP")]).await.data();
    assert_eq!(cluster.call("GET", &format!("{path}/options"), &[]).await.data()["policy_in"], "DROP");
    for port in ["80", "443"] {
        let rule = [("type", "in"), ("action", "ACCEPT"), ("proto", "tcp"), ("dport", port), ("enable", "1")];
        cluster.call("POST", &format!("{path}/rules"), &rule).await.data();
    }
    let rules = cluster.call("GET", &format!("{path}/rules"), &[]).await.data();
    assert_eq!((&rules[0]["dport"], &rules[1]["dport"]), (&json!("443"), &json!("80")));
    cluster.call("DELETE", &format!("{path}/rules/0"), &[]).await.data();
    assert_eq!(cluster.call("GET", &format!("{path}/rules"), &[]).await.data()[0]["dport"], "80");
    cluster.done("DELETE", "/nodes/pve1/lxc/100", &[]).await;
    assert!(!cluster.simulator.etc_pve().join("firewall/100.fw").exists());
}
