//! From the text of a configuration file to its keys: what is wrong is named with its line, its key, what was found and what is right.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{
    Deserialize,
    de::{Deserializer, Error as _, Visitor, value::Error},
    forward_to_deserialize_any,
};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::Config;
use crate::{nearest::nearest, pve_config::Pve};

/// The largest configuration file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// The one section whose keys are fixed.
const PVE: &str = "pve";
const REFERENCE: &str = "docs/configuration.md lists every key";

/// Reads a configuration file.
///
/// # Errors
/// It cannot be read, is over 1 MiB, or a key or value is wrong: file, line and key are named.
pub(super) fn read(path: &Path) -> Result<Config> {
    let text = moxlet_files::read_text_bounded(path, MAX_FILE)
        .with_context(|| format!("cannot read the configuration file {}", path.display()))?;
    parse(&text).map_err(|wrong| {
        let lines: Vec<_> = wrong.iter().map(|w| w.text(&text)).collect();
        anyhow::anyhow!("configuration file {}: {} ({REFERENCE})", path.display(), lines.join("; "))
    })
}

/// Something wrong in the text.
struct Wrong {
    /// Where, in bytes.
    at: Option<usize>,
    reason: String,
}

impl Wrong {
    fn text(&self, text: &str) -> String {
        let line = |at: usize| text.bytes().take(at).filter(|b| *b == b'\n').count() + 1;
        self.at.map_or_else(|| self.reason.clone(), |at| format!("line {}: {}", line(at), self.reason))
    }
}

fn parse(text: &str) -> Result<Config, Vec<Wrong>> {
    let of = |e: &toml::de::Error, reason: String| vec![Wrong { at: e.span().map(|s| s.start), reason }];
    let tree = DeTable::parse(text).map_err(|e| of(&e, e.message().trim().to_owned()))?;
    let unknown = unknown_keys(tree.get_ref());
    if !unknown.is_empty() {
        return Err(unknown);
    }
    toml::from_str(text).map_err(|e: toml::de::Error| {
        let at = e.span().map_or(0, |s| s.start);
        let found = find(tree.get_ref(), at, "");
        of(&e, sentence(e.message().trim(), found))
    })
}

/// The keys that nobody reads.
fn unknown_keys(tree: &DeTable<'_>) -> Vec<Wrong> {
    let (top, pve) = (fields_of::<Config>(), fields_of::<Pve>());
    let mut wrong = Vec::new();
    for (key, value) in tree {
        let name = key.get_ref().as_ref();
        if !top.contains(&name) {
            let hint = meant(name, top, pve, &format!("[{PVE}] has that key"));
            wrong.push(Wrong { at: Some(key.span().start), reason: format!("unknown key {name:?}{hint}") });
        }
        let DeValue::Table(section) = value.get_ref() else { continue };
        for (key, _) in section.iter().filter(|_| name == PVE) {
            let key_name = key.get_ref().as_ref();
            if !pve.contains(&key_name) {
                let hint = meant(
                    key_name,
                    pve,
                    top,
                    "it is a key of the whole file: it belongs above the first section",
                );
                let reason = format!("unknown key {key_name:?} in section [{PVE}]{hint}");
                wrong.push(Wrong { at: Some(key.span().start), reason });
            }
        }
    }
    wrong.sort_by_key(|w| w.at);
    wrong
}

/// What may be meant by a key that is unknown where it stands.
fn meant(key: &str, here: &[&'static str], elsewhere: &[&str], why: &str) -> String {
    if elsewhere.contains(&key) {
        return format!("; {why}");
    }
    nearest(key, here.iter().copied()).map_or_else(String::new, |k| format!("; did you mean {k:?}?"))
}

/// The path of the key whose value is at that place, and the value.
fn find<'a>(table: &'a DeTable<'_>, at: usize, above: &str) -> Option<(String, &'a Spanned<DeValue<'a>>)> {
    table.iter().find_map(|(key, value)| {
        let path = format!("{above}{}", key.get_ref());
        // The span of a section is that of its head alone.
        if let DeValue::Table(inner) = value.get_ref()
            && let Some(found) = find(inner, at, &format!("{path}."))
        {
            return Some(found);
        }
        let (start, end) = (key.span().start, value.span().end.max(value.span().start + 1));
        (start <= at && at < end).then_some((path, value))
    })
}

/// A message of serde's with the key in front, and in words for people.
fn sentence(message: &str, at: Option<(String, &Spanned<DeValue<'_>>)>) -> String {
    let Some((key, value)) = at else { return message.to_owned() };
    let known = ["invalid type: ", "invalid value: "].iter().find_map(|p| message.strip_prefix(p));
    if let Some((found, right)) = known.and_then(|m| m.rsplit_once(", expected ")) {
        let above =
            key.rsplit_once('.').map(|(_, last)| last).filter(|last| fields_of::<Config>().contains(last));
        let hint = above.map_or_else(String::new, |last| {
            format!("; {last:?} is a key of the whole file: it belongs above the first section")
        });
        return format!("{key}: found {found}; right is {}{hint}", words(right));
    }
    if let Some((word, right)) = message.strip_prefix("unknown variant `").and_then(|m| m.split_once('`')) {
        let right: Vec<_> = right.split('`').skip(1).step_by(2).collect();
        let hint = nearest(word, right.iter().copied())
            .map_or_else(String::new, |k| format!("; did you mean {k:?}?"));
        return format!("{key}: found {word:?}; right is one of {}{hint}", right.join(", "));
    }
    let shown = match value.get_ref() {
        DeValue::String(text) if !message.contains(text.as_ref()) => format!("found {text:?}; "),
        _ => String::new(),
    };
    format!("{key}: {shown}{message}")
}

/// What serde expects, in words.
fn words(expected: &str) -> String {
    let up_to = |max: u64| format!("a whole number from 0 to {max}");
    match expected {
        "u8" => up_to(u8::MAX.into()),
        "u16" => up_to(u16::MAX.into()),
        "u32" => up_to(u32::MAX.into()),
        "u64" => up_to(i64::MAX.unsigned_abs()),
        "a boolean" => "true or false".to_owned(),
        "a string" => "text in quotes".to_owned(),
        "path string" => "a path in quotes".to_owned(),
        "socket address" => "an address and a port in quotes, such as \"0.0.0.0:10250\"".to_owned(),
        "IP address" => "an IP address in quotes".to_owned(),
        "a sequence" => "a list in brackets".to_owned(),
        "a map" => "a table".to_owned(),
        other => other.to_owned(),
    }
}

/// The keys of a structure as serde knows them, so that no second list of them can differ.
pub(super) fn fields_of<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    struct Names<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Names<'_> {
        type Error = Error;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
            Err(Error::custom("this is not a structure"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Error> {
            *self.0 = fields;
            self.deserialize_any(visitor)
        }

        forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
            newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut names: &[&str] = &[];
    let _ = T::deserialize(Names(&mut names));
    names
}

/// A value that is no address of an agent is refused with its reason.
pub(super) fn endpoint<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<moxlet_cri::link::Endpoint>, D::Error> {
    let text = String::deserialize(from)?;
    text.parse().map(Some).map_err(D::Error::custom)
}

/// A table of signals and thresholds, over the kubelet's defaults.
pub(super) fn pressure_thresholds<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<moxlet_node::PressureThresholds, D::Error> {
    let given = std::collections::BTreeMap::<String, String>::deserialize(from)?;
    let given = given.iter().map(|(signal, text)| (signal.as_str(), text.as_str()));
    moxlet_node::PressureThresholds::of(given).map_err(D::Error::custom)
}
