//! `$(NAME)` in commands, arguments and variables: known names are replaced, unknown ones stay, `$$` is one `$`.

/// Replaces what `lookup` knows.
pub(crate) fn expand<'a>(text: &str, lookup: impl Fn(&str) -> Option<&'a str>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some((name, tail)) = after.strip_prefix('(').and_then(|t| t.split_once(')')) {
            match lookup(name) {
                Some(value) => out.push_str(value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = tail;
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use proptest::prelude::*;

    use super::*;

    fn known(name: &str) -> Option<&'static str> {
        match name {
            "A" => Some("alpha"),
            "EMPTY" => Some(""),
            "REF" => Some("$(A)"),
            _ => None,
        }
    }

    #[test]
    fn as_the_api_documents_it() {
        for (text, want) in [
            ("$(A)", "alpha"),
            ("x$(A)y", "xalphay"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$alpha"),
            ("$(B)", "$(B)"),
            ("$(A", "$(A"),
            ("$", "$"),
            ("$A", "$A"),
            ("$$", "$"),
            ("$(EMPTY)", ""),
            ("$(REF)", "$(A)"),
            ("$()", "$()"),
        ] {
            assert_eq!(expand(text, known), want, "{text}");
        }
    }

    proptest! {
        #[test]
        fn text_without_dollars_is_unchanged(text in "[^$]*") {
            prop_assert_eq!(expand(&text, known), text);
        }

        #[test]
        fn doubled_dollars_protect_anything(text in "\\PC*") {
            prop_assert_eq!(expand(&text.replace('$', "$$"), known), text);
        }
    }
}
