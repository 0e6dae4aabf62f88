//! The end of an extraction: what needs something of the layers below, and the times of directories.
//!
//! On OverlayFS layers are extracted side by side. A hard link to a file of a lower layer, a directory that the layer has
//! entries in but no entry for, and an opaque root wait until the layers below are there; then what is needed of them is
//! copied up, with all attributes, as OverlayFS itself would have done had the layer been made on top of them.

use std::{collections::BTreeMap, fs::File, io, os::fd::OwnedFd, rc::Rc};

use moxlet_storage::WhiteoutStyle;
use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, RawMode, SeekFrom, Stat, Timespec, Uid, XattrFlags},
    io::Errno,
};

use super::{
    Fault, Outcome,
    below::{Found, Stack, lies_in},
    extract::{Extraction, times},
    root::{Leaving, Obstacle, base, is_dir, is_link, parent},
    shown,
};

/// How an extraction has ended.
pub(super) enum Settled {
    Done,
    /// It has to be done again with the layers below at hand, since links of theirs lead to where entries belong.
    Again(Box<Stack>),
}

impl Extraction<'_> {
    pub(super) fn settle(&mut self) -> Outcome<Settled> {
        if self.style == WhiteoutStyle::Overlay
            && let Some(stack) = self.copy_up()?
        {
            return Ok(Settled::Again(Box::new(stack)));
        }
        // Of two notes of a directory the first is what it was in the layers below, the last its own entry.
        for (path, mtime) in std::mem::take(&mut self.dirs) {
            // It may have been replaced since.
            let Ok(dir) = self.root.dir(&path)? else { continue };
            rustix::fs::utimensat(&*dir, ".", &times(mtime), AtFlags::empty())
                .map_err(|e| self.root.fault("set the times of", &path, e))?;
        }
        Ok(Settled::Done)
    }

    /// The layers below come back where the layer has to be extracted again.
    fn copy_up(&mut self) -> Outcome<Option<Stack>> {
        let implied = std::mem::take(&mut self.implied);
        let links = std::mem::take(&mut self.deferred);
        let all_hidden = self.hidden.contains(&b""[..]);
        if implied.is_empty() && links.is_empty() && self.passed.is_empty() && !all_hidden {
            return Ok(None);
        }
        let mut stack = match (self.stack.take(), self.below.take()) {
            (Some(stack), _) => stack,
            (None, Some(below)) => {
                let mut stack = Stack::open(below()?)?;
                let names = implied.keys().chain(&self.passed);
                if self.meets_link(&mut stack, names)? || leads_on(&mut stack, links.values())? {
                    return Ok(Some(stack));
                }
                stack
            }
            (None, None) if all_hidden => {
                let why = "its root directory is opaque, and what lies below is not known";
                return Err(Fault::Bad(why.into()));
            }
            (None, None) => {
                return match links.into_iter().next() {
                    Some((path, target)) => Err(no_target(&path, &target)),
                    None => Ok(None),
                };
            }
        };
        if self.hidden.contains(&b""[..]) {
            self.hide_all(&stack)?;
        }
        for (path, as_below) in &implied {
            self.adopt(&mut stack, path, *as_below)?;
        }
        // Names of one file below are names of one file again.
        let mut by_target: BTreeMap<Vec<u8>, Vec<Vec<u8>>> = BTreeMap::new();
        for (path, target) in links {
            by_target.entry(target).or_default().push(path);
        }
        for (target, paths) in by_target {
            self.link_up(&mut stack, &target, &paths)?;
        }
        Ok(None)
    }

    /// Whether something of the layers below is hidden by this one, itself apart.
    fn is_hidden(&self, path: &[u8]) -> bool {
        lies_in(path, |dir| self.hidden.contains(dir))
    }

    /// Gives a directory without an entry what the layers below have there.
    fn adopt(&mut self, stack: &mut Stack, path: &[u8], as_below: bool) -> Outcome<()> {
        match stack.find(path)? {
            Found::Directory(lower) if as_below && (path.is_empty() || !self.is_hidden(path)) => {
                // It may have been replaced since.
                let Ok(dir) = self.root.dir(path)? else { return Ok(()) };
                let ours = self.root.reopen(&dir, path)?;
                let stat = rustix::fs::fstat(&*lower).map_err(|e| stack.fault("look at", path, e))?;
                self.copy_attributes(stack, &lower, &stat, &ours, path)?;
                self.dirs.push((path.to_vec(), modified(&stat)));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Copies a file of the layers below to where it is, and links it to its further names.
    fn link_up(&mut self, stack: &mut Stack, target: &[u8], paths: &[Vec<u8>]) -> Outcome<()> {
        let Some(first) = paths.first() else { return Ok(()) };
        let (lower, stat) = match stack.find(target)? {
            Found::Other(lower, stat) => (lower, stat),
            Found::Directory(_) => return Err(link_fault(first, target, "is one to a directory")),
            Found::Nothing | Found::Blocked(..) => return Err(no_target(first, target)),
        };
        let open = |this: &mut Self, path: &[u8]| {
            let dir = this.root.dir(parent(path))?;
            dir.map_err(|_| link_fault(path, target, "lies in a directory that is gone"))
        };
        let dir = open(self, first)?;
        // A place-holder is there.
        self.root.remove(&dir, first, &mut Leaving::nothing_of_ours())?;
        self.copy(stack, &lower, &stat, target, &dir, first)?;
        for path in &paths[1..] {
            let to = open(self, path)?;
            self.root.remove(&to, path, &mut Leaving::nothing_of_ours())?;
            self.link(&dir, first, &to, path)?;
        }
        // The file itself is one of its names, unless the layer has something else there or hides it.
        if self.is_hidden(target) || matches!(self.root.dir(parent(target))?, Err(Obstacle::NotADirectory)) {
            return Ok(());
        }
        let to = self.adopted_dir(stack, parent(target))?;
        match self.root.look(&to, target)? {
            Some(_) => Ok(()),
            None => self.link(&dir, first, &to, target),
        }
    }

    fn link(&self, from: &OwnedFd, name: &[u8], to: &OwnedFd, path: &[u8]) -> Outcome<()> {
        rustix::fs::linkat(from, base(name), to, base(path), AtFlags::empty())
            .map_err(|e| self.root.fault("make the hard link", path, e))
    }

    /// A directory that is made as far as it is missing, with the attributes that it has below.
    fn adopted_dir(&mut self, stack: &mut Stack, path: &[u8]) -> Outcome<Rc<OwnedFd>> {
        if let Ok(dir) = self.root.dir(path)? {
            return Ok(dir);
        }
        let above = self.adopted_dir(stack, parent(path))?;
        self.root.make_dir(&above, path, 0o755)?;
        self.adopt(stack, path, true)?;
        match self.root.dir(path)? {
            Ok(dir) => Ok(dir),
            Err(_) => Err(self.root.fault("open", path, Errno::NOTDIR)),
        }
    }

    fn copy(
        &mut self,
        stack: &Stack,
        lower: &OwnedFd,
        stat: &Stat,
        target: &[u8],
        dir: &OwnedFd,
        path: &[u8],
    ) -> Outcome<()> {
        let (name, kind) = (base(path), FileType::from_raw_mode(stat.st_mode));
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        let fault = |e: Errno| self.root.fault("copy up", path, e);
        let stamps = times(modified(stat));
        match kind {
            FileType::RegularFile => {
                let from = File::from(stack.read(lower, target)?);
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let to = rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR).map_err(fault)?;
                let to = File::from(to);
                copy_data(&from, &to).map_err(|e| self.root.fault("copy up", path, e))?;
                let (from, to) = (OwnedFd::from(from), OwnedFd::from(to));
                self.copy_attributes(stack, &from, stat, &to, path)?;
                rustix::fs::futimens(&to, &stamps).map_err(fault)?;
                self.usage.bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
                return Ok(());
            }
            FileType::Symlink => {
                let to = rustix::fs::readlinkat(lower, base(target), Vec::new()).map_err(fault)?;
                rustix::fs::symlinkat(to, dir, name).map_err(fault)?;
            }
            _ => rustix::fs::mknodat(dir, name, kind, mode, stat.st_rdev).map_err(fault)?,
        }
        let nofollow = AtFlags::SYMLINK_NOFOLLOW;
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        rustix::fs::chownat(dir, name, Some(uid), Some(gid), nofollow).map_err(fault)?;
        if kind != FileType::Symlink {
            rustix::fs::chmodat(dir, name, mode, AtFlags::empty()).map_err(fault)?;
        }
        rustix::fs::utimensat(dir, name, &stamps, nofollow).map_err(fault)
    }

    fn copy_attributes(
        &self,
        stack: &Stack,
        from: &OwnedFd,
        stat: &Stat,
        to: &OwnedFd,
        path: &[u8],
    ) -> Outcome<()> {
        let fault = |e: Errno| self.root.fault("copy the attributes of", path, e);
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        rustix::fs::fchown(to, Some(uid), Some(gid)).map_err(fault)?;
        rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode as RawMode & 0o7777)).map_err(fault)?;
        for (name, value) in xattrs(from).map_err(|e| stack.fault("read the attributes of", path, e))? {
            rustix::fs::fsetxattr(to, &name[..], &value, XattrFlags::empty()).map_err(fault)?;
        }
        Ok(())
    }

    /// Hides all that the layers below have, name by name: the kernel does not look for the attribute at the top of a
    /// layer (fs/overlayfs/super.c).
    fn hide_all(&mut self, stack: &Stack) -> Outcome<()> {
        let top = self.root.open_top()?;
        for name in stack.top_names()? {
            match self.root.look(&top, &name)? {
                None => self.root.mark_removed(&top, &name)?,
                Some(stat) if is_dir(&stat) => {
                    let fd = self.root.open_dir(&top, &name)?;
                    self.hide_below(&fd, &name)?;
                }
                Some(_) => {}
            }
        }
        Ok(())
    }
}

/// The extended attributes of a file that are not OverlayFS' own.
pub(super) fn xattrs(fd: &OwnedFd) -> rustix::io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut names = Vec::new();
    let length = match rustix::fs::flistxattr_query(fd) {
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        length => length?,
    };
    names.resize(length, 0);
    let length = rustix::fs::flistxattr(fd, &mut names[..])?;
    names.truncate(length);
    let mut found = Vec::new();
    for name in names.split(|b| *b == 0).filter(|n| !n.is_empty()) {
        if name.starts_with(b"trusted.overlay.") {
            continue;
        }
        let mut value = vec![0; 64 << 10];
        let length = rustix::fs::fgetxattr(fd, name, &mut value[..])?;
        value.truncate(length);
        found.push((name.to_vec(), value));
    }
    Ok(found)
}

/// Copies a file's data, not its holes.
fn copy_data(from: &File, to: &File) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let size = from.metadata()?.len();
    to.set_len(size)?;
    let mut buffer = vec![0; 128 << 10];
    let mut at = 0;
    while at < size {
        let data = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => break,
            data => data?,
        };
        let hole = rustix::fs::seek(from, SeekFrom::Hole(data))?;
        at = data;
        while at < hole {
            let want = usize::try_from(hole - at).unwrap_or(usize::MAX).min(buffer.len());
            let n = from.read_at(&mut buffer[..want], at)?;
            if n == 0 {
                return Ok(());
            }
            to.write_all_at(&buffer[..n], at)?;
            at += n as u64;
        }
    }
    Ok(())
}

pub(super) fn modified(stat: &Stat) -> Timespec {
    Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as i64 }
}

/// Whether one of the paths leads through a link of the layers below.
fn leads_on<'p>(stack: &mut Stack, mut paths: impl Iterator<Item = &'p Vec<u8>>) -> Outcome<bool> {
    paths.try_fold(false, |found, path| {
        Ok(found || matches!(stack.find(path)?, Found::Blocked(stat) if is_link(&stat)))
    })
}

pub(super) fn link_fault(path: &[u8], target: &[u8], why: &str) -> Fault {
    Fault::Bad(format!("the hard link {} to {} {why}", shown(path), shown(target)))
}

pub(super) fn no_target(path: &[u8], target: &[u8]) -> Fault {
    link_fault(path, target, "has no target")
}
