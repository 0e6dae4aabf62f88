//! `/cluster`: resources, status, tasks, options, the next VMID, the log.

use std::{sync::Arc, time::Duration};

use serde_json::{Map, Value, json};

use super::{Call, lxc::vmstatus, nodes, tasks::to_json};
use crate::{
    access::Rights,
    answer::{Answered, Refusal},
    sim::{Sim, Told},
};

/// The range of free VMIDs without `next-id`.
const NEXT_ID: (u32, u32) = (100, 1_000_000);

pub(super) async fn dispatch(call: &Call) -> Option<Answered> {
    Some(match (call.method.as_str(), call.template.as_str()) {
        ("GET", "/cluster/nextid") => next_id(call),
        ("GET", "/cluster/resources") => resources(call).await,
        ("GET", "/cluster/status") => Ok(status(call)),
        ("GET", "/cluster/tasks") => tasks(call),
        ("GET", "/cluster/options") => options(call),
        ("PUT", "/cluster/options") => set_options(call),
        ("GET", "/cluster/log") => log(call),
        _ => return None,
    })
}

fn next_id(call: &Call) -> Answered {
    let taken = call.sim.vmlist()?;
    if let Some(asked) = call.integer("vmid") {
        let asked = u32::try_from(asked).unwrap_or(0);
        if taken.contains_key(&asked) {
            return Err(Refusal::parameter("vmid", format!("VM {asked} already exists")));
        }
        return Ok(json!(asked).into());
    }
    let datacenter = datacenter(&call.sim)?;
    let bound = |key: &str, default: u32| {
        let range = datacenter.get("next-id").and_then(Value::as_str).unwrap_or("");
        range.split(',').find_map(|p| p.strip_prefix(key)?.strip_prefix('=')?.parse().ok()).unwrap_or(default)
    };
    let (lower, upper) = (bound("lower", NEXT_ID.0), bound("upper", NEXT_ID.1));
    match (lower..upper).find(|id| !taken.contains_key(id)) {
        Some(free) => Ok(json!(free).into()),
        None => Err(Refusal::died(format!(
            "unable to get any free VMID in range [{lower}, {}]",
            upper.saturating_sub(1)
        ))),
    }
}

/// datacenter.cfg.
fn datacenter(sim: &Sim) -> Answered<Map<String, Value>> {
    let text = sim.cfs.read("datacenter.cfg")?.unwrap_or_default();
    Ok(text
        .lines()
        .filter_map(|l| l.split_once(':'))
        .map(|(key, value)| (key.trim().to_owned(), json!(value.trim())))
        .collect())
}

fn options(call: &Call) -> Answered {
    let mut all = datacenter(&call.sim)?;
    // Property strings come out taken apart.
    if let Some(range) = all.get("next-id").and_then(Value::as_str).map(str::to_owned) {
        let parts: Map<String, Value> = range
            .split(',')
            .filter_map(|p| p.split_once('='))
            .map(|(k, v)| (k.to_owned(), json!(v)))
            .collect();
        all.insert("next-id".into(), json!(parts));
    }
    if !call.has_any("/", &["Sys.Audit"])? {
        all.retain(|key, _| matches!(key.as_str(), "console" | "tag-style"));
    }
    Ok(Value::Object(all).into())
}

fn set_options(call: &Call) -> Answered {
    let mut all = datacenter(&call.sim)?;
    for (key, value) in &call.given {
        if key != "delete" {
            all.insert(key.clone(), json!(super::plain(value)));
        }
    }
    for key in call.text("delete").unwrap_or("").split([',', ' ', ';']) {
        all.remove(key);
    }
    let text: String = all.iter().map(|(k, v)| format!("{k}: {}\n", super::plain(v))).collect();
    call.sim.cfs.write("datacenter.cfg", &text)?;
    Ok(Value::Null.into())
}

fn status(call: &Call) -> crate::answer::Data {
    let sim = &call.sim;
    let hosts = &sim.config.hosts;
    let mut all = Vec::new();
    if hosts.len() > 1 {
        all.push(json!({
            "id": "cluster", "type": "cluster", "name": sim.config.cluster_name, "version": hosts.len(),
            "nodes": hosts.len(), "quorate": i32::from(sim.cfs.is_quorate()),
        }));
    }
    for (n, host) in hosts.iter().enumerate() {
        all.push(json!({
            "id": format!("node/{}", host.name), "type": "node", "name": host.name, "ip": host.ip, "level": "",
            "nodeid": n + 1, "local": i32::from(host.name == call.host),
            "online": i32::from(!sim.faults.is_offline(&host.name)),
        }));
    }
    json!(all).into()
}

fn tasks(call: &Call) -> Answered {
    let sees_all = call.has_any("/", &["Sys.Audit"])?;
    let mut all = Vec::new();
    for host in &call.sim.config.hosts {
        // A host tells the cluster its running tasks and its latest 25.
        let listed = call.sim.tasks.list(&host.name);
        let mut ended = 0;
        for task in &listed {
            ended += usize::from(task.end.is_some());
            if (task.end.is_none() || ended <= 25) && (sees_all || task.upid.user == call.caller) {
                let mut json = to_json(task, "");
                json["saved"] = json!(if task.end.is_some() { "1" } else { "0" });
                all.push(json);
            }
        }
    }
    Ok(json!(all).into())
}

/// What ended lately, as lines of the cluster's log.
fn log(call: &Call) -> Answered {
    let most = call.integer("max").and_then(|n| usize::try_from(n).ok()).unwrap_or(50);
    let sees_all = call.has_any("/", &["Sys.Syslog"])?;
    let mut all = Vec::new();
    for host in &call.sim.config.hosts {
        for task in call.sim.tasks.list(&host.name) {
            if !sees_all && task.upid.user != call.caller {
                continue;
            }
            let (time, msg) = match &task.end {
                Some((at, status)) => (*at, format!("end task {} {status}", task.upid.text)),
                None => (task.upid.starttime, format!("starting task {}", task.upid.text)),
            };
            all.push(json!({
                "uid": all.len() + 1, "time": time, "msg": msg, "node": host.name, "user": task.upid.user.full(),
                "pid": task.upid.pid, "pri": 6, "tag": "pvedaemon", "id": format!("{}:{time}", host.name),
            }));
        }
    }
    all.sort_by_key(|line| std::cmp::Reverse(line["time"].as_i64()));
    all.truncate(most);
    Ok(json!(all).into())
}

/// Tells the cluster how the CTs are, again and again, as each host's pvestatd does.
pub(crate) async fn tell_statuses(sim: Arc<Sim>, stop: tokio_util::sync::CancellationToken) {
    let every = Duration::from_millis(sim.config.behaviour.resources_ms.max(10));
    loop {
        if let Err(refusal) = tell_now(&sim).await {
            tracing::warn!(message = refusal.message, "the CTs' statuses cannot be told");
        }
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Tells it once.
pub(crate) async fn tell_now(sim: &Sim) -> Answered<()> {
    let list = sim.vmlist()?;
    for (vmid, node) in &list {
        // A lost host tells nothing: what it told last stays.
        if sim.faults.is_offline(node) {
            continue;
        }
        let Some(host) = sim.config.host(node) else { continue };
        let Ok(conf) = sim.load_conf(node, *vmid) else { continue };
        if let Ok(status) = vmstatus(sim, host, *vmid, &conf).await {
            sim.told().insert(*vmid, Told { status });
        }
    }
    sim.told().retain(|vmid, _| list.contains_key(vmid));
    Ok(())
}

async fn resources(call: &Call) -> Answered {
    let sim = &call.sim;
    if sim.config.behaviour.resources_ms == 0 {
        tell_now(sim).await?;
    }
    let kind = call.text("type");
    let wants = |name: &str| kind.is_none_or(|k| k == name);
    let users = call.users()?;
    let rights = Rights::of(&users, &call.caller);
    let mut all = Vec::new();
    if wants("vm") {
        guests(sim, &rights, &users, &mut all)?;
    }
    if wants("node") {
        hosts(sim, &rights, &mut all).await;
    }
    if wants("storage") {
        storages(sim, &rights, &mut all).await?;
    }
    if wants("pool") {
        for pool in users.pools.keys() {
            if rights.has(&format!("/pool/{pool}"), &["Pool.Audit"]) {
                all.push(json!({ "id": format!("/pool/{pool}"), "type": "pool", "pool": pool }));
            }
        }
    }
    if wants("sdn") {
        for host in &sim.config.hosts {
            if rights.has_any("/sdn/zones/localnetwork", &["SDN.Audit"]) {
                all.push(json!({
                    "id": format!("sdn/{}/localnetwork", host.name), "type": "sdn", "node": host.name, "sdn": "localnetwork",
                    "status": "ok",
                }));
            }
        }
    }
    Ok(json!(all).into())
}

fn guests(
    sim: &Sim,
    rights: &Rights<'_>,
    users: &crate::access::UserCfg,
    all: &mut Vec<Value>,
) -> Answered<()> {
    const TOLD: &[&str] = &[
        "name",
        "status",
        "cpu",
        "maxcpu",
        "mem",
        "maxmem",
        "disk",
        "maxdisk",
        "uptime",
        "netin",
        "netout",
        "diskread",
        "diskwrite",
        "template",
        "tags",
        "lock",
    ];
    let told = sim.told().clone();
    for (vmid, node) in sim.vmlist()? {
        if !rights.has(&format!("/vms/{vmid}"), &["VM.Audit"]) {
            continue;
        }
        let mut entry = json!({ "id": format!("lxc/{vmid}"), "type": "lxc", "vmid": vmid, "node": node, "status": "unknown" });
        if let Some(told) = told.get(&vmid)
            && !sim.faults.is_offline(&node)
        {
            for key in TOLD {
                let from = if *key == "maxcpu" { "cpus" } else { key };
                if let Some(value) = told.status.get(from) {
                    entry[*key] = value.clone();
                }
            }
            entry["template"] = told.status.get("template").cloned().unwrap_or(json!(0));
        }
        if let Some(pool) = users.pool_of(vmid) {
            entry["pool"] = json!(pool);
        }
        if let Some(state) = super::ha::state_of(sim, vmid)? {
            entry["hastate"] = json!(state);
        }
        all.push(entry);
    }
    Ok(())
}

async fn hosts(sim: &Sim, rights: &Rights<'_>, all: &mut Vec<Value>) {
    for host in &sim.config.hosts {
        let online = !sim.faults.is_offline(&host.name);
        let status = if online { "online" } else { "offline" };
        let mut entry = json!({ "id": format!("node/{}", host.name), "type": "node", "node": host.name, "status": status });
        if online && rights.has(&format!("/nodes/{}", host.name), &["Sys.Audit"]) {
            entry["cpu"] = json!(0.02);
            entry["maxcpu"] = json!(host.cpus);
            entry["mem"] = json!(nodes::memory_used(sim, host).await);
            entry["maxmem"] = json!(host.memory_mib << 20);
            entry["disk"] = json!(4u64 << 30);
            entry["maxdisk"] = json!(64u64 << 30);
            entry["uptime"] = json!(sim.uptime());
            entry["level"] = json!("");
            entry["cgroup-mode"] = json!(2);
        }
        all.push(entry);
    }
}

async fn storages(sim: &Sim, rights: &Rights<'_>, all: &mut Vec<Value>) -> Answered<()> {
    for storage in sim.storages()? {
        if !rights
            .has_any(&format!("/storage/{}", storage.name), &["Datastore.Audit", "Datastore.AllocateSpace"])
        {
            continue;
        }
        for host in &sim.config.hosts {
            if !storage.nodes.is_empty() && !storage.nodes.contains(&host.name) {
                continue;
            }
            let room = match sim.storage(&host.name, &storage.name) {
                Ok(_) if !sim.faults.is_offline(&host.name) => {
                    sim.backend.room(&host.name, &storage).await.ok()
                }
                _ => None,
            };
            let mut entry = json!({
                "id": format!("storage/{}/{}", host.name, storage.name), "type": "storage", "storage": storage.name,
                "node": host.name, "content": storage.content.join(","), "plugintype": storage.kind,
                "shared": i32::from(storage.shared), "status": if room.is_some() { "available" } else { "unknown" },
            });
            if let Some(room) = room {
                entry["disk"] = json!(room.used);
                entry["maxdisk"] = json!(room.total);
            }
            all.push(entry);
        }
    }
    Ok(())
}
