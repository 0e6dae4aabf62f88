//! Sparse files of a tar: GNU's old header and the three ways of its extended headers ("Sparse Formats" of GNU tar's
//! manual). A map whose stretches overlap, are out of order, lie beyond the file or do not add up is refused.

use super::{Outcome, archive::bad, pax::number, shown};
use crate::layer::tape::{Extent, MAX_EXTENTS};

/// A file with holes: its length, and where the data lies that the archive holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sparse {
    pub(super) size: u64,
    pub(super) extents: Vec<Extent>,
}

/// What extended headers say of a sparse file.
#[derive(Debug, Default)]
pub(super) struct SparseKeys {
    major: Option<u64>,
    minor: Option<u64>,
    size: Option<u64>,
    blocks: Option<u64>,
    /// Offsets and lengths in turn.
    numbers: Vec<u64>,
    /// The name of the file; the header's own is a stand-in.
    pub(super) name: Option<Vec<u8>>,
}

/// Where the map of a sparse file is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Map {
    /// It is no sparse file.
    None,
    /// In the extended headers.
    Here(Sparse),
    /// Before the data of this file of so many bytes.
    InContent(u64),
}

impl SparseKeys {
    /// Takes a record `GNU.sparse.<key>`.
    pub(super) fn take(&mut self, key: &[u8], value: &[u8]) -> Outcome<()> {
        let malformed = || bad(format!("an extended header has a bad value for GNU.sparse.{}", shown(key)));
        let digits = |value: &[u8]| decimal(value).ok_or_else(malformed);
        match key {
            b"major" => self.major = Some(digits(value)?),
            b"minor" => self.minor = Some(digits(value)?),
            b"size" | b"realsize" => self.size = Some(digits(value)?),
            b"numblocks" => self.blocks = Some(digits(value)?),
            b"name" => self.name = Some(value.to_vec()).filter(|v| !v.is_empty()),
            // Version 0.0 has one record a number.
            b"offset" | b"numbytes" => {
                if (key == b"offset") != self.numbers.len().is_multiple_of(2) {
                    return Err(malformed());
                }
                self.push(digits(value)?)?;
            }
            b"map" => {
                self.numbers.clear();
                for part in value.split(|b| *b == b',').filter(|_| !value.is_empty()) {
                    self.push(digits(part)?)?;
                }
            }
            _ => {
                let what = shown(key);
                return Err(bad(format!(
                    "it has a sparse file with GNU.sparse.{what}, which is not supported"
                )));
            }
        }
        Ok(())
    }

    fn push(&mut self, number: u64) -> Outcome<()> {
        if self.numbers.len() >= 2 * MAX_EXTENTS {
            return Err(too_many());
        }
        self.numbers.push(number);
        Ok(())
    }

    /// What they say in all.
    pub(super) fn map(&self) -> Outcome<Map> {
        match (self.major, self.minor) {
            (None | Some(0), _) => {}
            (Some(1), None | Some(0)) => {
                let size = self.size.ok_or_else(|| bad("a sparse file has no size"))?;
                return Ok(Map::InContent(size));
            }
            (Some(major), minor) => {
                let minor = minor.unwrap_or(0);
                return Err(bad(format!(
                    "it has a sparse file of version {major}.{minor}, which is not supported"
                )));
            }
        }
        match self.size {
            None if self.blocks.is_none() && self.numbers.is_empty() => Ok(Map::None),
            None => Err(bad("a sparse file has no size")),
            Some(size) => {
                if !self.numbers.len().is_multiple_of(2)
                    || self.blocks.is_some_and(|b| b != self.numbers.len() as u64 / 2)
                {
                    return Err(bad("the map of a sparse file is incomplete"));
                }
                Ok(Map::Here(Sparse { size, extents: pairs(&self.numbers) }))
            }
        }
    }
}

impl Sparse {
    /// A map is used only when this has looked at it: `stored` bytes of data are in the archive.
    pub(super) fn checked(mut self, stored: u64, name: &[u8]) -> Outcome<Self> {
        let refuse = |why: &str| Err(bad(format!("the map of the sparse file {} {why}", shown(name))));
        if i64::try_from(self.size).is_err() {
            return refuse("has a size beyond all files");
        }
        let (mut end, mut data) = (0_u64, 0_u64);
        for (offset, length) in &self.extents {
            if *offset < end {
                return refuse("overlaps or is out of order");
            }
            end = match offset.checked_add(*length) {
                Some(end) if end <= self.size => end,
                _ => return refuse("goes beyond its end"),
            };
            data += length;
        }
        if data != stored {
            return refuse("does not fit its content");
        }
        self.extents.retain(|(_, length)| *length > 0);
        Ok(self)
    }
}

/// The stretches of GNU's old header or of one that continues it; an empty field ends them.
pub(super) fn old_extents(field: &[u8], extents: &mut Vec<Extent>) -> Outcome<()> {
    for pair in field.chunks_exact(24) {
        let (offset, length) = pair.split_at(12);
        if length.first().is_none_or(|b| *b == 0) {
            break;
        }
        let numbers = number(offset).zip(number(length));
        extents.push(numbers.ok_or_else(|| bad("the map of a sparse file has a bad number"))?);
        if extents.len() > MAX_EXTENTS {
            return Err(too_many());
        }
    }
    Ok(())
}

/// Reads the map that precedes the data (version 1.0) from lines as `line` gives them.
pub(super) fn map_in_content(size: u64, mut line: impl FnMut() -> Outcome<Vec<u8>>) -> Outcome<Sparse> {
    let mut next = || {
        let text = line()?;
        decimal(&text).ok_or_else(|| bad("the map of a sparse file has a bad number"))
    };
    let count = next()?;
    if count > MAX_EXTENTS as u64 {
        return Err(too_many());
    }
    let mut extents = Vec::new();
    for _ in 0..count {
        extents.push((next()?, next()?));
    }
    Ok(Sparse { size, extents })
}

fn pairs(numbers: &[u64]) -> Vec<Extent> {
    numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()
}

/// Plain digits, without a sign.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok().filter(|t| t.bytes().all(|b| b.is_ascii_digit()))?;
    text.parse().ok()
}

fn too_many() -> super::Fault {
    bad(format!("a sparse file has more than {MAX_EXTENTS} stretches of data"))
}
