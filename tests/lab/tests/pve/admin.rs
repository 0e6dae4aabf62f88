//! What an administrator does to a pod's CT on the host: the CT is left as the documentation says, and the pod's events tell it.

use moxlet_tests_e2e::{LONG, Namespace, busybox};
use moxlet_tests_lab::Guest;

use crate::pod::{IDLE, warm};

/// A line of shell on a CT's configuration.
fn edit(guest: &Guest, vmid: u32, script: &str) {
    let _ = guest.sh(&format!("sed -i '{script}' /root/pve/etc/nodes/pve1/lxc/{vmid}.conf"));
}

fn state(guest: &Guest, vmid: u32) -> String {
    guest.sh(&format!("lxc-info -n {vmid} -s -H"))
}

#[test]
fn what_is_done_to_a_ct_is_told_on_its_pod_which_goes_on() {
    let guest = warm();
    let before = guest.traces();
    let ns = Namespace::new("admin");
    ns.pod("web", busybox(IDLE));
    ns.wait_ready("web");
    let vmid = guest.vmid("web");

    let _ = guest.sh(&format!("lxc-freeze -n {vmid}"));
    ns.wait_event("web", "CTFrozen", "frozen");
    let _ = guest.sh(&format!("lxc-unfreeze -n {vmid}"));
    ns.wait_event("web", "CTThawed", "not frozen");

    let _ = guest.api("PUT", &format!("/nodes/pve1/lxc/{vmid}/config?memory=256"));
    ns.wait_event("web", "CTEdited", "memory");
    assert_eq!(guest.sh(&format!("cat /sys/fs/cgroup/lxc/{vmid}/memory.max")), (256 << 20).to_string());
    assert_eq!(ns.exec("web", "hostname").text().trim(), "web");
    assert_eq!(guest.vmid("web"), vmid, "it is the CT that it was");

    let _ = guest.api("POST", &format!("/nodes/pve1/lxc/{vmid}/status/stop"));
    ns.wait_event("web", "CTStopped", "");
    ns.until("web", "its container to run again", LONG, |pod| {
        let main = &pod["status"]["containerStatuses"][0];
        (main["restartCount"].as_u64() >= Some(1) && main["state"]["running"].is_object()).then_some(())
    });
    assert_eq!(ns.exec("web", "hostname").text().trim(), "web");

    ns.kubectl(&["delete", "pod", "web"]).ok();
    guest.as_before(&before);
}

#[test]
fn a_pod_whose_ct_is_locked_by_a_backup_is_neither_stopped_nor_removed_until_that_is_over() {
    let guest = warm();
    let before = guest.traces();
    let ns = Namespace::new("backup");
    ns.pod("web", busybox(IDLE));
    ns.wait_ready("web");
    let vmid = guest.vmid("web");
    edit(&guest, vmid, "0,/^memory:/s//lock: backup\\nmemory:/");
    ns.wait_event("web", "CTLocked", "backup");

    ns.kubectl(&["delete", "pod", "web", "--wait=false"]).ok();
    ns.wait_event("web", "FailedKillPod", "backup");
    assert_eq!(state(&guest, vmid), "RUNNING");
    let running = guest.sh(&format!("lxc-attach -n {vmid} -- /bin/sh </dev/null"));
    assert!(running.contains("main") && running.contains("running"), "{running}");

    edit(&guest, vmid, "/^lock:/d");
    ns.wait_gone("web");
    guest.as_before(&before);
}
