//! A container's root: a clone with a quota, made by one command and mounted by none.

use std::path::Path;

use moxlet_ids::{ChainId, ContainerId};

use super::{
    IdStyle, Inner, Waits,
    attach::{self, Access},
    index::{Copy, Root},
    make_private_dir,
    names::{self, FORMAT, IDS, Kind, MAP, OWNER, QUOTA, Snapshot, TOP, VERSION},
    number, shift,
};
use crate::{
    IdMap, RootOptions, Usage,
    error::{Error, Result},
    mounts, tree,
};

impl Inner {
    /// Makes a dataset of ours, as a clone of a snapshot or empty, with its mark and these properties.
    pub(super) fn make(
        &self,
        kind: &Kind,
        dataset: &str,
        of: Option<&str>,
        properties: &[String],
    ) -> Result<()> {
        let owner = format!("{OWNER}={kind}");
        let version = format!("{VERSION}={FORMAT}");
        let mut args = match of {
            Some(_) => vec!["clone"],
            None => vec!["create", "-u"],
        };
        let fixed = ["mountpoint=legacy", "canmount=noauto", &owner, &version];
        for property in fixed.into_iter().chain(properties.iter().map(String::as_str)) {
            args.extend(["-o", property]);
        }
        args.extend(of);
        args.push(dataset);
        self.cli.zfs(&args).map(drop)
    }

    /// Whether layers were made on one another in this order, and are all here.
    pub(super) fn check_stack(&self, layers: &[ChainId]) -> Result<()> {
        let index = self.index();
        let mut below: Option<&ChainId> = None;
        for chain in layers {
            let layer = index.layers.get(chain).ok_or_else(|| Error::LayerNotFound(chain.clone()))?;
            if layer.parent.as_ref() != below {
                return Err(Error::NotAStack { layer: chain.clone(), below: below.cloned() });
            }
            below = Some(chain);
        }
        Ok(())
    }

    pub(super) fn create_root(
        &self,
        id: &ContainerId,
        layers: &[ChainId],
        options: RootOptions,
        waits: &Waits,
    ) -> Result<()> {
        let map = options.map;
        if !map.is_valid() {
            return Err(Error::BadIdMap { host_base: map.host_base, size: map.size });
        }
        let _turn = self.turns.take(format!("root {id}"));
        // An empty root has nothing that would have to be shifted but itself.
        let top = layers.last().cloned();
        let mut root =
            Root { top, map, quota: options.quota_bytes, ids: self.ids, snapshot: Snapshot::FIRST };
        if let Some(there) = self.index().roots.get(id) {
            return if there.is_as(&root) { Ok(()) } else { Err(Error::RootExists(id.clone())) };
        }
        {
            // Between the look and the reservation no layer may go.
            self.check_stack(layers)?;
            let mut index = self.index();
            if let Some(missing) = root.top.as_ref().filter(|top| !index.layers.contains_key(*top)) {
                return Err(Error::LayerNotFound(missing.clone()));
            }
            root.snapshot = index.snapshot_for(&root);
            index.coming.insert(id.clone(), root.clone());
        }
        let mut made = self.make_root(id, &root);
        // Whoever has given up knows of no root that would have to be removed.
        if made.is_ok() && !waits.still() {
            made = self.destroy(&self.name(&Kind::Root(id.clone()))).and(Err(Error::Stopped));
        }
        let mut index = self.index();
        index.coming.remove(id);
        made?;
        index.roots.insert(id.clone(), root);
        Ok(())
    }

    fn make_root(&self, id: &ContainerId, root: &Root) -> Result<()> {
        let (origin, below) = match (&root.top, root.ids) {
            (None, IdStyle::Idmapped) => (None, 0),
            (None, IdStyle::Shifted) => return self.make_empty_shifted(id, root),
            (Some(top), IdStyle::Idmapped) => {
                let below = self.index().layers.get(top).map_or(0, |l| l.referenced);
                (root.origin(), below)
            }
            (Some(top), IdStyle::Shifted) => {
                let copy = self.shifted(root.map, top)?;
                (root.origin(), copy.referenced)
            }
        };
        let Some(origin) = origin else { return self.make_root_of(id, root, None, below) };
        let snapshot = root.snapshot.of(&self.name(&origin));
        match self.make_root_of(id, root, Some(&snapshot), below) {
            // The first that needs it takes it; it is gone, too, where nothing was cloned from it and somebody has tidied up.
            Err(Error::NoSuchDataset(_)) if root.snapshot != Snapshot::FIRST => {
                match self.cli.zfs(&["snapshot", &snapshot]) {
                    Ok(_) | Err(Error::DatasetExists(_)) => {}
                    Err(error) => return Err(error),
                }
                self.make_root_of(id, root, Some(&snapshot), below)
            }
            made => made,
        }
    }

    fn make_root_of(&self, id: &ContainerId, root: &Root, origin: Option<&str>, below: u64) -> Result<()> {
        let kind = Kind::Root(id.clone());
        let dataset = self.name(&kind);
        match self.make(&kind, &dataset, origin, &record(root, below)) {
            Err(Error::DatasetExists(_)) => {
                Err(Error::Foreign { dataset, what: "the root of a container of that name cannot be made" })
            }
            made => made,
        }
    }

    /// An empty root whose top directory belongs to the map's root: a draft first, since it is mounted in between.
    fn make_empty_shifted(&self, id: &ContainerId, root: &Root) -> Result<()> {
        let kind = Kind::Root(id.clone());
        self.shifted_draft(None, root.map, |draft| {
            let mark = format!("{OWNER}={kind}");
            let record = record(root, 0);
            let mut args = vec!["set", mark.as_str()];
            args.extend(record.iter().map(String::as_str));
            args.push(draft);
            self.cli.zfs(&args)?;
            self.cli.zfs(&["rename", draft, &self.name(&kind)]).map(drop)
        })
    }

    /// The copy of a layer with the ids of a map, made by the first who needs it.
    fn shifted(&self, map: IdMap, top: &ChainId) -> Result<Copy> {
        let _turn = self.turns.take(format!("shifted {} {top}", names::dir_of(map)));
        let key = (map, top.clone());
        if let Some(there) = self.index().copies.get(&key) {
            return Ok(*there);
        }
        self.make_group(map)?;
        let kind = Kind::Shifted(map, top.clone());
        let dataset = self.name(&kind);
        self.shifted_draft(Some(top), map, |draft| {
            self.cli.zfs(&["snapshot", &Snapshot::FIRST.of(draft)])?;
            self.cli.zfs(&["set", "readonly=on", &format!("{OWNER}={kind}"), draft])?;
            self.cli.zfs(&["rename", draft, &dataset]).map(drop)
        })?;
        let args = ["list", "-H", "-p", "-o", "referenced", &dataset];
        let rows = self.cli.table(&args)?;
        let copy = Copy { referenced: number(rows.first().map_or(&[], Vec::as_slice), 0, &args)? };
        self.index().copies.insert(key, copy);
        Ok(copy)
    }

    fn make_group(&self, map: IdMap) -> Result<()> {
        let _turn = self.turns.take("group".to_owned());
        if self.index().groups.contains(&map) {
            return Ok(());
        }
        let kind = Kind::Group(format!("shifted/{}", names::dir_of(map)));
        self.make(&kind, &self.name(&kind), None, &[])?;
        self.index().groups.insert(map);
        Ok(())
    }

    /// A draft of a layer's content (or of nothing) with shifted ids, handed to `then` when it is not mounted any more, and
    /// removed if that fails.
    fn shifted_draft(
        &self,
        of: Option<&ChainId>,
        map: IdMap,
        then: impl FnOnce(&str) -> Result<()>,
    ) -> Result<()> {
        let path = tree::unique(&self.run_dir.join("drafts"), "shift");
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let kind = Kind::Draft(name);
        let dataset = self.name(&kind);
        let work = || -> Result<()> {
            self.make(&kind, &dataset, of.map(|top| self.layer_snapshot(top)).as_deref(), &[])?;
            make_private_dir(&path)?;
            let mount = attach::detached(&dataset, Access::Write)?;
            if let Some(place) = attach::place_for(&path)? {
                attach::put(&mount, &place, &path)?;
            }
            drop(mount);
            shift::tree(&path, map)?;
            mounts::unmount(&path)?;
            then(&dataset)
        };
        let done = work();
        if done.is_err()
            && let Err(error) = mounts::unmount(&path).and_then(|()| self.destroy(&dataset))
        {
            tracing::warn!(dataset, %error, "an unfinished dataset stays until the next start");
        }
        let _ = std::fs::remove_dir(&path);
        done
    }

    fn root(&self, id: &ContainerId) -> Result<Root> {
        self.index().roots.get(id).cloned().ok_or_else(|| Error::RootNotFound(id.clone()))
    }

    pub(super) fn mount_root(&self, id: &ContainerId, target: &Path) -> Result<()> {
        let root = self.root(id)?;
        let Some(place) = attach::place_for(target)? else { return Ok(()) };
        let dataset = self.name(&Kind::Root(id.clone()));
        let mount = attach::detached(&dataset, Access::Write)?;
        if root.ids == IdStyle::Idmapped {
            use crate::error::Attempt;
            self.namespaces.of(root.map)?.shift(&mount).attempt("shift the ids of", dataset)?;
        }
        attach::put(&mount, &place, target)
    }

    pub(super) fn remove_root(&self, id: &ContainerId) -> Result<()> {
        let _turn = self.turns.take(format!("root {id}"));
        let Some(root) = self.index().roots.get(id).cloned() else { return Ok(()) };
        let dataset = self.name(&Kind::Root(id.clone()));
        match self.destroy(&dataset) {
            Ok(()) => {}
            // Somebody still has a file open in it: out of sight, and destroyed when it can be.
            Err(Error::DatasetBusy(..)) => self.set_aside(&dataset, root.top)?,
            Err(error) => return Err(error),
        }
        self.index().roots.remove(id);
        Ok(())
    }

    /// Destroys removed roots and layers that are not busy any more.
    pub(super) fn retry_gone(&self) {
        let gone: Vec<String> = self.index().gone.keys().cloned().collect();
        for dataset in gone {
            match self.cli.zfs(&["destroy", &dataset]) {
                Ok(_) | Err(Error::NoSuchDataset(_)) => {
                    self.index().gone.remove(&dataset);
                }
                Err(error) => tracing::debug!(dataset, %error, "what was removed stays for now"),
            }
        }
    }

    /// What was written since the clone, as far as ZFS has brought it to disk (it does so every few seconds).
    pub(super) fn root_usage(&self, id: &ContainerId) -> Result<Usage> {
        let root = self.root(id)?;
        let bytes = self.usage(&[Kind::Root(id.clone())])?;
        let dataset = self.name(&Kind::Root(id.clone()));
        let objects = attach::objects(&attach::detached(&dataset, Access::Write)?, &dataset)?;
        let below = root.top.as_ref().and_then(|top| self.index().layers.get(top).map(|l| l.objects));
        Ok(Usage { bytes, inodes: objects.saturating_sub(below.unwrap_or(super::open::OWN_OBJECTS)) })
    }
}

/// What a root's properties say of it. The quota of ZFS counts what is in the origin as well.
fn record(root: &Root, below: u64) -> Vec<String> {
    let top = root.top.as_ref().map_or("-".to_owned(), |top| top.digest().hex().to_owned());
    let quota = root.quota.map_or("-".to_owned(), |q| q.to_string());
    let ids = match root.ids {
        IdStyle::Idmapped => "idmapped",
        IdStyle::Shifted => "shifted",
    };
    let mut all = vec![
        format!("{TOP}={top}"),
        format!("{MAP}={}", names::dir_of(root.map)),
        format!("{QUOTA}={quota}"),
        format!("{IDS}={ids}"),
    ];
    if let Some(quota) = root.quota {
        all.push(format!("refquota={}", quota.saturating_add(below).max(1)));
    }
    all
}
