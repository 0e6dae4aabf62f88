//! A layer's life: a clone of its parent that is filled, then renamed into its place.

use std::{fs, os::fd::OwnedFd, path::Path, sync::Arc};

use moxlet_ids::ChainId;
use rustix::fs::{CWD, Mode, OFlags};

use super::{
    Inner,
    attach::{self, Access},
    health,
    index::{Hold, Layer},
    make_private_dir,
    names::{FORMAT, INODES, Kind, OBJECTS, OWNER, PARENT, Snapshot, VERSION},
    number, unexpected,
};
use crate::{
    LayerDraft, LayerView, Usage,
    error::{Attempt, Error, LayerUser, Result},
    mounts, tree,
};

/// Starts a layer on a parent.
pub(super) fn begin(inner: &Arc<Inner>, parent: Option<ChainId>) -> Result<LayerDraft> {
    let path = tree::unique(&inner.run_dir.join("drafts"), "layer");
    if let Some(parent) = &parent {
        let mut index = inner.index();
        if !index.layers.contains_key(parent) {
            return Err(Error::LayerNotFound(parent.clone()));
        }
        index.drafts.insert(draft_name(&path), parent.clone());
    }
    // From here on whatever is there goes with the draft.
    let undo = {
        let (inner, path) = (Arc::clone(inner), path.clone());
        move || undo(&inner, &path)
    };
    let draft = LayerDraft { parent, path, undo: Some(Box::new(undo)) };
    make_draft(inner, &draft)?;
    Ok(draft)
}

fn make_draft(inner: &Inner, draft: &LayerDraft) -> Result<()> {
    let kind = draft_kind(&draft.path);
    let dataset = inner.name(&kind);
    inner.make(&kind, &dataset, draft.parent.as_ref().map(|p| inner.layer_snapshot(p)).as_deref(), &[])?;
    make_private_dir(&draft.path)?;
    let mount = attach::detached(&dataset, Access::Write)?;
    let Some(place) = attach::place_for(&draft.path)? else { return Ok(()) };
    attach::put(&mount, &place, &draft.path)
}

fn draft_name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

fn draft_kind(path: &Path) -> Kind {
    Kind::Draft(draft_name(path))
}

/// Runs on a thread of its own, which may wait for a pool that is suspended.
fn undo(inner: &Inner, path: &Path) {
    let removed = loop {
        health::wait_until_resumed(&inner.dataset);
        match mounts::unmount(path).and_then(|()| inner.destroy(&inner.name(&draft_kind(path)))) {
            Err(Error::PoolSuspended { .. }) => {}
            done => break done,
        }
    };
    if let Err(error) = removed {
        tracing::warn!(path = %path.display(), %error, "an unfinished layer stays until the next start");
    }
    forget_draft(inner, path);
}

/// Takes away what a draft has beside its dataset.
fn forget_draft(inner: &Inner, path: &Path) {
    let _ = fs::remove_dir(path);
    inner.index().drafts.remove(&draft_name(path));
}

/// Finishes a layer: snapshot, record, and the rename that makes it appear.
pub(super) fn commit(inner: &Arc<Inner>, mut draft: LayerDraft, chain: &ChainId, usage: Usage) -> Result<()> {
    let _turn = inner.turns.take(format!("layer {chain}"));
    if inner.index().layers.contains_key(chain) {
        return Ok(());
    }
    let dataset = inner.name(&draft_kind(&draft.path));
    let objects = flush(&draft.path)?;
    mounts::unmount(&draft.path)?;
    let below = draft.parent.as_ref().and_then(|p| inner.index().layers.get(p).map(|l| l.objects));
    let inodes = if usage.inodes > 0 { usage.inodes } else { objects.saturating_sub(below.unwrap_or(0)) };
    let record = Record { parent: draft.parent.clone(), objects, inodes };
    let layer = finish(inner, &dataset, chain, &record)?;
    inner.index().layers.insert(chain.clone(), layer);
    // The dataset is the layer's now.
    draft.undo = None;
    forget_draft(inner, &draft.path);
    Ok(())
}

/// What a layer's properties say of it.
pub(super) struct Record {
    pub(super) parent: Option<ChainId>,
    pub(super) objects: u64,
    pub(super) inodes: u64,
}

/// Makes a filled, unmounted draft the layer `chain`.
pub(super) fn finish(inner: &Inner, draft: &str, chain: &ChainId, record: &Record) -> Result<Layer> {
    let snapshot = Snapshot::FIRST.of(draft);
    // It waits until everything is on disk. A received one has come with it.
    match inner.cli.zfs(&["snapshot", &snapshot]) {
        Ok(_) | Err(Error::DatasetExists(_)) => {}
        Err(error) => return Err(error),
    }
    let args = ["list", "-H", "-p", "-o", "referenced,guid", &snapshot];
    let rows = inner.cli.table(&args)?;
    let Some(row) = rows.first() else { return Err(unexpected(&args, &rows)) };
    let layer = Layer {
        parent: record.parent.clone(),
        referenced: number(row, 0, &args)?,
        objects: record.objects,
        inodes: record.inodes,
        guid: row.get(1).cloned().unwrap_or_default(),
    };
    let kind = Kind::Layer(chain.clone());
    let parent = record.parent.as_ref().map_or("-".to_owned(), |p| p.digest().hex().to_owned());
    let properties = [
        "readonly=on".to_owned(),
        format!("{OWNER}={kind}"),
        format!("{VERSION}={FORMAT}"),
        format!("{PARENT}={parent}"),
        format!("{OBJECTS}={}", record.objects),
        format!("{INODES}={}", record.inodes),
    ];
    let mut args = vec!["set"];
    args.extend(properties.iter().map(String::as_str));
    args.push(draft);
    inner.cli.zfs(&args)?;
    let target = inner.name(&kind);
    match inner.cli.zfs(&["rename", draft, &target]) {
        Ok(_) => Ok(layer),
        Err(Error::DatasetExists(_)) => {
            Err(Error::Foreign { dataset: target, what: "a layer of that name cannot be stored" })
        }
        Err(error) => Err(error),
    }
}

/// Writes all of a draft to disk; how many objects it has then.
fn flush(path: &Path) -> Result<u64> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd: OwnedFd = rustix::fs::openat(CWD, path, flags, Mode::empty()).attempt("open", path)?;
    rustix::fs::syncfs(&fd).attempt("flush", path)?;
    attach::objects(&fd, &path.to_string_lossy())
}

/// A layer's snapshot, mounted for as long as the view is held.
pub(super) fn view(inner: &Arc<Inner>, chain: &ChainId) -> Result<LayerView> {
    let hold = {
        let mut index = inner.index();
        if !index.layers.contains_key(chain) {
            return Err(Error::LayerNotFound(chain.clone()));
        }
        index.hold(chain, Hold::View)
    };
    let path = tree::unique(&inner.run_dir.join("views"), "view");
    let release = {
        let (inner, path) = (Arc::clone(inner), path.clone());
        move || {
            if let Err(error) = mounts::unmount(&path) {
                tracing::warn!(path = %path.display(), %error, "a layer stays mounted until the next start");
            }
            let _ = fs::remove_dir(&path);
            inner.index().release(hold);
        }
    };
    // Made first, so that it cleans up whatever comes next.
    let view = LayerView { path, release: Some(Box::new(release)) };
    make_private_dir(&view.path)?;
    mount_at(&attach::detached(&inner.layer_snapshot(chain), Access::Read)?, &view.path)?;
    Ok(view)
}

fn mount_at(mount: &OwnedFd, target: &Path) -> Result<()> {
    let Some(place) = attach::place_for(target)? else { return Ok(()) };
    attach::put(mount, &place, target)
}

/// Shows a stack of layers at a directory.
pub(super) fn mount(inner: &Inner, layers: &[ChainId], target: &Path) -> Result<()> {
    inner.check_stack(layers)?;
    let mount = match layers.last() {
        Some(top) => attach::detached(&inner.layer_snapshot(top), Access::Read)?,
        None if mounts::is_mounted(target)? => return Ok(()),
        None => attach::nothing()?,
    };
    mount_at(&mount, target)
}

/// Removes a layer that nothing stands on, with the copies of it that have other ids.
pub(super) fn remove(inner: &Inner, chain: &ChainId) -> Result<()> {
    let _turn = inner.turns.take(format!("layer {chain}"));
    inner.retry_gone();
    let (layer, copies) = {
        let mut index = inner.index();
        if !index.layers.contains_key(chain) {
            return Ok(());
        }
        if let Some(by) = index.user_of(chain) {
            return Err(Error::LayerInUse { layer: chain.clone(), by });
        }
        let copies: Vec<_> = index.copies.keys().filter(|(_, c)| c == chain).cloned().collect();
        // Out of sight while it goes: nobody begins anything on it.
        (index.layers.remove(chain), copies)
    };
    let below = layer.as_ref().and_then(|l| l.parent.clone());
    let unmade = unmake(inner, chain, &copies);
    if unmade.is_err()
        && let Some(layer) = layer
    {
        inner.index().layers.insert(chain.clone(), layer);
    }
    unmade?;
    // Without its snapshots it is no layer any more, whatever becomes of the rest.
    inner.discard(&inner.name(&Kind::Layer(chain.clone())), below)
}

/// Destroys the copies of a layer and then its own snapshots. Where that fails the layer is as it was.
fn unmake(inner: &Inner, chain: &ChainId, copies: &[(crate::IdMap, ChainId)]) -> Result<()> {
    for (map, of) in copies {
        let dataset = inner.name(&Kind::Shifted(*map, of.clone()));
        destroy_snapshots(inner, chain, &dataset)?;
        inner.index().copies.remove(&(*map, of.clone()));
        inner.discard(&dataset, Some(chain.clone()))?;
    }
    destroy_snapshots(inner, chain, &inner.name(&Kind::Layer(chain.clone())))
}

/// Destroys the snapshots of a layer, or of a copy of it; says who is in the way.
fn destroy_snapshots(inner: &Inner, chain: &ChainId, dataset: &str) -> Result<()> {
    let by = match inner.destroy_snapshots(dataset) {
        Err(Error::DatasetBusy(..)) => LayerUser::View,
        Err(Error::DatasetHasDependents(_)) => LayerUser::Dataset(clones_of(inner, dataset)?),
        done => return done,
    };
    Err(Error::LayerInUse { layer: chain.clone(), by })
}

/// The clones of a dataset's snapshots, with commas between them.
fn clones_of(inner: &Inner, dataset: &str) -> Result<String> {
    let rows = inner.cli.table(&["list", "-H", "-t", "snapshot", "-o", "clones", dataset])?;
    let clones = rows.iter().filter_map(|row| row.first()).map(String::as_str);
    let clones: Vec<_> = clones.filter(|clones| !clones.is_empty() && *clones != "-").collect();
    Ok(clones.join(","))
}
