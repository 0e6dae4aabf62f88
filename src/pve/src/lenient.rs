//! Reading values as loosely as the server writes them: Perl does not tell numbers from texts, so an integer may come as
//! a string, a boolean as 0, 1, their strings or an empty one, a text as a number, and null where a list is announced.
//!
//! The functions are for `#[serde(deserialize_with)]`; with `default` beside it a field that is missing is the same as
//! one that is null.

use std::fmt;

use serde::{Deserialize, Deserializer, de};
use serde_json::Value;

fn scalar(value: Value) -> Result<Option<String>, &'static str> {
    match value {
        Value::Null => Ok(None),
        Value::String(s) => Ok(Some(s)),
        Value::Number(n) => Ok(Some(n.to_string())),
        Value::Bool(b) => Ok(Some(u8::from(b).to_string())),
        Value::Array(_) => Err("a list where a single value is expected"),
        Value::Object(_) => Err("an object where a single value is expected"),
    }
}

fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    scalar(Value::deserialize(deserializer)?).map_err(de::Error::custom)
}

fn parse_u64(text: &str) -> Option<u64> {
    text.parse().ok().or_else(|| {
        // A sum that Perl did in floating point; whole numbers of that kind are exact below 2^53.
        let number: f64 = text.parse().ok()?;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        (0.0..9_007_199_254_740_992.0).contains(&number).then_some(number as u64)
    })
}

fn cut(text: &str) -> String {
    text.chars().take(60).collect()
}

/// An unsigned integer, if there is one. An empty string is none.
pub(crate) fn opt_u64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    match text(deserializer)? {
        Some(t) if t.is_empty() => Ok(None),
        Some(t) => {
            let number = parse_u64(&t);
            number
                .map(Some)
                .ok_or_else(|| de::Error::custom(format_args!("{:?} is no unsigned integer", cut(&t))))
        }
        None => Ok(None),
    }
}

/// An unsigned integer; null is 0.
pub(crate) fn u64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    Ok(opt_u64(deserializer)?.unwrap_or_default())
}

/// A number, if there is one. An empty string is none.
pub(crate) fn opt_f64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    match text(deserializer)? {
        Some(t) if t.is_empty() => Ok(None),
        Some(t) => match t.parse::<f64>() {
            Ok(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(de::Error::custom(format_args!("{:?} is no number", cut(&t)))),
        },
        None => Ok(None),
    }
}

/// A boolean, if there is one.
pub(crate) fn opt_bool<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<bool>, D::Error> {
    let Some(t) = text(deserializer)? else { return Ok(None) };
    parse_bool(&t).map(Some).ok_or_else(|| de::Error::custom(format_args!("{:?} is no boolean", cut(&t))))
}

/// A boolean; null and an empty string are false.
pub(crate) fn bool<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Ok(opt_bool(deserializer)?.unwrap_or_default())
}

pub(crate) fn parse_bool(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "on" | "yes" | "true" => Some(true),
        "" | "0" | "off" | "no" | "false" => Some(false),
        _ => None,
    }
}

/// Whether a value in an answer without a fixed form is true; what is no boolean is not.
pub(crate) fn is_true(value: &Value) -> bool {
    scalar(value.clone()).ok().flatten().and_then(|t| parse_bool(&t)).unwrap_or_default()
}

/// A text, if there is one; a number is taken as its digits.
pub(crate) fn opt_string<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    text(deserializer)
}

/// A text; null is empty.
pub(crate) fn string<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(text(deserializer)?.unwrap_or_default())
}

/// A value that is parsed from its text, if there is one. An empty string is none.
pub(crate) fn opt_parsed<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: std::str::FromStr,
    T::Err: fmt::Display,
{
    match text(deserializer)? {
        Some(t) if !t.is_empty() => t.parse().map(Some).map_err(de::Error::custom),
        _ => Ok(None),
    }
}

/// As [`opt_parsed`], for what is of use only if it can be read: anything else is none.
pub(crate) fn readable<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: std::str::FromStr,
{
    Ok(text(deserializer)?.and_then(|t| t.parse().ok()))
}

/// A list; null is empty.
pub(crate) fn list<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Ok(Option::<Vec<T>>::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[derive(Deserialize, Debug, Default, PartialEq)]
    #[serde(default)]
    struct Loose {
        #[serde(deserialize_with = "u64")]
        n: u64,
        #[serde(deserialize_with = "opt_f64")]
        f: Option<f64>,
        #[serde(deserialize_with = "bool")]
        b: bool,
        #[serde(deserialize_with = "opt_string")]
        s: Option<String>,
        #[serde(deserialize_with = "list")]
        l: Vec<u8>,
    }

    fn read(json: &str) -> Result<Loose, serde_json::Error> {
        serde_json::from_str(json)
    }

    #[test]
    fn numbers_booleans_and_lists_are_taken_as_the_server_writes_them() {
        let want = Loose { n: 7, f: Some(1.5), b: true, s: Some("5".into()), l: vec![] };
        for json in [
            r#"{"n":7,"f":1.5,"b":1,"s":"5","l":[]}"#,
            r#"{"n":"7","f":"1.5","b":"1","s":5,"l":null}"#,
            r#"{"n":7.0,"f":1.5,"b":true,"s":"5"}"#,
        ] {
            assert_eq!(read(json).unwrap(), want, "{json}");
        }
        assert_eq!(read(r#"{"n":null,"f":"","b":"","s":null}"#).unwrap(), Loose::default());
        assert_eq!(read("{}").unwrap(), Loose::default());
    }

    #[test]
    fn what_is_no_such_value_is_refused() {
        for json in [
            r#"{"n":-1}"#,
            r#"{"n":"x"}"#,
            r#"{"n":[]}"#,
            r#"{"b":2}"#,
            r#"{"f":"inf"}"#,
            r#"{"s":{}}"#,
            r#"{"l":5}"#,
        ] {
            assert!(read(json).is_err(), "{json}");
        }
    }
}
