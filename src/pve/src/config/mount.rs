//! `rootfs`, `mpN` and `devN`: what a CT's file system is made of.

use std::{fmt, str::FromStr};

use super::property::{Extra, Fields, Writer};
use crate::{InvalidName, PropertyText};

/// What `rootfs` and the mount points have in common (`pve-container`'s `$rootfs_desc`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// A volume id, a device, or a directory of the host; for a new volume `storage:size`.
    pub volume: PropertyText,
    /// Whether access control lists are supported.
    pub acl: Option<bool>,
    /// How ids are mapped (9.2 and later): `passthrough` or ranges.
    pub idmap: Option<PropertyText>,
    /// `noatime`, `nodev`, ….
    pub mountoptions: Vec<PropertyText>,
    /// Whether quotas are on.
    pub quota: Option<bool>,
    /// Whether it is replicated.
    pub replicate: Option<bool>,
    /// Whether it is read-only.
    pub ro: Option<bool>,
    /// Whether all nodes have it.
    pub shared: Option<bool>,
    /// Its size; for show alone.
    pub size: Option<DiskSize>,
    /// Keys that this version does not know.
    pub extra: Extra,
}

impl Volume {
    /// A volume without any option.
    #[must_use]
    pub fn new(volume: PropertyText) -> Self {
        Self {
            volume,
            acl: None,
            idmap: None,
            mountoptions: Vec::new(),
            quota: None,
            replicate: None,
            ro: None,
            shared: None,
            size: None,
            extra: Extra::new(),
        }
    }

    /// Takes its own keys; `extra` is left to the caller.
    fn take(fields: &mut Fields<'_>) -> Result<Self, InvalidName> {
        Ok(Self {
            volume: fields.needed("volume", "the volume is missing or none")?,
            acl: fields.flag("acl")?,
            idmap: fields.parsed("idmap", "the id map is none")?,
            mountoptions: fields.list("mountoptions", "a mount option is none")?,
            quota: fields.flag("quota")?,
            replicate: fields.flag("replicate")?,
            ro: fields.flag("ro")?,
            shared: fields.flag("shared")?,
            size: fields.parsed("size", "the size is none")?,
            extra: Extra::new(),
        })
    }

    fn write(&self, w: &mut Writer) {
        w.main("volume", &self.volume);
        w.flag("acl", self.acl);
        w.maybe("idmap", self.idmap.as_ref());
        w.list("mountoptions", &self.mountoptions);
        w.flag("quota", self.quota);
        w.flag("replicate", self.replicate);
        w.flag("ro", self.ro);
        w.flag("shared", self.shared);
        w.maybe("size", self.size);
        w.extra(&self.extra);
    }
}

impl FromStr for Volume {
    type Err = InvalidName;
    fn from_str(s: &str) -> Result<Self, InvalidName> {
        let mut fields = Fields::parse("volume", s, Some("volume"))?;
        let volume = Self::take(&mut fields)?;
        Ok(Self { extra: fields.rest()?, ..volume })
    }
}

impl fmt::Display for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut w = Writer::default();
        self.write(&mut w);
        w.finish(f)
    }
}

/// `mpN`: a mount point (`pve-container`'s `$mp_desc`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPoint {
    /// Where it is in the CT.
    pub path: PropertyText,
    /// Whether backups hold it.
    pub backup: Option<bool>,
    /// Whether the directory keeps its owner and mode.
    pub keepattrs: Option<bool>,
    /// What is mounted, and how.
    pub volume: Volume,
}

impl FromStr for MountPoint {
    type Err = InvalidName;
    fn from_str(s: &str) -> Result<Self, InvalidName> {
        let mut fields = Fields::parse("mount point", s, Some("volume"))?;
        let path = fields.needed("mp", "the path in the CT is missing or none")?;
        let backup = fields.flag("backup")?;
        let keepattrs = fields.flag("keepattrs")?;
        let volume = Volume::take(&mut fields)?;
        Ok(Self { path, backup, keepattrs, volume: Volume { extra: fields.rest()?, ..volume } })
    }
}

impl fmt::Display for MountPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut w = Writer::default();
        self.volume.write(&mut w);
        w.field("mp", &self.path);
        w.flag("backup", self.backup);
        w.flag("keepattrs", self.keepattrs);
        w.finish(f)
    }
}

/// `devN`: a device that is passed into the CT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its path, which is the same on host and in the CT.
    pub path: PropertyText,
    /// Whether the CT may only read it.
    pub deny_write: Option<bool>,
    /// Its group in the CT.
    pub gid: Option<u32>,
    /// Its mode, four octal digits beginning with 0.
    pub mode: Option<PropertyText>,
    /// Its owner in the CT.
    pub uid: Option<u32>,
    /// Keys that this version does not know.
    pub extra: Extra,
}

impl FromStr for Device {
    type Err = InvalidName;
    fn from_str(s: &str) -> Result<Self, InvalidName> {
        let mut fields = Fields::parse("device", s, Some("path"))?;
        let path = fields.needed("path", "the path is missing or none")?;
        let deny_write = fields.flag("deny-write")?;
        let gid = fields.parsed("gid", "the group is no number")?;
        let mode = fields.parsed("mode", "the mode is none")?;
        let uid = fields.parsed("uid", "the owner is no number")?;
        Ok(Self { path, deny_write, gid, mode, uid, extra: fields.rest()? })
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut w = Writer::default();
        w.main("path", &self.path);
        w.flag("deny-write", self.deny_write);
        w.maybe("gid", self.gid);
        w.maybe("mode", self.mode.as_ref());
        w.maybe("uid", self.uid);
        w.extra(&self.extra);
        w.finish(f)
    }
}

/// A size as the server writes it: a number with K, M, G or T, powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DiskSize(u64);

impl DiskSize {
    /// A size in bytes.
    #[must_use]
    pub fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for DiskSize {
    type Err = InvalidName;
    fn from_str(s: &str) -> Result<Self, InvalidName> {
        let wrong = || InvalidName::new("disk size", s, "it is no number with K, M, G or T");
        let (number, shift) = match s.char_indices().last() {
            Some((at, 'K')) => (&s[..at], 10),
            Some((at, 'M')) => (&s[..at], 20),
            Some((at, 'G')) => (&s[..at], 30),
            Some((at, 'T')) => (&s[..at], 40),
            _ => (s, 0),
        };
        if number.is_empty() || !number.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
            return Err(wrong());
        }
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(1 << shift).map(Self).ok_or_else(wrong);
        }
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        match number.parse::<f64>().map(|n| n * (1u64 << shift) as f64) {
            Ok(bytes) if bytes < 9.0e18 => Ok(Self(bytes as u64)),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for DiskSize {
    /// In the largest unit in which it is whole.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')] {
            if self.0 >= 1 << shift && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}
