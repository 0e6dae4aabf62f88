//! The names of things in Proxmox VE, checked: they become parts of request paths and of configuration lines.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Why a text is no such name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is no {kind}: {reason}")]
pub struct InvalidName {
    /// What was wanted, such as `node name`.
    pub kind: &'static str,
    /// The text, cut to 120 characters.
    pub value: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl InvalidName {
    pub(crate) fn new(kind: &'static str, value: &str, reason: &'static str) -> Self {
        Self { kind, value: value.chars().take(120).collect(), reason }
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl FromStr for $name {
            type Err = InvalidName;
            fn from_str(s: &str) -> Result<Self, InvalidName> {
                let check: fn(&str) -> Result<(), &'static str> = $check;
                check(s).map_err(|reason| InvalidName::new($kind, s, reason))?;
                Ok(Self(s.to_owned()))
            }
        }
        impl TryFrom<String> for $name {
            type Error = InvalidName;
            fn try_from(s: String) -> Result<Self, InvalidName> {
                s.parse()
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

fn bounded(s: &str, min: usize, max: usize) -> Result<(), &'static str> {
    match s.len() {
        n if n < min => Err("it is too short"),
        n if n > max => Err("it is too long"),
        _ => Ok(()),
    }
}

fn all(s: &str, ok: impl Fn(u8) -> bool) -> Result<(), &'static str> {
    if s.bytes().all(ok) { Ok(()) } else { Err("it has a character that is not allowed") }
}

fn starts_with_letter(s: &str) -> Result<(), &'static str> {
    if s.starts_with(|c: char| c.is_ascii_alphabetic()) {
        Ok(())
    } else {
        Err("it does not begin with a letter")
    }
}

fn no_dash_at_the_ends(s: &str) -> Result<(), &'static str> {
    if s.starts_with('-') || s.ends_with('-') { Err("it begins or ends with a dash") } else { Ok(()) }
}

/// Text that can stand as a value between the commas of a property string, and on a line.
fn property_text(s: &str) -> Result<(), &'static str> {
    bounded(s, 1, 4096)?;
    if s.contains(',') || s.chars().any(char::is_control) {
        return Err("it has a comma or a control character");
    }
    if s.trim() != s {
        return Err("it begins or ends with a blank");
    }
    Ok(())
}

name!(
    /** A node of the cluster, the short name of its host (format `pve-node`). */
    NodeName, "node name", |s| {
        bounded(s, 1, 63)?;
        no_dash_at_the_ends(s)?;
        all(s, |b| b.is_ascii_alphanumeric() || b == b'-')
    }
);
name!(
    /** A storage's id (format `pve-storage-id`). */
    StorageId, "storage id", |s| {
        bounded(s, 2, 100)?;
        starts_with_letter(s)?;
        if !s.ends_with(|c: char| c.is_ascii_alphanumeric()) {
            return Err("it does not end with a letter or a digit");
        }
        all(s, |b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    }
);
name!(
    /** A pool's id; up to three levels, parted by slashes (format `pve-poolid`). */
    PoolId, "pool id", |s| {
        bounded(s, 1, 256)?;
        if s.split('/').count() > 3 || s.split('/').any(str::is_empty) {
            return Err("it is not one to three names parted by slashes");
        }
        all(s, |b| b.is_ascii_alphanumeric() || b"-_./".contains(&b))
    }
);
name!(
    /** A volume on a storage, `storage:name` (format `pve-volume-id`); the name is a file's, with whatever is in it. */
    VolumeId, "volume id", |s| {
        bounded(s, 1, 4096)?;
        if s.chars().any(char::is_control) {
            return Err("it has a control character");
        }
        let (storage, name) = s.split_once(':').ok_or("it has no colon")?;
        if name.is_empty() {
            return Err("nothing stands after the colon");
        }
        storage.parse::<StorageId>().map(drop).map_err(|e| e.reason)
    }
);
name!(
    /** A snapshot's name (format `pve-configid`, up to 40 characters). */
    SnapshotName, "snapshot name", |s| {
        bounded(s, 2, 40)?;
        starts_with_letter(s)?;
        all(s, |b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
    }
);
name!(
    /** A network interface or bridge. */
    InterfaceName, "interface name", |s| {
        bounded(s, 1, 64)?;
        all(s, |b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    }
);
name!(
    /** A guest's tag (without the separator). */
    Tag, "tag", |s| {
        bounded(s, 1, 124)?;
        if s.starts_with(['-', '+', '.']) {
            return Err("it does not begin with a letter, a digit or an underscore");
        }
        all(s, |b| b.is_ascii_alphanumeric() || b"-_+.".contains(&b))
    }
);
name!(
    /** Text that can be a value within a property string: no comma, no control character, no blank at its ends. */
    PropertyText, "value in a property string", property_text
);

impl VolumeId {
    /// The storage that the volume is on.
    #[must_use]
    pub fn storage(&self) -> &str {
        self.0.split_once(':').map_or("", |(storage, _)| storage)
    }

    /// The volume's name on its storage.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.split_once(':').map_or("", |(_, name)| name)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_name_that_could_change_a_path_or_a_line_is_refused() {
        for bad in ["", "a/b", "..", "a b", "a\n", "-a", "a%2F", "a?b"] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?}");
            assert!(bad.parse::<StorageId>().is_err(), "{bad:?}");
        }
        for bad in ["a,b", "a\nb", "", " a"] {
            assert!(bad.parse::<PropertyText>().is_err(), "{bad:?}");
        }
        assert!("a//b".parse::<PoolId>().is_err());
        assert!("x:y".parse::<VolumeId>().is_err());
        assert!("1a".parse::<SnapshotName>().is_err());
        assert!("-a".parse::<Tag>().is_err());
    }

    #[test]
    fn a_volume_id_is_storage_and_name() {
        let volume: VolumeId = "local-zfs:subvol-100-disk-0".parse().unwrap();
        assert_eq!((volume.storage(), volume.name()), ("local-zfs", "subvol-100-disk-0"));
    }
}
