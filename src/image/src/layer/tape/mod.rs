//! The tape of a layer: what its archive held beside the content of its files, so that the identical archive, with the
//! same DiffID, can be made again from the extracted layer. A push, an export and a verification need it, and no layer
//! has to be kept twice for them.
//!
//! ```text
//! "MOXTAPE1"
//! records, one zstd frame:      literal bytes | the content of a file | end
//! kept contents, a frame each:  of files that a later entry of the same layer replaced
//! index of these
//! trailer:                      offset and length of the index, "MOXTAPE1"
//! ```
//!
//! Numbers are LEB128 in records and index, little endian in the trailer. The order of the records is that of the
//! archive. A file's record names the path that it was extracted to, its length, and where its data lies if it is
//! sparse.

mod reader;
mod recorder;

use std::{fs::File, io, os::unix::fs::FileExt};

pub(crate) use reader::{Rebuilt, Tape};
pub(crate) use recorder::Recorder;

const MAGIC: &[u8; 8] = b"MOXTAPE1";
/// Offset, length, magic.
const TRAILER: usize = 24;

/// Kinds of records.
const END: u64 = 0;
const LITERAL: u64 = 1;
const FILE: u64 = 2;
const SPARSE: u64 = 3;

/// A stretch of a file that has data: offset and length.
pub(crate) type Extent = (u64, u64);

/// Bytes of one literal record.
const MAX_LITERAL: usize = 64 << 10;
/// Bytes of a path (`PATH_MAX`).
const MAX_PATH: usize = 4096;
/// Extents of one sparse file.
pub(crate) const MAX_EXTENTS: usize = 1 << 18;
/// Bytes of the index.
const MAX_INDEX: u64 = 256 << 20;
/// Entries, and targets of hard links, that were led elsewhere.
const MAX_PLACES: u64 = 8 << 20;
/// Files whose content was kept.
const MAX_KEPT: u64 = 4 << 20;

fn put_number(into: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        into.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    into.push(number as u8);
}

fn get_number(from: &mut impl io::Read) -> io::Result<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let mut byte = [0];
        from.read_exact(&mut byte)?;
        let part = u64::from(byte[0] & 0x7f);
        if part << shift >> shift != part {
            break;
        }
        number |= part << shift;
        if byte[0] & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(damaged("a number is too large"))
}

fn get_bytes(from: &mut impl io::Read, max: usize) -> io::Result<Vec<u8>> {
    let length = usize::try_from(get_number(from)?).ok().filter(|l| *l <= max);
    let mut bytes = vec![0; length.ok_or_else(|| damaged("a text is too long"))?];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn damaged(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the layer's tape is damaged: {why}"))
}

/// A part of a file, read without its offset, so that several can be read at a time.
struct Section {
    file: std::sync::Arc<File>,
    at: u64,
    end: u64,
}

impl io::Read for Section {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.end.saturating_sub(self.at)).unwrap_or(usize::MAX).min(into.len());
        let n = self.file.read_at(&mut into[..want], self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}
