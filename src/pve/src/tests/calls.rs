//! What goes over the wire.

use std::time::Duration;

use super::*;
use crate::api::{
    ct::{ConfigChange, Delete},
    network::InterfaceKind,
    storage::StorageStatus,
};

#[tokio::test]
async fn parameters_go_in_the_query_or_in_a_body_of_known_length() {
    let server = Server::with(json!(UPID)).await;
    let client = server.client();
    let node = node();
    let ct = client.ct(&node, vmid());
    ct.delete(Delete { purge: true, ..Delete::default() }).await.unwrap();
    ct.start().await.unwrap();
    ct.shutdown(Some(Duration::from_secs(9)), true).await.unwrap();
    let mut change = ConfigChange {
        delete: vec!["lock".into(), "mp0".into()],
        digest: Some("d".into()),
        ..Default::default()
    };
    change.set.hostname = Some("a&b=c".into());
    ct.set_config(&change).await.unwrap();
    let asked = server.asked();
    let seen: Vec<(&str, &str)> = asked.iter().map(|a| (a.line.as_str(), a.body.as_str())).collect();
    assert_eq!(
        seen,
        [
            ("DELETE /api2/json/nodes/a/lxc/101?purge=1", ""),
            ("POST /api2/json/nodes/a/lxc/101/status/start", ""),
            ("POST /api2/json/nodes/a/lxc/101/status/shutdown", "timeout=9&forceStop=1"),
            ("PUT /api2/json/nodes/a/lxc/101/config", "delete=lock%2Cmp0&digest=d&hostname=a%26b%3Dc"),
        ]
    );
    assert_eq!(asked[0].header("content-length"), None, "a DELETE has no body");
    for post in &asked[1..] {
        assert_eq!(post.header("content-length"), Some(post.body.len().to_string().as_str()));
        assert_eq!(post.header("transfer-encoding"), None);
    }
}

#[tokio::test]
async fn answers_are_read_as_loosely_as_they_are_written() {
    let server = Server::with(json!([
        {"id": "lxc/101", "type": "lxc", "vmid": "101", "node": "a", "status": "unknown", "mem": "77", "template": "0", "maxcpu": 2},
        {"id": "storage/a/local", "type": "storage", "storage": "local", "shared": 1, "disk": 1.5e9, "tags": null},
        {"id": "sdn/x", "type": "sdn"},
    ]))
    .await;
    let all = server.client().resources(None).await.unwrap();
    assert_eq!(
        (all[0].vmid, all[0].mem, all[0].template, all[0].name.as_deref()),
        (Some(vmid()), Some(77), false, None)
    );
    assert_eq!((all[1].shared, all[1].disk), (true, Some(1_500_000_000)));

    let server = Server::with(json!({"vmid": 101, "status": "running", "cpus": "2", "mem": "12", "ha": {"managed": "0"}, "tags": "moxlet;x"})).await;
    let status = server.client().ct(&node(), vmid()).status().await.unwrap();
    assert!(status.is_running() && !status.ha.unwrap().managed);

    let server = Server::with(json!([{"name": "eth0", "hwaddr": "x", "hardware-address": "x", "ip-addresses": [{"ip-address": "10.0.0.2", "prefix": "24"}]}])).await;
    let interfaces = server.client().ct(&node(), vmid()).interfaces().await.unwrap();
    assert_eq!(
        (interfaces[0].ip_addresses[0].prefix, interfaces[0].hardware_address.as_deref()),
        (Some(24), Some("x"))
    );

    let server = Server::with(json!({"/": {"Sys.Audit": 1}, "/vms/101": {"VM.Audit": 0}})).await;
    let mine = server.client().permissions(None).await.unwrap();
    assert!(
        mine.has("/nodes/a", "Sys.Audit")
            && mine.has("/vms/101", "VM.Audit")
            && !mine.has("/vms/101", "Sys.Audit")
    );

    let server = Server::with(json!({"/vms": {"VM.Audit": "1", "VM.Allocate": 0}})).await;
    let mine = server.client().permissions(None).await.unwrap();
    assert!(mine.has("/vms/101", "VM.Audit") && mine.has("/vms", "VM.Allocate"));
    assert!(!mine.has("/vms/101", "VM.Allocate"));

    let server = Server::with(json!({"next-id": {"lower": "1000", "upper": 2000}})).await;
    assert_eq!(server.client().options().await.unwrap().next_id_range(), (1000, 2000));
    let server = Server::with(json!({"next-id": "upper=2000"})).await;
    assert_eq!(server.client().options().await.unwrap().next_id_range(), (100, 2000));
}

#[tokio::test]
async fn one_odd_entry_does_not_spoil_a_list() {
    let server = Server::with(
        json!([{"volid": "local:iso/a, b.iso", "format": "iso"}, {"volid": "local:vztmpl/x.tar.zst"}]),
    )
    .await;
    let storage = "local".parse().unwrap();
    assert_eq!(server.client().storage_content(&node(), &storage, None, None).await.unwrap().len(), 2);
    let server = Server::with(json!([{"iface": "vmbr0:1", "type": "alias", "active": "1"}])).await;
    assert!(server.client().interfaces(&node(), InterfaceKind::All).await.unwrap()[0].active);
    let server = Server::with(json!([{"node": "a", "status": "online", "ssl_fingerprint": "none"}])).await;
    assert!(server.client().nodes().await.unwrap()[0].is_online());
}

#[tokio::test]
async fn a_taken_vmid_is_not_free() {
    let taken = json!({"data": null, "message": "Parameter verification failed.\n", "errors": {"vmid": "VM 101 already exists\n"}});
    let server = Server::start(&[(400, &taken.to_string()), (200, r#"{"data":"101"}"#)]).await;
    let client = server.client();
    assert!(!client.is_free(vmid()).await.unwrap());
    assert!(client.is_free(vmid()).await.unwrap());
}

#[test]
fn a_storage_holds_what_its_content_says() {
    let status: StorageStatus =
        serde_json::from_value(json!({"type": "zfspool", "content": "images, rootdir", "active": "1"}))
            .unwrap();
    assert!(status.holds("rootdir") && !status.holds("root") && status.active);
}

#[tokio::test]
async fn the_observer_sees_every_try_with_template_parameters_and_status() {
    let server = Server::start(&[(596, ""), (200, r#"{"data":[]}"#)]).await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    let observer = move |o: &crate::Observed<'_>| {
        log.lock().unwrap().push((
            o.template,
            o.path.to_owned(),
            o.parameters.len(),
            o.attempt,
            o.status,
            o.data.cloned(),
        ));
    };
    let client = builder(&[&server.url]).observer(observer).build().unwrap();
    client.storages(&node(), Some("rootdir")).await.unwrap();
    assert_eq!(
        *seen.lock().unwrap(),
        [
            ("/nodes/{node}/storage", "/nodes/a/storage".to_owned(), 1, 1, Some(596), None),
            ("/nodes/{node}/storage", "/nodes/a/storage".to_owned(), 1, 2, Some(200), Some(json!([]))),
        ]
    );
}
