//! Copies of a container's output for whoever attaches.

use std::{os::fd::OwnedFd, sync::Mutex, time::Duration};

use rustix::fs::OFlags;

use crate::{
    error::{Context, Error, Result},
    log::Stream,
    sys::{lock, pipe, write_bounded},
};

/// How long a full reader may hold up the container's output, and with it the log, before it is dropped.
const PATIENCE: Duration = Duration::from_secs(2);
/// The bounded buffer of a reader: its pipe.
const BUFFER: usize = 1 << 20;
const MAX_READERS: usize = 64;

/// The readers of one container.
#[derive(Debug, Default)]
pub(crate) struct Readers(Mutex<Vec<(Stream, OwnedFd)>>);

impl Readers {
    /// Adds a reader and returns its end; refused when `alive` says that nothing will come.
    pub(crate) fn add(&self, stream: Stream, alive: impl FnOnce() -> Result<()>) -> Result<OwnedFd> {
        let mut all = lock(&self.0);
        alive()?;
        if all.len() >= MAX_READERS {
            return Err(Error::Invalid(format!("more than {MAX_READERS} streams are attached")));
        }
        let (read, write) = pipe(BUFFER)?;
        rustix::fs::fcntl_setfl(&write, OFlags::NONBLOCK).context("attach")?;
        all.push((stream, write));
        Ok(read)
    }

    /// Copies to the readers of this stream.
    pub(crate) fn copy(&self, from: Stream, bytes: &[u8]) {
        lock(&self.0).retain(|(stream, fd)| *stream != from || write_bounded(fd, bytes, PATIENCE).is_ok());
    }

    /// A stream has ended.
    pub(crate) fn end(&self, ended: Stream) {
        lock(&self.0).retain(|(stream, _)| *stream != ended);
    }

    /// All have ended.
    pub(crate) fn clear(&self) {
        lock(&self.0).clear();
    }
}
