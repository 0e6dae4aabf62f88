//! Layers as they should be, and hostile ones: made byte by byte, since no writer of archives would write them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod compare;
mod hostile;
mod lower;
mod tapes;

use std::{
    fs,
    io::Write,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
    },
    path::Path,
};

use tar::{EntryType, Header};

use super::*;

/// An archive in the making.
#[derive(Default, Clone)]
pub(crate) struct Tar(pub(super) Vec<u8>);

impl Tar {
    pub(crate) fn raw(mut self, kind: EntryType, name: &[u8], link: &[u8], data: &[u8]) -> Self {
        let mut header = header(kind, name, data.len() as u64);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.content(data)
    }

    fn header(mut self, mut header: Header, data: &[u8]) -> Self {
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.content(data)
    }

    fn content(mut self, data: &[u8]) -> Self {
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, name: &str, data: &str) -> Self {
        self.raw(EntryType::Regular, name.as_bytes(), b"", data.as_bytes())
    }

    pub(crate) fn dir(self, name: &str) -> Self {
        self.raw(EntryType::Directory, name.as_bytes(), b"", b"")
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.raw(EntryType::Symlink, name.as_bytes(), target.as_bytes(), b"")
    }

    pub(crate) fn link(self, name: &str, target: &str) -> Self {
        self.raw(EntryType::Link, name.as_bytes(), target.as_bytes(), b"")
    }

    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut text = Vec::new();
        for (key, value) in records {
            let rest = 3 + key.len() + value.len();
            let length = (1..).map(|d| (d, rest + d)).find(|(d, l)| l.to_string().len() == *d).unwrap().1;
            write!(text, "{length} {key}=").unwrap();
            text.extend_from_slice(value);
            text.push(b'\n');
        }
        self.raw(EntryType::XHeader, b"pax", b"", &text)
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

fn header(kind: EntryType, name: &[u8], size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.set_entry_type(kind);
    header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_000_000);
    header.set_size(size);
    header
}

/// Extracts an archive; the layer is uncompressed and claims the right digests.
pub(super) fn extract_as(root: &Path, style: WhiteoutStyle, bottom: bool, tar: &[u8]) -> Outcome<()> {
    unpack_blob(root, style, bottom, tar, tar)
}

fn unpack_blob(root: &Path, style: WhiteoutStyle, bottom: bool, blob: &[u8], tar: &[u8]) -> Outcome<()> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer.tape");
    let target = Target { root, style, bottom, tape: Some(&path), below: None };
    let unpacked = unpack(pieces(blob, true), &claim(blob, tar), target)?;
    assert_eq!((unpacked.diff_id, unpacked.unpacked_size), (Digest::of(tar), tar.len() as u64));
    // Whatever can be extracted can be made again.
    assert!(rebuilt(&path, root).unwrap() == tar, "the archive is another one");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    let mut check = check(root, &path, style, bottom).unwrap();
    // Some tests extract several layers into one directory.
    check.differences.retain(|d| !d.contains("does not belong to the layer"));
    assert_eq!((check.diff_id, check.differences), (Digest::of(tar), Vec::new()));
    Ok(())
}

/// The archive of a layer, made from its tape and its directory.
pub(super) fn rebuilt(tape: &Path, root: &Path) -> io::Result<Vec<u8>> {
    let mut tar = Vec::new();
    tape::Tape::open(tape)?.over(root)?.read_to_end(&mut tar)?;
    Ok(tar)
}

fn claim(blob: &[u8], tar: &[u8]) -> Claim {
    Claim { digest: Some(Digest::of(blob)), size: Some(blob.len() as u64), diff_id: Some(Digest::of(tar)) }
}

fn pieces(blob: &[u8], whole: bool) -> Source {
    let chunks: Vec<_> = blob.chunks(1000).collect();
    let (out, pieces) = tokio::sync::mpsc::channel(chunks.len() + 1);
    for chunk in chunks {
        out.try_send(Piece::Bytes(Bytes::copy_from_slice(chunk))).unwrap();
    }
    if whole {
        out.try_send(Piece::End).unwrap();
    }
    Source::new(pieces, None)
}

fn overlay(root: &Path, tar: Tar) -> Outcome<()> {
    extract_as(root, WhiteoutStyle::Overlay, false, &tar.end())
}

fn apply(root: &Path, tar: Tar) -> Outcome<()> {
    extract_as(root, WhiteoutStyle::Apply, false, &tar.end())
}

fn is_opaque(path: &Path) -> bool {
    xattr::get(path, "trusted.overlay.opaque").unwrap().as_deref() == Some(b"y")
}

fn is_removed(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_char_device() && m.rdev() == 0)
}

#[test]
fn every_kind_of_file_keeps_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let capability = [1, 0, 0, 2, 0, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut suid = header(EntryType::Regular, b"bin/su", 3);
    suid.set_mode(0o4755);
    suid.set_uid(1000);
    suid.set_gid(50);
    let mut null = header(EntryType::Char, b"dev/null", 0);
    null.set_mode(0o666);
    null.set_device_major(1).unwrap();
    null.set_device_minor(3).unwrap();
    let mut disk = header(EntryType::Block, b"dev/disk", 0);
    disk.set_device_major(7).unwrap();
    let mut sticky = header(EntryType::Directory, b"tmp/", 0);
    sticky.set_mode(0o1777);
    let tar = Tar::default()
        .pax(&[("mtime", b"1234.000000567"), ("SCHILY.xattr.user.dir", b"d")])
        .header(sticky, b"")
        .file("tmp/later", "changes the time of tmp")
        .pax(&[("uid", b"3000000000"), ("gid", b"70000")])
        .file("big-ids", "")
        .header(suid, b"su\n")
        .pax(&[
            ("SCHILY.xattr.security.capability", &capability),
            ("SCHILY.xattr.user.a", b"\nx\0"),
            ("mtime", b"7.5"),
        ])
        .file("bin/ping", "ping")
        .pax(&[("SCHILY.xattr.security.selinux", b"of the build machine")])
        .symlink("bin/sh", "/etc/passwd")
        .link("bin/ping6", "./bin//ping")
        .link("bin/sh2", "/bin/sh")
        .header(null, b"")
        .header(disk, b"")
        .raw(EntryType::Fifo, b"fifo", b"", b"")
        .raw(EntryType::Regular, b"old/style/", b"", b"")
        .raw(EntryType::Regular, b"\xff\xfe", b"", b"not text");
    overlay(root, tar).unwrap();

    let look = |name: &str| fs::symlink_metadata(root.join(name)).unwrap();
    let su = look("bin/su");
    assert_eq!((su.mode() & 0o7777, su.uid(), su.gid(), su.mtime()), (0o4755, 1000, 50, 1_000_000));
    assert_eq!((look("big-ids").uid(), look("big-ids").gid()), (3_000_000_000, 70_000));
    let tmp = look("tmp");
    assert_eq!((tmp.mode() & 0o7777, tmp.mtime(), tmp.mtime_nsec()), (0o1777, 1234, 567));
    assert_eq!(xattr::get(root.join("tmp"), "user.dir").unwrap().unwrap(), b"d");
    assert_eq!(xattr::get(root.join("bin/ping"), "security.capability").unwrap().unwrap(), capability);
    assert_eq!(xattr::get(root.join("bin/ping"), "user.a").unwrap().unwrap(), b"\nx\0");
    assert_eq!((look("bin/ping").mtime_nsec(), look("bin/ping").nlink()), (500_000_000, 2));
    assert_eq!(fs::read_link(root.join("bin/sh")).unwrap(), Path::new("/etc/passwd"));
    assert!(look("bin/sh2").file_type().is_symlink(), "a hard link to a link is one to the link");
    assert_eq!(
        (look("dev/null").rdev(), look("dev/null").mode() & 0o777),
        (rustix::fs::makedev(1, 3), 0o666)
    );
    assert!(look("dev/disk").file_type().is_block_device() && look("fifo").file_type().is_fifo());
    assert!(look("old/style").is_dir());
    assert_eq!(fs::read(root.join(std::ffi::OsStr::from_bytes(b"\xff\xfe"))).unwrap(), b"not text");
    assert_eq!(look("bin").permissions().mode() & 0o7777, 0o755);
}

#[test]
fn long_names_are_read_in_both_ways_of_writing_them() {
    let dir = tempfile::tempdir().unwrap();
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(255));
    let gnu = format!("{}\0", long.replace('f', "g"));
    let tar = Tar::default()
        .pax(&[("path", long.as_bytes())])
        .file("short", "pax")
        .raw(EntryType::GNULongName, b"././@LongLink", b"", gnu.as_bytes())
        .file("short", "gnu")
        .pax(&[("linkpath", long.as_bytes())])
        .link("hard", "short")
        .raw(EntryType::GNULongLink, b"././@LongLink", b"", gnu.as_bytes())
        .symlink("soft", "short");
    overlay(dir.path(), tar).unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("hard")).unwrap(), "pax");
    assert_eq!(fs::read_to_string(dir.path().join("soft")).unwrap(), "gnu");
    assert!(!dir.path().join("short").exists());
}

#[test]
fn of_two_entries_with_one_name_the_last_one_wins() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let deep = ["d"; 2000].join("/");
    let tar = Tar::default()
        .file("a", "first")
        .link("a2", "a")
        .file("a", "second")
        .file("b/c/d", "gone")
        .file("b", "file")
        .file("c", "gone")
        .dir("c")
        .file("c/d", "there")
        .symlink("e", "c")
        .dir("e")
        .pax(&[("path", deep.as_bytes())])
        .file("x", "at the bottom")
        .symlink("d", "a");
    overlay(root, tar).unwrap();
    assert_eq!(fs::read_to_string(root.join("a")).unwrap(), "second");
    assert_eq!(fs::read_to_string(root.join("a2")).unwrap(), "first");
    assert_eq!(fs::read_to_string(root.join("b")).unwrap(), "file");
    assert_eq!(fs::read_to_string(root.join("c/d")).unwrap(), "there");
    assert!(is_opaque(&root.join("c")), "a file between hides what lies below");
    assert!(fs::symlink_metadata(root.join("e")).unwrap().is_dir());
    assert_eq!(fs::read_link(root.join("d")).unwrap(), Path::new("a"));
}

#[test]
fn whiteouts_become_marks_for_overlayfs() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tar = Tar::default()
        .file("a/.wh.gone", "")
        .file("a/.wh..hidden", "")
        .dir("b")
        .file("b/.wh..wh..opq", "")
        .file("b/kept", "")
        .file(".wh.c", "")
        .file("c/new", "")
        .file("d/new", "")
        .file(".wh.d", "")
        .file("e", "")
        .file(".wh.e", "")
        .file(".wh.f", "")
        .file("f", "")
        .link(".wh..wh.plnk/1.2", "any")
        .file(".wh..wh.aufs", "");
    overlay(root, tar.clone()).unwrap();
    assert!(is_removed(&root.join("a/gone")) && is_removed(&root.join("a/.hidden")));
    assert!(!is_opaque(&root.join("a")));
    for (name, file) in [("b", "b/kept"), ("c", "c/new"), ("d", "d/new")] {
        assert!(is_opaque(&root.join(name)) && root.join(file).is_file(), "{name}");
    }
    assert!(root.join("e").is_file() && root.join("f").is_file());
    assert_eq!(fs::read_dir(root).unwrap().count(), 6);

    let bottom = tempfile::tempdir().unwrap();
    extract_as(bottom.path(), WhiteoutStyle::Overlay, true, &tar.end()).unwrap();
    assert!(!bottom.path().join("a").exists(), "below the bottom is nothing to remove");
    assert!(bottom.path().join("b/kept").exists() && !is_opaque(&bottom.path().join("b")));
}

#[test]
fn whiteouts_remove_what_lies_below_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let lower =
        Tar::default().file("a/x", "").file("a/y/z", "").file("b/x", "").file("c/d/old", "").file("l", "");
    apply(root, lower.symlink("s", "c").symlink("t", "c")).unwrap();
    let upper = Tar::default()
        .file("a/y/new", "")
        .file("a/.wh..wh..opq", "")
        .file(".wh.b", "")
        .file("c/d/new", "")
        .file(".wh.c", "")
        .file("l", "ours")
        .file(".wh.l", "")
        .file("no/such/.wh.thing", "")
        .file("s/in", "");
    apply(root, upper).unwrap();
    assert!(root.join("a/y/new").exists() && root.join("c/d/new").exists() && root.join("l").exists());
    for gone in ["a/x", "a/y/z", "b", "c/d/old", "no/such/thing"] {
        assert!(!root.join(gone).exists(), "{gone}");
    }
    assert!(root.join("c/in").exists(), "a link below is followed");
    apply(root, Tar::default().file("t/.wh.d", "")).unwrap();
    assert!(!root.join("c/d").exists() && root.join("c/in").exists(), "and leads a whiteout on");
}

#[test]
fn all_compressions_are_told_by_their_first_bytes() {
    let tar = Tar::default().file("a", "x").file("b", &"y".repeat(100_000)).end();
    let gzip = |part: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(part).unwrap();
        encoder.finish().unwrap()
    };
    let zstd = |part: &[u8]| zstd::encode_all(part, 1).unwrap();
    let (front, back) = tar.split_at(700);
    let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
    for blob in [
        tar.clone(),
        gzip(&tar),
        [gzip(front), gzip(back)].concat(),
        zstd(&tar),
        [zstd(front), zstd(back)].concat(),
        [skipped, zstd(&tar)].concat(),
    ] {
        let dir = tempfile::tempdir().unwrap();
        unpack_blob(dir.path(), WhiteoutStyle::Overlay, true, &blob, &tar).unwrap();
        assert_eq!(fs::metadata(dir.path().join("b")).unwrap().len(), 100_000);
        let dir = tempfile::tempdir().unwrap();
        let other = unpack_blob(dir.path(), WhiteoutStyle::Overlay, true, &blob, b"other");
        assert!(matches!(other, Err(Fault::Mismatch { what: ", unpacked,", .. })), "{other:?}");
    }
}

#[test]
fn what_follows_the_end_counts_for_the_diff_id() {
    let dir = tempfile::tempdir().unwrap();
    let mut tar = Tar::default().file("a", "x").end();
    tar.extend_from_slice(&[0; 9 << 10]);
    extract_as(dir.path(), WhiteoutStyle::Overlay, true, &tar).unwrap();
    extract_as(dir.path(), WhiteoutStyle::Overlay, true, b"").unwrap();
}

#[test]
fn a_blob_that_is_damaged_or_cut_is_told_from_a_bad_archive() {
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::default().file("a", &"y".repeat(5000)).end();
    let claim = claim(&tar, &tar);
    let target =
        || Target { root: dir.path(), style: WhiteoutStyle::Overlay, bottom: true, tape: None, below: None };
    let mut damaged = tar.clone();
    damaged[0] ^= 1;
    let outcome = unpack(pieces(&damaged, true), &claim, target());
    assert!(matches!(outcome, Err(Fault::Mismatch { what: "", .. })), "{outcome:?}");
    let outcome = unpack(pieces(&tar[..3000], true), &claim, target());
    assert!(matches!(outcome, Err(Fault::Mismatch { what: "", .. })), "{outcome:?}");
    let outcome = unpack(pieces(&tar[..3000], false), &claim, target());
    assert!(matches!(outcome, Err(Fault::Cut)), "{outcome:?}");
    let outcome = unpack(pieces(&tar, false), &claim, target());
    assert!(matches!(outcome, Err(Fault::Cut)), "{outcome:?}");
}
