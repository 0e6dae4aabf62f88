//! Sizes in bytes as people write them: a number, or one of Kubernetes' quantities (`10Mi`, `1.5Gi`, `500M`).

use std::{fmt, str::FromStr};

use serde::de::{Deserializer, Error, Visitor};

/// A size in bytes in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) u64);

/// What a size looks like, for messages.
const FORM: &str = "a size in bytes, such as 10485760 or \"10Mi\"";
/// The suffixes of Kubernetes' quantities that are whole numbers of bytes.
const SUFFIXES: [(&str, u64); 13] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("Pi", 1 << 50),
    ("Ei", 1 << 60),
    ("k", 1000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("P", 1_000_000_000_000_000),
    ("E", 1_000_000_000_000_000_000),
    ("", 1),
];

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not {FORM}");
        let (number, unit) =
            SUFFIXES.iter().find_map(|(s, unit)| Some((text.strip_suffix(s)?, *unit))).ok_or_else(wrong)?;
        let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
        let digits = |t: &str| (1..=18).contains(&t.len()) && t.bytes().all(|b| b.is_ascii_digit());
        if !digits(whole) || !digits(part) {
            return Err(wrong());
        }
        let scale = 10_u128.pow(part.len() as u32);
        let read = |t: &str| t.parse::<u128>().map_err(|_| wrong());
        let scaled = (read(whole)? * scale + read(part)?) * u128::from(unit);
        if !scaled.is_multiple_of(scale) {
            return Err(format!("{text:?} is not a whole number of bytes"));
        }
        u64::try_from(scaled / scale).map(Self).map_err(|_| format!("{text:?} is over 16 EiB"))
    }
}

impl<'de> serde::Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Size;

        impl Visitor<'_> for Size {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(FORM)
            }

            fn visit_u64<E: Error>(self, bytes: u64) -> Result<Bytes, E> {
                Ok(Bytes(bytes))
            }

            fn visit_i64<E: Error>(self, bytes: i64) -> Result<Bytes, E> {
                u64::try_from(bytes)
                    .map(Bytes)
                    .map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(bytes), &self))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Bytes, E> {
                text.parse().map_err(E::custom)
            }
        }

        from.deserialize_any(Size)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sizes_are_read_as_kubernetes_reads_quantities() {
        for (text, bytes) in [
            ("0", 0),
            ("10485760", 10 << 20),
            ("10Mi", 10 << 20),
            ("1.5Gi", 3 << 29),
            ("500M", 500_000_000),
            ("1k", 1000),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for bad in ["", "Mi", "-1", "1.0001Ki", "10 Mi", "10MB", "64m", "1e3", "17Ei", "1..5Gi", "٣"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad}");
        }
    }
}
