//! The short-lived children of PID 1, each this same binary in another role, single-threaded.
//!
//! A helper has a control socket to PID 1. It (and the process that it leaves behind) sends [`Note`]s; the end of the socket
//! says that the command was executed, since the descriptor is closed on exec.

pub(crate) mod command;
pub(crate) mod create;
pub(crate) mod exec;
mod filter;

use std::os::{
    fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
    unix::net::UnixStream,
};

use moxlet_init_proto::frame;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What a helper says to PID 1.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Note {
    /// The process exists; with a terminal's master where the create helper made one.
    Pid(u32),
    /// A terminal's master comes with this note.
    Terminal,
    /// It failed, and whether that is the command's fault (a StartError) or ours.
    Failed {
        /// For people.
        message: String,
        /// The command cannot be executed.
        start: bool,
    },
}

/// A helper's side of the control socket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Control(i32);

impl Control {
    /// From the helper's first argument; close-on-exec from now on.
    pub(crate) fn from_arg(arg: Option<String>) -> Option<Self> {
        let fd: i32 = arg?.parse().ok().filter(|n| *n > 2)?;
        // SAFETY: a plain call; a bad number is an error.
        (unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == 0).then_some(Self(fd))
    }

    pub(crate) fn fd(self) -> BorrowedFd<'static> {
        // SAFETY: the descriptor was checked in `from_arg` and stays open until the process ends or executes.
        unsafe { BorrowedFd::borrow_raw(self.0) }
    }

    pub(crate) fn note(self, note: &Note, fds: &[BorrowedFd<'_>]) {
        // PID 1 sees the socket's end if this fails.
        let _ = frame::write(self.fd(), note, fds);
    }

    pub(crate) fn fail(self, message: impl Into<String>, start: bool) {
        self.note(&Note::Failed { message: message.into(), start }, &[]);
    }

    /// Receives one message from PID 1.
    pub(crate) fn receive<T: serde::de::DeserializeOwned>(self) -> Result<T> {
        match frame::read(self.fd(), &mut frame::Decoder::default())? {
            Some((message, _)) => Ok(message),
            None => Err(Error::Proto(moxlet_init_proto::Error::Closed)),
        }
    }
}

/// PID 1's side: the notes of one helper.
#[derive(Debug)]
pub(crate) struct Notes {
    socket: UnixStream,
    decoder: frame::Decoder,
}

impl Notes {
    pub(crate) fn new(socket: UnixStream) -> Self {
        Self { socket, decoder: frame::Decoder::default() }
    }

    pub(crate) fn send<T: Serialize>(&self, message: &T) -> Result<()> {
        Ok(frame::write(self.socket.as_fd(), message, &[])?)
    }

    /// The next note; `None` when the command was executed, or the helper is gone. A failure is the error.
    pub(crate) fn next(&mut self) -> Result<Option<(Note, Option<OwnedFd>)>> {
        match frame::read::<Note>(self.socket.as_fd(), &mut self.decoder)? {
            None => Ok(None),
            Some((Note::Failed { message, start: true }, _)) => Err(Error::Start(message)),
            Some((Note::Failed { message, start: false }, _)) => Err(Error::Container(message)),
            Some((note, fds)) => Ok(Some((note, fds.into_iter().next()))),
        }
    }
}

/// Takes a descriptor number that a system call has just returned.
///
/// # Safety
/// The number is an open descriptor that nobody else owns.
pub(crate) unsafe fn own(fd: i32) -> std::io::Result<OwnedFd> {
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
