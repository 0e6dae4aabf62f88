//! An agent that starts while Proxmox VE cannot be asked: what runs is taken over, what is new waits.

use std::{fs, path::Path};

use moxlet_ids::Vmid;
use moxlet_sandbox::{
    Engine, SandboxState,
    pve::{Requirements, VmidRange},
};
use serde_json::json;

use crate::world::{Calls, FIRST, World, spec};

/// What an agent on the first host asks for at its start, with a bridge that is shown below this directory.
pub(crate) fn required(world: &World, net: &Path) -> Requirements {
    fs::create_dir_all(net.join("vmbr0/bridge")).unwrap();
    Requirements {
        client: world.place.client(&world.sim.hosts()[0].url, &Calls::default()),
        node: world.node.clone(),
        storage: "local-zfs".parse().unwrap(),
        bridges: vec!["vmbr0".into()],
        mtu: None,
        range: VmidRange::new(Vmid::new(FIRST).unwrap(), Vmid::new(FIRST + 99).unwrap()).unwrap(),
        cts_pool: None,
        config_dir: world.place.etc_pve(),
        net_dir: net.to_owned(),
    }
}

#[tokio::test]
async fn running_pods_are_taken_over_and_new_ones_wait_until_the_api_is_back() {
    let world = World::new().await;
    let id = world.running("web").await;
    let net = tempfile::tempdir().unwrap();
    for (fault, words) in [
        (json!({"do": "drop"}), "unreachable"),
        (
            json!({"do": "error", "code": 401, "message": "invalid token value!"}),
            "does not accept the API token",
        ),
        (json!({"do": "error", "code": 596, "message": "Connection refused"}), "unreachable"),
    ] {
        world.fault("calls", fault).await;
        let required = required(&world, net.path());
        let checked = required.check(false).await.unwrap();
        assert_eq!(checked.place.dataset, "rpool/data");
        let url = &world.sim.hosts()[0].url;
        let engine = world.place.engine(url, FIRST + 99, &Calls::default());
        engine.unchecked(required, &checked.away.unwrap());
        assert!(matches!(engine.state(&id).await.unwrap(), Some(SandboxState::Running { .. })));
        assert!(engine.fault().unwrap().contains(words), "{:?}", engine.fault());
        engine.check().await.unwrap_err();
        assert!(engine.fault().unwrap().contains(words));
        world.no_faults().await;
        engine.check().await.unwrap();
        assert_eq!(engine.fault(), None);
        let late = spec("late");
        engine.create(&late).await.unwrap();
        engine.start(&late.id).await.unwrap();
        engine.delete(&late.id).await.unwrap();
    }
    assert!(world.sim.hosts().len() > 1);
    world.assert_foreigners_untouched();
}

#[tokio::test]
async fn what_an_api_that_is_back_lacks_is_said_in_place_of_that_it_was_away() {
    let world = World::new().await;
    let net = tempfile::tempdir().unwrap();
    world.fault("calls", json!({"do": "drop"})).await;
    let required = required(&world, net.path());
    let away = required.check(true).await.unwrap().away.unwrap();
    world.engine.unchecked(required, &away);
    world.no_faults().await;
    world.place.change("user.cfg", ":Administrator:", ":PVEAuditor:");
    world.engine.check().await.unwrap_err();
    assert!(world.engine.fault().unwrap().contains("lacks VM.PowerMgmt on /vms"));
    world.place.change("user.cfg", ":PVEAuditor:", ":Administrator:");
    world.engine.check().await.unwrap();
    assert_eq!(world.engine.fault(), None);
}

#[tokio::test]
async fn what_the_host_itself_lacks_is_fatal_with_the_api_away_too() {
    let world = World::new().await;
    let net = tempfile::tempdir().unwrap();
    world.fault("calls", json!({"do": "drop"})).await;
    let mut required = required(&world, net.path());
    required.bridges = vec!["vmbr7".into()];
    let error = required.check(false).await.unwrap_err().to_string();
    assert!(error.contains("there is no bridge vmbr7") && error.contains("unreachable"), "{error}");
}

#[tokio::test]
async fn running_pods_are_taken_over_where_a_bridge_or_a_privilege_is_missing() {
    let world = World::new().await;
    let id = world.running("web").await;
    let net = tempfile::tempdir().unwrap();
    world.place.change("user.cfg", ":Administrator:", ":PVEAuditor:");
    let mut required = required(&world, net.path());
    required.bridges = vec!["vmbr0".into(), "vmbr7".into()];
    let error = required.check(false).await.unwrap_err().to_string();
    assert!(error.contains("no bridge vmbr7") && error.contains("lacks VM.PowerMgmt on /vms"), "{error}");
    let away = required.check(true).await.unwrap().away.unwrap();
    world.engine.unchecked(required, &away);
    assert!(matches!(world.engine.state(&id).await.unwrap(), Some(SandboxState::Running { .. })));
    let fault = world.engine.fault().unwrap();
    assert!(fault.contains("no bridge vmbr7") && fault.contains("lacks VM.PowerMgmt on /vms"), "{fault}");
    world.place.change("user.cfg", ":PVEAuditor:", ":Administrator:");
    world.engine.check().await.unwrap_err();
    assert!(!world.engine.fault().unwrap().contains("VM.PowerMgmt"));
    fs::create_dir_all(net.path().join("vmbr7/bridge")).unwrap();
    world.engine.check().await.unwrap();
    assert_eq!(world.engine.fault(), None);
}
