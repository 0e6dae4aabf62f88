//! Perl's patterns as the schema writes them, turned into ones that the `regex` crate takes.

use std::{
    collections::HashMap,
    sync::{LazyLock, Mutex, PoisonError},
};

use regex::Regex;

static CACHE: LazyLock<Mutex<HashMap<String, Option<Regex>>>> = LazyLock::new(Mutex::default);

/// Whether the whole text fits; a pattern that cannot be translated fits nothing.
pub(super) fn matches(pattern: &str, text: &str) -> bool {
    let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
    let compiled = cache
        .entry(pattern.to_owned())
        .or_insert_with(|| Regex::new(&format!("^(?:{})$", translate(pattern))).ok());
    compiled.as_ref().is_some_and(|r| r.is_match(text))
}

/// Perl prints a compiled pattern as `(?^flags:…)`; atomic groups, open lower bounds and `\0` have other spellings here.
fn translate(pattern: &str) -> String {
    pattern
        .replace("(?^u:", "(?:")
        .replace("(?^i:", "(?i:")
        .replace("(?^:", "(?:")
        .replace("(?>", "(?:")
        .replace("{,", "{0,")
        .replace("\\0", "\\x00")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use serde_json::Value;

    use super::*;

    fn patterns(node: &Value, found: &mut Vec<String>) {
        match node {
            Value::Object(map) => {
                if let Some(Value::String(p)) = map.get("pattern") {
                    found.push(p.clone());
                }
                map.values().for_each(|v| patterns(v, found));
            }
            Value::Array(list) => list.iter().for_each(|v| patterns(v, found)),
            _ => {}
        }
    }

    #[test]
    fn every_pattern_of_the_schema_can_be_used() {
        let document: Value =
            serde_json::from_str(include_str!("../../../../src/pve-sim/schema/pve-9.2.json")).unwrap();
        let mut found = Vec::new();
        patterns(&document, &mut found);
        assert!(found.len() > 30, "{}", found.len());
        for pattern in found {
            let translated = format!("^(?:{})$", translate(&pattern));
            Regex::new(&translated).unwrap_or_else(|e| panic!("{pattern}: {e}"));
        }
    }

    #[test]
    fn a_pattern_is_anchored_at_both_ends() {
        assert!(matches("0[0-7]{3}", "0640"));
        assert!(!matches("0[0-7]{3}", "00640"));
    }
}
