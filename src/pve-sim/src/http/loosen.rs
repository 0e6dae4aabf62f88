//! Types in answers: handlers give what the schema says, this makes of it what the real server sends.

use serde_json::Value;

use crate::config::Types;

/// Changes the types of an answer's data.
pub(super) fn loosen(types: Types, template: &str, data: &mut Value) {
    match types {
        Types::Schema => {}
        Types::Strings => strings(data),
        Types::Real => match template {
            "/cluster/nextid" => to_string(data),
            "/nodes/{node}/lxc" => each(data, |ct| field(ct, "vmid")),
            "/nodes/{node}/lxc/{vmid}/interfaces" => each(data, |interface| {
                if let Some(addresses) = interface.get_mut("ip-addresses") {
                    each(addresses, |address| field(address, "prefix"));
                }
            }),
            "/nodes/{node}/network" => each(data, |interface| {
                for name in ["mtu", "priority", "netmask"] {
                    field(interface, name);
                }
            }),
            _ => {}
        },
    }
}

fn each(data: &mut Value, mut change: impl FnMut(&mut Value)) {
    if let Value::Array(list) = data {
        list.iter_mut().for_each(&mut change);
    }
}

fn field(object: &mut Value, name: &str) {
    if let Some(value) = object.get_mut(name) {
        to_string(value);
    }
}

fn to_string(value: &mut Value) {
    if let Value::Number(n) = value {
        *value = Value::from(n.to_string());
    }
}

fn strings(value: &mut Value) {
    match value {
        Value::Number(n) if !n.is_f64() => *value = Value::from(n.to_string()),
        Value::Array(list) => list.iter_mut().for_each(strings),
        Value::Object(map) => map.values_mut().for_each(strings),
        _ => {}
    }
}
