//! Images from archives: OCI layouts, `docker save`, and root file systems such as LXC templates.
//!
//! An archive of images names its parts in any order, so its members are put on disk first, below the store's `tmp`, and
//! go through the same checks as what a registry sends. A root file system is extracted as it comes.

mod archive;
mod images;
mod rootfs;

use std::{
    io::{self, BufRead, BufReader, Read},
    sync::Arc,
};

use bytes::{Buf, Bytes};
use flate2::bufread::MultiGzDecoder;
use moxlet_ids::ChainId;
use moxlet_storage::WhiteoutStyle;
use tokio::sync::mpsc;

use crate::{
    Error, ImageStore, Result,
    layer::{self, Claim, Fault, Lower, Target, Unpacked},
    store::{Pins, Store, TapeDraft, blocking},
};
pub use images::Imported;
pub use rootfs::RootfsOptions;

/// Pieces that wait for the reader.
const WAITING: usize = 4;
/// How much memory decompression may take: zstd's window, as a power of two, and xz's, in bytes.
const ZSTD_WINDOW: u32 = 27;
const XZ_MEMORY: u64 = 256 << 20;

/// Bytes of an archive on their way to a thread that reads them. It is complete only after [`Feed::end`].
pub struct Feed {
    out: mpsc::Sender<Option<Bytes>>,
}

impl Feed {
    /// Gives the next bytes; false when nobody wants them any more.
    pub async fn send(&self, bytes: Bytes) -> bool {
        self.out.send(Some(bytes)).await.is_ok()
    }

    /// Says that that was all.
    pub async fn end(self) {
        let _ = self.out.send(None).await;
    }
}

/// The other end; reading blocks.
pub struct Source {
    pieces: mpsc::Receiver<Option<Bytes>>,
    piece: Bytes,
    ended: bool,
}

/// A way for an archive's bytes.
#[must_use]
pub fn feed() -> (Feed, Source) {
    let (out, pieces) = mpsc::channel(WAITING);
    (Feed { out }, Source { pieces, piece: Bytes::new(), ended: false })
}

impl Read for Source {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Some(piece)) => self.piece = piece,
                Some(None) => self.ended = true,
                None => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the archive was cut off")),
            }
        }
        let n = self.piece.len().min(into.len());
        self.piece.copy_to_slice(&mut into[..n]);
        Ok(n)
    }
}

/// What is in a stream that may be compressed with gzip, zstd or xz, as its first bytes tell.
fn decompressed<'a>(from: impl Read + Send + 'a) -> io::Result<Box<dyn Read + Send + 'a>> {
    let mut from = BufReader::with_capacity(64 << 10, from);
    let start = from.fill_buf()?;
    Ok(match start {
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(from)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(from)?;
            decoder.window_log_max(ZSTD_WINDOW)?;
            Box::new(decoder)
        }
        [0xfd, b'7', b'z', b'X', b'Z', ..] => {
            let stream =
                liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, liblzma::stream::CONCATENATED)?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(from, stream))
        }
        _ => Box::new(from),
    })
}

/// An archive that is refused.
fn refused(part: &str, reason: impl Into<String>) -> Error {
    Error::BadArchive { part: part.to_owned(), reason: reason.into() }
}

/// What is wrong with a part of an archive.
fn told(part: &str, fault: Fault) -> Error {
    match fault {
        Fault::Bad(reason) => refused(part, reason),
        Fault::Mismatch { what, expected, actual } => {
            refused(part, format!("it has{what} digest {actual}, expected {expected}"))
        }
        Fault::System { what, path, source } => Error::Io { what, path, source: Arc::new(source) },
        Fault::Cut => refused(part, "it was cut off"),
    }
}

/// Extracts a layer on top of others (the bottom one first) and puts it into the store; what it has turned out to be, its
/// chain, and what keeps it until a record names it. One that is known to be here is not read.
async fn bring_layer(
    store: &Arc<Store>,
    layers: &[ChainId],
    claim: Claim,
    part: String,
    open: impl FnOnce() -> io::Result<Box<dyn Read + Send>> + Send + 'static,
) -> Result<(ChainId, Option<Unpacked>, Pins)> {
    let parent = layers.last().cloned();
    let chain_of = |diff_id: &moxlet_ids::Digest| match &parent {
        Some(parent) => parent.push(diff_id),
        None => ChainId::base(diff_id),
    };
    let expected = claim.diff_id.as_ref().map(&chain_of);
    if let Some(chain) = &expected {
        let pins = store.pin(std::slice::from_ref(chain)).await;
        if store.driver.has_layer(chain).await? && store.records.tape_path(chain).exists() {
            return Ok((chain.clone(), None, pins));
        }
    }
    // A layer that came without a tape is read again for it.
    let draft = store.driver.begin_layer(parent.as_ref()).await?;
    let (style, bottom): (WhiteoutStyle, bool) = (store.driver.whiteouts(), parent.is_none());
    let mut views = Vec::new();
    for layer in layers.iter().rev().filter(|_| style == WhiteoutStyle::Overlay) {
        views.push(store.driver.open_layer(layer).await?);
    }
    let tape = TapeDraft::new(&store.records);
    let (draft, unpacked, tape) = blocking(move || {
        let opened = open().map_err(|e| refused(&part, e.to_string()))?;
        let target = Target {
            root: draft.path(),
            style,
            bottom,
            tape: Some(tape.path()),
            below: Some(Box::new(move || Ok(Lower::from(views)))),
        };
        // Draft and tape go with the worker, and with what it returns, wherever the import ends.
        let unpacked = layer::unpack_reader(opened, &claim, target).map_err(|fault| told(&part, fault))?;
        Ok((draft, unpacked, tape))
    })
    .await?;
    let chain = chain_of(&unpacked.diff_id);
    let pins = store.pin(std::slice::from_ref(&chain)).await;
    let turn = store.turn(&chain);
    let _turn = turn.lock().await;
    let (records, at) = (Arc::clone(store), chain.clone());
    blocking(move || tape.keep(&records.records, &at)).await?;
    store.driver.commit_layer(draft, &chain, unpacked.usage).await?;
    Ok((chain, Some(unpacked), pins))
}

/// Reads what somebody may give as an archive of images; its members go to a new directory and with that.
#[cfg(any(feature = "fuzzing", test))]
pub(crate) fn fuzz(data: &[u8], dir: std::path::PathBuf) {
    if let Ok(members) = archive::Members::read(data, dir) {
        drop(images::entries(&members));
    }
}

impl ImageStore {
    /// Layers that an import had brought before it failed go.
    async fn tidy<T>(&self, outcome: Result<T>) -> Result<T> {
        if outcome.is_err()
            && let Err(error) = self.store.collect().await
        {
            tracing::warn!(%error, "layers of an archive that was refused stay for now");
        }
        outcome
    }
}
