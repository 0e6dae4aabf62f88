//! A layer that is extracted once more, since its entries lie behind links of the layers below.
//!
//! Layers are extracted side by side, so that a directory which the layer has entries in but no entry for may turn out to be
//! a symbolic link at the end only (`lib/…` over a base where `lib` leads to `usr/lib`). What its entries mean then depends
//! on their order. So they are extracted again in that order, from the tape and the files of the first time, with the layers
//! below at hand from the beginning. Only layers that meet such a link pay for it.

use std::{
    fs,
    hash::{BuildHasher, RandomState},
    io::{BufRead, BufReader},
    path::Path,
};

use moxlet_storage::{Usage, WhiteoutStyle};

use super::{
    Fault, Outcome, Target,
    archive::Archive,
    below::{Stack, lies_in},
    extract::{Extraction, joined},
    root::{Leaving, Obstacle, Root, base, parent},
    tape::{Recorder, Tape},
};

/// Nothing is extracted to a name that begins so.
const ASIDE: &[u8] = b".wh..wh.";

/// Extracts the layer in `root`, whose tape is complete, once more over the layers below. The tape is then that of the
/// second time.
pub(super) fn again(root: &Path, tape: &Path, stack: Stack) -> Outcome<Usage> {
    tracing::debug!(root = %root.display(), "entries lie behind links of the layers below");
    let next = tape.with_extension("again");
    let usage = extract(root, tape, &next, stack);
    if usage.is_err() {
        // The first one is the caller's to remove.
        let _ = fs::remove_file(&next);
        return usage;
    }
    let fault = |source| Fault::System { what: "put in place", path: tape.to_owned(), source };
    fs::rename(&next, tape).map_err(fault)?;
    usage
}

fn extract(root: &Path, tape: &Path, next: &Path, stack: Stack) -> Outcome<Usage> {
    let fault = |source| Fault::System { what: "read", path: tape.to_owned(), source };
    let first = set_aside(&Root::at(root)?)?;
    let view = root.join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&first));
    let rebuilt = Tape::open(tape).and_then(|tape| tape.over(&view)).map_err(fault)?;
    let target = Target { root, style: WhiteoutStyle::Overlay, bottom: false, tape: None, below: None };
    let mut extraction = Extraction::new(target)?;
    extraction.stack = Some(stack);
    let recorder = Recorder::create(next);
    let recorder =
        recorder.map_err(|source| Fault::System { what: "create", path: next.to_owned(), source })?;
    let (_, recorder) = extraction.run(Archive::new(BufReader::new(rebuilt), Some(recorder)))?;
    let top = extraction.root.open_top()?;
    extraction.root.remove(&top, &first, &mut Leaving::nothing_of_ours())?;
    extraction.settle()?;
    Recorder::complete(recorder)?;
    Ok(extraction.usage)
}

/// Moves all that the draft has into a directory in it, whose name no image can know.
fn set_aside(root: &Root) -> Outcome<Vec<u8>> {
    let top = root.open_top()?;
    let names = root.names(&top, b"")?;
    let random = RandomState::new();
    let aside =
        [ASIDE, format!("{:016x}{:016x}", random.hash_one(0), random.hash_one(1)).as_bytes()].concat();
    root.make_dir(&top, &aside, 0o700)?;
    let to = root.open_dir(&top, &aside)?;
    for name in names {
        rustix::fs::renameat(&top, &name[..], &to, &name[..])
            .map_err(|e| root.fault("set aside", &name, e))?;
    }
    Ok(aside)
}

/// Whose place is told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    Entry,
    /// The target of a hard link.
    Target,
}

/// The key that a tape keeps a place by.
pub(super) fn place_key(number: u64, whose: Whose) -> u64 {
    number.saturating_mul(2) | u64::from(whose == Whose::Target)
}

impl Extraction<'_> {
    /// Where an entry belongs: its name, unless it leads through symbolic links. The tape is told.
    pub(super) fn located<R: BufRead>(
        &mut self,
        path: Vec<u8>,
        whose: Whose,
        archive: &mut Archive<R>,
    ) -> Outcome<Vec<u8>> {
        match self.root.dir(parent(&path))? {
            Ok(_) => return Ok(path),
            Err(Obstacle::Missing) if self.stack.is_none() => return Ok(path),
            Err(_) => {}
        }
        let (stack, hidden, passed) = (&mut self.stack, &self.hidden, &mut self.passed);
        let (beside, mut more) = (self.below.is_some(), 0);
        // What the layer itself does not have may be a link of the layers below.
        let mut beyond = |child: &[u8]| match stack {
            Some(stack) if !lies_in(child, |dir| hidden.contains(dir)) => stack.link(child),
            None if beside && passed.insert(child.to_vec()) => {
                more += child.len();
                Ok(None)
            }
            _ => Ok(None),
        };
        let dir = self.root.resolve(parent(&path), &mut beyond)?;
        self.keep(more)?;
        let place = joined(&dir, base(&path));
        if place != path {
            self.keep(place.len())?;
            let key = place_key(self.number, whose);
            archive.record(|tape| {
                tape.place(key, &place);
                Ok(())
            })?;
        }
        Ok(place)
    }

    /// Whether a name that the layer has something behind is a link of the layers below.
    pub(super) fn meets_link<'p>(
        &self,
        stack: &mut Stack,
        names: impl Iterator<Item = &'p Vec<u8>>,
    ) -> Outcome<bool> {
        for name in names.filter(|n| !n.is_empty()) {
            if stack.link(name)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
