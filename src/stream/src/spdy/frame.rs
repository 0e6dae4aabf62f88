//! Frames of SPDY/3.1 (sections 2.2 and 2.6): what Kubernetes uses of them.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::error::{Error, Result};

/// The longest control frame that is accepted, in bytes; header blocks of Kubernetes have a few hundred.
pub(crate) const MAX_CONTROL: usize = 64 << 10;
/// Every frame begins with this many bytes.
pub(crate) const HEADER: usize = 8;
const FLAG_FIN: u8 = 1;

/// What a frame's first eight bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Head {
    Data { stream: u32, fin: bool, length: usize },
    Control { kind: u16, flags: u8, length: usize },
}

impl Head {
    /// Reads the first eight bytes.
    pub(crate) fn parse(bytes: [u8; HEADER]) -> Result<Self> {
        let [a, b, c, d, flags, x, y, z] = bytes;
        let length = usize::from(x) << 16 | usize::from(y) << 8 | usize::from(z);
        if a & 0x80 == 0 {
            return Ok(Self::Data {
                stream: u32::from_be_bytes([a, b, c, d]),
                fin: flags & FLAG_FIN != 0,
                length,
            });
        }
        let version = u16::from_be_bytes([a & 0x7f, b]);
        if version != 3 {
            return Err(Error::spdy(format!("version {version} instead of 3")));
        }
        if length > MAX_CONTROL {
            return Err(Error::spdy(format!(
                "a control frame of {length} bytes is longer than {MAX_CONTROL}"
            )));
        }
        Ok(Self::Control { kind: u16::from_be_bytes([c, d]), flags, length })
    }
}

/// A control frame, its header block still compressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Control {
    SynStream {
        stream: u32,
        fin: bool,
        block: Bytes,
    },
    SynReply {
        stream: u32,
        fin: bool,
        block: Bytes,
    },
    Reset {
        stream: u32,
    },
    Ping {
        id: u32,
    },
    GoAway,
    Headers {
        block: Bytes,
        stream: u32,
        fin: bool,
    },
    /// Settings, window updates and what a later version may add: of no meaning here, as nothing waits for windows.
    Ignored,
}

impl Control {
    /// Reads a control frame's payload.
    pub(crate) fn parse(kind: u16, flags: u8, mut payload: Bytes) -> Result<Self> {
        let fin = flags & FLAG_FIN != 0;
        let number = |payload: &mut Bytes| -> Result<u32> {
            if payload.len() < 4 {
                return Err(Error::spdy(format!("a control frame of type {kind} ends early")));
            }
            Ok(payload.get_u32())
        };
        match kind {
            1 => {
                let stream = number(&mut payload)? & 0x7fff_ffff;
                number(&mut payload)?; // associated stream
                if payload.len() < 2 {
                    return Err(Error::spdy("a SYN_STREAM ends early"));
                }
                payload.advance(2); // priority, credential slot
                Ok(Self::SynStream { stream, fin, block: payload })
            }
            2 => Ok(Self::SynReply { stream: number(&mut payload)? & 0x7fff_ffff, fin, block: payload }),
            3 => Ok(Self::Reset { stream: number(&mut payload)? & 0x7fff_ffff }),
            6 => Ok(Self::Ping { id: number(&mut payload)? }),
            7 => Ok(Self::GoAway),
            8 => Ok(Self::Headers { stream: number(&mut payload)? & 0x7fff_ffff, fin, block: payload }),
            _ => Ok(Self::Ignored),
        }
    }
}

fn control(kind: u16, flags: u8, payload: &[u8], out: &mut BytesMut) {
    out.put_u16(0x8003);
    out.put_u16(kind);
    put_flags_and_length(flags, payload.len(), out);
    out.put_slice(payload);
}

fn put_flags_and_length(flags: u8, length: usize, out: &mut BytesMut) {
    let length = u32::try_from(length).unwrap_or(u32::MAX) & 0x00ff_ffff;
    out.put_u32(u32::from(flags) << 24 | length);
}

/// Opens a stream.
pub(crate) fn syn_stream(stream: u32, block: &[u8], out: &mut BytesMut) {
    let mut payload = Vec::with_capacity(block.len() + 10);
    payload.put_u32(stream);
    payload.put_u32(0);
    payload.put_u16(0);
    payload.put_slice(block);
    control(1, 0, &payload, out);
}

/// Accepts a stream.
pub(crate) fn syn_reply(stream: u32, block: &[u8], out: &mut BytesMut) {
    let mut payload = Vec::with_capacity(block.len() + 4);
    payload.put_u32(stream);
    payload.put_slice(block);
    control(2, 0, &payload, out);
}

/// Ends a stream at once; `status` is that of section 2.6.3, e.g. 3 for a refused one, 5 for a cancelled one.
pub(crate) fn reset(stream: u32, status: u32, out: &mut BytesMut) {
    let mut payload = [0; 8];
    payload[..4].copy_from_slice(&stream.to_be_bytes());
    payload[4..].copy_from_slice(&status.to_be_bytes());
    control(3, 0, &payload, out);
}

/// A ping or its echo.
pub(crate) fn ping(id: u32, out: &mut BytesMut) {
    control(6, 0, &id.to_be_bytes(), out);
}

/// No more streams, please.
pub(crate) fn goaway(last: u32, out: &mut BytesMut) {
    let mut payload = [0; 8];
    payload[..4].copy_from_slice(&last.to_be_bytes());
    control(7, 0, &payload, out);
}

/// The eight bytes before `length` bytes of data.
pub(crate) fn data_head(stream: u32, fin: bool, length: usize, out: &mut BytesMut) {
    out.put_u32(stream & 0x7fff_ffff);
    put_flags_and_length(u8::from(fin), length, out);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use proptest::prelude::*;

    use super::*;

    fn read(bytes: BytesMut) -> Control {
        let head: [u8; 8] = bytes[..8].try_into().unwrap();
        let Head::Control { kind, flags, length } = Head::parse(head).unwrap() else {
            panic!("no control frame")
        };
        assert_eq!(length, bytes.len() - 8);
        Control::parse(kind, flags, bytes.freeze().slice(8..)).unwrap()
    }

    fn written(write: impl FnOnce(&mut BytesMut)) -> BytesMut {
        let mut out = BytesMut::new();
        write(&mut out);
        out
    }

    #[test]
    fn every_frame_reads_back_as_written() {
        let block = Bytes::from_static(b"block");
        let syn = read(written(|o| syn_stream(7, b"block", o)));
        assert_eq!(syn, Control::SynStream { stream: 7, fin: false, block: block.clone() });
        let reply = read(written(|o| syn_reply(7, b"block", o)));
        assert_eq!(reply, Control::SynReply { stream: 7, fin: false, block });
        assert_eq!(read(written(|o| reset(9, 5, o))), Control::Reset { stream: 9 });
        assert_eq!(read(written(|o| ping(3, o))), Control::Ping { id: 3 });
        assert_eq!(read(written(|o| goaway(3, o))), Control::GoAway);
        let data = written(|o| data_head(5, true, 70_000, o));
        let head = Head::parse(data[..].try_into().unwrap()).unwrap();
        assert_eq!(head, Head::Data { stream: 5, fin: true, length: 70_000 });
    }

    #[test]
    fn another_version_and_long_control_frames_are_refused() {
        assert!(Head::parse([0x80, 2, 0, 1, 0, 0, 0, 8]).is_err());
        assert!(Head::parse([0x80, 3, 0, 1, 0, 0xff, 0, 8]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_never_panic(head in any::<[u8; 8]>(), payload in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(Head::Control { kind, flags, .. }) = Head::parse(head) {
                let _ = Control::parse(kind, flags, Bytes::from(payload));
            }
        }
    }
}
