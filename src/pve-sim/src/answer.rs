//! What a call answers: data, or a refusal with its status code and Proxmox VE's own words.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::Error;

/// An API call's refusal. The first line of `message` becomes the reason phrase of the status line.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    pub(crate) code: u16,
    pub(crate) message: String,
    pub(crate) errors: BTreeMap<String, String>,
}

/// Result of an API call.
pub(crate) type Answered<T = Data> = Result<T, Refusal>;

/// A successful answer: `data`, and attributes beside it.
#[derive(Debug, Clone)]
pub(crate) struct Data {
    pub(crate) data: Value,
    pub(crate) total: Option<u64>,
}

impl From<Value> for Data {
    fn from(data: Value) -> Self {
        Self { data, total: None }
    }
}

impl Refusal {
    pub(crate) fn new(code: u16, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), errors: BTreeMap::new() }
    }

    /// What Perl's `die` in a method becomes.
    pub(crate) fn died(message: impl Into<String>) -> Self {
        Self::new(500, message)
    }

    /// A missing privilege: `Permission check failed (path, Priv)`.
    pub(crate) fn forbidden(what: &str) -> Self {
        Self::new(
            403,
            if what.is_empty() {
                "Permission check failed".to_owned()
            } else {
                format!("Permission check failed ({what})")
            },
        )
    }

    /// A parameter that is refused by the method itself.
    pub(crate) fn parameter(field: &str, why: impl Into<String>) -> Self {
        Self::parameters(BTreeMap::from([(field.to_owned(), why.into())]))
    }

    /// Refused parameters.
    pub(crate) fn parameters(errors: BTreeMap<String, String>) -> Self {
        Self { code: 400, message: "Parameter verification failed.".into(), errors }
    }

    /// The reason phrase: the first line, with what cannot stand in a status line replaced.
    pub(crate) fn reason(&self) -> String {
        let line = self.message.lines().next().unwrap_or("");
        line.chars().map(|c| if c == ' ' || c.is_ascii_graphic() { c } else { '?' }).collect()
    }

    /// The JSON body. Messages end with a newline, as those of Perl do.
    pub(crate) fn body(&self) -> Value {
        let message = format!("{}\n", self.message.trim_end_matches('\n'));
        let mut body = json!({ "data": null, "message": message });
        if !self.errors.is_empty() {
            body["errors"] = json!(self.errors);
        }
        body
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::died(error.to_string())
    }
}
