//! What the store holds, in memory: read once when it is opened, changed with every step after that, so that no operation
//! has to list datasets.

use std::collections::{BTreeMap, HashMap, HashSet};

use moxlet_ids::{ChainId, ContainerId};

use super::{
    IdStyle,
    names::{Kind, Snapshot},
};
use crate::{IdMap, error::LayerUser};

/// A finished layer.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) parent: Option<ChainId>,
    /// Bytes of the layer with all below it.
    pub(super) referenced: u64,
    /// Objects of the layer with all below it.
    pub(super) objects: u64,
    /// Files and directories that it brought.
    pub(super) inodes: u64,
    /// The identity of its snapshot, which a transfer keeps.
    pub(super) guid: String,
}

/// A layer whose ids have been changed to those of a map.
#[derive(Debug, Clone, Copy)]
pub(super) struct Copy {
    pub(super) referenced: u64,
}

/// A container's root, as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Root {
    pub(super) top: Option<ChainId>,
    pub(super) map: IdMap,
    pub(super) quota: Option<u64>,
    pub(super) ids: IdStyle,
    /// Which of the snapshots it is a clone of.
    pub(super) snapshot: Snapshot,
}

impl Root {
    /// Whether it is what is asked for; where ids are shifted is ours to choose.
    pub(super) fn is_as(&self, other: &Self) -> bool {
        (&self.top, self.map, self.quota) == (&other.top, other.map, other.quota)
    }

    /// What it is a clone of, if anything.
    pub(super) fn origin(&self) -> Option<Kind> {
        let top = self.top.clone()?;
        Some(match self.ids {
            IdStyle::Idmapped => Kind::Layer(top),
            IdStyle::Shifted => Kind::Shifted(self.map, top),
        })
    }
}

/// Why a layer is kept beside layers and roots on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hold {
    Draft,
    View,
}

/// How many roots are clones of one snapshot before the next is taken: `scripts/bench clones` shows what it does.
const CLONES: usize = 64;

/// All of the store.
#[derive(Debug, Default)]
pub(super) struct Index {
    pub(super) layers: HashMap<ChainId, Layer>,
    pub(super) copies: HashMap<(IdMap, ChainId), Copy>,
    pub(super) roots: HashMap<ContainerId, Root>,
    /// Roots that are just being made: they keep their layers, but are not here yet.
    pub(super) coming: HashMap<ContainerId, Root>,
    /// Reasons by a number of their own, to be dropped by it.
    pub(super) holds: BTreeMap<u64, (ChainId, Hold)>,
    /// The layers below those that are being made, by the draft's name.
    pub(super) drafts: HashMap<String, ChainId>,
    /// Maps whose group of shifted layers is there.
    pub(super) groups: HashSet<IdMap>,
    /// Removed roots and layers whose datasets are still busy, by name, with the layer that they stand on.
    pub(super) gone: HashMap<String, Option<ChainId>>,
    next: u64,
}

impl Index {
    /// Keeps a layer until [`Self::release`].
    pub(super) fn hold(&mut self, chain: &ChainId, why: Hold) -> u64 {
        self.next += 1;
        self.holds.insert(self.next, (chain.clone(), why));
        self.next
    }

    pub(super) fn release(&mut self, number: u64) {
        self.holds.remove(&number);
    }

    /// One of those who use a layer.
    pub(super) fn user_of(&self, chain: &ChainId) -> Option<LayerUser> {
        let on_it = |(_, root): &(&ContainerId, &Root)| root.top.as_ref() == Some(chain);
        if let Some((id, _)) = self.roots.iter().chain(&self.coming).find(on_it) {
            return Some(LayerUser::Root(id.clone()));
        }
        if let Some((upper, _)) = self.layers.iter().find(|(_, l)| l.parent.as_ref() == Some(chain)) {
            return Some(LayerUser::Layer(upper.clone()));
        }
        if let Some((_, why)) = self.holds.values().find(|(c, _)| c == chain) {
            return Some(match why {
                Hold::Draft => LayerUser::Draft,
                Hold::View => LayerUser::View,
            });
        }
        if self.drafts.values().any(|parent| parent == chain) {
            return Some(LayerUser::Draft);
        }
        let gone = self.gone.iter().find(|(_, top)| top.as_ref() == Some(chain));
        gone.map(|(dataset, _)| LayerUser::Dataset(dataset.clone()))
    }

    /// The snapshot that a root's clone is best made of: the first that has not too many yet, whether it is there or not.
    pub(super) fn snapshot_for(&self, root: &Root) -> Snapshot {
        let mut clones: HashMap<Snapshot, usize> = HashMap::new();
        let origin = root.origin();
        for other in self.roots.values().chain(self.coming.values()).filter(|other| other.origin() == origin)
        {
            *clones.entry(other.snapshot).or_default() += 1;
        }
        let has_room = |snapshot: &Snapshot| clones.get(snapshot).is_none_or(|count| *count < CLONES);
        Snapshot::all().find(has_room).unwrap_or_default()
    }

    /// A layer and all below it, the bottom one first.
    pub(super) fn stack(&self, top: Option<&ChainId>) -> Vec<ChainId> {
        let mut stack = Vec::new();
        let mut at = top;
        // A record that somebody has edited must not keep us here for ever.
        while let Some(chain) = at.filter(|_| stack.len() <= self.layers.len()) {
            stack.push(chain.clone());
            at = self.layers.get(chain).and_then(|l| l.parent.as_ref());
        }
        stack.reverse();
        stack
    }

    /// All layers, each before those below it.
    pub(super) fn top_first(&self) -> Vec<ChainId> {
        let mut depths: HashMap<&ChainId, usize> = HashMap::new();
        for chain in self.layers.keys() {
            // As far up as the next one whose depth is known.
            let mut path = Vec::new();
            let mut at = Some(chain);
            while let Some(c) = at.filter(|c| !depths.contains_key(*c) && path.len() <= self.layers.len()) {
                path.push(c);
                at = self.layers.get(c).and_then(|l| l.parent.as_ref());
            }
            let mut depth = at.and_then(|c| depths.get(c)).copied().unwrap_or(0);
            for c in path.into_iter().rev() {
                depth += 1;
                depths.insert(c, depth);
            }
        }
        let mut all: Vec<_> = self.layers.keys().cloned().collect();
        all.sort_by_key(|c| (std::cmp::Reverse(depths.get(c).copied()), c.clone()));
        all
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use moxlet_ids::Digest;

    use super::*;

    fn chain(name: &str) -> ChainId {
        ChainId::base(&Digest::of(name.as_bytes()))
    }

    fn layer(parent: Option<&str>) -> Layer {
        Layer { parent: parent.map(chain), referenced: 0, objects: 0, inodes: 0, guid: String::new() }
    }

    #[test]
    fn layers_come_before_those_that_they_were_made_on() {
        let mut index = Index::default();
        for (name, parent) in [("b", Some("a")), ("a", None), ("c", Some("b")), ("x", Some("a")), ("y", None)]
        {
            index.layers.insert(chain(name), layer(parent));
        }
        let order = index.top_first();
        let at = |name: &str| order.iter().position(|c| *c == chain(name)).unwrap();
        assert!(at("c") < at("b") && at("b") < at("a") && at("x") < at("a"));
        assert_eq!(order.len(), 5);
        assert_eq!(index.stack(Some(&chain("c"))), [chain("a"), chain("b"), chain("c")]);
    }

    #[test]
    fn a_circle_of_parents_ends() {
        let mut index = Index::default();
        index.layers.insert(chain("a"), layer(Some("b")));
        index.layers.insert(chain("b"), layer(Some("a")));
        assert_eq!(index.top_first().len(), 2);
        assert!(index.stack(Some(&chain("a"))).len() <= 3);
    }

    #[test]
    fn whoever_uses_a_layer_is_named() {
        let mut index = Index::default();
        index.layers.insert(chain("a"), layer(None));
        assert_eq!(index.user_of(&chain("a")), None);
        let hold = index.hold(&chain("a"), Hold::View);
        assert_eq!(index.user_of(&chain("a")), Some(LayerUser::View));
        index.release(hold);
        let id = ContainerId::random();
        let root = Root {
            top: Some(chain("a")),
            map: IdMap::default(),
            quota: None,
            ids: IdStyle::Idmapped,
            snapshot: Snapshot::FIRST,
        };
        index.coming.insert(id.clone(), root);
        assert_eq!(index.user_of(&chain("a")), Some(LayerUser::Root(id)));
    }

    #[test]
    fn roots_of_one_layer_are_spread_over_snapshots_and_fill_the_gaps() {
        let mut index = Index::default();
        let root = |top: &str, ids| Root {
            top: Some(chain(top)),
            map: IdMap::default(),
            quota: None,
            ids,
            snapshot: Snapshot::FIRST,
        };
        let add = |index: &mut Index, ids| {
            let mut new = root("a", ids);
            new.snapshot = index.snapshot_for(&new);
            let id = ContainerId::random();
            index.roots.insert(id.clone(), new.clone());
            (id, new.snapshot)
        };
        let all: Vec<_> = (0..2 * CLONES + 1).map(|_| add(&mut index, IdStyle::Idmapped)).collect();
        let numbers: Vec<_> = Snapshot::all().take(3).collect();
        let count = |n: Snapshot| all.iter().filter(|(_, s)| *s == n).count();
        assert_eq!(numbers.iter().map(|n| count(*n)).collect::<Vec<_>>(), [CLONES, CLONES, 1]);
        // Those of another layer, or with other ids, are none of its own.
        assert_eq!(index.snapshot_for(&root("b", IdStyle::Idmapped)), Snapshot::FIRST);
        assert_eq!(index.snapshot_for(&root("a", IdStyle::Shifted)), Snapshot::FIRST);
        index.roots.remove(&all[CLONES].0);
        assert_eq!(index.snapshot_for(&root("a", IdStyle::Idmapped)), numbers[1]);
    }
}
