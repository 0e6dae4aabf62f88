//! Restores, copies and others' CTs under the numbers of pods: whose a CT is.

use std::{fs, net::IpAddr, time::Duration};

use moxlet_ids::Vmid;
use moxlet_pve::api::ct::Delete;
use moxlet_sandbox::{Engine, Error, SandboxState};

use crate::{
    admin::{ended, number},
    world::{FIRST, World, words},
};

#[tokio::test]
async fn restored_over_itself_by_root_it_is_the_pods_ct_and_what_differs_is_told() {
    let world = World::new().await;
    let id = world.running("web").await;
    world.engine.stop(&id, Duration::ZERO).await.unwrap();
    let path = world.place.conf(world.vmid(&id));
    // A restore writes the keys of the backup and its own, and makes a volume that nobody's property is on.
    let text = fs::read_to_string(&path).unwrap().replace("memory: 65", "memory: 64");
    fs::write(&path, &text).unwrap();
    fs::remove_file(world.place.dir.join(format!("owners/subvol-{FIRST}-disk-0"))).unwrap();
    assert_eq!(world.seen().await, ["CTEdited"]);
    world.engine.start(&id).await.unwrap();
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn restored_over_itself_without_our_lines_it_is_foreign_until_somebody_deletes_it() {
    let world = World::new().await;
    let id = world.running("web").await;
    world.engine.stop(&id, Duration::ZERO).await.unwrap();
    let path = world.place.conf(world.vmid(&id));
    let text = fs::read_to_string(&path).unwrap();
    let bare: String = text.lines().filter(|l| !l.starts_with("lxc.")).map(|l| format!("{l}\n")).collect();
    fs::write(&path, &bare).unwrap();
    // A restore makes a volume of its own, which nobody's property is on.
    fs::remove_file(world.place.dir.join(format!("owners/subvol-{FIRST}-disk-0"))).unwrap();
    assert_eq!(world.seen().await, ["CTForeign"]);
    for refused in [world.engine.start(&id).await.map(drop), world.engine.delete(&id).await] {
        assert!(words(&refused.unwrap_err()).contains("does not include"));
    }
    // It has the pod's address, which nobody else may get meanwhile.
    let refused = words(&world.engine.delete(&id).await.unwrap_err());
    assert!(refused.contains("the pod's address 10.10.1.7") && refused.contains("delete it"), "{refused}");
    assert_eq!(world.engine.addresses(&id).await.unwrap().unwrap(), [IpAddr::from([10, 10, 1, 7])]);
    assert_eq!(fs::read_to_string(&path).unwrap(), bare);
    let task = world.admin.ct(&world.node, number(&world, &id)).delete(Delete::default()).await.unwrap();
    ended(&world, task).await.unwrap();
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn restored_over_itself_without_our_lines_and_given_another_address_it_lets_the_pod_go() {
    let world = World::new().await;
    let id = world.running("web").await;
    world.engine.stop(&id, Duration::ZERO).await.unwrap();
    let path = world.place.conf(world.vmid(&id));
    let text = fs::read_to_string(&path).unwrap().replace("ip=10.10.1.7/", "ip=10.10.9.9/");
    let bare: String = text.lines().filter(|l| !l.starts_with("lxc.")).map(|l| format!("{l}\n")).collect();
    fs::write(&path, &bare).unwrap();
    fs::remove_file(world.place.dir.join(format!("owners/subvol-{FIRST}-disk-0"))).unwrap();
    world.engine.delete(&id).await.unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), bare);
    assert!(world.place.volume(FIRST).exists());
    assert_eq!(world.engine.list().await.unwrap(), []);
}

#[tokio::test]
async fn a_ct_of_somebody_else_that_runs_under_a_pods_old_number_is_not_taken_for_the_pods() {
    let world = World::new().await;
    let id = world.running("web").await;
    let vmid = number(&world, &id);
    let ct = world.admin.ct(&world.node, vmid);
    let options = Delete { force: true, purge: true, ..Delete::default() };
    ended(&world, ct.delete(options).await.unwrap()).await.unwrap();
    let conf = world.place.conf(vmid.get());
    let text =
        format!("arch: amd64\nhostname: new\nmemory: 64\nrootfs: local-zfs:subvol-{vmid}-disk-0,size=1G\n");
    fs::write(&conf, &text).unwrap();
    fs::write(world.place.volume(vmid.get()), "7").unwrap();
    fs::remove_file(world.place.dir.join(format!("owners/subvol-{vmid}-disk-0"))).unwrap();
    ended(&world, ct.start().await.unwrap()).await.unwrap();
    let run = world.place.state().join(format!("run/ct/pve1-{vmid}.json"));
    assert!(run.exists(), "it runs");
    assert_eq!(world.engine.state(&id).await.unwrap(), Some(SandboxState::Stopped));
    assert_eq!(world.engine.list().await.unwrap()[0].state, SandboxState::Stopped);
    assert!(matches!(world.engine.start(&id).await, Err(Error::Foreign { .. })));
    world.engine.wait(&id).await.unwrap();
    world.engine.stop(&id, Duration::ZERO).await.unwrap();
    assert_eq!(world.engine.held_by(&id).await.unwrap(), None);
    // The pod goes, and that CT runs on.
    world.engine.delete(&id).await.unwrap();
    assert!(run.exists());
    assert_eq!(fs::read_to_string(&conf).unwrap(), text);
    assert_eq!(fs::read_to_string(world.place.volume(vmid.get())).unwrap(), "7");
    world.assert_foreigners_untouched();
}

#[tokio::test]
async fn a_ct_whose_file_was_removed_while_it_runs_keeps_its_root_until_it_has_ended() {
    let world = World::new().await;
    let id = world.running("web").await;
    fs::remove_file(world.place.conf(FIRST)).unwrap();
    assert_eq!(world.seen().await, ["CTDeleted"]);
    assert!(matches!(world.engine.state(&id).await.unwrap(), Some(SandboxState::Running { .. })));
    let error = world.engine.delete(&id).await.unwrap_err();
    assert!(error.is_temporary() && words(&error).contains("lxc-stop -n 1000000"), "{}", words(&error));
    assert!(world.place.volume(FIRST).exists());
    fs::remove_file(world.place.state().join(format!("run/ct/pve1-{FIRST}.json"))).unwrap();
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn a_running_ct_whose_line_was_taken_away_is_the_pods_and_still_runs() {
    let world = World::new().await;
    let id = world.running("web").await;
    let path = world.place.conf(world.vmid(&id));
    let text = fs::read_to_string(&path).unwrap();
    let bare: String = text.lines().filter(|l| !l.starts_with("lxc.")).map(|l| format!("{l}\n")).collect();
    fs::write(&path, &bare).unwrap();
    assert!(matches!(world.engine.state(&id).await.unwrap(), Some(SandboxState::Running { .. })));
    for refused in [world.engine.stop(&id, Duration::ZERO).await, world.engine.delete(&id).await] {
        assert!(matches!(refused, Err(Error::Foreign { .. })), "{refused:?}");
    }
    fs::write(&path, &text).unwrap();
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn restored_under_another_number_while_its_pod_lives_it_does_not_start() {
    let world = World::new().await;
    let id = world.running("web").await;
    let copy = FIRST + 10;
    let text = world.conf(&id).replace(&format!("subvol-{FIRST}-"), &format!("subvol-{copy}-"));
    fs::write(world.place.conf(copy), &text).unwrap();
    fs::write(world.place.volume(copy), "7").unwrap();
    assert!(
        text.contains(&format!("include/{FIRST}-uid-of-web.conf")),
        "its line names a file that is there: {text}"
    );
    let start = world.admin.ct(&world.node, Vmid::new(copy).unwrap()).start().await.unwrap();
    let refused = words(&ended(&world, start).await.unwrap_err());
    assert!(refused.contains("CT 1000010 includes the file of CT 1000000"), "{refused}");
    assert!(!world.place.state().join(format!("run/ct/pve1-{copy}.json")).exists());
    assert_eq!(world.seen().await, ["CTForeign"]);
    // The pod's own starts with it, and again.
    world.engine.stop(&id, Duration::ZERO).await.unwrap();
    world.engine.start(&id).await.unwrap();
    world.engine.delete(&id).await.unwrap();
    assert_eq!(fs::read_to_string(world.place.conf(copy)).unwrap(), text);
    for left in [world.place.conf(copy), world.place.volume(copy)] {
        fs::remove_file(left).unwrap();
    }
    world.assert_as_before();
}

#[tokio::test]
async fn a_pod_that_is_gone_is_restored_as_a_stranger_whose_number_is_left_to_it() {
    let world = World::new().await;
    let id = world.running("web").await;
    let path = world.place.conf(FIRST);
    let text = fs::read_to_string(&path).unwrap();
    world.engine.look().await.unwrap();
    world.engine.delete(&id).await.unwrap();
    fs::write(&path, &text).unwrap();
    let seen = world.engine.look().await.unwrap();
    assert!(seen.len() == 1 && seen[0].sandbox.is_none() && seen[0].message.contains("restored"), "{seen:?}");
    let next = world.running("next").await;
    assert_ne!(world.vmid(&next), FIRST);
    world.engine.delete(&next).await.unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
    fs::remove_file(&path).unwrap();
    world.assert_as_before();
}
