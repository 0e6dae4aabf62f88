//! Decompression in a thread of its own: while one stretch of an archive is digested and written, the next is unpacked.
//! Of an image that is one large layer both halves of the work are then done at a time.

use std::{
    io::{self, BufRead, ErrorKind, Read},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

/// Bytes of a stretch: it is still in the processor's cache when it is digested and written.
const STRETCH: usize = 128 << 10;
/// How many stretches there are; one is written, one filled, the others even out the two.
const STRETCHES: usize = 4;

/// What has been unpacked: a buffer and how much of it is filled, nothing for the end.
type Unpacked = io::Result<Option<(Box<[u8]>, usize)>>;

/// The unpacked bytes, in order.
pub(super) struct Ahead {
    full: Receiver<Unpacked>,
    empty: SyncSender<Box<[u8]>>,
    now: Box<[u8]>,
    at: usize,
    end: usize,
    ended: bool,
}

/// Has `work` read what `unpack` opens, which another thread reads ahead of it, `max` bytes at most. That thread has
/// ended when this returns.
///
/// # Errors
/// The thread cannot be started. What goes wrong in it is an error of reading.
pub(super) fn reading<'a, S, T>(
    unpack: impl FnOnce() -> io::Result<S> + Send + 'a,
    max: u64,
    work: impl FnOnce(Ahead) -> T,
) -> io::Result<T>
where
    S: Read,
{
    let (into_full, full) = sync_channel(STRETCHES);
    let (empty, from_empty) = sync_channel(STRETCHES);
    for _ in 1..STRETCHES {
        // There is room for all of them.
        let _ = empty.try_send(vec![0; STRETCH].into_boxed_slice());
    }
    let now = vec![0; STRETCH].into_boxed_slice();
    thread::scope(|scope| {
        let unpacking = move || fill(unpack, max, &from_empty, &into_full);
        thread::Builder::new().name("unpack".into()).spawn_scoped(scope, unpacking)?;
        Ok(work(Ahead { full, empty, now, at: 0, end: 0, ended: false }))
    })
}

/// Fills buffers until the end, an error, or nobody wants them any more.
fn fill<S: Read>(
    unpack: impl FnOnce() -> io::Result<S>,
    max: u64,
    empty: &Receiver<Box<[u8]>>,
    full: &SyncSender<Unpacked>,
) {
    let last = match unpack() {
        Err(error) => Err(error),
        Ok(mut plain) => {
            let mut left = max;
            loop {
                let Ok(mut buffer) = empty.recv() else { return };
                match stretch(&mut plain, &mut buffer, &mut left) {
                    Ok(0) => break Ok(None),
                    Ok(n) if full.send(Ok(Some((buffer, n)))).is_err() => return,
                    Ok(_) => {}
                    Err(error) => break Err(error),
                }
            }
        }
    };
    // Who has gone needs no end.
    let _ = full.send(last);
}

/// Fills a buffer as far as it goes: a decoder gives small parts, and each stretch wakes the other thread.
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

impl BufRead for Ahead {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.end && !self.ended {
            match self.full.recv() {
                Ok(Ok(Some((buffer, n)))) => {
                    let used = std::mem::replace(&mut self.now, buffer);
                    (self.at, self.end) = (0, n);
                    // Nobody takes it after the last one.
                    let _ = self.empty.try_send(used);
                }
                Ok(Ok(None)) => self.ended = true,
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
