//! Whether a file system can hold a store: tried, since what it is called says little.

use std::{io, path::Path};

use rustix::{
    fs::{CWD, FileType, Mode, XattrFlags},
    mount::OpenTreeFlags,
};

use super::{make_dir, stack};
use crate::{
    IdMap,
    error::{Error, Result},
    idmap::Namespace,
    mounts, tree,
};

/// Refuses a directory whose file system cannot be the upper part of an overlay, or be shown with other ids.
pub(super) fn check(dir: &Path, tmp: &Path) -> Result<()> {
    let probe = tree::unique(tmp, "probe");
    let refused = attempt(&probe);
    tree::remove(&probe, tmp)?;
    refused?.map_or(Ok(()), |reason| {
        let filesystem = mounts::file_system_of(dir)?;
        Err(Error::UnfitFileSystem { path: dir.to_owned(), filesystem, reason })
    })
}

/// What the file system lacks; nothing if it will do.
fn attempt(probe: &Path) -> Result<Option<String>> {
    let [lower, upper, work] = ["lower", "upper", "work"].map(|name| probe.join(name));
    make_dir(probe, 0o700)?;
    for dir in [&lower, &upper, &work] {
        make_dir(dir, 0o755)?;
    }
    let why = |what: &str, error: io::Error| Ok(Some(format!("{what} ({error})")));
    if let Err(e) = rustix::fs::setxattr(&lower, "trusted.overlay.opaque", b"y", XattrFlags::empty()) {
        return why("it keeps no trusted extended attributes", e.into());
    }
    if let Err(e) = rustix::fs::mknodat(CWD, upper.join("gone"), FileType::CharacterDevice, Mode::empty(), 0)
    {
        return why("it keeps no device nodes, which removed files are marked by", e.into());
    }
    let merged = match stack::merge(std::slice::from_ref(&lower), Some((&upper, &work))) {
        Ok(merged) => merged,
        Err(Error::Io { source, .. }) => return why("OverlayFS does not take it as the upper part", source),
        Err(error) => return Err(error),
    };
    drop(merged);
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let copy = match rustix::mount::open_tree(CWD, probe, flags) {
        Ok(copy) => copy,
        Err(e) => return why("its mount cannot be cloned", e.into()),
    };
    match Namespace::new(IdMap::default())?.shift(&copy) {
        Ok(()) => Ok(None),
        Err(e) => why("it does not know idmapped mounts", e),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;

    use super::*;

    #[test]
    fn the_file_system_of_this_machine_will_do_and_an_overlay_will_not() {
        let dir = tempfile::tempdir().unwrap();
        check(dir.path(), dir.path()).unwrap();
        let [lower, upper, work, merged] = ["lower", "upper", "work", "merged"].map(|n| dir.path().join(n));
        for path in [&lower, &upper, &work, &merged] {
            fs::create_dir(path).unwrap();
        }
        let mount = stack::merge(&[lower], Some((&upper, &work))).unwrap();
        let place = stack::place_for(&merged).unwrap().unwrap();
        stack::put(&mount, &place, &merged).unwrap();
        let error = check(&merged, &merged).unwrap_err();
        mounts::unmount(&merged).unwrap();
        assert!(
            matches!(&error, Error::UnfitFileSystem { filesystem, .. } if filesystem == "overlay"),
            "{error}"
        );
    }
}
