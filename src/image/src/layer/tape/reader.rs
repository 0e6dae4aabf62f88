//! Making the archive of a layer again from its tape and its files.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufReader, Read},
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use zstd::stream::read::Decoder;

use super::{
    END, Extent, FILE, LITERAL, MAGIC, MAX_EXTENTS, MAX_INDEX, MAX_KEPT, MAX_LITERAL, MAX_PATH, MAX_PLACES,
    SPARSE, Section, TRAILER, damaged, get_bytes, get_number,
};
use crate::layer::shown;

/// How large a window a tape's frames may ask for, as a power of two; the recorder's need less.
const WINDOW: u32 = 23;
const BENEATH: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// A tape that was recorded.
pub(crate) struct Tape {
    file: Arc<File>,
    /// Where the records end.
    records_end: u64,
    kept: HashMap<Vec<u8>, Vec<Kept>>,
    places: HashMap<u64, Vec<u8>>,
}

/// Where the content of a file is that is not in the layer any more.
#[derive(Debug, Clone, Copy)]
struct Kept {
    /// The number of files that had been recorded when it went.
    until: u64,
    size: u64,
    offset: u64,
    length: u64,
}

impl Tape {
    /// Opens a tape.
    ///
    /// # Errors
    /// It cannot be read, or is none ([`io::ErrorKind::InvalidData`]).
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::from_file(File::open(path)?)
    }

    /// The same for a file that is open.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(crate) fn from_file(file: File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        let start = length.checked_sub(TRAILER as u64).filter(|s| *s >= MAGIC.len() as u64);
        let start = start.ok_or_else(|| damaged("it is too short"))?;
        let (mut head, mut trailer) = ([0; 8], [0; TRAILER]);
        file.read_exact_at(&mut head, 0)?;
        file.read_exact_at(&mut trailer, start)?;
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&trailer[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let (offset, size) = (number(0), number(8));
        if head != *MAGIC || trailer[16..] != *MAGIC {
            return Err(damaged("it has no magic number"));
        }
        if size > MAX_INDEX || offset.checked_add(size) != Some(start) {
            return Err(damaged("its index is not where it should be"));
        }
        let file = Arc::new(file);
        let mut index = BufReader::new(Section { file: Arc::clone(&file), at: offset, end: offset + size });
        let records_end = get_number(&mut index)?;
        let count = get_number(&mut index)?;
        if records_end > offset || count > MAX_KEPT {
            return Err(damaged("its index makes no sense"));
        }
        let mut kept: HashMap<Vec<u8>, Vec<Kept>> = HashMap::new();
        for _ in 0..count {
            let path = get_bytes(&mut index, MAX_PATH)?;
            let mut number = || get_number(&mut index);
            let (until, size, begin, length) = (number()?, number()?, number()?, number()?);
            let begin = records_end.checked_add(begin);
            let place = begin.filter(|b| b.checked_add(length).is_some_and(|end| end <= offset));
            let offset = place.ok_or_else(|| damaged("its index makes no sense"))?;
            kept.entry(path).or_default().push(Kept { until, size, offset, length });
        }
        let count = get_number(&mut index)?;
        if count > MAX_PLACES {
            return Err(damaged("its index makes no sense"));
        }
        let mut places = HashMap::new();
        for _ in 0..count {
            places.insert(get_number(&mut index)?, get_bytes(&mut index, MAX_PATH)?);
        }
        Ok(Self { file, records_end, kept, places })
    }

    /// Where entries and the targets of hard links went that symbolic links led elsewhere, by the recorder's keys.
    pub(crate) fn places(&mut self) -> HashMap<u64, Vec<u8>> {
        std::mem::take(&mut self.places)
    }

    /// The archive, made from the files beneath `view`, the layer's directory.
    ///
    /// # Errors
    /// The directory cannot be opened. Reading fails where a file is missing or not as long as it was, and where the
    /// tape is damaged.
    pub(crate) fn over(self, view: &Path) -> io::Result<Rebuilt> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, view, flags, Mode::empty())?;
        let records = Section { file: Arc::clone(&self.file), at: MAGIC.len() as u64, end: self.records_end };
        let mut records = Decoder::new(records)?.single_frame();
        records.window_log_max(WINDOW)?;
        Ok(Rebuilt {
            root,
            tape: self,
            records: BufReader::with_capacity(MAX_LITERAL, records),
            files: 0,
            now: Now::Literal(0),
            lenient: false,
            hollow: false,
            faults: Faults::default(),
        })
    }
}

/// What is read at present.
enum Now {
    Literal(u64),
    File {
        path: Vec<u8>,
        file: File,
        at: u64,
        left: u64,
        rest: std::vec::IntoIter<Extent>,
    },
    Kept {
        content: Box<dyn Read + Send>,
        left: u64,
    },
    /// In the place of a file that cannot be read.
    Zeros(u64),
    End,
}

/// An archive that is made again, byte by byte as it was.
pub(crate) struct Rebuilt {
    root: OwnedFd,
    tape: Tape,
    records: BufReader<Decoder<'static, BufReader<Section>>>,
    files: u64,
    now: Now,
    lenient: bool,
    hollow: bool,
    faults: Faults,
}

/// What was wrong with the files that were read, for whoever has asked for it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Faults(Arc<Mutex<Vec<String>>>);

impl Faults {
    /// The faults since the last call; only the first hundred are told.
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn tell(&self, reason: String) {
        let mut faults = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if faults.len() < MAX_FAULTS {
            faults.push(reason);
        }
    }
}

/// How many faults are told.
const MAX_FAULTS: usize = 100;

impl Rebuilt {
    /// Goes on where a file is missing or has another length, with zeros in its place; what was wrong is told by
    /// [`Self::faults`]. The archive is then not what it was.
    pub(crate) fn lenient(mut self) -> Self {
        self.lenient = true;
        self
    }

    /// Gives zeros for all contents: what is of interest is around them.
    pub(crate) fn hollow(mut self) -> Self {
        self.hollow = true;
        self
    }

    /// Where the faults are told when this is [lenient](Self::lenient).
    pub(crate) fn faults(&self) -> Faults {
        self.faults.clone()
    }

    fn next(&mut self) -> io::Result<Now> {
        match get_number(&mut self.records)? {
            END => Ok(Now::End),
            LITERAL => {
                let length = get_number(&mut self.records)?;
                if length > MAX_LITERAL as u64 {
                    return Err(damaged("a literal is too long"));
                }
                Ok(Now::Literal(length))
            }
            kind @ (FILE | SPARSE) => {
                let path = get_bytes(&mut self.records, MAX_PATH)?;
                let size = get_number(&mut self.records)?;
                let extents = if kind == SPARSE { self.extents(size)? } else { vec![(0, size)] };
                self.files += 1;
                self.file(path, size, extents)
            }
            _ => Err(damaged("it has an unknown record")),
        }
    }

    fn extents(&mut self, size: u64) -> io::Result<Vec<Extent>> {
        let count = usize::try_from(get_number(&mut self.records)?).ok().filter(|c| *c <= MAX_EXTENTS);
        let count = count.ok_or_else(|| damaged("a sparse file has too many extents"))?;
        let mut extents = Vec::new();
        for _ in 0..count {
            let (offset, length) = (get_number(&mut self.records)?, get_number(&mut self.records)?);
            if offset.checked_add(length).is_none_or(|end| end > size) {
                return Err(damaged("an extent lies beyond its file"));
            }
            extents.push((offset, length));
        }
        Ok(extents)
    }

    fn file(&mut self, path: Vec<u8>, size: u64, extents: Vec<Extent>) -> io::Result<Now> {
        let total = extents.iter().fold(0_u64, |sum, (_, length)| sum.saturating_add(*length));
        if self.hollow {
            return Ok(Now::Zeros(total));
        }
        let gone = self.tape.kept.get(&path).and_then(|all| {
            // The first that went after this one was recorded is this one.
            all.iter().filter(|k| k.until >= self.files).min_by_key(|k| k.until).copied()
        });
        if let Some(kept) = gone {
            return self.kept(kept, size, extents, total);
        }
        match self.open(&path, size) {
            Ok(file) => {
                let rest = extents.into_iter();
                Ok(Now::File { path, file, at: 0, left: 0, rest })
            }
            Err(reason) if self.lenient => {
                self.faults.tell(reason);
                Ok(Now::Zeros(total))
            }
            Err(reason) => Err(io::Error::new(io::ErrorKind::InvalidData, reason)),
        }
    }

    fn kept(&self, kept: Kept, size: u64, extents: Vec<Extent>, total: u64) -> io::Result<Now> {
        if kept.size != size {
            return Err(damaged("a file that was kept has another length"));
        }
        let place = Section {
            file: Arc::clone(&self.tape.file),
            at: kept.offset,
            end: kept.offset.saturating_add(kept.length),
        };
        let mut content = Decoder::new(place)?.single_frame();
        content.window_log_max(WINDOW)?;
        Ok(Now::Kept {
            content: Box::new(Extents { content, at: 0, left: 0, rest: extents.into_iter() }),
            left: total,
        })
    }

    /// A file of the layer. A FIFO in its place must not make us wait.
    fn open(&self, path: &[u8], size: u64) -> Result<File, String> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let name = shown(path);
        let fd = rustix::fs::openat2(&self.root, path, flags, Mode::empty(), BENEATH)
            .map_err(|e| format!("the file {name} cannot be opened: {}", io::Error::from(e)))?;
        let stat = rustix::fs::fstat(&fd)
            .map_err(|e| format!("the file {name} cannot be looked at: {}", io::Error::from(e)))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(format!("{name} is not a file any more"));
        }
        let there = u64::try_from(stat.st_size).unwrap_or(0);
        if there != size {
            return Err(format!("the file {name} has {there} bytes, not {size}"));
        }
        Ok(File::from(fd))
    }
}

impl Read for Rebuilt {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        loop {
            let done = match &mut self.now {
                Now::End => return Ok(0),
                Now::Literal(left) => {
                    let want = up_to(*left, into.len());
                    let n = if want == 0 { 0 } else { some(self.records.read(&mut into[..want])?)? };
                    *left -= n as u64;
                    n
                }
                Now::Zeros(left) => {
                    let n = up_to(*left, into.len());
                    into[..n].fill(0);
                    *left -= n as u64;
                    n
                }
                Now::Kept { content, left } => {
                    let want = up_to(*left, into.len());
                    let n = if want == 0 { 0 } else { some(content.read(&mut into[..want])?)? };
                    *left -= n as u64;
                    n
                }
                Now::File { path, file, at, left, rest } => {
                    while *left == 0
                        && let Some((offset, length)) = rest.next()
                    {
                        (*at, *left) = (offset, length);
                    }
                    let want = up_to(*left, into.len());
                    let n = if want == 0 { 0 } else { file.read_at(&mut into[..want], *at)? };
                    if n == 0 && want > 0 {
                        let reason = format!("the file {} became shorter", shown(path));
                        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
                    }
                    *at += n as u64;
                    *left -= n as u64;
                    n
                }
            };
            if done > 0 {
                return Ok(done);
            }
            self.now = self.next()?;
        }
    }
}

/// The extents of a file that can only be read in order.
struct Extents<R> {
    content: R,
    at: u64,
    left: u64,
    rest: std::vec::IntoIter<Extent>,
}

impl<R: Read> Read for Extents<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.left == 0 {
            let Some((offset, length)) = self.rest.next() else { return Ok(0) };
            let gap = offset.checked_sub(self.at).ok_or_else(|| damaged("extents are out of order"))?;
            let skipped = io::copy(&mut Read::take(&mut self.content, gap), &mut io::sink())?;
            if skipped != gap {
                return Err(damaged("a file that was kept is too short"));
            }
            (self.at, self.left) = (offset, length);
        }
        let want = up_to(self.left, into.len());
        let n = self.content.read(&mut into[..want])?;
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

fn up_to(left: u64, room: usize) -> usize {
    usize::try_from(left).unwrap_or(usize::MAX).min(room)
}

fn some(n: usize) -> io::Result<usize> {
    if n == 0 { Err(damaged("it ends early")) } else { Ok(n) }
}
