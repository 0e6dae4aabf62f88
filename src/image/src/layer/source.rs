//! Where the bytes of a layer come from: the network, and what was fetched ahead.
//!
//! On a driver that applies layers one after the other, a layer comes while those below are still being extracted. It
//! then goes into a file without a name, as far as there is room, and is read from there when its turn has come; a crash
//! leaves nothing of it.

use std::{
    fs::{File, OpenOptions},
    future::Future,
    io::{self, BufRead, ErrorKind, Read},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::Arc,
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use tokio_util::sync::CancellationToken;

use super::Piece;
use crate::progress::Counter;

/// The unit in which room for what is fetched ahead is counted.
const UNIT: usize = 4096;
/// Bytes that are written to the file, and read from it, at a time.
const BATCH: usize = 1 << 20;

/// Room for so many bytes that are fetched ahead.
pub(crate) fn room(bytes: u64) -> Semaphore {
    let units = usize::try_from(bytes / UNIT as u64).unwrap_or(usize::MAX);
    Semaphore::new(units.min(Semaphore::MAX_PERMITS))
}

/// The bytes of a blob, in order. It blocks, and ends with an error where the sender went away before the end.
pub(crate) struct Source {
    ahead: Option<Ahead>,
    /// What follows that and was not enough to be written.
    tail: Bytes,
    /// What is read at present.
    piece: Bytes,
    ended: bool,
    pieces: mpsc::Receiver<Piece>,
    counter: Option<Arc<Counter>>,
    stop: CancellationToken,
}

/// What was fetched ahead into a file.
struct Ahead {
    file: File,
    at: u64,
    end: u64,
    _room: Vec<OwnedSemaphorePermit>,
}

impl Source {
    /// The pieces as they come.
    pub(crate) fn new(pieces: mpsc::Receiver<Piece>, counter: Option<Arc<Counter>>) -> Self {
        let stop = CancellationToken::new();
        Self { ahead: None, tail: Bytes::new(), piece: Bytes::new(), ended: false, pieces, counter, stop }
    }

    /// Ends as if cut when this is cancelled, whatever is at hand still.
    pub(crate) fn until(self, stop: CancellationToken) -> Self {
        Self { stop, ..self }
    }

    /// Takes in what comes until `turn`, into the new file `path` as long as there is room for it; the outcome of `turn`.
    ///
    /// # Errors
    /// The file cannot be written, or the sender went away ([`ErrorKind::ConnectionAborted`]).
    pub(crate) async fn fetch_ahead<T>(
        &mut self,
        turn: impl Future<Output = T>,
        room: &Arc<Semaphore>,
        path: &Path,
    ) -> io::Result<T> {
        let mut turn = std::pin::pin!(turn);
        let (mut file, mut end, mut permits) = (None, 0_u64, Vec::new());
        let mut batch = BytesMut::new();
        let outcome = loop {
            let piece = tokio::select! {
                biased;
                outcome = &mut turn => break outcome,
                piece = self.pieces.recv(), if !self.ended => piece,
            };
            let bytes = match piece {
                None => return Err(gone()),
                Some(Piece::End) => {
                    self.ended = true;
                    continue;
                }
                Some(Piece::Bytes(bytes)) => bytes,
            };
            if let Some(counter) = &self.counter {
                counter.add(bytes.len());
            }
            let units = u32::try_from(bytes.len().div_ceil(UNIT)).unwrap_or(u32::MAX);
            batch.extend_from_slice(&bytes);
            tokio::select! {
                biased;
                outcome = &mut turn => break outcome,
                permit = Arc::clone(room).acquire_many_owned(units) => {
                    permits.push(permit.map_err(io::Error::other)?);
                }
            }
            if batch.len() < BATCH {
                continue;
            }
            let now = batch.split().freeze();
            let (target, path) = (file.take(), path.to_owned());
            let length = now.len() as u64;
            let written = tokio::task::spawn_blocking(move || append(target, &path, end, &now));
            file = Some(written.await.map_err(io::Error::other)??);
            end += length;
        };
        if let Some(file) = file {
            self.ahead = Some(Ahead { file, at: 0, end, _room: permits });
        }
        self.tail = batch.freeze();
        Ok(outcome)
    }

    /// Makes sure that a piece is at hand, unless all have been read.
    fn next(&mut self) -> io::Result<()> {
        if !self.piece.is_empty() {
            return Ok(());
        }
        if self.stop.is_cancelled() {
            return Err(gone());
        }
        if let Some(ahead) = &mut self.ahead {
            let want = usize::try_from(ahead.end - ahead.at).unwrap_or(usize::MAX).min(BATCH);
            let mut bytes = BytesMut::zeroed(want);
            ahead.file.read_exact_at(&mut bytes, ahead.at)?;
            ahead.at += want as u64;
            if ahead.at == ahead.end {
                self.ahead = None;
            }
            self.piece = bytes.freeze();
            return Ok(());
        }
        self.piece = std::mem::take(&mut self.tail);
        while self.piece.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Piece::Bytes(bytes)) => {
                    if let Some(counter) = &self.counter {
                        counter.add(bytes.len());
                    }
                    self.piece = bytes;
                }
                Some(Piece::End) => self.ended = true,
                None => return Err(gone()),
            }
        }
        Ok(())
    }
}

impl BufRead for Source {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.next()?;
        Ok(&self.piece)
    }

    fn consume(&mut self, n: usize) {
        self.piece.advance(n.min(self.piece.len()));
    }
}

impl Read for Source {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        super::stream::take(self, into)
    }
}

fn gone() -> io::Error {
    io::Error::new(ErrorKind::ConnectionAborted, "the download was stopped")
}

/// Writes on at the end of a file, which is made first; its name goes at once.
fn append(file: Option<File>, path: &Path, end: u64, bytes: &[u8]) -> io::Result<File> {
    let file = match file {
        Some(file) => file,
        None => {
            let options = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
            let file = options?;
            std::fs::remove_file(path)?;
            file
        }
    };
    file.write_all_at(bytes, end)?;
    Ok(file)
}
