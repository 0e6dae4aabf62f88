//! What a layer needs of those below when it is extracted beside them.

use super::*;

/// Layers side by side, each with those below it at hand.
struct Beside {
    dir: tempfile::TempDir,
    layers: usize,
}

impl Beside {
    fn new(layers: Vec<Tar>) -> Self {
        let mut this = Self { dir: tempfile::tempdir().unwrap(), layers: 0 };
        for tar in layers {
            this.add(tar).unwrap();
        }
        this
    }

    fn layer(&self, n: usize) -> std::path::PathBuf {
        self.dir.path().join(n.to_string())
    }

    fn add(&mut self, tar: Tar) -> Outcome<std::path::PathBuf> {
        let (root, tape) = (self.layer(self.layers), self.dir.path().join("tape"));
        fs::create_dir(&root).unwrap();
        let below: Vec<_> = (0..self.layers).rev().map(|n| self.layer(n)).collect();
        let tar = tar.end();
        let target = Target {
            root: &root,
            style: WhiteoutStyle::Overlay,
            bottom: self.layers == 0,
            tape: Some(&tape),
            below: Some(Box::new(move || Ok(Lower::from(below)))),
        };
        let unpacked = unpack(pieces(&tar, true), &claim(&tar, &tar), target);
        if unpacked.is_ok() {
            assert!(rebuilt(&tape, &root).unwrap() == tar);
        }
        fs::remove_file(&tape).unwrap();
        self.layers += 1;
        unpacked.map(|_| root)
    }

    fn refused(&mut self, tar: Tar) -> String {
        match self.add(tar) {
            Err(Fault::Bad(reason)) => {
                self.layers -= 1;
                fs::remove_dir_all(self.layer(self.layers)).unwrap();
                reason
            }
            other => panic!("{other:?}"),
        }
    }
}

fn special(kind: EntryType, name: &str, mode: u32, uid: u64) -> Header {
    let mut header = header(kind, name.as_bytes(), 0);
    header.set_mode(mode);
    header.set_uid(uid);
    header
}

fn look(path: &Path) -> fs::Metadata {
    fs::symlink_metadata(path).unwrap()
}

#[test]
fn hard_links_to_lower_layers_are_copied_up() {
    let base = Tar::default()
        .pax(&[("mtime", b"77.5"), ("SCHILY.xattr.user.a", b"v")])
        .header(special(EntryType::Directory, "d/e", 0o1750, 7), b"")
        .pax(&[("mtime", b"5.25"), ("SCHILY.xattr.user.a", b"v")])
        .file("d/e/f", "content")
        .pax(&[("mtime", b"6.5")])
        .symlink("d/e/s", "nowhere")
        .header(special(EntryType::Fifo, "d/e/p", 0o640, 9), b"")
        .file("replaced", "old");
    let mut beside = Beside::new(vec![base, Tar::default().file("replaced", "newer")]);
    let top = Tar::default()
        .link("x/f1", "d/e/f")
        .link("x/f2", "d/e/f")
        .link("x/f3", "x/f1")
        .link("s", "d/e/s")
        .link("p", "d/e/p")
        .link("r", "replaced")
        .link("gone", "d/e/f")
        .file("gone", "own");
    let root = beside.add(top).unwrap();
    let file = look(&root.join("x/f1"));
    assert_eq!((file.nlink(), file.mtime(), file.mtime_nsec()), (4, 5, 250_000_000));
    assert_eq!(fs::read(root.join("x/f3")).unwrap(), b"content");
    assert_eq!(xattr::get(root.join("x/f2"), "user.a").unwrap().unwrap(), b"v");
    assert_eq!(look(&root.join("d/e/f")).ino(), file.ino(), "the file itself is copied up as well");
    let dir = look(&root.join("d/e"));
    assert_eq!((dir.mode() & 0o7777, dir.uid(), dir.mtime()), (0o1750, 7, 77));
    assert_eq!(fs::read_link(root.join("s")).unwrap(), Path::new("nowhere"));
    assert_eq!((look(&root.join("s")).mtime_nsec(), look(&root.join("s")).nlink()), (500_000_000, 2));
    let fifo = look(&root.join("p"));
    assert!(fifo.file_type().is_fifo());
    assert_eq!((fifo.mode() & 0o7777, fifo.uid()), (0o640, 9));
    assert_eq!(fs::read(root.join("r")).unwrap(), b"newer", "of the topmost layer");
    assert_eq!(fs::read(root.join("gone")).unwrap(), b"own");
}

#[test]
fn a_link_to_what_is_removed_hidden_or_no_file_is_refused() {
    let base = Tar::default().file("a", "").file("d/a", "").file("o/a", "").symlink("l", "d").file("t", "");
    let second = Tar::default().file(".wh.a", "").file("o/.wh..wh..opq", "").file("d/.wh.a", "").dir("t");
    let mut beside = Beside::new(vec![base, second]);
    for (tar, why) in [
        (Tar::default().link("x", "a"), "no target"),
        (Tar::default().link("x", "d/a"), "no target"),
        (Tar::default().link("x", "o/a"), "no target"),
        (Tar::default().link("x", "l/a"), "no target"),
        (Tar::default().link("x", "never/was"), "no target"),
        (Tar::default().link("x", "o"), "directory"),
        (Tar::default().link("x", "t"), "directory"),
        (Tar::default().file(".wh.l", "").link("x", "l"), "no target"),
        (Tar::default().file("o/.wh..wh..opq", "").link("x", "o/a"), "no target"),
    ] {
        let reason = beside.refused(tar);
        assert!(reason.contains(why) && reason.contains("\"x\""), "{reason}");
    }
    let late = Tar::default().link("x", "l").file(".wh.l", "");
    let root = beside.add(late).unwrap();
    assert!(look(&root.join("x")).is_symlink() && is_removed(&root.join("l")));
}

#[test]
fn a_directory_without_an_entry_is_as_below() {
    let dir = |name: &str, mode: u32, uid: u64| special(EntryType::Directory, name, mode, uid);
    let base = Tar::default()
        .header(dir("./", 0o711, 3), b"")
        .header(dir("a", 0o1777, 1), b"")
        .header(dir("a/b", 0o700, 2), b"")
        .header(dir("h", 0o700, 2), b"")
        .header(dir("h/i", 0o700, 2), b"")
        .header(dir("w", 0o700, 2), b"")
        .file("f", "");
    let mut beside = Beside::new(vec![base, Tar::default().file("a/x", "")]);
    let seen = |root: &Path, name: &str| {
        let meta = look(&root.join(name));
        (meta.mode() & 0o7777, meta.uid())
    };
    assert_eq!(seen(&beside.layer(1), "a"), (0o1777, 1));
    let top = Tar::default()
        .file("a/b/c/new", "")
        .file("h/.wh..wh..opq", "")
        .file("h/i/new", "")
        .file(".wh.w", "")
        .file("w/new", "")
        .file("f/new", "");
    let root = beside.add(top).unwrap();
    for (name, wanted) in [
        ("", (0o711, 3)),
        ("a", (0o1777, 1)),
        ("a/b", (0o700, 2)),
        ("a/b/c", (0o755, 0)),
        ("h", (0o700, 2)),
        ("h/i", (0o755, 0)),
        ("w", (0o755, 0)),
        ("f", (0o755, 0)),
    ] {
        assert_eq!(seen(&root, name), wanted, "{name}");
    }
    assert!(is_opaque(&root.join("h")) && is_opaque(&root.join("w")) && !is_opaque(&root.join("a")));
}

#[test]
fn an_opaque_root_hides_every_name_below() {
    let base = Tar::default().file("a", "").file("d/a", "").file("gone", "").symlink("l", "a");
    let mut beside = Beside::new(vec![base, Tar::default().file(".wh.gone", "").file("b", "")]);
    let root = beside.add(Tar::default().file("d/new", "").file(".wh..wh..opq", "").file("l", "")).unwrap();
    for name in ["a", "b"] {
        assert!(is_removed(&root.join(name)), "{name}");
    }
    assert!(is_opaque(&root.join("d")) && root.join("d/new").is_file() && root.join("l").is_file());
    assert_eq!(fs::read_dir(root).unwrap().count(), 4);
}

#[test]
fn an_entry_behind_a_loop_of_links_of_lower_layers_is_refused() {
    let mut beside = Beside::new(vec![
        Tar::default().dir("usr/lib").symlink("lib", "usr/lib").symlink("a", "b").symlink("c", "c/d"),
        Tar::default().symlink("b", "/a"),
    ]);
    for tar in [Tar::default().file("a/x", ""), Tar::default().file("c/.wh.x", "")] {
        let reason = beside.refused(tar);
        assert!(reason.contains("too many symbolic links"), "{reason}");
    }
    let root = beside.add(Tar::default().file("lib/x/y", "").file("lib/.wh.x", "")).unwrap();
    let names: Vec<_> = fs::read_dir(&root).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["usr"]);
    assert!(is_opaque(&root.join("usr/lib/x")) && root.join("usr/lib/x/y").exists());
    beside.add(Tar::default().dir("lib").file("lib/x", "")).unwrap();
}
