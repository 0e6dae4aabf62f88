//! Backups by Proxmox VE of a running pod's CT, and a CT restored from one: real archives of real CTs on ZFS.

use moxlet_tests_e2e::{LONG, Namespace, busybox, eventually};
use moxlet_tests_lab::{Guest, foreign};
use serde_json::{Value, json};

use crate::pod::{IDLE, warm};

const DUMPS: &str = "/var/lib/vz/dump";

/// Where backups stop from now on; null: nowhere.
fn hold(guest: &Guest, step: &Value) {
    guest.control("PUT", "/backups", &json!({ "hold": step }));
}

fn begin(guest: &Guest, vmid: u32, mode: &str) -> String {
    let task = guest.api("POST", &format!("/nodes/pve1/vzdump?vmid={vmid}&mode={mode}&compress=gzip"));
    task.as_str().unwrap().to_owned()
}

/// Waits for a task and returns how it ended.
fn ended(guest: &Guest, task: &str) -> String {
    eventually(&format!("task {task} to end"), || {
        let status = guest.api("GET", &format!("/nodes/pve1/tasks/{task}/status"));
        match status["exitstatus"].as_str() {
            Some(how) => Ok(how.to_owned()),
            None => Err(status.to_string()),
        }
    })
}

/// A backup that ends well; what its log says otherwise.
fn back_up(guest: &Guest, vmid: u32, mode: &str) {
    let task = begin(guest, vmid, mode);
    let how = ended(guest, &task);
    assert_eq!(how, "OK", "{:#}", guest.api("GET", &format!("/nodes/pve1/tasks/{task}/log?limit=0")));
}

/// What a backup puts back: snapshots of the CTs' volumes, and the CT's configuration.
fn surroundings(guest: &Guest, vmid: u32) -> (String, Value) {
    let snapshots = guest.sh("zfs list -H -o name -t snapshot -r rpool/data 2>/dev/null; true");
    let mut config = guest.api("GET", &format!("/nodes/pve1/lxc/{vmid}/config"));
    config.as_object_mut().unwrap().remove("digest");
    (snapshots, config)
}

/// Which container of the pod runs, and how often it was started anew.
fn runs(ns: &Namespace) -> (String, u64) {
    let main = &ns.get("web")["status"]["containerStatuses"][0];
    assert!(main["state"]["running"].is_object(), "{main}");
    (main["containerID"].as_str().unwrap().to_owned(), main["restartCount"].as_u64().unwrap())
}

/// The archives of a CT, the newest last.
fn archives(guest: &Guest, vmid: u32) -> Vec<String> {
    let listed = guest.sh(&format!("ls {DUMPS} | grep -E '^vzdump-lxc-{vmid}-.*\\.tar\\.gz$'; true"));
    listed.lines().map(ToOwned::to_owned).collect()
}

/// No backup has left anything but archives, and these go.
fn tidy(guest: &Guest, vmid: u32) {
    let left = guest.sh(&format!("ls -A {DUMPS} | grep -v '^vzdump-lxc-{vmid}-.*gz$'; true"));
    assert_eq!(left, "");
    let _ = guest.sh(&format!("rm -f {DUMPS}/vzdump-lxc-{vmid}-*"));
}

#[test]
fn a_pod_runs_on_through_backups_in_modes_snapshot_and_suspend() {
    let guest = warm();
    let before = guest.traces();
    let ns = Namespace::new("vzdump");
    ns.pod("web", busybox(IDLE));
    ns.wait_ready("web");
    let vmid = guest.vmid("web");
    let (was, around) = (runs(&ns), surroundings(&guest, vmid));
    assert_eq!(was.1, 0);

    hold(&guest, &json!("archive"));
    let task = begin(&guest, vmid, "snapshot");
    ns.wait_event("web", "CTLocked", "backup");
    let snapshots = guest.sh("zfs list -H -o name -t snapshot -r rpool/data");
    assert!(snapshots.contains(&format!("rpool/data/subvol-{vmid}-disk-0@vzdump")), "{snapshots}");
    assert_eq!(ns.exec("web", "hostname").text().trim(), "web");
    hold(&guest, &Value::Null);
    assert_eq!(ended(&guest, &task), "OK");
    ns.wait_event("web", "CTUnlocked", "");
    assert_eq!((runs(&ns), surroundings(&guest, vmid)), (was.clone(), around.clone()));

    back_up(&guest, vmid, "suspend");
    assert_eq!((runs(&ns), surroundings(&guest, vmid)), (was, around));
    assert_eq!(ns.exec("web", "hostname").text().trim(), "web");

    let made = archives(&guest, vmid);
    assert_eq!(made.len(), 2, "{made:?}");
    for archive in made {
        // The ids are the CT's own.
        let listed = guest.sh(&format!("tar -tvzf {DUMPS}/{archive} --numeric-owner"));
        let has = |words: &[&str]| listed.lines().any(|l| words.iter().all(|w| l.contains(w)));
        assert!(
            has(&["./etc/vzdump/pct.conf"]) && has(&[" 0/0 ", "./sbin/moxlet-init"]),
            "{archive}: {listed}"
        );
    }
    tidy(&guest, vmid);
    ns.kubectl(&["delete", "pod", "web"]).ok();
    guest.as_before(&before);
}

#[test]
fn a_pod_whose_ct_a_backup_stops_runs_again_once_and_what_the_backup_starts_is_ended() {
    let guest = warm();
    let before = guest.traces();
    let ns = Namespace::new("vzstop");
    ns.pod("web", busybox(IDLE));
    ns.wait_ready("web");
    let vmid = guest.vmid("web");

    hold(&guest, &json!("archive"));
    let task = begin(&guest, vmid, "stop");
    ns.wait_event("web", "CTLocked", "backup");
    // Its next CT does not wait for the backup of the last.
    ns.until("web", "its container to run again", LONG, |pod| {
        let main = &pod["status"]["containerStatuses"][0];
        (main["restartCount"].as_u64() == Some(1) && main["state"]["running"].is_object()).then_some(())
    });
    assert_eq!(guest.sh(&format!("lxc-info -n {vmid} -s -H")), "STOPPED");
    hold(&guest, &Value::Null);
    assert_eq!(ended(&guest, &task), "OK");
    ns.wait_event("web", "CTStarted", "");
    let numbers: Vec<u32> = guest.cts().into_iter().map(|(_, number)| number).collect();
    eventually("one CT to run, not the one that was backed up", || {
        let running = guest.sh("lxc-ls --running -1");
        let mut running: Vec<u32> = running.split_whitespace().map(|n| n.parse().unwrap()).collect();
        running.retain(|number| !foreign().contains(number));
        match running.as_slice() {
            [one] if *one != vmid && numbers.contains(one) => Ok(()),
            _ => Err(format!("{running:?} of {numbers:?}")),
        }
    });
    assert_eq!(runs(&ns).1, 1);
    assert_eq!(ns.exec("web", "hostname").text().trim(), "web");

    assert_eq!(archives(&guest, vmid).len(), 1);
    tidy(&guest, vmid);
    ns.kubectl(&["delete", "pod", "web"]).ok();
    guest.as_before(&before);
}

#[test]
fn a_ct_restored_from_a_pods_backup_is_nobodys_pod_and_stays() {
    let guest = warm();
    let before = guest.traces();
    let ns = Namespace::new("vzrestore");
    ns.pod("web", busybox(IDLE));
    ns.wait_ready("web");
    let vmid = guest.vmid("web");
    back_up(&guest, vmid, "snapshot");
    let archive = archives(&guest, vmid).pop().unwrap();
    ns.kubectl(&["delete", "pod", "web"]).ok();
    guest.as_before(&before);

    // Of the pods' numbers: its own, and one that no pod had.
    for number in [vmid, vmid + 500] {
        let call = format!(
            "/nodes/pve1/lxc?vmid={number}&ostemplate=local:backup/{archive}&restore=1&storage=local-zfs&rootfs=local-zfs:0.0625"
        );
        let task = guest.api("POST", &call);
        assert_eq!(ended(&guest, task.as_str().unwrap()), "WARNINGS: 1", "raw lines are named and left out");
        let owner = format!("stat -c '%u %s' /rpool/data/subvol-{number}-disk-0/sbin/moxlet-init");
        assert_eq!(guest.sh(&owner), "100000 0");
    }
    // A pod beside them gets another number, and they stay as they are.
    ns.pod("next", busybox(IDLE));
    ns.wait_ready("next");
    assert!(![vmid, vmid + 500].contains(&guest.vmid("next")));
    ns.kubectl(&["delete", "pod", "next"]).ok();
    let left: Vec<u32> = guest.cts().into_iter().map(|(_, number)| number).collect();
    assert_eq!(left, [vmid, vmid + 500]);
    for number in left {
        let task = guest.api("DELETE", &format!("/nodes/pve1/lxc/{number}?purge=1"));
        assert_eq!(ended(&guest, task.as_str().unwrap()), "OK");
    }
    tidy(&guest, vmid);
    guest.as_before(&before);
}
