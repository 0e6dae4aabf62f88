//! What a layer removes of those below: whiteouts and opaque directories (OCI image spec, layer.md).

use std::os::fd::OwnedFd;

use moxlet_storage::WhiteoutStyle;
use rustix::fs::{Gid, Mode, Uid, XattrFlags};

use super::{
    Outcome,
    below::lies_in,
    extract::{Extraction, joined},
    root::{Leaving, is_dir, parent},
    settle::xattrs,
};

impl Extraction<'_> {
    /// Removes what the layers below have at a path.
    pub(super) fn whiteout(&mut self, path: &[u8]) -> Outcome<()> {
        if self.bottom {
            return Ok(());
        }
        let dir = self.parent_dir(path)?;
        if self.style == WhiteoutStyle::Apply {
            self.ours.insert(parent(path));
            return if self.ours.contains(path) {
                self.renew(path)?;
                self.purge(path)
            } else {
                self.root.remove(&dir, path, &mut Leaving::nothing_of_ours())
            };
        }
        match self.root.look(&dir, path)? {
            Some(stat) if is_dir(&stat) => {
                let fd = self.root.open_dir(&dir, path)?;
                // The directory of the layers below is gone, its attributes with it.
                self.name(path);
                self.hide(&fd, path)
            }
            // It hides what is below already.
            Some(_) => Ok(()),
            None => self.root.mark_removed(&dir, path),
        }
    }

    /// Removes what the layers below have in the directory of a mark.
    pub(super) fn opaque(&mut self, mark: &[u8]) -> Outcome<()> {
        let path = parent(mark);
        if self.bottom {
            return Ok(());
        }
        let dir = self.parent_dir(mark)?;
        if self.style == WhiteoutStyle::Apply {
            self.ours.insert(path);
            return self.purge(path);
        }
        if path.is_empty() {
            // Done at the end, name by name.
            self.hidden.insert(Vec::new());
            return Ok(());
        }
        let fd = self.root.reopen(&dir, path)?;
        self.hide(&fd, path)
    }

    pub(super) fn hide(&mut self, fd: &OwnedFd, path: &[u8]) -> Outcome<()> {
        self.keep(path.len())?;
        self.hidden.insert(path.to_vec());
        self.hide_below(fd, path)
    }

    pub(super) fn hide_below(&self, fd: &OwnedFd, path: &[u8]) -> Outcome<()> {
        rustix::fs::fsetxattr(fd, "trusted.overlay.opaque", b"y", XattrFlags::empty())
            .map_err(|e| self.root.fault("make opaque", path, e))
    }

    /// A directory that the layer has removed and yet has entries in is a new one: nothing of what it was stays.
    fn renew(&mut self, path: &[u8]) -> Outcome<()> {
        if self.named.contains(path) {
            return Ok(());
        }
        let Ok(dir) = self.root.dir(path)? else { return Ok(()) };
        let fd = self.root.reopen(&dir, path)?;
        let fault = |e| self.root.fault("renew", path, e);
        rustix::fs::fchown(&fd, Some(Uid::ROOT), Some(Gid::ROOT)).map_err(fault)?;
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o755)).map_err(fault)?;
        for (name, _) in xattrs(&fd).map_err(fault)? {
            rustix::fs::fremovexattr(&fd, &name[..]).map_err(fault)?;
        }
        Ok(())
    }

    /// Removes all that the layer has not brought itself beneath a path. What comes there afterwards is of the layer, so no
    /// directory is looked through twice, however often and in whatever order a layer says that it is empty.
    fn purge(&mut self, path: &[u8]) -> Outcome<()> {
        if self.purged.contains(path) || lies_in(path, |dir| self.purged.contains(dir)) {
            return Ok(());
        }
        let mut waiting = vec![path.to_vec()];
        while let Some(path) = waiting.pop() {
            let Ok(dir) = self.root.dir(&path)? else { continue };
            self.purged.insert_one(&path);
            let list = self.root.reopen(&dir, &path)?;
            for name in self.root.names(&list, &path)? {
                let child = joined(&path, &name);
                if self.ours.contains(&child) {
                    self.renew(&child)?;
                    if !self.purged.contains(&child) {
                        waiting.push(child);
                    }
                } else {
                    self.root.remove(&dir, &child, &mut Leaving::nothing_of_ours())?;
                }
            }
        }
        Ok(())
    }
}
