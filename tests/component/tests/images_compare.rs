//! An image with everything that is hard about layers, unpacked by umoci and by the store in both of its styles: what a
//! container sees is the same.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use moxlet_ids::Digest;
use moxlet_image::{Config, ImageRecord, ImageStore, feed};
use moxlet_storage::{Driver, OverlayDriver, WhiteoutStyle, fake::ApplyingDriver, mounts};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, makedev};

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {complaint}");
}

/// What is below a directory of a test's own.
struct Tree(PathBuf);

impl Tree {
    fn at(&self, name: impl AsRef<OsStr>) -> PathBuf {
        self.0.join(Path::new(name.as_ref()))
    }

    fn dir(&self, name: &str, mode: u32, owner: (u32, u32)) -> &Self {
        fs::create_dir_all(self.at(name)).unwrap();
        self.owned(name, mode, owner)
    }

    fn file(&self, name: impl AsRef<OsStr>, content: &[u8]) -> &Self {
        let path = self.at(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
        self
    }

    fn owned(&self, name: &str, mode: u32, (uid, gid): (u32, u32)) -> &Self {
        std::os::unix::fs::chown(self.at(name), Some(uid), Some(gid)).unwrap();
        rustix::fs::chmod(self.at(name), Mode::from_raw_mode(mode)).unwrap();
        self
    }

    fn link(&self, name: &str, target: &str) -> &Self {
        fs::hard_link(self.at(target), self.at(name)).unwrap();
        self
    }

    fn symlink(&self, name: &str, target: &str) -> &Self {
        std::os::unix::fs::symlink(target, self.at(name)).unwrap();
        self
    }

    fn node(&self, name: &str, kind: FileType, (major, minor): (u32, u32)) -> &Self {
        rustix::fs::mknodat(CWD, self.at(name), kind, Mode::from_raw_mode(0o640), makedev(major, minor))
            .unwrap();
        self
    }

    fn attribute(&self, name: &str, attribute: &str, value: &[u8]) -> &Self {
        rustix::fs::lsetxattr(self.at(name), attribute, value, XattrFlags::empty()).unwrap();
        self
    }

    fn modified(&self, name: &str, seconds: i64, nanoseconds: i64) -> &Self {
        let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, self.at(name), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        self
    }
}

/// The effective and permitted capability `cap_net_raw`, as the kernel keeps it (`vfs_cap_data`, version 2).
const NET_RAW: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

type Layer = fn(&Tree);

fn base(t: &Tree) {
    t.dir("usr/lib", 0o755, (0, 0)).file("usr/lib/libc.so", b"c").symlink("lib", "usr/lib");
    t.dir("tmp", 0o1777, (0, 0)).dir("etc", 0o755, (0, 0)).file("etc/issue", b"hello");
    t.dir("private", 0o700, (7, 8)).file("private/old", b"old").modified("private", 1_000_000_000, 5);
}

fn kinds(t: &Tree) {
    t.file("app/a", b"one\n").dir("app/d1", 0o755, (1000, 2000)).dir("app/d2", 0o750, (65_534, 65_534));
    t.link("app/a-hard", "app/a").link("app/d1/a-hard2", "app/a").attribute("app/a", "user.lab", b"val\0ue");
    t.symlink("app/a-sym", "a").symlink("app/dangling", "/nonexistent").file("app/d1/x", b"x");
    t.file("app/d2/y", b"y").file("app/swap-file", b"z").symlink("app/swap-link", "d1");
    t.file("app/swap-dir/in", b"in").file("app/ping", b"ping").owned("app/ping", 0o755, (0, 0));
    t.attribute("app/ping", "security.capability", &NET_RAW).attribute("app/d1", "user.dir", b"d");
    t.file("app/su", b"su").owned("app/su", 0o6755, (0, 5)).node("app/fifo", FileType::Fifo, (0, 0));
    t.node("app/null", FileType::CharacterDevice, (1, 3)).node("app/disk", FileType::BlockDevice, (7, 200));
    t.file(OsStr::from_bytes(b"app/name with space \xc3\xa9 \xff"), b"name").dir(
        "app/sticky",
        0o1777,
        (0, 0),
    );
    t.file("app/old", b"old").modified("app/old", 946_684_799, 123_456_789);
    t.file("app/older", b"older").modified("app/older", -86_400, 0).modified(
        "app/dangling",
        1_234_567_890,
        0,
    );
    t.file(format!("app/{}", "long-name-".repeat(20)), b"long").file("app/empty", b"");
    let sparse = fs::File::create(t.at("app/sparse")).unwrap();
    sparse.set_len(10 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &[7; 4096], 5 << 20).unwrap();
}

fn whiteouts(t: &Tree) {
    for name in ["app/.wh.a", "app/d1/.wh.x", "app/.wh.dangling", "app/.wh.never-existed", "etc/.wh.issue"] {
        t.file(name, b"");
    }
    t.owned("app/d1", 0o711, (1, 2));
}

fn opaque(t: &Tree) {
    t.file("app/d2/.wh..wh..opq", b"").file("app/d2/new", b"new").owned("app/d2", 0o700, (3, 4));
}

fn types(t: &Tree) {
    t.file("app/swap-dir", b"f").file("app/swap-file/now-dir", b"f").file("app/swap-link/now-dir", b"g");
    t.symlink("app/su", "ping").symlink("app/fifo", "su");
}

/// Its archive has no entries for directories.
fn bare(t: &Tree) {
    t.file("lib/added", b"behind a link").file("private/new", b"new").file("lib/sub/er", b"er");
}

fn layers() -> [(Layer, bool); 6] {
    [(base, true), (kinds, true), (whiteouts, true), (opaque, true), (types, true), (bare, false)]
}

/// An OCI layout in `dir/layout` whose one image is `nasty`.
fn make(dir: &Path) -> String {
    let layout = dir.join("layout");
    let image = format!("{}:nasty", layout.display());
    run(Command::new("umoci").args(["init", "--layout"]).arg(&layout));
    run(Command::new("umoci").args(["new", "--image", &image]));
    for (n, (layer, directories)) in layers().into_iter().enumerate() {
        let tree = Tree(dir.join(format!("tree{n}")));
        fs::create_dir(&tree.0).unwrap();
        layer(&tree);
        let tar = dir.join(format!("{n}.tar"));
        let mut command = Command::new("tar");
        command.arg("-C").arg(&tree.0).args(["--format=pax", "--xattrs", "--xattrs-include=*", "-S"]);
        command.args(["--numeric-owner", "--sort=name", "-cf"]).arg(&tar);
        if directories {
            command.arg(".");
        } else {
            command.args(["lib/added", "lib/sub/er", "private/new"]);
        }
        run(&mut command);
        run(Command::new("umoci").args(["raw", "add-layer", "--image", &image]).arg(&tar));
    }
    image
}

/// All that a container can see of a file.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    kind: String,
    mode: u32,
    owner: (u32, u32),
    size: u64,
    content: String,
    modified: (i64, i64),
    attributes: BTreeMap<String, Vec<u8>>,
    device: u64,
    /// The first of its names.
    first: PathBuf,
    /// Whether a good part of it takes no space.
    sparse: bool,
}

fn tree(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let (mut all, mut waiting, mut names) = (BTreeMap::new(), vec![root.to_owned()], BTreeMap::new());
    while let Some(path) = waiting.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let name = path.strip_prefix(root).unwrap().to_owned();
        let kind = meta.file_type();
        if kind.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        } else {
            names
                .entry(meta.ino())
                .and_modify(|n: &mut PathBuf| *n = name.clone().min(n.clone()))
                .or_insert(name.clone());
        }
        let content = match () {
            () if kind.is_file() => Digest::of(&fs::read(&path).unwrap()).to_string(),
            () if kind.is_symlink() => fs::read_link(&path).unwrap().display().to_string(),
            () => String::new(),
        };
        let seen = Seen {
            kind: format!("{:?}", FileType::from_raw_mode(meta.mode())),
            mode: meta.mode() & 0o7777,
            owner: (meta.uid(), meta.gid()),
            size: if kind.is_dir() { 0 } else { meta.size() },
            content,
            modified: (meta.mtime(), meta.mtime_nsec()),
            attributes: attributes(&path),
            device: meta.rdev(),
            first: if kind.is_dir() { name.clone() } else { PathBuf::from(meta.ino().to_string()) },
            sparse: kind.is_file() && meta.blocks() * 512 < meta.size() / 2,
        };
        all.insert(name, seen);
    }
    for seen in all.values_mut() {
        if let Some(first) = seen.first.to_str().and_then(|i| i.parse().ok()).and_then(|i: u64| names.get(&i))
        {
            seen.first = first.clone();
        }
    }
    all
}

fn attributes(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    names.truncate(length);
    let names = names.split(|b| *b == 0).filter(|n| n.starts_with(b"user.") || *n == b"security.capability");
    let value = |name: &[u8]| {
        let mut value = vec![0; 64 << 10];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
        value.truncate(length);
        value
    };
    names.map(|n| (String::from_utf8(n.to_vec()).unwrap(), value(n))).collect()
}

/// Where the store differs with reason: that it does is looked at here, and then it is no difference any more.
fn settle(judge: &mut BTreeMap<PathBuf, Seen>, ours: &BTreeMap<PathBuf, Seen>, dir: &Path) {
    let mut other = |name: &str| (judge.remove(Path::new(name)).unwrap(), &ours[Path::new(name)]);
    // umoci writes zeros where the archive says that a file has holes.
    let (theirs, sparse) = other("app/sparse");
    assert!(sparse.sparse && !theirs.sparse);
    let sparse = Seen { sparse: true, ..theirs };
    // A layer that has entries in a directory but none for it does not change its time, link or not.
    let (theirs, lib) = other("usr/lib");
    let before = fs::metadata(dir.join("tree0/usr/lib")).unwrap();
    assert_eq!(lib.modified, (before.mtime(), before.mtime_nsec()));
    let lib = Seen { modified: lib.modified, ..theirs };
    // Of a directory that no layer has an entry for nobody has said a time.
    let (theirs, sub) = other("usr/lib/sub");
    let sub = Seen { modified: sub.modified, ..theirs };
    judge
        .extend([("app/sparse", sparse), ("usr/lib", lib), ("usr/lib/sub", sub)].map(|(n, s)| (n.into(), s)));
}

/// What is not the same, in words.
fn differences(judge: &BTreeMap<PathBuf, Seen>, ours: &BTreeMap<PathBuf, Seen>) -> Vec<String> {
    let names = judge.keys().chain(ours.keys()).collect::<std::collections::BTreeSet<_>>();
    let differ = names.into_iter().filter(|n| judge.get(*n) != ours.get(*n));
    differ.map(|n| format!("{n:?}: {:?}, by umoci {:?}", ours.get(n), judge.get(n))).collect()
}

async fn imported(store: &ImageStore, archive: Vec<u8>) -> ImageRecord {
    let (out, source) = feed();
    let give = async {
        for piece in archive.chunks(64 << 10) {
            assert!(out.send(piece.to_vec().into()).await);
        }
        out.end().await;
    };
    let (imported, ()) = tokio::join!(store.import(source, Some("nasty:1")), give);
    imported.unwrap().images.remove(0)
}

/// What a container of the image sees on a driver.
async fn unpacked(dir: &Path, driver: Arc<dyn Driver>, archive: Vec<u8>) -> BTreeMap<PathBuf, Seen> {
    let config = Config { dir: dir.join("images"), ..Config::default() };
    let store = ImageStore::open(config, Arc::clone(&driver)).await.unwrap();
    let record = imported(&store, archive).await;
    let mut verification = store.verify(&[], false).unwrap();
    let report = verification.next().await.unwrap().unwrap();
    assert_eq!((report.verified, report.faults), (layers().len(), Vec::new()));
    let target = dir.join("mount");
    fs::create_dir(&target).unwrap();
    driver.mount_layers(&record.layers, &target).await.unwrap();
    let seen = tree(&target);
    mounts::unmount_all_below(dir).unwrap();
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_sees_what_umoci_unpacks() {
    let dir = tempfile::tempdir().unwrap();
    let image = make(dir.path());
    let bundle = dir.path().join("bundle");
    run(Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle));
    let packed = dir.path().join("packed.tar");
    run(Command::new("tar").arg("-C").arg(dir.path().join("layout")).arg("-cf").arg(&packed).arg("."));
    let archive = fs::read(packed).unwrap();
    for style in [WhiteoutStyle::Overlay, WhiteoutStyle::Apply] {
        let place = dir.path().join(format!("{style:?}"));
        fs::create_dir(&place).unwrap();
        let overlay = OverlayDriver::open(&place.join("driver")).await.unwrap();
        let driver: Arc<dyn Driver> = match style {
            WhiteoutStyle::Overlay => Arc::new(overlay),
            WhiteoutStyle::Apply => Arc::new(ApplyingDriver(overlay)),
        };
        let ours = unpacked(&place, driver, archive.clone()).await;
        let mut judge = tree(&bundle.join("rootfs"));
        settle(&mut judge, &ours, dir.path());
        assert_eq!(differences(&judge, &ours), Vec::<String>::new(), "{style:?}");
    }
}
