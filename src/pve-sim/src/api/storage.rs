//! `/storage` and `/nodes/{node}/storage`: what storages there are, their room and their volumes.

use std::{fs, path::PathBuf};

use serde_json::{Value, json};

use super::{Call, backup};
use crate::{
    answer::{Answered, Refusal},
    backend::VolumeInfo,
    config::Storage,
    faults::StorageFault,
    guest::{VolumeKind, mount_points},
    section,
};

const MAY_SEE: &[&str] = &["Datastore.Audit", "Datastore.AllocateSpace"];

pub(super) async fn dispatch_cluster(call: &Call) -> Option<Answered> {
    Some(match (call.method.as_str(), call.template.as_str()) {
        ("GET", "/storage") => list_configured(call),
        ("GET", "/storage/{storage}") => read_configured(call),
        _ => return None,
    })
}

pub(super) async fn dispatch_node(call: &Call) -> Option<Answered> {
    Some(match (call.method.as_str(), call.template.as_str()) {
        ("GET", "/nodes/{node}/storage") => list(call).await,
        ("GET", "/nodes/{node}/storage/{storage}/status") => status(call).await,
        ("GET", "/nodes/{node}/storage/{storage}/content") => content(call).await,
        ("GET", "/nodes/{node}/storage/{storage}/content/{volume}") => volume(call).await,
        ("DELETE", "/nodes/{node}/storage/{storage}/content/{volume}") => delete(call).await,
        _ => return None,
    })
}

fn configured(call: &Call, section: &section::Section, digest: &str) -> Value {
    let mut json = json!({ "storage": section.id, "type": section.kind, "digest": digest });
    for (key, value) in &section.keys {
        json[key] = match key.as_str() {
            "shared" | "disable" | "sparse" => json!(value.parse::<i64>().unwrap_or(0)),
            _ => json!(value),
        };
    }
    let _ = call;
    json
}

fn list_configured(call: &Call) -> Answered {
    let text = call.sim.cfs.read("storage.cfg")?.unwrap_or_default();
    let digest = section::digest(&text);
    let mut all = Vec::new();
    for section in section::parse(&text) {
        let wanted = call.text("type").is_none_or(|t| t == section.kind);
        if wanted && call.has_any(&format!("/storage/{}", section.id), MAY_SEE)? {
            all.push(configured(call, &section, &digest));
        }
    }
    Ok(json!(all).into())
}

fn read_configured(call: &Call) -> Answered {
    let name = call.needed("storage")?;
    let text = call.sim.cfs.read("storage.cfg")?.unwrap_or_default();
    match section::parse(&text).into_iter().find(|s| s.id == name) {
        Some(found) => Ok(configured(call, &found, &section::digest(&text)).into()),
        None => Err(Refusal::died(format!("storage '{name}' does not exist"))),
    }
}

/// A storage's figures on a host; one that cannot be activated is inactive and has none.
async fn figures(call: &Call, node: &str, storage: &Storage) -> Value {
    let mut json = json!({
        "type": storage.kind, "content": storage.content.join(","), "enabled": 1, "shared": i32::from(storage.shared),
        "active": 0, "total": 0, "used": 0, "avail": 0,
    });
    if call.sim.storage(node, &storage.name).is_ok()
        && let Ok(room) = call.sim.backend.room(node, storage).await
    {
        let full = call.sim.faults.storage(node, &storage.name) == Some(StorageFault::Full);
        let used = if full { room.total } else { room.used };
        json["active"] = json!(1);
        json["total"] = json!(room.total);
        json["used"] = json!(used);
        json["avail"] = json!(room.total.saturating_sub(used));
    }
    json
}

async fn list(call: &Call) -> Answered {
    let node = call.node()?;
    let wanted: Vec<&str> =
        call.text("content").unwrap_or("").split([',', ' ']).filter(|c| !c.is_empty()).collect();
    let mut all = Vec::new();
    for storage in call.sim.storages()? {
        let here = storage.nodes.is_empty() || storage.nodes.iter().any(|n| n == node);
        let fits = wanted.is_empty() || storage.content.iter().any(|c| wanted.contains(&c.as_str()));
        let named = call.text("storage").is_none_or(|s| s == storage.name);
        if here && fits && named && call.has_any(&format!("/storage/{}", storage.name), MAY_SEE)? {
            let mut json = figures(call, node, &storage).await;
            json["storage"] = json!(storage.name);
            if let (Some(used), Some(total)) = (json["used"].as_f64(), json["total"].as_f64())
                && total > 0.0
            {
                json["used_fraction"] = json!(used / total);
            }
            all.push(json);
        }
    }
    Ok(json!(all).into())
}

fn named(call: &Call) -> Answered<Storage> {
    let name = call.needed("storage")?;
    let missing = || Refusal::died(format!("storage '{name}' does not exist"));
    call.sim.storages()?.into_iter().find(|s| s.name == name).ok_or_else(missing)
}

async fn status(call: &Call) -> Answered {
    let storage = named(call)?;
    Ok(figures(call, call.node()?, &storage).await.into())
}

fn to_json(storage: &Storage, volume: &VolumeInfo) -> Value {
    let mut json = json!({
        "volid": format!("{}:{}", storage.name, volume.name), "content": volume.content, "format": volume.format,
        "size": volume.size, "used": volume.used,
    });
    if let Some(vmid) = volume.vmid {
        json["vmid"] = json!(vmid);
    }
    json
}

/// The backups of a storage that the caller may see, each as its file has it.
fn backups(call: &Call, node: &str, storage: &Storage) -> Answered<Vec<Value>> {
    if !storage.content.iter().any(|c| c == "backup") {
        return Ok(Vec::new());
    }
    let path = format!("/storage/{}", storage.name);
    let (all, some) =
        (call.has_any(&path, &["Datastore.Allocate"])?, call.has_any(&path, &["Datastore.AllocateSpace"])?);
    let mut found = Vec::new();
    for entry in fs::read_dir(call.sim.backend.dump_dir(node, storage)?).into_iter().flatten().flatten() {
        let name = format!("backup/{}", entry.file_name().to_string_lossy());
        let Some(named) = backup::named(&name) else { continue };
        if all || (some && call.has_any(&format!("/vms/{}", named.vmid), &["VM.Backup"])?) {
            let size = entry.metadata().map_or(0, |m| m.len());
            found.push(json!({
                "volid": format!("{}:{name}", storage.name), "content": "backup", "subtype": "lxc",
                "format": named.compression.extension(), "size": size, "ctime": named.at, "vmid": named.vmid,
            }));
        }
    }
    found.sort_by_key(|b| b["volid"].to_string());
    Ok(found)
}

async fn content(call: &Call) -> Answered {
    let node = call.node()?;
    let storage = call.sim.storage(node, call.needed("storage")?)?;
    let vmid = call.integer("vmid");
    let fits = |b: &Value| {
        call.text("content").is_none_or(|c| c == "backup")
            && vmid.is_none_or(|id| b["vmid"].as_i64() == Some(id))
    };
    let mut all: Vec<Value> = call
        .sim
        .backend
        .volumes(node, &storage)
        .await?
        .iter()
        .filter(|v| call.text("content").is_none_or(|c| c == v.content))
        .filter(|v| vmid.is_none_or(|id| v.vmid.map(i64::from) == Some(id)))
        .map(|v| to_json(&storage, v))
        .collect();
    all.extend(backups(call, node, &storage)?.into_iter().filter(fits));
    Ok(json!(all).into())
}

/// The file of a backup that is there.
fn backup_file(call: &Call, node: &str, storage: &Storage, name: &str) -> Answered<Option<PathBuf>> {
    if backup::named(name).is_none() {
        return Ok(None);
    }
    let file = name.strip_prefix("backup/").unwrap_or(name);
    Ok(Some(call.sim.backend.dump_dir(node, storage)?.join(file)))
}

/// The storage and the name of the volume that a call is for: `storage:name`, or the name alone.
fn addressed(call: &Call) -> Answered<(Storage, String)> {
    let volume = call.needed("volume")?;
    let storage = call.needed("storage")?;
    let name = match volume.split_once(':') {
        Some((of, name)) if of == storage => name,
        Some(_) => return Err(Refusal::died("storage ID missmatch")),
        None => volume,
    };
    Ok((call.sim.storage(call.node()?, storage)?, name.to_owned()))
}

async fn volume(call: &Call) -> Answered {
    let (storage, name) = addressed(call)?;
    if !call.has_any(&format!("/storage/{}", storage.name), MAY_SEE)? {
        return Err(Refusal::forbidden(&format!("/storage/{}, Datastore.Audit", storage.name)));
    }
    if let Some(file) = backup_file(call, call.node()?, &storage, &name)? {
        let gone = |_| Refusal::died(format!("volume_size_info on '{}:{name}' failed", storage.name));
        let size = fs::metadata(&file).map_err(gone)?.len();
        let format = backup::named(&name).map_or("tar", |n| n.compression.extension());
        return Ok(json!({ "path": file, "format": format, "size": size, "used": size }).into());
    }
    let found = call.sim.backend.volumes(call.node()?, &storage).await?;
    match found.iter().find(|v| v.name == name) {
        Some(v) => {
            let pool = storage.pool.clone().or(storage.path.as_ref().map(|p| p.display().to_string()));
            let path = format!("/{}/{name}", pool.unwrap_or_default().trim_start_matches('/'));
            Ok(json!({ "path": path, "format": v.format, "size": v.size, "used": v.used }).into())
        }
        None => Err(Refusal::died(format!("volume_size_info on '{}:{name}' failed", storage.name))),
    }
}

async fn delete(call: &Call) -> Answered {
    let (storage, name) = addressed(call)?;
    let node = call.node()?.to_owned();
    if let Some(file) = backup_file(call, &node, &storage, &name)? {
        return delete_backup(call, &node, &storage, &name, file);
    }
    let owner = name.split('-').nth(1).and_then(|v| v.parse::<u32>().ok());
    if !call.has_any(&format!("/storage/{}", storage.name), &["Datastore.Allocate"])? {
        let allowed = owner
            .is_some_and(|vmid| call.has_any(&format!("/vms/{vmid}"), &["VM.Config.Disk"]).unwrap_or(false));
        if !allowed {
            return Err(Refusal::forbidden(&format!("/storage/{}, Datastore.Allocate", storage.name)));
        }
    }
    if let Some(vmid) = owner
        && let Some(on) = call.sim.vmlist()?.get(&vmid)
        && let Ok(conf) = call.sim.load_conf(on, vmid)
    {
        let is_used = mount_points(&conf).iter().any(
            |p| matches!(&p.kind, VolumeKind::Storage { storage: s, volume } if *s == storage.name && *volume == name),
        );
        if is_used {
            return Err(Refusal::died(format!("Cannot remove image, a guest with VMID '{vmid}' exists!")));
        }
    }
    let sim = std::sync::Arc::clone(&call.sim);
    let id = name.clone();
    call.fork(&node.clone(), "imgdel", &format!("{id}@{}", storage.name), |log| async move {
        sim.backend.destroy_volume(&node, &storage, &name).await.map_err(|e| e.to_string())?;
        log.line(&format!("Removed volume '{}:{name}'", storage.name));
        Ok(())
    })
}

fn delete_backup(call: &Call, node: &str, storage: &Storage, name: &str, file: PathBuf) -> Answered {
    let vmid = backup::named(name).map_or(0, |n| n.vmid);
    call.check(&format!("/storage/{}", storage.name), &["Datastore.AllocateSpace"])?;
    call.check(&format!("/vms/{vmid}"), &["VM.Backup"])?;
    let id = format!("{vmid}@{}", storage.name);
    let volid = format!("{}:{name}", storage.name);
    call.fork(node, "imgdel", &id, |log| async move {
        fs::remove_file(&file).map_err(|e| format!("removing archive {} failed: {e}", file.display()))?;
        log.line(&format!("Removed volume '{volid}'"));
        Ok(())
    })
}
