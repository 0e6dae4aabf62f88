//! Backups: what each mode does to a CT, what the archive holds, and what a job says of guests that it cannot back up.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{
    cluster::{CONF, Cluster, percent},
    lifecycle::until,
};

const PATH: &str = "/nodes/pve1/vzdump";
/// A pod's CT: a bind mount point that is not shared, and a raw line.
pub fn guarded() -> String {
    let conf = CONF.replace("ostype:", "mp0: /var/empty,mp=/run/guard,ro=1\nostype:");
    format!("{conf}lxc.signal.halt: SIGTERM\n")
}

/// The CT of number 100, running.
pub async fn running(cluster: &Cluster) {
    cluster.write_conf("pve1", 100, &guarded());
    cluster.done("POST", "/nodes/pve1/lxc/100/status/start", &[]).await;
}

async fn hold(cluster: &Cluster, step: Value) {
    cluster.admin("PUT", "/backups", json!({ "hold": step })).await;
}

/// Begins a backup that is held at this step, which it reaches.
async fn begin(cluster: &Cluster, step: &str, params: &[(&str, &str)], there: &str) -> Value {
    hold(cluster, json!(step)).await;
    let upid = cluster.call("POST", PATH, params).await.data();
    until(async || log(cluster, &upid).await.iter().any(|l| l.contains(there))).await;
    upid
}

pub async fn log(cluster: &Cluster, upid: &Value) -> Vec<String> {
    let upid = upid.as_str().unwrap();
    let node = upid.split(':').nth(1).unwrap();
    let path = format!("/nodes/{node}/tasks/{}/log", percent(upid));
    let lines = cluster.call("GET", &path, &[("limit", "0")]).await.data();
    lines.as_array().unwrap().iter().map(|l| l["t"].as_str().unwrap().to_owned()).collect()
}

/// The lines of a log that name no time and no file, in their order.
async fn told(cluster: &Cluster, upid: &Value) -> Vec<String> {
    let timed = [" at 20", "Finished Backup", "online again", "creating vzdump archive"];
    let lines = log(cluster, upid).await;
    lines.into_iter().filter(|l| timed.iter().all(|t| !l.contains(t))).collect()
}

/// pid and whether it is frozen.
fn state(cluster: &Cluster) -> Option<(u64, bool)> {
    let text = std::fs::read_to_string(cluster.dir.path().join("run/ct/pve1-100.json")).ok()?;
    let run: Value = serde_json::from_str(&text).unwrap();
    Some((run["pid"].as_u64().unwrap(), run["frozen"].as_bool().unwrap()))
}

fn dumps(cluster: &Cluster) -> PathBuf {
    cluster.dir.path().join("dumps/pve1/local")
}

/// What lies in the directory of backups.
fn files(cluster: &Cluster) -> Vec<String> {
    let entries = std::fs::read_dir(dumps(cluster)).into_iter().flatten().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

#[tokio::test]
async fn in_mode_snapshot_a_ct_is_frozen_for_its_snapshot_and_goes_on_while_that_is_written() {
    let cluster = Cluster::start(1).await;
    running(&cluster).await;
    let before = cluster.read_conf("pve1", 100);
    let (pid, _) = state(&cluster).unwrap();
    let params = [("vmid", "100"), ("compress", "zstd")];
    let upid = begin(&cluster, "frozen", &params, "create storage snapshot").await;
    until(async || state(&cluster) == Some((pid, true))).await;
    let conf = cluster.read_conf("pve1", 100);
    assert!(conf.contains("\nlock: snapshot\n") && conf.contains("\nsnapstate: prepare\n"), "{conf}");
    hold(&cluster, json!("archive")).await;
    until(async || files(&cluster).iter().any(|f| f.ends_with(".dat"))).await;
    let conf = cluster.read_conf("pve1", 100);
    assert!(conf.contains("\nlock: backup\n") && conf.contains("\nparent: vzdump\n"), "{conf}");
    assert!(conf.contains("\n[vzdump]\n#vzdump backup snapshot\n"), "{conf}");
    assert_eq!(state(&cluster), Some((pid, false)));
    let refused = cluster.call("DELETE", "/nodes/pve1/lxc/100", &[]).await;
    assert_eq!(refused.refused(500), "CT is locked (backup)");
    hold(&cluster, Value::Null).await;
    assert_eq!(cluster.ended(&upid).await, "OK");
    assert_eq!((cluster.read_conf("pve1", 100), state(&cluster)), (before, Some((pid, false))));
    assert_eq!(
        told(&cluster, &upid).await,
        [
            "INFO: starting new backup job: vzdump 100 --compress zstd --node pve1",
            "INFO: Starting Backup of VM 100 (lxc)",
            "INFO: status = running",
            "INFO: CT Name: web",
            "INFO: including mount point rootfs ('/') in backup",
            "INFO: excluding bind mount point mp0 ('/run/guard') from backup (not a volume)",
            "INFO: backup mode: snapshot",
            "INFO: ionice priority: 7",
            "INFO: create storage snapshot 'vzdump'",
            "INFO: archive file size: 0KB",
            "INFO: cleanup temporary 'vzdump' snapshot",
            "INFO: Backup job finished successfully",
            "TASK OK"
        ]
    );
}

#[tokio::test]
async fn in_mode_suspend_a_ct_is_frozen_while_it_is_copied_and_then_goes_on() {
    let cluster = Cluster::start(1).await;
    running(&cluster).await;
    let before = cluster.read_conf("pve1", 100);
    let (pid, _) = state(&cluster).unwrap();
    let upid = begin(&cluster, "frozen", &[("vmid", "100"), ("mode", "suspend")], "suspending guest").await;
    until(async || state(&cluster) == Some((pid, true))).await;
    assert!(cluster.read_conf("pve1", 100).contains("\nlock: backup\n"));
    hold(&cluster, json!("archive")).await;
    until(async || state(&cluster) == Some((pid, false))).await;
    assert!(cluster.read_conf("pve1", 100).contains("\nlock: backup\n"));
    hold(&cluster, Value::Null).await;
    assert_eq!(cluster.ended(&upid).await, "OK");
    assert_eq!((cluster.read_conf("pve1", 100), state(&cluster)), (before, Some((pid, false))));
}

#[tokio::test]
async fn in_mode_stop_a_ct_is_stopped_under_the_lock_and_started_when_that_is_gone() {
    let cluster = Cluster::start(1).await;
    running(&cluster).await;
    let before = cluster.read_conf("pve1", 100);
    let (pid, _) = state(&cluster).unwrap();
    let params = [("vmid", "100"), ("mode", "stop"), ("compress", "gzip")];
    let upid = begin(&cluster, "archive", &params, "creating vzdump archive").await;
    assert!(state(&cluster).is_none() && cluster.read_conf("pve1", 100).contains("\nlock: backup\n"));
    let start = cluster.call("POST", "/nodes/pve1/lxc/100/status/start", &[]).await.data();
    assert_eq!(cluster.ended(&start).await, "CT is locked (backup)");
    hold(&cluster, json!("unlocked")).await;
    until(async || cluster.read_conf("pve1", 100) == before).await;
    assert!(state(&cluster).is_none());
    hold(&cluster, Value::Null).await;
    assert_eq!(cluster.ended(&upid).await, "OK");
    assert!(state(&cluster).is_some_and(|(other, _)| other != pid), "it has been started again");
    let lines = told(&cluster, &upid).await;
    let place =
        |text: &str| lines.iter().position(|l| l.contains(text)).unwrap_or_else(|| panic!("{lines:?}"));
    assert!(
        place("backup mode: stop") < place("CT Name") && place("CT Name") < place("stopping virtual guest")
    );
    assert!(place("archive file size") < place("restarting vm"), "{lines:?}");
    // One that did not run stays so.
    cluster.done("POST", "/nodes/pve1/lxc/100/status/stop", &[]).await;
    cluster.done("POST", PATH, &[("vmid", "100"), ("mode", "stop")]).await;
    assert!(state(&cluster).is_none());
}

#[tokio::test]
async fn an_archive_is_listed_holds_the_config_without_what_is_of_the_moment_and_can_be_removed() {
    let cluster = Cluster::start(1).await;
    running(&cluster).await;
    let mut kept = Vec::new();
    for (compress, ending) in [("0", "tar"), ("gzip", "tar.gz"), ("zstd", "tar.zst")] {
        cluster.done("POST", PATH, &[("vmid", "100"), ("compress", compress)]).await;
        let content =
            cluster.call("GET", "/nodes/pve1/storage/local/content", &[("content", "backup")]).await;
        let listed = content.data();
        let listed: Vec<_> = listed.as_array().unwrap().iter().filter(|b| b["format"] == ending).collect();
        assert_eq!(listed.len(), 1, "{listed:?}");
        assert!(listed[0]["vmid"] == 100 && listed[0]["ctime"].as_i64() > Some(1_700_000_000), "{listed:?}");
        let volid = listed[0]["volid"].as_str().unwrap();
        assert!(volid.starts_with("local:backup/vzdump-lxc-100-20") && volid.ends_with(ending), "{volid}");
        kept.push(volid.to_owned());
        let config = cluster.call("GET", &format!("{PATH}/extractconfig"), &[("volume", volid)]).await.data();
        assert_eq!(config.as_str().unwrap(), guarded());
    }
    assert_eq!(files(&cluster).len(), 3, "nothing else is left: {:?}", files(&cluster));
    for volid in kept {
        let path = format!("/nodes/pve1/storage/local/content/{}", percent(&volid));
        assert!(cluster.call("GET", &path, &[]).await.data()["size"].as_i64() > Some(0));
        cluster.done("DELETE", &path, &[]).await;
    }
    assert!(files(&cluster).is_empty());
}

#[tokio::test]
async fn what_cannot_be_backed_up_leaves_the_others_their_turn_and_the_job_ends_in_errors() {
    let cluster = Cluster::start(2).await;
    running(&cluster).await;
    let other = guarded().replace("subvol-100", "subvol-101");
    cluster.write_conf("pve1", 101, &format!("lock: migrate\n{other}"));
    cluster.write_conf("pve1", 102, &other.replace("subvol-101", "subvol-102"));
    cluster.write_conf("pve2", 103, &other.replace("subvol-101", "subvol-103"));
    let params = [("vmid", "100,101,102,103,999")];
    let upid = begin(&cluster, "archive", &params, "creating vzdump archive").await;
    std::fs::remove_file(cluster.conf("pve1", 102)).unwrap();
    hold(&cluster, Value::Null).await;
    assert_eq!(cluster.ended(&upid).await, "job errors");
    let lines = told(&cluster, &upid).await;
    for line in [
        "INFO: skip external VMs: 103",
        "ERROR: Backup of VM 101 failed - CT is locked (migrate)",
        "ERROR: Backup of VM 102 failed - Configuration file 'nodes/pve1/lxc/102.conf' does not exist",
        "ERROR: Backup of VM 999 failed - unable to find VM '999'",
        "INFO: Backup job finished with errors",
    ] {
        assert!(lines.iter().any(|l| l == line), "{line} is not in {lines:#?}");
    }
    assert!(cluster.read_conf("pve1", 101).starts_with("lock: migrate"), "another's lock stays");
    assert_eq!(files(&cluster).len(), 1);
    // All of this host but one; that one goes on.
    let upid = cluster.call("POST", PATH, &[("exclude", "101")]).await.data();
    assert_eq!(cluster.ended(&upid).await, "OK");
    let lines = told(&cluster, &upid).await;
    assert!(lines.iter().any(|l| l == "INFO: skip external VMs: 103"), "{lines:?}");
    assert_eq!(lines.iter().filter(|l| l.starts_with("INFO: Starting Backup")).count(), 1, "{lines:?}");
}

#[tokio::test]
async fn a_job_that_is_interrupted_or_fails_leaves_the_ct_as_it_was() {
    let cluster = Cluster::start(1).await;
    running(&cluster).await;
    let before = cluster.read_conf("pve1", 100);
    for (mode, step) in
        [("snapshot", "frozen"), ("snapshot", "archive"), ("suspend", "frozen"), ("stop", "archive")]
    {
        let upid = begin(&cluster, step, &[("vmid", "100"), ("mode", mode)], "backup mode").await;
        let reached = async || match (mode, step) {
            (_, "frozen") => state(&cluster).is_some_and(|(_, frozen)| frozen),
            _ => files(&cluster).iter().any(|f| f.ends_with(".dat")),
        };
        until(reached).await;
        let path = format!("/nodes/pve1/tasks/{}", percent(upid.as_str().unwrap()));
        cluster.call("DELETE", &path, &[]).await.data();
        assert_eq!(cluster.ended(&upid).await, "interrupted by signal", "{mode} {step}");
        assert_eq!(cluster.read_conf("pve1", 100), before, "{mode} {step}");
        assert!(state(&cluster).is_some_and(|(_, frozen)| !frozen), "{mode} {step}");
        assert_eq!(files(&cluster), Vec::<String>::new(), "{mode} {step}");
    }
    hold(&cluster, Value::Null).await;
    cluster.admin("PUT", "/storages/local", json!({ "fault": "full" })).await;
    let upid = cluster.call("POST", PATH, &[("vmid", "100")]).await.data();
    assert_eq!(cluster.ended(&upid).await, "job errors");
    assert!(log(&cluster, &upid).await.iter().any(|l| l.contains("No space left on device")));
    assert_eq!(cluster.read_conf("pve1", 100), before);
    assert_eq!(files(&cluster), Vec::<String>::new());
}

#[tokio::test]
async fn a_host_makes_one_backup_at_a_time() {
    let cluster = Cluster::start(1).await;
    running(&cluster).await;
    let first = begin(&cluster, "archive", &[("vmid", "100")], "creating vzdump archive").await;
    let refused = cluster.call("POST", PATH, &[("vmid", "100"), ("lockwait", "0")]).await.data();
    assert_eq!(cluster.ended(&refused).await, "can't acquire lock '/var/run/vzdump.lock' (wait = 0)");
    let second = cluster.call("POST", PATH, &[("vmid", "100")]).await.data();
    until(async || log(&cluster, &second).await.iter().any(|l| l.contains("trying to get global lock")))
        .await;
    let stop = cluster.call("POST", PATH, &[("stop", "1")]).await.data();
    assert_eq!(stop, "OK");
    for upid in [first, second] {
        assert_eq!(cluster.ended(&upid).await, "interrupted by signal");
    }
}

#[tokio::test]
async fn privileges_parameters_and_storages_are_checked_as_proxmox_ve_does() {
    let cluster = Cluster::start(1).await;
    running(&cluster).await;
    let admin = "vmadmin@pve!tok";
    let refused = cluster.call_as(admin, "POST", PATH, &[("vmid", "100")]).await;
    assert_eq!(refused.refused(403), "Permission check failed (/storage/local, Datastore.AllocateSpace)");
    let refused = cluster.call("POST", PATH, &[("vmid", "100"), ("dumpdir", "/tmp")]).await;
    assert_eq!(refused.field("dumpdir"), "Only root may set this option.");
    let refused = cluster.call("POST", PATH, &[("vmid", "100"), ("all", "1")]).await;
    assert_eq!(refused.field("all"), "option conflicts with option 'vmid'");
    assert_eq!(cluster.call("POST", PATH, &[]).await.field("vmid"), "property is missing");
    assert_eq!(cluster.call("POST", PATH, &[("vmid", "100"), ("mode", "x")]).await.status, 400);
    let script =
        cluster.call("POST", PATH, &[("vmid", "100"), ("notes-template", "x"), ("storage", "local")]).await;
    assert_eq!(script.refused(501), "vzdump: notes-template is not simulated");
    let upid = cluster.call("POST", PATH, &[("vmid", "100"), ("storage", "local-zfs")]).await.data();
    let why = "could not get storage information for 'local-zfs': can't use storage 'local-zfs' for backups - wrong content type";
    assert_eq!(cluster.ended(&upid).await, why);
    cluster.admin("PUT", "/storages/local", json!({ "fault": "inactive" })).await;
    let upid = cluster.call("POST", PATH, &[("vmid", "100")]).await.data();
    assert!(cluster.ended(&upid).await.starts_with("could not activate storage 'local': "));
    // HA starts what a backup stops.
    cluster.admin("DELETE", "/faults", json!({})).await;
    let resources = cluster.simulator.etc_pve().join("ha/resources.cfg");
    std::fs::write(resources, "ct: 100\n\tstate started\n").unwrap();
    let upid = cluster.call("POST", PATH, &[("vmid", "100"), ("mode", "stop")]).await.data();
    assert_eq!(cluster.ended(&upid).await, "job errors");
    assert!(
        log(&cluster, &upid)
            .await
            .iter()
            .any(|l| l.contains("Cannot execute a backup with stop mode on a HA managed"))
    );
}

#[tokio::test]
async fn without_the_privilege_a_guest_is_named_and_among_all_passed_over() {
    let cluster = Cluster::with(1, |config| {
        let acl = |path: &str, role: &str| moxlet_pve_sim::config::Acl {
            path: path.into(),
            who: "auditor@pve".into(),
            role: role.into(),
            propagate: true,
        };
        config.acl.extend([acl("/storage/local", "PVEDatastoreUser"), acl("/vms/101", "PVEVMUser")]);
    })
    .await;
    running(&cluster).await;
    cluster.write_conf("pve1", 101, &guarded().replace("subvol-100", "subvol-101"));
    let auditor = "auditor@pve!tok";
    let upid = cluster.call_as(auditor, "POST", PATH, &[("vmid", "100")]).await.data();
    assert_eq!(cluster.ended(&upid).await, "403 Permission check failed (/vms/100, VM.Backup)");
    let upid = cluster.call_as(auditor, "POST", PATH, &[("all", "1")]).await.data();
    assert_eq!(cluster.ended(&upid).await, "OK");
    assert_eq!(files(&cluster).len(), 1);
    cluster.done("POST", PATH, &[("vmid", "100")]).await;
    let content =
        cluster.call_as(auditor, "GET", "/nodes/pve1/storage/local/content", &[("content", "backup")]).await;
    let listed = content.data();
    assert!(listed.as_array().unwrap().len() == 1 && listed[0]["vmid"] == 101, "{listed}");
}

#[tokio::test]
async fn root_itself_backs_up_to_a_directory() {
    let cluster = Cluster::start(1).await;
    running(&cluster).await;
    let dir = tempfile::tempdir().unwrap();
    let parameters = json!({ "vmid": "100", "dumpdir": dir.path() });
    let asked = json!({ "host": "pve1", "method": "POST", "path": PATH, "parameters": parameters });
    let upid = cluster.admin("POST", "/pvesh", asked).await["data"].clone();
    assert_eq!(cluster.ended(&upid).await, "OK");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}
