//! `/version`, `/nodes` and what a host tells of itself.

use serde_json::{Value, json};

use super::Call;
use crate::{
    answer::{Answered, Data},
    config::Host,
    sim::{Sim, now},
};

/// The memory that the host itself uses, in MiB.
const OWN_MEMORY_MIB: u64 = 1536;

pub(super) async fn dispatch(call: &Call) -> Option<Answered> {
    Some(match (call.method.as_str(), call.template.as_str()) {
        ("GET", "/nodes") => list(call).await,
        ("GET", "/nodes/{node}/version") => version(call),
        ("GET", "/nodes/{node}/status") => status(call).await,
        ("GET", "/nodes/{node}/time") => {
            Ok(json!({ "time": now(), "localtime": now(), "timezone": "UTC" }).into())
        }
        ("GET", "/nodes/{node}/dns") => Ok(json!({ "search": "example.test", "dns1": "10.10.0.1" }).into()),
        ("POST", "/nodes/{node}/stopall") => super::lxc::stop_all(call).await,
        _ => return None,
    })
}

pub(super) fn version(call: &Call) -> Answered<Data> {
    let known = &call.sim.config.version;
    let told = call.sim.faults.conditions().version.unwrap_or_else(|| known.version.clone());
    let release: String = told.split('.').take(2).collect::<Vec<_>>().join(".");
    Ok(json!({ "version": told, "release": release, "repoid": known.repoid }).into())
}

/// Memory that a host uses: its own and its running CTs'.
pub(super) async fn memory_used(sim: &Sim, host: &Host) -> u64 {
    let mut used = OWN_MEMORY_MIB << 20;
    for (vmid, node) in sim.vmlist().unwrap_or_default() {
        if node != host.name {
            continue;
        }
        let running = sim.backend.state(&node, vmid).await.is_ok_and(crate::backend::RunState::is_running);
        if let Ok(conf) = sim.load_conf(&node, vmid)
            && running
        {
            let ct = crate::backend::Ct { node: &node, vmid, conf: &conf };
            used += sim.backend.usage(ct).await.map_or(0, |u| u.memory);
        }
    }
    used.min(host.memory_mib << 20)
}

async fn list(call: &Call) -> Answered {
    let mut all = Vec::new();
    for host in &call.sim.config.hosts {
        let mut node = json!({
            "node": host.name, "id": format!("node/{}", host.name), "type": "node", "level": "",
            "ssl_fingerprint": call.sim.fingerprint(&host.name),
        });
        if call.sim.faults.is_offline(&host.name) {
            node["status"] = json!("offline");
        } else {
            node["status"] = json!("online");
            if call.has_any(&format!("/nodes/{}", host.name), &["Sys.Audit"])? {
                let used = memory_used(&call.sim, host).await;
                node["cpu"] = json!(0.02);
                node["maxcpu"] = json!(host.cpus);
                node["mem"] = json!(used);
                node["maxmem"] = json!(host.memory_mib << 20);
                node["disk"] = json!(4u64 << 30);
                node["maxdisk"] = json!(64u64 << 30);
                node["uptime"] = json!(call.sim.uptime());
            }
        }
        all.push(node);
    }
    Ok(json!(all).into())
}

async fn status(call: &Call) -> Answered {
    let host = call.sim.host(call.node()?)?;
    let (total, used) = (host.memory_mib << 20, memory_used(&call.sim, host).await);
    let version = &call.sim.config.version.version;
    let (disk, disk_used) = (64u64 << 30, 4u64 << 30);
    Ok(json!({
        "boot-info": { "mode": "efi", "secureboot": 0 },
        "cpu": 0.02,
        "cpuinfo": {
            "model": "Simulated CPU", "sockets": 1, "cores": host.cpus, "cpus": host.cpus, "mhz": "2400.000",
            "flags": "fpu", "hvm": "1", "user_hz": 100,
        },
        "current-kernel": {
            "sysname": "Linux", "release": "6.17.2-1-pve", "version": "#1 SMP PREEMPT_DYNAMIC", "machine": "x86_64",
        },
        "kversion": "Linux 6.17.2-1-pve #1 SMP PREEMPT_DYNAMIC",
        "idle": 0, "wait": 0,
        "ksm": { "shared": 0 },
        "loadavg": ["0.10", "0.12", "0.09"],
        "memory": { "total": total, "used": used, "free": total - used, "available": total - used },
        "pveversion": format!("pve-manager/{version}/{}", call.sim.config.version.repoid),
        "rootfs": { "total": disk, "used": disk_used, "free": disk - disk_used, "avail": disk - disk_used },
        "swap": { "total": 0, "used": 0, "free": 0 },
        "uptime": call.sim.uptime(),
    })
    .into())
}

/// Nothing to tell.
pub(super) fn null() -> Answered {
    Ok(Value::Null.into())
}
