//! Writing a tape while a layer is extracted.

use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions},
    hash::{BuildHasher, RandomState},
    io::{self, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use zstd::stream::write::Encoder;

use super::{Extent, FILE, LITERAL, MAGIC, MAX_LITERAL, SPARSE, put_number};
use crate::layer::Fault;

/// Headers are mostly zeros: more effort makes the tape hardly smaller and a pull slower.
const LEVEL: i32 = 1;
/// Bytes of the files that a layer replaces itself, holes and all: as many as it may unpack to.
const MAX_KEPT_BYTES: u64 = 64 << 30;
/// Bytes of their names, which are in memory until the end.
const MAX_KEPT_INDEX: usize = 64 << 20;

/// A tape in the making.
pub(crate) struct Recorder {
    path: PathBuf,
    out: Encoder<'static, File>,
    /// Bytes of the archive that are not written as a record yet.
    literal: Vec<u8>,
    /// Records that are not compressed yet.
    records: Vec<u8>,
    /// Files that were recorded.
    files: u64,
    kept: Option<Kept>,
    /// The sizes of what was kept.
    kept_bytes: u64,
    /// Where entries went that went elsewhere than to their names.
    places: Vec<u8>,
    placed: u64,
    /// The further names of files, as hashes: what is removed at one of these is no recorded content.
    links: HashSet<u64>,
    state: RandomState,
}

/// Contents of files that are gone, in a file without a name until the tape is complete.
struct Kept {
    file: File,
    count: u64,
    index: Vec<u8>,
}

impl Recorder {
    /// Begins a tape in a new file.
    ///
    /// # Errors
    /// There is one already, or it cannot be written.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(MAGIC)?;
        Ok(Self {
            path: path.to_owned(),
            out: Encoder::new(file, LEVEL)?,
            literal: Vec::with_capacity(MAX_LITERAL),
            records: Vec::with_capacity(2 * MAX_LITERAL),
            files: 0,
            kept: None,
            kept_bytes: 0,
            places: Vec::new(),
            placed: 0,
            links: HashSet::new(),
            state: RandomState::new(),
        })
    }

    /// Where it is written to.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the archive that are no file's content.
    pub(crate) fn literal(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(MAX_LITERAL - self.literal.len()));
            self.literal.extend_from_slice(now);
            bytes = rest;
            if self.literal.len() == MAX_LITERAL {
                self.end_literal()?;
            }
        }
        Ok(())
    }

    /// At this place the archive has the content of a file, which was extracted to `path`; of a sparse one only these
    /// extents of it.
    pub(crate) fn file(&mut self, path: &[u8], size: u64, extents: Option<&[Extent]>) -> io::Result<()> {
        self.end_literal()?;
        self.files += 1;
        put_number(&mut self.records, if extents.is_some() { SPARSE } else { FILE });
        put_number(&mut self.records, path.len() as u64);
        self.records.extend_from_slice(path);
        put_number(&mut self.records, size);
        if let Some(extents) = extents {
            put_number(&mut self.records, extents.len() as u64);
            for (offset, length) in extents {
                put_number(&mut self.records, *offset);
                put_number(&mut self.records, *length);
            }
        }
        self.flush_if_full()
    }

    /// A further name of a file of the layer.
    pub(crate) fn link(&mut self, path: &[u8]) {
        self.links.insert(self.state.hash_one(path));
    }

    /// An entry, or the target of a hard link, was led to `path` by symbolic links. Each key is used once.
    pub(crate) fn place(&mut self, key: u64, path: &[u8]) {
        self.placed += 1;
        put_number(&mut self.places, key);
        put_number(&mut self.places, path.len() as u64);
        self.places.extend_from_slice(path);
    }

    /// What the layer has at `path` is about to go, since a later entry takes its place. Whether that is the content of
    /// a file, which is to be given to [`Self::keep`]. Each content is kept once, however many names it had.
    pub(crate) fn wants(&mut self, path: &[u8]) -> bool {
        self.links.is_empty() || !self.links.remove(&self.state.hash_one(path))
    }

    /// Keeps the content of a file that is about to go.
    ///
    /// # Errors
    /// It cannot be written, or the layer replaces more of its own files than any that is not made for it
    /// ([`io::ErrorKind::FileTooLarge`]): a sparse file has many bytes and costs its layer none, and may be replaced again and again.
    pub(crate) fn keep(&mut self, path: &[u8], mut content: File) -> io::Result<()> {
        let size = content.metadata()?.len();
        self.kept_bytes = self.kept_bytes.saturating_add(size);
        let index = self.kept.as_ref().map_or(0, |k| k.index.len()) + self.places.len() + path.len();
        if self.kept_bytes > MAX_KEPT_BYTES || index > MAX_KEPT_INDEX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        if self.kept.is_none() {
            let name = self.path.with_extension("kept");
            let options = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&name);
            self.kept = Some(Kept { file: options?, count: 0, index: Vec::new() });
            fs::remove_file(&name)?;
        }
        let Some(kept) = &mut self.kept else { return Ok(()) };
        let begin = kept.file.stream_position()?;
        let mut encoder = Encoder::new(&mut kept.file, LEVEL)?;
        let size = io::copy(&mut content, &mut encoder)?;
        encoder.finish()?;
        let end = kept.file.stream_position()?;
        kept.count += 1;
        put_number(&mut kept.index, path.len() as u64);
        kept.index.extend_from_slice(path);
        for number in [self.files, size, begin, end - begin] {
            put_number(&mut kept.index, number);
        }
        Ok(())
    }

    /// Completes a tape, if there is one.
    pub(crate) fn complete(tape: Option<Self>) -> Result<(), Fault> {
        let Some(tape) = tape else { return Ok(()) };
        let path = tape.path().to_owned();
        tape.finish().map_err(|source| Fault::System { what: "write", path, source })
    }

    /// Completes the tape, on disk.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.end_literal()?;
        put_number(&mut self.records, super::END);
        self.out.write_all(&self.records)?;
        let mut file = self.out.finish()?;
        let base = file.stream_position()?;
        let mut index = Vec::new();
        put_number(&mut index, base);
        put_number(&mut index, self.kept.as_ref().map_or(0, |k| k.count));
        if let Some(kept) = &mut self.kept {
            kept.file.seek(SeekFrom::Start(0))?;
            io::copy(&mut kept.file, &mut file)?;
            index.append(&mut kept.index);
        }
        put_number(&mut index, self.placed);
        index.append(&mut self.places);
        let offset = file.stream_position()?;
        file.write_all(&index)?;
        file.write_all(&offset.to_le_bytes())?;
        file.write_all(&(index.len() as u64).to_le_bytes())?;
        file.write_all(MAGIC)?;
        file.sync_all()
    }

    fn end_literal(&mut self) -> io::Result<()> {
        if self.literal.is_empty() {
            return Ok(());
        }
        put_number(&mut self.records, LITERAL);
        put_number(&mut self.records, self.literal.len() as u64);
        self.records.append(&mut self.literal);
        self.flush_if_full()
    }

    fn flush_if_full(&mut self) -> io::Result<()> {
        if self.records.len() >= MAX_LITERAL {
            self.out.write_all(&self.records)?;
            self.records.clear();
        }
        Ok(())
    }
}
