//! Decompression in a thread of its own, and the digest of what it gives in another: while one stretch of an archive is
//! written, the next is digested and the one after that is unpacked. Of an image that is one large layer all parts of the
//! work are then done at a time.

use std::{
    io::{self, BufRead, ErrorKind, Read},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

use moxlet_ids::{Algorithm, Digest, Hasher};

/// Bytes of a stretch: it is still in the processor's cache when it is digested and written.
const STRETCH: usize = 128 << 10;
/// How many stretches there are; one is written, one digested, one filled, the others even these out.
const STRETCHES: usize = 8;

/// What has been unpacked: a buffer and how much of it is filled, nothing for the end.
type Unpacked = io::Result<Option<(Box<[u8]>, usize)>>;

/// The same once it is digested.
enum Digested {
    Stretch(Box<[u8]>, usize),
    /// The digest of all that came, and its length.
    End(Digest, u64),
}

/// The unpacked bytes, in order.
pub(super) struct Ahead {
    full: Receiver<io::Result<Digested>>,
    empty: SyncSender<Box<[u8]>>,
    now: Box<[u8]>,
    at: usize,
    end: usize,
    ended: Option<(Digest, u64)>,
}

/// Has `work` read what `unpack` opens, which other threads read ahead of it, `max` bytes at most. These have ended when
/// this returns.
///
/// # Errors
/// A thread cannot be started. What goes wrong in them is an error of reading.
pub(super) fn reading<'a, S, T>(
    unpack: impl FnOnce() -> io::Result<S> + Send + 'a,
    max: u64,
    work: impl FnOnce(Ahead) -> T,
) -> io::Result<T>
where
    S: Read,
{
    // Each has room for all stretches: who fills or digests one waits for the next one alone.
    let (into_filled, filled) = sync_channel(STRETCHES);
    let (into_full, full) = sync_channel(STRETCHES);
    let (empty, from_empty) = sync_channel(STRETCHES);
    for _ in 1..STRETCHES {
        // There is room for all of them.
        let _ = empty.try_send(vec![0; STRETCH].into_boxed_slice());
    }
    let now = vec![0; STRETCH].into_boxed_slice();
    let ahead = Ahead { full, empty, now, at: 0, end: 0, ended: None };
    thread::scope(|scope| {
        // What has been handed on is dropped where the next thread cannot be started, and ends those before it.
        let digesting = move || digest(&filled, &into_full);
        thread::Builder::new().name("digest".into()).spawn_scoped(scope, digesting)?;
        let unpacking = move || fill(unpack, max, &from_empty, &into_filled);
        thread::Builder::new().name("unpack".into()).spawn_scoped(scope, unpacking)?;
        Ok(work(ahead))
    })
}

/// Fills buffers until the end, an error, or nobody wants them any more.
fn fill<S: Read>(
    unpack: impl FnOnce() -> io::Result<S>,
    max: u64,
    empty: &Receiver<Box<[u8]>>,
    filled: &SyncSender<Unpacked>,
) {
    let last = match unpack() {
        Err(error) => Err(error),
        Ok(mut plain) => {
            let mut left = max;
            loop {
                let Ok(mut buffer) = empty.recv() else { return };
                match stretch(&mut plain, &mut buffer, &mut left) {
                    Ok(0) => break Ok(None),
                    Ok(n) if filled.send(Ok(Some((buffer, n)))).is_err() => return,
                    Ok(_) => {}
                    Err(error) => break Err(error),
                }
            }
        }
    };
    // Who has gone needs no end.
    let _ = filled.send(last);
}

/// Fills a buffer as far as it goes: a decoder gives small parts, and each stretch wakes the other threads.
fn stretch(plain: &mut impl Read, buffer: &mut [u8], left: &mut u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        let n = match plain.read(&mut buffer[filled..]) {
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            read => read?,
        };
        if n == 0 {
            break;
        }
        *left = left.checked_sub(n as u64).ok_or_else(|| {
            io::Error::new(ErrorKind::InvalidData, "it unpacks to more than a layer may have")
        })?;
        filled += n;
    }
    Ok(filled)
}

/// Digests what is filled and hands it on until the end, an error, or nobody wants it any more.
fn digest(filled: &Receiver<Unpacked>, full: &SyncSender<io::Result<Digested>>) {
    let (mut hash, mut size) = (Hasher::new(Algorithm::Sha256), 0);
    // A thread that ends without a last word has nobody left to hear it.
    while let Ok(unpacked) = filled.recv() {
        let next = match unpacked {
            Ok(Some((buffer, n))) => {
                hash.update(&buffer[..n]);
                size += n as u64;
                Ok(Digested::Stretch(buffer, n))
            }
            Ok(None) => {
                // Nothing comes after the end.
                let whole = std::mem::replace(&mut hash, Hasher::new(Algorithm::Sha256));
                Ok(Digested::End(whole.finish(), size))
            }
            Err(error) => Err(error),
        };
        if full.send(next).is_err() {
            return;
        }
    }
}

impl Ahead {
    /// Reads what is left; the digest of all that there was, and its length.
    pub(super) fn finish(mut self) -> io::Result<(Digest, u64)> {
        loop {
            let n = self.fill_buf()?.len();
            if let Some(ended) = self.ended {
                return Ok(ended);
            }
            self.consume(n);
        }
    }
}

impl BufRead for Ahead {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.end && self.ended.is_none() {
            match self.full.recv() {
                Ok(Ok(Digested::Stretch(buffer, n))) => {
                    let used = std::mem::replace(&mut self.now, buffer);
                    (self.at, self.end) = (0, n);
                    // Nobody takes it after the last one.
                    let _ = self.empty.try_send(used);
                }
                Ok(Ok(Digested::End(digest, size))) => self.ended = Some((digest, size)),
                Ok(Err(error)) => return Err(error),
                Err(_) => return Err(io::Error::other("the decompression has ended early")),
            }
        }
        Ok(&self.now[self.at..self.end])
    }

    fn consume(&mut self, n: usize) {
        self.at = self.end.min(self.at + n);
    }
}

impl Read for Ahead {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        super::stream::take(self, into)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn all_bytes_come_in_order_and_then_the_end() {
        let bytes: Vec<u8> = (0..3 * STRETCH + 17).map(|n| (n * 7 % 251) as u8).collect();
        let read = reading(
            || Ok(&bytes[..]),
            1 << 30,
            |mut ahead| {
                let mut all = Vec::new();
                ahead.read_to_end(&mut all).unwrap();
                assert_eq!(ahead.fill_buf().unwrap(), b"");
                all
            },
        );
        assert_eq!(read.unwrap(), bytes);
    }

    #[test]
    fn the_digest_is_of_all_that_is_unpacked_read_or_not() {
        let bytes: Vec<u8> = (0..2 * STRETCHES * STRETCH + 5).map(|n| (n % 249) as u8).collect();
        let finish = |mut ahead: Ahead| {
            ahead.read_exact(&mut [0; 1000]).unwrap();
            ahead.finish().unwrap()
        };
        let expected = (Digest::of(&bytes), bytes.len() as u64);
        assert_eq!(reading(|| Ok(&bytes[..]), 1 << 30, finish).unwrap(), expected);
        let nothing = reading(|| Ok(io::empty()), 0, |ahead| ahead.finish().unwrap());
        assert_eq!(nothing.unwrap(), (Digest::of(b""), 0));
    }

    #[test]
    fn what_breaks_off_has_no_digest() {
        let broken = || Ok((&[1; 3 * STRETCH][..]).chain(Broken));
        let error = reading(broken, 1 << 30, |ahead| ahead.finish().unwrap_err());
        assert_eq!(error.unwrap().kind(), ErrorKind::ConnectionAborted);
    }

    struct Broken;

    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(ErrorKind::ConnectionAborted.into())
        }
    }

    #[test]
    fn more_than_the_bound_is_an_error_and_no_memory() {
        let outcome =
            reading(|| Ok(io::repeat(0)), 1 << 20, |mut ahead| io::copy(&mut ahead, &mut io::sink()));
        assert_eq!(outcome.unwrap().unwrap_err().kind(), ErrorKind::InvalidData);
    }

    #[test]
    fn who_stops_reading_stops_the_thread() {
        let first = reading(|| Ok(io::repeat(7)), u64::MAX, |mut ahead| ahead.fill_buf().unwrap()[0]);
        assert_eq!(first.unwrap(), 7);
    }

    #[test]
    fn what_cannot_be_opened_is_an_error_of_reading() {
        let open = || Err::<io::Empty, _>(io::Error::new(ErrorKind::InvalidData, "no frame"));
        let error = reading(open, 1, |mut ahead| ahead.fill_buf().map(<[u8]>::len).unwrap_err());
        assert_eq!(error.unwrap().to_string(), "no frame");
    }
}
