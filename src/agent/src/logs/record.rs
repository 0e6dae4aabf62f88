//! Lines of a CRI log (`<time> <stream> P|F <text>`) and what `kubectl logs` shows of them.
//!
//! The file is written in the container's directory, whose root may write anything into it: a line that is none, or is longer
//! than any that moxlet-init writes, is passed over.

use std::io::BufRead;

use jiff::Timestamp;

/// The longest line that is kept, in bytes: moxlet-init's are at most 16 KiB and a head.
pub(super) const MAX_LINE: usize = 256 << 10;
/// `2006-01-02T15:04:05.000000000Z`: the form in which moxlet-init writes, and in which times compare as texts.
const FIXED: usize = 30;

/// One of a container's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    pub(super) fn parse(name: &[u8]) -> Option<Self> {
        match name {
            b"stdout" => Some(Self::Stdout),
            b"stderr" => Some(Self::Stderr),
            _ => None,
        }
    }
}

/// What is shown.
#[derive(Debug, Default)]
pub(super) struct Filter {
    /// Not before this time: as text of the fixed form, and as it is.
    pub(super) since: Option<(String, Timestamp)>,
    /// Each line begins with its time.
    pub(super) timestamps: bool,
    /// Only this stream.
    pub(super) stream: Option<Stream>,
    /// At most so many bytes.
    pub(super) limit: Option<u64>,
}

impl Filter {
    /// Shows nothing that was written before this many nanoseconds since 1970.
    pub(super) fn set_since(&mut self, nanos: i64) {
        // 64 bits of nanoseconds are years with four digits, all of which a timestamp knows.
        self.since = Timestamp::from_nanosecond(i128::from(nanos)).ok().map(|t| (format!("{t:.9}"), t));
    }

    fn is_old(&self, time: &[u8]) -> bool {
        let Some((text, since)) = &self.since else { return false };
        if is_fixed(time) {
            return time < text.as_bytes();
        }
        std::str::from_utf8(time).ok().and_then(|t| t.parse::<Timestamp>().ok()).is_none_or(|t| t < *since)
    }
}

/// Whether this looks like a time of the fixed form.
fn is_fixed(time: &[u8]) -> bool {
    let digits = [0, 1, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 28];
    time.len() == FIXED
        && digits.iter().all(|i| time[*i].is_ascii_digit())
        && [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':'), (19, b'.'), (29, b'Z')]
            .iter()
            .all(|(i, b)| time[*i] == *b)
}

fn is_time(time: &[u8]) -> bool {
    is_fixed(time) || std::str::from_utf8(time).is_ok_and(|t| t.parse::<Timestamp>().is_ok())
}

/// One line, taken apart.
#[derive(Debug, PartialEq, Eq)]
struct Record<'a> {
    time: &'a [u8],
    stream: Stream,
    /// More of the same line follows.
    partial: bool,
    text: &'a [u8],
}

fn split(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = bytes.iter().position(|b| *b == b' ')?;
    Some((&bytes[..at], &bytes[at + 1..]))
}

fn parse(line: &[u8]) -> Option<Record<'_>> {
    let (time, rest) = split(line)?;
    let (stream, rest) = split(rest)?;
    let (tags, text) = split(rest)?;
    let stream = Stream::parse(stream)?;
    if !is_time(time) {
        return None;
    }
    let partial = tags.split(|b| *b == b':').next() == Some(b"P");
    Some(Record { time, stream, partial, text })
}

/// Turns a log's bytes into what is shown.
#[derive(Debug)]
pub(super) struct Lines {
    filter: Filter,
    /// The beginning of a line whose end has not been read yet.
    rest: Vec<u8>,
    /// Within a line that is too long.
    skipping: bool,
    /// What was shown last ended a line, so that the next begins with its time.
    fresh: bool,
}

impl Lines {
    pub(super) fn new(filter: Filter) -> Self {
        Self { filter, rest: Vec::new(), skipping: false, fresh: true }
    }

    /// Whether nothing more may be shown.
    pub(super) fn is_full(&self) -> bool {
        self.filter.limit == Some(0)
    }

    /// Takes a log's next bytes and appends to `out` what they show.
    pub(super) fn push(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) {
        while !bytes.is_empty() && !self.is_full() {
            let mut behind = bytes;
            // The C library's search, by way of the one trait that reaches it; a slice cannot fail.
            let length = behind.skip_until(b'\n').unwrap_or(bytes.len());
            let Some(line) = bytes[..length].strip_suffix(b"\n") else {
                self.keep(bytes);
                return;
            };
            bytes = behind;
            if self.skipping {
                self.skipping = false;
            } else if self.rest.is_empty() {
                self.show(line, true, out);
            } else {
                self.keep(line);
                let whole = std::mem::take(&mut self.rest);
                if !self.skipping {
                    self.show(&whole, true, out);
                }
                self.skipping = false;
                self.rest = whole;
                self.rest.clear();
            }
        }
    }

    /// The file has ended: so has a line without an end.
    pub(super) fn finish(&mut self, out: &mut Vec<u8>) {
        let rest = std::mem::take(&mut self.rest);
        if !rest.is_empty() && !self.is_full() {
            self.show(&rest, false, out);
        }
        self.skipping = false;
    }

    /// What was read of the file does not count any more.
    pub(super) fn reset(&mut self) {
        self.rest.clear();
        self.skipping = false;
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.skipping || self.rest.len() + bytes.len() > MAX_LINE {
            self.skipping = true;
            self.rest.clear();
        } else {
            self.rest.extend_from_slice(bytes);
        }
    }

    fn show(&mut self, line: &[u8], ended: bool, out: &mut Vec<u8>) {
        let Some(record) = parse(line) else { return };
        if self.filter.stream.is_some_and(|s| s != record.stream) || self.filter.is_old(record.time) {
            return;
        }
        let begin = out.len();
        // As the kubelet: the rest of a line that came in parts does not begin with a time.
        if self.filter.timestamps && self.fresh {
            out.extend_from_slice(record.time);
            out.push(b' ');
        }
        out.extend_from_slice(record.text);
        let whole = ended && !record.partial;
        if whole {
            out.push(b'\n');
        }
        self.fresh = whole || record.text.is_empty();
        if let Some(limit) = &mut self.filter.limit {
            let room = usize::try_from(*limit).unwrap_or(usize::MAX);
            out.truncate(begin.saturating_add(room));
            *limit -= (out.len() - begin) as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const A: &str = "2024-05-01T10:00:00.000000001Z stdout F a\n";
    const B: &str = "2024-05-01T10:00:01.000000000Z stderr F b\n";

    fn shown(filter: Filter, text: &str) -> String {
        let mut whole = Vec::new();
        let mut lines = Lines::new(filter);
        lines.push(text.as_bytes(), &mut whole);
        lines.finish(&mut whole);
        String::from_utf8(whole).unwrap()
    }

    #[test]
    fn bytes_show_the_same_however_they_are_chopped() {
        let text = [A, B, "2024-05-01T10:00:02.000000000Z stdout P c", "c\n", A].concat();
        for step in 1..text.len() {
            let (mut lines, mut out) = (Lines::new(Filter::default()), Vec::new());
            for chunk in text.as_bytes().chunks(step) {
                lines.push(chunk, &mut out);
            }
            assert_eq!(String::from_utf8(out).unwrap(), "a\nb\ncca\n", "{step}");
        }
    }

    #[test]
    fn parts_are_joined_and_only_the_first_has_a_time() {
        let text = "2024-05-01T10:00:00.000000001Z stdout P one \n2024-05-01T10:00:00.000000002Z stdout F two\n\
                    2024-05-01T10:00:00.000000003Z stdout F \n2024-05-01T10:00:00.000000004Z stdout P end\n";
        assert_eq!(shown(Filter::default(), text), "one two\n\nend");
        let timed = shown(Filter { timestamps: true, ..Filter::default() }, text);
        assert_eq!(
            timed,
            "2024-05-01T10:00:00.000000001Z one two\n2024-05-01T10:00:00.000000003Z \n2024-05-01T10:00:00.000000004Z end"
        );
    }

    #[test]
    fn a_stream_or_a_time_may_be_asked_for() {
        let text = [A, B, "2024-05-01T12:00:01+02:00 stdout F c\n", "2024-05-01T10:00:00+02:00 stdout F d\n"]
            .concat();
        assert_eq!(shown(Filter { stream: Some(Stream::Stderr), ..Filter::default() }, &text), "b\n");
        let mut since = Filter::default();
        since.set_since(
            "2024-05-01T10:00:01Z".parse::<Timestamp>().unwrap().as_nanosecond().try_into().unwrap(),
        );
        assert_eq!(shown(since, &text), "b\nc\n");
    }

    #[test]
    fn the_limit_is_exact_and_counts_times() {
        let full = |limit| Filter { limit: Some(limit), ..Filter::default() };
        assert_eq!(shown(full(3), &[A, B].concat()), "a\nb");
        assert_eq!(shown(full(0), A), "");
        assert_eq!(shown(full(99), &[A, B].concat()), "a\nb\n");
        assert_eq!(shown(Filter { timestamps: true, ..full(10) }, A), "2024-05-01");
    }

    #[test]
    fn what_is_no_line_of_a_log_is_passed_over() {
        let long = "x".repeat(MAX_LINE + 10);
        let odd = "garbage\n\n2024-05-01 stdout F x\n2024-05-01T10:00:00Z stdxxx F x\n2024-05-01T10:00:00Z stdout\n";
        let text = [odd, A, "2024-05-01T10:00:00Z stdout F ", &long, "\n", B].concat();
        for step in [1 << 20, 4096, 77] {
            let (mut lines, mut out) = (Lines::new(Filter::default()), Vec::new());
            for chunk in text.as_bytes().chunks(step) {
                lines.push(chunk, &mut out);
                assert!(lines.rest.len() <= MAX_LINE);
            }
            let out = String::from_utf8(out).unwrap();
            assert!(out.starts_with("a\n") && out.ends_with("b\n"), "{step}");
            assert!(step > MAX_LINE || out == "a\nb\n", "{step}");
        }
    }

    #[test]
    fn an_unfinished_line_at_the_end_is_shown_as_it_is() {
        assert_eq!(shown(Filter::default(), &[A, "2024-05-01T10:00:00Z stdout F hal"].concat()), "a\nhal");
    }
}
