//! What goes wrong between a pod and Proxmox VE once an agent runs: the words that become the pod's event, and that nothing is
//! lost or half made. What keeps an agent from starting is in `start`.

use std::time::Duration;

use moxlet_ids::SandboxId;
use moxlet_pve::{Client, Endpoint, Trust};
use moxlet_sandbox::{Engine, SandboxSpec, SandboxState, pve::PveConfig};
use serde_json::json;

use crate::world::{Calls, FIRST, SECRET, World, spec, words};

const TOKEN: &str = "moxlet@pve!sim";

/// A CT that is made and does not run.
async fn made(world: &World) -> SandboxSpec {
    let pod = spec("web");
    world.engine.create(&pod).await.unwrap();
    pod
}

/// What a start says that fails; the CT is as it was before.
async fn start_fails(world: &World, id: &SandboxId) -> String {
    let before = world.conf(id);
    let error = world.engine.start(id).await.unwrap_err();
    assert_eq!(world.engine.state(id).await.unwrap(), Some(SandboxState::Stopped));
    assert_eq!(world.conf(id), before);
    world.assert_foreigners_untouched();
    words(&error)
}

fn has(text: &str, expected: &[&str]) {
    for word in expected {
        assert!(text.contains(word), "{word:?} is missing in: {text}");
    }
}

/// Once what was wrong is right again, the pod runs and goes without a trace.
async fn then_it_runs(world: &World, id: &SandboxId) {
    world.engine.start(id).await.unwrap();
    world.engine.delete(id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn a_token_that_was_revoked_is_named() {
    let world = World::new().await;
    let pod = made(&world).await;
    world.place.change("priv/token.cfg", SECRET, "11111111-1111-4111-8111-111111111111");
    has(
        &start_fails(&world, &pod.id).await,
        &["could not start CT 1000000", "does not accept the API token", TOKEN],
    );
    world.place.change("priv/token.cfg", "11111111-1111-4111-8111-111111111111", SECRET);
    then_it_runs(&world, &pod.id).await;
}

#[tokio::test]
async fn a_privilege_that_was_taken_away_is_named_with_its_path_and_the_command_that_grants_it() {
    let world = World::new().await;
    let pod = made(&world).await;
    world.place.change("user.cfg", ":Administrator:", ":PVEAuditor:");
    let text = start_fails(&world, &pod.id).await;
    has(&text, &["/vms/1000000", "VM.PowerMgmt", "pveum acl modify /vms/1000000 --users moxlet@pve"]);
    // One that never ran goes without the API; one that ran does not.
    world.place.change("user.cfg", ":PVEAuditor:", ":Administrator:");
    world.engine.start(&pod.id).await.unwrap();
    world.place.change("user.cfg", ":Administrator:", ":PVEAuditor:");
    has(&words(&world.engine.delete(&pod.id).await.unwrap_err()), &["VM.Allocate", "pveum acl modify"]);
    world.place.change("user.cfg", ":PVEAuditor:", ":Administrator:");
    world.engine.delete(&pod.id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn a_certificate_that_expired_or_changed_is_told_with_its_fingerprints() {
    let world = World::new().await;
    let url = &world.sim.hosts()[0].url;
    let known = world.sim.hosts()[0].fingerprint.clone();
    let pinned = Client::builder(format!("{TOKEN}={SECRET}").parse().unwrap())
        .endpoint(Endpoint::new(url, Trust::Fingerprint(known.parse().unwrap())).unwrap())
        .build()
        .unwrap();
    world.control("PUT", "/certificates/pve1", json!({"expired": true})).await;
    let error = world.place.client(url, &Calls::default()).version().await.unwrap_err();
    has(&words(&error), &["the certificate is not accepted", "xpired"]);
    let error = pinned.version().await.unwrap_err();
    has(&words(&error), &["the certificate is not accepted", &known]);
    // So it is read in the event of a pod, too.
    let pod = made(&world).await;
    has(
        &start_fails(&world, &pod.id).await,
        &["could not start CT 1000000", "the certificate is not accepted"],
    );
    world.control("PUT", "/certificates/pve1", json!({"expired": false})).await;
    then_it_runs(&world, &pod.id).await;
}

#[tokio::test]
async fn what_is_made_while_the_api_is_away_goes_while_it_is_away() {
    let world = World::new().await;
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let pool = "pods".parse().unwrap();
    for pool in [None, Some(pool)] {
        let config = PveConfig { pool, ..world.place.pve_config(FIRST + 99) };
        let away = world.place.client(&format!("https://{nobody}"), &Calls::default());
        let engine = world.place.engine_of(config, away);
        for _ in 0..3 {
            let pod = spec("web");
            engine.create(&pod).await.unwrap();
            let error = engine.start(&pod.id).await.unwrap_err();
            assert!(error.is_temporary(), "{}", words(&error));
            // Tried again it is no different.
            assert!(engine.start(&pod.id).await.unwrap_err().is_temporary());
            engine.delete(&pod.id).await.unwrap();
            world.assert_as_before();
        }
    }
}

#[tokio::test]
async fn a_ct_whose_start_may_have_been_taken_up_or_that_somebody_has_changed_goes_by_the_api_alone() {
    let world = World::new().await;
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let away = || {
        let client = world.place.client(&format!("https://{nobody}"), &Calls::default());
        world.place.engine_of(world.place.pve_config(FIRST + 99), client)
    };
    let firewall = world.place.etc_pve().join("firewall/1000000.fw");
    for how in ["answered by nobody", "edited", "edited and seen", "locked", "with rules of the firewall"] {
        let pod = made(&world).await;
        let conf = world.place.conf(FIRST);
        let text = std::fs::read_to_string(&conf).unwrap();
        match how {
            "answered by nobody" => {
                let lost = json!({"path": "/status/start$", "times": 1, "do": "drop", "after": true});
                world.fault("calls", lost).await;
                world.engine.start(&pod.id).await.unwrap_err();
            }
            "edited" => std::fs::write(&conf, text.replace("memory: 65", "memory: 66")).unwrap(),
            "edited and seen" => {
                std::fs::write(&conf, text.replace("memory: 65", "memory: 66")).unwrap();
                assert!(world.engine.look().await.unwrap().iter().any(|o| o.reason == "CTEdited"));
            }
            "locked" => std::fs::write(&conf, format!("lock: backup\n{text}")).unwrap(),
            _ => std::fs::write(&firewall, "[OPTIONS]\nenable: 1\n").unwrap(),
        }
        let error = away().delete(&pod.id).await.unwrap_err();
        assert!(error.is_temporary() && conf.exists(), "{how}: {}", words(&error));
        if how == "locked" {
            std::fs::write(&conf, text).unwrap();
        }
        world.no_faults().await;
        world.engine.delete(&pod.id).await.unwrap();
        world.assert_as_before();
        assert!(!firewall.exists(), "{how}");
    }
}

#[tokio::test]
async fn a_full_storage_refuses_the_pod_by_name_and_keeps_nothing_of_it() {
    let world = World::new().await;
    world.place.set_full(true);
    let pod = spec("web");
    has(&words(&world.engine.create(&pod).await.unwrap_err()), &["subvol-1000000-disk-0", "out of space"]);
    assert!(world.conf(&pod.id).contains("lock: create"), "nobody starts what is half made");
    has(&words(&world.engine.start(&pod.id).await.unwrap_err()), &["half made"]);
    world.engine.delete(&pod.id).await.unwrap();
    world.place.set_full(false);
    world.assert_as_before();
}

#[tokio::test]
async fn a_half_made_ct_that_is_unlocked_by_hand_is_removed_all_the_same() {
    let world = World::new().await;
    world.place.set_full(true);
    let pod = spec("web");
    world.engine.create(&pod).await.unwrap_err();
    world.place.set_full(false);
    world.place.change("nodes/pve1/lxc/1000000.conf", "lock: create\n", "");
    world.engine.delete(&pod.id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn a_storage_that_is_gone_is_named_by_the_start() {
    let world = World::new().await;
    let pod = made(&world).await;
    world.control("PUT", "/storages/local-zfs", json!({"fault": "missing"})).await;
    has(
        &start_fails(&world, &pod.id).await,
        &["could not start CT 1000000", "storage 'local-zfs' does not exist"],
    );
    world.control("PUT", "/storages/local-zfs", json!({"fault": null})).await;
    then_it_runs(&world, &pod.id).await;
}

#[tokio::test]
async fn an_exhausted_range_says_which_and_what_to_do() {
    let world = World::with(FIRST, 0).await;
    let pod = made(&world).await;
    let late = spec("late");
    let error = world.engine.create(&late).await.unwrap_err();
    has(&words(&error), &["all VMIDs from 1000000 to 1000000 are taken", "vmid_max"]);
    world.engine.delete(&late.id).await.unwrap();
    then_it_runs(&world, &pod.id).await;
}

#[tokio::test]
async fn a_lock_that_is_held_for_ever_is_named_and_nothing_waits_for_ever() {
    let world = World::new().await;
    let pod = made(&world).await;
    world.control("PUT", "/locks/1000000", json!({"held": true})).await;
    // By the task, which waits for it, and by ourselves.
    has(&start_fails(&world, &pod.id).await, &["can't lock file '/run/lock/lxc/pve-config-1000000.lock'"]);
    let error = world.engine.delete(&pod.id).await.unwrap_err();
    assert!(error.is_temporary());
    has(&words(&error), &["CT 1000000 is busy", "pve-config-1000000.lock"]);
    world.control("PUT", "/locks/1000000", json!({"held": false})).await;
    then_it_runs(&world, &pod.id).await;
}

#[tokio::test]
async fn a_task_that_never_ends_is_given_up_and_named() {
    let world = World::new().await;
    let url = &world.sim.hosts()[0].url;
    let client = world.place.client(url, &world.calls);
    let config = PveConfig { start_timeout: Duration::from_secs(2), ..world.place.pve_config(FIRST + 99) };
    let engine = world.place.engine_of(config, client);
    let pod = spec("web");
    engine.create(&pod).await.unwrap();
    world.fault("tasks", json!({"kind": "vzstart", "times": 1, "do": "never-ends"})).await;
    let text = words(&engine.start(&pod.id).await.unwrap_err());
    has(&text, &["the start of CT 1000000 took longer than 2 s", "task UPID:pve1:", "still runs"]);
    engine.delete(&pod.id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn a_task_whose_log_is_cut_off_is_judged_by_what_it_did() {
    let world = World::new().await;
    let pod = made(&world).await;
    world.fault("tasks", json!({"kind": "vzstart", "times": 1, "do": "cut-log"})).await;
    world.engine.start(&pod.id).await.unwrap();
    world.fault("tasks", json!({"kind": "vzdestroy", "times": 1, "do": "cut-log"})).await;
    world.engine.delete(&pod.id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn an_answer_that_is_not_json_is_shown_and_the_pod_is_taken_up_again() {
    let world = World::new().await;
    let pod = made(&world).await;
    let page =
        json!({"path": "/status/start$", "times": 1, "do": "body", "text": "<html>maintenance</html>"});
    world.fault("calls", page).await;
    let text = words(&world.engine.start(&pod.id).await.unwrap_err());
    has(&text, &["could not start CT 1000000", "unexpected answer", "<html>maintenance"]);
    world.assert_foreigners_untouched();
    then_it_runs(&world, &pod.id).await;
}

#[tokio::test]
async fn another_version_of_proxmox_ve_is_told_apart() {
    let world = World::new().await;
    world.control("PUT", "/version", json!({"version": "8.4.1"})).await;
    let error = world.admin.check_version().await.unwrap_err();
    has(&words(&error), &["Proxmox VE 8.4.1 is too old", "9.1"]);
    world.control("PUT", "/version", json!({"version": "10.0.2"})).await;
    assert_eq!(world.admin.check_version().await.unwrap().version.major, 10);
}

/// All of a pod's life, whatever comes of it.
async fn try_all(world: &World, name: &str) -> SandboxId {
    let pod = spec(name);
    let _ = world.engine.create(&pod).await;
    let _ = world.engine.start(&pod.id).await;
    let _ = world.engine.look().await;
    let _ = world.engine.describe(&pod.id, &["main".into()]).await;
    let _ = world.engine.stop(&pod.id, Duration::ZERO).await;
    let _ = world.engine.delete(&pod.id).await;
    pod.id
}

#[tokio::test]
async fn what_is_not_ours_stays_bit_by_bit_under_every_fault() {
    let world = World::new().await;
    let call = |rule| ("POST", "/faults/calls", rule);
    let task = |rule| ("POST", "/faults/tasks", rule);
    let mut faults = vec![
        call(json!({"method": "GET", "do": "error", "code": 500, "message": "got no worker"})),
        call(json!({"method": "POST", "do": "drop"})),
        call(json!({"method": "POST", "do": "drop", "after": true})),
        call(json!({"method": "DELETE", "do": "half-answer"})),
        call(
            json!({"method": "DELETE", "do": "error", "code": 599, "message": "Too many redirections", "after": true}),
        ),
        call(json!({"do": "body", "text": "{\"data\":\"UPID:pve1:zz\"}"})),
        call(json!({"do": "error", "code": 401, "message": "no ticket"})),
        ("PUT", "/quorum", json!({"quorate": false})),
        ("PUT", "/hosts/pve1", json!({"offline": true})),
        ("PUT", "/storages/local-zfs", json!({"fault": "missing"})),
        ("PUT", "/locks/user.cfg", json!({"held": true})),
    ];
    for kind in ["vzstart", "vzstop", "vzdestroy"] {
        for what in ["fails-before", "fails-after"] {
            faults.push(task(json!({"kind": kind, "do": what, "with": "command failed"})));
        }
    }
    for (number, (method, path, rule)) in faults.into_iter().enumerate() {
        world.control(method, path, rule.clone()).await;
        let id = try_all(&world, &format!("p{number}")).await;
        world.assert_foreigners_untouched();
        world.no_faults().await;
        world.control("PUT", "/hosts/pve1", json!({"offline": false})).await;
        world.control("PUT", "/storages/local-zfs", json!({"fault": null})).await;
        if let Err(error) = world.engine.delete(&id).await {
            panic!("after {method} {path} {rule}: {}", words(&error));
        }
        world.assert_as_before();
    }
}
