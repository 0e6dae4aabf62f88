//! Backups by Proxmox VE of a running pod's CT, in each mode, and what is restored from them: what is told, what waits, that the pod
//! runs exactly once and that nothing is left.

use std::fs;

use moxlet_ids::SandboxId;
use moxlet_pve::Upid;
use moxlet_sandbox::{Engine, Error, SandboxSpec, SandboxState};
use moxlet_tests_component::wait;
use serde_json::{Value, json};

use crate::{
    admin::ended,
    world::{FIRST, World, spec, words},
};

/// Begins a backup of a CT.
async fn begin(world: &World, vmid: u32, mode: &str) -> Upid {
    let path = format!("/nodes/pve1/vzdump?vmid={vmid}&mode={mode}&compress=zstd");
    let answer = world.place.call(&world.sim.hosts()[0].url, "POST", &path).await;
    answer["data"].as_str().unwrap().parse().unwrap()
}

/// Where backups stop from now on.
async fn hold(world: &World, step: Option<&str>) {
    world.control("PUT", "/backups", json!({ "hold": step })).await;
}

async fn until_conf(world: &World, id: &SandboxId, what: &str, holds: impl Fn(&str) -> bool) {
    let look = async || {
        let conf = world.conf(id);
        if holds(&conf) { Ok(()) } else { Err(conf) }
    };
    wait::until(what, look).await;
}

fn is_frozen(world: &World, vmid: u32) -> bool {
    let run = fs::read_to_string(world.place.state().join(format!("run/ct/pve1-{vmid}.json")));
    run.is_ok_and(|text| text.contains("\"frozen\":true"))
}

async fn until_frozen(world: &World, vmid: u32, frozen: bool) {
    let look =
        async || if is_frozen(world, vmid) == frozen { Ok(()) } else { Err(format!("frozen: {}", !frozen)) };
    wait::until("the CT to be frozen, or not", look).await;
}

async fn pid(world: &World, id: &SandboxId) -> Option<u32> {
    match world.engine.state(id).await.unwrap() {
        Some(SandboxState::Running { pid }) => Some(pid),
        _ => None,
    }
}

/// What is asked of a CT that somebody else holds is refused and may be asked again.
async fn assert_held(world: &World, id: &SandboxId, by: &str) {
    assert_eq!(world.engine.held_by(id).await.unwrap().as_deref(), Some(by));
    let refused = world.engine.delete(id).await.unwrap_err();
    assert!(
        matches!(&refused, Error::Locked { lock, .. } if lock == by) && refused.is_temporary(),
        "{refused}"
    );
}

/// The same pod's next CT.
fn next_of(spec: &SandboxSpec) -> SandboxSpec {
    let mut next = crate::world::spec("another-address");
    next.pod_name.clone_from(&spec.pod_name);
    next.pod_uid = spec.pod_uid.clone();
    next.hostname.clone_from(&spec.hostname);
    next.attempt = spec.attempt + 1;
    next
}

#[tokio::test]
async fn a_backup_in_mode_snapshot_leaves_the_pod_as_it_is() {
    let world = World::new().await;
    let id = world.running("web").await;
    let (vmid, first) = (world.vmid(&id), pid(&world, &id).await);
    let before = world.admin.ct(&world.node, vmid.try_into().unwrap()).config().await.unwrap();
    hold(&world, Some("frozen")).await;
    let task = begin(&world, vmid, "snapshot").await;
    until_frozen(&world, vmid, true).await;
    assert_eq!(world.seen().await, ["CTLocked", "CTFrozen"]);
    assert_eq!(world.engine.held_by(&id).await.unwrap().as_deref(), Some("snapshot"));
    hold(&world, Some("archive")).await;
    until_conf(&world, &id, "the snapshot", |c| c.contains("\nlock: backup\n") && c.contains("\n[vzdump]\n"))
        .await;
    assert_eq!(world.seen().await, ["CTLocked", "CTThawed"]);
    assert_held(&world, &id, "backup").await;
    hold(&world, Some("unlocked")).await;
    until_conf(&world, &id, "no lock", |c| !c.contains("\nlock: ")).await;
    assert!(world.conf(&id).contains("\nparent: vzdump\n"));
    assert_eq!(world.seen().await, ["CTUnlocked"], "what is the backup's own is nobody's edit");
    hold(&world, None).await;
    ended(&world, task).await.unwrap();
    assert_eq!(world.seen().await, [""; 0]);
    assert_eq!(world.admin.ct(&world.node, vmid.try_into().unwrap()).config().await.unwrap(), before);
    assert_eq!(pid(&world, &id).await, first);
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn a_backup_in_mode_suspend_leaves_the_pod_as_it_is() {
    let world = World::new().await;
    let id = world.running("web").await;
    let (vmid, first) = (world.vmid(&id), pid(&world, &id).await);
    hold(&world, Some("frozen")).await;
    let task = begin(&world, vmid, "suspend").await;
    until_frozen(&world, vmid, true).await;
    assert_eq!(world.seen().await, ["CTLocked", "CTFrozen"]);
    assert_held(&world, &id, "backup").await;
    hold(&world, Some("archive")).await;
    until_frozen(&world, vmid, false).await;
    assert_eq!(world.seen().await, ["CTThawed"]);
    assert_held(&world, &id, "backup").await;
    hold(&world, None).await;
    ended(&world, task).await.unwrap();
    assert_eq!(world.seen().await, ["CTUnlocked"]);
    assert_eq!(pid(&world, &id).await, first);
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn in_mode_stop_the_pod_comes_again_once_and_its_old_ct_goes_when_the_backup_is_over() {
    let world = World::new().await;
    let pod = spec("web");
    world.engine.create(&pod).await.unwrap();
    world.engine.start(&pod.id).await.unwrap();
    world.engine.look().await.unwrap();
    hold(&world, Some("archive")).await;
    let task = begin(&world, world.vmid(&pod.id), "stop").await;
    world.engine.wait(&pod.id).await.unwrap();
    assert_eq!(world.seen().await, ["CTStopped", "CTLocked"]);
    assert_eq!(world.engine.state(&pod.id).await.unwrap(), Some(SandboxState::Stopped));
    let refused = world.engine.start(&pod.id).await.unwrap_err();
    assert!(matches!(refused, Error::Locked { .. }), "{refused}");
    // Its next CT does not wait for the backup.
    let next = next_of(&pod);
    world.engine.create(&next).await.unwrap();
    world.engine.start(&next.id).await.unwrap();
    assert_ne!(world.vmid(&next.id), world.vmid(&pod.id));
    assert_held(&world, &pod.id, "backup").await;
    hold(&world, None).await;
    ended(&world, task).await.unwrap();
    // Proxmox VE has started what it had stopped.
    assert!(pid(&world, &pod.id).await.is_some());
    assert_eq!(world.seen().await, ["CTUnlocked"]);
    world.engine.delete(&pod.id).await.unwrap();
    let left = world.engine.list().await.unwrap();
    assert!(left.len() == 1 && left[0].id == next.id && left[0].state != SandboxState::Stopped, "{left:?}");
    world.engine.delete(&next.id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn a_pod_that_is_deleted_during_a_backup_waits_for_its_end_and_leaves_nothing() {
    for mode in ["snapshot", "suspend", "stop"] {
        let world = World::new().await;
        let id = world.running("web").await;
        hold(&world, Some("archive")).await;
        let task = begin(&world, world.vmid(&id), mode).await;
        until_conf(&world, &id, "the lock", |c| c.contains("\nlock: backup\n")).await;
        if mode == "stop" {
            world.engine.wait(&id).await.unwrap();
        }
        let removed = async || match world.engine.delete(&id).await {
            Err(error) if error.is_temporary() => Err(words(&error)),
            done => done.map_err(|error| panic!("{mode}: {}", words(&error))),
        };
        removed().await.unwrap_err();
        hold(&world, None).await;
        // However often it is asked meanwhile: the moment between the locks is one of those.
        wait::until("the pod to go", removed).await;
        // What the backup would have put right is gone: it warns of that, and brings nothing back.
        ended(&world, task).await.unwrap();
        world.assert_as_before();
    }
}

#[tokio::test]
async fn a_pod_that_goes_between_a_backups_lock_and_its_cleanup_is_not_brought_back() {
    for mode in ["snapshot", "stop"] {
        let world = World::new().await;
        let id = world.running("web").await;
        hold(&world, Some("unlocked")).await;
        let task = begin(&world, world.vmid(&id), mode).await;
        if mode == "stop" {
            world.engine.wait(&id).await.unwrap();
        }
        let archives = async || {
            let kept = archive(&world).await;
            if kept.is_some() { Ok(()) } else { Err("there is none".to_owned()) }
        };
        wait::until("the archive", archives).await;
        until_conf(&world, &id, "no lock", |c| !c.contains("\nlock: ")).await;
        world.engine.delete(&id).await.unwrap();
        hold(&world, None).await;
        ended(&world, task).await.unwrap();
        world.assert_as_before();
    }
}

/// The archive that there is.
async fn archive(world: &World) -> Option<String> {
    let path = "/nodes/pve1/storage/local/content?content=backup";
    let listed = world.place.call(&world.sim.hosts()[0].url, "GET", path).await;
    listed["data"][0]["volid"].as_str().map(ToOwned::to_owned)
}

/// A backup of a CT.
async fn backed_up(world: &World, vmid: u32) -> String {
    let task = begin(world, vmid, "snapshot").await;
    ended(world, task).await.unwrap();
    world.engine.look().await.unwrap();
    archive(world).await.unwrap()
}

/// What root@pam restores, with these parameters beside the archive's.
async fn restored_by_root(world: &World, vmid: u32, archive: &str, more: Value) {
    let mut parameters = json!({ "vmid": vmid, "ostemplate": archive, "restore": 1, "storage": "local-zfs" });
    parameters.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let call =
        json!({ "host": "pve1", "method": "POST", "path": "/nodes/pve1/lxc", "parameters": parameters });
    let admin = world.sim.admin().unwrap();
    let answer = crate::world::simulated::control_at(admin, "POST", "/pvesh", &call).await;
    let task: Upid = answer["data"].as_str().unwrap().parse().unwrap();
    ended(world, task).await.unwrap();
}

/// What a token restores, which gets neither raw lines nor mount points.
async fn restored_by_a_token(world: &World, vmid: u32, archive: &str) {
    let path = format!(
        "/nodes/pve1/lxc?vmid={vmid}&ostemplate={archive}&restore=1&force=1&storage=local-zfs&rootfs=local-zfs:0.0625"
    );
    let answer = world.place.call(&world.sim.hosts()[0].url, "POST", &path).await;
    let task: Upid = answer["data"].as_str().unwrap().parse().unwrap();
    ended(world, task).await.unwrap();
}

/// All files of a restored CT, which nobody touches.
fn files(world: &World, vmid: u32) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let all = world.place.snapshot().into_iter();
    all.filter(|(path, _)| path.to_string_lossy().contains(&vmid.to_string())).collect()
}

#[tokio::test]
async fn a_backup_restored_after_its_pod_is_gone_is_a_stranger_whoever_restores_it() {
    for by_root in [true, false] {
        let world = World::new().await;
        let id = world.running("web").await;
        let archive = backed_up(&world, FIRST).await;
        world.engine.delete(&id).await.unwrap();
        for vmid in [FIRST, FIRST + 50] {
            if by_root {
                restored_by_root(&world, vmid, &archive, json!({})).await;
            } else {
                restored_by_a_token(&world, vmid, &archive).await;
            }
        }
        let untouched = [files(&world, FIRST), files(&world, FIRST + 50)];
        assert!(untouched.iter().all(|f| f.len() == 2), "{untouched:?}");
        // With Moxlet's line it is told; without it it is any other CT.
        let told = if by_root { vec!["CTForeign"; 2] } else { Vec::new() };
        assert_eq!(world.seen().await, told);
        assert_eq!(world.engine.list().await.unwrap(), []);
        let next = world.running("next").await;
        assert_ne!(world.vmid(&next), FIRST);
        world.engine.delete(&next).await.unwrap();
        assert_eq!([files(&world, FIRST), files(&world, FIRST + 50)], untouched);
        world.assert_foreigners_untouched();
    }
}

#[tokio::test]
async fn a_backup_restored_under_another_number_while_its_pod_lives_is_a_stranger_and_by_root_does_not_start()
{
    let world = World::new().await;
    let id = world.running("web").await;
    let archive = backed_up(&world, FIRST).await;
    restored_by_root(&world, FIRST + 50, &archive, json!({})).await;
    assert_eq!(world.seen().await, ["CTForeign"]);
    let copy = world.admin.ct(&world.node, (FIRST + 50).try_into().unwrap());
    let refused = ended(&world, copy.start().await.unwrap()).await.unwrap_err();
    assert!(words(&refused).contains("includes the file of CT 1000000"), "{}", words(&refused));
    let untouched = files(&world, FIRST + 50);
    assert!(pid(&world, &id).await.is_some());
    world.engine.delete(&id).await.unwrap();
    assert_eq!(files(&world, FIRST + 50), untouched);
    world.assert_foreigners_untouched();
}

#[tokio::test]
async fn a_pods_ct_that_root_restores_over_itself_is_the_pods_and_goes_with_it() {
    let world = World::new().await;
    let id = world.running("web").await;
    let archive = backed_up(&world, FIRST).await;
    world.engine.stop(&id, std::time::Duration::ZERO).await.unwrap();
    restored_by_root(&world, FIRST, &archive, json!({ "force": 1, "memory": 64 })).await;
    assert!(
        world.conf(&id).contains("subvol-1000000-disk-1"),
        "Proxmox VE makes the new root before the old one goes"
    );
    let seen = world.engine.look().await.unwrap();
    assert!(
        seen.len() == 1 && seen[0].reason == "CTEdited" && seen[0].message.contains("memory 65 to 64"),
        "{seen:?}"
    );
    world.engine.start(&id).await.unwrap();
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn a_pods_ct_that_a_token_restores_over_itself_is_foreign_until_somebody_deletes_it() {
    let world = World::new().await;
    let id = world.running("web").await;
    let archive = backed_up(&world, FIRST).await;
    world.engine.stop(&id, std::time::Duration::ZERO).await.unwrap();
    restored_by_a_token(&world, FIRST, &archive).await;
    let untouched = fs::read(world.place.conf(FIRST)).unwrap();
    assert_eq!(world.seen().await, ["CTForeign"]);
    for refused in [world.engine.start(&id).await.map(drop), world.engine.delete(&id).await] {
        assert!(words(&refused.unwrap_err()).contains("does not include"));
    }
    assert_eq!(fs::read(world.place.conf(FIRST)).unwrap(), untouched);
    let ct = world.admin.ct(&world.node, FIRST.try_into().unwrap());
    ended(&world, ct.delete(moxlet_pve::api::ct::Delete::default()).await.unwrap()).await.unwrap();
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}
