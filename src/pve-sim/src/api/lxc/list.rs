//! What CTs there are and how they are.

use serde_json::{Value, json};

use super::Call;
use crate::{
    access::Rights,
    answer::Answered,
    backend::{Ct, RunState},
    config::Host,
    guest::{CtConf, mount_points},
    sim::{Sim, now},
};

pub(super) async fn list(call: &Call) -> Answered {
    let node = call.node()?;
    let host = call.sim.host(node)?;
    let users = call.users()?;
    let rights = Rights::of(&users, &call.caller);
    let mut all = Vec::new();
    for (vmid, on) in call.sim.vmlist()? {
        if on != node || !rights.has(&format!("/vms/{vmid}"), &["VM.Audit"]) {
            continue;
        }
        // One that vanishes meanwhile is not listed.
        if let Ok(conf) = call.sim.load_conf(node, vmid) {
            all.push(vmstatus(&call.sim, host, vmid, &conf).await?);
        }
    }
    Ok(json!(all).into())
}

pub(super) async fn current(call: &Call) -> Answered {
    let (node, vmid) = (call.node()?, call.vmid()?);
    let conf = call.sim.load_conf(node, vmid)?;
    let mut status = vmstatus(&call.sim, call.sim.host(node)?, vmid, &conf).await?;
    status["ha"] = super::super::ha::of_guest(&call.sim, vmid)?;
    Ok(status.into())
}

/// PVE::LXC::vmstatus of one CT.
pub(crate) async fn vmstatus(sim: &Sim, host: &Host, vmid: u32, conf: &CtConf) -> Answered<Value> {
    let state = sim.backend.state(&host.name, vmid).await?;
    let number = |key: &str| conf.get(key).and_then(|v| v.parse::<f64>().ok()).filter(|n| *n > 0.0);
    let cpus = number("cpulimit").or_else(|| number("cores")).unwrap_or(f64::from(host.cpus));
    let root = mount_points(conf).into_iter().find(|v| v.key == "rootfs");
    let maxdisk = root.and_then(|v| v.size()).unwrap_or(4 << 30);
    let mut status = json!({
        "vmid": vmid, "type": "lxc", "name": conf.name(vmid), "status": "stopped",
        "cpus": whole(cpus), "maxmem": conf.memory(), "maxswap": conf.swap(), "maxdisk": maxdisk,
        "cpu": 0, "mem": 0, "swap": 0, "disk": 0, "uptime": 0, "netin": 0, "netout": 0, "diskread": 0, "diskwrite": 0,
    });
    for key in ["lock", "tags"] {
        if let Some(value) = conf.get(key) {
            status[key] = json!(value);
        }
    }
    if conf.flag("template") {
        status["template"] = json!(1);
    }
    if let RunState::Running { pid, since, .. } = state {
        let usage = sim.backend.usage(Ct { node: &host.name, vmid, conf }).await?;
        status["status"] = json!("running");
        status["pid"] = json!(pid);
        status["uptime"] = json!((now() - since).max(1));
        status["cpu"] = json!(usage.cpu);
        status["mem"] = json!(usage.memory);
        status["swap"] = json!(usage.swap);
        status["disk"] = json!(usage.disk);
        status["netin"] = json!(usage.net_in);
        status["netout"] = json!(usage.net_out);
        for key in [
            "pressurecpusome",
            "pressureiosome",
            "pressureiofull",
            "pressurememorysome",
            "pressurememoryfull",
        ] {
            status[key] = json!(0.0);
        }
    }
    Ok(status)
}

fn whole(n: f64) -> Value {
    if n.fract() == 0.0 { json!(n as u64) } else { json!(n) }
}

/// Null when the CT is stopped.
pub(super) async fn interfaces(call: &Call) -> Answered {
    let (node, vmid) = (call.node()?, call.vmid()?);
    let conf = call.sim.load_conf(node, vmid)?;
    if !super::is_running(call).await? {
        return Ok(Value::Null.into());
    }
    let found = call.sim.backend.interfaces(Ct { node, vmid, conf: &conf }).await?;
    let all: Vec<Value> = found
        .into_iter()
        .map(|interface| {
            let of = |v4: bool| {
                let found = interface.addresses.iter().find(|(a, _)| a.is_ipv4() == v4);
                found.map(|(address, bits)| format!("{address}/{bits}"))
            };
            let addresses: Vec<Value> = interface
                .addresses
                .iter()
                .map(|(address, bits)| {
                    let kind = if address.is_ipv4() { "inet" } else { "inet6" };
                    json!({ "ip-address": address.to_string(), "ip-address-type": kind, "prefix": bits })
                })
                .collect();
            let mut json = json!({
                "name": interface.name, "hwaddr": interface.mac, "hardware-address": interface.mac, "ip-addresses": addresses,
            });
            if let Some(inet) = of(true) {
                json["inet"] = json!(inet);
            }
            if let Some(inet6) = of(false) {
                json["inet6"] = json!(inet6);
            }
            json
        })
        .collect();
    Ok(json!(all).into())
}
