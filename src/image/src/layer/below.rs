//! The layers below one that is extracted side by side with them: what OverlayFS would show of them at a path.
//!
//! They are looked through from the top, as OverlayFS does (Documentation/filesystems/overlayfs.rst, "whiteouts and opaque
//! directories"). No link is followed here.

use std::{collections::HashMap, io, os::fd::OwnedFd, path::PathBuf, rc::Rc};

use moxlet_storage::LayerView;
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, Stat},
    io::Errno,
};

use super::{
    Fault, Outcome,
    root::{READ_DIR, base, is_dir, is_link, is_whiteout, list, parent},
};

/// The layers below, the topmost one first.
#[derive(Debug, Default)]
pub(crate) struct Lower {
    dirs: Vec<PathBuf>,
    /// What keeps them from going.
    _views: Vec<LayerView>,
}

impl From<Vec<LayerView>> for Lower {
    fn from(views: Vec<LayerView>) -> Self {
        Self { dirs: views.iter().map(|v| v.path().to_owned()).collect(), _views: views }
    }
}

#[cfg(any(test, feature = "fuzzing"))]
impl From<Vec<PathBuf>> for Lower {
    fn from(dirs: Vec<PathBuf>) -> Self {
        Self { dirs, _views: Vec::new() }
    }
}

/// What the layers below have at a path.
pub(super) enum Found {
    Nothing,
    /// A directory, its topmost part.
    Directory(Rc<OwnedFd>),
    /// Something else, in this directory.
    Other(Rc<OwnedFd>, Stat),
    /// Something that is no directory lies on the way.
    Blocked(Stat),
}

/// The parts of one directory, the topmost one first.
type Parts = Rc<Vec<Rc<OwnedFd>>>;

/// The layers below, open.
pub(super) struct Stack {
    lower: Lower,
    roots: Parts,
    /// The directory that was looked at last, and those on the way to it.
    known: HashMap<Vec<u8>, Parts>,
}

/// Directories that are kept open.
const MAX_KNOWN: usize = 64;

impl Stack {
    pub(super) fn open(lower: Lower) -> Outcome<Self> {
        let mut roots = Vec::new();
        for dir in &lower.dirs {
            let fd = rustix::fs::openat(CWD, dir, READ_DIR, Mode::empty());
            let fault = |e: Errno| Fault::System { what: "open", path: dir.clone(), source: e.into() };
            roots.push(Rc::new(fd.map_err(fault)?));
        }
        Ok(Self { lower, roots: Rc::new(roots), known: HashMap::new() })
    }

    /// A failure of the system at a path of the layers below.
    pub(super) fn fault(&self, what: &'static str, path: &[u8], error: impl Into<io::Error>) -> Fault {
        let name: String =
            String::from_utf8_lossy(path).chars().take(400).flat_map(char::escape_debug).collect();
        let top = self.lower.dirs.first().cloned().unwrap_or_default();
        Fault::System { what, path: top.join(name), source: error.into() }
    }

    /// What is seen at a path.
    pub(super) fn find(&mut self, path: &[u8]) -> Outcome<Found> {
        if path.is_empty() {
            let top = self.roots.first().map(Rc::clone);
            return Ok(top.map_or(Found::Nothing, Found::Directory));
        }
        let mut at = Rc::clone(&self.roots);
        let ends = path.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(i, _)| i);
        for end in ends {
            let part = &path[..end];
            if let Some(known) = self.known.get(part) {
                at = Rc::clone(known);
                continue;
            }
            at = match self.step(&at, part)? {
                Step::Nothing => return Ok(Found::Nothing),
                Step::Other(_, stat) => return Ok(Found::Blocked(stat)),
                Step::Directory(parts) => parts,
            };
            if self.known.len() >= MAX_KNOWN {
                self.known.clear();
            }
            self.known.insert(part.to_vec(), Rc::clone(&at));
        }
        Ok(match self.step(&at, path)? {
            Step::Nothing => Found::Nothing,
            Step::Other(dir, stat) => Found::Other(dir, stat),
            Step::Directory(parts) => parts.first().map(Rc::clone).map_or(Found::Nothing, Found::Directory),
        })
    }

    /// Where the symbolic link at a path leads, if there is one.
    pub(super) fn link(&mut self, path: &[u8]) -> Outcome<Option<Vec<u8>>> {
        let Found::Other(dir, stat) = self.find(path)? else { return Ok(None) };
        if !is_link(&stat) {
            return Ok(None);
        }
        let to = rustix::fs::readlinkat(&*dir, base(path), Vec::new());
        Ok(Some(to.map_err(|e| self.fault("read", path, e))?.into_bytes()))
    }

    /// A name in a directory whose parts are open.
    fn step(&self, parts: &[Rc<OwnedFd>], path: &[u8]) -> Outcome<Step> {
        let name = base(path);
        let mut found: Vec<Rc<OwnedFd>> = Vec::new();
        for dir in parts {
            let stat = match rustix::fs::statat(&**dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => continue,
                Err(e) => return Err(self.fault("look at", path, e)),
            };
            if is_whiteout(&stat) {
                break;
            }
            if !is_dir(&stat) {
                if found.is_empty() {
                    return Ok(Step::Other(Rc::clone(dir), stat));
                }
                break;
            }
            let fd = rustix::fs::openat(&**dir, name, READ_DIR, Mode::empty());
            let fd = fd.map_err(|e| self.fault("open", path, e))?;
            let opaque = is_opaque(&fd).map_err(|e| self.fault("look at", path, e))?;
            found.push(Rc::new(fd));
            if opaque {
                break;
            }
        }
        Ok(if found.is_empty() { Step::Nothing } else { Step::Directory(Rc::new(found)) })
    }

    /// All names that are seen at the top.
    pub(super) fn top_names(&self) -> Outcome<Vec<Vec<u8>>> {
        let mut seen: HashMap<Vec<u8>, bool> = HashMap::new();
        for root in self.roots.iter() {
            for name in list(root).map_err(|e| self.fault("list", b"", e))? {
                if seen.contains_key(&name) {
                    continue;
                }
                let stat = rustix::fs::statat(&**root, &name[..], AtFlags::SYMLINK_NOFOLLOW);
                let gone = is_whiteout(&stat.map_err(|e| self.fault("look at", &name, e))?);
                seen.insert(name, !gone);
            }
        }
        Ok(seen.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect())
    }

    /// The file of a path that [`Found::Other`] was said of, to be read.
    pub(super) fn read(&self, dir: &OwnedFd, path: &[u8]) -> Outcome<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        rustix::fs::openat(dir, base(path), flags, Mode::empty()).map_err(|e| self.fault("open", path, e))
    }
}

enum Step {
    Nothing,
    Directory(Parts),
    Other(Rc<OwnedFd>, Stat),
}

fn is_opaque(fd: &OwnedFd) -> rustix::io::Result<bool> {
    let mut value = [0; 2];
    match rustix::fs::fgetxattr(fd, "trusted.overlay.opaque", &mut value) {
        Ok(n) => Ok(value[..n] == *b"y"),
        Err(Errno::NODATA) => Ok(false),
        // A longer value is none that OverlayFS knows.
        Err(Errno::RANGE | Errno::OPNOTSUPP) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Whether a path lies in one of these directories.
pub(super) fn lies_in<'a>(path: &'a [u8], mut is_one: impl FnMut(&'a [u8]) -> bool) -> bool {
    let mut at = path;
    while !at.is_empty() {
        at = parent(at);
        if is_one(at) {
            return true;
        }
    }
    false
}
