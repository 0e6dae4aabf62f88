//! The streams that a layer goes through: from the network into blocking reads, digests, decompression.

use std::io::{self, BufRead, BufReader, Cursor, ErrorKind, Read};

use bytes::{Buf, Bytes};
use flate2::bufread::MultiGzDecoder;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use super::Piece;

const BUFFER: usize = 64 << 10;
/// The greatest window of a zstd stream, as a power of two: what its decoder takes of memory (RFC 8878, 3.1.1.1.2).
const ZSTD_WINDOW: u32 = 27;

/// A blob as it comes from the network, its digest computed on the way. It blocks, and ends with an error where the
/// sender went away before the end.
pub(super) struct Incoming {
    pieces: mpsc::Receiver<Piece>,
    piece: Bytes,
    ended: bool,
    size: u64,
    hash: Sha256,
}

impl Incoming {
    pub(super) fn new(pieces: mpsc::Receiver<Piece>) -> Self {
        Self { pieces, piece: Bytes::new(), ended: false, size: 0, hash: Sha256::new() }
    }

    /// Reads what is left; the digest and size of the whole.
    pub(super) fn finish(mut self) -> io::Result<(String, u64)> {
        while !self.next_piece()?.is_empty() {
            self.piece.clear();
        }
        Ok((text(self.hash), self.size))
    }

    /// The piece at hand, or the next one; an empty one at the end.
    fn next_piece(&mut self) -> io::Result<&mut Bytes> {
        while self.piece.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Piece::Bytes(bytes)) => {
                    self.hash.update(&bytes);
                    self.size += bytes.len() as u64;
                    self.piece = bytes;
                }
                Some(Piece::End) => self.ended = true,
                None => return Err(io::Error::new(ErrorKind::ConnectionAborted, "the download was stopped")),
            }
        }
        Ok(&mut self.piece)
    }
}

impl Read for Incoming {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let piece = self.next_piece()?;
        let n = piece.len().min(into.len());
        piece.copy_to_slice(&mut into[..n]);
        Ok(n)
    }
}

/// Whether an error says that the rest of the blob does not come.
pub(super) fn is_cut(error: &io::Error) -> bool {
    error.kind() == ErrorKind::ConnectionAborted
}

/// The archive in a blob. What it is compressed with is told by its first bytes, since media types are often wrong;
/// the digests decide whether it was right.
pub(super) fn decompress<'a>(mut blob: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut start = [0; 4];
    let mut filled = 0;
    while filled < start.len() {
        match blob.read(&mut start[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    let whole = Read::take(Cursor::new(start), filled as u64).chain(blob);
    let whole = BufReader::with_capacity(BUFFER, whole);
    Ok(match start {
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(whole)),
        // A zstd frame, or one that is to be skipped.
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => zstd(whole)?,
        _ => Box::new(whole),
    })
}

fn zstd<'a>(blob: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(blob)?;
    decoder.window_log_max(ZSTD_WINDOW)?;
    Ok(Box::new(decoder))
}

/// A stream with a bound, its digest computed on the way.
pub(super) struct Hashing<R> {
    inner: R,
    left: u64,
    hash: Sha256,
}

impl<R: Read> Hashing<R> {
    pub(super) fn new(inner: R, max: u64) -> Self {
        Self { inner, left: max, hash: Sha256::new() }
    }

    /// The digest of what was read.
    pub(super) fn digest(self) -> String {
        text(self.hash)
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(into)?;
        self.left = self.left.checked_sub(n as u64).ok_or_else(|| {
            io::Error::new(ErrorKind::InvalidData, "it unpacks to more than a layer may have")
        })?;
        self.hash.update(&into[..n]);
        Ok(n)
    }
}

fn text(hash: Sha256) -> String {
    format!("sha256:{}", hex::encode(hash.finalize()))
}
