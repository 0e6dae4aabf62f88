//! `/nodes/{node}/network`: the bridges.

use serde_json::{Value, json};

use super::Call;
use crate::{
    answer::{Answered, Refusal},
    config::Bridge,
};

pub(super) fn dispatch(call: &Call) -> Option<Answered> {
    Some(match (call.method.as_str(), call.template.as_str()) {
        ("GET", "/nodes/{node}/network") => list(call),
        ("GET", "/nodes/{node}/network/{iface}") => one(call),
        _ => return None,
    })
}

fn to_json(bridge: &Bridge) -> Value {
    let mut json = json!({
        "iface": bridge.name, "type": "bridge", "active": 1, "autostart": 1, "bridge_ports": "", "bridge_stp": "off",
        "bridge_fd": "0", "families": ["inet"], "method": "manual", "method6": "manual", "priority": 3,
        "mtu": bridge.mtu,
    });
    if bridge.vlan_aware {
        json["bridge_vlan_aware"] = json!(1);
        json["bridge_vids"] = json!("2-4094");
    }
    if let Some(cidr) = &bridge.cidr {
        let (address, bits) = cidr.split_once('/').unwrap_or((cidr, "24"));
        json["method"] = json!("static");
        json["cidr"] = json!(cidr);
        json["address"] = json!(address);
        json["netmask"] = json!(bits);
    }
    json
}

/// A bridge is seen with any right on its path of the local SDN zone.
fn is_visible(call: &Call, bridge: &Bridge) -> Answered<bool> {
    let path = format!("/sdn/zones/localnetwork/{}", bridge.name);
    Ok(call.has_any(&path, &["SDN.Audit", "SDN.Use"])?
        || call.has_any(&format!("/nodes/{}", call.node()?), &["Sys.Audit", "Sys.Modify"])?)
}

fn list(call: &Call) -> Answered {
    let kind = call.text("type");
    let wanted = matches!(kind, None | Some("bridge" | "any_bridge" | "any_local_bridge" | "include_sdn"));
    let mut all = Vec::new();
    for bridge in &call.sim.config.bridges {
        if wanted && is_visible(call, bridge)? {
            all.push(to_json(bridge));
        }
    }
    Ok(json!(all).into())
}

fn one(call: &Call) -> Answered {
    let name = call.needed("iface")?;
    match call.sim.config.bridges.iter().find(|b| b.name == name) {
        Some(bridge) => {
            let mut json = to_json(bridge);
            if let Some(fields) = json.as_object_mut() {
                fields.remove("iface");
            }
            Ok(json.into())
        }
        None => Err(Refusal::parameter("iface", "interface does not exist")),
    }
}
