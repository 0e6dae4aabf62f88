//! The members of an archive of images, put on disk. Only names that such archives have are kept, and of these only so many.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Component, Path, PathBuf},
};

use moxlet_ids::Digest;

use super::{Source, decompressed, refused};
use crate::{Result, error::Attempt};

/// Members that an archive may have.
const MAX_MEMBERS: usize = 20_000;
/// Bytes of all members.
const MAX_BYTES: u64 = 512 << 30;
/// Bytes of a document: index, manifest, config.
const MAX_DOCUMENT: u64 = 8 << 20;
/// Links that are followed one after another.
const MAX_LINKS: usize = 4;

/// What a member is.
enum Member {
    File {
        path: PathBuf,
        size: u64,
    },
    /// A link to another member, as `docker save` makes them of layers that are the same.
    Link(String),
}

/// The members of an archive; they go with this.
pub(super) struct Members {
    dir: PathBuf,
    members: HashMap<String, Member>,
}

impl Drop for Members {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            tracing::warn!(dir = %self.dir.display(), %error, "the members of an archive stay until the store is opened anew");
        }
    }
}

/// A member's name without `./` and the like; nothing for one that leads out.
fn plain(name: &Path) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in name.components() {
        match part {
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir => {
                parts.pop()?;
            }
            Component::Prefix(_) => return None,
        }
    }
    Some(parts.join("/"))
}

impl Members {
    /// Reads an archive to its end into a new directory. It blocks.
    pub(super) fn read(source: Source, dir: PathBuf) -> Result<Self> {
        fs::DirBuilder::new().mode(0o700).create(&dir).attempt("create", &dir)?;
        let mut all = Self { dir, members: HashMap::new() };
        let mut archive =
            tar::Archive::new(decompressed(source).map_err(|e| refused("the archive", e.to_string()))?);
        let wrong = |e: io::Error| refused("the archive", format!("it cannot be read: {e}"));
        let mut bytes = 0_u64;
        for (n, entry) in archive.entries().map_err(wrong)?.enumerate() {
            let mut entry = entry.map_err(wrong)?;
            if n >= MAX_MEMBERS {
                return Err(refused("the archive", format!("it has more than {MAX_MEMBERS} members")));
            }
            let Some(name) = entry.path().ok().and_then(|p| plain(&p)) else { continue };
            let kind = entry.header().entry_type();
            if kind.is_symlink() || kind.is_hard_link() {
                let target = entry.link_name().map_err(wrong)?.unwrap_or_default();
                // A symbolic link is read from where it lies.
                let base = if kind.is_symlink() { Path::new(&name).parent() } else { None };
                let target = base.map_or_else(|| target.to_path_buf(), |b| b.join(&target));
                if let Some(target) = plain(&target) {
                    all.members.insert(name, Member::Link(target));
                }
                continue;
            }
            if !kind.is_file() {
                continue;
            }
            let size = entry.size();
            bytes = bytes.saturating_add(size);
            if bytes > MAX_BYTES {
                return Err(refused("the archive", format!("it has more than {MAX_BYTES} bytes")));
            }
            let path = all.dir.join(n.to_string());
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .attempt("create", &path)?;
            copy(&mut entry, &mut file, &path)?;
            all.members.insert(name, Member::File { path, size });
        }
        Ok(all)
    }

    fn find(&self, name: &str) -> Option<(&Path, u64)> {
        let mut name = name;
        for _ in 0..MAX_LINKS {
            match self.members.get(name)? {
                Member::File { path, size } => return Some((path, *size)),
                Member::Link(target) => name = target,
            }
        }
        None
    }

    /// Whether there is such a member.
    pub(super) fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// Opens a member; its size as well.
    pub(super) fn open(&self, name: &str) -> Result<(File, u64)> {
        let missing = || refused("the archive", format!("{name:?} is missing"));
        let (path, size) = self.find(name).ok_or_else(missing)?;
        Ok((File::open(path).attempt("open", path)?, size))
    }

    /// A member that fits into memory.
    pub(super) fn document(&self, name: &str) -> Result<Vec<u8>> {
        let (file, size) = self.open(name)?;
        if size > MAX_DOCUMENT {
            return Err(refused("the archive", format!("{name:?} has more than {MAX_DOCUMENT} bytes")));
        }
        let mut bytes = Vec::new();
        file.take(MAX_DOCUMENT).read_to_end(&mut bytes).attempt("read", &self.dir)?;
        Ok(bytes)
    }

    /// A blob that fits into memory, checked.
    pub(super) fn blob(&self, digest: &Digest) -> Result<Vec<u8>> {
        let bytes = self.document(&blob_name(digest))?;
        let actual = Digest::of(&bytes);
        if actual != *digest {
            return Err(refused("the archive", format!("blob {digest} has digest {actual}")));
        }
        Ok(bytes)
    }
}

/// Where an OCI layout has a blob.
pub(super) fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Tells a broken archive from a full disk.
fn copy(from: &mut impl Read, to: &mut File, path: &Path) -> Result<()> {
    let mut buffer = vec![0; 128 << 10];
    loop {
        let n =
            from.read(&mut buffer).map_err(|e| refused("the archive", format!("it cannot be read: {e}")))?;
        if n == 0 {
            return Ok(());
        }
        io::Write::write_all(to, &buffer[..n]).attempt("write", path)?;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn names_stay_in_the_archive() {
        for (name, want) in [
            ("./index.json", Some("index.json")),
            ("/a//b", Some("a/b")),
            ("a/../b", Some("b")),
            ("../a", None),
            ("a/../../b", None),
        ] {
            assert_eq!(plain(Path::new(name)).as_deref(), want, "{name}");
        }
    }
}
