//! Changes the ids of a whole tree once, for kernels and OpenZFS versions without idmapped mounts.
//!
//! Changing an owner takes the setuid bits and the capabilities away, so both are put back; capabilities become those of
//! the map's root (version 3 of `security.capability`, `linux/capability.h`), or they would count for nothing in a
//! container. The ids within POSIX ACLs are changed as well.

use std::{
    collections::HashSet,
    ffi::{CStr, OsStr},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid, XattrFlags},
    io::Errno,
};

use crate::{
    IdMap,
    error::{Attempt, Error, Result},
};

const CAPABILITY: &str = "security.capability";
const ACLS: [&str; 2] = ["system.posix_acl_access", "system.posix_acl_default"];
/// `VFS_CAP_REVISION_MASK` and the two versions that hold more than 32 capabilities.
const REVISION: u32 = 0xff00_0000;
const REVISION_2: u32 = 0x0200_0000;
const REVISION_3: u32 = 0x0300_0000;
/// `ACL_USER` and `ACL_GROUP` (`linux/posix_acl.h`), the entries that name an id.
const ACL_WITH_ID: [u16; 2] = [0x02, 0x08];

/// Shifts all ids at and below a directory by a map. Run once; it is not idempotent.
///
/// # Errors
/// An id beyond the map, or what the system says.
pub(super) fn tree(top: &Path, map: IdMap) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(CWD, top, flags, Mode::empty()).attempt("open", top)?;
    let mut walk = Walk { top: fd, map, linked: HashSet::new() };
    let stat = rustix::fs::fstat(&walk.top).attempt("look at", top)?;
    let own = walk.top.try_clone().attempt("open", top)?;
    walk.change_open(&own, &stat, Path::new(""))?;
    let mut waiting = vec![PathBuf::new()];
    while let Some(dir) = waiting.pop() {
        walk.directory(&dir, &mut waiting)?;
    }
    Ok(())
}

struct Walk {
    top: OwnedFd,
    map: IdMap,
    /// Files with several names that are done.
    linked: HashSet<u64>,
}

impl Walk {
    fn directory(&mut self, path: &Path, waiting: &mut Vec<PathBuf>) -> Result<()> {
        let here = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let dir =
            rustix::fs::openat2(&self.top, here, flags, Mode::empty(), resolve).attempt("open", path)?;
        for entry in Dir::read_from(&dir).attempt("list", path)? {
            let entry = entry.attempt("list", path)?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let child = path.join(OsStr::from_bytes(name.to_bytes()));
            let stat =
                rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW).attempt("look at", &child)?;
            let kind = FileType::from_raw_mode(stat.st_mode);
            if kind != FileType::Directory && stat.st_nlink > 1 && !self.linked.insert(stat.st_ino) {
                continue;
            }
            if kind == FileType::Directory {
                waiting.push(child.clone());
            }
            self.change(&dir, name, &stat, kind, &child)?;
        }
        Ok(())
    }

    fn change(&self, dir: &OwnedFd, name: &CStr, stat: &Stat, kind: FileType, path: &Path) -> Result<()> {
        if matches!(kind, FileType::RegularFile | FileType::Directory) {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let fd = rustix::fs::openat(dir, name, flags, Mode::empty()).attempt("open", path)?;
            return self.change_open(&fd, stat, path);
        }
        let (uid, gid) = self.owner(stat, path)?;
        rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .attempt("change the owner of", path)?;
        // Pipes, sockets and devices can carry the bits, too; nothing else of them is lost.
        if kind != FileType::Symlink && stat.st_mode & 0o7000 != 0 {
            rustix::fs::chmodat(dir, name, Mode::from_raw_mode(stat.st_mode & 0o7777), AtFlags::empty())
                .attempt("set the mode of", path)?;
        }
        Ok(())
    }

    fn change_open(&self, fd: &OwnedFd, stat: &Stat, path: &Path) -> Result<()> {
        let (uid, gid) = self.owner(stat, path)?;
        let capability = attribute(fd, CAPABILITY).attempt("read the capabilities of", path)?;
        rustix::fs::fchown(fd, Some(uid), Some(gid)).attempt("change the owner of", path)?;
        if stat.st_mode & 0o7000 != 0 {
            rustix::fs::fchmod(fd, Mode::from_raw_mode(stat.st_mode & 0o7777))
                .attempt("set the mode of", path)?;
        }
        if let Some(value) = capability.and_then(|v| shifted_capability(&v, self.map)) {
            rustix::fs::fsetxattr(fd, CAPABILITY, &value, XattrFlags::empty())
                .attempt("set the capabilities of", path)?;
        }
        for name in ACLS {
            let Some(mut value) = attribute(fd, name).attempt("read the ACL of", path)? else { continue };
            shift_acl(&mut value, self.map).map_err(|id| self.beyond(path, id))?;
            rustix::fs::fsetxattr(fd, name, &value, XattrFlags::empty()).attempt("set the ACL of", path)?;
        }
        Ok(())
    }

    fn owner(&self, stat: &Stat, path: &Path) -> Result<(Uid, Gid)> {
        let shift = |id| self.map.host_id(id).ok_or_else(|| self.beyond(path, id));
        Ok((Uid::from_raw(shift(stat.st_uid)?), Gid::from_raw(shift(stat.st_gid)?)))
    }

    fn beyond(&self, path: &Path, id: u32) -> Error {
        Error::IdBeyondMap { path: Path::new("/").join(path), id, map: self.map }
    }
}

/// An extended attribute; none if there is none.
fn attribute(fd: &OwnedFd, name: &str) -> rustix::io::Result<Option<Vec<u8>>> {
    let mut value = vec![0_u8; 1024];
    loop {
        match rustix::fs::fgetxattr(fd, name, &mut value) {
            Ok(n) => {
                value.truncate(n);
                return Ok(Some(value));
            }
            Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
            Err(Errno::RANGE) if value.len() < 1 << 16 => value.resize(value.len() * 4, 0),
            Err(e) => return Err(e),
        }
    }
}

/// `struct vfs_cap_data` becomes `struct vfs_ns_cap_data` with the map's root; one that has a root already gets that one's
/// id on the host. Nothing for a value that is none.
fn shifted_capability(value: &[u8], map: IdMap) -> Option<Vec<u8>> {
    let magic = u32::from_le_bytes(value.get(..4)?.try_into().ok()?);
    let root = match (magic & REVISION, value.len()) {
        (REVISION_2, 20) => 0,
        (REVISION_3, 24) => u32::from_le_bytes(value.get(20..24)?.try_into().ok()?),
        _ => return None,
    };
    let mut out = (magic & !REVISION | REVISION_3).to_le_bytes().to_vec();
    out.extend_from_slice(value.get(4..20)?);
    out.extend_from_slice(&map.host_id(root)?.to_le_bytes());
    Some(out)
}

/// Shifts the ids of an ACL as `system.posix_acl_*` shows it: a version, then entries of tag, permissions and id.
fn shift_acl(value: &mut [u8], map: IdMap) -> std::result::Result<(), u32> {
    let entries = value.get_mut(4..).unwrap_or_default();
    for entry in entries.chunks_exact_mut(8) {
        let (Ok(tag), Ok(id)) = (entry[..2].try_into(), entry[4..].try_into()) else { continue };
        if ACL_WITH_ID.contains(&u16::from_le_bytes(tag)) {
            let id = u32::from_le_bytes(id);
            let shifted = map.host_id(id).ok_or(id)?;
            entry[4..].copy_from_slice(&shifted.to_le_bytes());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use std::{
        fs::{self, File},
        os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown},
    };

    use super::*;

    #[test]
    fn owners_setuid_bits_capabilities_and_acls_are_those_of_the_map() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path();
        let map = IdMap { host_base: 300_000, size: 65_536 };
        let file = top.join("file");
        fs::write(&file, "x").unwrap();
        chown(&file, Some(5), Some(6)).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o6755)).unwrap();
        // CAP_NET_RAW, effective and permitted.
        let mut capability = 0x0200_0001_u32.to_le_bytes().to_vec();
        capability.extend_from_slice(&[0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        rustix::fs::setxattr(&file, CAPABILITY, &capability, XattrFlags::empty()).unwrap();
        fs::hard_link(&file, top.join("again")).unwrap();
        fs::create_dir_all(top.join("a/b")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", top.join("a/b/link")).unwrap();
        lchown(top.join("a/b/link"), Some(1000), Some(1000)).unwrap();
        let mut acl = 2_u32.to_le_bytes().to_vec();
        for (tag, perm, id) in
            [(1_u16, 6_u16, u32::MAX), (2, 4, 1000), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 4, u32::MAX)]
        {
            acl.extend_from_slice(&tag.to_le_bytes());
            acl.extend_from_slice(&perm.to_le_bytes());
            acl.extend_from_slice(&id.to_le_bytes());
        }
        let with_acl = top.join("a/acl");
        fs::write(&with_acl, "").unwrap();
        rustix::fs::setxattr(&with_acl, ACLS[0], &acl, XattrFlags::empty()).unwrap();

        tree(top, map).unwrap();
        let seen = fs::metadata(&file).unwrap();
        assert_eq!((seen.uid(), seen.gid(), seen.mode() & 0o7777), (300_005, 300_006, 0o6755));
        assert_eq!(fs::metadata(top).unwrap().uid(), 300_000);
        let fd: OwnedFd = File::open(&file).unwrap().into();
        // The kernel shows a capability of another root as it is.
        let value = attribute(&fd, CAPABILITY).unwrap().unwrap();
        assert_eq!(value.len(), 24);
        assert_eq!(value[20..], 300_000_u32.to_le_bytes());
        let link = fs::symlink_metadata(top.join("a/b/link")).unwrap();
        assert_eq!((link.uid(), fs::metadata("/etc/passwd").unwrap().uid()), (301_000, 0));
        let fd: OwnedFd = File::open(&with_acl).unwrap().into();
        let value = attribute(&fd, ACLS[0]).unwrap().unwrap();
        assert_eq!(value[16..20], 301_000_u32.to_le_bytes());
    }

    #[test]
    fn an_id_beyond_the_map_is_refused_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        chown(&file, Some(70_000), Some(0)).unwrap();
        let error = tree(dir.path(), IdMap::default()).unwrap_err();
        assert!(
            matches!(&error, Error::IdBeyondMap { path, id: 70_000, .. } if path == Path::new("/file")),
            "{error}"
        );
    }
}
