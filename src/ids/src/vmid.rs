//! The number of a guest in Proxmox VE.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, de};

use crate::InvalidId;

/// A guest's number in Proxmox VE: 100 to 999,999,999 (its format `pve-vmid`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize)]
#[serde(transparent)]
pub struct Vmid(u32);

impl Vmid {
    /// The lowest.
    pub const MIN: Self = Self(100);
    /// The highest.
    pub const MAX: Self = Self(999_999_999);

    /// A number as VMID.
    ///
    /// # Errors
    /// It is below 100 or above 999,999,999.
    pub fn new(number: u32) -> Result<Self, InvalidId> {
        if (Self::MIN.0..=Self::MAX.0).contains(&number) {
            Ok(Self(number))
        } else {
            Err(invalid(&number.to_string(), "it is not between 100 and 999999999"))
        }
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0
    }
}

fn invalid(text: &str, reason: &'static str) -> InvalidId {
    InvalidId { kind: "VMID", value: text.chars().take(80).collect(), reason }
}

impl fmt::Display for Vmid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Vmid {
    type Err = InvalidId;
    fn from_str(s: &str) -> Result<Self, InvalidId> {
        if s.is_empty() || s.starts_with('0') || !s.bytes().all(|b| b.is_ascii_digit()) {
            return Err(invalid(s, "it is no plain number"));
        }
        Self::new(s.parse().map_err(|_| invalid(s, "it is not between 100 and 999999999"))?)
    }
}

impl TryFrom<u32> for Vmid {
    type Error = InvalidId;
    fn try_from(number: u32) -> Result<Self, InvalidId> {
        Self::new(number)
    }
}

impl From<Vmid> for u32 {
    fn from(id: Vmid) -> Self {
        id.0
    }
}

/// Proxmox VE writes it as a number or as a string.
impl<'de> Deserialize<'de> for Vmid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Vmid;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a VMID, 100 to 999999999")
            }
            fn visit_u64<E: de::Error>(self, v: u64) -> Result<Vmid, E> {
                let number = u32::try_from(v).map_err(|_| E::custom("it is too large for a VMID"))?;
                Vmid::new(number).map_err(E::custom)
            }
            fn visit_i64<E: de::Error>(self, v: i64) -> Result<Vmid, E> {
                self.visit_u64(u64::try_from(v).map_err(|_| E::custom("a VMID is not negative"))?)
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<Vmid, E> {
                v.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_vmid_is_a_plain_number_in_the_range() {
        assert_eq!("1000000".parse::<Vmid>().unwrap().get(), 1_000_000);
        for bad in ["", "99", "0100", "1000000000", "99999999999999", "-100", "100 ", "1e5", "+100"] {
            assert!(bad.parse::<Vmid>().is_err(), "{bad:?}");
        }
    }
}
