//! `/cluster/ha`: which guests are managed, and what becomes of requests.
//!
//! A request changes `resources.cfg` and is done by a small manager later, which starts or stops the CT as asked for.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};

use super::Call;
use crate::{
    access::Caller,
    answer::{Answered, Refusal},
    backend::Stop,
    section::{self, Section},
    sim::{Sim, now},
};

const RESOURCES: &str = "ha/resources.cfg";
const RULES: &str = "ha/rules.cfg";

pub(super) async fn dispatch(call: &Call) -> Option<Answered> {
    Some(match (call.method.as_str(), call.template.as_str()) {
        ("GET", "/cluster/ha/resources") => list(call),
        ("POST", "/cluster/ha/resources") => create(call).await,
        ("GET", "/cluster/ha/resources/{sid}") => read(call),
        ("PUT", "/cluster/ha/resources/{sid}") => update(call).await,
        ("DELETE", "/cluster/ha/resources/{sid}") => delete(call).await,
        ("GET", "/cluster/ha/status/current") => current(call),
        ("GET", "/cluster/ha/status/manager_status") => manager(call),
        ("GET", "/cluster/ha/rules") => rules(call),
        ("POST", "/cluster/ha/rules") => create_rule(call),
        ("DELETE", "/cluster/ha/rules/{rule}") => delete_rule(call),
        _ => return None,
    })
}

fn sections(sim: &Sim, file: &str) -> Answered<Vec<Section>> {
    Ok(section::parse(&sim.cfs.read(file)?.unwrap_or_default()))
}

fn vmid_of(section: &Section) -> Option<u32> {
    section.id.parse().ok()
}

fn find(sim: &Sim, vmid: u32) -> Answered<Option<Section>> {
    Ok(sections(sim, RESOURCES)?.into_iter().find(|s| s.kind == "ct" && vmid_of(s) == Some(vmid)))
}

/// PVE::HA::Config::vm_is_ha_managed: configured, and not to be ignored.
pub(super) fn is_managed(sim: &Sim, vmid: u32) -> Answered<bool> {
    Ok(find(sim, vmid)?.is_some_and(|s| s.keys.get("state").is_none_or(|state| state != "ignored")))
}

/// The state of `/cluster/resources`, `None` of a guest that is not managed.
pub(super) fn state_of(sim: &Sim, vmid: u32) -> Answered<Option<String>> {
    Ok(find(sim, vmid)?.map(|s| s.keys.get("state").cloned().unwrap_or_else(|| "started".into())))
}

/// The field `ha` of a guest's status.
pub(super) fn of_guest(sim: &Sim, vmid: u32) -> Answered<Value> {
    Ok(match state_of(sim, vmid)? {
        Some(state) => json!({ "managed": 1, "state": state }),
        None => json!({ "managed": 0 }),
    })
}

async fn change<T>(sim: &Sim, change: impl FnOnce(&mut Vec<Section>) -> Answered<T>) -> Answered<T> {
    let _held = sim.cfs.lock_cfs("ha/resources.cfg", sim.lock_wait()).await?;
    let mut all = sections(sim, RESOURCES)?;
    let done = change(&mut all)?;
    sim.cfs.write(RESOURCES, &section::format(&all))?;
    Ok(done)
}

/// Takes a guest out of the resources and rules.
pub(super) async fn remove_guest(sim: &Sim, vmid: u32) -> Answered<()> {
    change(sim, |all| {
        all.retain(|s| vmid_of(s) != Some(vmid));
        Ok(())
    })
    .await
}

/// Queues a request; the manager does it a moment later.
pub(super) async fn request_state(
    sim: &Arc<Sim>,
    node: &str,
    vmid: u32,
    state: &'static str,
    caller: &Caller,
) -> Answered<()> {
    change(sim, |all| {
        if let Some(section) = all.iter_mut().find(|s| vmid_of(s) == Some(vmid)) {
            section.keys.insert("state".into(), state.into());
        }
        Ok(())
    })
    .await?;
    let (kind, later, node) =
        (if state == "started" { "vzstart" } else { "vzstop" }, Arc::clone(sim), node.to_owned());
    let root = Caller { user: "root@pam".into(), token: None };
    tracing::debug!(vmid, state, by = %caller.full(), "HA request");
    // The manager's round takes a while; its task is root's.
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let (sim, on) = (Arc::clone(&later), node.clone());
        let begun = later.tasks.fork(&node, kind, &vmid.to_string(), &root, |log| async move {
            let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await.map_err(|r| r.message)?;
            if state == "started" {
                super::lxc::start_by_manager(&sim, &on, vmid, &log).await
            } else {
                let how = Stop::Shutdown { seconds: 60, then_kill: true };
                sim.backend.stop(&on, vmid, how, &log).await.map_err(|e| e.to_string())
            }
        });
        if let Err(error) = begun {
            tracing::warn!(vmid, %error, "the HA manager could not begin a task");
        }
    });
    Ok(())
}

fn sid(call: &Call) -> Answered<(String, u32)> {
    let sid = call.needed("sid")?;
    let (kind, id) = sid.split_once(':').unwrap_or(("ct", sid));
    let vmid = id.parse().map_err(|_| Refusal::parameter("sid", format!("invalid sid '{sid}'")))?;
    Ok((kind.to_owned(), vmid))
}

fn to_json(section: &Section) -> Value {
    let mut json = json!({ "sid": format!("{}:{}", section.kind, section.id), "type": section.kind });
    for (key, value) in &section.keys {
        let number = matches!(key.as_str(), "max_restart" | "max_relocate" | "failback" | "auto-rebalance");
        json[key] = match value.parse::<i64>() {
            Ok(n) if number => json!(n),
            _ => json!(value),
        };
    }
    json
}

fn list(call: &Call) -> Answered {
    let digest = section::digest(&call.sim.cfs.read(RESOURCES)?.unwrap_or_default());
    let kind = call.text("type");
    let all: Vec<Value> = sections(&call.sim, RESOURCES)?
        .iter()
        .filter(|s| kind.is_none_or(|k| k == s.kind))
        .map(|s| {
            let mut json = to_json(s);
            json["digest"] = json!(digest);
            json
        })
        .collect();
    Ok(json!(all).into())
}

fn missing(kind: &str, vmid: u32) -> Refusal {
    Refusal::died(format!("no such resource '{kind}:{vmid}'"))
}

fn read(call: &Call) -> Answered {
    let (kind, vmid) = sid(call)?;
    let section = find(&call.sim, vmid)?.ok_or_else(|| missing(&kind, vmid))?;
    let mut json = to_json(&section);
    json["digest"] = json!(section::digest(&call.sim.cfs.read(RESOURCES)?.unwrap_or_default()));
    Ok(json.into())
}

fn set(section: &mut Section, call: &Call) {
    for key in ["state", "comment", "group", "max_restart", "max_relocate", "failback"] {
        if let Some(value) = call.given.get(key) {
            section.keys.insert(key.into(), super::plain(value));
        }
    }
    for key in call.text("delete").unwrap_or("").split([',', ' ', ';']) {
        section.keys.remove(key);
    }
}

async fn create(call: &Call) -> Answered {
    let (kind, vmid) = sid(call)?;
    if !call.sim.vmlist()?.contains_key(&vmid) {
        return Err(Refusal::died(format!("unable to add '{kind}:{vmid}' - no such guest")));
    }
    change(&call.sim, |all| {
        if all.iter().any(|s| vmid_of(s) == Some(vmid)) {
            return Err(Refusal::died(format!("resource ID '{kind}:{vmid}' already defined")));
        }
        let mut section = Section { kind: kind.clone(), id: vmid.to_string(), ..Section::default() };
        section.keys.insert("state".into(), "started".into());
        set(&mut section, call);
        all.push(section);
        Ok(())
    })
    .await?;
    super::nodes::null()
}

async fn update(call: &Call) -> Answered {
    let (kind, vmid) = sid(call)?;
    let node = call.sim.vmlist()?.get(&vmid).cloned();
    change(&call.sim, |all| {
        let section =
            all.iter_mut().find(|s| vmid_of(s) == Some(vmid)).ok_or_else(|| missing(&kind, vmid))?;
        set(section, call);
        Ok(())
    })
    .await?;
    if let Some(node) = node {
        match call.text("state") {
            Some("started" | "enabled") => {
                request_state(&call.sim, &node, vmid, "started", &call.caller).await?;
            }
            Some("stopped" | "disabled") => {
                request_state(&call.sim, &node, vmid, "stopped", &call.caller).await?;
            }
            _ => {}
        }
    }
    super::nodes::null()
}

async fn delete(call: &Call) -> Answered {
    let (kind, vmid) = sid(call)?;
    change(&call.sim, |all| {
        let before = all.len();
        all.retain(|s| vmid_of(s) != Some(vmid));
        if all.len() == before { Err(missing(&kind, vmid)) } else { Ok(()) }
    })
    .await?;
    super::nodes::null()
}

fn current(call: &Call) -> Answered {
    let sim = &call.sim;
    let quorate = i32::from(sim.cfs.is_quorate());
    let first = sim.config.hosts.first().map_or("", |h| h.name.as_str());
    let mut all = vec![
        json!({ "id": "quorum", "type": "quorum", "node": call.host, "quorate": quorate, "status": if quorate == 1 { "OK" } else { "no quorum" } }),
    ];
    let resources = sections(sim, RESOURCES)?;
    if !resources.is_empty() {
        all.push(json!({ "id": "master", "type": "master", "node": first, "status": format!("{first} (active)"), "timestamp": now() }));
        for host in &sim.config.hosts {
            let status = if sim.faults.is_offline(&host.name) { "old timestamp - dead?" } else { "idle" };
            all.push(json!({ "id": format!("lrm:{}", host.name), "type": "lrm", "node": host.name, "status": format!("{} ({status})", host.name), "timestamp": now() }));
        }
    }
    let places = sim.vmlist()?;
    for section in resources {
        let node = vmid_of(&section).and_then(|v| places.get(&v).cloned()).unwrap_or_default();
        let state = section.keys.get("state").cloned().unwrap_or_else(|| "started".into());
        let sid = format!("{}:{}", section.kind, section.id);
        all.push(json!({
            "id": format!("service:{sid}"), "type": "service", "sid": sid, "node": node, "state": state,
            "request_state": state, "crm_state": state, "status": format!("{sid} ({node}, {state})"),
        }));
    }
    Ok(json!(all).into())
}

fn manager(call: &Call) -> Answered {
    let sim = &call.sim;
    let mut nodes = json!({});
    for host in &sim.config.hosts {
        nodes[&host.name] = json!(if sim.faults.is_offline(&host.name) { "unknown" } else { "online" });
    }
    let first = sim.config.hosts.first().map_or("", |h| h.name.as_str());
    // Without HA services nobody is master, and what the last one wrote grows old.
    let has_services = !sections(sim, RESOURCES)?.is_empty();
    let timestamp = if has_services { now() } else { now() - 900 };
    Ok(json!({
        "manager_status": { "master_node": first, "node_status": nodes, "service_status": {}, "timestamp": timestamp },
        "quorum": { "node": call.host, "quorate": i32::from(sim.cfs.is_quorate()) },
        "lrm_status": {},
    })
    .into())
}

fn rules(call: &Call) -> Answered {
    let kind = call.text("type");
    let resource = call.text("resource");
    let digest = section::digest(&call.sim.cfs.read(RULES)?.unwrap_or_default());
    let all: Vec<Value> = sections(&call.sim, RULES)?
        .iter()
        .filter(|s| kind.is_none_or(|k| k == s.kind))
        .filter(|s| {
            resource.is_none_or(|r| s.keys.get("resources").is_some_and(|l| l.split(',').any(|x| x == r)))
        })
        .enumerate()
        .map(|(n, s)| {
            let mut json = json!({ "rule": s.id, "type": s.kind, "order": n + 1, "digest": digest });
            for (key, value) in &s.keys {
                json[key] = json!(value);
            }
            json
        })
        .collect();
    Ok(json!(all).into())
}

fn create_rule(call: &Call) -> Answered {
    let id = call.needed("rule")?.to_owned();
    let mut all = sections(&call.sim, RULES)?;
    if all.iter().any(|s| s.id == id) {
        return Err(Refusal::died(format!("HA rule '{id}' already exists")));
    }
    let mut section = Section { kind: call.needed("type")?.to_owned(), id, ..Section::default() };
    for key in ["resources", "nodes", "affinity", "comment", "disable", "strict"] {
        if let Some(value) = call.given.get(key) {
            section.keys.insert(key.into(), super::plain(value));
        }
    }
    all.push(section);
    call.sim.cfs.write(RULES, &section::format(&all))?;
    super::nodes::null()
}

fn delete_rule(call: &Call) -> Answered {
    let id = call.needed("rule")?;
    let mut all = sections(&call.sim, RULES)?;
    all.retain(|s| s.id != id);
    call.sim.cfs.write(RULES, &section::format(&all))?;
    super::nodes::null()
}
