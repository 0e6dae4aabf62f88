//! What an agent made on its host is taken from it: after real pods, and not before they are gone.

use std::{fs, path::Path, process::Command};

use moxlet_agent::{EngineSettings, uninstall};
use moxlet_storage::mounts;
use moxlet_tests_component::host::{Host, sleeper};

/// What there is of the host's network and of liblxc for this agent, one line each.
fn made(host: &Host) -> Vec<String> {
    let bridge = &host.config.cni.bridge;
    let mut found = Vec::new();
    if Path::new("/sys/class/net").join(bridge).exists() {
        found.push("bridge");
    }
    let tables = Command::new("nft").args(["list", "tables"]).output();
    if tables.is_ok_and(|out| String::from_utf8_lossy(&out.stdout).contains(bridge.as_str())) {
        found.push("table");
    }
    let locks = Path::new("/run/lxc/lock").join(host.root().strip_prefix("/").unwrap());
    if locks.exists() {
        found.push("locks");
    }
    if !mounts::mounted_below(host.root()).unwrap().is_empty() {
        found.push("mounts");
    }
    found.into_iter().map(str::to_owned).collect()
}

async fn take_down(host: &Host, with_files: bool) {
    for step in uninstall(&host.config, with_files).await.unwrap() {
        assert!(step.outcome.is_ok(), "{}: {:?}", step.what, step.outcome);
    }
}

#[tokio::test]
async fn what_an_agent_made_goes_once_no_pod_is_left_and_not_before() {
    let mut host = Host::start().await;
    assert!(matches!(host.config.engine, EngineSettings::Lxc), "Proxmox VE's host has another network");
    let pod = host.pod("web").await;
    let id = host.run(&pod, sleeper("main")).await;
    host.stop_agent().await;
    let before = made(&host);
    assert_eq!(before, ["bridge", "table", "locks", "mounts"]);

    let error = uninstall(&host.config, true).await.unwrap_err().to_string();
    assert!(error.contains(&pod.id) && error.contains("kubectl drain"), "{error}");
    assert_eq!(made(&host), before);
    host.start_agent().await;
    assert_eq!(host.sh(&id, "echo here").await.trim(), "here", "its pod has gone on");

    host.remove_pod(&pod.id).await.unwrap();
    host.nothing_is_left().await;
    host.stop_agent().await;
    // Pods of other tests need what it would switch off; restoring it has tests of its own.
    let _ = fs::remove_file(host.root().join("ip_forward"));
    for _ in 0..2 {
        take_down(&host, false).await;
        assert_eq!(made(&host), Vec::<String>::new());
        assert!(host.root().join("ledger").exists(), "files stay unless that is asked for");
    }
    for _ in 0..2 {
        take_down(&host, true).await;
        assert!(!host.root().exists());
    }
}
