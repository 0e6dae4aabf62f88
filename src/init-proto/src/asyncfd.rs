//! A pipe, terminal or socket that came by `SCM_RIGHTS`, as an asynchronous stream.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    pin::Pin,
    task::{Context, Poll, ready},
};

use rustix::{
    fs::OFlags,
    io::Errno,
    termios::{Winsize, tcsetwinsize},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, unix::AsyncFd};

/// An asynchronous stream over any descriptor that can be polled.
#[derive(Debug)]
pub struct AsyncFile(AsyncFd<OwnedFd>);

impl AsyncFile {
    /// Takes a descriptor and makes it non-blocking.
    ///
    /// # Errors
    /// What the system says; a regular file cannot be polled.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        register(fd)
    }

    /// Another handle to the same stream.
    ///
    /// # Errors
    /// What the system says.
    pub fn try_clone(&self) -> io::Result<Self> {
        register(self.0.get_ref().try_clone()?)
    }

    /// Sets the size of the terminal that this is the master of.
    ///
    /// # Errors
    /// What the system says.
    pub fn resize(&self, width: u16, height: u16) -> io::Result<()> {
        Ok(tcsetwinsize(
            self.0.get_ref(),
            Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 },
        )?)
    }
}

fn register(fd: OwnedFd) -> io::Result<AsyncFile> {
    // SAFETY: an `OwnedFd` always is the same open descriptor, and nothing here takes it out of the `AsyncFd`.
    let registered = unsafe { AsyncFd::register(fd) };
    Ok(AsyncFile(registered?))
}

impl AsFd for AsyncFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

impl AsyncRead for AsyncFile {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let tried = guard.try_io(|fd| match rustix::io::read(fd.get_ref(), out.initialize_unfilled()) {
                // A terminal's master says EIO when the last holder of the other side is gone.
                Err(Errno::IO) => Ok(0),
                other => Ok(other?),
            });
            if let Ok(result) = tried {
                out.advance(result?);
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for AsyncFile {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            if let Ok(result) = guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?)) {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// A pipe ends when it is dropped.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
