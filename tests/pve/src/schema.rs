//! Holds requests and answers of the Proxmox VE API against its official schema.
//!
//! Both sides use it: the tests of the client check what it sends, the tests of a server check what it accepts and
//! answers. `schema/README.md` says where the facts come from. The real server is looser than its schema in a few known
//! ways; they are the explicit list [`EXCEPTIONS`] and the rules for all answers beside it, nothing else is forgiven.
//!
//! ```
//! use moxlet_tests_pve::schema::Schema;
//!
//! let schema = Schema::official();
//! let wrong = schema.check_request("DELETE", "/api2/json/nodes/a/lxc/100", &[("purge".into(), "maybe".into())]);
//! assert_eq!(wrong[0].to_string(), "DELETE /nodes/{node}/lxc/{vmid}: parameter purge: \"maybe\" is no boolean");
//! ```

mod answer;
mod format;
mod pattern;
mod request;
mod value;

use std::{fmt, sync::LazyLock};

use percent_encoding::percent_decode_str;
use serde_json::{Map, Value};

pub use answer::EXCEPTIONS;
pub use request::params_of_json;

/// The schema of one version of Proxmox VE.
#[derive(Debug)]
pub struct Schema {
    version: String,
    calls: Vec<CallSpec>,
}

/// One method of one path.
#[derive(Debug)]
struct CallSpec {
    method: String,
    template: String,
    segments: Vec<Segment>,
    parameters: Value,
    returns: Value,
    permissions: Value,
}

#[derive(Debug, PartialEq, Eq)]
enum Segment {
    Literal(String),
    Parameter(String),
}

/// A call that the schema knows.
#[derive(Debug)]
pub struct Call<'a> {
    spec: &'a CallSpec,
    /// The parameters that stand in the path, decoded.
    pub path_parameters: Vec<(String, String)>,
}

/// What kind of disagreement with the schema it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// There is no such path.
    UnknownPath,
    /// The path does not have this method.
    UnknownMethod,
    /// A parameter that is not optional is missing.
    MissingParameter,
    /// A parameter that the call does not have.
    UnknownParameter,
    /// A parameter that needs another beside it.
    MissingCompanion,
    /// Of another type.
    WrongType,
    /// Beyond the minimum, the maximum, or the lengths.
    OutOfRange,
    /// None of the values that are allowed.
    NotInEnum,
    /// The pattern or the named format says no.
    WrongFormat,
    /// A field of an answer that is not optional is missing.
    MissingField,
    /// A field of an answer that the schema does not have.
    UndeclaredField,
}

/// One disagreement with the schema.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// What kind it is.
    pub kind: Kind,
    /// The method.
    pub method: String,
    /// The path template, or the path as it came where none matches.
    pub path: String,
    /// What is wrong, such as `parameter net0.mtu` or `answer [3].status`; empty for the call itself.
    pub place: String,
    /// Why.
    pub reason: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: ", self.method, self.path)?;
        if !self.place.is_empty() {
            write!(f, "{}: ", self.place)?;
        }
        f.write_str(&self.reason)
    }
}

/// A disagreement before the call that it belongs to is known.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wrong {
    kind: Kind,
    place: String,
    reason: String,
}

impl Wrong {
    fn new(kind: Kind, place: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { kind, place: place.into(), reason: reason.into() }
    }
}

static OFFICIAL: LazyLock<Schema> =
    LazyLock::new(|| Schema::parse(include_str!("../../../src/pve-sim/schema/pve-9.2.json")));

impl Schema {
    /// The schema of Proxmox VE 9.2.
    #[must_use]
    pub fn official() -> &'static Self {
        &OFFICIAL
    }

    /// A file as `src/pve-sim/schema/reduce.py` writes it. What is not of that shape is left out; the tests see that nothing is.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let document: Value = serde_json::from_str(text).unwrap_or_default();
        let none = Map::new();
        let mut calls = Vec::new();
        for (template, methods) in document["paths"].as_object().unwrap_or(&none) {
            for (method, call) in methods.as_object().unwrap_or(&none) {
                calls.push(CallSpec {
                    method: method.clone(),
                    template: template.clone(),
                    segments: template.split('/').skip(1).map(Segment::parse).collect(),
                    parameters: call["parameters"].clone(),
                    returns: call["returns"].clone(),
                    permissions: call["permissions"].clone(),
                });
            }
        }
        Self { version: document["version"].as_str().unwrap_or_default().to_owned(), calls }
    }

    /// The version that it describes, such as `9.2`.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// All calls: method and path template.
    pub fn calls(&self) -> impl Iterator<Item = (&str, &str)> {
        self.calls.iter().map(|c| (c.method.as_str(), c.template.as_str()))
    }

    /// The call that a request means. The path may begin with `/api2/json` or `/api2/extjs`; its segments are
    /// percent-decoded; a query is not part of it.
    ///
    /// # Errors
    /// [`Kind::UnknownPath`] or [`Kind::UnknownMethod`].
    pub fn call(&self, method: &str, path: &str) -> Result<Call<'_>, Violation> {
        let bare =
            path.strip_prefix("/api2/json").or_else(|| path.strip_prefix("/api2/extjs")).unwrap_or(path);
        let segments: Vec<String> = bare
            .trim_end_matches('/')
            .split('/')
            .skip(1)
            .map(|s| percent_decode_str(s).decode_utf8_lossy().into_owned())
            .collect();
        let mut known_path = false;
        let mut best: Option<(usize, Call<'_>)> = None;
        for spec in &self.calls {
            let Some(path_parameters) = spec.matches(&segments) else { continue };
            known_path = true;
            let better = best.as_ref().is_none_or(|(count, _)| path_parameters.len() < *count);
            if spec.method == method && better {
                best = Some((path_parameters.len(), Call { spec, path_parameters }));
            }
        }
        match best {
            Some((_, call)) => Ok(call),
            None => Err(Violation {
                kind: if known_path { Kind::UnknownMethod } else { Kind::UnknownPath },
                method: method.to_owned(),
                path: bare.to_owned(),
                place: String::new(),
                reason: if known_path { "the path has no such method" } else { "there is no such path" }
                    .to_owned(),
            }),
        }
    }

    /// What is wrong with a request. `parameters` are those of the query or the body, decoded; those in the path are
    /// taken from it. An empty list means that the schema agrees.
    #[must_use]
    pub fn check_request(&self, method: &str, path: &str, parameters: &[(String, String)]) -> Vec<Violation> {
        match self.call(method, path) {
            Ok(call) => call.check_parameters(parameters),
            Err(violation) => vec![violation],
        }
    }

    /// What is wrong with a successful answer. `data` is what stands under that key in the body.
    #[must_use]
    pub fn check_answer(&self, method: &str, path: &str, data: &Value) -> Vec<Violation> {
        match self.call(method, path) {
            Ok(call) => call.check_answer(data),
            Err(violation) => vec![violation],
        }
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

impl CallSpec {
    /// The path's parameters if the template fits.
    fn matches(&self, path: &[String]) -> Option<Vec<(String, String)>> {
        if self.segments.len() != path.len() {
            return None;
        }
        let mut parameters = Vec::new();
        for (segment, text) in self.segments.iter().zip(path) {
            match segment {
                Segment::Literal(literal) if literal == text => {}
                Segment::Parameter(name) if !text.is_empty() => parameters.push((name.clone(), text.clone())),
                _ => return None,
            }
        }
        Some(parameters)
    }
}

impl Call<'_> {
    /// The path template, such as `/nodes/{node}/lxc/{vmid}`.
    #[must_use]
    pub fn template(&self) -> &str {
        &self.spec.template
    }

    /// The method.
    #[must_use]
    pub fn method(&self) -> &str {
        &self.spec.method
    }

    /// The privileges that it needs, as the schema has them (`{"check": ["perm", "/vms/{vmid}", ["VM.Audit"]]}`,
    /// `{"user": "all"}`); null where the schema is silent.
    #[must_use]
    pub fn permissions(&self) -> &Value {
        &self.spec.permissions
    }

    /// The schema of its parameters.
    #[must_use]
    pub fn parameters(&self) -> &Value {
        &self.spec.parameters
    }

    /// The schema of its answer.
    #[must_use]
    pub fn returns(&self) -> &Value {
        &self.spec.returns
    }

    /// As [`Schema::check_request`]: `given` are the parameters of the query or the body.
    #[must_use]
    pub fn check_parameters(&self, given: &[(String, String)]) -> Vec<Violation> {
        let mut all = self.path_parameters.clone();
        all.extend_from_slice(given);
        request::check(&self.spec.parameters, &all).into_iter().map(|w| self.violation(w)).collect()
    }

    /// As [`Schema::check_answer`].
    #[must_use]
    pub fn check_answer(&self, data: &Value) -> Vec<Violation> {
        let wrong = answer::check(&self.spec.returns, data);
        wrong
            .into_iter()
            .filter(|w| !answer::is_excepted(&self.spec.method, &self.spec.template, w))
            .map(|w| self.violation(w))
            .collect()
    }

    fn violation(&self, wrong: Wrong) -> Violation {
        Violation {
            kind: wrong.kind,
            method: self.spec.method.clone(),
            path: self.spec.template.clone(),
            place: wrong.place,
            reason: wrong.reason,
        }
    }
}
