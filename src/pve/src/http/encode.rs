//! Paths, queries and forms.

use std::borrow::Cow;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

/// RFC 3986, section 2.3: what needs no encoding.
const KEPT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A path from its template: `{name}` becomes the value of that name, encoded.
pub(crate) fn path(template: &str, values: &[(&'static str, String)]) -> String {
    let mut out = String::new();
    for segment in template.split('/').skip(1) {
        out.push('/');
        let name = segment.strip_prefix('{').and_then(|s| s.strip_suffix('}'));
        match name.and_then(|n| values.iter().find(|(k, _)| *k == n)) {
            Some((_, value)) => out.extend(utf8_percent_encode(value, KEPT)),
            None => out.push_str(segment),
        }
    }
    out
}

/// `application/x-www-form-urlencoded`, for queries and bodies alike.
pub(crate) fn form(parameters: &[(Cow<'static, str>, String)]) -> String {
    let mut out = String::new();
    for (name, value) in parameters {
        if !out.is_empty() {
            out.push('&');
        }
        out.extend(utf8_percent_encode(name, KEPT));
        out.push('=');
        out.extend(utf8_percent_encode(value, KEPT));
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_value_cannot_leave_its_place() {
        let upid = "UPID:a:1:root@pam!x:".to_owned();
        let made = path("/nodes/{node}/tasks/{upid}/log", &[("node", "../a?b".into()), ("upid", upid)]);
        assert_eq!(made, "/nodes/..%2Fa%3Fb/tasks/UPID%3Aa%3A1%3Aroot%40pam%21x%3A/log");
        assert_eq!(
            form(&[("a".into(), "x y&b=\n".into()), ("c".into(), String::new())]),
            "a=x%20y%26b%3D%0A&c="
        );
    }
}
