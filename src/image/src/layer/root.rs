//! The directory that a layer is extracted into. Nothing outside of it can be reached: every path is resolved by the
//! kernel beneath it and without links, and files are made, looked at and removed in a parent that is held open.

use std::{
    collections::HashSet,
    ffi::CString,
    hash::{BuildHasher, RandomState},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    rc::Rc,
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, RawMode, ResolveFlags, Stat},
    io::Errno,
};

use super::{Fault, Outcome, shown, tape::Recorder};

/// `PATH_MAX` and `NAME_MAX`, without the final zero.
const MAX_PATH: usize = 4095;
const MAX_NAME: usize = 255;
/// As many links as the kernel follows in one path (path_resolution(7)).
const MAX_LINKS: usize = 40;
/// Names that are looked at in one layer in order to follow links.
const MAX_STEPS: u64 = 4 << 20;

const PATH_DIR: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
pub(super) const READ_DIR: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const BENEATH: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// What has been found at a place where a directory is needed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Obstacle {
    /// Nothing.
    Missing,
    /// Something else.
    NotADirectory,
}

/// Tells where the link leads that is at a path outside of the draft, if there is one.
pub(super) type Beyond<'a> = &'a mut dyn FnMut(&[u8]) -> Outcome<Option<Vec<u8>>>;

/// Who looks at what is removed before it goes.
pub(super) struct Leaving<'a> {
    tape: Option<&'a mut Recorder>,
    /// What the layer has brought, where there are other things as well.
    ours: Option<&'a Ours>,
}

impl<'a> Leaving<'a> {
    /// Contents that the layer has brought are kept on its tape.
    pub(super) fn kept(tape: Option<&'a mut Recorder>, ours: Option<&'a Ours>) -> Self {
        Self { tape, ours }
    }

    /// Nothing of the layer itself goes.
    pub(super) fn nothing_of_ours() -> Self {
        Self { tape: None, ours: None }
    }

    fn goes(&mut self, dir: &OwnedFd, name: &[u8], path: impl FnOnce() -> Vec<u8>) -> Outcome<()> {
        let Some(tape) = &mut self.tape else { return Ok(()) };
        let path = path();
        if self.ours.is_some_and(|ours| !ours.contains(&path)) || !tape.wants(&path) {
            return Ok(());
        }
        // Nothing but a file is opened: a device might take it for a command.
        let Ok(stat) = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) else { return Ok(()) };
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let keep = |tape: &mut Recorder| {
            let file = rustix::fs::openat(dir, name, flags, Mode::empty())?;
            tape.keep(&path, file.into())
        };
        keep(tape).map_err(|source| match source.kind() {
            io::ErrorKind::FileTooLarge => Fault::Bad(format!(
                "it replaces too many or too large files of its own, such as {}",
                shown(&path)
            )),
            _ => Fault::System { what: "keep", path: tape.path().to_owned(), source },
        })
    }
}

/// The paths that a layer has brought, as hashes: names of four million entries would not fit.
#[derive(Default)]
pub(super) struct Ours {
    state: RandomState,
    paths: HashSet<u64>,
}

impl Ours {
    pub(super) fn contains(&self, path: &[u8]) -> bool {
        self.paths.contains(&self.state.hash_one(path))
    }

    /// A path alone.
    pub(super) fn insert_one(&mut self, path: &[u8]) {
        self.paths.insert(self.state.hash_one(path));
    }

    /// A path and the directories on the way to it.
    pub(super) fn insert(&mut self, mut path: &[u8]) {
        while !path.is_empty() && self.paths.insert(self.state.hash_one(path)) {
            path = parent(path);
        }
    }
}

/// A draft's directory.
pub(super) struct Root {
    fd: OwnedFd,
    path: PathBuf,
    /// The directory that was used last: entries of one directory mostly follow each other.
    last: Option<(Vec<u8>, Rc<OwnedFd>)>,
    steps: u64,
    #[cfg(test)]
    pub(super) lists: std::cell::Cell<usize>,
}

impl Root {
    pub(super) fn at(path: &Path) -> Outcome<Self> {
        let path = path.to_owned();
        let fd = rustix::fs::openat(CWD, &path, READ_DIR, Mode::empty());
        let fd = fd.map_err(|e| Fault::System { what: "open", path: path.clone(), source: e.into() })?;
        Ok(Self {
            fd,
            path,
            last: None,
            steps: 0,
            #[cfg(test)]
            lists: std::cell::Cell::default(),
        })
    }

    /// A failure of the system at a path of the layer.
    pub(super) fn fault(&self, what: &'static str, path: &[u8], error: impl Into<io::Error>) -> Fault {
        // The name is the image's and goes into logs.
        let name: String =
            String::from_utf8_lossy(path).chars().take(400).flat_map(char::escape_debug).collect();
        Fault::System { what, path: self.path.join(name), source: error.into() }
    }

    /// The directory of a path, if it is there and is one.
    pub(super) fn dir(&mut self, path: &[u8]) -> Outcome<Result<Rc<OwnedFd>, Obstacle>> {
        if let Some((known, fd)) = &self.last
            && known == path
        {
            return Ok(Ok(Rc::clone(fd)));
        }
        let at = if path.is_empty() { b"." } else { path };
        match rustix::fs::openat2(&self.fd, at, PATH_DIR, Mode::empty(), BENEATH) {
            Ok(fd) => Ok(Ok(self.remember(path, fd))),
            Err(Errno::NOENT) => Ok(Err(Obstacle::Missing)),
            Err(Errno::NOTDIR | Errno::LOOP) => Ok(Err(Obstacle::NotADirectory)),
            Err(e) => Err(self.fault("open", path, e)),
        }
    }

    /// The same for a name in a directory that is open.
    pub(super) fn step(&self, at: &OwnedFd, path: &[u8]) -> Outcome<Result<OwnedFd, Obstacle>> {
        match rustix::fs::openat(at, base(path), PATH_DIR, Mode::empty()) {
            Ok(fd) => Ok(Ok(fd)),
            Err(Errno::NOENT) => Ok(Err(Obstacle::Missing)),
            Err(Errno::NOTDIR | Errno::LOOP) => Ok(Err(Obstacle::NotADirectory)),
            Err(e) => Err(self.fault("open", path, e)),
        }
    }

    /// Keeps a directory at hand.
    pub(super) fn remember(&mut self, path: &[u8], fd: OwnedFd) -> Rc<OwnedFd> {
        let fd = Rc::new(fd);
        self.last = Some((path.to_vec(), Rc::clone(&fd)));
        fd
    }

    /// A directory, to be read or to have its attributes set.
    pub(super) fn open_dir(&self, parent: &OwnedFd, path: &[u8]) -> Outcome<OwnedFd> {
        rustix::fs::openat(parent, base(path), READ_DIR, Mode::empty())
            .map_err(|e| self.fault("open", path, e))
    }

    /// The root itself, likewise.
    pub(super) fn open_top(&self) -> Outcome<OwnedFd> {
        self.reopen(&self.fd, b"")
    }

    /// A directory that is open, to be read or to have its attributes set.
    pub(super) fn reopen(&self, dir: &OwnedFd, path: &[u8]) -> Outcome<OwnedFd> {
        rustix::fs::openat(dir, ".", READ_DIR, Mode::empty()).map_err(|e| self.fault("open", path, e))
    }

    /// What is at a path, links not followed.
    pub(super) fn look(&self, parent: &OwnedFd, path: &[u8]) -> Outcome<Option<Stat>> {
        match rustix::fs::statat(parent, base(path), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(self.fault("look at", path, e)),
        }
    }

    /// Makes a directory that is not there, with a mode that no umask cuts.
    pub(super) fn make_dir(&self, parent: &OwnedFd, path: &[u8], mode: RawMode) -> Outcome<()> {
        let (name, mode) = (base(path), Mode::from_raw_mode(mode));
        rustix::fs::mkdirat(parent, name, mode).map_err(|e| self.fault("create", path, e))?;
        rustix::fs::chmodat(parent, name, mode, AtFlags::empty())
            .map_err(|e| self.fault("set the mode of", path, e))
    }

    /// Runs something that makes a file; if there is one already it is removed first, tree or not.
    pub(super) fn replacing<T>(
        &mut self,
        parent: &OwnedFd,
        path: &[u8],
        what: &'static str,
        leaving: &mut Leaving<'_>,
        mut make: impl FnMut(&[u8]) -> rustix::io::Result<T>,
    ) -> Outcome<T> {
        match make(base(path)) {
            Err(Errno::EXIST) => {
                self.remove(parent, path, leaving)?;
                make(base(path)).map_err(|e| self.fault(what, path, e))
            }
            made => made.map_err(|e| self.fault(what, path, e)),
        }
    }

    /// Removes whatever is at a path. A missing one is removed already.
    ///
    /// A tree can be as deep as a path is long, so neither the stack nor the table of open files may grow with it:
    /// the way back up is `..`, which nobody else can move while the draft is ours.
    pub(super) fn remove(&mut self, parent: &OwnedFd, path: &[u8], leaving: &mut Leaving<'_>) -> Outcome<()> {
        let name = base(path);
        leaving.goes(parent, name, || path.to_vec())?;
        match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR) => {}
            Err(e) => return Err(self.fault("remove", path, e)),
        }
        // It may lie in what goes.
        self.last = None;
        let mut at = self.open_dir(parent, path)?;
        let mut above = Vec::new();
        loop {
            let place = |name: &[u8]| {
                let parts = above.iter().map(|c: &CString| c.to_bytes()).chain([name]);
                parts.fold(path.to_vec(), |path, part| [&path, &b"/"[..], part].concat())
            };
            let deeper = self.empty_once(&at, path, leaving, place)?;
            let open = |dir: &OwnedFd, name: &std::ffi::CStr| {
                rustix::fs::openat(dir, name, READ_DIR, Mode::empty())
                    .map_err(|e| self.fault("empty", path, e))
            };
            if let Some(child) = deeper {
                at = open(&at, &child)?;
                above.push(child);
            } else if let Some(child) = above.pop() {
                at = open(&at, c"..")?;
                rustix::fs::unlinkat(&at, &child, AtFlags::REMOVEDIR)
                    .map_err(|e| self.fault("empty", path, e))?;
            } else {
                break;
            }
        }
        rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR).map_err(|e| self.fault("remove", path, e))
    }

    /// Removes from a directory all but the directories that are not empty, as far as to the first of these.
    fn empty_once(
        &self,
        dir: &OwnedFd,
        top: &[u8],
        leaving: &mut Leaving<'_>,
        place: impl Fn(&[u8]) -> Vec<u8>,
    ) -> Outcome<Option<CString>> {
        let fault = |e: Errno| self.fault("empty", top, e);
        for entry in Dir::read_from(dir).map_err(fault)? {
            let entry = entry.map_err(fault)?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            leaving.goes(dir, name.to_bytes(), || place(name.to_bytes()))?;
            match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => continue,
                Err(Errno::ISDIR) => {}
                Err(e) => return Err(fault(e)),
            }
            match rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::NOTEMPTY | Errno::EXIST) => return Ok(Some(name.to_owned())),
                Err(e) => return Err(fault(e)),
            }
        }
        Ok(None)
    }

    /// The names in a directory.
    pub(super) fn names(&self, dir: &OwnedFd, path: &[u8]) -> Outcome<Vec<Vec<u8>>> {
        #[cfg(test)]
        self.lists.set(self.lists.get() + 1);
        list(dir).map_err(|e| self.fault("list", path, e))
    }

    /// Marks a name as removed from the layers below.
    pub(super) fn mark_removed(&self, dir: &OwnedFd, path: &[u8]) -> Outcome<()> {
        rustix::fs::mknodat(dir, base(path), FileType::CharacterDevice, Mode::empty(), 0)
            .map_err(|e| self.fault("mark as removed", path, e))
    }

    /// Where a directory is once all symbolic links on the way to it are followed, with our root as theirs. What is
    /// missing of it is taken as it stands, unless `beyond` knows where a link leads that is there.
    pub(super) fn resolve(&mut self, path: &[u8], beyond: Beyond<'_>) -> Outcome<Vec<u8>> {
        let refuse = |why: &str| Err(Fault::Bad(format!("the directory {} {why}", shown(path))));
        let parts = |path: &[u8]| -> Vec<Vec<u8>> {
            path.split(|b| *b == b'/')
                .rev()
                .filter(|p| !p.is_empty() && *p != b".")
                .map(<[u8]>::to_vec)
                .collect()
        };
        let (mut at, mut rest, mut links) = (Vec::new(), parts(path), 0);
        while let Some(part) = rest.pop() {
            self.steps += 1;
            if self.steps > MAX_STEPS {
                return refuse("leads through more symbolic links than a layer may");
            }
            if part == b".." {
                at.truncate(parent(&at).len());
                continue;
            }
            let child = if at.is_empty() { part } else { [&at[..], b"/", &part].concat() };
            if base(&child).len() > MAX_NAME || child.len() > MAX_PATH {
                return refuse("leads to a name that is too long");
            }
            let Some(to) = self.link(&at, &child, beyond)? else {
                at = child;
                continue;
            };
            links += 1;
            if links > MAX_LINKS {
                return refuse("leads through too many symbolic links");
            }
            if to.starts_with(b"/") {
                at.clear();
            }
            rest.extend(parts(&to));
        }
        Ok(at)
    }

    /// Where the link at a path in a directory leads, if there is one.
    fn link(&mut self, dir: &[u8], path: &[u8], beyond: Beyond<'_>) -> Outcome<Option<Vec<u8>>> {
        let dir = match self.dir(dir)? {
            Ok(dir) => dir,
            Err(Obstacle::Missing) => return beyond(path),
            Err(Obstacle::NotADirectory) => return Ok(None),
        };
        match self.look(&dir, path)? {
            None => beyond(path),
            Some(stat) if is_link(&stat) => {
                let to = rustix::fs::readlinkat(&*dir, base(path), Vec::new());
                Ok(Some(to.map_err(|e| self.fault("read", path, e))?.into_bytes()))
            }
            Some(_) => Ok(None),
        }
    }
}

/// The names in a directory, but for itself and its parent.
pub(super) fn list(dir: &OwnedFd) -> rustix::io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(name.to_bytes().to_vec());
        }
    }
    Ok(names)
}

pub(super) fn is_dir(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

pub(super) fn is_link(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Symlink
}

/// Whether something is what OverlayFS takes for a removed file.
pub(super) fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// A name of an archive as a path beneath the root, components parted by single slashes; empty for the root itself.
pub(super) fn clean(name: &[u8]) -> Outcome<Vec<u8>> {
    let refuse = |why: &str| Err(Fault::Bad(format!("the name {} {why}", shown(name))));
    if name.is_empty() {
        return refuse("is empty");
    }
    if name.contains(&0) {
        return refuse("has a zero byte");
    }
    let mut path = Vec::with_capacity(name.len());
    for part in name.split(|b| *b == b'/') {
        match part {
            b"" | b"." => continue,
            b".." => return refuse("has the component `..`"),
            _ if part.len() > MAX_NAME => return refuse("has a component of more than 255 bytes"),
            _ => {}
        }
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(part);
    }
    if path.len() > MAX_PATH { refuse("is longer than 4095 bytes") } else { Ok(path) }
}

/// The directory of a path; that of a name at the top is the root.
pub(super) fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|b| *b == b'/').map_or(b"", |slash| &path[..slash])
}

/// The last component of a path.
pub(super) fn base(path: &[u8]) -> &[u8] {
    path.iter().rposition(|b| *b == b'/').map_or(path, |slash| &path[slash + 1..])
}
