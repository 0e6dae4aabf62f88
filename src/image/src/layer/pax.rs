//! What a header of a tar says in numbers, and what the extended headers before it say (pax(1), "pax Header Block").

use rustix::fs::Timespec;

use super::{
    Outcome,
    archive::bad,
    shown,
    sparse::{SparseKeys, decimal},
};

/// `XATTR_SIZE_MAX` and `XATTR_NAME_MAX` (xattr(7)).
const MAX_XATTR: usize = 64 << 10;
const MAX_XATTR_NAME: usize = 255;
/// More than any file system holds for one file.
const MAX_XATTRS: usize = 1000;
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// What extended headers say of the entry that follows them.
#[derive(Default)]
pub(super) struct Extensions {
    pub(super) pax: bool,
    pub(super) long_path: Option<Vec<u8>>,
    pub(super) long_link: Option<Vec<u8>>,
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<Timespec>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: SparseKeys,
}

impl Extensions {
    /// Reads the records `<length> <key>=<value>\n` of a PAX header (pax(1), "pax Header Block").
    pub(super) fn parse(&mut self, mut text: &[u8]) -> Outcome<()> {
        while !text.is_empty() {
            let (record, rest) = record(text).ok_or_else(|| bad("an extended header is malformed"))?;
            self.take(record.0, record.1)?;
            text = rest;
        }
        Ok(())
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Outcome<()> {
        let malformed = || bad(format!("an extended header has a bad value for {}", shown(key)));
        let digits = |value: &[u8]| decimal(value).ok_or_else(malformed);
        match key {
            // An empty value stands for what the header says.
            b"path" => self.path = Some(value.to_vec()).filter(|v| !v.is_empty()),
            b"linkpath" => self.link = Some(value.to_vec()).filter(|v| !v.is_empty()),
            b"size" => self.size = Some(digits(value)?),
            b"uid" => self.uid = Some(digits(value)?),
            b"gid" => self.gid = Some(digits(value)?),
            b"mtime" => self.mtime = Some(timestamp(value).ok_or_else(malformed)?),
            _ => {
                if let Some(name) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.take(name, value)?;
                } else if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
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
        if self.xattrs.len() == MAX_XATTRS {
            return Err(bad(format!("an entry has more than {MAX_XATTRS} attributes")));
        }
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

/// A number of a header: octal digits among blanks and zeros, nothing for 0, or binary (GNU's base 256).
pub(super) fn number(field: &[u8]) -> Option<u64> {
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
pub(super) fn seconds(field: &[u8]) -> Timespec {
    let tv_sec = number(field).and_then(|s| i64::try_from(s).ok()).unwrap_or(0);
    Timespec { tv_sec, tv_nsec: 0 }
}

/// A time of a PAX header: `[-]seconds[.fraction]`.
pub(super) fn timestamp(value: &[u8]) -> Option<Timespec> {
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

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
}
