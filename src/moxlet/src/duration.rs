//! Spans of time as people write them: `90s`, `2m`, `24h`, `7d`, `1h30m`.

use std::{str::FromStr, time::Duration};

use anyhow::bail;

/// A span of time on the command line and in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span(pub(crate) Duration);

/// What a span looks like, for messages.
const FORM: &str = "a span of time, such as \"90s\", \"2m\", \"24h\" or \"7d\"";

impl<'de> serde::Deserialize<'de> for Span {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Spans;

        impl serde::de::Visitor<'_> for Spans {
            type Value = Span;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(FORM)
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Span, E> {
                text.parse().map_err(E::custom)
            }
        }

        from.deserialize_str(Spans)
    }
}

impl FromStr for Span {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let wrong = || anyhow::anyhow!("{text:?} is not {FORM}");
        let (mut sum, mut rest) = (Duration::ZERO, text.trim());
        if rest.is_empty() {
            return Err(wrong());
        }
        while !rest.is_empty() {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let (number, unit) = rest.split_at(digits);
            let number: u64 = number.parse().map_err(|_| wrong())?;
            let Some(letter) = unit.chars().next() else { return Err(wrong()) };
            let seconds = match letter {
                's' => 1,
                'm' => 60,
                'h' => 3600,
                'd' => 86_400,
                _ => return Err(wrong()),
            };
            let part = number.checked_mul(seconds).map(Duration::from_secs);
            let Some(all) = part.and_then(|p| sum.checked_add(p)) else { bail!("{text:?} is too long") };
            sum = all;
            rest = unit.get(1..).unwrap_or_default();
        }
        Ok(Self(sum))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn spans_are_read_as_people_write_them() {
        for (text, seconds) in [("0s", 0), ("90s", 90), ("2m", 120), ("1h30m", 5400), ("7d", 604_800)] {
            assert_eq!(text.parse::<Span>().unwrap().0.as_secs(), seconds, "{text}");
        }
        for bad in ["", "1", "m", "1w", "-1s", "1 h", "99999999999999999999s", "9999999999999999999d"] {
            assert!(bad.parse::<Span>().is_err(), "{bad}");
        }
    }
}
