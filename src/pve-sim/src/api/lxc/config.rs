//! Reading and changing a CT's config. A change re-serialises the whole file.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{
    Call, check_lock,
    create::complete_net,
    refusals::{Changes, check_changes},
    text,
};
use crate::{
    answer::{Answered, Refusal},
    api::plain,
    backend::Ct,
    guest::{CtConf, Keys, is_option},
};

/// Options that a running CT takes at once (PVE::LXC::Config); all others wait in `[pve:pending]`.
const AT_ONCE: &[&str] = &[
    "description",
    "onboot",
    "startup",
    "protection",
    "hookscript",
    "cores",
    "tags",
    "lock",
    "memory",
    "swap",
    "cpulimit",
    "cpuunits",
    "net",
    "mp",
    "hostname",
    "nameserver",
    "searchdomain",
];

pub(super) fn read(call: &Call) -> Answered {
    let (node, vmid) = (call.node()?, call.vmid()?);
    let mut conf = call.sim.load_conf(node, vmid)?;
    let digest = conf.digest.clone();
    let keys: Keys = match call.text("snapshot") {
        Some(name) => conf
            .snapshots
            .get(name)
            .cloned()
            .ok_or_else(|| Refusal::died(format!("snapshot '{name}' does not exist")))?,
        None => {
            if !call.flag("current") {
                conf.apply_pending();
            }
            conf.main
        }
    };
    let mut json = keys.to_json();
    json["digest"] = json!(digest);
    Ok(json.into())
}

pub(super) fn pending(call: &Call) -> Answered {
    let conf = call.sim.load_conf(call.node()?, call.vmid()?)?;
    let deletes = conf.pending_deletes();
    let mut all: Vec<Value> = Vec::new();
    for (key, value) in &conf.main.values {
        let mut line = json!({ "key": key, "value": value });
        if let Some(pending) = conf.pending.values.get(key) {
            line["pending"] = json!(pending);
        }
        if let Some((_, force)) = deletes.iter().find(|(k, _)| k == key) {
            line["delete"] = json!(1 + i32::from(*force));
        }
        all.push(line);
    }
    if !conf.main.description.is_empty() {
        all.push(json!({ "key": "description", "value": conf.main.description }));
    }
    for (key, value) in &conf.pending.values {
        if key != "delete" && !conf.main.values.contains_key(key) {
            all.push(json!({ "key": key, "pending": value }));
        }
    }
    all.push(json!({ "key": "digest", "value": conf.digest }));
    Ok(json!(all).into())
}

/// What a change asks for.
struct Update {
    set: Changes,
    description: Option<String>,
    revert: Vec<String>,
    digest: Option<String>,
}

fn split(list: &str) -> impl Iterator<Item = String> + '_ {
    list.split([',', ';', ' ', '\0']).filter(|k| !k.is_empty()).map(str::to_owned)
}

fn parse(call: &Call) -> Answered<Update> {
    let mut update = Update { set: Changes::new(), description: None, revert: vec![], digest: None };
    for (name, value) in &call.given {
        match name.as_str() {
            "node" | "vmid" | "delete" => {}
            "digest" => update.digest = Some(plain(value)),
            "revert" => update.revert = split(&plain(value)).collect(),
            "description" => update.description = Some(plain(value)),
            _ => {
                let mut value = plain(value);
                if name.starts_with("net") {
                    complete_net(&mut value);
                }
                update.set.insert(name.clone(), Some(value));
            }
        }
    }
    for key in split(call.text("delete").unwrap_or("")) {
        if update.set.contains_key(&key) {
            return Err(Refusal::parameter(
                "delete",
                format!("you can't use '-{key}' and -delete {key}' at the same time"),
            ));
        }
        if !is_option(&call.sim.schema, &key) {
            return Err(Refusal::parameter("delete", format!("unknown option '{key}'")));
        }
        if key == "rootfs" || key == "unprivileged" {
            return Err(Refusal::died(format!("unable to delete required option '{key}'")));
        }
        update.set.insert(key, None);
    }
    if update.set.is_empty() && update.description.is_none() && update.revert.is_empty() {
        return Err(Refusal::died("no options specified"));
    }
    Ok(update)
}

pub(super) async fn update(call: &Call) -> Answered {
    let (node, vmid) = (call.node()?, call.vmid()?);
    let update = parse(call)?;
    let sim = Arc::clone(&call.sim);
    let before = sim.load_conf(node, vmid)?;
    let mut asked = update.set.clone();
    if let Some(description) = &update.description {
        asked.insert("description".into(), Some(description.clone()));
    }
    check_changes(call, vmid, None, &before, &asked, before.flag("unprivileged"))?;

    let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await?;
    let mut conf = sim.load_conf(node, vmid)?;
    check_lock(&conf).map_err(Refusal::died)?;
    if update.digest.as_ref().is_some_and(|d| *d != conf.digest) {
        return Err(Refusal::died(
            "detected modified configuration - file changed by other user? Try again.",
        ));
    }
    let running = sim.backend.state(node, vmid).await?.is_running();
    apply(&mut conf, update, running);
    sim.write_conf(node, vmid, &conf)?;
    if running {
        sim.backend.reconfigure(Ct { node, vmid, conf: &conf }).await?;
    }
    Ok(Value::Null.into())
}

fn apply(conf: &mut CtConf, update: Update, running: bool) {
    for key in &update.revert {
        conf.pending.values.remove(key);
    }
    if !update.revert.is_empty() {
        let left: Vec<String> = conf
            .pending_deletes()
            .into_iter()
            .filter(|(key, _)| !update.revert.contains(key))
            .map(|(key, _)| key)
            .collect();
        set_deletes(conf, &left);
    }
    match update.set.get("description") {
        Some(None) => conf.main.description.clear(),
        _ => {
            if let Some(text) = &update.description {
                conf.main.description = if text.is_empty() {
                    String::new()
                } else {
                    format!("{}\n", text.trim_end_matches('\n'))
                };
            }
        }
    }
    for (key, value) in update.set.into_iter().filter(|(k, _)| k != "description") {
        let stem = key.trim_end_matches(|c: char| c.is_ascii_digit());
        let at_once = !running || AT_ONCE.contains(&stem) || AT_ONCE.contains(&key.as_str());
        match (value, at_once) {
            (Some(value), true) => {
                conf.pending.values.remove(&key);
                conf.main.values.insert(key, value);
            }
            (None, true) => {
                conf.pending.values.remove(&key);
                conf.main.values.remove(&key);
            }
            (Some(value), false) => {
                conf.pending.values.insert(key, value);
            }
            (None, false) => {
                let mut deletes: Vec<String> = conf.pending_deletes().into_iter().map(|(k, _)| k).collect();
                if !deletes.contains(&key) {
                    deletes.push(key);
                }
                set_deletes(conf, &deletes);
            }
        }
    }
}

fn set_deletes(conf: &mut CtConf, keys: &[String]) {
    if keys.is_empty() {
        conf.pending.values.remove("delete");
    } else {
        conf.pending.values.insert("delete".into(), keys.join(","));
    }
}

/// Grows a volume: the size in the config, and in the storage what the back end knows of it.
pub(super) async fn resize(call: &Call) -> Answered {
    let (node, vmid) = (call.node()?.to_owned(), call.vmid()?);
    let disk = call.needed("disk")?.to_owned();
    let size = call.needed("size")?.to_owned();
    call.sim.load_conf(&node, vmid)?;
    let sim = Arc::clone(&call.sim);
    call.fork(&node.clone(), "resize", &vmid.to_string(), |_| async move {
        let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await.map_err(text)?;
        let mut conf = sim.load_conf(&node, vmid).map_err(text)?;
        check_lock(&conf)?;
        let value = conf.get(&disk).ok_or_else(|| format!("no such disk '{disk}'"))?.to_owned();
        let volume =
            crate::guest::Volume::parse(&disk, &value).ok_or_else(|| format!("no such disk '{disk}'"))?;
        let old = volume.size().unwrap_or(0);
        let asked = crate::guest::size_bytes(size.trim_start_matches('+')).ok_or("invalid size")?;
        let new = if size.starts_with('+') { old + asked } else { asked };
        if new < old {
            return Err("unable to shrink disk size".into());
        }
        let kept: Vec<&str> = value.split(',').filter(|p| !p.starts_with("size=")).collect();
        let written =
            if new % (1 << 30) == 0 { format!("{}G", new >> 30) } else { format!("{}M", new >> 20) };
        conf.main.values.insert(disk, format!("{},size={written}", kept.join(",")));
        sim.write_conf(&node, vmid, &conf).map_err(text)
    })
}
