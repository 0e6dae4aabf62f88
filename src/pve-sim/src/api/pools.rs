//! `/pools`.

use serde_json::{Value, json};

use super::Call;
use crate::{
    access::{Pool, UserCfg},
    answer::{Answered, Refusal},
};

pub(super) async fn dispatch(call: &Call) -> Option<Answered> {
    Some(match (call.method.as_str(), call.template.as_str()) {
        ("GET", "/pools") => list(call),
        ("GET", "/pools/{poolid}") => read(call),
        ("POST", "/pools") => create(call).await,
        ("PUT", "/pools" | "/pools/{poolid}") => update(call).await,
        ("DELETE", "/pools" | "/pools/{poolid}") => delete(call).await,
        _ => return None,
    })
}

async fn change(call: &Call, change: impl FnOnce(&mut UserCfg) -> Answered<()>) -> Answered {
    super::access::change(call, change).await
}

fn missing(pool: &str) -> Refusal {
    Refusal::died(format!("pool '{pool}' does not exist"))
}

fn members(call: &Call, pool: &Pool) -> Answered<Vec<Value>> {
    let places = call.sim.vmlist()?;
    let mut all = Vec::new();
    if call.text("type").is_none_or(|t| t == "lxc") {
        for vmid in &pool.vms {
            if let Some(node) = places.get(vmid) {
                let conf = call.sim.load_conf(node, *vmid)?;
                let running = call_status(call, node, *vmid);
                all.push(json!({ "id": format!("lxc/{vmid}"), "type": "lxc", "vmid": vmid, "node": node, "name": conf.name(*vmid), "status": running }));
            }
        }
    }
    if call.text("type").is_none_or(|t| t == "storage") {
        for storage in &pool.storages {
            all.push(json!({ "id": format!("storage/{}/{storage}", call.host), "type": "storage", "storage": storage, "node": call.host }));
        }
    }
    Ok(all)
}

/// What the cluster was told last of a guest.
fn call_status(call: &Call, _node: &str, vmid: u32) -> Value {
    call.sim.told().get(&vmid).and_then(|t| t.status.get("status").cloned()).unwrap_or(json!("unknown"))
}

fn list(call: &Call) -> Answered {
    let users = call.users()?;
    let asked = call.text("poolid");
    let mut all = Vec::new();
    for (id, pool) in &users.pools {
        if asked.is_some_and(|a| a != id) || !call.has_any(&format!("/pool/{id}"), &["Pool.Audit"])? {
            continue;
        }
        let mut json = json!({ "poolid": id });
        if !pool.comment.is_empty() {
            json["comment"] = json!(pool.comment);
        }
        if asked.is_some() {
            json["members"] = json!(members(call, pool)?);
        }
        all.push(json);
    }
    match asked {
        Some(pool) if all.is_empty() => Err(missing(pool)),
        _ => Ok(json!(all).into()),
    }
}

fn read(call: &Call) -> Answered {
    let id = call.needed("poolid")?;
    let users = call.users()?;
    let pool = users.pools.get(id).ok_or_else(|| missing(id))?;
    let mut json = json!({ "members": members(call, pool)? });
    if !pool.comment.is_empty() {
        json["comment"] = json!(pool.comment);
    }
    Ok(json.into())
}

async fn create(call: &Call) -> Answered {
    let id = call.needed("poolid")?.to_owned();
    let comment = call.text("comment").unwrap_or("").to_owned();
    change(call, |users| {
        if users.pools.contains_key(&id) {
            return Err(Refusal::died(format!("create pool failed: pool '{id}' already exists")));
        }
        users.pools.insert(id, Pool { comment, ..Pool::default() });
        Ok(())
    })
    .await
}

async fn update(call: &Call) -> Answered {
    let id = call.needed("poolid")?.to_owned();
    let list = |name: &str| -> Vec<String> {
        let text = call.text(name).unwrap_or("");
        text.split([',', ' ', ';']).filter(|v| !v.is_empty()).map(str::to_owned).collect()
    };
    let (vms, storages, delete) = (list("vms"), list("storage"), call.flag("delete"));
    for vmid in &vms {
        call.check(&format!("/vms/{vmid}"), &["VM.Allocate"])?;
    }
    change(call, |users| {
        let vms: Vec<u32> = vms.iter().filter_map(|v| v.parse().ok()).collect();
        for vmid in &vms {
            let other = users.pool_of(*vmid).map(str::to_owned);
            match other {
                Some(other) if other != id && !call.flag("allow-move") => {
                    return Err(Refusal::died(format!("update pool failed: VM {vmid} belongs already to pool '{other}' and 'allow-move' is not set")));
                }
                Some(other) if other != id => {
                    if let Some(pool) = users.pools.get_mut(&other) {
                        pool.vms.remove(vmid);
                    }
                }
                _ => {}
            }
        }
        let pool = users.pools.get_mut(&id).ok_or_else(|| missing(&id))?;
        if let Some(comment) = call.text("comment") {
            comment.clone_into(&mut pool.comment);
        }
        for vmid in vms {
            if delete { pool.vms.remove(&vmid) } else { pool.vms.insert(vmid) };
        }
        for storage in storages {
            if delete { pool.storages.remove(&storage) } else { pool.storages.insert(storage) };
        }
        Ok(())
    })
    .await
}

async fn delete(call: &Call) -> Answered {
    let id = call.needed("poolid")?.to_owned();
    change(call, |users| {
        let pool = users.pools.get(&id).ok_or_else(|| missing(&id))?;
        if !pool.vms.is_empty() || !pool.storages.is_empty() {
            return Err(Refusal::died(format!("delete pool failed: pool '{id}' is not empty")));
        }
        users.pools.remove(&id);
        Ok(())
    })
    .await
}
