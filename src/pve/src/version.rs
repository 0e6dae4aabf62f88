//! Versions of Proxmox VE, and which of them we can work with.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::InvalidName;

/// A version of Proxmox VE: `9.2.11`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Version {
    /// 9 of 9.2.11.
    pub major: u32,
    /// 2 of 9.2.11.
    pub minor: u32,
    /// 11 of 9.2.11; 0 where none is given.
    pub patch: u32,
}

/// The oldest version that this client works with.
pub const OLDEST: Version = Version { major: 9, minor: 1, patch: 0 };

/// The major version that it was written against. A newer one is used, with a warning.
pub const NEWEST_MAJOR: u32 = 9;

impl FromStr for Version {
    type Err = InvalidName;
    /// A suffix after a dash, tilde or plus sign is ignored, as in `9.0.0~11`.
    fn from_str(s: &str) -> Result<Self, InvalidName> {
        let bad = || InvalidName::new("version", s, "it is not numbers parted by dots");
        let plain = s.split(['-', '~', '+']).next().unwrap_or_default();
        let numbers: Vec<u32> =
            plain.split('.').map(str::parse).collect::<Result<_, _>>().map_err(|_| bad())?;
        match numbers[..] {
            [major, minor] => Ok(Self { major, minor, patch: 0 }),
            [major, minor, patch, ..] => Ok(Self { major, minor, patch }),
            _ => Err(bad()),
        }
    }
}

impl TryFrom<String> for Version {
    type Error = InvalidName;
    fn try_from(s: String) -> Result<Self, InvalidName> {
        s.parse()
    }
}

impl From<Version> for String {
    fn from(v: Version) -> Self {
        v.to_string()
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn versions_are_read_and_ordered() {
        let v = |s: &str| s.parse::<Version>().unwrap();
        assert!(
            v("9.0.10") < OLDEST && v("9.1") >= OLDEST && v("9.2.11") > v("9.2.9") && v("10.0.0~1") > OLDEST
        );
        for bad in ["", "9", "x.y", "9.", "-1.2"] {
            assert!(bad.parse::<Version>().is_err(), "{bad:?}");
        }
    }
}
