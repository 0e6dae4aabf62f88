//! Length-prefixed JSON over a unix stream socket, with file descriptors: encoding, decoding, and the blocking calls of the init.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};
use serde::{Serialize, de::DeserializeOwned};

use crate::{Error, MAX_FDS, MAX_MESSAGE, Result};

/// A message as bytes: length and JSON.
///
/// # Errors
/// [`Error::TooLarge`] beyond [`MAX_MESSAGE`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>> {
    let mut out = vec![0; 4];
    serde_json::to_writer(&mut out, message).map_err(|e| Error::Malformed(e.to_string()))?;
    let length = out.len() - 4;
    if length > MAX_MESSAGE {
        return Err(Error::TooLarge(length));
    }
    let head = u32::try_from(length).map_err(|_| Error::TooLarge(length))?;
    out[..4].copy_from_slice(&head.to_be_bytes());
    Ok(out)
}

/// Collects bytes and descriptors until there is a whole message.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Decoder {
    /// Takes what was received.
    ///
    /// # Errors
    /// More descriptors than [`MAX_FDS`] since the last message.
    pub fn push(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) -> Result<()> {
        self.bytes.extend_from_slice(bytes);
        self.fds.extend(fds);
        if self.fds.len() > MAX_FDS {
            self.fds.clear();
            return Err(Error::Malformed(format!("more than {MAX_FDS} file descriptors")));
        }
        Ok(())
    }

    /// Whether no byte waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The next whole message and the descriptors that have come so far. A stream socket may hand out the descriptors of a
    /// message together with the message before it: whoever sends several in a row takes that into account.
    ///
    /// # Errors
    /// An announced length beyond [`MAX_MESSAGE`], or bytes that are not such a message.
    #[allow(clippy::should_implement_trait)]
    pub fn next<T: DeserializeOwned>(&mut self) -> Result<Option<(T, Vec<OwnedFd>)>> {
        let Some(head) = self.bytes.first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_be_bytes(*head) as usize;
        if length > MAX_MESSAGE {
            return Err(Error::TooLarge(length));
        }
        let Some(body) = self.bytes.get(4..4 + length) else { return Ok(None) };
        let message = serde_json::from_slice(body).map_err(|e| Error::Malformed(e.to_string()))?;
        self.bytes.drain(..4 + length);
        Ok(Some((message, std::mem::take(&mut self.fds))))
    }
}

/// One `sendmsg`; the descriptors go with the first byte.
///
/// # Errors
/// What the system says; `WouldBlock` on a full non-blocking socket.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many file descriptors"));
    }
    loop {
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// One `recvmsg`: bytes into `buffer`, and the descriptors that came with them (close-on-exec).
///
/// # Errors
/// What the system says; more descriptors than fit are an error, too.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = message {
            fds.extend(more);
        }
    }
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "too many file descriptors"));
    }
    Ok((got.bytes, fds))
}

/// Sends a message on a blocking socket.
///
/// # Errors
/// A message that is too long, or what the system says.
pub fn write<T: Serialize>(socket: impl AsFd, message: &T, fds: &[BorrowedFd<'_>]) -> Result<()> {
    let bytes = encode(message)?;
    let mut sent = send(socket.as_fd(), &bytes, fds)?;
    while sent < bytes.len() {
        sent += send(socket.as_fd(), &bytes[sent..], &[])?;
    }
    Ok(())
}

/// Receives a message on a blocking socket; `None` at a clean end.
///
/// # Errors
/// An end within a message, a malformed message, or what the system says.
pub fn read<T: DeserializeOwned>(
    socket: impl AsFd,
    decoder: &mut Decoder,
) -> Result<Option<(T, Vec<OwnedFd>)>> {
    let mut buffer = [0; 4096];
    loop {
        if let Some(message) = decoder.next()? {
            return Ok(Some(message));
        }
        let (length, fds) = receive(socket.as_fd(), &mut buffer)?;
        if length == 0 {
            return if decoder.bytes.is_empty() { Ok(None) } else { Err(Error::Closed) };
        }
        decoder.push(&buffer[..length], fds)?;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;

    use super::*;
    use crate::{Envelope, ErrorClass, Event, Request, Response};

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..16)) {
            let mut decoder = Decoder::default();
            for chunk in chunks {
                decoder.push(&chunk, Vec::new()).unwrap();
                if decoder.next::<Response>().is_err() {
                    break;
                }
            }
        }

        #[test]
        fn arbitrary_json_after_a_right_head_never_panics(text in "\\PC*") {
            let mut decoder = Decoder::default();
            decoder.push(&u32::try_from(text.len()).unwrap().to_be_bytes(), Vec::new()).unwrap();
            decoder.push(text.as_bytes(), Vec::new()).unwrap();
            let _ = decoder.next::<Envelope>();
        }

        #[test]
        fn messages_survive_any_fragmentation(texts in prop::collection::vec("\\PC{0,200}", 1..5), step in 1usize..50) {
            let mut wire = Vec::new();
            for text in &texts {
                wire.extend(encode(&Response::Error { class: ErrorClass::Internal, message: text.clone() }).unwrap());
            }
            let (mut decoder, mut got) = (Decoder::default(), Vec::new());
            for chunk in wire.chunks(step) {
                decoder.push(chunk, Vec::new()).unwrap();
                while let Some((Response::Error { message, .. }, _)) = decoder.next().unwrap() {
                    got.push(message);
                }
            }
            prop_assert_eq!(got, texts);
        }

        #[test]
        fn a_length_beyond_the_bound_is_refused_at_once(length in (MAX_MESSAGE as u32 + 1)..) {
            let mut decoder = Decoder::default();
            decoder.push(&length.to_be_bytes(), Vec::new()).unwrap();
            prop_assert!(matches!(decoder.next::<Response>(), Err(Error::TooLarge(_))));
        }
    }

    #[test]
    fn descriptors_travel_and_are_bounded() {
        let (a, b) = UnixStream::pair().unwrap();
        let (x, y) = UnixStream::pair().unwrap();
        write(&a, &Response::Done, &[x.as_fd(), y.as_fd()]).unwrap();
        let (_, fds) = read::<Response>(&b, &mut Decoder::default()).unwrap().unwrap();
        assert_eq!(fds.len(), 2);
        let mut decoder = Decoder::default();
        for _ in 0..MAX_FDS {
            decoder.push(b"", vec![x.try_clone().unwrap().into()]).unwrap();
        }
        assert!(decoder.push(b"", vec![x.into()]).is_err());
    }

    #[test]
    fn a_later_version_is_understood_as_far_as_possible() {
        let request: Envelope =
            serde_json::from_str(r#"{"version":9,"request":{"op":"levitate","height":3},"more":1}"#).unwrap();
        assert!(matches!(request.request, Request::Unknown));
        let start: Envelope =
            serde_json::from_str(r#"{"request":{"op":"start","id":"a","colour":"red"}}"#).unwrap();
        assert!(matches!(start.request, Request::Start { .. }));
        assert_eq!(
            serde_json::from_str::<Event>(r#"{"event":"melted","container":{}}"#).unwrap(),
            Event::Unknown
        );
        let create: Envelope =
            serde_json::from_str(r#"{"version":1,"request":{"op":"create","id":"a"}}"#).unwrap();
        assert!(matches!(create.request, Request::Create(c) if c.log_max_bytes == 0));
    }
}
