//! What an administrator sees who enters a pod's CT, or looks at its console.

use moxlet_tests_e2e::{Namespace, container, eventually};
use moxlet_tests_lab::Guest;
use serde_json::json;

use crate::pod::{IDLE, warm};

/// What `pct enter` runs, with a terminal, and with this typed.
fn entered(guest: &Guest, vmid: u32, typed: &str) -> (i32, String) {
    let attach = format!("lxc-attach -n {vmid} --clear-env --set-var TERM=linux -- /bin/sh");
    // The end of what is typed ends all: it comes long after what an emulated processor needs for the rest.
    let feed = format!("(sleep 1; printf '{typed}'; sleep 15)");
    let done = guest.try_sh(&format!("{feed} | timeout 60 script -qec '{attach}' /dev/null"));
    (done.code, done.text().replace('\r', ""))
}

#[test]
fn entering_a_ct_lists_its_containers_and_enters_the_one_that_is_chosen() {
    let guest = warm();
    let ns = Namespace::new("enter");
    let containers = [
        container("main", IDLE, json!({"env": [{"name": "WHO", "value": "main"}]})),
        container("side", &format!("touch /here-is-side; {IDLE}"), json!({})),
    ];
    ns.pod_with("web", json!({"containers": containers}));
    ns.wait_ready("web");
    let vmid = guest.vmid("web");

    let listed = guest.sh(&format!("lxc-attach -n {vmid} -- /bin/sh </dev/null"));
    assert!(
        listed.contains("1  main") && listed.contains("2  side") && listed.contains("running"),
        "{listed}"
    );
    let (code, inside) = entered(&guest, vmid, "side\\nls /here-is-side; echo $((6 * 7))\\nexit\\n");
    assert!(code == 0 && inside.contains("\n/here-is-side\n") && inside.contains("\n42\n"), "{inside}");
    let (code, nowhere) = entered(&guest, vmid, "other\\n");
    assert!(code != 0 && nowhere.contains("container \"other\" is not known"), "{nowhere}");
    let refused = guest.try_sh(&format!("lxc-attach -n {vmid} -- /bin/sh -c 'echo hello'"));
    assert!(refused.code != 0 && refused.stderr.contains("no shell"), "{refused:?}");
}

#[test]
fn the_console_shows_the_pods_state_and_the_lines_of_its_containers() {
    let guest = warm();
    let ns = Namespace::new("console");
    let tell = |word: &str| format!("trap 'exit 3' TERM; while true; do echo {word}; sleep 0.5; done");
    ns.pod_with(
        "web",
        json!({"containers": [
            container("main", &tell("ticks"), json!({})),
            container("side", &tell("tocks"), json!({})),
        ]}),
    );
    ns.wait_ready("web");
    let vmid = guest.vmid("web");
    // What the web interface shows.
    let _ = guest.sh(&format!(
        "systemd-run --quiet --unit=look-{vmid} sh -c \"sleep 600 | script -qefc 'lxc-console -n {vmid} -t 0 -e -1' /run/look-{vmid}\""
    ));
    let seen = |wanted: &[&str]| {
        eventually(&format!("{wanted:?} on the console"), || {
            let text = guest.try_sh(&format!("cat /run/look-{vmid}")).text();
            if wanted.iter().all(|w| text.contains(w)) { Ok(()) } else { Err(text) }
        });
    };
    seen(&["[main] ticks", "[side] tocks"]);
    ns.kubectl(&["exec", "web", "-c", "main", "--", "kill", "1"]).ok();
    seen(&["[moxlet] main has exited with 3", "[moxlet] main runs"]);
    let _ = guest.sh(&format!("systemctl stop look-{vmid}; rm -f /run/look-{vmid}"));
}
