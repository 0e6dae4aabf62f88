//! A layer held against its tape: every content is read again, and every entry's attributes are looked at.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher, RandomState},
    io,
    os::fd::OwnedFd,
    path::Path,
};

use moxlet_ids::Digest;
use moxlet_storage::WhiteoutStyle;
use rustix::fs::{FileType, Mode, OFlags, Stat, major, minor};

use super::{
    Fault, MAX_UNPACKED, Outcome,
    again::{Whose, place_key},
    archive::{Archive, Entry, Kind},
    extract::joined,
    root::{Root, base, clean, is_dir, is_whiteout, parent},
    settle::xattrs,
    shown,
    stream::Hashing,
    tape::Tape,
};

/// How many differences are told.
const MAX_DIFFERENCES: usize = 100;

/// What a layer has turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Check {
    /// The digest of the archive that is made from it.
    pub(crate) diff_id: Digest,
    /// What is not as it was when it was extracted, in words; the first hundred.
    pub(crate) differences: Vec<String>,
}

/// Holds the layer in `view` against its tape. It blocks, and reads all of the layer.
///
/// # Errors
/// The tape or the directory cannot be read, or the tape is damaged.
pub(crate) fn check(view: &Path, tape: &Path, style: WhiteoutStyle, bottom: bool) -> io::Result<Check> {
    let mut checker = Checker {
        root: Root::at(view).map_err(plain)?,
        style,
        bottom,
        plan: Plan::default(),
        found: Vec::new(),
        places: HashMap::new(),
    };
    // What comes last is known only at the end: once without the contents, once with them.
    let mut first = Tape::open(tape)?;
    checker.places = first.places();
    let mut hollow = first.over(view)?.hollow();
    let mut archive = Archive::new(io::BufReader::new(&mut hollow), None);
    let mut number = 0;
    while let Some(entry) = archive.next().map_err(plain)? {
        number += 1;
        checker.plan(number, &entry).map_err(plain)?;
    }
    drop(archive);
    let whole = Tape::open(tape)?.over(view)?.lenient();
    let faults = whole.faults();
    let mut archive = Archive::new(Hashing::new(whole, MAX_UNPACKED), None);
    number = 0;
    while let Some(entry) = archive.next().map_err(plain)? {
        number += 1;
        checker.entry(number, &entry).map_err(plain)?;
    }
    let (hashing, _) = archive.rest().map_err(plain)?;
    if style == WhiteoutStyle::Overlay {
        checker.strangers().map_err(plain)?;
    }
    let mut differences = faults.take();
    differences.append(&mut checker.found);
    differences.truncate(MAX_DIFFERENCES);
    Ok(Check { diff_id: hashing.digest(), differences })
}

fn plain(fault: Fault) -> io::Error {
    match fault {
        Fault::System { source, .. } => source,
        Fault::Bad(reason) => io::Error::new(io::ErrorKind::InvalidData, reason),
        Fault::Mismatch { .. } | Fault::Cut => io::Error::other("the tape is not read to its end"),
    }
}

/// What the archive has in the end, by the hashes of paths.
#[derive(Default)]
struct Plan {
    state: RandomState,
    /// The number of the last entry of a path, and of the last that is no directory (0 if none is).
    last: HashMap<u64, (u32, u32)>,
    /// Paths that may be there without an entry.
    others: HashSet<u64>,
    root_is_opaque: bool,
}

impl Plan {
    fn hash(&self, path: &[u8]) -> u64 {
        self.state.hash_one(path)
    }

    /// Whether an entry is what its path has in the end.
    fn lasts(&self, number: u32, path: &[u8]) -> bool {
        self.last.get(&self.hash(path)).is_some_and(|(last, _)| *last == number)
            && !self.was_replaced(number, path)
    }

    /// Whether something other than a directory came where a directory on the way to a path was, after an entry.
    fn was_replaced(&self, number: u32, path: &[u8]) -> bool {
        let mut at = parent(path);
        while !at.is_empty() {
            if self.last.get(&self.hash(at)).is_some_and(|(_, other)| *other > number) {
                return true;
            }
            at = parent(at);
        }
        false
    }

    fn allow(&mut self, path: &[u8]) {
        let mut at = path;
        while !at.is_empty() && self.others.insert(self.state.hash_one(at)) {
            at = parent(at);
        }
    }
}

/// Whether a path is, or lies in, a mark of what is removed.
fn is_marked(path: &[u8]) -> bool {
    path.split(|b| *b == b'/').any(|c| c.starts_with(b".wh."))
}

struct Checker {
    root: Root,
    style: WhiteoutStyle,
    bottom: bool,
    plan: Plan,
    found: Vec<String>,
    /// Where symbolic links led entries to.
    places: HashMap<u64, Vec<u8>>,
}

impl Checker {
    fn plan(&mut self, number: u32, entry: &Entry) -> Outcome<()> {
        let path = clean(&entry.path)?;
        if is_marked(&path) {
            let name = base(&path).strip_prefix(b".wh.").unwrap_or_default();
            let removed = self.located(joined(parent(&path), name), number, Whose::Entry)?;
            if name == b".wh..opq" && parent(&removed).is_empty() {
                self.plan.root_is_opaque = true;
            }
            self.plan.allow(&removed);
            return Ok(());
        }
        let path = self.located(path, number, Whose::Entry)?;
        let hash = self.plan.hash(&path);
        let known = self.plan.last.entry(hash).or_default();
        known.0 = number;
        if entry.kind != Kind::Directory {
            known.1 = number;
        }
        self.plan.allow(parent(&path));
        if entry.kind == Kind::HardLink {
            let target = self.located(clean(&entry.link)?, number, Whose::Target)?;
            self.plan.allow(&target);
        }
        Ok(())
    }

    /// Where an entry, or the target of a hard link, is.
    fn located(&self, path: Vec<u8>, number: u32, whose: Whose) -> Outcome<Vec<u8>> {
        match self.places.get(&place_key(u64::from(number), whose)) {
            // A damaged tape may say anything.
            Some(place) => clean(place),
            None => Ok(path),
        }
    }

    fn tell(&mut self, path: &[u8], what: &str) {
        if self.found.len() < MAX_DIFFERENCES {
            self.found.push(format!("{} {what}", shown(path)));
        }
    }

    fn entry(&mut self, number: u32, entry: &Entry) -> Outcome<()> {
        let path = clean(&entry.path)?;
        if path.is_empty() {
            if !self.plan.lasts(number, &path) {
                return Ok(());
            }
            let top = self.root.open_top()?;
            let stat = rustix::fs::fstat(&top).map_err(|e| self.root.fault("look at", &path, e))?;
            return self.compare(entry, &path, &stat, None);
        }
        if is_marked(&path) {
            return self.mark(number, &path);
        }
        let path = self.located(path, number, Whose::Entry)?;
        if !self.plan.lasts(number, &path) {
            return Ok(());
        }
        let found = match self.root.dir(parent(&path))? {
            Ok(dir) => self.root.look(&dir, &path)?.map(|stat| (dir, stat)),
            Err(_) => None,
        };
        let Some((dir, stat)) = found else {
            self.tell(&path, "is missing");
            return Ok(());
        };
        if entry.kind == Kind::HardLink {
            self.link(number, entry, &path, &stat)
        } else {
            self.compare(entry, &path, &stat, Some(&dir))
        }
    }

    /// A whiteout's mark; the opaque ones are directories' attributes.
    fn mark(&mut self, number: u32, path: &[u8]) -> Outcome<()> {
        let name = base(path).strip_prefix(b".wh.").filter(|n| !n.starts_with(b".wh."));
        // What AUFS kept for itself is passed over.
        let Some(name) = name.filter(|_| !is_marked(parent(path))) else { return Ok(()) };
        let removed = self.located(joined(parent(path), name), number, Whose::Entry)?;
        if self.style == WhiteoutStyle::Apply || self.bottom || self.plan.was_replaced(number, &removed) {
            return Ok(());
        }
        let there = match self.root.dir(parent(&removed))? {
            Ok(dir) => self.root.look(&dir, &removed)?.is_some(),
            Err(_) => false,
        };
        if !there {
            self.tell(&removed, "has lost the mark that it is removed");
        }
        Ok(())
    }

    fn link(&mut self, number: u32, entry: &Entry, path: &[u8], stat: &Stat) -> Outcome<()> {
        let target = self.located(clean(&entry.link)?, number, Whose::Target)?;
        if self.plan.was_replaced(0, &target) {
            return Ok(());
        }
        // Where the target was replaced after the link was made they are two files.
        let earlier = self.plan.last.get(&self.plan.hash(&target)).is_some_and(|(last, _)| *last < number);
        if earlier
            && let Ok(dir) = self.root.dir(parent(&target))?
            && let Some(other) = self.root.look(&dir, &target)?
            && (other.st_ino, other.st_dev) != (stat.st_ino, stat.st_dev)
        {
            self.tell(path, &format!("is no hard link to {} any more", shown(&target)));
        }
        Ok(())
    }

    fn compare(&mut self, entry: &Entry, path: &[u8], stat: &Stat, dir: Option<&OwnedFd>) -> Outcome<()> {
        let wanted = match entry.kind {
            Kind::File | Kind::HardLink => FileType::RegularFile,
            Kind::Directory => FileType::Directory,
            Kind::Symlink => FileType::Symlink,
            Kind::CharDevice => FileType::CharacterDevice,
            Kind::BlockDevice => FileType::BlockDevice,
            Kind::Fifo => FileType::Fifo,
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind != wanted {
            self.tell(path, &format!("is of the kind {kind:?}, not {wanted:?}"));
            return Ok(());
        }
        let mode = stat.st_mode & 0o7777;
        if kind != FileType::Symlink && mode != entry.mode {
            self.tell(path, &format!("has the mode {mode:o}, not {:o}", entry.mode));
        }
        if (stat.st_uid, stat.st_gid) != (entry.uid, entry.gid) {
            let (uid, gid) = (stat.st_uid, stat.st_gid);
            self.tell(path, &format!("belongs to {uid}:{gid}, not {}:{}", entry.uid, entry.gid));
        }
        let mtime = super::settle::modified(stat);
        if mtime != entry.mtime {
            self.tell(path, &format!("was modified at {}.{:09}", mtime.tv_sec, mtime.tv_nsec));
        }
        if matches!(entry.kind, Kind::CharDevice | Kind::BlockDevice)
            && (major(stat.st_rdev), minor(stat.st_rdev)) != (entry.major, entry.minor)
        {
            self.tell(path, "is another device");
        }
        let Some(dir) = dir else { return Ok(()) };
        if entry.kind == Kind::Symlink {
            let to = rustix::fs::readlinkat(dir, base(path), Vec::new());
            let to = to.map_err(|e| self.root.fault("read", path, e))?;
            if to.to_bytes() != entry.link {
                self.tell(path, &format!("is a link to {}", shown(to.to_bytes())));
            }
        }
        if matches!(entry.kind, Kind::File | Kind::Directory) {
            let fault = |e| self.root.fault("look at", path, e);
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let fd = rustix::fs::openat(dir, base(path), flags, Mode::empty()).map_err(fault)?;
            let mut there = xattrs(&fd).map_err(fault)?;
            // Labels are the machine's.
            there.retain(|(name, _)| name.starts_with(b"user.") || name == b"security.capability");
            let mut wanted = entry.xattrs.clone();
            wanted.retain(|(name, _)| entry.kind == Kind::File || name != b"security.capability");
            there.sort();
            wanted.sort();
            if there != wanted {
                self.tell(path, "has other extended attributes");
            }
        }
        Ok(())
    }

    /// What is there and no entry explains.
    fn strangers(&mut self) -> Outcome<()> {
        let mut waiting = vec![Vec::new()];
        while let Some(path) = waiting.pop() {
            let Ok(dir) = self.root.dir(&path)? else { continue };
            let list = self.root.reopen(&dir, &path)?;
            for name in self.root.names(&list, &path)? {
                let child = if path.is_empty() { name } else { [&path[..], b"/", &name].concat() };
                let hash = self.plan.hash(&child);
                let Some(stat) = self.root.look(&dir, &child)? else { continue };
                let known = self.plan.last.contains_key(&hash) || self.plan.others.contains(&hash);
                let hides = self.plan.root_is_opaque && path.is_empty() && is_whiteout(&stat);
                if !known && !hides {
                    self.tell(&child, "does not belong to the layer");
                } else if is_dir(&stat) && self.found.len() < MAX_DIFFERENCES {
                    waiting.push(child);
                }
            }
        }
        Ok(())
    }
}
