//! What is made, with how many calls, and that nothing stays.

use std::{fs, time::Duration};

use moxlet_ids::{SandboxId, Vmid};
use moxlet_pve::api::ct::ConfigChange;
use moxlet_sandbox::{Engine, Error, Limits, SandboxState};
use serde_json::json;

use crate::world::{FIRST, World, spec};

#[tokio::test]
async fn a_pods_ct_is_what_proxmox_ve_shows_and_goes_without_a_trace() {
    let world = World::new().await;
    let pod = spec("web");
    world.engine.create(&pod).await.unwrap();
    assert!(matches!(world.engine.create(&pod).await, Err(Error::Exists(_))));
    let vmid = Vmid::new(world.vmid(&pod.id)).unwrap();
    assert_eq!(vmid.get(), FIRST, "the lowest free one");
    assert!(world.calls.take().is_empty(), "a CT is made without a call");
    assert_eq!(world.engine.state(&pod.id).await.unwrap(), Some(SandboxState::Stopped));

    let shown = world.admin.ct(&world.node, vmid).config().await.unwrap();
    assert_eq!(shown.hostname.as_deref(), Some("web"));
    assert_eq!(shown.tags.iter().map(ToString::to_string).collect::<Vec<_>>(), ["moxlet", "ns-default"]);
    assert_eq!(
        (shown.memory, shown.swap, shown.cpulimit, shown.cores),
        (Some(65), Some(0), Some(0.5), Some(1))
    );
    assert_eq!((shown.lock, shown.unprivileged, shown.onboot), (None, Some(true), Some(false)));
    assert!(shown.description.unwrap().contains("default/web") && shown.mp.contains_key(&0));

    let pid = world.engine.start(&pod.id).await.unwrap();
    assert_eq!(world.engine.state(&pod.id).await.unwrap(), Some(SandboxState::Running { pid }));
    assert_eq!(world.engine.start(&pod.id).await.unwrap(), pid, "started again it is the same");
    let calls = world.calls.take();
    assert!(calls.len() <= 6 && calls[0] == "POST /nodes/{node}/lxc/{vmid}/status/start", "{calls:?}");
    assert_eq!(
        world.engine.addresses(&pod.id).await.unwrap().unwrap(),
        ["10.10.1.7".parse::<std::net::IpAddr>().unwrap()]
    );

    world.engine.stop(&pod.id, Duration::from_secs(1)).await.unwrap();
    world.engine.wait(&pod.id).await.unwrap();
    assert_eq!(world.engine.state(&pod.id).await.unwrap(), Some(SandboxState::Stopped));
    world.calls.take();
    world.engine.delete(&pod.id).await.unwrap();
    let calls = world.calls.take();
    assert!(calls.len() <= 3, "{calls:?}");
    world.engine.delete(&pod.id).await.unwrap();
    world.engine.stop(&pod.id, Duration::ZERO).await.unwrap();
    assert_eq!(world.engine.state(&pod.id).await.unwrap(), None);
    assert!(world.engine.list().await.unwrap().is_empty());
    world.assert_as_before();
}

#[tokio::test]
async fn an_idle_host_makes_no_calls() {
    let world = World::new().await;
    world.running("a").await;
    world.calls.take();
    for _ in 0..20 {
        assert!(world.engine.look().await.unwrap().iter().all(|o| o.sandbox.is_none()));
    }
    assert!(world.calls.take().is_empty());
}

#[tokio::test]
async fn pods_made_at_once_get_numbers_of_their_own_until_the_range_is_exhausted() {
    // Of 20 numbers two are foreign CTs' and one is a foreign dataset's.
    let world = World::with(FIRST + 19, 0).await;
    let pods: Vec<_> = (0..20).map(|n| spec(&format!("p{n}"))).collect();
    let made = futures::future::join_all(pods.iter().map(|p| world.engine.create(p))).await;
    let numbers: std::collections::BTreeSet<u32> =
        pods.iter().zip(&made).filter(|(_, m)| m.is_ok()).map(|(p, _)| world.vmid(&p.id)).collect();
    assert_eq!(numbers.len(), 17);
    assert!([1, 2, 3].iter().all(|n| !numbers.contains(&(FIRST + n))));
    for refused in made.iter().filter_map(|m| m.as_ref().err()) {
        assert!(matches!(refused, Error::NoVmid { .. }), "{refused}");
    }
    for pod in &pods {
        world.engine.delete(&pod.id).await.unwrap();
    }
    world.assert_as_before();
}

#[tokio::test]
async fn what_cannot_be_written_is_refused_before_anything_is_made() {
    let world = World::new().await;
    let mut bad = spec("web");
    bad.sysctls.insert("vm.swappiness".into(), "1".into());
    assert!(matches!(world.engine.create(&bad).await, Err(Error::Invalid { .. })));
    world.assert_as_before();
}

#[tokio::test]
async fn a_start_that_fails_says_what_the_task_said() {
    let world = World::new().await;
    let pod = spec("web");
    world.engine.create(&pod).await.unwrap();
    world.fault("tasks", json!({"kind": "vzstart", "times": 1, "do": "fails-before", "with": "run_buffer: 571 Script exited with status 22"})).await;
    let error = world.engine.start(&pod.id).await.unwrap_err();
    let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
    assert!(text.contains("could not start CT 1000000") && text.contains("status 22"), "{text}");
    assert!(world.calls.take().len() <= 6);
    world.engine.start(&pod.id).await.unwrap();
}

#[tokio::test]
async fn a_ct_without_its_included_file_is_not_started_and_nothing_is_asked() {
    let world = World::new().await;
    let pod = spec("web");
    world.engine.create(&pod).await.unwrap();
    let include = world.place.engine_dir().join(format!("include/{FIRST}-uid-of-web.conf"));
    let text = fs::read(&include).unwrap();
    fs::remove_file(&include).unwrap();
    let error = world.engine.start(&pod.id).await.unwrap_err().to_string();
    assert!(error.contains("is missing"), "{error}");
    assert!(world.engine.delete(&pod.id).await.is_err(), "a mismatch is foreign: not deleted either");
    assert!(world.calls.take().is_empty() && world.place.conf(FIRST).exists());
    fs::write(&include, text).unwrap();
    world.engine.delete(&pod.id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn changed_limits_and_names_of_containers_are_written_without_a_call() {
    let world = World::new().await;
    let id = world.running("web").await;
    world.calls.take();
    world.engine.describe(&id, &["nginx".into(), "log".into()]).await.unwrap();
    world.engine.resize(&id, &Limits { memory_bytes: Some(128 << 20), ..Limits::default() }).await.unwrap();
    let conf = world.conf(&id);
    assert!(
        conf.contains("memory: 130") && conf.contains("cpulimit: 0.5") && conf.contains("`nginx`, `log`"),
        "{conf}"
    );
    assert!(world.calls.take().is_empty());
    assert!(world.seen().await.is_empty(), "what we did ourselves is no news");
    // Notes that somebody wrote stay.
    let set =
        moxlet_pve::config::LxcConfig { description: Some("ours, hands off".into()), ..Default::default() };
    let change = ConfigChange { set, ..ConfigChange::default() };
    world.admin.ct(&world.node, Vmid::new(FIRST).unwrap()).set_config(&change).await.unwrap();
    assert_eq!(world.seen().await, ["CTRelabelled"]);
    world.engine.describe(&id, &["nginx".into()]).await.unwrap();
    assert!(world.conf(&id).contains("hands off"));
}

#[tokio::test]
async fn a_protected_ct_is_deleted_all_the_same_by_us() {
    let world = World::new().await;
    let id = world.running("web").await;
    let conf = world.place.conf(world.vmid(&id));
    let text = fs::read_to_string(&conf).unwrap();
    fs::write(&conf, text.replace("onboot: 0\n", "onboot: 0\nprotection: 1\n")).unwrap();
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn an_engine_that_starts_again_finds_its_cts() {
    let world = World::new().await;
    let id = world.running("web").await;
    let again = world.place.engine(&world.sim.hosts()[0].url, FIRST + 99, &world.calls);
    assert!(matches!(again.state(&id).await.unwrap(), Some(SandboxState::Running { .. })));
    assert_eq!(again.list().await.unwrap().len(), 1);
    assert_eq!(again.state(&SandboxId::random()).await.unwrap(), None);
    again.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn no_more_than_eight_cts_are_started_at_once() {
    let world = World::new().await;
    let mut pods = Vec::new();
    for number in 0..12 {
        let pod = spec(&format!("pod-{number}"));
        world.engine.create(&pod).await.unwrap();
        pods.push(pod.id);
    }
    world.fault("tasks", json!({"kind": "vzstart", "do": "never-ends"})).await;
    world.calls.take();
    let mut starting = tokio::task::JoinSet::new();
    for id in pods.clone() {
        let engine = world.engine.clone();
        starting.spawn(async move { engine.start(&id).await });
    }
    let mut asked = 0;
    let mut starts = async || {
        let calls = world.calls.take();
        asked += calls.iter().filter(|call| call.ends_with("/status/start")).count();
        asked
    };
    while starts().await < 8 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Others are made meanwhile: time enough for those that wait.
    let late = spec("late");
    world.engine.create(&late).await.unwrap();
    assert_eq!(starts().await, 8);
    // Those that are given up make room.
    starting.shutdown().await;
    world.no_faults().await;
    world.engine.start(&late.id).await.unwrap();
    for id in pods.iter().chain([&late.id]) {
        world.engine.delete(id).await.unwrap();
    }
    world.assert_as_before();
}

#[tokio::test]
async fn a_number_that_was_started_again_and_again_is_passed_over_where_another_is_free() {
    let world = World::new().await;
    world
        .fault("calls", json!({"path": "/status/start$", "do": "error", "code": 500, "message": "no"}))
        .await;
    let only = world.place.engine(&world.sim.hosts()[0].url, FIRST, &world.calls);
    // The foreigners of the world have the next numbers.
    for (engine, next) in [(&world.engine, FIRST + 4), (&only, FIRST)] {
        let pod = spec("web");
        engine.create(&pod).await.unwrap();
        assert_eq!(engine.vmid(&pod.id).map(Vmid::get), Some(FIRST));
        for _ in 0..4 {
            engine.start(&pod.id).await.unwrap_err();
        }
        engine.delete(&pod.id).await.unwrap();
        let late = spec("late");
        engine.create(&late).await.unwrap();
        assert_eq!(engine.vmid(&late.id).map(Vmid::get), Some(next));
        engine.delete(&late.id).await.unwrap();
    }
    world.assert_as_before();
}
