//! Snapshots, clones and templates: refused where a mount point is not a volume of a storage.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{Call, check_lock, is_running, text};
use crate::{
    answer::{Answered, Refusal},
    faults::BackupStep,
    guest::{CtConf, Volume, VolumeKind, backup, mount_points},
    sim::{Sim, now},
};

/// Whether all mount points are volumes that can be snapshotted.
fn has_feature(conf: &CtConf) -> bool {
    mount_points(conf).iter().all(|p| p.kind_name() == "volume")
}

pub(super) fn feature(call: &Call) -> Answered {
    let conf = call.sim.load_conf(call.node()?, call.vmid()?)?;
    Ok(json!({ "hasFeature": i32::from(has_feature(&conf)) }).into())
}

pub(super) async fn list(call: &Call) -> Answered {
    let conf = call.sim.load_conf(call.node()?, call.vmid()?)?;
    let mut all: Vec<Value> = conf
        .snapshots
        .iter()
        .map(|(name, keys)| {
            let mut line = json!({ "name": name, "description": keys.description });
            if let Some(time) = keys.values.get("snaptime").and_then(|t| t.parse::<i64>().ok()) {
                line["snaptime"] = json!(time);
            }
            if let Some(parent) = keys.values.get("parent") {
                line["parent"] = json!(parent);
            }
            line
        })
        .collect();
    let running = i32::from(is_running(call).await?);
    let mut current = json!({ "name": "current", "description": "You are here!", "digest": conf.digest, "running": running });
    if let Some(parent) = conf.get("parent") {
        current["parent"] = json!(parent);
    }
    all.push(current);
    Ok(json!(all).into())
}

/// A snapshot of every volume, and the section in the config.
pub(super) async fn create(call: &Call) -> Answered {
    let (node, vmid) = (call.node()?.to_owned(), call.vmid()?);
    let name = call.needed("snapname")?.to_owned();
    if matches!(name.as_str(), "current" | "pending" | BACKUP) {
        return Err(Refusal::died(format!("unable to use snapshot name '{name}' (reserved name)")));
    }
    let description = call.text("description").unwrap_or("").to_owned();
    call.sim.load_conf(&node, vmid)?;
    let sim = Arc::clone(&call.sim);
    call.fork(&node.clone(), "vzsnapshot", &vmid.to_string(), |_| async move {
        let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await.map_err(text)?;
        take(&sim, &node, vmid, &name, &description).await
    })
}

/// The name of a backup's snapshot, for which only what is backed up counts.
pub(in crate::api) const BACKUP: &str = "vzdump";

fn points_of(conf: &CtConf, name: &str) -> Vec<Volume> {
    if name == BACKUP { backup::backed_up(conf) } else { mount_points(conf) }
}

/// PVE::AbstractConfig::snapshot_create, with the CT's lock held: its `lock: snapshot` stands for as long as the CT is frozen.
pub(in crate::api) async fn take(
    sim: &Sim,
    node: &str,
    vmid: u32,
    name: &str,
    description: &str,
) -> Result<(), String> {
    let mut conf = sim.load_conf(node, vmid).map_err(text)?;
    check_lock(&conf)?;
    let points = points_of(&conf, name);
    if points.iter().any(|p| p.kind_name() != "volume") {
        return Err("snapshot feature is not available".into());
    }
    if conf.snapshots.contains_key(name) {
        return Err(format!("snapshot name '{name}' already used"));
    }
    let mut keys = conf.main.clone();
    keys.values.retain(|key, _| !key.starts_with("unused"));
    keys.values.insert("snaptime".into(), now().to_string());
    keys.description = if description.is_empty() { String::new() } else { format!("{description}\n") };
    let mut prepared = conf.clone();
    prepared.main.values.insert("lock".into(), "snapshot".into());
    let section = prepared.snapshots.entry(name.to_owned()).or_insert_with(|| keys.clone());
    section.values.insert("snapstate".into(), "prepare".into());
    sim.write_conf(node, vmid, &prepared).map_err(text)?;
    if let Err(why) = of_volumes(sim, node, vmid, &points, name).await {
        for point in &points {
            let _ = delete_volume(sim, node, point, name).await;
        }
        sim.write_conf(node, vmid, &conf).map_err(text)?;
        return Err(why);
    }
    conf.main.values.insert("parent".into(), name.to_owned());
    conf.snapshots.insert(name.to_owned(), keys);
    sim.write_conf(node, vmid, &conf).map_err(text)
}

/// Snapshots the volumes of a CT, which is frozen meanwhile if it runs.
async fn of_volumes(sim: &Sim, node: &str, vmid: u32, points: &[Volume], name: &str) -> Result<(), String> {
    let running = sim.backend.state(node, vmid).await.map_err(|e| e.to_string())?.is_running();
    if running {
        sim.backend.freeze(node, vmid, true).await.map_err(|e| e.to_string())?;
    }
    let snapshots = async {
        for point in points {
            let VolumeKind::Storage { storage, volume } = &point.kind else { continue };
            let known = sim.storage(node, storage).map_err(text)?;
            sim.backend.snapshot_volume(node, &known, volume, name).await.map_err(|e| e.to_string())?;
        }
        if name == BACKUP {
            sim.faults.passed(BackupStep::Frozen).await;
        }
        Ok(())
    };
    let taken = snapshots.await;
    if running {
        sim.backend.freeze(node, vmid, false).await.map_err(|e| e.to_string())?;
    }
    taken
}

async fn delete_volume(sim: &Sim, node: &str, point: &Volume, name: &str) -> Result<(), String> {
    let VolumeKind::Storage { storage, volume } = &point.kind else { return Ok(()) };
    let known = sim.storage(node, storage).map_err(text)?;
    sim.backend.delete_snapshot(node, &known, volume, name).await.map_err(|e| e.to_string())
}

/// Removes a snapshot; those that descend from it then descend from its parent.
pub(super) async fn delete(call: &Call) -> Answered {
    let (node, vmid) = (call.node()?.to_owned(), call.vmid()?);
    let name = call.needed("snapname")?.to_owned();
    call.sim.load_conf(&node, vmid)?;
    let sim = Arc::clone(&call.sim);
    call.fork(&node.clone(), "vzdelsnapshot", &vmid.to_string(), |_| async move {
        remove(&sim, &node, vmid, &name).await
    })
}

/// PVE::AbstractConfig::snapshot_delete: between its steps only `lock: snapshot-delete` keeps others away.
pub(in crate::api) async fn remove(sim: &Sim, node: &str, vmid: u32, name: &str) -> Result<(), String> {
    let missing = || format!("snapshot '{name}' does not exist");
    let conf = {
        let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await.map_err(text)?;
        let mut conf = sim.load_conf(node, vmid).map_err(text)?;
        check_lock(&conf)?;
        let section = conf.snapshots.get_mut(name).ok_or_else(missing)?;
        section.values.insert("snapstate".into(), "delete".into());
        conf.main.values.insert("lock".into(), "snapshot-delete".into());
        sim.write_conf(node, vmid, &conf).map_err(text)?;
        conf
    };
    for point in points_of(&conf, name) {
        delete_volume(sim, node, &point, name).await?;
    }
    let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await.map_err(text)?;
    let mut conf = sim.load_conf(node, vmid).map_err(text)?;
    let gone = conf.snapshots.remove(name).ok_or_else(missing)?;
    let parent = gone.values.get("parent");
    let sections = conf.snapshots.values_mut().chain([&mut conf.main]);
    for keys in sections.filter(|k| k.values.get("parent").is_some_and(|p| p == name)) {
        match parent {
            Some(parent) => keys.values.insert("parent".into(), parent.clone()),
            None => keys.values.remove("parent"),
        };
    }
    conf.main.values.remove("lock");
    sim.write_conf(node, vmid, &conf).map_err(text)
}

pub(super) async fn clone(call: &Call) -> Answered {
    let (node, vmid, newid) = (call.node()?.to_owned(), call.vmid()?, call.vmid_of("newid")?);
    call.sim.cfs.check_quorum()?;
    let conf = call.sim.load_conf(&node, vmid)?;
    check_lock(&conf).map_err(Refusal::died)?;
    if let Some(point) = mount_points(&conf).into_iter().find(|p| p.kind_name() != "volume") {
        return Err(Refusal::died(format!(
            "unable to clone mountpoint '{}' (type {})",
            point.key,
            point.kind_name()
        )));
    }
    if is_running(call).await? && call.text("snapname").is_none() {
        return Err(Refusal::died("Cannot do full clones on a running container without snapshots"));
    }
    if let Some(other) = call.sim.vmlist()?.get(&newid) {
        return Err(Refusal::died(format!("CT {newid} already exists on node '{other}'")));
    }
    call.sim.cfs.create(&Sim::conf_name(&node, newid), "lock: create\n")?;
    let hostname = call.text("hostname").map(str::to_owned);
    let description = call.text("description").map(str::to_owned);
    let sim = Arc::clone(&call.sim);
    call.fork(&node.clone(), "vzclone", &vmid.to_string(), |log| async move {
        let mut copy = conf;
        // Description, tags and raw lines come along; snapshots, locks and what is pending do not.
        copy.snapshots.clear();
        copy.pending = crate::guest::Keys::default();
        for key in ["lock", "parent", "template"] {
            copy.main.values.remove(key);
        }
        if let Some(hostname) = hostname {
            copy.main.values.insert("hostname".into(), hostname);
        }
        if let Some(description) = description {
            copy.main.description = format!("{description}\n");
        }
        let made = copy_volumes(&sim, &node, newid, &mut copy, &log).await;
        if let Err(why) = made {
            let _ = sim.cfs.remove(&Sim::conf_name(&node, newid));
            return Err(format!("clone failed: {why}"));
        }
        sim.write_conf(&node, newid, &copy).map_err(text)
    })
}

async fn copy_volumes(
    sim: &Sim,
    node: &str,
    newid: u32,
    copy: &mut CtConf,
    log: &crate::tasks::TaskLog,
) -> Result<(), String> {
    for point in mount_points(copy) {
        let VolumeKind::Storage { storage, volume } = &point.kind else { continue };
        let known = sim.storage(node, storage).map_err(text)?;
        log.line(&format!("create full clone of mountpoint {} ({storage}:{volume})", point.key));
        let size = point.size().unwrap_or(4 << 30);
        let name =
            sim.backend.copy_volume(node, &known, volume, newid, size).await.map_err(|e| e.to_string())?;
        let rest: String = point.options.iter().map(|(k, v)| format!(",{k}={v}")).collect();
        copy.main.values.insert(point.key.clone(), format!("{storage}:{name}{rest}"));
    }
    Ok(())
}

/// Makes a template; null while the task runs.
pub(super) async fn template(call: &Call) -> Answered {
    let (node, vmid) = (call.node()?.to_owned(), call.vmid()?);
    let conf = call.sim.load_conf(&node, vmid)?;
    check_lock(&conf).map_err(Refusal::died)?;
    if conf.flag("template") {
        return Err(Refusal::died("you can't convert a template to a template"));
    }
    if is_running(call).await? {
        return Err(Refusal::died("you can't convert a CT to template if the CT is running"));
    }
    let sim = Arc::clone(&call.sim);
    call.fork(&node.clone(), "vztemplate", &vmid.to_string(), |_| async move {
        let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await.map_err(text)?;
        let mut conf = sim.load_conf(&node, vmid).map_err(text)?;
        conf.main.values.insert("template".into(), "1".into());
        sim.write_conf(&node, vmid, &conf).map_err(text)
    })?;
    Ok(Value::Null.into())
}
