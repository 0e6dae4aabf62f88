//! Living with the administrator: each thing that can be done to a pod's CT has its reaction.

use std::{fs, time::Duration};

use moxlet_ids::{SandboxId, Vmid};
use moxlet_pve::{
    api::ct::{ConfigChange, Delete, Migrate},
    api::task::Wait,
    config::LxcConfig,
};
use moxlet_sandbox::{Engine, Error, SandboxState};
use serde_json::json;

use crate::world::{FIRST, World, spec, words};

pub(crate) fn number(world: &World, id: &SandboxId) -> Vmid {
    Vmid::new(world.vmid(id)).unwrap()
}

pub(crate) async fn ended(world: &World, task: moxlet_pve::Upid) -> moxlet_pve::Result<()> {
    world.admin.wait(&task, &Wait::within(Duration::from_secs(30))).await.map(drop)
}

async fn set_lock(world: &World, id: &SandboxId, lock: Option<&str>) {
    let path = world.place.conf(world.vmid(id));
    let text: String = fs::read_to_string(&path)
        .unwrap()
        .lines()
        .filter(|l| !l.starts_with("lock:"))
        .map(|l| format!("{l}\n"))
        .collect();
    let at = text.find("memory:").unwrap();
    let lock = lock.map(|l| format!("lock: {l}\n")).unwrap_or_default();
    fs::write(&path, format!("{}{lock}{}", &text[..at], &text[at..])).unwrap();
}

#[tokio::test]
async fn stopped_by_hand_it_is_stopped_and_can_be_deleted() {
    let world = World::new().await;
    let id = world.running("web").await;
    let vmid = number(&world, &id);
    let task = world.admin.ct(&world.node, vmid).stop(false).await.unwrap();
    ended(&world, task).await.unwrap();
    world.engine.wait(&id).await.unwrap();
    assert_eq!(world.engine.state(&id).await.unwrap(), Some(SandboxState::Stopped));
    assert_eq!(world.seen().await, ["CTStopped"]);
    assert!(world.seen().await.is_empty());
    world.engine.start(&id).await.unwrap();
    assert!(world.seen().await.is_empty());
    // Stopped by us it is no news, nor where the caller ends it by its init.
    world.engine.stop(&id, Duration::ZERO).await.unwrap();
    assert!(world.seen().await.is_empty());
    world.engine.start(&id).await.unwrap();
    assert!(world.seen().await.is_empty());
    world.engine.ending(&id).await;
    assert!(world.seen().await.is_empty());
    fs::remove_file(world.place.state().join(format!("run/ct/pve1-{vmid}.json"))).unwrap();
    assert!(world.seen().await.is_empty());
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn what_was_told_is_not_told_again_by_an_agent_that_starts_again() {
    let world = World::new().await;
    let id = world.running("web").await;
    set_lock(&world, &id, Some("backup")).await;
    let resources = world.place.etc_pve().join("ha/resources.cfg");
    fs::write(&resources, format!("ct: {FIRST}\n\tstate started\n")).unwrap();
    assert_eq!(world.seen().await, ["CTLocked", "CTUnderHA"]);
    // Whoever looks again has told it.
    assert!(world.seen().await.is_empty());
    let again = || world.place.engine(&world.sim.hosts()[0].url, FIRST + 99, &world.calls);
    let of_pods = async |engine: &moxlet_sandbox::pve::PveEngine| -> Vec<&'static str> {
        let seen = engine.look().await.unwrap();
        seen.into_iter().filter(|o| o.sandbox.is_some()).map(|o| o.reason).collect()
    };
    assert!(of_pods(&again()).await.is_empty());
    // What happened while no agent was there is told.
    set_lock(&world, &id, None).await;
    fs::remove_file(&resources).unwrap();
    fs::remove_file(world.place.state().join(format!("run/ct/pve1-{FIRST}.json"))).unwrap();
    let engine = again();
    assert_eq!(of_pods(&engine).await, ["CTStopped", "CTUnlocked", "CTNotUnderHA"]);
    assert!(of_pods(&engine).await.is_empty() && of_pods(&again()).await.is_empty());
    engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn what_was_seen_just_before_a_kill_is_found_again_as_the_same_and_then_no_more() {
    let world = World::new().await;
    let id = world.running("web").await;
    world.seen().await;
    let conf = world.place.conf(world.vmid(&id));
    fs::write(&conf, world.conf(&id).replace("memory: 65", "memory: 300")).unwrap();
    let again = || world.place.engine(&world.sim.hosts()[0].url, FIRST + 99, &world.calls);
    let of_pods = async |engine: &moxlet_sandbox::pve::PveEngine| -> Vec<moxlet_sandbox::Observation> {
        let seen = engine.look().await.unwrap();
        seen.into_iter().filter(|o| o.sandbox.is_some()).collect()
    };
    // Killed before anybody was told.
    let seen = of_pods(&world.engine).await;
    assert_eq!(seen.iter().map(|o| o.reason).collect::<Vec<_>>(), ["CTEdited"]);
    set_lock(&world, &id, Some("backup")).await;
    let engine = again();
    let both = of_pods(&engine).await;
    assert_eq!(both[..1], seen, "the same, its time included");
    assert_eq!(both[1..].iter().map(|o| o.reason).collect::<Vec<_>>(), ["CTLocked"]);
    assert!(both[1].at_ns > both[0].at_ns);
    assert!(of_pods(&engine).await.is_empty() && of_pods(&again()).await.is_empty());
    set_lock(&world, &id, None).await;
    engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn a_ct_that_cannot_be_looked_at_holds_up_no_other() {
    let world = World::new().await;
    let (broken, busy, fine) = (world.running("a").await, world.running("b").await, world.running("c").await);
    for id in [&broken, &busy, &fine] {
        let conf = world.place.conf(world.vmid(id));
        fs::write(&conf, world.conf(id).replace("memory: 65", "memory: 300")).unwrap();
    }
    let (conf, kept) = (world.place.conf(world.vmid(&broken)), world.place.dir.join("kept"));
    fs::rename(&conf, &kept).unwrap();
    fs::create_dir(&conf).unwrap();
    let lock = format!("/locks/{}", world.vmid(&busy));
    world.control("PUT", &lock, json!({"held": true})).await;
    let told = async || -> Vec<_> {
        let seen = world.engine.look().await.unwrap();
        seen.into_iter().map(|o| (o.reason, o.sandbox.unwrap())).collect()
    };
    let foreign = world.place.engine_dir().join("ct/damaged.json");
    fs::write(&foreign, "{").unwrap();
    assert_eq!(told().await, [("CTEdited", fine.clone())]);
    assert!(told().await.is_empty());
    fs::remove_file(&foreign).unwrap();
    world.control("PUT", &lock, json!({"held": false})).await;
    assert_eq!(told().await, [("CTEdited", busy.clone())]);
    fs::remove_dir(&conf).unwrap();
    fs::rename(&kept, &conf).unwrap();
    assert_eq!(told().await, [("CTEdited", broken.clone())]);
    for id in [&broken, &busy, &fine] {
        world.engine.delete(id).await.unwrap();
    }
    world.assert_as_before();
}

#[tokio::test]
async fn deleted_by_hand_it_is_gone_and_leaves_nothing() {
    let world = World::new().await;
    let id = world.running("web").await;
    let options = Delete { force: true, purge: true, ..Delete::default() };
    let task = world.admin.ct(&world.node, number(&world, &id)).delete(options).await.unwrap();
    ended(&world, task).await.unwrap();
    assert_eq!(world.seen().await, ["CTDeleted"]);
    assert!(world.seen().await.is_empty());
    assert_eq!(world.engine.state(&id).await.unwrap(), None);
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn while_the_clusters_file_system_is_away_no_ct_counts_as_deleted_and_nothing_is_removed() {
    let world = World::new().await;
    let (running, stopped) = (world.running("web").await, world.running("db").await);
    world.engine.stop(&stopped, Duration::ZERO).await.unwrap();
    world.engine.look().await.unwrap();
    let with_both = world.place.snapshot();
    let (here, away) = (world.place.etc_pve(), world.place.dir.join("away"));
    fs::rename(&here, &away).unwrap();
    // As an unmounted /etc/pve is: nothing, or the empty directory below it.
    for empty in [false, true] {
        if empty {
            fs::create_dir(&here).unwrap();
        }
        let told: &[&str] = if empty { &[] } else { &["ClusterLost", "ClusterLost"] };
        assert_eq!(world.seen().await, told);
        assert!(matches!(world.engine.state(&running).await.unwrap(), Some(SandboxState::Running { .. })));
        assert_eq!(world.engine.state(&stopped).await.unwrap(), Some(SandboxState::Stopped));
        let late = spec("late");
        for refused in [
            world.engine.delete(&running).await,
            world.engine.delete(&stopped).await,
            world.engine.start(&stopped).await.map(drop),
            world.engine.create(&late).await,
        ] {
            let error = refused.unwrap_err();
            assert!(error.is_temporary() && words(&error).contains("pve-cluster"), "{}", words(&error));
        }
        assert_eq!(world.engine.list().await.unwrap().len(), 2);
        for (path, bytes) in with_both.iter().filter(|(path, _)| !path.starts_with(world.place.engine_dir()))
        {
            assert_eq!(fs::read(path).ok().as_ref(), Some(bytes), "{}", path.display());
        }
    }
    fs::remove_dir(&here).unwrap();
    fs::rename(&away, &here).unwrap();
    assert_eq!(world.seen().await, ["ClusterBack", "ClusterBack"]);
    world.engine.start(&stopped).await.unwrap();
    for id in [&running, &stopped] {
        world.engine.delete(id).await.unwrap();
    }
    world.assert_as_before();
}

#[tokio::test]
async fn deleted_by_hand_and_its_number_used_again_the_new_one_is_left_alone() {
    let world = World::new().await;
    let id = world.running("web").await;
    let vmid = number(&world, &id);
    let options = Delete { force: true, purge: true, ..Delete::default() };
    let task = world.admin.ct(&world.node, vmid).delete(options).await.unwrap();
    ended(&world, task).await.unwrap();
    let conf = world.place.conf(vmid.get());
    let text =
        format!("arch: amd64\nhostname: new\nmemory: 64\nrootfs: local-zfs:subvol-{vmid}-disk-0,size=1G\n");
    fs::write(&conf, &text).unwrap();
    fs::write(world.place.volume(vmid.get()), "7").unwrap();
    fs::remove_file(world.place.dir.join(format!("owners/subvol-{vmid}-disk-0"))).unwrap();
    assert_eq!(world.seen().await, ["CTForeign"]);
    assert!(world.engine.start(&id).await.is_err());
    world.engine.delete(&id).await.unwrap();
    assert_eq!(fs::read_to_string(&conf).unwrap(), text);
    assert_eq!(fs::read_to_string(world.place.volume(vmid.get())).unwrap(), "7");
    world.assert_foreigners_untouched();
}

#[tokio::test]
async fn an_edit_is_accepted_and_told_once_also_after_a_restart() {
    let world = World::new().await;
    let id = world.running("web").await;
    let set = LxcConfig { memory: Some(300), ..LxcConfig::default() };
    let change = ConfigChange { set, ..ConfigChange::default() };
    world.admin.ct(&world.node, number(&world, &id)).set_config(&change).await.unwrap();
    // Noticed also by an agent that was away meanwhile.
    let again = world.place.engine(&world.sim.hosts()[0].url, crate::world::FIRST + 99, &world.calls);
    let seen = again.look().await.unwrap();
    let own: Vec<_> = seen.iter().filter(|o| o.sandbox.as_ref() == Some(&id)).collect();
    assert_eq!(own.len(), 1);
    assert!(own[0].reason == "CTEdited" && own[0].message.contains("memory 65 to 300"), "{own:?}");
    assert!(again.look().await.unwrap().is_empty());
    assert!(world.conf(&id).contains("memory: 300"));
    again.stop(&id, Duration::ZERO).await.unwrap();
    again.start(&id).await.unwrap();
    again.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn renamed_it_stays_renamed() {
    let world = World::new().await;
    let id = world.running("web").await;
    let set =
        LxcConfig { hostname: Some("mine".into()), tags: vec!["x".parse().unwrap()], ..LxcConfig::default() };
    let change = ConfigChange { set, ..ConfigChange::default() };
    world.admin.ct(&world.node, number(&world, &id)).set_config(&change).await.unwrap();
    assert!(world.seen().await.contains(&"CTRelabelled"));
    assert!(world.seen().await.is_empty());
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn another_address_is_told_and_no_other_pod_gets_it() {
    let world = World::new().await;
    let id = world.running("web").await;
    let late = spec("late");
    let Some(moxlet_sandbox::NicAddress::Static { address, .. }) = late.nics[0].ipv4 else {
        panic!("{:?}", late.nics)
    };
    let text = world.conf(&id).replace("ip=10.10.1.7/16", &format!("ip={address}/16"));
    fs::write(world.place.conf(FIRST), text).unwrap();
    let seen = world.engine.look().await.unwrap();
    assert_eq!(seen.iter().map(|o| o.reason).collect::<Vec<_>>(), ["CTEdited", "CTReaddressed"]);
    assert!(seen[1].message.contains("10.10.1.7") && seen[1].message.contains("replace the pod"), "{seen:?}");
    assert!(world.seen().await.is_empty());
    let error = world.engine.create(&late).await.unwrap_err();
    assert!(error.is_temporary(), "{error:?}");
    assert!(words(&error).contains(&format!("the address {address} is in the configuration of CT 1000000")));
    world.engine.delete(&late.id).await.unwrap();
    world.engine.delete(&id).await.unwrap();
    world.engine.create(&late).await.unwrap();
    world.engine.delete(&late.id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn a_number_that_the_cluster_has_rules_for_is_given_to_no_pod() {
    let world = World::new().await;
    let etc = world.place.etc_pve();
    let users = fs::read_to_string(etc.join("user.cfg")).unwrap();
    let acl = format!("{users}acl:1:/vms/{}:somebody@pve:PVEVMUser:\n", FIRST + 4);
    for (file, text) in [
        ("ha/resources.cfg", format!("ct: {FIRST}\n\tstate started\n")),
        (&format!("firewall/{}.fw", FIRST + 5), "[OPTIONS]\nenable: 1\n".to_owned()),
        ("user.cfg", acl),
    ] {
        fs::write(etc.join(file), text).unwrap();
    }
    // Of those between two are foreign CTs' and one is a foreign dataset's.
    let id = world.running("web").await;
    assert_eq!(world.vmid(&id), FIRST + 6);
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn a_write_of_ours_that_failed_or_was_cut_off_looks_like_nobodys_edit() {
    let world = World::new().await;
    let id = world.running("web").await;
    let record = world.place.engine_dir().join(format!("ct/{id}.json"));
    let at_first = (fs::read_to_string(&record).unwrap(), world.conf(&id));
    world.engine.describe(&id, &["main".into()]).await.unwrap();
    let described = world.conf(&id);
    // Before the write and after it: killed between the record that says what is to be written and the one that it was.
    let mut cut: serde_json::Value = serde_json::from_str(&at_first.0).unwrap();
    let after: serde_json::Value = serde_json::from_str(&fs::read_to_string(&record).unwrap()).unwrap();
    cut["next"] = json!({"known": after["known"], "notes": after["notes"]});
    for conf in [&at_first.1, &described] {
        fs::write(&record, cut.to_string()).unwrap();
        fs::write(world.place.conf(FIRST), conf).unwrap();
        assert!(world.seen().await.is_empty());
        world.engine.describe(&id, &["main".into(), "side".into()]).await.unwrap();
        assert!(world.conf(&id).contains("`side`"), "{}", world.conf(&id));
        assert!(world.seen().await.is_empty());
    }
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn locked_by_a_backup_it_is_neither_stopped_nor_deleted_until_that_is_over() {
    let world = World::new().await;
    let id = world.running("web").await;
    set_lock(&world, &id, Some("backup")).await;
    assert_eq!(world.engine.held_by(&id).await.unwrap().as_deref(), Some("backup"));
    assert_eq!(world.seen().await, ["CTLocked"]);
    world.calls.take();
    for refused in [world.engine.delete(&id).await, world.engine.stop(&id, Duration::ZERO).await] {
        let refused = refused.unwrap_err();
        assert!(matches!(&refused, Error::Locked { lock, .. } if lock == "backup") && refused.is_temporary());
    }
    assert!(world.calls.take().is_empty());
    set_lock(&world, &id, None).await;
    assert_eq!(world.seen().await, ["CTUnlocked"]);
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn frozen_it_waits() {
    let world = World::new().await;
    let id = world.running("web").await;
    let run = world.place.state().join(format!("run/ct/pve1-{}.json", world.vmid(&id)));
    let text = fs::read_to_string(&run).unwrap();
    fs::write(&run, text.replace("\"frozen\":false", "\"frozen\":true")).unwrap();
    assert_eq!(world.seen().await, ["CTFrozen"]);
    assert_eq!(world.engine.held_by(&id).await.unwrap().as_deref(), Some("frozen"));
    assert!(matches!(world.engine.delete(&id).await, Err(Error::Locked { .. })));
    fs::write(&run, text).unwrap();
    assert_eq!(world.seen().await, ["CTThawed"]);
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn migration_snapshot_and_clone_are_refused_by_proxmox_ve_itself() {
    let world = World::new().await;
    let id = world.running("web").await;
    let vmid = number(&world, &id);
    let before = world.conf(&id);
    let to = Migrate { target: "pve2".parse().unwrap(), restart: true, timeout: None, target_storage: None };
    let refused = match world.admin.ct(&world.node, vmid).migrate(&to).await {
        Ok(task) => ended(&world, task).await.unwrap_err(),
        Err(error) => error,
    };
    assert!(refused.to_string().contains("bind"), "{refused}");
    assert_eq!(world.conf(&id), before);
    assert!(matches!(world.engine.state(&id).await.unwrap(), Some(SandboxState::Running { .. })));
}

#[tokio::test]
async fn on_another_host_it_is_reported_and_left_there() {
    let world = World::new().await;
    let id = world.running("web").await;
    world.engine.stop(&id, Duration::ZERO).await.unwrap();
    let here = world.place.conf(world.vmid(&id));
    let there = here.to_string_lossy().replace("/pve1/", "/pve2/");
    fs::rename(&here, &there).unwrap();
    assert_eq!(world.seen().await, ["CTMigrated"]);
    for refused in [world.engine.start(&id).await.map(drop), world.engine.delete(&id).await] {
        assert!(matches!(refused, Err(Error::Moved { node, .. }) if node == "pve2"));
    }
    fs::rename(&there, &here).unwrap();
    assert_eq!(world.seen().await, ["CTBack"]);
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn under_ha_it_is_reported_and_not_started_by_us() {
    let world = World::new().await;
    let id = world.running("web").await;
    let resources = world.place.etc_pve().join("ha/resources.cfg");
    fs::create_dir_all(resources.parent().unwrap()).unwrap();
    fs::write(&resources, format!("ct: {}\n\tstate started\n", world.vmid(&id))).unwrap();
    assert_eq!(world.seen().await, ["CTUnderHA"]);
    fs::remove_file(world.place.state().join(format!("run/ct/pve1-{}.json", world.vmid(&id)))).unwrap();
    let error = world.engine.start(&id).await.unwrap_err().to_string();
    assert!(error.contains("HA"), "{error}");
    // Deleted it leaves HA, too.
    world.engine.delete(&id).await.unwrap();
    assert!(!fs::read_to_string(&resources).unwrap_or_default().contains("ct:"));
    fs::remove_file(&resources).unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn a_removal_that_ended_at_lock_destroyed_is_finished() {
    let world = World::new().await;
    let id = world.running("web").await;
    world.control("PUT", "/locks/user.cfg", json!({"held": true})).await;
    world.engine.delete(&id).await.unwrap();
    assert!(!world.place.conf(crate::world::FIRST).exists());
    world.control("PUT", "/locks/user.cfg", json!({"held": false})).await;
    world.assert_as_before();
}

#[tokio::test]
async fn a_copy_of_a_pods_ct_is_reported_once_and_left_alone() {
    let world = World::new().await;
    let seen = world.engine.look().await.unwrap();
    assert_eq!(
        seen.iter().map(|o| (o.reason, o.sandbox.is_none())).collect::<Vec<_>>(),
        [("CTForeign", true)]
    );
    assert!(seen[0].message.contains("1000002"), "{}", seen[0].message);
    assert!(world.seen().await.is_empty());
    world.assert_as_before();
}

#[tokio::test]
async fn without_quorum_nothing_is_made_and_nothing_is_lost() {
    let world = World::new().await;
    let id = world.running("web").await;
    world.control("PUT", "/quorum", json!({"quorate": false})).await;
    let pod = spec("late");
    let error = world.engine.create(&pod).await.unwrap_err();
    assert!(error.is_temporary() && matches!(error, Error::NoQuorum { .. }), "{error}");
    assert!(matches!(world.engine.state(&id).await.unwrap(), Some(SandboxState::Running { .. })));
    let error = world.engine.delete(&id).await.unwrap_err();
    assert!(error.is_temporary(), "{error:?}");
    world.no_faults().await;
    world.engine.delete(&pod.id).await.unwrap();
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn a_removal_by_hand_that_ended_at_lock_destroyed_is_finished_with_the_pod() {
    let world = World::new().await;
    let id = world.running("web").await;
    world.control("PUT", "/locks/user.cfg", json!({"held": true})).await;
    let options = Delete { force: true, purge: true, ..Delete::default() };
    let task = world.admin.ct(&world.node, number(&world, &id)).delete(options).await.unwrap();
    ended(&world, task).await.unwrap_err();
    world.control("PUT", "/locks/user.cfg", json!({"held": false})).await;
    assert!(world.conf(&id).starts_with("lock: destroyed"));
    let seen = world.engine.look().await.unwrap();
    assert!(seen[0].reason == "CTDeleted" && seen[0].message.contains("lock: destroyed"), "{seen:?}");
    assert_eq!(world.engine.state(&id).await.unwrap(), Some(SandboxState::Stopped));
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn a_snapshot_is_refused_and_one_that_is_there_all_the_same_goes_with_the_pod() {
    let world = World::new().await;
    let id = world.running("web").await;
    let ct = world.admin.ct(&world.node, number(&world, &id));
    let refused = match ct.create_snapshot(&"before".parse().unwrap(), None).await {
        Ok(task) => ended(&world, task).await.unwrap_err(),
        Err(error) => error,
    };
    assert!(words(&refused).contains("snapshot feature is not available"), "{refused}");
    let path = world.place.conf(world.vmid(&id));
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{text}\n[before]\nhostname: web\nmemory: 65\nsnaptime: 1700000000\n")).unwrap();
    assert_eq!(world.seen().await, ["CTSnapshot"]);
    assert!(world.seen().await.is_empty());
    world.engine.delete(&id).await.unwrap();
    world.assert_as_before();
}

#[tokio::test]
async fn a_host_that_goes_down_stops_each_ct_in_its_time_and_after_the_boot_they_start_again() {
    let world = World::new().await;
    let ids = [world.running("a").await, world.running("b").await];
    for id in &ids {
        assert!(world.conf(id).contains("startup: down=40"), "the pod's grace and ten seconds");
    }
    world.place.call(&world.sim.hosts()[0].url, "POST", "/nodes/pve1/stopall").await;
    for id in &ids {
        world.engine.wait(id).await.unwrap();
        assert_eq!(world.engine.state(id).await.unwrap(), Some(SandboxState::Stopped));
    }
    // The agent that starts after the boot tells why the pods ended.
    let again = world.place.engine(&world.sim.hosts()[0].url, FIRST + 99, &world.calls);
    let seen = again.look().await.unwrap();
    let stopped: Vec<_> = seen.iter().filter(|o| o.reason == "CTStopped").collect();
    assert!(stopped.len() == 2 && stopped[0].message.contains("the host went down"), "{seen:?}");
    for id in &ids {
        again.start(id).await.unwrap();
        again.delete(id).await.unwrap();
    }
    world.assert_as_before();
}
