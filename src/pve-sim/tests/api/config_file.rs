//! The config file: what an API write makes of it, locks, digests, quorum.

use serde_json::json;

use super::cluster::{CONF, Cluster};

const PATH: &str = "/nodes/pve1/lxc/100/config";

#[tokio::test]
async fn an_api_write_reserialises_the_whole_file() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf(
        "pve1",
        100,
        "# pod default/web\nswap: 0\nmemory: 64\narch: amd64\nunprivileged: 1\nlxc.include = /x/100-u.conf\n\
         lxc.namespace.clone: net\nlxc.sysctl.net.core.somaxconn: 1024\nlxc.proc.oom_score_adj: 5\nlxc.ephemeral: 1\n\
         lxc.rootfs.path: /x\nlxc.idmap: u 0 100000 65536\n\n[old]\nmemory: 32\nsnaptime: 1\n",
    );
    cluster.call("PUT", PATH, &[("cores", "2")]).await.data();
    assert_eq!(
        cluster.read_conf("pve1", 100),
        "# pod default/web\narch: amd64\ncores: 2\nmemory: 64\nswap: 0\nunprivileged: 1\nlxc.include: /x/100-u.conf\n\
         lxc.idmap: u 0 100000 65536\n\n[old]\nmemory: 32\nsnaptime: 1\n"
    );
    let config = cluster.call("GET", PATH, &[]).await.data();
    assert_eq!(config["description"], " pod default/web\n");
    assert_eq!(config["lxc"], json!([["lxc.include", "/x/100-u.conf"], ["lxc.idmap", "u 0 100000 65536"]]));
}

#[tokio::test]
async fn a_stale_digest_is_refused() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, CONF);
    let digest = cluster.call("GET", PATH, &[]).await.data()["digest"].as_str().unwrap().to_owned();
    cluster.call("PUT", PATH, &[("cores", "1"), ("digest", &digest)]).await.data();
    let answer = cluster.call("PUT", PATH, &[("cores", "2"), ("digest", &digest)]).await;
    assert!(answer.refused(500).starts_with("detected modified configuration"));
}

#[tokio::test]
async fn changes_that_a_running_ct_does_not_take_wait_and_can_be_reverted() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, CONF);
    cluster.done("POST", "/nodes/pve1/lxc/100/status/start", &[]).await;
    cluster.call("PUT", PATH, &[("memory", "128"), ("cmode", "console")]).await.data();
    let text = cluster.read_conf("pve1", 100);
    assert!(text.contains("memory: 128\n") && text.ends_with("[pve:pending]\ncmode: console\n"), "{text}");
    assert!(cluster.call("GET", PATH, &[("current", "1")]).await.data().get("cmode").is_none());
    assert_eq!(cluster.call("GET", PATH, &[]).await.data()["cmode"], "console");
    cluster.call("PUT", PATH, &[("revert", "cmode")]).await.data();
    assert!(!cluster.read_conf("pve1", 100).contains("pending"));
    cluster.call("PUT", PATH, &[("delete", "features")]).await.data();
    let pending = cluster.call("GET", "/nodes/pve1/lxc/100/pending", &[]).await.data();
    assert!(pending.as_array().unwrap().iter().any(|p| p["key"] == "features" && p["delete"] == 1));
    cluster.done("POST", "/nodes/pve1/lxc/100/status/stop", &[]).await;
    assert!(!cluster.read_conf("pve1", 100).contains("features"));
}

#[tokio::test]
async fn a_lock_key_and_a_held_flock_are_respected() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, &format!("{CONF}lock: migrate\n"));
    let answer = cluster.call("PUT", PATH, &[("cores", "1")]).await;
    assert_eq!(answer.refused(500), "CT is locked (migrate)");
    cluster.write_conf("pve1", 100, CONF);
    cluster.admin("PUT", "/locks/100", json!({ "held": true })).await;
    let answer = cluster.call("PUT", PATH, &[("cores", "1")]).await;
    assert_eq!(answer.refused(500), "can't lock file '/run/lock/lxc/pve-config-100.lock' - got timeout");
    cluster.admin("PUT", "/locks/100", json!({ "held": false })).await;
    cluster.call("PUT", PATH, &[("cores", "1")]).await.data();
}

#[tokio::test]
async fn without_quorum_nothing_is_written() {
    let cluster = Cluster::start(3).await;
    cluster.write_conf("pve1", 100, CONF);
    cluster.admin("PUT", "/quorum", json!({ "quorate": false })).await;
    let answer = cluster.call("POST", "/nodes/pve1/lxc/100/status/start", &[]).await;
    assert_eq!(answer.refused(500), "cluster not ready - no quorum?");
    cluster.call("PUT", PATH, &[("cores", "1")]).await.refused(500);
    assert_eq!(cluster.read_conf("pve1", 100), CONF);
    assert_eq!(cluster.call("GET", "/cluster/status", &[]).await.data()[0]["quorate"], 0);
    cluster.admin("PUT", "/quorum", json!({ "quorate": true })).await;
    cluster.call("PUT", PATH, &[("cores", "1")]).await.data();
}

#[tokio::test]
async fn put_of_rootfs_does_not_check_that_the_volume_exists() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, CONF);
    cluster.call("PUT", PATH, &[("rootfs", "local-zfs:subvol-100-disk-7,size=2G")]).await.data();
    assert!(cluster.read_conf("pve1", 100).contains("subvol-100-disk-7"));
}

#[tokio::test]
async fn an_unknown_option_is_refused_by_name() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, CONF);
    assert_eq!(
        cluster.call("PUT", PATH, &[("delete", "colour")]).await.field("delete"),
        "unknown option 'colour'"
    );
    assert_eq!(cluster.call("PUT", PATH, &[]).await.refused(500), "no options specified");
}
