//! What keeps an agent from starting on a host of Proxmox VE, as the program says it at its end: each lack with what to do about
//! it. An API that cannot be asked keeps no agent from its running pods: that is said, and the start goes on.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use moxlet_tests_component::{init_binary, program};
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Command,
};

use crate::world::{FIRST, SECRET, World};

/// A bridge of its own, for as long as it lives.
struct Bridge(String);

impl Bridge {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("mxs{}n{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let made = std::process::Command::new("ip").args(["link", "add", &name, "type", "bridge"]).status();
        assert!(made.unwrap().success());
        Self(name)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = std::process::Command::new("ip").args(["link", "delete", &self.0]).status();
    }
}

/// What the section `[pve]` says beside the addresses: key and value as TOML.
fn settings(world: &World, bridge: &Bridge) -> Vec<(&'static str, String)> {
    let token = world.place.dir.join("token");
    fs::write(&token, format!("moxlet@pve!sim={SECRET}\n")).unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
    let ca = world.place.state().join("tls/pve-root-ca.pem");
    vec![
        ("endpoints", format!("[{:?}]", world.sim.hosts()[0].url)),
        ("token_file", format!("{token:?}")),
        ("ca_file", format!("{ca:?}")),
        ("node", "\"pve1\"".to_owned()),
        ("storage", "\"local-zfs\"".to_owned()),
        ("bridge", format!("{:?}", bridge.0)),
        ("vmid_min", FIRST.to_string()),
        ("vmid_max", (FIRST + 99).to_string()),
        ("config_dir", format!("{:?}", world.place.etc_pve())),
        ("lock_dir", format!("{:?}", world.place.state().join("run/lock/lxc"))),
    ]
}

/// `moxlet agent` with these keys changed, and where it is.
struct Started {
    command: Command,
    root: tempfile::TempDir,
    _bridge: Bridge,
}

impl Drop for Started {
    fn drop(&mut self) {
        // The agent's directory of pods is a mount from then on that there is one.
        let _ = rustix::mount::unmount(self.root.path().join("r/pods"), rustix::mount::UnmountFlags::DETACH);
    }
}

async fn agent(world: &World, changed: &[(&'static str, &str)]) -> Started {
    agent_with(world, "", changed).await
}

/// The same with more keys before the section `[pve]`.
async fn agent_with(world: &World, more: &str, changed: &[(&'static str, &str)]) -> Started {
    let (moxlet, init) = tokio::task::spawn_blocking(|| (program(), init_binary())).await.unwrap();
    let root = tempfile::Builder::new().prefix("moxlet-start-").tempdir().unwrap();
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o711)).unwrap();
    let bridge = Bridge::new();
    let mut keys = settings(world, &bridge);
    keys.retain(|(key, _)| changed.iter().all(|(other, _)| key != other));
    let changed = changed.iter().map(|(key, value)| (*key, (*value).to_owned()));
    let pve: String = keys.into_iter().chain(changed).map(|(k, v)| format!("{k} = {v}\n")).collect();
    let file = root.path().join("moxlet.toml");
    let addresses = "address_first = \"10.10.1.1\"\naddress_last = \"10.10.1.9\"\naddress_prefix = 16\n";
    let text = format!(
        "root_dir = {:?}\nengine = \"pve\"\ninit_binary = {init:?}\n{more}[pve]\n{addresses}{pve}",
        root.path().join("r")
    );
    fs::write(&file, text).unwrap();
    let mut command = Command::new(moxlet);
    command.args(["agent", "--config"]).arg(&file).env_remove("KUBECONFIG").stdin(Stdio::null());
    command.stderr(Stdio::piped()).kill_on_drop(true);
    Started { command, root, _bridge: bridge }
}

/// What the agent writes until it ends, with these keys changed. It has touched nothing.
async fn complaint(world: &World, changed: &[(&'static str, &str)]) -> String {
    said_by(world, agent(world, changed).await).await
}

async fn said_by(world: &World, mut started: Started) -> String {
    let ended = tokio::time::timeout(Duration::from_secs(120), started.command.output()).await;
    let ended = ended.unwrap().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(!ended.status.success(), "{said}");
    world.assert_foreigners_untouched();
    said
}

/// What the agent writes until it goes on without the API, with these keys changed. This machine may lack other things.
async fn goes_on(world: &World, changed: &[(&'static str, &str)]) -> String {
    let mut started = agent(world, changed).await;
    let mut agent = started.command.spawn().unwrap();
    let mut lines = BufReader::new(agent.stderr.take().unwrap()).lines();
    let mut said = String::new();
    while !said.contains("running pods are taken over, new ones wait") {
        let line = tokio::time::timeout(Duration::from_secs(120), lines.next_line()).await.unwrap().unwrap();
        said.push_str(&line.unwrap_or_else(|| panic!("it has ended: {said}")));
        said.push('\n');
    }
    agent.kill().await.unwrap();
    world.assert_foreigners_untouched();
    said
}

fn has(text: &str, expected: &[&str]) {
    for word in expected {
        assert!(text.contains(word), "{word:?} is missing in: {text}");
    }
}

#[tokio::test]
async fn a_wrong_token_is_named_and_its_secret_is_not() {
    let world = World::new().await;
    world.place.change("priv/token.cfg", SECRET, "11111111-1111-4111-8111-111111111111");
    let text = goes_on(&world, &[]).await;
    has(&text, &["ERROR", "does not accept the API token moxlet@pve!sim"]);
    assert!(!text.contains(SECRET), "{text}");
}

#[tokio::test]
async fn each_missing_privilege_is_named_with_its_path_and_the_commands_that_grant_it() {
    let world = World::new().await;
    world.place.change("user.cfg", ":Administrator:", ":PVETemplateUser:");
    has(
        &complaint(&world, &[]).await,
        &[
            "lacks VM.PowerMgmt on /vms, needed to start and stop CTs",
            "lacks VM.Allocate on /vms, needed to delete CTs",
            "pveum role add Moxlet-VM.Allocate --privs VM.Allocate; pveum acl modify /vms --users moxlet@pve",
            "lacks Datastore.Audit on /storage/local-zfs",
        ],
    );
}

#[tokio::test]
async fn a_certificate_that_is_not_the_one_expected_is_told_with_both_fingerprints() {
    let world = World::new().await;
    let known = world.sim.hosts()[0].fingerprint.clone();
    let pinned = [("fingerprint", format!("{known:?}"))];
    world.control("PUT", "/certificates/pve1", json!({"expired": false})).await;
    let text = goes_on(&world, &[(pinned[0].0, &pinned[0].1)]).await;
    has(&text, &["the certificate is not accepted", &known]);
    world.control("PUT", "/certificates/pve1", json!({"expired": true})).await;
    has(&goes_on(&world, &[]).await, &["the certificate is not accepted", "xpired"]);
}

#[tokio::test]
async fn a_storage_that_cannot_hold_cts_is_named_with_the_reason() {
    let world = World::new().await;
    has(&complaint(&world, &[("storage", "\"none\"")]).await, &["has no storage none (key storage)"]);
    has(
        &complaint(&world, &[("storage", "\"local\"")]).await,
        &["the storage local is of type dir, pods need one of type zfspool"],
    );
    world.control("PUT", "/storages/local-zfs", json!({"fault": "inactive"})).await;
    has(
        &complaint(&world, &[]).await,
        &["the storage local-zfs is not active on pve1: is its pool imported?"],
    );
}

#[tokio::test]
async fn all_that_is_missing_is_said_at_once() {
    let world = World::new().await;
    let text =
        complaint(&world, &[("bridge", "\"vmbr77\""), ("storage", "\"local\""), ("pool", "\"pods\"")]).await;
    has(
        &text,
        &["there is no bridge vmbr77 on this host (key bridge)", "of type dir", "there is no pool pods"],
    );
}

#[tokio::test]
async fn proxmox_ve_activates_its_storage_before_the_store_is_opened_on_the_same_pool() {
    let world = World::new().await;
    let store = "storage = \"zfs\"\nzfs_dataset = \"moxlet-no-such-pool/store\"\n";
    world.control("PUT", "/storages/local-zfs", json!({"fault": "inactive"})).await;
    let text = said_by(&world, agent_with(&world, store, &[]).await).await;
    has(&text, &["the storage local-zfs is not active on pve1"]);
    assert!(!text.contains("moxlet-no-such-pool"), "{text}");
}

#[tokio::test]
async fn an_interface_that_no_ct_could_be_put_on_is_named() {
    let world = World::new().await;
    has(&complaint(&world, &[("bridge", "\"lo\"")]).await, &["the interface lo is no bridge (key bridge)"]);
    has(&complaint(&world, &[("mtu", "9000")]).await, &["mtu = 9000 is above the 1500 of bridge mxs"]);
}

#[tokio::test]
async fn a_token_that_everybody_can_read_is_refused() {
    let world = World::new().await;
    let token = world.place.dir.join("open");
    fs::write(&token, format!("moxlet@pve!sim={SECRET}\n")).unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o644)).unwrap();
    let text = complaint(&world, &[("token_file", &format!("{token:?}"))]).await;
    has(&text, &["pve.token_file", "mode 0644", "chmod 0600"]);
    assert!(!text.contains(SECRET), "{text}");
}

#[tokio::test]
async fn another_host_than_one_of_proxmox_ve_is_told_apart() {
    let world = World::new().await;
    let page = json!({"path": "^/version$", "do": "body", "text": "<html>a proxy's page</html>"});
    world.fault("calls", page).await;
    has(&complaint(&world, &[]).await, &["GET /version: unexpected answer", "<html>a proxy's page"]);
    world.no_faults().await;
    world.control("PUT", "/version", json!({"version": "8.4.1"})).await;
    has(&complaint(&world, &[]).await, &["Proxmox VE 8.4.1 is too old: 9.1.0 or later is needed"]);
    // A newer one is used; what this machine lacks for it comes after.
    world.control("PUT", "/version", json!({"version": "10.0.2"})).await;
    has(
        &complaint(&world, &[("storage", "\"local\"")]).await,
        &["WARN", "newer than what this was written against"],
    );
}

#[tokio::test]
async fn a_server_that_cannot_be_reached_is_named() {
    let world = World::new().await;
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let text = goes_on(&world, &[("endpoints", &format!("[\"https://{nobody}\"]"))]).await;
    has(&text, &["GET /version", &format!("https://{nobody} is unreachable")]);
}
