//! Restores: what of a backup's config comes along, for whom, and what a restore that fails leaves.

use serde_json::{Value, json};

use super::{
    backup::{guarded, log, running},
    cluster::Cluster,
};

const PATH: &str = "/nodes/pve1/lxc";

/// A backup of CT 100, which runs.
async fn backed_up(cluster: &Cluster) -> String {
    running(cluster).await;
    cluster.done("POST", "/nodes/pve1/vzdump", &[("vmid", "100"), ("compress", "zstd")]).await;
    let listed =
        cluster.call("GET", "/nodes/pve1/storage/local/content", &[("content", "backup")]).await.data();
    listed[0]["volid"].as_str().unwrap().to_owned()
}

async fn as_root(cluster: &Cluster, parameters: Value) -> Value {
    let asked = json!({ "host": "pve1", "method": "POST", "path": PATH, "parameters": parameters });
    cluster.admin("POST", "/pvesh", asked).await["data"].clone()
}

async fn volumes(cluster: &Cluster) -> Vec<String> {
    let listed = cluster.call("GET", "/nodes/pve1/storage/local-zfs/content", &[]).await.data();
    let all = listed.as_array().cloned().unwrap_or_default();
    all.iter().map(|v| v["volid"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_token_gets_a_ct_without_mount_points_and_raw_lines_which_the_log_names() {
    let cluster = Cluster::start(1).await;
    let archive = backed_up(&cluster).await;
    let bare =
        [("vmid", "200"), ("ostemplate", archive.as_str()), ("restore", "1"), ("storage", "local-zfs")];
    let upid = cluster.call("POST", PATH, &bare).await.data();
    let why = "unable to restore CT 200 - restoring 'mp0' to bind mount is only possible for root";
    assert_eq!(cluster.ended(&upid).await, why);
    assert!(!cluster.conf("pve1", 200).exists() && volumes(&cluster).await.is_empty());
    let mut with_root = bare.to_vec();
    with_root.extend([("rootfs", "local-zfs:0.0625"), ("memory", "128")]);
    let upid = cluster.call("POST", PATH, &with_root).await.data();
    assert_eq!(cluster.ended(&upid).await, "WARNINGS: 1");
    assert_eq!(
        cluster.read_conf("pve1", 200),
        "arch: amd64\nfeatures: nesting=1\nhostname: web\nmemory: 128\nostype: unmanaged\n\
         rootfs: local-zfs:subvol-200-disk-0,size=64M\nswap: 0\nunprivileged: 1\n"
    );
    let lines = log(&cluster, &upid).await;
    for line in [
        "WARN: skipping custom lxc options, restore manually as root:",
        "lxc.signal.halt: SIGTERM",
        "merging backed-up and given configuration..",
    ] {
        assert!(lines.iter().any(|l| l == line), "{line} is not in {lines:#?}");
    }
    cluster.done("POST", "/nodes/pve1/lxc/200/status/start", &[]).await;
}

#[tokio::test]
async fn root_gets_mount_points_and_raw_lines_as_well() {
    let cluster = Cluster::start(1).await;
    let archive = backed_up(&cluster).await;
    let parameters = json!({ "vmid": 200, "ostemplate": archive, "restore": 1, "storage": "local-zfs" });
    let upid = as_root(&cluster, parameters).await;
    assert_eq!(cluster.ended(&upid).await, "OK");
    assert_eq!(cluster.read_conf("pve1", 200), guarded().replace("subvol-100", "subvol-200"));
    assert_eq!(upid.as_str().unwrap().split(':').nth(7), Some("root@pam"));
}

#[tokio::test]
async fn over_itself_a_ct_is_restored_only_if_asked_stopped_and_unlocked_and_gets_a_new_volume() {
    let cluster = Cluster::start(1).await;
    cluster
        .done(
            "POST",
            PATH,
            &[
                ("vmid", "100"),
                ("ostemplate", super::cluster::TEMPLATE),
                ("storage", "local-zfs"),
                ("unprivileged", "1"),
            ],
        )
        .await;
    cluster.done("POST", "/nodes/pve1/vzdump", &[("vmid", "100")]).await;
    let listed =
        cluster.call("GET", "/nodes/pve1/storage/local/content", &[("content", "backup")]).await.data();
    let archive = listed[0]["volid"].as_str().unwrap().to_owned();
    let plain =
        [("vmid", "100"), ("ostemplate", archive.as_str()), ("restore", "1"), ("storage", "local-zfs")];
    let refused = cluster.call("POST", PATH, &plain).await;
    assert_eq!(refused.refused(500), "CT 100 already exists on node 'pve1'");
    let mut force = plain.to_vec();
    force.push(("force", "1"));
    cluster.done("POST", "/nodes/pve1/lxc/100/status/start", &[]).await;
    assert_eq!(cluster.call("POST", PATH, &force).await.refused(500), "can't overwrite running container");
    cluster.done("POST", "/nodes/pve1/lxc/100/status/stop", &[]).await;
    let before = cluster.read_conf("pve1", 100);
    cluster.write_conf("pve1", 100, &format!("{before}lock: backup\n"));
    let locked = cluster.call("POST", PATH, &force).await;
    assert_eq!(locked.refused(500), "unable to restore CT 100 - CT is locked (backup)");
    cluster.write_conf("pve1", 100, &format!("{before}protection: 1\n"));
    let protected = cluster.call("POST", PATH, &force).await;
    assert_eq!(protected.refused(500), "unable to restore CT 100 - protection mode enabled");
    cluster.write_conf("pve1", 100, &before);
    // What cannot be read changes nothing.
    let file = cluster.dir.path().join("dumps/pve1").join(archive.replace(":backup", ""));
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, "x").unwrap();
    let upid = cluster.call("POST", PATH, &force).await.data();
    assert!(cluster.ended(&upid).await.starts_with("unable to restore CT 100 - "));
    assert_eq!(cluster.read_conf("pve1", 100), before);
    assert_eq!(volumes(&cluster).await, ["local-zfs:subvol-100-disk-0"]);
    std::fs::write(&file, bytes).unwrap();
    cluster.done("POST", PATH, &force).await;
    assert_eq!(cluster.read_conf("pve1", 100), before.replace("disk-0", "disk-1"));
    assert_eq!(volumes(&cluster).await, ["local-zfs:subvol-100-disk-1"]);
}

#[tokio::test]
async fn who_may_restore_what() {
    let cluster = Cluster::with(1, |config| {
        let acl = |path: &str, role: &str| moxlet_pve_sim::config::Acl {
            path: path.into(),
            who: "auditor@pve".into(),
            role: role.into(),
            propagate: true,
        };
        config.acl.extend([
            acl("/storage", "PVEDatastoreUser"),
            acl("/vms/100", "PVEVMUser"),
            acl("/vms/300", "PVEVMAdmin"),
        ]);
    })
    .await;
    let archive = backed_up(&cluster).await;
    let restore = |vmid: &'static str, archive: &str| {
        let fixed = [
            ("vmid", vmid),
            ("restore", "1"),
            ("storage", "local-zfs"),
            ("force", "1"),
            ("rootfs", "local-zfs:1"),
        ];
        let owned: Vec<(String, String)> =
            fixed.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        [owned, vec![("ostemplate".to_owned(), archive.to_owned())]].concat()
    };
    let call = async |vmid, archive: &str| {
        let params = restore(vmid, archive);
        let params: Vec<(&str, &str)> = params.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        cluster.call_as("auditor@pve!tok", "POST", PATH, &params).await
    };
    assert_eq!(call("200", &archive).await.refused(403), "Permission check failed (/vms/200, VM.Allocate)");
    // Of another guest's backup it needs the right to back that up.
    let other = archive.replace("lxc-100", "lxc-400");
    let dumps = cluster.dir.path().join("dumps/pve1");
    let file = |volid: &str| dumps.join(volid.replace(":backup", ""));
    std::fs::copy(file(&archive), file(&other)).unwrap();
    assert_eq!(call("300", &other).await.refused(403), "Permission check failed (/vms/400, VM.Backup)");
    let upid = call("300", &archive).await.data();
    assert_eq!(cluster.ended(&upid).await, "WARNINGS: 1");
    let no_backup = call("300", "local:vztmpl/debian-13-standard_13.1-1_amd64.tar.zst").await;
    assert!(no_backup.refused(500).ends_with("content type needs to be 'backup'"));
    // VM.Backup is enough to restore a CT that is there, but `rootfs` is more than that.
    cluster.done("POST", "/nodes/pve1/lxc/100/status/stop", &[]).await;
    assert_eq!(
        call("100", &archive).await.refused(403),
        "Permission check failed (/vms/100, VM.Config.Disk)"
    );
}
