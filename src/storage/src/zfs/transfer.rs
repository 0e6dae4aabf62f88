//! Layers of a store to another one, usually on another pool.
//!
//! A layer goes as the difference to its parent and becomes a clone of it there, so that what is shared stays shared. Where
//! the other store has the parent from elsewhere, ZFS cannot tell that they are the same, and the layer goes as a whole.

use std::sync::Arc;

use moxlet_ids::ChainId;

use super::{
    Inner,
    index::{Hold, Layer},
    layers::{self, Record},
    names::{FORMAT, Kind, OWNER, Snapshot, VERSION},
};
use crate::{
    error::{Error, Result},
    tree,
};

/// Large blocks, embedded data and compressed blocks go as they are.
const SEND: [&str; 2] = ["send", "-Lec"];

/// Copies those of the layers that are missing, the bottom ones first.
pub(super) fn copy(from: &Inner, to: &Arc<Inner>, wanted: &[ChainId]) -> Result<Vec<ChainId>> {
    let mut brought = Vec::new();
    let order = from.index().top_first();
    for chain in order.into_iter().rev().filter(|chain| wanted.contains(chain)) {
        let held = {
            let mut index = from.index();
            let Some(layer) = index.layers.get(&chain).cloned() else { continue };
            (index.hold(&chain, Hold::View), layer)
        };
        let copied = copy_one(from, to, &chain, &held.1);
        from.index().release(held.0);
        if copied? {
            brought.push(chain);
        }
    }
    Ok(brought)
}

/// Whether it had to be brought.
fn copy_one(from: &Inner, to: &Inner, chain: &ChainId, layer: &Layer) -> Result<bool> {
    let _turn = to.turns.take(format!("layer {chain}"));
    let (base, hold) = {
        let mut index = to.index();
        if index.layers.contains_key(chain) {
            return Ok(false);
        }
        match &layer.parent {
            None => (None, None),
            Some(parent) => {
                let Some(there) = index.layers.get(parent) else {
                    return Err(Error::LayerNotFound(parent.clone()));
                };
                let known = from.index().layers.get(parent).is_some_and(|l| l.guid == there.guid);
                (known.then(|| parent.clone()), Some(index.hold(parent, Hold::Draft)))
            }
        }
    };
    let name = tree::unique("".as_ref(), "recv").display().to_string();
    let draft = to.name(&Kind::Draft(name.clone()));
    let work = || -> Result<Layer> {
        receive(from, to, chain, base.as_ref(), &draft, &Kind::Draft(name))?;
        let record = Record { parent: layer.parent.clone(), objects: layer.objects, inodes: layer.inodes };
        layers::finish(to, &draft, chain, &record)
    };
    let outcome = work();
    let mut index = to.index();
    if let Some(hold) = hold {
        index.release(hold);
    }
    match outcome {
        Ok(layer) => {
            index.layers.insert(chain.clone(), layer);
            Ok(true)
        }
        Err(error) => {
            drop(index);
            if let Err(left) = to.destroy(&draft) {
                tracing::warn!(dataset = draft, error = %left, "an unfinished layer stays until the next start");
            }
            Err(error)
        }
    }
}

fn receive(
    from: &Inner,
    to: &Inner,
    chain: &ChainId,
    base: Option<&ChainId>,
    draft: &str,
    kind: &Kind,
) -> Result<()> {
    let snapshot = from.layer_snapshot(chain);
    let mut send = SEND.to_vec();
    let base_here = base.map(|b| from.layer_snapshot(b));
    if let Some(base) = &base_here {
        send.extend(["-i", base]);
    }
    send.push(&snapshot);
    let mut properties = vec![
        "mountpoint=legacy".to_owned(),
        "canmount=noauto".to_owned(),
        format!("{OWNER}={kind}"),
        format!("{VERSION}={FORMAT}"),
    ];
    if let Some(base) = base {
        properties.push(format!("origin={}", to.layer_snapshot(base)));
    }
    let mut receive = vec!["receive", "-u"];
    for property in &properties {
        receive.extend(["-o", property]);
    }
    let target = Snapshot::FIRST.of(draft);
    receive.push(&target);
    to.cli.pipe(&send, &receive)
}
