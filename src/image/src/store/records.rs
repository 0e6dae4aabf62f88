//! The records of images on disk.
//!
//! ```text
//! <dir>/images/<hex of the id>.json    version, names, layers
//! <dir>/configs/<hex of the id>        the image's config, byte by byte as it came
//! <dir>/tmp/                           what is being written; emptied by open
//! ```
//!
//! An image is there once its record is. A tag that moves is written to its new image before it is taken from the old
//! one; where both have it after a crash, the record with the higher serial has it.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use moxlet_ids::{ChainId, Digest};
use serde::{Deserialize, Serialize};

use crate::{
    Error, ImageRecord, Result,
    error::{Attempt, chain},
};

const VERSION: u32 = 1;
/// Far more than the longest list of names that anybody has.
const MAX_FILE: u64 = 16 << 20;

/// An image that is here.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) record: ImageRecord,
    /// Grows with every pull.
    pub(super) serial: u64,
}

/// The images by their ids.
pub(super) type Images = HashMap<Digest, Stored>;

/// What a record file says.
#[derive(Debug, Serialize, Deserialize)]
struct Written {
    version: u32,
    serial: u64,
    id: Digest,
    repo_tags: Vec<String>,
    repo_digests: Vec<String>,
    size_bytes: u64,
    layers: Vec<ChainId>,
}

/// The directory of the records.
#[derive(Debug)]
pub(super) struct Records {
    dir: PathBuf,
}

impl Records {
    /// Opens the directory, which is made if missing. What was left half-written goes.
    pub(super) fn open(dir: PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir).attempt("create", &dir)?;
        let records = Self { dir };
        for name in ["images", "configs", "tmp"] {
            let path = records.dir.join(name);
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e).attempt("create", path),
                _ => {}
            }
        }
        for path in files(&records.dir.join("tmp"))? {
            remove(&path)?;
        }
        Ok(records)
    }

    /// Reads all records. One that is damaged, or whose layers are not all in `layers`, is reported and forgotten:
    /// the next pull brings its image again.
    pub(super) fn load(&self, layers: &HashSet<ChainId>) -> Result<Images> {
        let mut images = Images::new();
        for path in files(&self.dir.join("images"))? {
            match self.read(&path, layers)? {
                Ok(stored) => {
                    images.insert(stored.record.id.clone(), stored);
                }
                Err(reason) => {
                    tracing::warn!(path = %path.display(), reason, "an image is damaged and has to be pulled again");
                    remove(&path)?;
                }
            }
        }
        for path in files(&self.dir.join("configs"))? {
            if !images.keys().any(|id| path.file_name().is_some_and(|n| n == id.hex())) {
                remove(&path)?;
            }
        }
        self.settle(&mut images)?;
        Ok(images)
    }

    /// Leaves every tag to the image that got it last.
    fn settle(&self, images: &mut Images) -> Result<()> {
        let mut owners: HashMap<String, (u64, Digest)> = HashMap::new();
        for (id, stored) in images.iter() {
            for tag in &stored.record.repo_tags {
                let claim = (stored.serial, id.clone());
                owners.entry(tag.clone()).and_modify(|o| *o = o.clone().max(claim.clone())).or_insert(claim);
            }
        }
        for (id, stored) in images.iter_mut() {
            let before = stored.record.repo_tags.len();
            stored.record.repo_tags.retain(|t| owners.get(t).is_none_or(|(_, owner)| owner == id));
            if stored.record.repo_tags.len() < before {
                self.write(stored)?;
            }
        }
        Ok(())
    }

    /// One record; the inner error says what is wrong with it, the outer one that it could not be looked at.
    fn read(&self, path: &Path, layers: &HashSet<ChainId>) -> Result<std::result::Result<Stored, String>> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let text = match bounded(path)? {
            Ok(text) => text,
            Err(reason) => return Ok(Err(reason)),
        };
        match serde_json::from_slice::<Version>(&text) {
            Ok(Version { version }) if version > VERSION => {
                return Err(Error::TooNew { path: path.to_owned(), version });
            }
            _ => {}
        }
        let written: Written = match serde_json::from_slice(&text) {
            Ok(written) => written,
            Err(error) => return Ok(Err(format!("the record cannot be read: {error}"))),
        };
        if path.file_name().is_none_or(|n| n != record_name(&written.id).as_str()) {
            return Ok(Err("the record is another image's".into()));
        }
        if let Some(layer) = written.layers.iter().find(|l| !layers.contains(l)) {
            return Ok(Err(format!("its layer {layer} is missing")));
        }
        let config = self.config_path(&written.id);
        if !config.exists() {
            return Ok(Err("its config is missing".into()));
        }
        let blob = match bounded(&config)? {
            Ok(blob) => blob,
            Err(reason) => return Ok(Err(reason)),
        };
        if Digest::of(&blob) != written.id {
            return Ok(Err("its config has another digest".into()));
        }
        let config = match serde_json::from_slice(&blob) {
            Ok(config) => config,
            Err(error) => return Ok(Err(format!("its config cannot be read: {error}"))),
        };
        let record = ImageRecord {
            id: written.id,
            repo_tags: written.repo_tags,
            repo_digests: written.repo_digests,
            size_bytes: written.size_bytes,
            layers: written.layers,
            config,
        };
        Ok(Ok(Stored { record, serial: written.serial }))
    }

    /// Writes a record; its config must be there.
    pub(super) fn write(&self, stored: &Stored) -> Result<()> {
        let record = &stored.record;
        let path = self.dir.join("images").join(record_name(&record.id));
        let written = Written {
            version: VERSION,
            serial: stored.serial,
            id: record.id.clone(),
            repo_tags: record.repo_tags.clone(),
            repo_digests: record.repo_digests.clone(),
            size_bytes: record.size_bytes,
            layers: record.layers.clone(),
        };
        let text = serde_json::to_vec_pretty(&written).map_err(io::Error::from).attempt("write", &path)?;
        self.put(&path, &text)
    }

    /// Writes the config of an image.
    pub(super) fn write_config(&self, id: &Digest, blob: &[u8]) -> Result<()> {
        self.put(&self.config_path(id), blob)
    }

    /// Removes an image's files, the record first. Idempotent.
    pub(super) fn remove(&self, id: &Digest) -> Result<()> {
        let images = self.dir.join("images");
        remove(&images.join(record_name(id)))?;
        sync_dir(&images)?;
        remove(&self.config_path(id))
    }

    fn config_path(&self, id: &Digest) -> PathBuf {
        self.dir.join("configs").join(id.hex())
    }

    /// All of a file or nothing of it.
    fn put(&self, path: &Path, content: &[u8]) -> Result<()> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let draft = self.dir.join("tmp").join(name);
        let write = || {
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
            io::Write::write_all(&mut file, content)?;
            file.sync_all()
        };
        let done = write().attempt("write", &draft).and_then(|()| {
            fs::rename(&draft, path).attempt("put in place", path)?;
            path.parent().map_or(Ok(()), sync_dir)
        });
        if done.is_err() {
            let _ = fs::remove_file(&draft);
        }
        done
    }
}

fn record_name(id: &Digest) -> String {
    format!("{}.json", id.hex())
}

/// A file, unless it is too large to be one of ours.
fn bounded(path: &Path) -> Result<std::result::Result<Vec<u8>, String>> {
    let length = fs::metadata(path).attempt("look at", path)?.len();
    if length > MAX_FILE {
        return Ok(Err(format!("{} has {length} bytes", path.display())));
    }
    match fs::read(path) {
        Ok(bytes) => Ok(Ok(bytes)),
        // A damaged block is this image's trouble alone.
        Err(e) if e.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
            Ok(Err(format!("{}: {}", path.display(), chain(&e))))
        }
        Err(e) => Err(e).attempt("read", path),
    }
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).attempt("list", dir)? {
        paths.push(entry.attempt("list", dir)?.path());
    }
    Ok(paths)
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done.attempt("remove", path),
    }
}

fn sync_dir(dir: &Path) -> Result<()> {
    fs::File::open(dir).and_then(|d| d.sync_all()).attempt("flush", dir)
}
