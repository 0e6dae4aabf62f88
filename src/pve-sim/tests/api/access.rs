//! Tokens, roles, privileges.

use super::cluster::{ADMIN, CONF, Cluster, TEMPLATE};

#[tokio::test]
async fn a_missing_privilege_is_403_with_path_and_privilege() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, CONF);
    let answer = cluster.call_as("auditor@pve!tok", "POST", "/nodes/pve1/lxc/100/status/start", &[]).await;
    assert_eq!(answer.refused(403), "Permission check failed (/vms/100, VM.PowerMgmt)");
    cluster.call_as("auditor@pve!tok", "GET", "/nodes/pve1/lxc/100/config", &[]).await.data();
    let answer = cluster.call_as("auditor@pve!tok", "GET", "/cluster/status", &[]).await;
    assert_eq!(answer.refused(403), "Permission check failed (/, Sys.Audit)");
}

#[tokio::test]
async fn with_privilege_separation_rights_are_the_intersection_of_user_and_token() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, CONF);
    cluster.write_conf("pve1", 101, CONF);
    let sep = "moxlet@pve!sep";
    let listed = cluster.call_as(sep, "GET", "/nodes/pve1/lxc", &[]).await.data();
    assert_eq!(listed.as_array().unwrap().len(), 1);
    let permissions = cluster.call_as(sep, "GET", "/access/permissions", &[]).await.data();
    assert_eq!(permissions["/vms/100"]["VM.PowerMgmt"], 1);
    assert!(permissions.get("/").is_none());
    let answer = cluster.call_as(sep, "DELETE", "/nodes/pve1/lxc/100", &[]).await;
    assert_eq!(answer.refused(403), "Permission check failed (/vms/100, VM.Allocate)");
    let of_user = cluster.call("GET", "/access/permissions", &[("path", "/vms/101")]).await.data();
    assert_eq!(of_user["/vms/101"]["VM.Allocate"], 1);
}

#[tokio::test]
async fn what_is_not_passed_down_is_told_so_and_does_not_hold_below() {
    let cluster = Cluster::with(1, |config| {
        config.acl.push(moxlet_pve_sim::config::Acl {
            path: "/nodes".into(),
            who: "auditor@pve".into(),
            role: "PVEAuditor".into(),
            propagate: false,
        });
    })
    .await;
    let auditor = "auditor@pve!tok";
    let permissions = cluster.call_as(auditor, "GET", "/access/permissions", &[]).await.data();
    assert_eq!(
        (&permissions["/nodes"]["Sys.Audit"], &permissions["/vms"]["VM.Audit"]),
        (&0.into(), &1.into())
    );
    let below = cluster.call_as(auditor, "GET", "/access/permissions", &[("path", "/nodes/pve1")]).await;
    assert!(below.data()["/nodes/pve1"].as_object().is_none_or(serde_json::Map::is_empty));
}

#[tokio::test]
async fn a_token_of_root_is_not_root() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, CONF);
    let root = "root@pam!all";
    let path = "/nodes/pve1/lxc/100/config";
    for (key, value, why) in [
        (
            "features",
            "nesting=1,keyctl=1",
            "changing feature flags (except nesting) is only allowed for root@pam",
        ),
        ("mp0", "/srv,mp=/srv", "mount point type bind is only allowed for root@pam"),
        ("dev0", "/dev/fuse", "configuring device passthrough is only allowed for root@pam"),
        ("hookscript", "local:snippets/x.pl", "changing the hookscript is only allowed for root@pam"),
    ] {
        let answer = cluster.call_as(root, "PUT", path, &[(key, value)]).await;
        assert_eq!(answer.refused(403), format!("Permission check failed ({why})"));
    }
    cluster.call_as(root, "PUT", path, &[("features", "nesting=0")]).await.data();
    let skip = cluster.call_as(root, "POST", "/nodes/pve1/lxc/100/status/start", &[("skiplock", "1")]).await;
    assert_eq!(skip.field("skiplock"), "Only root may use this option.");
}

#[tokio::test]
async fn creating_needs_rights_on_the_ct_the_storage_and_the_bridge() {
    let cluster = Cluster::start(1).await;
    let params = [
        ("vmid", "100"),
        ("ostemplate", TEMPLATE),
        ("unprivileged", "1"),
        ("storage", "local-zfs"),
        ("net0", "name=eth0,bridge=vmbr0"),
    ];
    let answer = cluster.call_as("auditor@pve!tok", "POST", "/nodes/pve1/lxc", &params).await;
    assert_eq!(answer.refused(403), "Permission check failed (/vms/100, VM.Allocate)");
    let grant = |path: &'static str, role: &'static str| {
        let cluster = &cluster;
        async move {
            cluster
                .call("PUT", "/access/acl", &[("path", path), ("users", "vmadmin@pve"), ("roles", role)])
                .await
                .data();
        }
    };
    let by = "vmadmin@pve!tok";
    let answer = cluster.call_as(by, "POST", "/nodes/pve1/lxc", &params).await;
    assert_eq!(answer.refused(403), "Permission check failed (/sdn/zones/localnetwork/vmbr0, SDN.Use)");
    grant("/sdn/zones/localnetwork", "PVESDNUser").await;
    let answer = cluster.call_as(by, "POST", "/nodes/pve1/lxc", &params).await;
    assert!(answer.refused(403).contains("/storage/local"));
    grant("/storage", "PVEDatastoreUser").await;
    let upid = cluster.call_as(by, "POST", "/nodes/pve1/lxc", &params).await.data();
    assert_eq!(cluster.ended(&upid).await, "OK");
}

#[tokio::test]
async fn users_tokens_roles_and_acls_can_be_made_and_removed() {
    let cluster = Cluster::start(1).await;
    cluster
        .call("POST", "/access/roles", &[("roleid", "Pods"), ("privs", "VM.Audit,VM.PowerMgmt")])
        .await
        .data();
    cluster.call("POST", "/access/roles", &[("roleid", "Bad"), ("privs", "VM.Fly")]).await.refused(500);
    cluster.call("POST", "/access/users", &[("userid", "new@pve")]).await.data();
    let made = cluster.call("POST", "/access/users/new@pve/token/tok", &[("privsep", "0")]).await.data();
    assert_eq!(made["full-tokenid"], "new@pve!tok");
    assert!(made["value"].as_str().unwrap().len() >= 32);
    let short = cluster.call("POST", "/access/users/new@pve/token/t", &[]).await;
    assert_eq!(short.field("tokenid"), "value does not match the regex pattern");
    cluster
        .call("PUT", "/access/acl", &[("path", "/vms"), ("users", "new@pve"), ("roles", "Pods")])
        .await
        .data();
    let acl = cluster.call("GET", "/access/acl", &[]).await.data();
    assert!(acl.as_array().unwrap().iter().any(|a| a["ugid"] == "new@pve" && a["roleid"] == "Pods"));
    cluster.call("DELETE", "/access/users/new@pve", &[]).await.data();
    cluster.call("DELETE", "/access/roles/Pods", &[]).await.data();
    let acl = cluster.call_as(ADMIN, "GET", "/access/acl", &[]).await.data();
    assert!(!acl.as_array().unwrap().iter().any(|a| a["ugid"] == "new@pve"));
}
