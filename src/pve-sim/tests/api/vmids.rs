//! VMIDs and who gets one first.

use super::cluster::{CONF, Cluster, TEMPLATE};

#[tokio::test]
async fn nextid_reserves_nothing_and_looks_in_the_range_of_the_options() {
    let cluster = Cluster::start(2).await;
    assert_eq!(cluster.call("GET", "/cluster/nextid", &[]).await.data(), "100");
    assert_eq!(cluster.call("GET", "/cluster/nextid", &[]).await.data(), "100");
    cluster.write_conf("pve2", 100, CONF);
    assert_eq!(cluster.call("GET", "/cluster/nextid", &[]).await.data(), "101");
    let taken = cluster.call("GET", "/cluster/nextid", &[("vmid", "100")]).await;
    assert_eq!(taken.field("vmid"), "VM 100 already exists");
    cluster.call("PUT", "/cluster/options", &[("next-id", "lower=5000,upper=5001")]).await.data();
    assert_eq!(cluster.call("GET", "/cluster/nextid", &[]).await.data(), "5000");
    cluster.write_conf("pve1", 5000, CONF);
    assert!(
        cluster
            .call("GET", "/cluster/nextid", &[])
            .await
            .refused(500)
            .contains("unable to get any free VMID")
    );
}

#[tokio::test]
async fn a_lost_race_for_a_vmid_is_500_already_exists() {
    let cluster = Cluster::start(2).await;
    cluster.write_conf("pve2", 100, CONF);
    let params = [("vmid", "100"), ("ostemplate", TEMPLATE), ("storage", "local-zfs"), ("unprivileged", "1")];
    for node in ["pve1", "pve2"] {
        let answer = cluster.call("POST", &format!("/nodes/{node}/lxc"), &params).await;
        assert_eq!(answer.refused(500), "CT 100 already exists on node 'pve2'");
    }
}

#[tokio::test]
async fn creating_demands_a_template() {
    let cluster = Cluster::start(1).await;
    let answer = cluster.call("POST", "/nodes/pve1/lxc", &[("vmid", "100")]).await;
    assert_eq!(answer.field("ostemplate"), "property is missing and it is not optional");
}

#[tokio::test]
async fn each_host_sees_its_own_cts_at_etc_pve_lxc() {
    let cluster = Cluster::start(2).await;
    let view = |host: &str| cluster.dir.path().join(format!("hosts/{host}/etc/pve"));
    let path = view("pve2").join("lxc/100.conf");
    std::fs::OpenOptions::new().write(true).create_new(true).open(&path).unwrap();
    assert!(std::fs::OpenOptions::new().write(true).create_new(true).open(&path).is_err());
    assert!(cluster.conf("pve2", 100).exists());
    assert!(!view("pve1").join("lxc/100.conf").exists());
    assert!(view("pve1").join("nodes/pve2/lxc/100.conf").exists());
}
