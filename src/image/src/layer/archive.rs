//! Reading the tar of a layer, entry by entry.
//!
//! The tar crate knows the layout of a header; what is around it is read here, since that crate keeps extended headers
//! of any size in memory, cuts their values at newlines (a capability may hold one) and passes over the size of a file
//! that follows such a value. Whatever two readers could see differently is refused.

use std::{borrow::Cow, io::Read};

use rustix::fs::Timespec;
use tar::{EntryType, Header};

use super::{Fault, MAX_UNPACKED, Outcome, read_fault, shown};

const BLOCK: usize = 512;
/// Bytes of one extended header or long name.
const MAX_EXTENSION: u64 = 1 << 20;
/// Entries of one layer, headers that only describe another entry included.
pub(super) const MAX_ENTRIES: u64 = 4 << 20;
/// `XATTR_SIZE_MAX` and `XATTR_NAME_MAX` (xattr(7)).
const MAX_XATTR: usize = 64 << 10;
const MAX_XATTR_NAME: usize = 255;
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
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
pub(super) struct Entry {
    pub(super) kind: Kind,
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Timespec,
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A tar that is being read.
pub(super) struct Archive<R> {
    input: R,
    entries: u64,
    /// What is left of the entry at hand, and what fills up its last block.
    left: u64,
    padding: u64,
}

/// What extended headers say of the entry that follows them.
#[derive(Default)]
struct Extensions {
    pax: bool,
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<Timespec>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl<R: Read> Archive<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, entries: 0, left: 0, padding: 0 }
    }

    /// The next entry; its content is had with [`Self::read`], or passed over by the next call.
    pub(super) fn next(&mut self) -> Outcome<Option<Entry>> {
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

    /// The next bytes of the entry's content; 0 at its end.
    pub(super) fn read(&mut self, into: &mut [u8]) -> Outcome<usize> {
        let want = usize::try_from(self.left).unwrap_or(usize::MAX).min(into.len());
        if want == 0 {
            return Ok(0);
        }
        let n = self.some(&mut into[..want])?;
        self.left -= n as u64;
        Ok(n)
    }

    /// At least one byte.
    fn some(&mut self, into: &mut [u8]) -> Outcome<usize> {
        match self.input.read(into).map_err(|e| read_fault(&e))? {
            0 => Err(bad("it ends within an entry")),
            n => Ok(n),
        }
    }

    fn skip(&mut self) -> Outcome<()> {
        let mut rest = self.left + self.padding;
        (self.left, self.padding) = (0, 0);
        let mut buffer = [0; 16 << 10];
        while rest > 0 {
            let want = usize::try_from(rest).unwrap_or(usize::MAX).min(buffer.len());
            rest -= self.some(&mut buffer[..want])? as u64;
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
            match self.input.read(&mut block[filled..]).map_err(|e| read_fault(&e))? {
                0 if filled == 0 => return Ok(false),
                0 => return Err(bad("it ends within a header")),
                n => filled += n,
            }
        }
        Ok(true)
    }

    fn extension(&mut self, header: &Header) -> Outcome<Vec<u8>> {
        if self.left > MAX_EXTENSION {
            let name = shown(&header.path_bytes());
            return Err(bad(format!("the extended header {name} has more than {MAX_EXTENSION} bytes")));
        }
        let mut bytes = vec![0; usize::try_from(self.left).unwrap_or(0)];
        let mut filled = 0;
        while filled < bytes.len() {
            filled += self.read(&mut bytes[filled..])?;
        }
        Ok(bytes)
    }

    fn name(&mut self, header: &Header) -> Outcome<Vec<u8>> {
        let mut name = self.extension(header)?;
        if name.last() == Some(&0) {
            name.pop();
        }
        Ok(name)
    }

    fn entry(&mut self, header: &Header, extensions: Extensions) -> Outcome<Entry> {
        let path =
            extensions.long_path.or(extensions.path).unwrap_or_else(|| header.path_bytes().into_owned());
        let link = extensions
            .long_link
            .or(extensions.link)
            .unwrap_or_else(|| header.link_name_bytes().map_or_else(Vec::new, Cow::into_owned));
        let fault = |what: &str| bad(format!("the entry {} has {what}", shown(&path)));
        let kind = match header.entry_type() {
            // Before POSIX a directory was a file whose name ends in a slash.
            EntryType::Regular | EntryType::Continuous if path.ends_with(b"/") => Kind::Directory,
            EntryType::Regular | EntryType::Continuous => Kind::File,
            EntryType::Directory => Kind::Directory,
            EntryType::Symlink => Kind::Symlink,
            EntryType::Link => Kind::HardLink,
            EntryType::Char => Kind::CharDevice,
            EntryType::Block => Kind::BlockDevice,
            EntryType::Fifo => Kind::Fifo,
            other => {
                let kind = char::from(other.as_byte()).escape_default().to_string();
                return Err(fault(&format!("the type '{kind}', which is not supported")));
            }
        };
        if let Some(size) = extensions.size {
            self.begin(size)?;
        }
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
            path,
            link,
        })
    }
}

impl Extensions {
    /// Reads the records `<length> <key>=<value>\n` of a PAX header (pax(1), "pax Header Block").
    fn parse(&mut self, mut text: &[u8]) -> Outcome<()> {
        while !text.is_empty() {
            let (record, rest) = record(text).ok_or_else(|| bad("an extended header is malformed"))?;
            self.take(record.0, record.1)?;
            text = rest;
        }
        Ok(())
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Outcome<()> {
        let malformed = || bad(format!("an extended header has a bad value for {}", shown(key)));
        let digits = |value: &[u8]| -> Outcome<u64> {
            let text = std::str::from_utf8(value).ok().filter(|t| t.bytes().all(|b| b.is_ascii_digit()));
            text.and_then(|t| t.parse().ok()).ok_or_else(malformed)
        };
        match key {
            // An empty value stands for what the header says.
            b"path" => self.path = Some(value.to_vec()).filter(|v| !v.is_empty()),
            b"linkpath" => self.link = Some(value.to_vec()).filter(|v| !v.is_empty()),
            b"size" => self.size = Some(digits(value)?),
            b"uid" => self.uid = Some(digits(value)?),
            b"gid" => self.gid = Some(digits(value)?),
            b"mtime" => self.mtime = Some(timestamp(value).ok_or_else(malformed)?),
            _ if key.starts_with(b"GNU.sparse.") => {
                return Err(bad("it has a sparse file, which is not supported"));
            }
            _ => {
                if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
                    self.xattr(name, value)?;
                }
            }
        }
        Ok(())
    }

    fn xattr(&mut self, name: &[u8], value: &[u8]) -> Outcome<()> {
        if name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.") {
            return Err(bad(format!("an entry has the attribute {}, a marker of OverlayFS", shown(name))));
        }
        // Labels, ACLs and hashes of the machine where the image was built mean nothing here.
        if name != b"security.capability" && !name.starts_with(b"user.") {
            return Ok(());
        }
        if name.len() > MAX_XATTR_NAME || name.contains(&0) || value.len() > MAX_XATTR {
            return Err(bad(format!("the attribute {} is malformed or too long", shown(name))));
        }
        self.xattrs.retain(|(n, _)| n != name);
        self.xattrs.push((name.to_vec(), value.to_vec()));
        Ok(())
    }
}

type Record<'a> = (&'a [u8], &'a [u8]);

fn record(text: &[u8]) -> Option<(Record<'_>, &[u8])> {
    let blank = text.iter().take(20).position(|b| *b == b' ')?;
    let length =
        std::str::from_utf8(&text[..blank]).ok().filter(|t| t.bytes().all(|b| b.is_ascii_digit()))?;
    let length: usize = length.parse().ok()?;
    let (record, rest) = text.split_at_checked(length)?;
    let body = record.get(blank + 1..)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|b| *b == b'=')?;
    let (key, value) = (&body[..equals], &body[equals + 1..]);
    (!key.is_empty()).then_some(((key, value), rest))
}

fn once(slot: &mut Option<Vec<u8>>, name: Vec<u8>) -> Outcome<()> {
    match slot.replace(name) {
        None => Ok(()),
        Some(_) => Err(bad("an entry has two long names")),
    }
}

/// A number of a header: octal digits among blanks and zeros, nothing for 0, or binary (GNU's base 256).
fn number(field: &[u8]) -> Option<u64> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => {
            let (high, low) = field.split_at(field.len().saturating_sub(8));
            if high.iter().enumerate().any(|(i, b)| if i == 0 { *b != 0x80 } else { *b != 0 }) {
                return None;
            }
            let mut bytes = [0; 8];
            bytes[8 - low.len()..].copy_from_slice(low);
            // In a field of eight bytes the mark is part of the number.
            bytes[8 - low.len()] &= if high.is_empty() { 0x7f } else { 0xff };
            Some(u64::from_be_bytes(bytes))
        }
        _ => {
            let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
            let text = std::str::from_utf8(&field[..end]).ok()?.trim_matches(' ');
            if text.is_empty() {
                return Some(0);
            }
            text.bytes().all(|b| b.is_ascii_digit()).then(|| u64::from_str_radix(text, 8).ok())?
        }
    }
}

/// A header's time; one that is before 1970 or damaged is 1970, which harms nobody.
fn seconds(field: &[u8]) -> Timespec {
    let tv_sec = number(field).and_then(|s| i64::try_from(s).ok()).unwrap_or(0);
    Timespec { tv_sec, tv_nsec: 0 }
}

/// A time of a PAX header: `[-]seconds[.fraction]`.
fn timestamp(value: &[u8]) -> Option<Timespec> {
    let text = std::str::from_utf8(value).ok()?;
    let (negative, text) = text.strip_prefix('-').map_or((false, text), |t| (true, t));
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if whole.is_empty() || !whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit()) {
        return None;
    }
    let mut tv_sec: i64 = whole.parse().ok()?;
    let nanos: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let mut tv_nsec: i64 = nanos.parse().ok()?;
    if negative {
        tv_sec = -tv_sec;
        if tv_nsec > 0 {
            (tv_sec, tv_nsec) = (tv_sec - 1, 1_000_000_000 - tv_nsec);
        }
    }
    Some(Timespec { tv_sec, tv_nsec })
}

fn bad(reason: impl Into<String>) -> Fault {
    Fault::Bad(reason.into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_are_octal_or_binary() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"  644 \0x"), Some(0o644));
        assert_eq!(number(b"\0\0\0"), Some(0));
        assert_eq!(number(b""), Some(0));
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 1, 2]), Some(258));
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]), Some(2 << 32));
        assert_eq!(number(&[0xff; 12]), None);
        for bad in [&b"8"[..], b"-1", b"+1", b"1 2", b"0x1", b"777777777777777777777777"] {
            assert_eq!(number(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn times_have_nanoseconds_and_may_be_before_1970() {
        let at = |text: &str| timestamp(text.as_bytes()).map(|t| (t.tv_sec, t.tv_nsec));
        assert_eq!(at("12.5"), Some((12, 500_000_000)));
        assert_eq!(at("12.1234567899"), Some((12, 123_456_789)));
        assert_eq!(at("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(at("-3"), Some((-3, 0)));
        for bad in ["", "-", ".5", "1e3", "1.x", "99999999999999999999"] {
            assert_eq!(at(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_value_with_newlines_hides_nothing_that_follows_it() {
        let mut extensions = Extensions::default();
        extensions.parse(b"34 SCHILY.xattr.user.a=\n9 path=b\n\n13 size=1234\n").unwrap();
        assert_eq!(extensions.xattrs, [(b"user.a".to_vec(), b"\n9 path=b\n".to_vec())]);
        assert_eq!((extensions.path, extensions.size), (None, Some(1234)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let mut archive = Archive::new(&bytes[..]);
            while let Ok(Some(_)) = archive.next() {}
            let _ = Extensions::default().parse(&bytes);
            let _ = (number(&bytes), timestamp(&bytes));
        }
    }
}
