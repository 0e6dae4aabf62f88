//! One layer: from the bytes of its blob to a tree on disk, with every claim about it checked on the way.

mod again;
mod ahead;
mod archive;
mod below;
mod check;
mod extract;
mod pax;
mod removal;
mod root;
mod settle;
mod source;
mod sparse;
mod stream;
pub(crate) mod tape;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    io::{self, BufRead, Read},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use moxlet_ids::{Algorithm, Digest};
use moxlet_storage::{Usage, WhiteoutStyle};

pub(crate) use archive::{Archive, Entry, Kind};
pub(crate) use below::Lower;
pub(crate) use check::check;
pub(crate) use source::{Source, room};
use stream::Blob;
pub(crate) use stream::is_cut;

/// How many pieces of a blob wait for the extraction; a piece is what came with one read from the network, at most about 400 KiB.
/// More would only cost memory: the system's socket has room for what comes meanwhile.
pub(crate) const WAITING: usize = 4;
/// Bytes that a layer may unpack to; what bounds a decompression bomb.
const MAX_UNPACKED: u64 = 64 << 30;

/// A piece of a blob on its way to the extraction.
#[derive(Debug)]
pub(crate) enum Piece {
    /// The next bytes.
    Bytes(Bytes),
    /// It is complete. A channel that closes without it was cut.
    End,
}

/// What a layer is said to be; what nobody has said is not checked.
#[derive(Debug, Clone, Default)]
pub(crate) struct Claim {
    /// The digest of the blob.
    pub(crate) digest: Option<Digest>,
    /// Its length.
    pub(crate) size: Option<u64>,
    /// The digest of the archive in it.
    pub(crate) diff_id: Option<Digest>,
}

/// Gives the layers below, when all of them are there; it may wait for that. Called at most once, at the end of an
/// extraction, and only where something of them is needed.
pub(crate) type Below<'a> = Box<dyn FnOnce() -> Outcome<Lower> + Send + 'a>;

/// Where and how a layer is extracted.
pub(crate) struct Target<'a> {
    /// An empty directory, or a copy of the layer below ([`WhiteoutStyle::Apply`]).
    pub(crate) root: &'a Path,
    /// How to express what the layer removes.
    pub(crate) style: WhiteoutStyle,
    /// Whether there is no layer below.
    pub(crate) bottom: bool,
    /// A new file for the layer's [tape]; none is no tape.
    pub(crate) tape: Option<&'a Path>,
    /// What lies below, for [`WhiteoutStyle::Overlay`]; none where it is not known, and then what needs it is refused.
    pub(crate) below: Option<Below<'a>>,
}

/// What a layer has turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unpacked {
    /// The digest of the blob.
    pub(crate) digest: Digest,
    /// Its length.
    pub(crate) size: u64,
    /// The digest of the archive in it.
    pub(crate) diff_id: Digest,
    /// The length of the archive.
    pub(crate) unpacked_size: u64,
    /// What the layer brought.
    pub(crate) usage: Usage,
}

/// Why a layer was not extracted.
#[derive(Debug)]
pub(crate) enum Fault {
    /// It is damaged or hostile.
    Bad(String),
    /// It is not what it is said to be.
    Mismatch {
        /// Which of its digests: of the layer, or of the archive in it.
        what: &'static str,
        expected: String,
        actual: String,
    },
    /// The system refused.
    System { what: &'static str, path: PathBuf, source: io::Error },
    /// The rest of it does not come.
    Cut,
}

/// What a fault within an archive is; reading on is the caller's.
type Outcome<T> = std::result::Result<T, Fault>;

/// Extracts a layer from its blob. Returns when all of it is read and checked; what was extracted before a fault, and
/// the tape, stay for the caller to remove. It blocks.
pub(crate) fn unpack(source: Source, claim: &Claim, target: Target<'_>) -> Outcome<Unpacked> {
    unpack_blob(source, claim, target)
}

/// The same from anything that can be read.
pub(crate) fn unpack_reader(input: impl Read + Send, claim: &Claim, target: Target<'_>) -> Outcome<Unpacked> {
    unpack_blob(stream::buffered(input), claim, target)
}

fn unpack_blob(input: impl BufRead + Send, claim: &Claim, target: Target<'_>) -> Outcome<Unpacked> {
    let algorithm = claim.digest.as_ref().map_or(Algorithm::Sha256, Digest::algorithm);
    let mut blob = Blob::new(input, algorithm);
    let unpacked = unpack_from(&mut blob, target);
    if let Err(fault @ (Fault::System { .. } | Fault::Cut)) = unpacked {
        return Err(fault);
    }
    // A blob that was damaged on its way is reported as that, whatever the damage looks like within.
    let (digest, size) = blob.finish().map_err(|e| read_fault(&e))?;
    let wrong = |what, expected: String, actual: String| Err(Fault::Mismatch { what, expected, actual });
    if let Some(expected) = claim.digest.as_ref().filter(|d| **d != digest) {
        return wrong("", expected.to_string(), digest.to_string());
    }
    if let Some(expected) = claim.size.filter(|s| *s != size) {
        return wrong("", format!("{expected} bytes"), format!("{size} bytes"));
    }
    let (diff_id, unpacked_size, usage) = unpacked?;
    if let Some(expected) = claim.diff_id.as_ref().filter(|d| **d != diff_id) {
        return wrong(", unpacked,", expected.to_string(), diff_id.to_string());
    }
    Ok(Unpacked { digest, size, diff_id, unpacked_size, usage })
}

fn unpack_from(blob: &mut (impl BufRead + Send), target: Target<'_>) -> Outcome<(Digest, u64, Usage)> {
    let root = target.root.to_owned();
    let work = |plain: ahead::Ahead| {
        let (plain, usage) = extract::extract(plain, target)?;
        let (diff_id, size) = plain.finish().map_err(|e| read_fault(&e))?;
        Ok((diff_id, size, usage))
    };
    ahead::reading(|| stream::decompress(blob), MAX_UNPACKED, work)
        .unwrap_or_else(|source| Err(Fault::System { what: "start a thread to unpack", path: root, source }))
}

/// What a failed read of a stream means.
fn read_fault(error: &io::Error) -> Fault {
    if stream::is_cut(error) { Fault::Cut } else { Fault::Bad(format!("it cannot be unpacked: {error}")) }
}

/// A name from an archive, fit for a message.
fn shown(name: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(name).chars().take(200).collect();
    format!("{text:?}")
}
