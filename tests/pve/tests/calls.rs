//! Every call of the client, held against the official schema: path, method, parameters, their types and bounds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeSet, time::Duration};

use axum::{Json, Router};
use moxlet_pve::{
    Client, Endpoint, NodeName, Trust, Vmid,
    api::{
        cluster::ResourceKind,
        ct::{ConfigChange, Ct, Delete, Migrate, NewCt},
        firewall::{FirewallOptions, FirewallRule},
        network::InterfaceKind,
        task::TaskFilter,
    },
    config::LxcConfig,
};
use moxlet_tests_pve::recorder::Recorder;
use serde_json::json;
use tokio::net::TcpListener;

const FULL: &str = "\
#notes
arch: amd64
cmode: console
console: 1
cores: 2
cpulimit: 1.5
cpuunits: 100
debug: 0
dev0: /dev/net/tun,gid=1,mode=0660,uid=1
entrypoint: /sbin/init
features: nesting=1,mount=nfs;cifs
hostname: web-1.example.org
memory: 512
mp0: local-zfs:1,mp=/data,acl=1,backup=0,mountoptions=noatime;nodev,ro=1,size=1G
nameserver: 192.0.2.1 fd00::1
net0: name=eth0,bridge=vmbr0,firewall=1,gw=192.0.2.1,gw6=fd00::1,host-managed=1,hwaddr=BC:24:11:00:00:01,ip=192.0.2.9/24,ip6=fd00::9/64,mtu=1500,rate=10,tag=7,trunks=1;2,type=veth
onboot: 0
ostype: unmanaged
protection: 1
rootfs: local-zfs:4,idmap=passthrough
searchdomain: example.org
startup: order=1,up=5,down=40
swap: 0
tags: moxlet;ns-default
timezone: host
tty: 2
unprivileged: 1
";

/// What is asked is what matters: most answers are none, and the calls fail of it.
async fn endpoint() -> (String, tokio::task::JoinHandle<()>) {
    let app = Router::new().fallback(async || Json(json!({ "data": null, "total": 100 })));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let task = tokio::spawn(async move {
        axum::serve(listener, app).await.unwrap();
    });
    (url, task)
}

async fn cluster(client: &Client, node: &NodeName) {
    let _ = (client.version().await, client.cluster_status().await, client.next_id().await);
    let _ = (client.is_free(Vmid::MIN).await, client.cluster_tasks().await, client.options().await);
    let _ = (client.cluster_log(0).await, client.cluster_log(u16::MAX).await, client.resources(None).await);
    for kind in [ResourceKind::Guests, ResourceKind::Nodes, ResourceKind::Sdn, ResourceKind::Storages] {
        let _ = client.resources(Some(kind)).await;
    }
    let _ = (client.ha_status().await, client.ha_resources().await, client.ha_rules().await);
    let _ = (client.nodes().await, client.node_status(node).await, client.cts(node).await);
    for kind in [InterfaceKind::All, InterfaceKind::AnyBridge, InterfaceKind::LocalBridges] {
        let _ = client.interfaces(node, kind).await;
    }
    let (storage, volume) = ("local-zfs".parse().unwrap(), "local-zfs:subvol-100-disk-0".parse().unwrap());
    let _ = (client.storages(node, None).await, client.storages(node, Some("rootdir,images")).await);
    let _ = (
        client.storage_status(node, &storage).await,
        client.storage_content(node, &storage, None, None).await,
    );
    let _ = client.storage_content(node, &storage, Some("rootdir"), Some(Vmid::MAX)).await;
    let _ = client.delete_volume(node, &volume).await;
    let pool = "a/b".parse().unwrap();
    let _ = (client.pools().await, client.pool(&pool).await, client.delete_pool(&pool).await);
    let _ = client.add_to_pool(&pool, Vmid::new(1_000_000).unwrap()).await;
    let _ = (client.create_pool(&pool, None).await, client.create_pool(&pool, Some("why")).await);
    let _ = (client.permissions(None).await, client.permissions(Some("/vms/100")).await);
    let upid = "UPID:a:0000C0DE:0A1B2C3D4:66AABBCC:vzstart:101:u@pve!tk:".parse().unwrap();
    let _ = (
        client.task_status(&upid).await,
        client.task_log_tail(&upid, 10).await,
        client.cancel_task(&upid).await,
    );
    let filter = TaskFilter {
        vmid: Some(Vmid::MIN),
        kind: Some("vzdump".into()),
        running: true,
        since: Some(1),
        limit: Some(9),
    };
    let _ = (client.tasks(node, &filter).await, client.tasks(node, &TaskFilter::default()).await);
}

async fn container(ct: &Ct<'_>) {
    let set = LxcConfig::from_file(FULL).unwrap().config;
    assert!(set.unknown.is_empty(), "{:?}", set.unknown);
    let template = "local:vztmpl/a.tar.zst".parse().unwrap();
    let new = NewCt {
        template,
        config: set.clone(),
        storage: Some("local-zfs".parse().unwrap()),
        pool: Some("p".parse().unwrap()),
        start: true,
    };
    let _ = ct.create(&new).await;
    let change = ConfigChange {
        set,
        delete: vec!["mp1".into(), "net1".into()],
        revert: vec!["memory".into()],
        digest: Some("0".repeat(40)),
    };
    let _ = (ct.config().await, ct.pending().await, ct.set_config(&change).await, ct.status().await);
    let time = Some(Duration::from_secs(60));
    let _ = (ct.start().await, ct.stop(false).await, ct.stop(true).await, ct.shutdown(time, true).await);
    let _ = (ct.shutdown(None, false).await, ct.reboot(time).await, ct.reboot(None).await);
    let _ = (ct.suspend().await, ct.resume().await, ct.interfaces().await);
    let _ = ct.delete(Delete { force: true, purge: true, destroy_unreferenced_disks: true }).await;
    let _ = ct.delete(Delete::default()).await;
    let target_storage = Some("local-zfs".parse().unwrap());
    let _ = ct
        .migrate(&Migrate { target: "b".parse().unwrap(), restart: true, timeout: time, target_storage })
        .await;
    let options = FirewallOptions {
        enable: Some(true),
        dhcp: Some(true),
        ipfilter: Some(false),
        macfilter: Some(true),
        ndp: Some(true),
        radv: Some(false),
        policy_in: Some("DROP".into()),
        policy_out: Some("ACCEPT".into()),
        digest: Some("0".repeat(40)),
    };
    let _ = (ct.firewall_options().await, ct.set_firewall_options(&options).await, ct.firewall_rules().await);
    let some = |s: &str| Some(s.to_owned());
    let rule = FirewallRule {
        pos: Some(0),
        kind: "in".into(),
        action: "ACCEPT".into(),
        enable: Some(true),
        comment: some("x"),
        source: some("192.0.2.0/24"),
        dest: some("192.0.2.1"),
        proto: some("tcp"),
        sport: some("1000:2000"),
        dport: some("80,443"),
        iface: some("net0"),
        macro_name: None,
        log: some("nolog"),
        icmp_type: None,
    };
    let _ = (ct.add_firewall_rule(&rule).await, ct.delete_firewall_rule(0).await);
    let name = "snap1".parse().unwrap();
    let _ =
        (ct.snapshots().await, ct.create_snapshot(&name, Some("x")).await, ct.delete_snapshot(&name).await);
}

#[tokio::test]
async fn every_call_agrees_with_the_official_schema() {
    let (url, task) = endpoint().await;
    let recorder = Recorder::default();
    let client = Client::builder("u@pve!tk=secret".parse().unwrap())
        .endpoint(Endpoint::new(&url, Trust::System).unwrap())
        .observer(recorder.clone())
        .build()
        .unwrap();
    let node = "pve-1".parse().unwrap();
    cluster(&client, &node).await;
    container(&client.ct(&node, Vmid::new(1_000_000).unwrap())).await;
    task.abort();
    let wrong: Vec<String> = recorder.wrong_requests().iter().map(ToString::to_string).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(called_in_sources(), recorder.calls().into_keys().collect(), "a call is missing here");
}

/// The calls that the client's sources have.
fn called_in_sources() -> BTreeSet<(&'static str, &'static str)> {
    let sources = [
        include_str!("../../../src/pve/src/api/access.rs"),
        include_str!("../../../src/pve/src/api/cluster.rs"),
        include_str!("../../../src/pve/src/api/ct.rs"),
        include_str!("../../../src/pve/src/api/firewall.rs"),
        include_str!("../../../src/pve/src/api/ha.rs"),
        include_str!("../../../src/pve/src/api/network.rs"),
        include_str!("../../../src/pve/src/api/node.rs"),
        include_str!("../../../src/pve/src/api/pool.rs"),
        include_str!("../../../src/pve/src/api/snapshot.rs"),
        include_str!("../../../src/pve/src/api/storage.rs"),
        include_str!("../../../src/pve/src/api/task.rs"),
    ];
    let mut found = BTreeSet::new();
    for source in sources {
        for (i, _) in source.match_indices("\", \"/") {
            let before = &source[..i];
            let method = &before[before.rfind('"').unwrap() + 1..];
            let path = &source[i + 4..];
            found.insert((method, &path[..path.find('"').unwrap()]));
        }
    }
    found
}
