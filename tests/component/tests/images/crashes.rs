//! A pull that is killed, stopped, or finds the disk full: nothing leaks, and the next one goes through.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use moxlet_tests_component::registry;

use crate::{
    proxy::Proxy,
    support::{Store, pushed, text, tool, until},
};

/// How often a pull is killed.
const KILLS: u32 = 50;

#[test]
fn a_pull_that_is_killed_at_any_point_leaks_nothing_and_goes_through_afterwards() {
    let name = format!("{}/test/kill:1", registry::address());
    let id = pushed(&name, 4, 60, 8_000);
    let store = Store::new();
    let begun = Instant::now();
    store.run(&["pull", &name]);
    let mut whole = begun.elapsed();
    store.run(&["remove", &name]);
    // One that is complete before it is killed says how long a pull takes now, and does not count.
    let (mut killed, mut attempt) = (0, 0);
    while killed < KILLS {
        attempt += 1;
        assert!(attempt < 10 * KILLS, "only {killed} of {attempt} pulls were killed");
        let begun = Instant::now();
        let mut pull = store
            .command(&["pull", "-q", &name])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Points over all of a pull, not twice the same ones.
        let moment = whole * (killed * 7 % KILLS) / KILLS;
        while begun.elapsed() < moment && pull.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        pull.kill().unwrap();
        if pull.wait().unwrap().success() {
            whole = whole.min(begun.elapsed());
        } else {
            killed += 1;
        }
        let listed = store.run(&["list", "-q"]);
        assert!(listed.is_empty() || listed == id, "{listed}");
        assert!(store.leftovers().is_empty(), "after kill {killed}: {:?}", store.leftovers());
        if !listed.is_empty() {
            store.run(&["verify"]);
            store.run(&["remove", &name]);
        }
    }
    assert_eq!(store.run(&["pull", &name]), id);
    store.run(&["remove", &name]);
    assert!(store.leftovers().is_empty(), "{:?}", store.leftovers());
}

#[test]
fn a_pull_that_is_interrupted_leaves_nothing_and_goes_through_afterwards() {
    let id = pushed(&format!("{}/test/interrupt:1", registry::address()), 4, 60, 8_000);
    let (store, proxy) = (Store::new(), Proxy::start());
    let name = proxy.name("test/interrupt:1");
    for (signal, word) in [("-INT", "interrupted"), ("-TERM", "stopped by SIGTERM")] {
        proxy.hold(true);
        let asked = proxy.blobs();
        let mut command = store.command(&["pull", &name]);
        let pull = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        until(|| proxy.blobs() > asked);
        tool("kill", &[signal, &pull.id().to_string()]);
        let output = pull.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains(word));
        proxy.hold(false);
        assert_eq!(store.run(&["list", "-q"]), "");
        assert!(store.leftovers().is_empty(), "{:?}", store.leftovers());
    }
    assert_eq!(store.run(&["pull", &name]), id);
    store.run(&["verify"]);
    store.run(&["remove", &name]);
    assert!(store.leftovers().is_empty(), "{:?}", store.leftovers());
}

#[test]
fn a_full_disk_is_named_and_the_pull_goes_through_once_there_is_space() {
    let name = format!("{}/test/full:1", registry::address());
    let id = pushed(&name, 3, 10, 400_000);
    let store = Store::new();
    let place = store.path("store");
    std::fs::create_dir(&place).unwrap();
    tool("mount", &["-t", "tmpfs", "-o", "size=6m,mode=755", "tmpfs", text(&place)]);
    let complaint = store.complaint(&["pull", &name]);
    assert!(complaint.contains("No space left on device"), "{complaint}");
    assert_eq!(store.run(&["list", "-q"]), "");
    assert!(store.leftovers().is_empty(), "{:?}", store.leftovers());
    tool("mount", &["-o", "remount,size=64m", text(&place)]);
    assert_eq!(store.run(&["pull", &name]), id);
    // Space is made of what nobody uses.
    let gone = store.run(&["gc", "--high", "15", "--low", "10", "--min-age", "0s"]);
    assert!(gone.contains(&id), "{gone}");
    let umount = Command::new("umount").arg(&place).status().unwrap();
    assert!(umount.success());
}
