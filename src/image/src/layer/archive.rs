//! Reading the tar of a layer, entry by entry.
//!
//! The tar crate knows the layout of a header; what is around it is read here, since that crate keeps extended headers
//! of any size in memory, cuts their values at newlines (a capability may hold one) and passes over the size of a file
//! that follows such a value. Whatever two readers could see differently is refused.

use std::{
    borrow::Cow,
    io::{self, BufRead},
};

use rustix::fs::Timespec;
use tar::{EntryType, Header};

use super::{
    Fault, MAX_UNPACKED, Outcome,
    pax::{Extensions, number, seconds},
    read_fault, shown,
    sparse::{self, Map, Sparse},
    tape::Recorder,
};

const BLOCK: usize = 512;
/// Bytes of one extended header or long name.
const MAX_EXTENSION: u64 = 1 << 20;
/// Entries of one layer, headers that only describe another entry included.
pub(super) const MAX_ENTRIES: u64 = 4 << 20;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    Symlink,
    HardLink,
    CharDevice,
    BlockDevice,
    Fifo,
}

/// An entry, its names as they stand in the archive.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Timespec,
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the content of a file with holes belongs.
    pub(super) sparse: Option<Sparse>,
    /// Bytes of content in the archive.
    pub(crate) stored: u64,
}

impl Entry {
    /// The length of the file.
    pub(crate) fn size(&self) -> u64 {
        self.sparse.as_ref().map_or(self.stored, |s| s.size)
    }
}

/// A tar that is being read.
pub(crate) struct Archive<R> {
    input: R,
    tape: Option<Recorder>,
    entries: u64,
    /// What is left of the entry at hand, and what fills up its last block.
    left: u64,
    padding: u64,
}

impl<R: BufRead> Archive<R> {
    /// An archive of which no tape is kept.
    pub(crate) fn of(input: R) -> Self {
        Self::new(input, None)
    }

    /// A tape gets all that is read here other than by [`Self::content`].
    pub(super) fn new(input: R, tape: Option<Recorder>) -> Self {
        Self { input, tape, entries: 0, left: 0, padding: 0 }
    }

    /// The tape, if there is one.
    pub(super) fn tape(&mut self) -> Option<&mut Recorder> {
        self.tape.as_mut()
    }

    /// Does something to the tape, if there is one.
    pub(super) fn record(&mut self, write: impl FnOnce(&mut Recorder) -> io::Result<()>) -> Outcome<()> {
        let Some(tape) = &mut self.tape else { return Ok(()) };
        write(tape).map_err(|source| Fault::System { what: "write", path: tape.path().to_owned(), source })
    }

    /// The next entry; its content is had with [`Self::content`], or passed over by the next call.
    pub(crate) fn next(&mut self) -> Outcome<Option<Entry>> {
        let mut extensions = Extensions::default();
        let mut pending = false;
        loop {
            self.skip()?;
            let Some(header) = self.header()? else {
                if pending {
                    return Err(bad("it ends after a header that describes another entry"));
                }
                return Ok(None);
            };
            self.entries += 1;
            if self.entries > MAX_ENTRIES {
                return Err(bad(format!("it has more than {MAX_ENTRIES} entries")));
            }
            match header.entry_type() {
                EntryType::XHeader => {
                    if std::mem::replace(&mut extensions.pax, true) {
                        return Err(bad("an entry has two extended headers"));
                    }
                    let text = self.extension(&header)?;
                    extensions.parse(&text)?;
                }
                EntryType::GNULongName => once(&mut extensions.long_path, self.name(&header)?)?,
                EntryType::GNULongLink => once(&mut extensions.long_link, self.name(&header)?)?,
                // `git archive` writes one with a comment; no engine applies them.
                EntryType::XGlobalHeader => {
                    self.extension(&header)?;
                    continue;
                }
                _ => return self.entry(&header, extensions).map(Some),
            }
            pending = true;
        }
    }

    /// The next bytes of the entry's content, to be [consumed](Self::consume); none at its end. They do not go to the
    /// tape.
    pub(crate) fn content(&mut self) -> Outcome<&[u8]> {
        if self.left == 0 {
            return Ok(&[]);
        }
        let left = usize::try_from(self.left).unwrap_or(usize::MAX);
        let chunk = some(&mut self.input)?;
        Ok(&chunk[..chunk.len().min(left)])
    }

    /// So many bytes of [`Self::content`] are done with.
    pub(crate) fn consume(&mut self, n: usize) {
        self.input.consume(n);
        self.left = self.left.saturating_sub(n as u64);
    }

    /// Reads what follows the end of the archive: it counts for the DiffID as well.
    pub(super) fn rest(mut self) -> Outcome<(R, Option<Recorder>)> {
        loop {
            let n = self.pass(u64::MAX)?;
            if n == 0 {
                return Ok((self.input, self.tape));
            }
        }
    }

    /// Passes over some of the next bytes, at most so many; 0 at the end of the input.
    fn pass(&mut self, max: u64) -> Outcome<u64> {
        let chunk = self.input.fill_buf().map_err(|e| read_fault(&e))?;
        let n = usize::try_from(max).unwrap_or(usize::MAX).min(chunk.len());
        if let Some(tape) = &mut self.tape {
            let written = tape.literal(&chunk[..n]);
            written.map_err(|source| Fault::System {
                what: "write",
                path: tape.path().to_owned(),
                source,
            })?;
        }
        self.input.consume(n);
        Ok(n as u64)
    }

    fn skip(&mut self) -> Outcome<()> {
        let mut rest = self.left + self.padding;
        (self.left, self.padding) = (0, 0);
        while rest > 0 {
            match self.pass(rest)? {
                0 => return Err(bad("it ends within an entry")),
                n => rest -= n,
            }
        }
        Ok(())
    }

    /// The next header, whose content then comes; none at the end of the archive.
    fn header(&mut self) -> Outcome<Option<Header>> {
        let mut header = Header::new_old();
        if !self.block(header.as_mut_bytes())? {
            return Ok(None);
        }
        if header.as_bytes().iter().all(|b| *b == 0) {
            // The end is two blocks of zeros. Some writers leave one or both out, none writes on after one.
            let mut second = [0; BLOCK];
            if self.block(&mut second)? && second.iter().any(|b| *b != 0) {
                return Err(bad("something follows its end"));
            }
            return Ok(None);
        }
        let bytes = header.as_bytes();
        let sum: u64 = bytes[..148].iter().chain(&bytes[156..]).map(|b| u64::from(*b)).sum::<u64>() + 8 * 32;
        if number(&header.as_old().cksum) != Some(sum) {
            return Err(bad("a header has a wrong checksum"));
        }
        self.begin(number(&header.as_old().size).ok_or_else(|| bad("a header has a bad size"))?)?;
        Ok(Some(header))
    }

    fn begin(&mut self, size: u64) -> Outcome<()> {
        if size > MAX_UNPACKED {
            return Err(bad("it has an entry that is larger than a layer may be"));
        }
        self.left = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
        Ok(())
    }

    /// Fills a block; false where the archive ends before it.
    fn block(&mut self, block: &mut [u8; BLOCK]) -> Outcome<bool> {
        let mut filled = 0;
        while filled < BLOCK {
            let chunk = self.input.fill_buf().map_err(|e| read_fault(&e))?;
            let n = chunk.len().min(BLOCK - filled);
            if n == 0 {
                return if filled == 0 { Ok(false) } else { Err(bad("it ends within a header")) };
            }
            block[filled..filled + n].copy_from_slice(&chunk[..n]);
            self.input.consume(n);
            filled += n;
        }
        self.record(|tape| tape.literal(block))?;
        Ok(true)
    }

    fn extension(&mut self, header: &Header) -> Outcome<Vec<u8>> {
        if self.left > MAX_EXTENSION {
            let name = shown(&header.path_bytes());
            return Err(bad(format!("the extended header {name} has more than {MAX_EXTENSION} bytes")));
        }
        let mut bytes = Vec::with_capacity(usize::try_from(self.left).unwrap_or(0));
        loop {
            let chunk = self.content()?;
            let n = chunk.len();
            if n == 0 {
                break;
            }
            bytes.extend_from_slice(chunk);
            self.consume(n);
        }
        self.record(|tape| tape.literal(&bytes))?;
        Ok(bytes)
    }

    fn name(&mut self, header: &Header) -> Outcome<Vec<u8>> {
        let mut name = self.extension(header)?;
        if name.last() == Some(&0) {
            name.pop();
        }
        Ok(name)
    }

    fn entry(&mut self, header: &Header, mut extensions: Extensions) -> Outcome<Entry> {
        let name = extensions.sparse.name.take().or(extensions.long_path.take()).or(extensions.path.take());
        let path = name.unwrap_or_else(|| header.path_bytes().into_owned());
        let link = extensions
            .long_link
            .or(extensions.link)
            .unwrap_or_else(|| header.link_name_bytes().map_or_else(Vec::new, Cow::into_owned));
        let fault = |what: &str| bad(format!("the entry {} has {what}", shown(&path)));
        let kind = kind(header.entry_type(), &path).map_err(|what| fault(&what))?;
        if let Some(size) = extensions.size {
            self.begin(size)?;
        }
        let sparse = match (kind, header.entry_type(), extensions.sparse.map()?) {
            (Kind::File, EntryType::GNUSparse, Map::None) => Some(self.old_sparse(header)?),
            (Kind::File, EntryType::Regular, Map::Here(sparse)) => Some(sparse),
            (Kind::File, EntryType::Regular, Map::InContent(size)) => Some(self.map_in_content(size)?),
            (_, EntryType::GNUSparse, _) => return Err(fault("two maps of its data")),
            (_, _, Map::None) => None,
            _ => return Err(fault("a map of its data, which its type cannot have")),
        };
        let sparse = sparse.map(|s| s.checked(self.left, &path)).transpose()?;
        match kind {
            Kind::File => {}
            // Some writers note the size of the file that it is a link to; no content follows.
            Kind::HardLink => self.begin(0)?,
            _ if self.left > 0 => return Err(fault("content, which its type cannot have")),
            _ => {}
        }
        let old = header.as_old();
        let id = |pax: Option<u64>, field: &[u8]| {
            // The last id means "leave it" to chown(2).
            let id = pax.or_else(|| number(field)).and_then(|id| u32::try_from(id).ok());
            id.filter(|id| *id != u32::MAX).ok_or_else(|| fault("an owner beyond all user ids"))
        };
        let device = |field: Option<&[u8; 8]>| {
            let field = field.map_or(&[][..], |f| &f[..]);
            number(field).and_then(|n| u32::try_from(n).ok()).ok_or_else(|| fault("a bad device number"))
        };
        let (ustar, gnu) = (header.as_ustar(), header.as_gnu());
        Ok(Entry {
            kind,
            mode: number(&old.mode).map_or(0, |m| (m & 0o7777) as u32),
            uid: id(extensions.uid, &old.uid)?,
            gid: id(extensions.gid, &old.gid)?,
            mtime: extensions.mtime.unwrap_or_else(|| seconds(&old.mtime)),
            major: device(ustar.map(|h| &h.dev_major).or(gnu.map(|h| &h.dev_major)))?,
            minor: device(ustar.map(|h| &h.dev_minor).or(gnu.map(|h| &h.dev_minor)))?,
            xattrs: extensions.xattrs,
            sparse,
            stored: self.left,
            path,
            link,
        })
    }

    /// The map of GNU's old format: in the header, and in as many blocks after it as it takes.
    fn old_sparse(&mut self, header: &Header) -> Outcome<Sparse> {
        let Some(gnu) = header.as_gnu() else { return Err(bad("a sparse file has no header of GNU")) };
        let size = number(&gnu.realsize).ok_or_else(|| bad("a sparse file has a bad size"))?;
        let mut extents = Vec::new();
        // Four pairs, then whether more follow.
        sparse::old_extents(&header.as_bytes()[386..482], &mut extents)?;
        let mut more = gnu.isextended[0] != 0;
        while more {
            let mut block = [0; BLOCK];
            if !self.block(&mut block)? {
                return Err(bad("it ends within the map of a sparse file"));
            }
            sparse::old_extents(&block[..504], &mut extents)?;
            more = block[504] != 0;
        }
        Ok(Sparse { size, extents })
    }

    /// The map that precedes the content and fills whole blocks.
    fn map_in_content(&mut self, size: u64) -> Outcome<Sparse> {
        let (mut block, mut at) = ([0; BLOCK], BLOCK);
        let line = || {
            let mut line = Vec::new();
            loop {
                if at == BLOCK {
                    let left = self.left.checked_sub(BLOCK as u64);
                    let left = left.ok_or_else(|| bad("it ends within the map of a sparse file"))?;
                    if !self.block(&mut block)? {
                        return Err(bad("it ends within the map of a sparse file"));
                    }
                    (self.left, at) = (left, 0);
                }
                let byte = block[at];
                at += 1;
                match byte {
                    b'\n' => return Ok(line),
                    _ if line.len() > 20 => return Err(bad("the map of a sparse file has a bad number")),
                    _ => line.push(byte),
                }
            }
        };
        sparse::map_in_content(size, line)
    }
}

/// At least one byte.
fn some(input: &mut impl BufRead) -> Outcome<&[u8]> {
    let chunk = input.fill_buf().map_err(|e| read_fault(&e))?;
    if chunk.is_empty() { Err(bad("it ends within an entry")) } else { Ok(chunk) }
}

fn once(slot: &mut Option<Vec<u8>>, name: Vec<u8>) -> Outcome<()> {
    match slot.replace(name) {
        None => Ok(()),
        Some(_) => Err(bad("an entry has two long names")),
    }
}

pub(super) fn bad(reason: impl Into<String>) -> Fault {
    Fault::Bad(reason.into())
}

/// What an entry of a type becomes.
fn kind(entry: EntryType, path: &[u8]) -> Result<Kind, String> {
    Ok(match entry {
        // Before POSIX a directory was a file whose name ends in a slash.
        EntryType::Regular | EntryType::Continuous if path.ends_with(b"/") => Kind::Directory,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
        EntryType::Directory => Kind::Directory,
        EntryType::Symlink => Kind::Symlink,
        EntryType::Link => Kind::HardLink,
        EntryType::Char => Kind::CharDevice,
        EntryType::Block => Kind::BlockDevice,
        EntryType::Fifo => Kind::Fifo,
        other => {
            let kind = char::from(other.as_byte()).escape_default();
            return Err(format!("the type '{kind}', which is not supported"));
        }
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use proptest::prelude::*;

    use super::*;
    use crate::layer::pax::timestamp;

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let mut archive = Archive::new(&bytes[..], None);
            while let Ok(Some(_)) = archive.next() {}
            let _ = Extensions::default().parse(&bytes);
            let _ = (number(&bytes), timestamp(&bytes));
        }
    }
}
