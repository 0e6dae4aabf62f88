//! The members of an archive of images, put on disk: only so many, and of all of them only so much.
//!
//! The tar is read as a layer's is, since the tar crate keeps long names and extended headers of any size in memory.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::{self, File},
    io::{self, BufRead, BufReader, Read},
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::{Component, Path, PathBuf},
};

use moxlet_ids::Digest;

use super::{decompressed, refused, told};
use crate::{
    Error, Result,
    error::Attempt,
    layer::{self, Archive, Kind},
};

/// Members that an archive may have.
const MAX_MEMBERS: usize = 20_000;
/// Bytes of all members.
const MAX_BYTES: u64 = 512 << 30;
/// Bytes of a document: index, manifest, config.
const MAX_DOCUMENT: u64 = 8 << 20;
/// Bytes that are read at a time.
const BUFFER: usize = 128 << 10;
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
    pub(super) fn read(source: impl Read + Send, dir: PathBuf) -> Result<Self> {
        fs::DirBuilder::new().mode(0o700).create(&dir).attempt("create", &dir)?;
        let mut all = Self { dir, members: HashMap::new() };
        let plain = decompressed(source).map_err(|e| unreadable(&e))?;
        let mut archive = Archive::of(BufReader::with_capacity(BUFFER, plain));
        let (mut count, mut bytes) = (0_usize, 0_u64);
        while let Some(entry) = archive.next().map_err(wrong)? {
            if count >= MAX_MEMBERS {
                return Err(refused("the archive", format!("it has more than {MAX_MEMBERS} members")));
            }
            bytes = bytes.saturating_add(entry.stored);
            if bytes > MAX_BYTES {
                return Err(refused("the archive", format!("it has more than {MAX_BYTES} bytes")));
            }
            all.take(count, &entry, &mut archive)?;
            count += 1;
        }
        Ok(all)
    }

    /// Keeps a member, if it is one that an archive of images can have.
    fn take<R: BufRead>(&mut self, n: usize, entry: &layer::Entry, archive: &mut Archive<R>) -> Result<()> {
        let Some(name) = plain(path(&entry.path)) else { return Ok(()) };
        match entry.kind {
            Kind::Symlink | Kind::HardLink => {
                // A symbolic link is read from where it lies.
                let base = if entry.kind == Kind::Symlink { Path::new(&name).parent() } else { None };
                let target = path(&entry.link);
                let target = base.map_or_else(|| target.to_path_buf(), |b| b.join(target));
                if let Some(target) = plain(&target) {
                    self.members.insert(name, Member::Link(target));
                }
            }
            Kind::File if entry.size() != entry.stored => {
                return Err(refused("the archive", format!("{name:?} is a file with holes")));
            }
            Kind::File => {
                let path = self.dir.join(n.to_string());
                let mut file = fs::OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&path)
                    .attempt("create", &path)?;
                copy(archive, entry.stored, &mut file, &path)?;
                self.members.insert(name, Member::File { path, size: entry.stored });
            }
            _ => {}
        }
        Ok(())
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

    /// The length of a member.
    pub(super) fn size(&self, name: &str) -> Option<u64> {
        self.find(name).map(|(_, size)| size)
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
        let actual = Digest::by(digest.algorithm(), &bytes);
        if actual != *digest {
            return Err(refused("the archive", format!("blob {digest} has digest {actual}")));
        }
        Ok(bytes)
    }
}

/// Where an OCI layout has a blob.
pub(super) fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().name(), digest.hex())
}

/// Copies a member's content. Tells a broken archive from a full disk.
fn copy<R: BufRead>(from: &mut Archive<R>, mut left: u64, to: &mut File, path: &Path) -> Result<()> {
    while left > 0 {
        let chunk = from.content().map_err(wrong)?;
        let n = chunk.len();
        if n == 0 {
            return Err(refused("the archive", "a member is shorter than it should be"));
        }
        io::Write::write_all(to, chunk).attempt("write", path)?;
        from.consume(n);
        left = left.saturating_sub(n as u64);
    }
    Ok(())
}

fn path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

fn wrong(fault: layer::Fault) -> Error {
    told("the archive", fault)
}

fn unreadable(error: &io::Error) -> Error {
    refused("the archive", format!("it cannot be read: {error}"))
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
