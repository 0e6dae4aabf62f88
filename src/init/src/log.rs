//! The CRI log of a container: `<RFC3339Nano> stdout|stderr P|F <line>`, rotated by size. Naming: see `moxlet_init_proto`.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use jiff::{Timestamp, civil::DateTime, tz::Offset};

use crate::{console::Console, sys::now_ns};

/// A longer line is written in parts (`P`) of this size, as containerd does.
pub(crate) const MAX_LINE: usize = 16 << 10;

/// Which stream a line is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// A log file with its rotated predecessors.
#[derive(Debug, Default)]
pub(crate) struct LogFile {
    path: Option<PathBuf>,
    file: Option<File>,
    size: u64,
    max_bytes: u64,
    max_files: u32,
    pending: Vec<u8>,
    /// Where lines are shown as well, under which name.
    console: Option<(Arc<Console>, String)>,
}

impl LogFile {
    /// Opens (or makes) the log; without a path all is thrown away.
    pub(crate) fn open(path: Option<PathBuf>, max_bytes: u64, max_files: u32) -> io::Result<Self> {
        let mut log = Self { path, max_bytes, max_files: max_files.max(1), ..Self::default() };
        log.reopen()?;
        Ok(log)
    }

    /// Shows each line on the console, too.
    pub(crate) fn show_on(&mut self, console: &Arc<Console>, name: &str) {
        self.console = console.is_there().then(|| (Arc::clone(console), name.to_owned()));
    }

    /// Opens the file anew, after someone else renamed it.
    pub(crate) fn reopen(&mut self) -> io::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o640)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)?;
        self.size = file.metadata()?.len();
        self.file = Some(file);
        Ok(())
    }

    fn add(&mut self, head: &[u8], tag: &[u8], line: &[u8]) {
        if let Some((console, name)) = &self.console {
            console.show(name, line);
        }
        if self.path.is_none() {
            return;
        }
        let length = (head.len() + tag.len() + line.len() + 1) as u64;
        let waiting = self.pending.len() as u64;
        if self.max_bytes > 0 && self.size + waiting > 0 && self.size + waiting + length > self.max_bytes {
            self.flush();
            self.rotate();
        }
        self.pending.extend_from_slice(head);
        self.pending.extend_from_slice(tag);
        self.pending.extend_from_slice(line);
        self.pending.push(b'\n');
        if self.pending.len() >= 64 << 10 {
            self.flush();
        }
    }

    /// Writes what waits. A full disk loses lines; it must not stop the container.
    pub(crate) fn flush(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        if self.file.is_none() {
            let _ = self.reopen();
        }
        if let Some(file) = &mut self.file {
            match file.write_all(&self.pending) {
                Ok(()) => self.size += self.pending.len() as u64,
                Err(_) => self.size = file.metadata().map_or(self.size, |m| m.len()),
            }
        }
        self.pending.clear();
    }

    fn rotate(&mut self) {
        let Some(path) = self.path.clone() else { return };
        let _ = if self.max_files <= 1 {
            fs::remove_file(&path)
        } else {
            let mut name = path.clone().into_os_string();
            name.push(".");
            name.push(rotation_suffix(now_ns()));
            fs::rename(&path, name)
        };
        self.file = None;
        self.size = 0;
        let _ = self.reopen();
        for old in self.rotated(&path).into_iter().rev().skip(self.max_files as usize - 1) {
            let _ = fs::remove_file(old);
        }
    }

    /// The rotated files, oldest first.
    fn rotated(&self, path: &Path) -> Vec<PathBuf> {
        let (Some(dir), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str())) else {
            return Vec::new();
        };
        let prefix = format!("{name}.");
        let mut found: Vec<PathBuf> = fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|e| {
                e.file_name()
                    .to_str()
                    .is_some_and(|n| n.strip_prefix(&prefix).is_some_and(is_rotation_suffix))
            })
            .map(|e| e.path())
            .collect();
        found.sort();
        found
    }
}

/// Splits a stream's bytes into lines and parts of lines.
#[derive(Debug)]
pub(crate) struct Lines {
    stream: Stream,
    rest: Vec<u8>,
}

impl Lines {
    pub(crate) fn new(stream: Stream) -> Self {
        Self { stream, rest: Vec::new() }
    }

    /// Takes bytes as they were read.
    pub(crate) fn push(&mut self, mut bytes: &[u8], log: &mut LogFile) {
        let head = head(now_ns(), self.stream);
        while !bytes.is_empty() {
            let room = MAX_LINE - self.rest.len();
            let window = &bytes[..bytes.len().min(room)];
            if let Some(end) = line_end(window) {
                if self.rest.is_empty() {
                    log.add(&head, b"F ", &window[..end]);
                } else {
                    self.rest.extend_from_slice(&window[..end]);
                    log.add(&head, b"F ", &self.rest);
                    self.rest.clear();
                }
                bytes = &bytes[end + 1..];
            } else if window.len() < room {
                self.rest.extend_from_slice(window);
                bytes = &[];
            } else {
                // A full part, unless the line's end is just the next byte.
                self.rest.extend_from_slice(window);
                bytes = &bytes[window.len()..];
                if bytes.first() == Some(&b'\n') {
                    log.add(&head, b"F ", &self.rest);
                    bytes = &bytes[1..];
                } else {
                    log.add(&head, b"P ", &self.rest);
                }
                self.rest.clear();
            }
        }
    }

    /// The stream has ended: an unfinished line is a part, so that a reader adds no line break to it.
    pub(crate) fn finish(&mut self, log: &mut LogFile) {
        if !self.rest.is_empty() {
            log.add(&head(now_ns(), self.stream), b"P ", &self.rest);
        }
        self.rest = Vec::new();
    }
}

fn line_end(bytes: &[u8]) -> Option<usize> {
    // SAFETY: the pointer is valid for the length; the C library's search is the fast one.
    let found = unsafe { libc::memchr(bytes.as_ptr().cast(), i32::from(b'\n'), bytes.len()) };
    (!found.is_null()).then(|| found as usize - bytes.as_ptr() as usize)
}

fn head(ns: i64, stream: Stream) -> Vec<u8> {
    let t = utc(ns);
    let name = match stream {
        Stream::Stdout => "stdout",
        Stream::Stderr => "stderr",
    };
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:09}Z {name} ",
        t.year(),
        t.month(),
        t.day(),
        t.hour(),
        t.minute(),
        t.second(),
        t.subsec_nanosecond()
    )
    .into_bytes()
}

fn rotation_suffix(ns: i64) -> String {
    let t = utc(ns);
    format!(
        "{:04}{:02}{:02}-{:02}{:02}{:02}.{:09}",
        t.year(),
        t.month(),
        t.day(),
        t.hour(),
        t.minute(),
        t.second(),
        t.subsec_nanosecond()
    )
}

fn is_rotation_suffix(text: &str) -> bool {
    text.len() == 25
        && text.bytes().enumerate().all(|(i, b)| match i {
            8 => b == b'-',
            15 => b == b'.',
            _ => b.is_ascii_digit(),
        })
}

/// The calendar's date and time of a moment, in UTC.
fn utc(ns: i64) -> DateTime {
    // Every `i64` of nanoseconds is a moment that it knows.
    Offset::UTC.to_datetime(Timestamp::from_nanosecond(i128::from(ns)).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use proptest::prelude::*;

    use super::*;

    /// Puts a log together again as a reader does.
    fn content(text: &str) -> Vec<u8> {
        let mut out = Vec::new();
        for line in text.split_inclusive('\n') {
            let mut words = line.trim_end_matches('\n').splitn(4, ' ');
            let (_, _) = (words.next().unwrap(), words.next().unwrap());
            let tag = words.next().unwrap();
            out.extend(words.next().unwrap().bytes());
            if tag == "F" {
                out.push(b'\n');
            }
        }
        out
    }

    #[test]
    fn times_are_rfc3339() {
        assert_eq!(
            head(1_700_000_000_000_000_042, Stream::Stderr),
            b"2023-11-14T22:13:20.000000042Z stderr "
        );
        assert_eq!(head(951_782_400_000_000_000, Stream::Stdout), b"2000-02-29T00:00:00.000000000Z stdout ");
        assert_eq!(head(-1, Stream::Stdout), b"1969-12-31T23:59:59.999999999Z stdout ");
        assert!(is_rotation_suffix(&rotation_suffix(i64::MAX)) && is_rotation_suffix(&rotation_suffix(0)));
        assert!(is_rotation_suffix(&rotation_suffix(now_ns())));
        assert!(!is_rotation_suffix("gz"));
    }

    proptest! {
        #[test]
        fn nothing_is_lost_however_it_is_chopped(text in "[a-c\n]{0,300}", step in 1usize..40, long in 0usize..40_000) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("0.log");
            let mut log = LogFile::open(Some(path.clone()), 0, 1).unwrap();
            let mut lines = Lines::new(Stream::Stdout);
            let bytes = [text.as_bytes(), &vec![b'x'; long], b"\n", text.as_bytes()].concat();
            for chunk in bytes.chunks(step * 100) {
                lines.push(chunk, &mut log);
            }
            lines.finish(&mut log);
            log.flush();
            let written = fs::read_to_string(&path).unwrap();
            prop_assert!(written.lines().all(|l| l.len() <= MAX_LINE + 48));
            prop_assert_eq!(content(&written), bytes);
        }
    }

    #[test]
    fn rotation_keeps_whole_lines_and_so_many_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        fs::write(dir.path().join("0.log.keep"), "mine").unwrap();
        let mut log = LogFile::open(Some(path.clone()), 200, 3).unwrap();
        let mut lines = Lines::new(Stream::Stdout);
        for n in 0..40 {
            lines.push(format!("line {n}\n").as_bytes(), &mut log);
            log.flush();
        }
        let mut files = log.rotated(&path);
        assert_eq!(files.len(), 2);
        files.push(path);
        let all: String = files.iter().map(|f| fs::read_to_string(f).unwrap()).collect();
        let text = String::from_utf8(content(&all)).unwrap();
        assert!(text.ends_with("line 38\nline 39\n"), "{text}");
        assert_eq!(text.lines().count(), 12, "{text}");
        for file in &files {
            assert!(fs::metadata(file).unwrap().len() <= 200);
        }
        assert!(dir.path().join("0.log.keep").exists());
    }

    #[test]
    fn a_renamed_file_is_left_on_reopen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut log = LogFile::open(Some(path.clone()), 0, 1).unwrap();
        let mut lines = Lines::new(Stream::Stderr);
        lines.push(b"one\n", &mut log);
        log.flush();
        fs::rename(&path, dir.path().join("old")).unwrap();
        log.reopen().unwrap();
        lines.push(b"two\n", &mut log);
        log.flush();
        assert!(fs::read_to_string(&path).unwrap().ends_with(" stderr F two\n"));
    }
}
