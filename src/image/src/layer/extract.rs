//! Extraction of a layer's entries, in the order in which they come; where two have one name, the last one wins.
//!
//! What a layer removes from those below ("whiteouts", OCI image spec, layer.md) never touches what the layer itself
//! brings, in whatever order it comes. With [`WhiteoutStyle::Overlay`] the draft holds nothing else, and a directory
//! that takes the place of something else hides what lies below it. With [`WhiteoutStyle::Apply`] the draft holds the
//! layers below as well, so what the layer has brought is kept in mind.

use std::{fs::File, io::BufRead, os::fd::OwnedFd, os::unix::fs::FileExt, rc::Rc};

use moxlet_storage::{Usage, WhiteoutStyle};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags, makedev,
};

use super::{
    Fault, Outcome, Target,
    archive::{Archive, Entry, Kind, MAX_ENTRIES},
    root::{Leaving, Obstacle, Ours, Root, base, clean, is_dir, is_whiteout, parent},
    shown,
    tape::Recorder,
};

/// Bytes of the names that are kept in mind until the end.
const MAX_KEPT: usize = 256 << 20;
/// The unit in which most file systems give out space.
const DISK_BLOCK: u64 = 4096;
const WHITEOUT: &[u8] = b".wh.";
/// What AUFS kept for itself, and some old images still bring.
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Extracts an archive, which is read up to its end; what it takes on disk.
pub(super) fn extract<R: BufRead>(input: R, target: &Target<'_>) -> Outcome<(R, Usage)> {
    let tape = target.tape.map(|path| {
        Recorder::create(path).map_err(|source| Fault::System { what: "create", path: path.into(), source })
    });
    let mut archive = Archive::new(input, tape.transpose()?);
    let mut extraction = Extraction {
        root: Root::open(target)?,
        style: target.style,
        bottom: target.bottom,
        ours: Ours::default(),
        dirs: Vec::new(),
        kept: 0,
        implied: 0,
        usage: Usage::default(),
    };
    while let Some(entry) = archive.next()? {
        extraction.entry(&entry, &mut archive)?;
    }
    let (input, tape) = archive.rest()?;
    let usage = extraction.finish()?;
    if let Some(tape) = tape {
        let path = tape.path().to_owned();
        tape.finish().map_err(|source| Fault::System { what: "write", path, source })?;
    }
    Ok((input, usage))
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
    usage: Usage,
}

impl Extraction {
    fn entry<R: BufRead>(&mut self, entry: &Entry, archive: &mut Archive<R>) -> Outcome<()> {
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

    fn make<R: BufRead>(&mut self, entry: &Entry, path: &[u8], archive: &mut Archive<R>) -> Outcome<()> {
        let dir = self.parent_dir(path)?;
        let mode = Mode::from_raw_mode(entry.mode);
        let node = |kind, device| {
            let dir = Rc::clone(&dir);
            move |name: &[u8]| rustix::fs::mknodat(&*dir, name, kind, mode, device)
        };
        match entry.kind {
            Kind::Directory => return self.directory(&dir, path, entry, archive),
            Kind::File => return self.file(&dir, path, entry, archive),
            Kind::HardLink => return self.hard_link(&dir, path, entry, archive),
            Kind::Symlink => {
                if entry.link.is_empty() || entry.link.len() > 4095 || entry.link.contains(&0) {
                    return Err(Fault::Bad(format!(
                        "the symbolic link {} has no proper target",
                        shown(path)
                    )));
                }
                let make = |name: &[u8]| rustix::fs::symlinkat(&entry.link[..], &*dir, name);
                self.replacing(&dir, path, "make the symbolic link", archive, make)?;
            }
            Kind::Fifo => self.replacing(&dir, path, "make the FIFO", archive, node(FileType::Fifo, 0))?,
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
                self.replacing(&dir, path, "make the device", archive, node(kind, device))?;
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

    /// Runs something that makes a file; if there is one already it is removed first, and if it is of this layer its
    /// content goes to the tape.
    fn replacing<R: BufRead, T>(
        &mut self,
        dir: &OwnedFd,
        path: &[u8],
        what: &'static str,
        archive: &mut Archive<R>,
        make: impl FnMut(&[u8]) -> rustix::io::Result<T>,
    ) -> Outcome<T> {
        self.usage.inodes += 1;
        let ours = (self.style == WhiteoutStyle::Apply).then_some(&self.ours);
        self.root.replacing(dir, path, what, &mut Leaving::kept(archive.tape(), ours), make)
    }

    fn directory<R: BufRead>(
        &mut self,
        dir: &OwnedFd,
        path: &[u8],
        entry: &Entry,
        archive: &mut Archive<R>,
    ) -> Outcome<()> {
        self.usage.inodes += 1;
        self.usage.bytes += DISK_BLOCK;
        match self.root.look(dir, path)? {
            Some(stat) if is_dir(&stat) => {}
            Some(_) => {
                let ours = (self.style == WhiteoutStyle::Apply).then_some(&self.ours);
                self.root.remove(dir, path, &mut Leaving::kept(archive.tape(), ours))?;
                self.instead(dir, path, 0o700)?;
            }
            None => self.root.make_dir(dir, path, 0o700)?,
        }
        let fd = self.root.open_dir(dir, path)?;
        self.directory_attributes(&fd, path, entry)
    }

    /// A new directory in the place of something else that was removed.
    fn instead(&mut self, dir: &OwnedFd, path: &[u8], mode: u32) -> Outcome<()> {
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

    fn file<R: BufRead>(
        &mut self,
        dir: &OwnedFd,
        path: &[u8],
        entry: &Entry,
        archive: &mut Archive<R>,
    ) -> Outcome<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let make = |name: &[u8]| rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR);
        let file = File::from(self.replacing(dir, path, "create", archive, make)?);
        let whole = [(0, entry.stored)];
        for (offset, length) in entry.sparse.as_ref().map_or(&whole[..], |s| &s.extents) {
            self.write(&file, path, *offset, *length, archive)?;
        }
        if let Some(sparse) = &entry.sparse {
            file.set_len(sparse.size).map_err(|e| self.root.fault("set the length of", path, e))?;
        }
        self.usage.bytes += entry.stored.next_multiple_of(DISK_BLOCK);
        let extents = entry.sparse.as_ref().map(|s| &s.extents[..]);
        archive.record(|tape| tape.file(path, entry.size(), extents))?;
        let fd = OwnedFd::from(file);
        self.attributes(&fd, path, entry)?;
        rustix::fs::futimens(&fd, &times(entry.mtime))
            .map_err(|e| self.root.fault("set the times of", path, e))
    }

    /// Writes the next bytes of the archive's content.
    fn write<R: BufRead>(
        &self,
        file: &File,
        path: &[u8],
        mut offset: u64,
        mut left: u64,
        archive: &mut Archive<R>,
    ) -> Outcome<()> {
        while left > 0 {
            let chunk = archive.content()?;
            let n = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
            if n == 0 {
                return Err(Fault::Bad(format!("the file {} is shorter than it should be", shown(path))));
            }
            file.write_all_at(&chunk[..n], offset).map_err(|e| self.root.fault("write", path, e))?;
            archive.consume(n);
            offset += n as u64;
            left -= n as u64;
        }
        Ok(())
    }

    /// A further name of a file of this layer. Owner, mode and times are the file's.
    fn hard_link<R: BufRead>(
        &mut self,
        dir: &OwnedFd,
        path: &[u8],
        entry: &Entry,
        archive: &mut Archive<R>,
    ) -> Outcome<()> {
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
        self.replacing(dir, path, "make the hard link", archive, make)?;
        if let Some(tape) = archive.tape() {
            tape.link(path);
        }
        Ok(())
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
                    self.root.remove(at, path, &mut Leaving::nothing_of_ours())?;
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
            return if self.ours.contains(path) {
                self.purge(path)
            } else {
                self.root.remove(&dir, path, &mut Leaving::nothing_of_ours())
            };
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
                    self.root.remove(&dir, &child, &mut Leaving::nothing_of_ours())?;
                }
            }
        }
        Ok(())
    }

    /// Sets the times of directories, now that nothing is made in them any more.
    fn finish(mut self) -> Outcome<Usage> {
        for (path, mtime) in std::mem::take(&mut self.dirs) {
            // It may have been replaced since.
            let Ok(dir) = self.root.dir(&path)? else { continue };
            rustix::fs::utimensat(&*dir, ".", &times(mtime), AtFlags::empty())
                .map_err(|e| self.root.fault("set the times of", &path, e))?;
        }
        Ok(self.usage)
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
