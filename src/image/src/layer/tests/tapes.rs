//! Tapes: what is taken away comes again, and what cannot is said by name.

use std::io::Seek;

use super::*;
use crate::layer::tape::Tape;

/// A layer that was extracted, with its tape.
struct Layer {
    dir: tempfile::TempDir,
    tar: Vec<u8>,
}

impl Layer {
    fn new(style: WhiteoutStyle, tar: Tar) -> Self {
        let (dir, tar) = (tempfile::tempdir().unwrap(), tar.end());
        fs::create_dir(dir.path().join("root")).unwrap();
        let layer = Self { dir, tar };
        let (root, tape) = (layer.root(), layer.tape());
        let target = Target { root: &root, style, bottom: false, tape: Some(&tape), below: None };
        unpack(pieces(&layer.tar, true), &claim(&layer.tar, &layer.tar), target).unwrap();
        layer
    }

    fn root(&self) -> std::path::PathBuf {
        self.dir.path().join("root")
    }

    fn tape(&self) -> std::path::PathBuf {
        self.dir.path().join("tape")
    }

    fn rebuilt(&self) -> io::Result<Vec<u8>> {
        rebuilt(&self.tape(), &self.root())
    }
}

#[test]
fn contents_that_later_entries_replace_are_kept() {
    let big = "z".repeat(300_000);
    let tar = || {
        Tar::default()
            .file("a", "first")
            .link("a2", "a")
            .file("a", "second")
            .file("a2", "third")
            .file("a", "fourth")
            .dir("d/e")
            .file("d/e/f", &big)
            .link("d/e/g", "d/e/f")
            .file("d/e/h", "")
            .file("d", "instead")
            .file("d", "once more")
            .symlink("a", "d")
            .dir("a2")
    };
    for style in [WhiteoutStyle::Overlay, WhiteoutStyle::Apply] {
        let layer = Layer::new(style, tar());
        assert!(layer.rebuilt().unwrap() == layer.tar);
        assert!(fs::metadata(layer.tape()).unwrap().len() < 2000, "it is compressed");
        assert_eq!(fs::read_dir(layer.dir.path()).unwrap().count(), 2, "nothing else is left");
    }
}

#[test]
fn a_link_that_is_replaced_again_and_again_costs_nothing() {
    let mut tar = Tar::default().file("big", &"x".repeat(100_000));
    for _ in 0..200 {
        tar = tar.link("l", "big").file("l", "");
    }
    let layer = Layer::new(WhiteoutStyle::Overlay, tar);
    assert!(layer.rebuilt().unwrap() == layer.tar);
    assert!(fs::metadata(layer.tape()).unwrap().len() < 20_000);
}

#[test]
fn a_layer_that_was_changed_is_told_by_name() {
    let layer = Layer::new(WhiteoutStyle::Overlay, Tar::default().file("d/a", "content").file("b", "x"));
    let file = layer.root().join("d/a");
    let refused = |part: &str| {
        let error = layer.rebuilt().unwrap_err().to_string();
        assert!(error.contains("d/a") && error.contains(part), "{error}");
    };
    fs::write(&file, "longer content").unwrap();
    refused("14 bytes, not 7");
    fs::remove_file(&file).unwrap();
    refused("opened");
    std::os::unix::fs::symlink("../b", &file).unwrap();
    refused("opened");
    fs::remove_file(&file).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &file, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    refused("not a file");
    fs::remove_file(&file).unwrap();
    fs::remove_dir(layer.root().join("d")).unwrap();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("a"), "content").unwrap();
    std::os::unix::fs::symlink(outside.path(), layer.root().join("d")).unwrap();
    refused("opened");
    let mut lenient = Tape::open(&layer.tape()).unwrap().over(&layer.root()).unwrap().lenient();
    let mut tar = Vec::new();
    lenient.read_to_end(&mut tar).unwrap();
    assert_eq!(tar.len(), layer.tar.len());
    assert_eq!(lenient.faults().take().len(), 1);
}

#[test]
fn of_several_entries_of_the_root_directory_the_last_counts() {
    let dir = tempfile::tempdir().unwrap();
    // A file by its type whose name ends in a slash is a directory, and has a file's mode here.
    overlay(dir.path(), Tar::default().file("./", "").dir("./").file("a", "a")).unwrap();
    assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o7777, 0o755);
}

#[test]
fn a_damaged_tape_is_refused() {
    let tar = Tar::default().file("a", "first").file("a", "second").file("b", &"x".repeat(70_000));
    let layer = Layer::new(WhiteoutStyle::Overlay, tar);
    let tape = fs::read(layer.tape()).unwrap();
    for cut in [0, 7, 20, 32, tape.len() / 2, tape.len() - 1] {
        fs::write(layer.tape(), &tape[..cut]).unwrap();
        assert!(layer.rebuilt().is_err(), "{cut}");
    }
    for at in 0..tape.len() {
        let mut damaged = tape.clone();
        damaged[at] ^= 0x55;
        fs::write(layer.tape(), &damaged).unwrap();
        // A bit may turn into another archive, which then has another digest; it never hangs or panics.
        let _ = layer.rebuilt();
    }
    let mut file = fs::File::create(layer.tape()).unwrap();
    file.write_all(&tape).unwrap();
    file.rewind().unwrap();
    assert!(layer.rebuilt().unwrap() == layer.tar);
}

#[test]
fn sparse_files_are_sparse_and_come_again() {
    let (old, stored) = old_sparse();
    let map = b"3\n0\n512\n1048576\n1024\n5242880\n0\n";
    let mut content = map.to_vec();
    content.resize(512, 0);
    content.extend_from_slice(&[b'd'; 1536]);
    let mut tar = Tar::default()
        .pax(&[
            ("GNU.sparse.size", b"1050000"),
            ("GNU.sparse.numblocks", b"2"),
            ("GNU.sparse.offset", b"0"),
            ("GNU.sparse.numbytes", b"3"),
            ("GNU.sparse.offset", b"1048576"),
            ("GNU.sparse.numbytes", b"2"),
        ])
        .file("zero", "abcde")
        .pax(&[
            ("GNU.sparse.size", b"1050000"),
            ("GNU.sparse.numblocks", b"2"),
            ("GNU.sparse.name", b"one"),
            ("GNU.sparse.map", b"4096,3,1048576,2"),
        ])
        .file("GNUSparseFile.0/one", "abcde")
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"two"),
            ("GNU.sparse.realsize", b"5242880"),
        ])
        .raw(EntryType::Regular, b"GNUSparseFile.0/two", b"", &content);
    tar.0.extend_from_slice(&old);
    let tar = tar.content(&stored).file("after", "x").file("one", "replaced");
    for style in [WhiteoutStyle::Overlay, WhiteoutStyle::Apply] {
        let layer = Layer::new(style, tar.clone());
        assert!(layer.rebuilt().unwrap() == layer.tar);
        let read = |name: &str| fs::read(layer.root().join(name)).unwrap();
        let zero = read("zero");
        assert_eq!(
            (zero.len(), &zero[..4], &zero[1_048_576..1_048_579]),
            (1_050_000, &b"abc\0"[..], &b"de\0"[..])
        );
        let two = read("two");
        assert_eq!(
            (two.len(), two[511], two[512], two[1_048_576], two[1_049_599]),
            (5_242_880, b'd', 0, b'd', b'd')
        );
        let old = read("old");
        assert_eq!((old.len(), old[1024], old[1025], old[29 * 1024]), (1 << 20, b'2', 0, b'3'));
        for name in ["zero", "two", "old"] {
            let blocks = fs::metadata(layer.root().join(name)).unwrap().blocks();
            assert!(blocks < 400, "{name} has {blocks} blocks");
        }
        assert_eq!(read("one"), b"replaced");
    }
}

/// A file in GNU's old format whose map needs two more blocks: 30 kibibytes with one byte each.
fn old_sparse() -> (Vec<u8>, Vec<u8>) {
    let pairs: Vec<(u64, u64)> = (0..30).map(|n| (n * 1024, 1)).collect();
    let stored: Vec<u8> = (0..30).map(|n| b'1' + n % 3).collect();
    let mut header = header(EntryType::GNUSparse, b"old", stored.len() as u64);
    let octal = |n: u64| format!("{n:011o}\0").into_bytes();
    let put = |block: &mut [u8], pairs: &[(u64, u64)]| {
        for (n, (offset, length)) in pairs.iter().enumerate() {
            block[n * 24..n * 24 + 12].copy_from_slice(&octal(*offset));
            block[n * 24 + 12..n * 24 + 24].copy_from_slice(&octal(*length));
        }
    };
    let bytes = header.as_mut_bytes();
    put(&mut bytes[386..482], &pairs[..4]);
    bytes[482] = 1;
    bytes[483..495].copy_from_slice(&octal(1 << 20));
    header.set_cksum();
    let mut out = header.as_bytes().to_vec();
    for (n, part) in pairs[4..].chunks(21).enumerate() {
        let mut block = [0; 512];
        put(&mut block[..504], part);
        block[504] = u8::from(n == 0);
        out.extend_from_slice(&block);
    }
    (out, stored)
}

#[test]
fn a_check_names_everything_that_was_changed() {
    let mut null = header(EntryType::Char, b"null", 0);
    null.set_device_major(1).unwrap();
    null.set_device_minor(3).unwrap();
    let tar = || {
        Tar::default()
            .dir("./")
            .pax(&[("SCHILY.xattr.user.a", b"v"), ("mtime", b"5.25")])
            .file("d/a", "content")
            .link("d/hard", "d/a")
            .symlink("s", "d/a")
            .symlink("way", "d")
            .file("way/b", "through a link")
            .header(null.clone(), b"")
            .raw(EntryType::Fifo, b"fifo", b"", b"")
            .file("twice/x", "")
            .file("twice", "gone")
            .dir("twice")
            .file("twice/y", "")
            .file("d/.wh.gone", "")
    };
    for style in [WhiteoutStyle::Overlay, WhiteoutStyle::Apply] {
        let layer = Layer::new(style, tar());
        let differences = || {
            let check = crate::layer::check(&layer.root(), &layer.tape(), style, false).unwrap();
            assert_eq!(
                check.diff_id == Digest::of(&layer.tar),
                check.differences.iter().all(|d| !d.contains("bytes"))
            );
            check.differences
        };
        assert_eq!(differences(), [""; 0]);
        let at = |name: &str| layer.root().join(name);
        fs::set_permissions(at("d/a"), fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(differences(), ["\"d/a\" has the mode 600, not 644"]);
        std::os::unix::fs::chown(at("null"), Some(1), Some(2)).unwrap();
        xattr::set(at("d/a"), "user.b", b"more").unwrap();
        fs::write(at("way/b"), "other").unwrap();
        fs::remove_file(at("fifo")).unwrap();
        fs::remove_file(at("s")).unwrap();
        std::os::unix::fs::symlink("d", at("s")).unwrap();
        fs::remove_file(at("d/hard")).unwrap();
        fs::write(at("d/hard"), "").unwrap();
        let told = differences().join("\n");
        for part in [
            "\"null\" belongs to 1:2",
            "\"d/a\" has other ext",
            "\"d/b\" has 5 bytes",
            "\"fifo\" is missing",
            "\"s\" is a link to \"d\"",
            "\"d/hard\" is no hard link",
        ] {
            assert!(told.contains(part), "{part} in {told}");
        }
        if style == WhiteoutStyle::Overlay {
            fs::write(at("twice/stranger"), "").unwrap();
            fs::remove_file(at("d/gone")).unwrap();
            let told = differences().join("\n");
            assert!(
                told.contains("\"twice/stranger\" does not belong") && told.contains("\"d/gone\" has lost")
            );
        }
    }
}
