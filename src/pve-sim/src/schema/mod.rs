//! The official API schema (the file that the tests hold answers against), embedded: which paths and methods there are, which parameters and privileges they take.
//!
//! Requests are checked by it as PVE::JSONSchema does, with its words, so that a client's wrong parameter fails here as it
//! would fail there.

mod check;
mod format;

use std::collections::BTreeMap;

pub(crate) use check::{check_parameters, parse_boolean};
use serde_json::{Map, Value};

use crate::{Error, Result};

const EMBEDDED: &str = include_str!("../../schema/pve-9.2.json");

/// One method of one path.
#[derive(Debug, Clone, Default)]
pub(crate) struct Method {
    /// `parameters.properties`.
    pub(crate) properties: Map<String, Value>,
    /// Whether other parameters are refused.
    pub(crate) closed: bool,
    /// `permissions`, null if absent: then only root@pam may.
    pub(crate) permissions: Value,
    /// Whether it belongs to a host, which the proxy passes it to.
    pub(crate) on_node: bool,
}

/// All paths.
#[derive(Debug)]
pub(crate) struct Schema {
    paths: Vec<Template>,
}

#[derive(Debug)]
struct Template {
    path: String,
    segments: Vec<Segment>,
    methods: BTreeMap<String, Method>,
}

#[derive(Debug)]
enum Segment {
    Literal(String),
    Parameter(String),
}

/// What a request's path is.
#[derive(Debug)]
pub(crate) struct Matched<'a> {
    /// The template, such as `/nodes/{node}/lxc`.
    pub(crate) template: &'a str,
    /// The method's description.
    pub(crate) method: &'a Method,
    /// Parameters that stand in the path.
    pub(crate) in_path: Vec<(String, String)>,
}

impl Schema {
    pub(crate) fn embedded() -> Result<Self> {
        let mut root: Value = serde_json::from_str(EMBEDDED).map_err(|e| Error::Schema(e.to_string()))?;
        let Some(Value::Object(paths)) = root.get_mut("paths").map(Value::take) else {
            return Err(Error::Schema("it has no paths".into()));
        };
        let paths = paths
            .into_iter()
            .map(|(path, methods)| {
                let segments = path.split('/').skip(1).map(Segment::parse).collect();
                let methods = match methods {
                    Value::Object(methods) => {
                        methods.into_iter().map(|(name, info)| (name, Method::read(&path, info))).collect()
                    }
                    _ => BTreeMap::new(),
                };
                Template { path, segments, methods }
            })
            .collect();
        Ok(Self { paths })
    }

    /// Finds the method of a path (already decoded, beginning with `/`). Literal segments go before parameters.
    pub(crate) fn find(&self, method: &str, path: &str) -> Option<Matched<'_>> {
        let asked: Vec<&str> = path.split('/').skip(1).collect();
        let (template, (_, in_path)) = self
            .paths
            .iter()
            .filter_map(|template| Some((template, template.matches(&asked)?)))
            .max_by_key(|(_, (literals, _))| *literals)?;
        let method = template.methods.get(method)?;
        Some(Matched { template: &template.path, method, in_path })
    }

    /// The names of what lies directly below a path: what a directory index lists.
    pub(crate) fn children(&self, template: &str) -> Vec<String> {
        let prefix = if template == "/" { "/".to_owned() } else { format!("{template}/") };
        let names: std::collections::BTreeSet<String> = self
            .paths
            .iter()
            .filter_map(|t| t.path.strip_prefix(&prefix))
            .filter_map(|rest| rest.split('/').next())
            .filter(|name| !name.is_empty() && !name.starts_with('{'))
            .map(str::to_owned)
            .collect();
        names.into_iter().collect()
    }
}

impl Segment {
    fn parse(text: &str) -> Self {
        match text.strip_prefix('{').and_then(|t| t.strip_suffix('}')) {
            Some(name) => Self::Parameter(name.to_owned()),
            None => Self::Literal(text.to_owned()),
        }
    }
}

impl Template {
    fn matches(&self, asked: &[&str]) -> Option<(usize, Vec<(String, String)>)> {
        let rest_is_one = matches!(self.segments.last(), Some(Segment::Parameter(name)) if name == "volume");
        if asked.len() != self.segments.len() && !(rest_is_one && asked.len() > self.segments.len()) {
            return None;
        }
        let mut literals = 0;
        let mut in_path = Vec::new();
        for (i, segment) in self.segments.iter().enumerate() {
            let text = asked.get(i)?;
            match segment {
                Segment::Literal(literal) if literal == text => literals += 1,
                Segment::Literal(_) => return None,
                Segment::Parameter(_) if text.is_empty() => return None,
                Segment::Parameter(name) if rest_is_one && i + 1 == self.segments.len() => {
                    in_path.push((name.clone(), asked.get(i..)?.join("/")));
                }
                Segment::Parameter(name) => in_path.push((name.clone(), (*text).to_owned())),
            }
        }
        Some((literals, in_path))
    }
}

impl Method {
    fn read(path: &str, mut info: Value) -> Self {
        let on_node = path.starts_with("/nodes/{node}/");
        let permissions = info.get_mut("permissions").map(Value::take).unwrap_or_default();
        let mut parameters = info.get_mut("parameters").map(Value::take).unwrap_or_default();
        let closed = parameters.get("additionalProperties").is_some_and(|v| v == &Value::from(0));
        let properties = match parameters.get_mut("properties").map(Value::take) {
            Some(Value::Object(properties)) => expand(properties),
            _ => Map::new(),
        };
        Self { properties, closed, permissions, on_node }
    }
}

/// `net[n]` stands for `net0`, `net1`, …; how many there may be is in PVE::LXC::Config.
fn expand(properties: Map<String, Value>) -> Map<String, Value> {
    let mut all = Map::new();
    for (name, property) in properties {
        match name.strip_suffix("[n]") {
            Some(stem) => {
                let count = if stem == "net" { 32 } else { 256 };
                for n in 0..count {
                    all.insert(format!("{stem}{n}"), property.clone());
                }
            }
            None => {
                all.insert(name, property);
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn literal_segments_go_before_parameters_and_a_volume_is_the_rest_of_the_path() {
        let schema = Schema::embedded().unwrap();
        let found = schema.find("GET", "/cluster/ha/status/current").unwrap();
        assert_eq!(found.template, "/cluster/ha/status/current");
        let found = schema.find("DELETE", "/nodes/a/storage/local/content/local:vztmpl/x.tar").unwrap();
        assert_eq!(found.template, "/nodes/{node}/storage/{storage}/content/{volume}");
        assert_eq!(found.in_path[2], ("volume".into(), "local:vztmpl/x.tar".into()));
        assert!(schema.find("GET", "/nodes/a/nothing").is_none());
        assert!(schema.find("PATCH", "/version").is_none());
    }
}
