//! The files of one container's log, oldest first, and reading on over their rotation.
//!
//! The live file is renamed to `<name>.<YYYYMMDD-HHMMSS[.nanoseconds]>` and a new one is made; only then is nothing more written
//! into the old one. So a follower that finds another live file reads its own to the end once more before it goes on, to the
//! first file that is younger. Files are told apart by inode: an open one's number is not used again.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::Path,
};

use rustix::fs::{AtFlags, Dir, FileType, statat};

use super::record::{Filter, Lines};
use crate::beneath;

/// Read in steps of so many bytes; no more is shown by one either.
const BLOCK: usize = 256 << 10;
/// Steps that show nothing, one after another, before the caller gets a say.
const QUIET_BLOCKS: usize = 32;
/// The most old files that are read, the youngest of them.
const MAX_OLD: usize = 64;
/// The most entries of the directory that are looked at.
const MAX_ENTRIES: usize = 10_000;

type Id = (u64, u64);

/// An open file of the log.
#[derive(Debug)]
struct Opened {
    file: File,
    id: Id,
    length: u64,
    /// What its name has behind the log's; the live file has none.
    suffix: Option<String>,
}

/// The directory of a log and the log's name in it.
#[derive(Debug)]
pub(super) struct LogDir {
    dir: OwnedFd,
    name: String,
}

fn is_rotation_suffix(text: &str) -> bool {
    // With nanoseconds: moxlet-init; without: a kubelet that rotates by itself.
    matches!(text.len(), 15 | 25)
        && text.bytes().enumerate().all(|(i, b)| match i {
            8 => b == b'-',
            15 => b == b'.',
            _ => b.is_ascii_digit(),
        })
}

impl LogDir {
    /// The directory of a log `path` (relative) below `base`, a directory that no container can replace.
    pub(super) fn open(base: &Path, path: &Path) -> io::Result<Self> {
        let bad = || io::Error::new(io::ErrorKind::InvalidInput, format!("{} names no file", path.display()));
        let name = path.file_name().and_then(|n| n.to_str()).ok_or_else(bad)?.to_owned();
        let base = beneath::open_dir(base)?;
        let dir = beneath::open_dir_below(base, path.parent().unwrap_or(Path::new("")))?;
        Ok(Self { dir, name })
    }

    /// The directory.
    pub(super) fn dir(&self) -> &OwnedFd {
        &self.dir
    }

    fn open_one(&self, suffix: Option<String>) -> io::Result<Option<Opened>> {
        let name = match &suffix {
            Some(suffix) => format!("{}.{suffix}", self.name),
            None => self.name.clone(),
        };
        let file = match beneath::open_file(&self.dir, Path::new(&name)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let facts = file.metadata()?;
        Ok(Some(Opened { file, id: (facts.dev(), facts.ino()), length: facts.len(), suffix }))
    }

    /// Which file is the live one.
    fn live(&self) -> io::Result<Option<Id>> {
        match statat(&self.dir, self.name.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(facts) if FileType::from_raw_mode(facts.st_mode) == FileType::RegularFile => {
                Ok(Some((facts.st_dev, facts.st_ino)))
            }
            Ok(_) | Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// The suffixes of the old files, oldest first.
    fn suffixes(&self) -> io::Result<Vec<String>> {
        let mut found = Vec::new();
        for entry in Dir::read_from(&self.dir)?.take(MAX_ENTRIES) {
            let entry = entry?;
            let suffix =
                entry.file_name().to_str().ok().and_then(|n| n.strip_prefix(&*self.name)?.strip_prefix('.'));
            found.extend(suffix.filter(|s| is_rotation_suffix(s)).map(str::to_owned));
        }
        found.sort_unstable();
        Ok(found.split_off(found.len().saturating_sub(MAX_OLD)))
    }

    /// All files whose suffix is above `newest`, oldest first, the live one last, as they were at one moment.
    fn files(&self, newest: &str) -> io::Result<VecDeque<Opened>> {
        let mut tries = 0;
        loop {
            let live = self.open_one(None)?;
            let mut files = VecDeque::new();
            for suffix in self.suffixes()?.into_iter().filter(|s| s.as_str() > newest) {
                // What is no file, or is gone meanwhile, is none of the log.
                files.extend(self.open_one(Some(suffix)).ok().flatten());
            }
            tries += 1;
            // A container that renames without end gets what there is.
            if self.live()? == live.as_ref().map(|f| f.id) || tries == 8 {
                files.retain(|f| live.as_ref().is_none_or(|l| l.id != f.id));
                files.extend(live);
                return Ok(files);
            }
        }
    }
}

#[derive(Debug)]
struct Current {
    file: File,
    id: Id,
    offset: u64,
    /// Where to stop; a follower does not.
    end: Option<u64>,
    /// Another file is the live one: what there is now is all.
    last: bool,
}

/// What a step of reading gave.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Something to show, perhaps nothing; there may be more.
    More(Vec<u8>),
    /// All is read that is there; a follower may find more later.
    Idle,
    /// There will be no more.
    Done,
}

/// Reads a log.
#[derive(Debug)]
pub(super) struct Reader {
    dir: LogDir,
    follow: bool,
    lines: Lines,
    queue: VecDeque<Opened>,
    current: Option<Current>,
    /// The greatest suffix of a file that was queued.
    newest: String,
    buffer: Vec<u8>,
}

impl Reader {
    /// Opens what is there of a log.
    pub(super) fn new(dir: LogDir, filter: Filter, follow: bool) -> io::Result<Self> {
        let mut reader = Self {
            dir,
            follow,
            lines: Lines::new(filter),
            queue: VecDeque::new(),
            current: None,
            newest: String::new(),
            buffer: Vec::new(),
        };
        reader.refill()?;
        Ok(reader)
    }

    /// Whether no file of the log was found.
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.current.is_none()
    }

    /// Queues the files that are younger than those queued before, from the present one on.
    fn refill(&mut self) -> io::Result<()> {
        let mut files = self.dir.files(&self.newest)?;
        if let Some(newest) = files.iter().filter_map(|f| f.suffix.as_ref()).next_back() {
            self.newest.clone_from(newest);
        }
        if let Some(current) = &self.current
            && let Some(at) = files.iter().position(|f| f.id == current.id)
        {
            files.drain(..=at);
        }
        self.queue = files;
        Ok(())
    }

    /// Skips all but the last `count` lines, counted as the kubelet counts: every line of the files, parts as well.
    ///
    /// Gives up once `unwanted` says so.
    pub(super) fn tail(&mut self, count: u64, unwanted: &dyn Fn() -> bool) -> io::Result<()> {
        let mut missing = count;
        for at in (0..self.queue.len()).rev() {
            let (start, found) = last_lines(&self.queue[at], missing, unwanted)?;
            if found >= missing {
                self.queue.drain(..at);
                let Some(first) = self.queue.pop_front() else { return Ok(()) };
                self.begin(first, start);
                return Ok(());
            }
            missing -= found;
        }
        Ok(())
    }

    fn begin(&mut self, opened: Opened, offset: u64) {
        let end = (!self.follow).then_some(opened.length);
        self.current = Some(Current { file: opened.file, id: opened.id, offset, end, last: false });
    }

    /// Reads on.
    pub(super) fn step(&mut self) -> io::Result<Step> {
        let mut out = Vec::new();
        for _ in 0..QUIET_BLOCKS {
            if self.lines.is_full() {
                return Ok(Step::Done);
            }
            if self.current.is_none() {
                if self.queue.is_empty() && self.follow {
                    self.refill()?;
                }
                match self.queue.pop_front() {
                    Some(next) => self.begin(next, 0),
                    None if self.follow => return Ok(Step::Idle),
                    None => return Ok(Step::Done),
                }
            }
            if self.read()? {
                let count = self.buffer.len();
                self.lines.push(&self.buffer[..count], &mut out);
            } else if !self.advance(&mut out)? {
                if !out.is_empty() {
                    return Ok(Step::More(out));
                }
                return Ok(if self.follow { Step::Idle } else { Step::Done });
            }
            if !out.is_empty() {
                break;
            }
        }
        Ok(Step::More(out))
    }

    /// What an unfinished line shows, for there will be no more.
    pub(super) fn finish(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        self.lines.finish(&mut out);
        out
    }

    /// Fills the buffer from the current file; `false` at its end.
    fn read(&mut self) -> io::Result<bool> {
        let Some(current) = &mut self.current else { return Ok(false) };
        let room =
            current.end.map_or(BLOCK as u64, |end| end.saturating_sub(current.offset).min(BLOCK as u64));
        let room = usize::try_from(room).unwrap_or(BLOCK);
        self.buffer.resize(BLOCK, 0);
        let count = loop {
            match current.file.read_at(&mut self.buffer[..room], current.offset) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        self.buffer.truncate(count);
        current.offset += count as u64;
        Ok(count > 0)
    }

    /// At the end of the current file: goes to the next one; `false` if there is none yet.
    fn advance(&mut self, out: &mut Vec<u8>) -> io::Result<bool> {
        if let Some(next) = self.queue.pop_front() {
            self.lines.finish(out);
            self.begin(next, 0);
            return Ok(true);
        }
        let Some(current) = &mut self.current else { return Ok(false) };
        if !self.follow {
            self.lines.finish(out);
            return Ok(false);
        }
        if !current.last {
            if current.file.metadata()?.len() < current.offset {
                // Cut off by someone in the container; what comes now begins at the beginning.
                current.offset = 0;
                self.lines.reset();
                return Ok(true);
            }
            // A log that was renamed and not made anew yet may still be written to.
            if self.dir.live()?.is_none_or(|live| live == current.id) {
                return Ok(false);
            }
            current.last = true;
            return Ok(true);
        }
        self.refill()?;
        Ok(!self.queue.is_empty())
    }
}

/// Where the last `count` lines of a file begin, and how many there are if they are fewer.
fn last_lines(opened: &Opened, count: u64, unwanted: &dyn Fn() -> bool) -> io::Result<(u64, u64)> {
    let mut buffer = vec![0; BLOCK];
    let (mut right, mut found) = (opened.length, 0_u64);
    while right > 0 && !unwanted() {
        let left = right.saturating_sub(BLOCK as u64);
        let block = &mut buffer[..usize::try_from(right - left).unwrap_or(BLOCK)];
        match opened.file.read_exact_at(block, left) {
            // Shorter than it was: it is being rewritten, so let it be read as a whole.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok((0, count)),
            other => other?,
        }
        let here = block.iter().filter(|b| **b == b'\n').count() as u64;
        if found + here > count {
            // The line break before the first wanted line is in this block.
            let mut before = found + here - count;
            for (at, _) in block.iter().enumerate().filter(|(_, b)| **b == b'\n') {
                before -= 1;
                if before == 0 {
                    return Ok((left + at as u64 + 1, count));
                }
            }
        }
        found += here;
        right = left;
    }
    Ok((0, found))
}
