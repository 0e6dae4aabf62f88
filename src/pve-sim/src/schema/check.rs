//! Checks parameters as PVE::JSONSchema::validate does, in its words.

use std::collections::BTreeMap;

use regex::Regex;
use serde_json::{Map, Value};

use super::{Method, format};
use crate::answer::{Answered, Refusal};

/// The longest value that a pattern is tried on.
const PATTERN_MAX: usize = 64 * 1024;

/// Checks the parameters of a call. Values of known integer and boolean parameters come out as numbers (booleans 0/1).
pub(crate) fn check_parameters(method: &Method, given: Map<String, Value>) -> Answered<Map<String, Value>> {
    let mut errors = BTreeMap::new();
    let mut checked = Map::new();
    for (name, value) in given {
        match method.properties.get(&name) {
            Some(property) => match check_value(&value, property) {
                Ok(value) => {
                    if let Some(needed) = property.get("requires").and_then(Value::as_str) {
                        // Looked at again below, when all are known.
                        checked.entry(format!("\0{name}")).or_insert_with(|| needed.into());
                    }
                    checked.insert(name, value);
                }
                Err(why) => {
                    errors.insert(name, why);
                }
            },
            None if method.closed => {
                errors.insert(
                    name,
                    "property is not defined in schema and the schema does not allow additional properties"
                        .into(),
                );
            }
            None => {
                checked.insert(name, value);
            }
        }
    }
    let requirements: Vec<(String, String)> = checked
        .iter()
        .filter_map(|(k, v)| Some((k.strip_prefix('\0')?.to_owned(), v.as_str()?.to_owned())))
        .collect();
    checked.retain(|k, _| !k.starts_with('\0'));
    for (name, needed) in requirements {
        if !checked.contains_key(&needed) && !errors.contains_key(&needed) {
            errors.insert(needed, format!("missing property - '{name}' requires this property"));
        }
    }
    for (name, property) in &method.properties {
        let optional = property.get("optional").is_some_and(|v| v == 1);
        if !optional && !checked.contains_key(name) && !errors.contains_key(name) {
            errors.insert(name.clone(), "property is missing and it is not optional".into());
        }
    }
    if errors.is_empty() { Ok(checked) } else { Err(Refusal::parameters(errors)) }
}

/// Checks one value; the value comes out in the form that handlers read.
pub(super) fn check_value(value: &Value, property: &Value) -> Result<Value, String> {
    let text = match value {
        Value::String(s) => s.clone(),
        Value::Number(n) => n.to_string(),
        Value::Bool(b) => i32::from(*b).to_string(),
        Value::Null => String::new(),
        Value::Array(_) | Value::Object(_) => return Err("type check ('string') failed".into()),
    };
    let kind = property.get("type").and_then(Value::as_str).unwrap_or("string");
    let out = match kind {
        "boolean" => Value::from(
            parse_boolean(&text).ok_or_else(|| format!("type check ('boolean') failed - got '{text}'"))?,
        ),
        "integer" => Value::from(
            text.parse::<i64>().map_err(|_| format!("type check ('integer') failed - got '{text}'"))?,
        ),
        "number" => {
            text.parse::<f64>()
                .ok()
                .filter(|n| n.is_finite())
                .ok_or_else(|| format!("type check ('number') failed - got '{text}'"))?;
            Value::from(text.clone())
        }
        _ => Value::from(text.clone()),
    };
    check_bounds(&text, kind, property)?;
    if kind == "string" {
        match property.get("format") {
            Some(Value::String(name)) => {
                format::check(name, &text).map_err(|why| format!("invalid format - {why}"))?;
            }
            Some(Value::Object(parts)) => {
                format::property_string(&text, parts)
                    .map_err(|why| format!("invalid format - format error\n{why}"))?;
            }
            _ => {}
        }
    }
    Ok(out)
}

fn check_bounds(text: &str, kind: &str, property: &Value) -> Result<(), String> {
    let number = |key: &str| {
        let v = property.get(key)?;
        v.as_f64().or_else(|| v.as_str()?.parse().ok())
    };
    if matches!(kind, "integer" | "number") {
        let n: f64 = text.parse().unwrap_or(0.0);
        if let Some(least) = number("minimum")
            && n < least
        {
            return Err(format!("value must have a minimum value of {least}"));
        }
        if let Some(most) = number("maximum")
            && n > most
        {
            return Err(format!("value must have a maximum value of {most}"));
        }
    }
    let length = text.chars().count() as f64;
    if let Some(most) = number("maxLength")
        && length > most
    {
        return Err(format!("value may only be {most} characters long"));
    }
    if let Some(least) = number("minLength")
        && length < least
    {
        return Err(format!("value must be at least {least} characters long"));
    }
    if let Some(Value::Array(allowed)) = property.get("enum")
        && !allowed.iter().any(|v| v.as_str() == Some(text))
    {
        let names: Vec<&str> = allowed.iter().filter_map(Value::as_str).collect();
        return Err(format!(
            "value '{text}' does not have a value in the enumeration '{}'",
            names.join(", ")
        ));
    }
    if let Some(pattern) = property.get("pattern").and_then(Value::as_str)
        && (text.len() > PATTERN_MAX || !matches_pattern(pattern, text))
    {
        return Err("value does not match the regex pattern".into());
    }
    Ok(())
}

/// Perl's `(?^:…)` is `(?:…)` elsewhere, and so on. A pattern that cannot be understood lets nothing through.
fn matches_pattern(pattern: &str, text: &str) -> bool {
    Regex::new(&format!("^(?:{})$", translate(pattern))).is_ok_and(|regex| regex.is_match(text))
}

fn translate(pattern: &str) -> String {
    pattern.replace("(?^", "(?").replace("\\0", "\\x00").replace("\\@", "@").replace("\\/", "/")
}

/// PVE::JSONSchema::parse_boolean.
pub(crate) fn parse_boolean(text: &str) -> Option<u8> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "on" | "yes" | "true" => Some(1),
        "0" | "off" | "no" | "false" => Some(0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::schema::Schema;

    fn check(path: &str, method: &str, given: Value) -> Answered<Map<String, Value>> {
        let schema = Schema::embedded().unwrap();
        let Value::Object(given) = given else { unreachable!() };
        check_parameters(schema.find(method, path).unwrap().method, given)
    }

    #[test]
    fn wrong_parameters_are_named_with_the_reason() {
        let refused = check(
            "/nodes/a/lxc",
            "POST",
            serde_json::json!({ "node": "a", "vmid": "99", "memory": "much", "bogus": 1, "arch": "z80" }),
        )
        .unwrap_err();
        assert_eq!(refused.code, 400);
        assert_eq!(refused.errors["ostemplate"], "property is missing and it is not optional");
        assert_eq!(refused.errors["vmid"], "value must have a minimum value of 100");
        assert_eq!(refused.errors["memory"], "type check ('integer') failed - got 'much'");
        assert!(refused.errors["bogus"].starts_with("property is not defined in schema"));
        assert!(refused.errors["arch"].starts_with("value 'z80' does not have a value in the enumeration"));
    }

    #[test]
    fn numbers_and_booleans_may_come_as_text_or_json() {
        let body = serde_json::json!({ "node": "a", "vmid": 100, "force": true, "purge": "yes" });
        let checked = check("/nodes/a/lxc/100", "DELETE", body).unwrap();
        assert_eq!(checked["force"], 1);
        assert_eq!(checked["purge"], 1);
        assert_eq!(checked["vmid"], 100);
    }

    #[test]
    fn every_pattern_of_the_schema_is_understood() {
        fn walk(value: &Value) {
            match value {
                Value::Object(map) => {
                    if let Some(pattern) = map.get("pattern").and_then(Value::as_str) {
                        assert!(Regex::new(&translate(pattern)).is_ok(), "{pattern}");
                    }
                    map.values().for_each(walk);
                }
                Value::Array(list) => list.iter().for_each(walk),
                _ => {}
            }
        }
        walk(&serde_json::from_str(include_str!("../../schema/pve-9.2.json")).unwrap());
    }
}
