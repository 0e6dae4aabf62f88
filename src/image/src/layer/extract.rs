//! Extraction of a layer's entries, in the order in which they come; where two have one name, the last one wins.
//!
//! What a layer removes from those below ("whiteouts", OCI image spec, layer.md) never touches what the layer itself
//! brings, in whatever order it comes. With [`WhiteoutStyle::Overlay`] the draft holds nothing else, and a directory
//! that takes the place of something else hides what lies below it. With [`WhiteoutStyle::Apply`] the draft holds the
//! layers below as well, so what the layer has brought is kept in mind.

use std::{
    collections::HashSet,
    fs::File,
    hash::{BuildHasher, RandomState},
    io::{Read, Write},
    os::fd::OwnedFd,
    rc::Rc,
};

use moxlet_storage::WhiteoutStyle;
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags, makedev,
};

use super::{
    Fault, Outcome, Target,
    archive::{Archive, Entry, Kind, MAX_ENTRIES},
    root::{Obstacle, Root, base, clean, is_dir, is_whiteout, parent},
    shown,
};

/// Bytes of the names that are kept in mind until the end.
const MAX_KEPT: usize = 256 << 20;
const BUFFER: usize = 128 << 10;
const WHITEOUT: &[u8] = b".wh.";
/// What AUFS kept for itself, and some old images still bring.
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Extracts an archive, which is read up to its end mark.
pub(super) fn extract(input: impl Read, target: &Target<'_>) -> Outcome<()> {
    let mut archive = Archive::new(input);
    let mut extraction = Extraction {
        root: Root::open(target)?,
        style: target.style,
        bottom: target.bottom,
        ours: Ours::default(),
        dirs: Vec::new(),
        kept: 0,
        implied: 0,
        buffer: vec![0; BUFFER],
    };
    while let Some(entry) = archive.next()? {
        extraction.entry(&entry, &mut archive)?;
    }
    extraction.finish()
}

struct Extraction {
    root: Root,
    style: WhiteoutStyle,
    bottom: bool,
    ours: Ours,
    /// The times of directories, which change with every entry in them.
    dirs: Vec<(Vec<u8>, Timespec)>,
    kept: usize,
    implied: u64,
    buffer: Vec<u8>,
}

/// The paths that a layer has brought, as hashes: names of four million entries would not fit.
#[derive(Default)]
struct Ours {
    state: RandomState,
    paths: HashSet<u64>,
}

impl Ours {
    fn contains(&self, path: &[u8]) -> bool {
        self.paths.contains(&self.state.hash_one(path))
    }

    /// A path and the directories on the way to it.
    fn insert(&mut self, mut path: &[u8]) {
        while !path.is_empty() && self.paths.insert(self.state.hash_one(path)) {
            path = parent(path);
        }
    }
}

impl Extraction {
    fn entry<R: Read>(&mut self, entry: &Entry, archive: &mut Archive<R>) -> Outcome<()> {
        let path = clean(&entry.path)?;
        if path.is_empty() {
            if entry.kind != Kind::Directory {
                return Err(Fault::Bad(format!("the root entry {} is not a directory", shown(&entry.path))));
            }
            let fd = self.root.open_top()?;
            return self.directory_attributes(&fd, &path, entry);
        }
        let marks = |c: &[u8]| c.starts_with(WHITEOUT) && !c.starts_with(WHITEOUT_META);
        if parent(&path).split(|b| *b == b'/').any(marks) {
            return Err(Fault::Bad(format!("the entry {} lies in a whiteout", shown(&path))));
        }
        let meta = |path: &[u8]| path.split(|b| *b == b'/').any(|c| c.starts_with(WHITEOUT_META));
        if base(&path) == OPAQUE && !meta(parent(&path)) {
            return self.opaque(&path);
        }
        if meta(&path) {
            tracing::debug!(name = %shown(&path), "an entry of AUFS is passed over");
            return Ok(());
        }
        if let Some(name) = base(&path).strip_prefix(WHITEOUT) {
            if matches!(name, b"" | b"." | b"..") {
                return Err(Fault::Bad(format!("the whiteout {} names no file", shown(&path))));
            }
            let mut removed = parent(&path).to_vec();
            if !removed.is_empty() {
                removed.push(b'/');
            }
            removed.extend_from_slice(name);
            return self.whiteout(&removed);
        }
        self.make(entry, &path, archive)?;
        if self.style == WhiteoutStyle::Apply {
            self.ours.insert(&path);
        }
        Ok(())
    }

    fn make<R: Read>(&mut self, entry: &Entry, path: &[u8], archive: &mut Archive<R>) -> Outcome<()> {
        let dir = self.parent_dir(path)?;
        let mode = Mode::from_raw_mode(entry.mode);
        let node = |kind, device| {
            let dir = Rc::clone(&dir);
            move |name: &[u8]| rustix::fs::mknodat(&*dir, name, kind, mode, device)
        };
        match entry.kind {
            Kind::Directory => return self.directory(&dir, path, entry),
            Kind::File => return self.file(&dir, path, entry, archive),
            Kind::HardLink => return self.hard_link(&dir, path, entry),
            Kind::Symlink => {
                if entry.link.is_empty() || entry.link.len() > 4095 || entry.link.contains(&0) {
                    return Err(Fault::Bad(format!(
                        "the symbolic link {} has no proper target",
                        shown(path)
                    )));
                }
                let make = |name: &[u8]| rustix::fs::symlinkat(&entry.link[..], &*dir, name);
                self.root.replacing(&dir, path, "make the symbolic link", make)?;
            }
            Kind::Fifo => self.root.replacing(&dir, path, "make the FIFO", node(FileType::Fifo, 0))?,
            Kind::BlockDevice | Kind::CharDevice => {
                let kind = match entry.kind {
                    Kind::BlockDevice => FileType::BlockDevice,
                    _ if (entry.major, entry.minor) == (0, 0) => {
                        let why = "is the character device 0/0, a marker of OverlayFS";
                        return Err(Fault::Bad(format!("the entry {} {why}", shown(path))));
                    }
                    _ => FileType::CharacterDevice,
                };
                let device = makedev(entry.major, entry.minor);
                self.root.replacing(&dir, path, "make the device", node(kind, device))?;
            }
        }
        let (name, nofollow) = (base(path), AtFlags::SYMLINK_NOFOLLOW);
        rustix::fs::chownat(&*dir, name, uid(entry), gid(entry), nofollow)
            .map_err(|e| self.root.fault("change the owner of", path, e))?;
        if entry.kind != Kind::Symlink {
            rustix::fs::chmodat(&*dir, name, mode, AtFlags::empty())
                .map_err(|e| self.root.fault("set the mode of", path, e))?;
        }
        rustix::fs::utimensat(&*dir, name, &times(entry.mtime), nofollow)
            .map_err(|e| self.root.fault("set the times of", path, e))
    }

    fn directory(&mut self, dir: &OwnedFd, path: &[u8], entry: &Entry) -> Outcome<()> {
        match self.root.look(dir, path)? {
            Some(stat) if is_dir(&stat) => {}
            Some(_) => self.instead(dir, path, 0o700)?,
            None => self.root.make_dir(dir, path, 0o700)?,
        }
        let fd = self.root.open_dir(dir, path)?;
        self.directory_attributes(&fd, path, entry)
    }

    /// A new directory in the place of something else.
    fn instead(&mut self, dir: &OwnedFd, path: &[u8], mode: u32) -> Outcome<()> {
        self.root.remove(dir, path)?;
        self.root.make_dir(dir, path, mode)?;
        if self.style == WhiteoutStyle::Overlay && !self.bottom {
            let fd = self.root.open_dir(dir, path)?;
            self.hide_below(&fd, path)?;
        }
        Ok(())
    }

    fn directory_attributes(&mut self, fd: &OwnedFd, path: &[u8], entry: &Entry) -> Outcome<()> {
        self.kept += path.len() + size_of::<(Vec<u8>, Timespec)>();
        if self.kept > MAX_KEPT {
            return Err(Fault::Bad("the names of its directories are too long in all".into()));
        }
        self.dirs.push((path.to_vec(), entry.mtime));
        self.attributes(fd, path, entry)
    }

    /// Owner before mode and capabilities: changing it takes those away.
    fn attributes(&self, fd: &OwnedFd, path: &[u8], entry: &Entry) -> Outcome<()> {
        rustix::fs::fchown(fd, uid(entry), gid(entry))
            .map_err(|e| self.root.fault("change the owner of", path, e))?;
        rustix::fs::fchmod(fd, Mode::from_raw_mode(entry.mode))
            .map_err(|e| self.root.fault("set the mode of", path, e))?;
        for (name, value) in &entry.xattrs {
            // Of a directory it would mean nothing.
            if entry.kind == Kind::Directory && name == b"security.capability" {
                continue;
            }
            rustix::fs::fsetxattr(fd, &name[..], value, XattrFlags::empty())
                .map_err(|e| self.root.fault("set an extended attribute of", path, e))?;
        }
        Ok(())
    }

    fn file<R: Read>(
        &mut self,
        dir: &OwnedFd,
        path: &[u8],
        entry: &Entry,
        archive: &mut Archive<R>,
    ) -> Outcome<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let make = |name: &[u8]| rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR);
        let mut file = File::from(self.root.replacing(dir, path, "create", make)?);
        loop {
            match archive.read(&mut self.buffer)? {
                0 => break,
                n => file.write_all(&self.buffer[..n]).map_err(|e| self.root.fault("write", path, e))?,
            }
        }
        let fd = OwnedFd::from(file);
        self.attributes(&fd, path, entry)?;
        rustix::fs::futimens(&fd, &times(entry.mtime))
            .map_err(|e| self.root.fault("set the times of", path, e))
    }

    /// A further name of a file of this layer. Owner, mode and times are the file's.
    fn hard_link(&mut self, dir: &OwnedFd, path: &[u8], entry: &Entry) -> Outcome<()> {
        let refuse =
            |why: &str| Fault::Bad(format!("the hard link {} to {} {why}", shown(path), shown(&entry.link)));
        let from = clean(&entry.link)?;
        let missing = match self.style {
            WhiteoutStyle::Overlay => "has no target in its own layer",
            WhiteoutStyle::Apply => "has no target",
        };
        let Ok(from_dir) = self.root.dir(parent(&from))? else { return Err(refuse(missing)) };
        match self.root.look(&from_dir, &from)? {
            None => return Err(refuse(missing)),
            Some(stat) if is_whiteout(&stat) => return Err(refuse(missing)),
            Some(stat) if is_dir(&stat) => return Err(refuse("is one to a directory")),
            Some(_) if from == path => return Err(refuse("is one to itself")),
            Some(_) if from.starts_with(path) && from.get(path.len()) == Some(&b'/') => {
                return Err(refuse("takes the place of its target's directory"));
            }
            Some(_) => {}
        }
        let make = |name: &[u8]| rustix::fs::linkat(&*from_dir, base(&from), dir, name, AtFlags::empty());
        self.root.replacing(dir, path, "make the hard link", make)
    }

    /// The directory that a path lies in; what is missing of it is made.
    fn parent_dir(&mut self, path: &[u8]) -> Outcome<Rc<OwnedFd>> {
        let wanted = parent(path);
        if let Ok(dir) = self.root.dir(wanted)? {
            return Ok(dir);
        }
        let mut at = self.root.open_top()?;
        let ends =
            wanted.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(i, _)| i).chain([wanted.len()]);
        for end in ends {
            let part = &wanted[..end];
            at = match self.root.step(&at, part)? {
                Ok(next) => next,
                Err(obstacle) => {
                    self.implied_dir(&at, part, obstacle)?;
                    self.root.open_dir(&at, part)?
                }
            };
        }
        Ok(self.root.remember(wanted, at))
    }

    /// Makes a directory that the layer has no entry for, but entries in.
    fn implied_dir(&mut self, at: &OwnedFd, path: &[u8], obstacle: Obstacle) -> Outcome<()> {
        self.implied += 1;
        if self.implied > MAX_ENTRIES {
            return Err(Fault::Bad(format!("it has more than {MAX_ENTRIES} directories without an entry")));
        }
        match obstacle {
            Obstacle::Missing => self.root.make_dir(at, path, 0o755),
            Obstacle::NotADirectory => {
                let stat = self.root.look(at, path)?;
                if self.may_give_way(path, stat.as_ref()) {
                    return self.instead(at, path, 0o755);
                }
                let why = "other than a directory, and has entries in it";
                Err(Fault::Bad(format!("it has {} as something {why}", shown(path))))
            }
        }
    }

    /// Whether something that is no directory makes room for one that an entry lies in: if it is of a layer below, or
    /// the mark that it has been removed. A link of this layer is neither followed nor replaced.
    fn may_give_way(&self, path: &[u8], stat: Option<&Stat>) -> bool {
        match self.style {
            WhiteoutStyle::Overlay => stat.is_some_and(is_whiteout),
            WhiteoutStyle::Apply => !self.ours.contains(path),
        }
    }

    /// Removes what the layers below have at a path.
    fn whiteout(&mut self, path: &[u8]) -> Outcome<()> {
        if self.bottom {
            return Ok(());
        }
        let dir = self.parent_dir(path)?;
        if self.style == WhiteoutStyle::Apply {
            self.ours.insert(parent(path));
            return if self.ours.contains(path) { self.purge(path) } else { self.root.remove(&dir, path) };
        }
        match self.root.look(&dir, path)? {
            Some(stat) if is_dir(&stat) => {
                let fd = self.root.open_dir(&dir, path)?;
                self.hide_below(&fd, path)
            }
            // It hides what is below already.
            Some(_) => Ok(()),
            None => rustix::fs::mknodat(&*dir, base(path), FileType::CharacterDevice, Mode::empty(), 0)
                .map_err(|e| self.root.fault("mark as removed", path, e)),
        }
    }

    /// Removes what the layers below have in the directory of a mark.
    fn opaque(&mut self, mark: &[u8]) -> Outcome<()> {
        let path = parent(mark);
        if self.bottom {
            return Ok(());
        }
        // The kernel does not look for the attribute at the top of a layer (fs/overlayfs/super.c).
        if path.is_empty() && self.style == WhiteoutStyle::Overlay {
            return Err(Fault::Bad("its root directory is opaque, which OverlayFS cannot express".into()));
        }
        let dir = self.parent_dir(mark)?;
        if self.style == WhiteoutStyle::Apply {
            self.ours.insert(path);
            return self.purge(path);
        }
        let fd = self.root.reopen(&dir, path)?;
        self.hide_below(&fd, path)
    }

    fn hide_below(&self, fd: &OwnedFd, path: &[u8]) -> Outcome<()> {
        rustix::fs::fsetxattr(fd, "trusted.overlay.opaque", b"y", XattrFlags::empty())
            .map_err(|e| self.root.fault("make opaque", path, e))
    }

    /// Removes all that the layer has not brought itself beneath a path.
    fn purge(&mut self, path: &[u8]) -> Outcome<()> {
        let mut waiting = vec![path.to_vec()];
        while let Some(path) = waiting.pop() {
            let Ok(dir) = self.root.dir(&path)? else { continue };
            let list = self.root.reopen(&dir, &path)?;
            for name in self.root.names(&list, &path)? {
                let mut child = path.clone();
                if !child.is_empty() {
                    child.push(b'/');
                }
                child.extend_from_slice(&name);
                if self.ours.contains(&child) {
                    waiting.push(child);
                } else {
                    self.root.remove(&dir, &child)?;
                }
            }
        }
        Ok(())
    }

    /// Sets the times of directories, now that nothing is made in them any more.
    fn finish(mut self) -> Outcome<()> {
        for (path, mtime) in std::mem::take(&mut self.dirs) {
            // It may have been replaced since.
            let Ok(dir) = self.root.dir(&path)? else { continue };
            rustix::fs::utimensat(&*dir, ".", &times(mtime), AtFlags::empty())
                .map_err(|e| self.root.fault("set the times of", &path, e))?;
        }
        Ok(())
    }
}

fn uid(entry: &Entry) -> Option<Uid> {
    Some(Uid::from_raw(entry.uid))
}

fn gid(entry: &Entry) -> Option<Gid> {
    Some(Gid::from_raw(entry.gid))
}

fn times(mtime: Timespec) -> Timestamps {
    Timestamps { last_access: mtime, last_modification: mtime }
}
