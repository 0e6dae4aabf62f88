//! Property strings, `name=eth0,bridge=vmbr0`: a list of keys and values, of which one key may be left out.

use std::{collections::BTreeMap, fmt, str::FromStr};

use crate::{InvalidName, PropertyText, lenient};

/// Keys of a property string that this version does not know. They are kept, so that writing back loses nothing.
pub type Extra = BTreeMap<String, PropertyText>;

/// The fields of a property string while it is taken apart.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    kind: &'static str,
    text: &'a str,
    fields: Vec<(&'a str, &'a str)>,
}

impl<'a> Fields<'a> {
    /// Takes a text apart; a part without a key belongs to `default`.
    pub(super) fn parse(
        kind: &'static str,
        text: &'a str,
        default: Option<&'static str>,
    ) -> Result<Self, InvalidName> {
        let mut fields: Vec<(&str, &str)> = Vec::new();
        let wrong = |reason| InvalidName::new(kind, text, reason);
        for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let (key, value) = match (part.split_once('='), default) {
                (Some((key, value)), _) => (key.trim(), value),
                (None, Some(default)) => (default, part),
                (None, None) => return Err(wrong("a part has no `=`")),
            };
            if key.is_empty() || value.is_empty() {
                return Err(wrong("a key or a value is empty"));
            }
            if fields.iter().any(|(k, _)| *k == key) {
                return Err(wrong("a key stands there twice"));
            }
            fields.push((key, value));
        }
        Ok(Self { kind, text, fields })
    }

    pub(super) fn wrong(&self, reason: &'static str) -> InvalidName {
        InvalidName::new(self.kind, self.text, reason)
    }

    fn take(&mut self, key: &str) -> Option<&'a str> {
        let at = self.fields.iter().position(|(k, _)| *k == key)?;
        Some(self.fields.remove(at).1)
    }

    /// A value that is parsed.
    pub(super) fn parsed<T: FromStr>(
        &mut self,
        key: &str,
        reason: &'static str,
    ) -> Result<Option<T>, InvalidName> {
        match self.take(key) {
            Some(value) => value.parse().map(Some).map_err(|_| self.wrong(reason)),
            None => Ok(None),
        }
    }

    /// A value that must be there.
    pub(super) fn needed<T: FromStr>(&mut self, key: &str, reason: &'static str) -> Result<T, InvalidName> {
        self.parsed(key, reason)?.ok_or_else(|| self.wrong(reason))
    }

    /// A boolean.
    pub(super) fn flag(&mut self, key: &str) -> Result<Option<bool>, InvalidName> {
        match self.take(key) {
            Some(value) => {
                lenient::parse_bool(value).map(Some).ok_or_else(|| self.wrong("a flag is no boolean"))
            }
            None => Ok(None),
        }
    }

    /// A list parted by semicolons.
    pub(super) fn list<T: FromStr>(
        &mut self,
        key: &str,
        reason: &'static str,
    ) -> Result<Vec<T>, InvalidName> {
        let Some(value) = self.take(key) else { return Ok(Vec::new()) };
        value.split(';').map(|item| item.parse().map_err(|_| self.wrong(reason))).collect()
    }

    /// What nobody took.
    pub(super) fn rest(self) -> Result<Extra, InvalidName> {
        let wrong = self.wrong("an unknown key or its value has a character that is not allowed");
        let one = |(key, value): (&str, &str)| Some((known_key(key)?.to_owned(), value.parse().ok()?));
        self.fields.into_iter().map(|f| one(f).ok_or_else(|| wrong.clone())).collect()
    }
}

fn known_key(key: &str) -> Option<&str> {
    key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)).then_some(key)
}

/// Writes a property string as the server does: what must be there first, then the rest sorted by key.
#[derive(Default)]
pub(super) struct Writer {
    first: Vec<String>,
    rest: BTreeMap<String, String>,
}

impl Writer {
    /// The value of the default key, without its key unless it would be taken for another.
    pub(super) fn main(&mut self, key: &str, value: &PropertyText) {
        let bare = !value.as_str().contains('=');
        self.first.push(if bare { value.to_string() } else { format!("{key}={value}") });
    }

    /// A key that is always there.
    pub(super) fn field(&mut self, key: &str, value: impl fmt::Display) {
        self.first.push(format!("{key}={value}"));
    }

    pub(super) fn maybe(&mut self, key: &str, value: Option<impl fmt::Display>) {
        if let Some(value) = value {
            self.rest.insert(key.to_owned(), value.to_string());
        }
    }

    pub(super) fn flag(&mut self, key: &str, value: Option<bool>) {
        self.maybe(key, value.map(u8::from));
    }

    pub(super) fn list(&mut self, key: &str, values: &[impl fmt::Display]) {
        if !values.is_empty() {
            let joined: Vec<String> = values.iter().map(ToString::to_string).collect();
            self.maybe(key, Some(joined.join(";")));
        }
    }

    pub(super) fn extra(&mut self, extra: &Extra) {
        for (key, value) in extra {
            self.rest.entry(key.clone()).or_insert_with(|| value.to_string());
        }
    }

    pub(super) fn finish(self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rest = self.rest.into_iter().map(|(key, value)| format!("{key}={value}"));
        let all: Vec<String> = self.first.into_iter().chain(rest).collect();
        to.write_str(&all.join(","))
    }
}
