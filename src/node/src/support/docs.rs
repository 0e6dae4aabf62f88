//! docs/support.md against the code. Every field of the Pod API is found by deserializing a PodSpec from a source that
//! has a value for whatever it is asked for; the pods that come of it have every field set, and are refused by every name.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
};

use k8s_openapi::api::core::v1::{Pod, PodSpec};
use serde::{
    Deserialize,
    de::{
        DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor,
        value::{Error, StrDeserializer},
    },
    forward_to_deserialize_any,
};

const DOCS: &str = include_str!("../../../../docs/support.md");
const CODE: &str = include_str!("../support.rs");
const AGENT: &str = include_str!("../../../agent/src/spec/capabilities.rs");
/// Types of every object's metadata, reached through a claim's template.
const METADATA: [&str; 3] = ["ObjectMeta", "ManagedFieldsEntry", "OwnerReference"];

/// A field: the name of its type, its own.
type Field = (String, String);
/// Fields by the paths at which they are in a pod.
type Fields = BTreeMap<String, Field>;

/// Answers to a deserializer that asks.
#[derive(Clone)]
struct Source<'a> {
    path: String,
    flag: bool,
    text: &'a str,
    seen: &'a RefCell<Fields>,
}

impl<'de> Deserializer<'de> for Source<'_> {
    type Error = Error;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        for field in fields {
            let path = format!("{}.{field}", self.path);
            self.seen.borrow_mut().insert(path, (name.to_owned(), (*field).to_owned()));
        }
        visitor.visit_map(Struct { source: self, fields, current: "" })
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        let text = match name {
            "Quantity" => "1",
            "Time" => "2000-01-01T00:00:00Z",
            _ => self.text,
        };
        visitor.visit_newtype_struct(Source { text, ..self })
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(One(Some(self)))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(One(Some(self)))
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_bool(self.flag)
    }

    fn deserialize_i32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_i64(65_536)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_i64(65_536)
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str(self.text)
    }

    forward_to_deserialize_any! {
        i8 i16 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple tuple_struct enum
        identifier ignored_any
    }
}

struct Struct<'a> {
    source: Source<'a>,
    fields: &'static [&'static str],
    current: &'static str,
}

impl<'de> MapAccess<'de> for Struct<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some((first, rest)) = self.fields.split_first() else { return Ok(None) };
        (self.current, self.fields) = (first, rest);
        seed.deserialize(StrDeserializer::new(first)).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let path = format!("{}.{}", self.source.path, self.current);
        seed.deserialize(Source { path, ..self.source.clone() })
    }
}

/// A list or map of one element.
struct One<'a>(Option<Source<'a>>);

impl<'de> SeqAccess<'de> for One<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        self.0.take().map(|source| seed.deserialize(source)).transpose()
    }
}

impl<'de> MapAccess<'de> for One<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        self.0.as_ref().map(|source| seed.deserialize(StrDeserializer::new(source.text))).transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        seed.deserialize(self.0.take().ok_or_else(|| Error::custom("no value"))?)
    }
}

/// `spec.containers[c].ports.hostPort` without what is in brackets.
fn plain(name: &str) -> String {
    let mut depth = 0;
    let mut out = String::new();
    for c in name.chars() {
        match c {
            '[' => depth += 1,
            ']' => depth -= 1,
            c if depth == 0 => out.push(c),
            _ => {}
        }
    }
    out
}

/// All fields of a pod, and the paths of all that is refused.
fn explore() -> (Fields, BTreeSet<String>) {
    let seen = RefCell::default();
    let mut refused = BTreeSet::new();
    let long = "x".repeat(64);
    for (flag, text) in [(true, long.as_str()), (false, "SYS_MODULE")] {
        let source = Source { path: "spec".into(), flag, text, seen: &seen };
        let spec = PodSpec::deserialize(source).unwrap();
        let pod = Pod { spec: Some(spec), ..Pod::default() };
        refused.extend(super::refusals(&pod).iter().map(|name| plain(name)));
        refused.extend(super::left_out(&pod).map(plain));
    }
    let mut fields = seen.into_inner();
    fields.retain(|_, (name, _)| !METADATA.contains(&name.as_str()));
    (fields, refused)
}

/// The words of a text that are in backticks.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// The page's rows: the state of each field. A row is of the type that it names before a colon, else of its heading's.
fn documented() -> BTreeMap<Field, String> {
    let mut rows = BTreeMap::new();
    let mut heading = "";
    for line in DOCS.lines() {
        if line.starts_with('#') {
            heading = quoted(line).first().copied().unwrap_or_default();
        }
        let Some(row) = line.strip_prefix('|') else { continue };
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let (of, names) = match cells[0].split_once("`: ") {
            Some((of, names)) => (of.trim_start_matches('`'), names),
            None => (heading, cells[0]),
        };
        for field in quoted(names) {
            let old = rows.insert((of.to_owned(), field.to_owned()), cells[1].to_owned());
            assert!(old.is_none(), "docs/support.md lists {of}.{field} twice");
        }
    }
    rows
}

#[test]
fn the_page_lists_every_field_of_a_pod_and_no_other() {
    let (fields, _) = explore();
    let all: BTreeSet<Field> = fields.into_values().collect();
    let listed: BTreeSet<Field> = documented().into_keys().collect();
    assert!(
        all.len() > 400 && all.contains(&("VolumeMount".into(), "recursiveReadOnly".into())),
        "{}",
        all.len()
    );
    assert_eq!(
        all.difference(&listed).collect::<Vec<_>>(),
        Vec::<&Field>::new(),
        "docs/support.md lacks these"
    );
    assert_eq!(listed.difference(&all).collect::<Vec<_>>(), Vec::<&Field>::new(), "there are no such fields");
}

#[test]
fn the_page_says_refused_of_what_is_refused_and_of_nothing_else() {
    let (fields, refused) = explore();
    let rows = documented();
    for path in &refused {
        let field = fields.get(path).unwrap_or_else(|| panic!("{path} is no field"));
        let state = rows.get(field).map_or("", String::as_str);
        assert!(
            matches!(state, "refused" | "partly refused"),
            "{path} is refused; docs/support.md says {state:?}"
        );
    }
    let is_below =
        |path: &str, top: &str| path == top || path.strip_prefix(top).is_some_and(|r| r.starts_with('.'));
    for (field, state) in &rows {
        let paths: Vec<_> = fields.iter().filter(|(_, f)| *f == field).map(|(path, _)| path).collect();
        let covered = |path: &&String| refused.iter().any(|top| is_below(path, top));
        let right = match state.as_str() {
            "refused" => paths.iter().all(covered),
            "partly refused" => {
                paths.iter().any(|p| covered(p) || refused.iter().any(|below| is_below(below, p)))
            }
            "done" | "scheduler" | "API server" => !paths.iter().all(covered),
            _ => panic!("docs/support.md: {field:?} has an unknown state {state:?}"),
        };
        assert!(right, "docs/support.md says {state:?} of {field:?}, which the code does not do: {paths:?}");
    }
}

/// Otherwise the test above would not see it.
#[test]
fn every_name_in_the_code_is_refused_in_some_pod() {
    let (_, refused) = explore();
    let code = CODE.split_once("mod tests {").unwrap().0;
    let is_name = |t: &&str| t.starts_with("{at}.") || t.starts_with("spec.") && !t.contains('[');
    let names = code.split('"').skip(1).step_by(2).filter(is_name);
    let mut count = 0;
    for name in names.chain(code.split("\"{place}.").skip(1).filter_map(|t| t.split('"').next())) {
        let last = name.rsplit('.').next().unwrap().split('[').next().unwrap();
        let known = last.contains('{') || refused.iter().any(|path| path.split('.').any(|part| part == last));
        assert!(known, "{name}: no pod of this test has it");
        count += 1;
    }
    assert!(count > 40, "{count}");
}

#[test]
fn the_agent_refuses_the_same_capabilities() {
    let list = AGENT.split_once("const HOST_ONLY").and_then(|(_, rest)| rest.split_once("];")).unwrap().0;
    let names: Vec<_> = list.split('"').skip(1).step_by(2).collect();
    assert_eq!(names, super::HOST_ONLY);
    for name in names {
        assert!(DOCS.contains(&format!("`{name}`")), "docs/support.md lacks {name}");
    }
}
