//! Answers against the schema of a call.
//!
//! Perl does not tell numbers from texts, and the real server's answers show it. Taken everywhere, since it does them
//! everywhere: an integer or number may be a string, a boolean may be 0, 1, their strings, an empty string or a JSON
//! boolean, a string may be a number, and null may stand where a list is announced.

use serde_json::{Map, Value};

use super::{Kind, Wrong, request::property, value};
use crate::recorder::without_indices;

/// Where the real server is known to differ from its own schema.
#[derive(Debug)]
pub struct Exception {
    /// The method.
    pub method: &'static str,
    /// The path template.
    pub path: &'static str,
    /// What is forgiven.
    pub kind: Kind,
    /// The place begins with this once list indices are left out, such as `answer.ip-addresses`.
    pub place: &'static str,
    /// What the real server does.
    pub why: &'static str,
}

/// All that is forgiven beside the rules that hold for every answer.
pub const EXCEPTIONS: &[Exception] = &[
    Exception {
        method: "GET",
        path: "/nodes/{node}/lxc/{vmid}/config",
        kind: Kind::UndeclaredField,
        place: "answer.parent",
        why: "a CT with snapshots names the one that it descends from",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/lxc/{vmid}/snapshot",
        kind: Kind::UndeclaredField,
        place: "answer.",
        why: "the entry `current` carries digest and running, an entry may carry snapstate",
    },
    Exception {
        method: "GET",
        path: "/cluster/tasks",
        kind: Kind::UndeclaredField,
        place: "answer.",
        why: "the schema declares the UPID alone, the answer has the task's parts and its status, too",
    },
    Exception {
        method: "GET",
        path: "/storage",
        kind: Kind::UndeclaredField,
        place: "answer.",
        why: "the schema declares the name alone, the answer is the storage's whole configuration",
    },
    Exception {
        method: "GET",
        path: "/cluster/ha/resources",
        kind: Kind::UndeclaredField,
        place: "answer.",
        why: "the schema declares the id alone, the answer is the resource's whole configuration",
    },
    Exception {
        method: "GET",
        path: "/cluster/ha/rules",
        kind: Kind::UndeclaredField,
        place: "answer.",
        why: "the schema declares the name alone, the answer is the whole rule",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/tasks/{upid}/status",
        kind: Kind::UndeclaredField,
        place: "answer.tokenid",
        why: "a task that a token started names it apart from the user",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/storage/{storage}/content",
        kind: Kind::UndeclaredField,
        place: "answer.subtype",
        why: "a backup says what kind of guest it is of",
    },
    Exception {
        method: "GET",
        path: "/nodes",
        kind: Kind::UndeclaredField,
        place: "answer.",
        why: "the entries are those of /cluster/resources, with id, type, disk and maxdisk",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/network",
        kind: Kind::UndeclaredField,
        place: "answer.bridge_fd",
        why: "a bridge shows its forward delay",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/network",
        kind: Kind::UndeclaredField,
        place: "answer.bridge_stp",
        why: "a bridge shows whether it speaks the spanning tree protocol",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/network",
        kind: Kind::UndeclaredField,
        place: "answer.priority",
        why: "the place in the configuration file",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/status",
        kind: Kind::UndeclaredField,
        place: "answer.cpuinfo.",
        why: "flags, hvm, mhz, user_hz and vendor of the processor, too",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/storage/{storage}/content",
        kind: Kind::UndeclaredField,
        place: "answer.content",
        why: "each volume says what kind of content it is",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/lxc",
        kind: Kind::UndeclaredField,
        place: "answer.pid",
        why: "the figures are those that the server's own status daemon keeps",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/lxc",
        kind: Kind::UndeclaredField,
        place: "answer.pressurecpufull",
        why: "the figures are those that the server's own status daemon keeps",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/lxc",
        kind: Kind::UndeclaredField,
        place: "answer.swap",
        why: "the figures are those that the server's own status daemon keeps",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/lxc",
        kind: Kind::UndeclaredField,
        place: "answer.type",
        why: "the figures are those that the server's own status daemon keeps",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/lxc/{vmid}/status/current",
        kind: Kind::UndeclaredField,
        place: "answer.pid",
        why: "the figures are those that the server's own status daemon keeps",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/lxc/{vmid}/status/current",
        kind: Kind::UndeclaredField,
        place: "answer.pressurecpufull",
        why: "the figures are those that the server's own status daemon keeps",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/lxc/{vmid}/status/current",
        kind: Kind::UndeclaredField,
        place: "answer.swap",
        why: "the figures are those that the server's own status daemon keeps",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/lxc/{vmid}/status/current",
        kind: Kind::UndeclaredField,
        place: "answer.type",
        why: "the figures are those that the server's own status daemon keeps",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/lxc/{vmid}/firewall/options",
        kind: Kind::UndeclaredField,
        place: "answer.digest",
        why: "what a change is guarded with",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/lxc/{vmid}/firewall/rules",
        kind: Kind::UndeclaredField,
        place: "answer.digest",
        why: "what a change is guarded with",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/tasks",
        kind: Kind::UndeclaredField,
        place: "answer.tokenid",
        why: "a task that a token started names it apart from the user",
    },
    Exception {
        method: "GET",
        path: "/nodes/{node}/network/{iface}",
        kind: Kind::UndeclaredField,
        place: "answer.",
        why: "the schema declares type and method alone, the answer is the whole interface",
    },
];

pub(super) fn is_excepted(method: &str, path: &str, wrong: &Wrong) -> bool {
    let place = without_indices(&wrong.place);
    EXCEPTIONS
        .iter()
        .any(|e| e.method == method && e.path == path && e.kind == wrong.kind && place.starts_with(e.place))
}

pub(super) fn check(schema: &Value, data: &Value) -> Vec<Wrong> {
    node(schema, data, "answer")
}

fn node(schema: &Value, data: &Value, place: &str) -> Vec<Wrong> {
    if let Some(choices) = schema["oneOf"].as_array() {
        let mut tried: Vec<_> = choices.iter().map(|c| node(c, data, place)).collect();
        tried.sort_by_key(Vec::len);
        return tried.into_iter().next().unwrap_or_default();
    }
    let wrong_type = |wanted: &str| {
        vec![Wrong::new(Kind::WrongType, place, format!("{} where {wanted} is announced", kind_of(data)))]
    };
    match (schema["type"].as_str().unwrap_or("any"), data) {
        ("any", _) | ("null" | "array", Value::Null) => Vec::new(),
        ("null", _) => wrong_type("nothing"),
        ("array", Value::Array(items)) => {
            let each = items.iter().enumerate();
            each.flat_map(|(i, item)| node(&schema["items"], item, &format!("{place}[{i}]"))).collect()
        }
        ("object", Value::Object(fields)) => object(schema, fields, place),
        ("array", _) => wrong_type("a list"),
        ("object", _) => wrong_type("an object"),
        ("boolean", Value::Bool(_)) => Vec::new(),
        ("boolean", Value::String(s)) if s.is_empty() => Vec::new(),
        ("boolean", Value::Number(n)) if !matches!(n.as_i64(), Some(0 | 1)) => wrong_type("a boolean"),
        ("integer", Value::Number(n)) if n.is_f64() && n.as_f64().is_some_and(|f| f.fract() != 0.0) => {
            wrong_type("an integer")
        }
        (_, Value::Number(n)) => value::check(schema, &number_text(n), place),
        (_, Value::String(s)) => value::check(schema, s, place),
        (wanted, _) => wrong_type(wanted),
    }
}

/// A number as Perl prints it: without the fraction where there is none.
fn number_text(number: &serde_json::Number) -> String {
    match number.as_f64() {
        Some(f) if number.is_f64() && f.fract() == 0.0 => format!("{f:.0}"),
        _ => number.to_string(),
    }
}

fn object(schema: &Value, fields: &Map<String, Value>, place: &str) -> Vec<Wrong> {
    let none = Map::new();
    let properties = schema["properties"].as_object().unwrap_or(&none);
    // Without any declared field the schema says nothing on what the object holds.
    let open = properties.is_empty() || value::truthy(&schema["additionalProperties"]);
    let mut wrong = Vec::new();
    for (name, data) in fields {
        let place = format!("{place}.{name}");
        match property(properties, name) {
            Some(inner) => wrong.extend(node(inner, data, &place)),
            None if open => {}
            None => wrong.push(Wrong::new(Kind::UndeclaredField, place, "the schema has no such field")),
        }
    }
    for (name, inner) in properties {
        let optional = value::truthy(&inner["optional"]) || name.ends_with("[n]");
        if !optional && !fields.contains_key(name) {
            wrong.push(Wrong::new(Kind::MissingField, format!("{place}.{name}"), "it is missing"));
        }
    }
    wrong
}

fn kind_of(data: &Value) -> &'static str {
    match data {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
