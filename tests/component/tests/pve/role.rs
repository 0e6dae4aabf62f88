//! The role that `docs/proxmox.md` tells an administrator to make is what the calls of an agent want: with it a pod's CT has its
//! whole life, and without any one privilege of it the agent says which, where, and how to grant it.

use std::{fs, path::Path, time::Duration};

use moxlet_sandbox::{
    Engine,
    pve::{PveConfig, PveEngine, Requirements},
};
use moxlet_tests_component::repository;

use crate::world::{FIRST, World, spec, words};

/// What is granted to the user and to the token: path and privileges.
type Grants = Vec<(String, Vec<String>)>;

/// What the documentation grants, with or without a pool.
fn documented(pool: bool) -> Grants {
    let text = fs::read_to_string(repository().join("docs/proxmox.md")).unwrap();
    let (_, text) = text.split_once("### A role and a token").unwrap();
    let (text, _) = text.split_once("\n###").unwrap();
    let roles = text.lines().filter_map(|line| {
        let (role, privileges) = line.strip_prefix("pveum role add ")?.split_once(" --privs \"")?;
        let privileges: Vec<String> =
            privileges.trim_end_matches('"').split(' ').map(str::to_owned).collect();
        Some((role, privileges))
    });
    let roles: std::collections::BTreeMap<_, _> = roles.collect();
    let grants = text.lines().filter_map(|line| {
        let (path, rest) = line.strip_prefix("pveum acl modify ")?.split_once(' ')?;
        let role = rest.strip_prefix("--users moxlet@pve --tokens 'moxlet@pve!node' --roles ").unwrap();
        Some((path.to_owned(), roles[role].clone()))
    });
    let grants: Grants = grants.filter(|(path, _)| pool || !path.starts_with("/pool/")).collect();
    assert_eq!(grants.len(), if pool { 3 } else { 2 }, "{grants:?}");
    grants
}

/// The same without a privilege of a path.
fn without(grants: &Grants, path: &str, privilege: &str) -> Grants {
    let mut grants = grants.clone();
    for (at, privileges) in &mut grants {
        privileges.retain(|p| at != path || p != privilege);
    }
    grants
}

/// Lets the user and its token, with privilege separation, do this and nothing else; there is a pool, `pods`.
fn grant(world: &World, grants: &Grants, more: &str) {
    let mut text = "user:moxlet@pve:1:0:::::\ntoken:moxlet@pve!sim:0:1::\npool:pods::::\n".to_owned();
    for (number, (path, privileges)) in grants.iter().enumerate() {
        text.push_str(&format!("role:R{number}:{}:\n", privileges.join(",")));
        text.push_str(&format!("acl:1:{path}:moxlet@pve,moxlet@pve!sim:R{number}:\n"));
    }
    text.push_str(more);
    fs::write(world.place.state().join("etc/pve/user.cfg"), text).unwrap();
}

/// What an agent asks for at its start, with or without a pool.
fn required(world: &World, net: &Path, pool: bool) -> Requirements {
    Requirements { cts_pool: pool.then(|| "pods".parse().unwrap()), ..crate::away::required(world, net) }
}

fn engine(world: &World, pool: bool) -> PveEngine {
    let pool = pool.then(|| "pods".parse().unwrap());
    let config = PveConfig { pool, ..world.place.pve_config(FIRST + 99) };
    world.place.engine_of(config, world.place.client(&world.sim.hosts()[0].url, &world.calls))
}

/// All that an agent does to a pod's CT with calls.
async fn live(engine: &PveEngine) -> moxlet_sandbox::Result<()> {
    let pod = spec("web");
    engine.create(&pod).await?;
    engine.start(&pod.id).await?;
    engine.stop(&pod.id, Duration::from_secs(1)).await?;
    engine.start(&pod.id).await?;
    engine.stop(&pod.id, Duration::ZERO).await?;
    engine.delete(&pod.id).await
}

#[tokio::test]
async fn with_the_documented_role_the_agent_starts_and_a_pod_has_its_whole_life() {
    for pool in [false, true] {
        let world = World::new().await;
        let net = tempfile::tempdir().unwrap();
        grant(&world, &documented(pool), "");
        let checked = required(&world, net.path(), pool).check(false).await.unwrap();
        assert!(checked.away.is_none(), "{checked:?}");
        live(&engine(&world, pool)).await.unwrap();
        assert_eq!(world.calls.take().contains(&"PUT /pools".to_owned()), pool);
        world.assert_as_before();
    }
}

#[tokio::test]
async fn each_privilege_of_the_documented_role_is_asked_for_with_its_path_and_the_commands_that_grant_it() {
    let world = World::new().await;
    let net = tempfile::tempdir().unwrap();
    let needed = [
        ("/vms", "VM.Allocate"),
        ("/vms", "VM.PowerMgmt"),
        ("/storage/local-zfs", "Datastore.Audit"),
        ("/pool/pods", "Pool.Allocate"),
        ("/pool/pods", "Pool.Audit"),
    ];
    for pool in [false, true] {
        let all = documented(pool);
        let mut named: Vec<&str> = all.iter().flat_map(|(_, all)| all).map(String::as_str).collect();
        named.sort_unstable();
        named.dedup();
        let needed = needed.iter().filter(|(path, _)| pool || !path.starts_with("/pool"));
        let mut asked: Vec<&str> = needed.clone().map(|(_, privilege)| *privilege).collect();
        asked.sort_unstable();
        assert_eq!(named, asked, "the role has more or less than is asked for");
        for (path, privilege) in needed {
            grant(&world, &without(&all, path, privilege), "");
            let error = required(&world, net.path(), pool).check(false).await.unwrap_err().to_string();
            for words in [
                format!("the token moxlet@pve!sim lacks {privilege} on {path}, needed to "),
                format!("pveum role add Moxlet-{privilege} --privs {privilege}; "),
                format!("pveum acl modify {path} --users moxlet@pve --roles Moxlet-{privilege}; "),
                format!("pveum acl modify {path} --tokens 'moxlet@pve!sim' --roles Moxlet-{privilege}"),
            ] {
                assert!(error.contains(&words), "{words:?} is missing in: {error}");
            }
            assert_eq!(error.matches(" lacks ").count(), 1, "{error}");
        }
    }
}

#[tokio::test]
async fn a_call_that_is_refused_for_a_privilege_says_which_where_and_how_to_grant_it() {
    for (pool, path, privilege, at) in [
        (false, "/vms", "VM.PowerMgmt", "/vms/1000000"),
        (false, "/vms", "VM.Allocate", "/vms/1000000"),
        (true, "/vms", "VM.Allocate", "/vms/1000000"),
        (true, "/pool/pods", "Pool.Allocate", "/pool/pods"),
    ] {
        let world = World::new().await;
        grant(&world, &without(&documented(pool), path, privilege), "");
        let text = words(&live(&engine(&world, pool)).await.unwrap_err());
        for words in [
            format!("({at}, {privilege})"),
            format!("pveum role add only-{privilege} --privs {privilege}"),
            format!("pveum acl modify {at} --users moxlet@pve"),
        ] {
            assert!(text.contains(&words), "{words:?} is missing in: {text}");
        }
    }
}

#[tokio::test]
async fn privileges_on_some_guests_or_not_passed_down_are_none_for_those_to_come() {
    let world = World::new().await;
    let net = tempfile::tempdir().unwrap();
    let all = documented(false);
    let (cts, storage): (Grants, Grants) = all.iter().cloned().partition(|(path, _)| path == "/vms");
    let role = format!("role:Cts:{}:\n", cts[0].1.join(","));
    let who = "moxlet@pve,moxlet@pve!sim:Cts:\n";
    for more in [
        format!("acl:1:/vms/{FIRST}:{who}"),
        format!("pool:theirs::{FIRST}::\nacl:1:/pool/theirs:{who}"),
        format!("acl:0:/vms:{who}"),
    ] {
        grant(&world, &storage, &format!("{role}{more}"));
        let error = required(&world, net.path(), false).check(false).await.unwrap_err().to_string();
        let lacks = ["lacks VM.PowerMgmt on /vms", "lacks VM.Allocate on /vms"];
        assert!(lacks.iter().all(|words| error.contains(words)), "{more}: {error}");
    }
    // Where the pods' own pool gives them, they are there once a CT is in it.
    let granted = without(&documented(true), "/vms", "VM.PowerMgmt");
    grant(
        &world,
        &granted,
        &format!("role:Power:VM.PowerMgmt:\nacl:1:/pool/pods:{}", who.replace("Cts", "Power")),
    );
    required(&world, net.path(), true).check(false).await.unwrap();
    live(&engine(&world, true)).await.unwrap();
    world.assert_as_before();
}
