//! One layer: from the bytes of its blob to a tree on disk, with every claim about it checked on the way.

mod archive;
mod extract;
mod root;
mod stream;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    io::{self, Read},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use moxlet_ids::Digest;
use moxlet_storage::WhiteoutStyle;
use tokio::sync::mpsc;

use stream::{Hashing, Incoming};

/// How many pieces of a blob wait for the extraction; a piece is what came with one read from the network.
pub(crate) const WAITING: usize = 16;
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

/// What a layer is said to be.
#[derive(Debug, Clone)]
pub(crate) struct Claim {
    /// The digest of the blob.
    pub(crate) digest: Digest,
    /// Its length.
    pub(crate) size: u64,
    /// The digest of the archive in it.
    pub(crate) diff_id: Digest,
}

/// Where and how a layer is extracted.
#[derive(Debug)]
pub(crate) struct Target<'a> {
    /// An empty directory, or a copy of the layer below ([`WhiteoutStyle::Apply`]).
    pub(crate) root: &'a Path,
    /// How to express what the layer removes.
    pub(crate) style: WhiteoutStyle,
    /// Whether there is no layer below.
    pub(crate) bottom: bool,
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

/// Extracts a layer from its pieces. Returns when all of it is read and checked; what was extracted before a fault
/// stays for the caller to remove. It blocks.
pub(crate) fn unpack(pieces: mpsc::Receiver<Piece>, claim: &Claim, target: &Target<'_>) -> Outcome<()> {
    let mut incoming = Incoming::new(pieces);
    let unpacked = unpack_from(&mut incoming, target);
    if let Err(Fault::System { .. } | Fault::Cut) = unpacked {
        return unpacked.map(drop);
    }
    // A blob that was damaged on its way is reported as that, whatever the damage looks like within.
    let (actual, size) = incoming.finish().map_err(|_| Fault::Cut)?;
    if actual != claim.digest.as_str() || size != claim.size {
        return Err(Fault::Mismatch { what: "", expected: claim.digest.to_string(), actual });
    }
    let actual = unpacked?;
    if actual != claim.diff_id.as_str() {
        return Err(Fault::Mismatch { what: ", unpacked,", expected: claim.diff_id.to_string(), actual });
    }
    Ok(())
}

fn unpack_from(incoming: &mut Incoming, target: &Target<'_>) -> Outcome<String> {
    let plain = stream::decompress(incoming).map_err(|e| read_fault(&e))?;
    let mut plain = Hashing::new(plain, MAX_UNPACKED);
    extract::extract(&mut plain, target)?;
    // Whatever follows the end of the archive counts for the DiffID as well.
    let mut rest = vec![0; 64 << 10];
    while plain.read(&mut rest).map_err(|e| read_fault(&e))? > 0 {}
    Ok(plain.digest())
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
