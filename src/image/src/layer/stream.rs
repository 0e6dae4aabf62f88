//! The streams that a layer goes through: from the network into blocking reads, digests, decompression.

use std::io::{self, BufRead, BufReader, Cursor, ErrorKind, Read};

use flate2::bufread::MultiGzDecoder;
use moxlet_ids::{Algorithm, Digest, Hasher};

/// Bytes that are decompressed and hashed at a time: they stay in the processor's cache until they are written.
const BUFFER: usize = 128 << 10;
/// The greatest window of a zstd stream, as a power of two: what its decoder takes of memory (RFC 8878, 3.1.1.1.2).
const ZSTD_WINDOW: u32 = 27;

/// A blob, its digest computed on the way.
pub(super) struct Blob<R> {
    inner: R,
    size: u64,
    hash: Hasher,
    /// What of the chunk at hand has been counted.
    counted: usize,
}

impl<R: BufRead> Blob<R> {
    pub(super) fn new(inner: R, algorithm: Algorithm) -> Self {
        Self { inner, size: 0, hash: Hasher::new(algorithm), counted: 0 }
    }

    /// Reads what is left; the digest and size of the whole.
    pub(super) fn finish(mut self) -> io::Result<(Digest, u64)> {
        loop {
            let n = self.fill_buf()?.len();
            if n == 0 {
                return Ok((self.hash.finish(), self.size));
            }
            self.consume(n);
        }
    }
}

impl<R: BufRead> BufRead for Blob<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let chunk = self.inner.fill_buf()?;
        if let Some(fresh) = chunk.get(self.counted..)
            && !fresh.is_empty()
        {
            self.hash.update(fresh);
            self.size += fresh.len() as u64;
            self.counted = chunk.len();
        }
        Ok(chunk)
    }

    fn consume(&mut self, n: usize) {
        self.inner.consume(n);
        self.counted = self.counted.saturating_sub(n);
    }
}

impl<R: BufRead> Read for Blob<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        take(self, into)
    }
}

/// Whether an error says that the rest of the blob does not come.
pub(crate) fn is_cut(error: &io::Error) -> bool {
    error.kind() == ErrorKind::ConnectionAborted
}

/// The archive in a blob. What it is compressed with is told by its first bytes, since media types are often wrong;
/// the digests decide whether it was right.
pub(super) fn decompress<'a>(mut blob: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut start = [0; 4];
    let mut filled = 0;
    while filled < start.len() {
        match blob.read(&mut start[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    let whole = Read::take(Cursor::new(start), filled as u64).chain(blob);
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
    hash: Hasher,
    buffer: Box<[u8]>,
    at: usize,
    end: usize,
}

impl<R: Read> Hashing<R> {
    pub(super) fn new(inner: R, max: u64) -> Self {
        let buffer = vec![0; BUFFER].into_boxed_slice();
        Self { inner, left: max, hash: Hasher::new(Algorithm::Sha256), buffer, at: 0, end: 0 }
    }

    /// The digest of what was read.
    pub(super) fn digest(self) -> Digest {
        self.hash.finish()
    }
}

impl<R: Read> BufRead for Hashing<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.end {
            (self.at, self.end) = (0, 0);
            let n = self.inner.read(&mut self.buffer)?;
            self.left = self.left.checked_sub(n as u64).ok_or_else(|| {
                io::Error::new(ErrorKind::InvalidData, "it unpacks to more than a layer may have")
            })?;
            self.hash.update(&self.buffer[..n]);
            self.end = n;
        }
        Ok(&self.buffer[self.at..self.end])
    }

    fn consume(&mut self, n: usize) {
        self.at = self.end.min(self.at + n);
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        take(self, into)
    }
}

/// Reads from what is buffered.
pub(super) fn take(input: &mut impl BufRead, into: &mut [u8]) -> io::Result<usize> {
    let chunk = input.fill_buf()?;
    let n = chunk.len().min(into.len());
    into[..n].copy_from_slice(&chunk[..n]);
    input.consume(n);
    Ok(n)
}

/// Buffers what can only be read.
pub(super) fn buffered<R: Read>(input: R) -> BufReader<R> {
    BufReader::with_capacity(BUFFER, input)
}
