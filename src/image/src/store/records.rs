//! The records of images on disk.
//!
//! ```text
//! <dir>/images/<hex of the id>.json    version, names, layers
//! <dir>/configs/<hex of the id>        the image's config, byte by byte as it came; its time is the image's last use
//! <dir>/manifests/<hex of its digest>  the manifest that an image came with, likewise
//! <dir>/layers/<hex of the chain>.tape what it takes to make the layer's archive again, byte by byte
//! <dir>/views/                         see `views`
//! <dir>/lock                           see `lock`
//! <dir>/salt                           goes into the digests of credentials
//! <dir>/tmp/                           what is being written; emptied by open
//! ```
//!
//! An image is there once its record is. A tag that moves is written to its new image before it is taken from the old
//! one; where both have it after a crash, the record with the higher serial has it. A manifest is written before the record
//! that names it, and an earlier one goes after that: whatever lies between, the record's own is there. Records of version 1
//! know neither manifest nor blobs; the next pull of their image adds them.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use jiff::Timestamp;
use moxlet_ids::{ChainId, Digest};
use serde::{Deserialize, Serialize};

use super::{
    details::{Details, ManifestNote, Stored},
    draft::TapeDraft,
    lock::DirLock,
};
use crate::{
    Error, ImageConfig, ImageRecord, Result,
    error::{Attempt, chain},
};

const VERSION: u32 = 2;
/// Bytes of the salt.
const SALT: usize = 32;
/// Far more than the longest list of names that anybody has.
const MAX_FILE: u64 = 16 << 20;

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
    #[serde(default)]
    pinned: bool,
    #[serde(flatten)]
    details: Details,
}

/// Record files that cannot be used, and why not.
pub(super) type Damaged = Vec<(PathBuf, String)>;

/// The records of a directory.
struct Found {
    images: Images,
    damaged: Damaged,
}

/// The directory of the records.
#[derive(Debug)]
pub(crate) struct Records {
    pub(super) dir: PathBuf,
    _lock: DirLock,
}

impl Records {
    /// The directory of a store that is only read: nothing in it is made, removed or changed.
    pub(crate) fn look(dir: PathBuf, lock: DirLock) -> Self {
        Self { dir, _lock: lock }
    }

    /// Opens the directory, which is made if missing. What was left half-written goes.
    pub(super) fn open(dir: PathBuf, lock: DirLock) -> Result<Self> {
        let records = Self { dir, _lock: lock };
        // The lock of a store on a dataset lies elsewhere.
        fs::create_dir_all(&records.dir).attempt("create", &records.dir)?;
        for name in ["images", "configs", "manifests", "layers", "views", "tmp"] {
            let path = records.dir.join(name);
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e).attempt("create", path),
                _ => {}
            }
        }
        for path in files(&records.dir.join("tmp"))? {
            match fs::remove_dir_all(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotADirectory => remove(&path)?,
                done => done.attempt("remove", path)?,
            }
        }
        Ok(records)
    }

    /// Reads all records. One that is damaged, or whose layers are not all in `layers`, is reported and forgotten:
    /// the next pull brings its image again.
    pub(super) fn load(&self, layers: &HashSet<ChainId>) -> Result<Images> {
        let Found { mut images, damaged } = self.find(layers)?;
        for (path, reason) in damaged {
            tracing::warn!(path = %path.display(), reason, "an image is damaged and has to be pulled again");
            remove(&path)?;
        }
        self.name_manifests(&images)?;
        let configs: HashSet<&str> = images.keys().map(Digest::hex).collect();
        let manifests = images.values().filter_map(|s| s.details.manifest.as_ref());
        let manifests: HashSet<&str> = manifests.map(|note| note.digest.hex()).collect();
        for (dir, known) in [("configs", configs), ("manifests", manifests)] {
            for path in files(&self.dir.join(dir))? {
                if !path.file_name().and_then(|n| n.to_str()).is_some_and(|n| known.contains(n)) {
                    remove(&path)?;
                }
            }
        }
        for id in settle(&mut images) {
            if let Some(stored) = images.get(&id) {
                self.write(stored)?;
            }
        }
        Ok(images)
    }

    /// Gives manifests that are named by their images' ids, as they first were, the names that they have now.
    fn name_manifests(&self, images: &Images) -> Result<()> {
        for (id, stored) in images {
            let Some(note) = &stored.details.manifest else { continue };
            let (old, new) = (self.old_manifest_path(id), self.manifest_path(&note.digest));
            if old.exists() && !new.exists() {
                fs::rename(&old, &new).attempt("put in place", new)?;
            }
        }
        Ok(())
    }

    /// All records as [`Self::load`] has them, the oldest one first, and what is wrong with the others. Nothing is changed.
    pub(super) fn read_all(&self, layers: &HashSet<ChainId>) -> Result<(Vec<Stored>, Damaged)> {
        if !self.dir.join("images").exists() {
            return Ok((Vec::new(), Vec::new()));
        }
        let Found { mut images, damaged } = self.find(layers)?;
        settle(&mut images);
        let mut all: Vec<Stored> = images.into_values().collect();
        all.sort_by(|a, b| (a.serial, &a.record.id).cmp(&(b.serial, &b.record.id)));
        Ok((all, damaged))
    }

    fn find(&self, layers: &HashSet<ChainId>) -> Result<Found> {
        let mut found = Found { images: Images::new(), damaged: Vec::new() };
        for path in files(&self.dir.join("images"))? {
            match self.read(&path, layers)? {
                Ok(stored) => drop(found.images.insert(stored.record.id.clone(), stored)),
                Err(reason) => found.damaged.push((path, reason)),
            }
        }
        Ok(found)
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
        let config = match ImageConfig::read(&blob) {
            Ok(config) => Arc::new(config),
            Err(reason) => return Ok(Err(format!("its config: {reason}"))),
        };
        drop(blob);
        let record = ImageRecord {
            id: written.id,
            repo_tags: written.repo_tags,
            repo_digests: written.repo_digests,
            size_bytes: written.size_bytes,
            layers: written.layers,
            pinned: written.pinned,
            config,
        };
        let mut details = written.details;
        // A blob that belongs to no layer would be pushed as another one.
        if details.blobs.len() != record.layers.len() {
            details.blobs.clear();
        }
        Ok(Ok(Stored { record, serial: written.serial, details }))
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
            pinned: record.pinned,
            details: stored.details.clone(),
        };
        let text = serde_json::to_vec_pretty(&written).map_err(io::Error::from).attempt("write", &path)?;
        self.put(&path, &text)
    }

    /// Writes the config of an image.
    pub(super) fn write_config(&self, id: &Digest, blob: &[u8]) -> Result<()> {
        self.put(&self.config_path(id), blob)
    }

    /// The config of an image, byte by byte.
    pub(crate) fn config_blob(&self, id: &Digest) -> Result<Vec<u8>> {
        let path = self.config_path(id);
        match bounded(&path)? {
            Ok(blob) => Ok(blob),
            Err(reason) => Err(io::Error::other(reason)).attempt("read", path),
        }
    }

    /// Writes a manifest; the record that names its digest comes after.
    pub(super) fn write_manifest(&self, bytes: &[u8]) -> Result<()> {
        self.put(&self.manifest_path(&Digest::of(bytes)), bytes)
    }

    /// Removes a manifest that no record names any more. One that stays goes when the store is opened.
    pub(super) fn forget_manifest(&self, digest: &Digest) {
        if let Err(error) = remove(&self.manifest_path(digest)) {
            tracing::warn!(%digest, %error, "a manifest that nobody needs stays until the next start");
        }
    }

    /// The bytes of the manifest that a record names; none where they are not those.
    pub(crate) fn manifest_blob(&self, id: &Digest, note: &ManifestNote) -> Result<Option<Vec<u8>>> {
        // A store that is only read may have the old name still.
        for path in [self.manifest_path(&note.digest), self.old_manifest_path(id)] {
            if path.exists() {
                return Ok(bounded(&path)?.ok().filter(|bytes| Digest::of(bytes) == note.digest));
            }
        }
        Ok(None)
    }

    /// Random bytes of this store, made when they are first needed.
    pub(crate) fn salt(&self) -> Result<Vec<u8>> {
        if let Some(salt) = self.salt_if_made()? {
            return Ok(salt);
        }
        let source = Path::new("/dev/urandom");
        let mut salt = vec![0; SALT];
        fs::File::open(source)
            .and_then(|mut f| io::Read::read_exact(&mut f, &mut salt))
            .attempt("read", source)?;
        self.put(&self.salt_path(), &salt)?;
        Ok(salt)
    }

    /// Takes over another store's salt where there is none yet. Whether digests of credentials mean the same in both then.
    pub(super) fn adopt_salt(&self, other: &Self) -> Result<bool> {
        let Some(theirs) = other.salt_if_made()? else { return Ok(true) };
        match self.salt_if_made()? {
            Some(ours) => Ok(ours == theirs),
            None => self.put(&self.salt_path(), &theirs).map(|()| true),
        }
    }

    fn salt_if_made(&self) -> Result<Option<Vec<u8>>> {
        let path = self.salt_path();
        match fs::read(&path) {
            Ok(salt) => Ok((salt.len() == SALT).then_some(salt)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).attempt("read", path),
        }
    }

    fn salt_path(&self) -> PathBuf {
        self.dir.join("salt")
    }

    /// Says that an image is used now. A failure costs only a better choice of what is removed for want of space.
    pub(super) fn touch(&self, id: &Digest) {
        let path = self.config_path(id);
        let touched =
            fs::File::options().append(true).open(&path).and_then(|f| f.set_modified(SystemTime::now()));
        if let Err(error) = touched {
            tracing::debug!(path = %path.display(), %error, "an image's last use is not noted");
        }
    }

    /// Says when an image was used last.
    pub(super) fn set_last_used(&self, id: &Digest, at: Timestamp) -> Result<()> {
        let path = self.config_path(id);
        let file = fs::File::options().append(true).open(&path).attempt("open", &path)?;
        file.set_modified(at.into()).attempt("set the time of", path)
    }

    /// When an image was used last.
    pub(super) fn last_used(&self, id: &Digest) -> Option<Timestamp> {
        let modified = fs::metadata(self.config_path(id)).and_then(|m| m.modified()).ok()?;
        Timestamp::try_from(modified).ok()
    }

    /// Where the tape of a layer is.
    pub(crate) fn tape_path(&self, layer: &ChainId) -> PathBuf {
        self.dir.join("layers").join(format!("{}.tape", layer.digest().hex()))
    }

    /// Puts a tape that was written (and flushed) in its place, before the layer itself is there.
    pub(super) fn keep_tape(&self, draft: &Path, layer: &ChainId) -> Result<()> {
        let path = self.tape_path(layer);
        fs::rename(draft, &path).attempt("put in place", &path)?;
        path.parent().map_or(Ok(()), sync_dir)
    }

    /// Copies the tape of a layer from another store, if that has it and this one does not.
    pub(super) fn adopt_tape(&self, other: &Self, layer: &ChainId) -> Result<()> {
        let (theirs, ours) = (other.tape_path(layer), self.tape_path(layer));
        if ours.exists() || !theirs.exists() {
            return Ok(());
        }
        let draft = TapeDraft::new(self);
        let copied = fs::copy(&theirs, draft.path()).and_then(|_| fs::File::open(draft.path())?.sync_all());
        copied.attempt("write", draft.path())?;
        draft.keep(self, layer)
    }

    /// Removes the tape of a layer. Idempotent.
    pub(super) fn remove_tape(&self, layer: &ChainId) -> Result<()> {
        remove(&self.tape_path(layer))
    }

    /// The layers that have a tape.
    pub(super) fn tapes(&self) -> Result<Vec<ChainId>> {
        let chain = |path: PathBuf| {
            let name = path.file_name()?.to_str()?.strip_suffix(".tape")?;
            format!("sha256:{name}").parse().ok()
        };
        Ok(files(&self.dir.join("layers"))?.into_iter().filter_map(chain).collect())
    }

    /// A path for something that is being written; [`Self::open`] removes what is left there.
    pub(crate) fn draft_path(&self) -> PathBuf {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        self.dir.join("tmp").join(name)
    }

    /// Removes an image's record, then its config. Idempotent.
    pub(super) fn remove(&self, id: &Digest) -> Result<()> {
        let images = self.dir.join("images");
        remove(&images.join(record_name(id)))?;
        sync_dir(&images)?;
        remove(&self.config_path(id))
    }

    fn manifest_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join("manifests").join(digest.hex())
    }

    /// Where a manifest first was: by the id of its image.
    fn old_manifest_path(&self, id: &Digest) -> PathBuf {
        self.manifest_path(id)
    }

    fn config_path(&self, id: &Digest) -> PathBuf {
        self.dir.join("configs").join(id.hex())
    }

    /// All of a file or nothing of it.
    pub(super) fn put(&self, path: &Path, content: &[u8]) -> Result<()> {
        let draft = self.draft_path();
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

/// Leaves every tag to the image that got it last; the images that lost one.
fn settle(images: &mut Images) -> Vec<Digest> {
    let mut owners: HashMap<String, (u64, Digest)> = HashMap::new();
    for (id, stored) in images.iter() {
        for tag in &stored.record.repo_tags {
            let claim = (stored.serial, id.clone());
            owners.entry(tag.clone()).and_modify(|o| *o = o.clone().max(claim.clone())).or_insert(claim);
        }
    }
    let mut changed = Vec::new();
    for (id, stored) in images.iter_mut() {
        let before = stored.record.repo_tags.len();
        stored.lose_tags(|t| owners.get(t).is_some_and(|(_, owner)| owner != id));
        if stored.record.repo_tags.len() < before {
            changed.push(id.clone());
        }
    }
    changed
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

pub(super) fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).attempt("list", dir)? {
        paths.push(entry.attempt("list", dir)?.path());
    }
    Ok(paths)
}

pub(super) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done.attempt("remove", path),
    }
}

fn sync_dir(dir: &Path) -> Result<()> {
    fs::File::open(dir).and_then(|d| d.sync_all()).attempt("flush", dir)
}
