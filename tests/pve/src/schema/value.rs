//! One text against the schema of one value: type, bounds, enumeration, pattern, format, and property strings
//! (`name=eth0,bridge=vmbr0`).

use serde_json::{Map, Value};

use super::{Kind, Wrong, format, pattern};

/// A truth value of the schema language: `1`, `"1"` or `true`.
pub(super) fn truthy(value: &Value) -> bool {
    match value {
        Value::Bool(b) => *b,
        Value::Number(n) => n.as_f64() != Some(0.0),
        Value::String(s) => !matches!(s.as_str(), "" | "0" | "false"),
        _ => false,
    }
}

/// A number of the schema language, which may be written as a string.
fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.parse().ok())
}

pub(super) fn is_integer(text: &str) -> bool {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
}

pub(super) fn is_number(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b)) && text.parse::<f64>().is_ok()
}

/// Checks a text that stands for one value. `place` is where it stands.
pub(super) fn check(schema: &Value, text: &str, place: &str) -> Vec<Wrong> {
    let one = |kind, reason: String| vec![Wrong::new(kind, place, reason)];
    match schema["type"].as_str().unwrap_or("string") {
        "integer" if !is_integer(text) => return one(Kind::WrongType, format!("{text:?} is no integer")),
        "number" if !is_number(text) => return one(Kind::WrongType, format!("{text:?} is no number")),
        "boolean" => {
            let known = ["1", "on", "yes", "true", "0", "off", "no", "false"];
            let fits = known.iter().any(|k| text.eq_ignore_ascii_case(k));
            return if fits { Vec::new() } else { one(Kind::WrongType, format!("{text:?} is no boolean")) };
        }
        "null" => return one(Kind::WrongType, "nothing may be here".to_owned()),
        _ => {}
    }
    let mut wrong = Vec::new();
    if matches!(schema["type"].as_str(), Some("integer" | "number")) {
        wrong.extend(bounds(schema, text, place));
    }
    wrong.extend(text_rules(schema, text, place));
    match &schema["format"] {
        Value::String(name) => {
            if let Err(reason) = format::check(name, text) {
                wrong.push(Wrong::new(Kind::WrongFormat, place, reason));
            }
        }
        Value::Object(properties) => wrong.extend(property_string(properties, text, place)),
        _ => {}
    }
    wrong
}

fn bounds(schema: &Value, text: &str, place: &str) -> Vec<Wrong> {
    let mut wrong = Vec::new();
    let value = text.parse::<f64>().unwrap_or_default();
    if let Some(minimum) = number(&schema["minimum"]).filter(|m| value < *m) {
        wrong.push(Wrong::new(Kind::OutOfRange, place, format!("{text} is below the minimum {minimum}")));
    }
    if let Some(maximum) = number(&schema["maximum"]).filter(|m| value > *m) {
        wrong.push(Wrong::new(Kind::OutOfRange, place, format!("{text} is above the maximum {maximum}")));
    }
    wrong
}

fn text_rules(schema: &Value, text: &str, place: &str) -> Vec<Wrong> {
    let mut wrong = Vec::new();
    let length = text.chars().count() as u64;
    if let Some(max) = schema["maxLength"].as_u64().filter(|m| length > *m) {
        wrong.push(Wrong::new(
            Kind::OutOfRange,
            place,
            format!("{length} characters, at most {max} are allowed"),
        ));
    }
    if let Some(min) = schema["minLength"].as_u64().filter(|m| length < *m) {
        wrong.push(Wrong::new(
            Kind::OutOfRange,
            place,
            format!("{length} characters, at least {min} are needed"),
        ));
    }
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed
            .iter()
            .any(|a| a.as_str() == Some(text) || a.as_i64().is_some_and(|n| text.parse() == Ok(n)))
    {
        wrong.push(Wrong::new(Kind::NotInEnum, place, format!("{text:?} is not one of the values allowed")));
    }
    if let Some(wanted) = schema["pattern"].as_str()
        && !pattern::matches(wanted, text)
    {
        wrong.push(Wrong::new(Kind::WrongFormat, place, format!("{text:?} does not match {wanted}")));
    }
    wrong
}

/// `key=value,…`, where the value of the default key may stand alone; an alias stands for another key.
fn property_string(properties: &Map<String, Value>, text: &str, place: &str) -> Vec<Wrong> {
    let mut wrong = Vec::new();
    let mut seen: Vec<&str> = Vec::new();
    let default = properties.iter().find(|(_, s)| truthy(&s["default_key"])).map(|(k, _)| k.as_str());
    for part in text.split(',').filter(|p| !p.trim().is_empty()) {
        let (key, value) = match part.split_once('=') {
            Some((key, value)) => (key.trim(), value),
            None => match default {
                Some(key) => (key, part),
                None => {
                    wrong.push(Wrong::new(Kind::WrongFormat, place, format!("{part:?} has no key")));
                    continue;
                }
            },
        };
        let Some((mut name, mut schema)) = properties.get_key_value(key) else {
            let reason = format!("there is no key {key:?}");
            wrong.push(Wrong::new(Kind::UnknownParameter, format!("{place}.{key}"), reason));
            continue;
        };
        if let Some(target) = schema["alias"].as_str().and_then(|a| properties.get_key_value(a)) {
            (name, schema) = target;
        }
        if seen.contains(&name.as_str()) {
            wrong.push(Wrong::new(Kind::WrongFormat, format!("{place}.{name}"), "it stands there twice"));
        }
        seen.push(name);
        wrong.extend(check(schema, value, &format!("{place}.{name}")));
    }
    for (name, schema) in properties {
        if !truthy(&schema["optional"]) && schema["alias"].is_null() && !seen.contains(&name.as_str()) {
            wrong.push(Wrong::new(Kind::MissingParameter, format!("{place}.{name}"), "it is missing"));
        }
    }
    wrong
}
