//! Extraction of a layer's entries, in the order in which they come; where two have one name, the last one wins.
//!
//! What a layer removes from those below ("whiteouts", OCI image spec, layer.md) never touches what the layer itself
//! brings, in whatever order it comes. With [`WhiteoutStyle::Overlay`] the draft holds nothing else, and a directory
//! that takes the place of something else hides what lies below it. With [`WhiteoutStyle::Apply`] the draft holds the
//! layers below as well, so what the layer has brought is kept in mind.
//!
//! An entry whose directory is a symbolic link goes to where the link leads, with the layer's directory as the root of all
//! paths. The link is followed here, name by name, and marks of what is removed are such entries as well; files are still
//! made beneath the root and without links. What a layer removes is in [`mod@super::removal`].

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::BufRead,
    os::{fd::OwnedFd, unix::fs::FileExt},
    rc::Rc,
};

use moxlet_storage::{Usage, WhiteoutStyle};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags, makedev,
};

use super::{
    Below, Fault, Outcome, Target,
    again::{Whose, again},
    archive::{Archive, Entry, Kind, MAX_ENTRIES},
    below::{Stack, lies_in},
    root::{Leaving, Obstacle, Ours, Root, base, clean, is_dir, is_whiteout, parent},
    settle::{Settled, link_fault, modified, no_target, xattrs},
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
pub(super) fn extract<R: BufRead>(input: R, target: Target<'_>) -> Outcome<(R, Usage)> {
    let (root, tape) = (target.root, target.tape);
    let recorder = tape.map(|path| {
        Recorder::create(path).map_err(|source| Fault::System { what: "create", path: path.into(), source })
    });
    let recorder = recorder.transpose()?;
    let mut extraction = Extraction::new(target)?;
    let (input, recorder) = extraction.run(Archive::new(input, recorder))?;
    let settled = extraction.settle()?;
    Recorder::complete(recorder)?;
    match (settled, tape) {
        (Settled::Done, _) => Ok((input, extraction.usage)),
        (Settled::Again(stack), Some(tape)) => Ok((input, again(root, tape, *stack)?)),
        (Settled::Again(_), None) => {
            let why = "it has entries behind a symbolic link of a layer below, and no tape to make them from";
            Err(Fault::Bad(why.into()))
        }
    }
}

pub(super) struct Extraction<'a> {
    pub(super) root: Root,
    pub(super) style: WhiteoutStyle,
    pub(super) bottom: bool,
    pub(super) below: Option<Below<'a>>,
    /// The layers below, where they are at hand from the beginning.
    pub(super) stack: Option<Stack>,
    /// Names that links of the layer led through and that it does not have itself.
    pub(super) passed: BTreeSet<Vec<u8>>,
    /// How many entries have come.
    pub(super) number: u64,
    pub(super) ours: Ours,
    /// Directories of the layers below whose times were noted.
    noted: Ours,
    /// Directories that the layer has an entry for.
    pub(super) named: Ours,
    /// Directories in which nothing of the layers below is left.
    pub(super) purged: Ours,
    /// The times of directories, which change with every entry in them.
    pub(super) dirs: Vec<(Vec<u8>, Timespec)>,
    /// Directories that had entries in them before one of their own, and whether they still have none: then they are as
    /// in the layers below.
    pub(super) implied: BTreeMap<Vec<u8>, bool>,
    /// Directories that hide what the layers below have in them.
    pub(super) hidden: BTreeSet<Vec<u8>>,
    /// Hard links to files of the layers below, and their targets; place-holders are where they will be.
    pub(super) deferred: BTreeMap<Vec<u8>, Vec<u8>>,
    kept: usize,
    made: u64,
    pub(super) usage: Usage,
}

impl<'a> Extraction<'a> {
    pub(super) fn new(target: Target<'a>) -> Outcome<Self> {
        let mut implied = BTreeMap::new();
        if target.style == WhiteoutStyle::Overlay && !target.bottom {
            implied.insert(Vec::new(), true);
        }
        Ok(Self {
            root: Root::at(target.root)?,
            style: target.style,
            bottom: target.bottom,
            below: target.below,
            stack: None,
            passed: BTreeSet::new(),
            number: 0,
            ours: Ours::default(),
            noted: Ours::default(),
            named: Ours::default(),
            purged: Ours::default(),
            dirs: Vec::new(),
            implied,
            hidden: BTreeSet::new(),
            deferred: BTreeMap::new(),
            kept: 0,
            made: 0,
            usage: Usage::default(),
        })
    }

    /// Extracts all entries; what is left of the archive is read.
    pub(super) fn run<R: BufRead>(&mut self, mut archive: Archive<R>) -> Outcome<(R, Option<Recorder>)> {
        while let Some(entry) = archive.next()? {
            self.entry(&entry, &mut archive)?;
        }
        archive.rest()
    }

    fn entry<R: BufRead>(&mut self, entry: &Entry, archive: &mut Archive<R>) -> Outcome<()> {
        self.number += 1;
        let path = clean(&entry.path)?;
        if path.is_empty() {
            if entry.kind != Kind::Directory {
                return Err(Fault::Bad(format!("the root entry {} is not a directory", shown(&entry.path))));
            }
            let fd = self.root.open_top()?;
            self.strip(&fd, &path)?;
            return self.directory_attributes(&fd, &path, entry);
        }
        let marks = |c: &[u8]| c.starts_with(WHITEOUT) && !c.starts_with(WHITEOUT_META);
        if parent(&path).split(|b| *b == b'/').any(marks) {
            return Err(Fault::Bad(format!("the entry {} lies in a whiteout", shown(&path))));
        }
        let meta = |path: &[u8]| path.split(|b| *b == b'/').any(|c| c.starts_with(WHITEOUT_META));
        if base(&path) == OPAQUE && !meta(parent(&path)) {
            let path = self.located(path, Whose::Entry, archive)?;
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
            let path = self.located(joined(parent(&path), name), Whose::Entry, archive)?;
            return self.whiteout(&path);
        }
        let path = self.located(path, Whose::Entry, archive)?;
        self.forget(&path, entry.kind);
        self.make(entry, &path, archive)?;
        if self.style == WhiteoutStyle::Apply {
            self.ours.insert(&path);
        }
        Ok(())
    }

    /// What was noted of a path does not hold any more once an entry takes it.
    fn forget(&mut self, path: &[u8], kind: Kind) {
        self.name(path);
        self.deferred.remove(path);
        if kind != Kind::Directory {
            remove_below(&mut self.deferred, path);
        }
    }

    /// A directory is not as in the layers below, whatever was in it before.
    pub(super) fn name(&mut self, path: &[u8]) {
        if let Some(as_below) = self.implied.get_mut(path) {
            *as_below = false;
        }
    }

    /// Notes something that is looked at once more at the end.
    pub(super) fn keep(&mut self, bytes: usize) -> Outcome<()> {
        self.kept += bytes + size_of::<(Vec<u8>, Timespec)>();
        if self.kept > MAX_KEPT {
            return Err(Fault::Bad("the names that have to be kept in mind are too long in all".into()));
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
            Kind::Fifo => {
                self.replacing(&dir, path, "make the FIFO", archive, node(FileType::Fifo, 0))?;
            }
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
            Some(stat) if is_dir(&stat) => self.strip(&self.root.open_dir(dir, path)?, path)?,
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
    pub(super) fn instead(&mut self, dir: &OwnedFd, path: &[u8], mode: u32) -> Outcome<()> {
        self.root.make_dir(dir, path, mode)?;
        if self.style == WhiteoutStyle::Overlay && !self.bottom {
            let fd = self.root.open_dir(dir, path)?;
            self.hide(&fd, path)?;
        }
        Ok(())
    }

    fn directory_attributes(&mut self, fd: &OwnedFd, path: &[u8], entry: &Entry) -> Outcome<()> {
        self.name(path);
        if self.style == WhiteoutStyle::Apply {
            self.named.insert_one(path);
        }
        self.keep(path.len())?;
        self.dirs.push((path.to_vec(), entry.mtime));
        self.attributes(fd, path, entry)
    }

    /// A directory that is there already has the attributes of its new entry alone. Labels are the machine's.
    fn strip(&self, fd: &OwnedFd, path: &[u8]) -> Outcome<()> {
        let fault = |e| self.root.fault("remove the attributes of", path, e);
        for (name, _) in xattrs(fd).map_err(fault)? {
            if name.starts_with(b"user.") {
                rustix::fs::fremovexattr(fd, &name[..]).map_err(fault)?;
            }
        }
        Ok(())
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

    /// A further name of a file. Owner, mode and times are the file's.
    fn hard_link<R: BufRead>(
        &mut self,
        dir: &OwnedFd,
        path: &[u8],
        entry: &Entry,
        archive: &mut Archive<R>,
    ) -> Outcome<()> {
        let from = clean(&entry.link)?;
        if from.is_empty() {
            return Err(link_fault(path, &entry.link, "is one to the root directory"));
        }
        let from = self.located(from, Whose::Target, archive)?;
        if from == path {
            return Err(link_fault(path, &from, "is one to itself"));
        }
        if from.starts_with(path) && from.get(path.len()) == Some(&b'/') {
            return Err(link_fault(path, &from, "takes the place of its target's directory"));
        }
        if let Some(target) = self.deferred.get(&from).cloned() {
            return self.defer(dir, path, target, archive);
        }
        let found = match self.root.dir(parent(&from))? {
            Ok(from_dir) => self.root.look(&from_dir, &from)?.map(|stat| (from_dir, stat)),
            Err(Obstacle::Missing) => None,
            Err(Obstacle::NotADirectory) => return Err(no_target(path, &from)),
        };
        let from_dir = match found {
            // It may be in a layer below.
            None if self.style == WhiteoutStyle::Overlay
                && !self.bottom
                && (self.below.is_some() || self.stack.is_some())
                && !lies_in(&from, |dir| self.hidden.contains(dir)) =>
            {
                return self.defer(dir, path, from, archive);
            }
            None => return Err(no_target(path, &from)),
            Some((_, stat)) if is_whiteout(&stat) => return Err(no_target(path, &from)),
            Some((_, stat)) if is_dir(&stat) => return Err(link_fault(path, &from, "is one to a directory")),
            Some((from_dir, _)) => from_dir,
        };
        let make = |name: &[u8]| rustix::fs::linkat(&*from_dir, base(&from), dir, name, AtFlags::empty());
        self.replacing(dir, path, "make the hard link", archive, make)?;
        if let Some(tape) = archive.tape() {
            tape.link(path);
        }
        Ok(())
    }

    /// Leaves a place-holder for a hard link to a file of the layers below, which may not be there yet.
    fn defer<R: BufRead>(
        &mut self,
        dir: &OwnedFd,
        path: &[u8],
        target: Vec<u8>,
        archive: &mut Archive<R>,
    ) -> Outcome<()> {
        self.keep(path.len() + target.len())?;
        let make =
            |name: &[u8]| rustix::fs::mknodat(dir, name, FileType::RegularFile, Mode::RUSR | Mode::WUSR, 0);
        self.replacing(dir, path, "make a place for the hard link", archive, make)?;
        if let Some(tape) = archive.tape() {
            tape.link(path);
        }
        self.deferred.insert(path.to_vec(), target);
        Ok(())
    }

    /// The directory that a path lies in; what is missing of it is made.
    pub(super) fn parent_dir(&mut self, path: &[u8]) -> Outcome<Rc<OwnedFd>> {
        let wanted = parent(path);
        if let Ok(dir) = self.root.dir(wanted)? {
            self.note_below(&dir, wanted)?;
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
                    self.note_below(&at, parent(part))?;
                    self.implied_dir(&at, part, obstacle)?;
                    self.root.open_dir(&at, part)?
                }
            };
        }
        Ok(self.root.remember(wanted, at))
    }

    /// Notes the time of a directory of the layers below before the layer makes something in it: that is no change of
    /// the directory itself.
    fn note_below(&mut self, dir: &OwnedFd, path: &[u8]) -> Outcome<()> {
        if self.style == WhiteoutStyle::Overlay || self.bottom || self.noted.contains(path) {
            return Ok(());
        }
        self.noted.insert_one(path);
        if self.ours.contains(path) || self.named.contains(path) {
            return Ok(());
        }
        let stat = rustix::fs::fstat(dir).map_err(|e| self.root.fault("look at", path, e))?;
        self.keep(path.len())?;
        self.dirs.push((path.to_vec(), modified(&stat)));
        Ok(())
    }

    /// Makes a directory that the layer has no entry for, but entries in.
    fn implied_dir(&mut self, at: &OwnedFd, path: &[u8], obstacle: Obstacle) -> Outcome<()> {
        self.made += 1;
        if self.made > MAX_ENTRIES {
            return Err(Fault::Bad(format!("it has more than {MAX_ENTRIES} directories without an entry")));
        }
        match obstacle {
            Obstacle::Missing => {
                self.root.make_dir(at, path, 0o755)?;
                if self.style == WhiteoutStyle::Overlay && !self.bottom {
                    self.keep(path.len())?;
                    self.implied.insert(path.to_vec(), true);
                }
                Ok(())
            }
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
    /// the mark that it has been removed.
    fn may_give_way(&self, path: &[u8], stat: Option<&Stat>) -> bool {
        match self.style {
            WhiteoutStyle::Overlay => stat.is_some_and(is_whiteout),
            WhiteoutStyle::Apply => !self.ours.contains(path),
        }
    }
}

/// Removes what lies beneath a path; nothing else is looked at, since this is done for each entry of a layer.
fn remove_below(names: &mut BTreeMap<Vec<u8>, Vec<u8>>, path: &[u8]) {
    let begin = [path, b"/"].concat();
    while let Some((name, _)) = names.range(begin.clone()..).next() {
        if !name.starts_with(&begin) {
            return;
        }
        let name = name.clone();
        names.remove(&name);
    }
}

pub(super) fn joined(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() { name.to_vec() } else { [dir, b"/", name].concat() }
}

fn uid(entry: &Entry) -> Option<Uid> {
    Some(Uid::from_raw(entry.uid))
}

fn gid(entry: &Entry) -> Option<Gid> {
    Some(Gid::from_raw(entry.gid))
}

pub(super) fn times(mtime: Timespec) -> Timestamps {
    Timestamps { last_access: mtime, last_modification: mtime }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_beneath_a_path_is_removed_and_its_neighbours_stay() {
        let all = ["a", "a-b", "a/b", "a/b/c", "a/z", "a0", "b"];
        let mut names = all.iter().map(|n| (n.as_bytes().to_vec(), Vec::new())).collect();
        remove_below(&mut names, b"a");
        let left: Vec<_> = names.keys().map(|n| String::from_utf8_lossy(n).into_owned()).collect();
        assert_eq!(left, ["a", "a-b", "a0", "b"]);
        remove_below(&mut names, b"c");
        assert_eq!(names.len(), 4);
    }
}
