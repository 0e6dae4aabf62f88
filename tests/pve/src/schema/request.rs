//! The parameters of a request against the schema of a call.

use serde_json::{Map, Value};

use super::{Kind, Wrong, value};

/// A JSON body as parameters: the server takes it in place of a form. Booleans become 1 and 0, a list is one parameter
/// per item, null is left out.
#[must_use]
pub fn params_of_json(body: &Value) -> Vec<(String, String)> {
    let mut parameters = Vec::new();
    for (name, value) in body.as_object().unwrap_or(&Map::new()) {
        let items = match value {
            Value::Array(items) => items.as_slice(),
            other => std::slice::from_ref(other),
        };
        for item in items {
            match item {
                Value::Null => {}
                Value::Bool(b) => parameters.push((name.clone(), u8::from(*b).to_string())),
                Value::String(s) => parameters.push((name.clone(), s.clone())),
                other => parameters.push((name.clone(), other.to_string())),
            }
        }
    }
    parameters
}

pub(super) fn check(schema: &Value, given: &[(String, String)]) -> Vec<Wrong> {
    let none = Map::new();
    let properties = schema["properties"].as_object().unwrap_or(&none);
    let mut wrong = Vec::new();
    for (i, (name, text)) in given.iter().enumerate() {
        let place = format!("parameter {name}");
        let Some(property) = property(properties, name) else {
            if !value::truthy(&schema["additionalProperties"]) {
                wrong.push(Wrong::new(Kind::UnknownParameter, place, "the call has no such parameter"));
            }
            continue;
        };
        if property["type"] == "array" {
            wrong.extend(value::check(&property["items"], text, &place));
            continue;
        }
        if given[..i].iter().any(|(earlier, _)| earlier == name) {
            wrong.push(Wrong::new(Kind::WrongFormat, place.as_str(), "it was given twice"));
        }
        wrong.extend(value::check(property, text, &place));
        if let Some(other) = property["requires"].as_str()
            && !given.iter().any(|(n, _)| n == other)
        {
            wrong.push(Wrong::new(Kind::MissingCompanion, place, format!("it needs {other} beside it")));
        }
    }
    for (name, property) in properties {
        let optional = value::truthy(&property["optional"]) || name.ends_with("[n]");
        if !optional && !given.iter().any(|(n, _)| n == name) {
            wrong.push(Wrong::new(Kind::MissingParameter, format!("parameter {name}"), "it is missing"));
        }
    }
    wrong
}

/// The schema of a property; `net[n]` stands for `net0`, `net1`, ….
pub(super) fn property<'a>(properties: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    if let Some(found) = properties.get(name) {
        return Some(found);
    }
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let number = &name[stem.len()..];
    let plain = number == "0" || (!number.is_empty() && !number.starts_with('0'));
    if plain { properties.get(&format!("{stem}[n]")) } else { None }
}
