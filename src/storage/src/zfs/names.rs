//! Names and properties of the store's datasets.
//!
//! User properties are inherited, so a mark alone would make a foreign child of one of ours look like ours. Our mark
//! therefore holds what the dataset is: one whose mark is not the one of its own name belongs to somebody else.

use std::{fmt, str::FromStr};

use moxlet_ids::{ChainId, ContainerId};

use crate::{
    IdMap,
    error::{Error, Result},
};

/// Marks a dataset as ours.
pub(super) const OWNER: &str = "dev.moxlet:owner";
/// The format of the other properties.
pub(super) const VERSION: &str = "dev.moxlet:version";
/// A layer's parent.
pub(super) const PARENT: &str = "dev.moxlet:parent";
/// Objects of a layer with all below it, as the file system counts them.
pub(super) const OBJECTS: &str = "dev.moxlet:objects";
/// Files and directories that a layer brought.
pub(super) const INODES: &str = "dev.moxlet:inodes";
/// The top layer of a root.
pub(super) const TOP: &str = "dev.moxlet:top";
/// A root's id map.
pub(super) const MAP: &str = "dev.moxlet:map";
/// A root's quota as it was asked for.
pub(super) const QUOTA: &str = "dev.moxlet:quota";
/// Where the ids of a root are shifted.
pub(super) const IDS: &str = "dev.moxlet:ids";
/// The format that this version writes.
pub(super) const FORMAT: u32 = 1;
/// The snapshot of a finished layer.
const SNAPSHOT: &str = "layer";

/// ZFS takes 255 bytes; the longest of ours is `shifted/<base>-<size>/<64 digits>@layer-<number>`.
const MAX_PARENT: usize = 255 - 110;

/// One of the snapshots of a finished layer, all of which hold the same.
///
/// The first, `@layer`, is there as long as the layer is, and is what other layers are made on and what is sent elsewhere.
/// The others, `@layer-1` and on, are for roots alone: the `zfs` program opens the snapshot that it clones, and OpenZFS
/// tells each time all the clones that it has, so that one more costs the more the more there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(super) struct Snapshot(u16);

impl Snapshot {
    pub(super) const FIRST: Self = Self(0);

    /// The first one and those after it, as far as they go.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        (0..=u16::MAX).map(Self)
    }

    /// By what stands behind the `@`.
    pub(super) fn of_name(name: &str) -> Option<Self> {
        if name == SNAPSHOT {
            return Some(Self::FIRST);
        }
        let number = name.strip_prefix(SNAPSHOT)?.strip_prefix('-')?;
        let plain = !number.starts_with(['0', '+']);
        number.parse().ok().filter(|_| plain).map(Self)
    }

    /// Of this dataset.
    pub(super) fn of(self, dataset: &str) -> String {
        format!("{dataset}@{self}")
    }
}

/// What stands behind the `@`.
impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str(SNAPSHOT),
            number => write!(f, "{SNAPSHOT}-{number}"),
        }
    }
}

/// What a dataset of ours is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// The store's own dataset, if we made it.
    Top,
    /// A dataset that only groups others: `layers`, `drafts`, `roots`, `shifted`, or one for a map below that.
    Group(String),
    /// What the store keeps for others.
    State,
    /// A finished layer.
    Layer(ChainId),
    /// A layer with the ids of a map.
    Shifted(IdMap, ChainId),
    /// A container's root.
    Root(ContainerId),
    /// Something that is being made.
    Draft(String),
}

impl Kind {
    /// The name below the store's dataset.
    pub(super) fn path(&self) -> String {
        match self {
            Self::Top => String::new(),
            Self::Group(name) => name.clone(),
            Self::State => "state".to_owned(),
            Self::Layer(chain) => format!("layers/{}", chain.digest().hex()),
            Self::Shifted(map, chain) => format!("shifted/{}/{}", dir_of(*map), chain.digest().hex()),
            Self::Root(id) => format!("roots/{id}"),
            Self::Draft(name) => format!("drafts/{name}"),
        }
    }

    /// What a dataset with this mark is.
    pub(super) fn of_mark(mark: &str) -> Option<Self> {
        let path = mark.strip_prefix("moxlet:")?;
        if let Some(hex) = path.strip_prefix("layers/") {
            return chain(hex).map(Self::Layer);
        }
        if let Some(rest) = path.strip_prefix("shifted/")
            && let Some((map, hex)) = rest.split_once('/')
        {
            return Some(Self::Shifted(map_of(map)?, chain(hex)?));
        }
        if let Some(id) = path.strip_prefix("roots/") {
            return id.parse().ok().map(Self::Root);
        }
        if let Some(name) = path.strip_prefix("drafts/") {
            return Some(Self::Draft(name.to_owned()));
        }
        match path {
            "" => Some(Self::Top),
            "state" => Some(Self::State),
            group => Some(Self::Group(group.to_owned())),
        }
    }
}

/// The mark: `moxlet:` and the name below the store's dataset, so that the store can be renamed as a whole.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "moxlet:{}", self.path())
    }
}

pub(super) fn chain(hex: &str) -> Option<ChainId> {
    ChainId::from_str(&format!("sha256:{hex}")).ok()
}

/// A map as part of a dataset's name.
pub(super) fn dir_of(map: IdMap) -> String {
    format!("{}-{}", map.host_base, map.size)
}

pub(super) fn map_of(text: &str) -> Option<IdMap> {
    let (base, size) = text.split_once('-')?;
    Some(IdMap { host_base: base.parse().ok()?, size: size.parse().ok()? }).filter(IdMap::is_valid)
}

/// Whether a dataset can hold a store, by its name.
///
/// # Errors
/// [`Error::BadDataset`].
pub(super) fn check(name: &str) -> Result<()> {
    let bad = |reason| Err(Error::BadDataset { name: name.chars().take(300).collect(), reason });
    if name.len() > MAX_PARENT {
        return bad("it is longer than 145 characters, which leaves too few for the names below it");
    }
    let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    for part in name.split('/') {
        if part.is_empty()
            || !part.starts_with(|c: char| c.is_ascii_alphanumeric())
            || !part.chars().all(word)
        {
            return bad(
                "its parts are letters, digits, `-`, `_`, `.` and `:`, and start with a letter or digit",
            );
        }
        if of_pve(part) {
            return bad("Proxmox VE would take it for a disk of a guest");
        }
    }
    if !name.contains('/') {
        return bad("it is a whole pool; give the store a dataset of its own, such as `rpool/moxlet`");
    }
    Ok(())
}

/// Whether Proxmox VE's storage plugins would take a name for a guest's disk (`PVE/Storage/ZFSPoolPlugin.pm`, `parse_volname`).
fn of_pve(name: &str) -> bool {
    ["vm-", "base-", "subvol-", "basevol-"]
        .iter()
        .filter_map(|prefix| name.strip_prefix(prefix))
        .any(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use moxlet_ids::Digest;

    use super::*;

    #[test]
    fn a_mark_says_what_a_dataset_is() {
        let chain = ChainId::base(&Digest::of(b"x"));
        for kind in [
            Kind::Top,
            Kind::State,
            Kind::Group("shifted/100000-65536".into()),
            Kind::Layer(chain.clone()),
            Kind::Shifted(IdMap::default(), chain),
            Kind::Root(ContainerId::random()),
            Kind::Draft("layer-1-2-3".into()),
        ] {
            let mark = kind.to_string();
            let again = Kind::of_mark(&mark);
            assert_eq!(again, Some(kind.clone()), "{mark}");
            assert!(!of_pve(kind.path().rsplit('/').next().unwrap()));
        }
        assert_eq!(Kind::of_mark("moxlet:layers/xyz"), None);
        assert_eq!(Kind::of_mark("-"), None);
    }

    #[test]
    fn snapshots_of_a_layer_are_known_by_their_names_alone() {
        for snapshot in Snapshot::all().take(12).chain([Snapshot(u16::MAX)]) {
            assert_eq!(Snapshot::of_name(&snapshot.to_string()), Some(snapshot));
        }
        assert_eq!(Snapshot(7).of("tank/m/layers/x"), "tank/m/layers/x@layer-7");
        for foreign in
            ["", "daily", "layer-", "layer-0", "layer-01", "layer-+1", "layer-65536", "layer1", "layers"]
        {
            assert_eq!(Snapshot::of_name(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn a_name_that_cannot_hold_a_store_is_refused() {
        let long = format!("tank/{}", "a".repeat(150));
        for bad in
            ["", "tank", "/tank", "tank/", "tank//x", "tank/a@b", "tank/a b", "-x/y", "tank/../x", &long]
        {
            assert!(check(bad).is_err(), "{bad}");
        }
        for bad in ["rpool/data/subvol-100-disk-0", "rpool/vm-1-x", "tank/basevol-1-disk-1/x", "tank/base-9"]
        {
            assert!(check(bad).is_err(), "{bad}");
        }
        for good in ["rpool/moxlet", "tank/a/b.c:d_e", "tank/base-images", "tank/vm-store"] {
            check(good).unwrap();
        }
    }
}
