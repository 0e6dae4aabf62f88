//! Values of `rootfs`, `mpN` and `netN`: `key=value,…`, sizes and kinds of mount points.

use std::collections::BTreeMap;

use super::CtConf;

/// What a mount point's first part is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum VolumeKind {
    /// `storage:volume`.
    Storage { storage: String, volume: String },
    /// A directory of the host.
    Bind(String),
    /// A block device of the host.
    Device(String),
}

/// One of `rootfs`, `mp0`, ….
#[derive(Debug, Clone)]
pub(crate) struct Volume {
    /// Its key in the config.
    pub(crate) key: String,
    pub(crate) kind: VolumeKind,
    /// The other parts, such as `size`, `mp`, `shared`.
    pub(crate) options: BTreeMap<String, String>,
}

impl Volume {
    /// Parses a value; the volume may be written as `volume=…`, too.
    pub(crate) fn parse(key: &str, value: &str) -> Option<Self> {
        let mut options = parse_pairs(value, "volume");
        let volume = options.remove("volume")?;
        let kind = if volume.starts_with("/dev/") {
            VolumeKind::Device(volume)
        } else if volume.starts_with('/') {
            VolumeKind::Bind(volume)
        } else {
            let (storage, volume) = volume.split_once(':')?;
            VolumeKind::Storage { storage: storage.into(), volume: volume.into() }
        };
        Some(Self { key: key.into(), kind, options })
    }

    /// What Proxmox VE calls its kind.
    pub(crate) fn kind_name(&self) -> &'static str {
        match self.kind {
            VolumeKind::Storage { .. } => "volume",
            VolumeKind::Bind(_) => "bind",
            VolumeKind::Device(_) => "device",
        }
    }

    /// `size=` in bytes.
    pub(crate) fn size(&self) -> Option<u64> {
        self.options.get("size").and_then(|s| size_bytes(s))
    }

    pub(crate) fn is_shared(&self) -> bool {
        self.options.get("shared").is_some_and(|v| v == "1")
    }
}

/// All mount points of a CT's main section, `rootfs` first.
pub(crate) fn mount_points(conf: &CtConf) -> Vec<Volume> {
    let of = |key: &str| conf.get(key).and_then(|value| Volume::parse(key, value));
    let mut all: Vec<Volume> = of("rootfs").into_iter().collect();
    all.extend((0..256).filter_map(|n| of(&format!("mp{n}"))));
    all
}

/// Splits `a,key=value,…`; a part without a name is the value of `default`.
pub(crate) fn parse_pairs(text: &str, default: &str) -> BTreeMap<String, String> {
    text.split(',')
        .filter(|p| !p.is_empty())
        .map(|part| match part.split_once('=') {
            Some((key, value)) => (key.to_owned(), value.to_owned()),
            None => (default.to_owned(), part.to_owned()),
        })
        .collect()
}

/// `8G` in bytes; without a unit, bytes.
pub(crate) fn size_bytes(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(['K', 'M', 'G', 'T']);
    let factor = match text.get(digits.len()..)? {
        "" => 1u64,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1 << 40,
        _ => return None,
    };
    let n: f64 = digits.parse().ok()?;
    (n.is_finite() && (0.0..1e9).contains(&n)).then_some((n * factor as f64) as u64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn mount_points_are_told_apart() {
        let root = Volume::parse("rootfs", "local-zfs:subvol-100-disk-0,size=8G").unwrap();
        assert_eq!(root.kind_name(), "volume");
        assert_eq!(root.size(), Some(8 << 30));
        let guard = Volume::parse("mp0", "/var/empty,mp=/run/guard,ro=1").unwrap();
        assert_eq!(guard.kind_name(), "bind");
        assert!(!guard.is_shared());
    }
}
