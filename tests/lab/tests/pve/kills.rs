//! kill -9 of agent, node and simulator while CTs are made, started and removed: each pod comes up in one CT or is gone.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use moxlet_tests_e2e::{Namespace, busybox, eventually};
use moxlet_tests_lab::{Guest, foreign};

use crate::pod::{IDLE, warm};

/// How many kills, of which each round has two; each takes some ten seconds of an emulated processor.
const KILLS: &str = "MOXLET_TEST_KILLS";
const USUAL: u32 = 6;
const PODS: [&str; 2] = ["a", "b"];

/// Kills the agent, the simulator, or both; and the node beside every other.
fn kill(guest: &Guest, round: u32) {
    let units = ["moxlet", "pve-sim", "moxlet pve-sim"][round as usize % 3];
    if round.is_multiple_of(2) {
        guest.kill_node();
    }
    let _ = guest.sh(&format!("systemctl kill --signal=KILL --kill-whom=main {units}"));
}

fn make(ns: &Namespace) {
    for name in PODS {
        ns.pod(name, busybox(IDLE));
    }
}

fn run(ns: &Namespace, guest: &Guest) {
    for name in PODS {
        ns.wait_ready(name);
    }
    let cts = guest.cts();
    assert_eq!(cts.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), PODS, "one CT a pod");
    let running = guest.sh("lxc-ls --running -1");
    let mut running: Vec<u32> = running.split_whitespace().map(|n| n.parse().unwrap()).collect();
    running.retain(|vmid| !foreign().contains(vmid));
    running.sort_unstable();
    let mut numbers: Vec<u32> = cts.into_iter().map(|(_, n)| n).collect();
    numbers.sort_unstable();
    assert_eq!(running, numbers);
    for name in PODS {
        // The kill may have come after the pod was ready.
        eventually(&format!("a command in pod {name}"), || {
            let done = ns.exec(name, "hostname");
            if done.text().trim() == name { Ok(()) } else { Err(format!("{done:?}")) }
        });
    }
}

fn remove(ns: &Namespace) {
    ns.kubectl(&["delete", "pods", "--all", "--wait=false"]).ok();
}

fn gone(ns: &Namespace) {
    eventually("all pods to be gone", || {
        let left = ns.kubectl(&["get", "pods", "-o", "name"]).ok();
        if left.trim().is_empty() { Ok(()) } else { Err(left) }
    });
}

#[test]
fn a_kill_at_any_moment_leaves_each_pod_in_one_ct_or_none() {
    let guest = warm();
    let before = guest.traces();
    let ns = Namespace::new("kills");
    let begun = Instant::now();
    // How long it takes when nothing is killed tells where the moments are.
    let since = Instant::now();
    make(&ns);
    run(&ns, &guest);
    let start = since.elapsed();
    let since = Instant::now();
    remove(&ns);
    gone(&ns);
    let removal = since.elapsed();
    guest.as_before(&before);
    let kills = std::env::var(KILLS).map_or(USUAL, |text| text.parse().expect(KILLS));
    let rounds = kills.div_ceil(2);
    let moment = |whole: Duration, round: u32| whole * (round + 1) / (rounds + 1);
    for round in 0..rounds {
        make(&ns);
        sleep(moment(start, round));
        kill(&guest, round);
        run(&ns, &guest);
        remove(&ns);
        sleep(moment(removal, round));
        kill(&guest, round + 1);
        gone(&ns);
        guest.as_before(&before);
        println!("{} kills, {} s", 2 * (round + 1), begun.elapsed().as_secs());
    }
}
