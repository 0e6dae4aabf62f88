//! Layers that try to get out of their directory, to forge marks of OverlayFS, or to exhaust the host.

use std::os::unix::fs::symlink;

use proptest::prelude::*;

use super::*;

fn refused(tar: Tar) -> String {
    let dir = tempfile::tempdir().unwrap();
    match overlay(dir.path(), tar) {
        Err(Fault::Bad(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn names_that_lead_out_are_refused() {
    for name in ["..", "../x", "a/../../x", "/..", "a/..", "./../x"] {
        assert!(refused(Tar::default().file(name, "")).contains("`..`"), "{name}");
        assert!(refused(Tar::default().file("f", "").link("l", name)).contains("`..`"), "{name}");
    }
    assert!(refused(Tar::default().file("", "")).contains("empty"));
    let long = "a/".repeat(2100);
    for (name, why) in [(&b"a\0b"[..], "zero byte"), (&[b'a'; 256], "255"), (long.as_bytes(), "4095")] {
        assert!(refused(Tar::default().pax(&[("path", name)]).file("x", "")).contains(why), "{why}");
    }
    assert!(refused(Tar::default().raw(EntryType::Fifo, b"./", b"", b"")).contains("root entry"));
    assert!(refused(Tar::default().symlink(".", "/")).contains("root entry"));
}

#[test]
fn names_from_the_root_are_beneath_it() {
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::default().dir("./").dir("/").file("/etc/a", "1").file("././/b", "2").link("c", "/etc/a");
    overlay(dir.path(), tar).unwrap();
    assert!(
        dir.path().join("etc/a").exists() && dir.path().join("b").exists() && dir.path().join("c").exists()
    );
}

/// Two files in a directory that links lead to.
struct Outside(tempfile::TempDir);

impl Outside {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("secret"), "s").unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(dir.path().join("sub/secret"), "s").unwrap();
        Self(dir)
    }

    fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    fn is_untouched(&self) {
        assert_eq!(fs::read_dir(self.0.path()).unwrap().count(), 2);
        assert_eq!(fs::read_dir(self.0.path().join("sub")).unwrap().count(), 1);
        for name in ["secret", "sub/secret"] {
            let file = self.0.path().join(name);
            assert_eq!((fs::read(&file).unwrap(), fs::metadata(&file).unwrap().nlink()), (b"s".to_vec(), 1));
        }
    }
}

#[test]
fn links_are_followed_beneath_the_root_only() {
    let outside = Outside::new();
    let to = outside.path();
    let link = || Tar::default().symlink("l", to).dir("d").symlink("d/l", to);
    for (name, tar) in [
        ("x", link().file("l/x", "")),
        ("x", link().file("d/l/x", "")),
        ("x/y", link().file("l/x/y", "")),
        ("sub/x", link().dir("l/sub").file("l/sub/x", "")),
        ("sub/x", link().file("d/l/sub/x", "")),
    ] {
        let dir = tempfile::tempdir().unwrap();
        overlay(dir.path(), tar).unwrap();
        assert!(dir.path().join(&to[1..]).join(name).exists(), "{name}");
        outside.is_untouched();
    }
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::default()
        .dir("usr/bin")
        .symlink("bin", "usr/bin")
        .symlink("up", "../../../usr/../bin/../..")
        .file("bin/a", "a")
        .link("bin/b", "bin/a")
        .file("up/etc", "e");
    overlay(dir.path(), tar).unwrap();
    assert_eq!(fs::metadata(dir.path().join("usr/bin/b")).unwrap().nlink(), 2);
    assert!(dir.path().join("etc").exists());
    let over = link().file("l", "instead").dir("d/l").file("d/l/x", "").link("x", "l");
    let dir = tempfile::tempdir().unwrap();
    overlay(dir.path(), over).unwrap();
    outside.is_untouched();
    // A link that the layer below has brought.
    symlink(to, dir.path().join("below")).unwrap();
    apply(dir.path(), Tar::default().file("below/sub/x", "").file("below/secret", "")).unwrap();
    assert!(dir.path().join(&to[1..]).join("sub/x").exists());
    outside.is_untouched();
}

#[test]
fn what_is_removed_or_found_behind_a_link_is_the_images_own() {
    let outside = Outside::new();
    let to = outside.path();
    let link = || Tar::default().symlink("l", to).dir("d").symlink("d/l", to);
    for tar in [
        link().link("x", "l/sub/secret"),
        link().link("x", "l/secret"),
        link().link("l/x", "d"),
        Tar::default().symlink("a", "b").symlink("b", "a").file("a/x", ""),
    ] {
        refused(tar);
        outside.is_untouched();
    }
    for name in ["l/sub/.wh.secret", "l/sub/.wh..wh..opq", "l/.wh.secret", "l/.wh..wh..opq"] {
        overlay(tempfile::tempdir().unwrap().path(), link().file(name, "")).unwrap();
        outside.is_untouched();
    }
    let dir = tempfile::tempdir().unwrap();
    symlink(to, dir.path().join("below")).unwrap();
    let inner = dir.path().join(&to[1..]).join("sub");
    fs::create_dir_all(&inner).unwrap();
    fs::write(inner.join("secret"), "the image's own").unwrap();
    for name in ["below/.wh.secret", "below/sub/.wh.secret", "below/.wh..wh..opq"] {
        apply(dir.path(), Tar::default().file(name, "")).unwrap();
        outside.is_untouched();
    }
    assert!(!inner.exists());
}

#[test]
fn hard_links_go_to_files_of_the_layer_only() {
    let reason = refused(Tar::default().link("usr/bin/a", "usr/bin/below"));
    assert!(reason.contains("usr/bin/a") && reason.contains("usr/bin/below"), "{reason}");
    assert!(refused(Tar::default().dir("d").link("l", "d")).contains("directory"));
    assert!(refused(Tar::default().file("f", "").link("f", "f")).contains("itself"));
    assert!(refused(Tar::default().file("d/f", "").link("d", "d/f")).contains("place"));
    assert!(refused(Tar::default().file(".wh.f", "").link("l", "f")).contains("target"));
    assert!(refused(Tar::default().link("l", "")).contains("empty"));
}

#[test]
fn a_directory_is_looked_through_once_however_often_it_is_said_to_be_empty() {
    let dir = tempfile::tempdir().unwrap();
    let deep = "d/e/f/g";
    fs::create_dir_all(dir.path().join(deep)).unwrap();
    fs::write(dir.path().join(deep).join("old"), "").unwrap();
    let mut tar = Tar::default().file("d/e/f/g/new", "1").file("other/x", "");
    // From the inside to the outside, again and again, and with more in between.
    for n in 0..20 {
        for path in ["d/e/f/g", "d/e/f", "d/e", "d", "other"] {
            tar = tar.file(&format!("{path}/.wh..wh..opq"), "");
        }
        tar = tar.file("d/e/.wh.f", "").file(&format!("d/e/f/g/{n}"), "").file(".wh.d", "");
    }
    let bytes = tar.end();
    let target =
        Target { root: dir.path(), style: WhiteoutStyle::Apply, bottom: false, tape: None, below: None };
    let mut extraction = extract::Extraction::new(target).unwrap();
    extraction.run(archive::Archive::new(&bytes[..], None)).unwrap();
    assert_eq!(extraction.root.lists.get(), 5, "each directory once");
    let left = fs::read_dir(dir.path().join(deep)).unwrap().count();
    assert_eq!(left, 21, "what the layer has brought, and nothing else");
}

#[test]
fn a_hard_link_is_forgotten_with_the_directory_that_a_file_takes_the_place_of() {
    let (low, high) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(low.path().join("f"), "below").unwrap();
    let tar = Tar::default().link("d/l", "f").link("d-l", "f").file("d", "a file").end();
    let lower = vec![low.path().to_owned()];
    let target = Target {
        root: high.path(),
        style: WhiteoutStyle::Overlay,
        bottom: false,
        tape: None,
        below: Some(Box::new(move || Ok(lower.into()))),
    };
    unpack_reader(&tar[..], &Claim::default(), target).unwrap();
    assert_eq!(fs::read_to_string(high.path().join("d")).unwrap(), "a file");
    assert_eq!(fs::read_to_string(high.path().join("d-l")).unwrap(), "below");
}

#[test]
fn whiteouts_without_a_proper_name_are_refused() {
    for name in [".wh.", ".wh..", ".wh...", "a/.wh...", ".wh./x", ".wh.a/x", ".wh.a/.wh..wh..opq"] {
        refused(Tar::default().file(name, ""));
    }
    assert!(refused(Tar::default().file(".wh..wh..opq", "")).contains("root directory"));
}

#[test]
fn a_huge_sparse_file_that_the_layer_replaces_is_not_read_through() {
    let size = (8_u64 << 40).to_string();
    let huge = [("GNU.sparse.size", size.as_bytes()), ("GNU.sparse.map", &b"0,1"[..])];
    let reason = refused(Tar::default().pax(&huge).file("d", "x").file("d", "y"));
    assert!(reason.contains("replaces too many or too large files") && reason.contains('d'), "{reason}");
}

#[test]
fn marks_of_overlayfs_are_refused() {
    assert!(refused(Tar::default().raw(EntryType::Char, b"c", b"", b"")).contains("0/0"));
    for name in ["trusted.overlay.opaque", "trusted.overlay.redirect", "user.overlay.opaque"] {
        let key = format!("SCHILY.xattr.{name}");
        assert!(refused(Tar::default().pax(&[(&key, b"y")]).dir("d")).contains(name));
    }
}

#[test]
fn what_two_readers_could_see_differently_is_refused() {
    let file = || Tar::default().file("a", "x");
    for tar in [
        file().pax(&[("path", b"b")]),
        file().pax(&[("path", b"b")]).pax(&[("path", b"c")]).file("d", ""),
        file()
            .raw(EntryType::GNULongName, b"", b"", b"x")
            .raw(EntryType::GNULongName, b"", b"", b"y")
            .file("d", ""),
        file().raw(EntryType::XHeader, b"", b"", b"12 path=a\n").file("d", ""),
        file().raw(EntryType::XHeader, b"", b"", b"path=a\n").file("d", ""),
        file().raw(EntryType::XHeader, b"", b"", b"+9 path=a\n").file("d", ""),
        file().pax(&[("size", b"-1")]).file("d", ""),
        file().pax(&[("mtime", b"soon")]).file("d", ""),
        file().pax(&[("uid", b"4294967295")]).file("d", ""),
        file().pax(&[("gid", b"99999999999999")]).file("d", ""),
        file().pax(&[("GNU.sparse.major", b"1")]).file("d", ""),
        file().pax(&[("GNU.sparse.major", b"2"), ("GNU.sparse.size", b"1")]).file("d", ""),
        file().pax(&[("GNU.sparse.size", b"1"), ("GNU.sparse.map", b"0,2")]).file("d", "xx"),
        file().pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"0,2")]).file("d", "xxx"),
        file().pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"0,2,1,1")]).file("d", "xxx"),
        file().pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"4,1,2,1")]).file("d", "xx"),
        file().pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"0,1,2")]).file("d", "x"),
        file()
            .pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"18446744073709551615,2")])
            .file("d", "xx"),
        file()
            .pax(&[("GNU.sparse.size", b"18446744073709551615"), ("GNU.sparse.map", b"0,1")])
            .file("d", "x"),
        file().pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.offset", b"0")]).file("d", ""),
        file().pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"")]).dir("d"),
        file().raw(EntryType::GNUSparse, b"s", b"", b"x"),
        file().raw(EntryType::new(b'V'), b"volume", b"", b""),
        file().raw(EntryType::Directory, b"d", b"", b"content"),
        file().raw(EntryType::Symlink, b"s", b"", b""),
        Tar(file().0[..600].to_vec()),
        Tar([&file().0[..], &[0; 512], &file().0[..]].concat()),
        Tar(vec![b'x'; 512]),
    ] {
        refused(tar);
    }
}

#[test]
fn the_size_that_an_extended_header_gives_decides() {
    let dir = tempfile::tempdir().unwrap();
    let mut big = header(EntryType::Regular, b"a", 0);
    big.set_cksum();
    let tar = Tar::default().pax(&[("SCHILY.xattr.user.a", b"\n\n"), ("size", b"600")]);
    let tar = Tar([&tar.0[..], big.as_bytes(), &[b'z'; 600], &[0; 424]].concat()).file("b", "");
    overlay(dir.path(), tar).unwrap();
    assert_eq!(fs::metadata(dir.path().join("a")).unwrap().len(), 600);
    assert!(dir.path().join("b").exists());
}

#[test]
fn headers_cannot_fill_the_memory() {
    let large = vec![b'a'; (1 << 20) + 1];
    for kind in [EntryType::XHeader, EntryType::XGlobalHeader, EntryType::GNULongName, EntryType::GNULongLink]
    {
        assert!(refused(Tar::default().raw(kind, b"h", b"", &large).file("a", "")).contains("more than"));
    }
    // A size beyond all reason is refused before anything of that size comes.
    let mut huge = header(EntryType::Regular, b"a", 0);
    huge.as_old_mut().size = [0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    assert!(refused(Tar::default().header(huge, b"")).contains("larger"));
}

#[test]
fn a_stream_has_a_bound() {
    let mut bounded = crate::layer::stream::Hashing::new(std::io::repeat(0), 100_000);
    assert!(std::io::copy(&mut bounded, &mut std::io::sink()).is_err());
}

fn part() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["a", "b", "c", "..", ".", "", ".wh.a", ".wh..wh..opq", ".wh..", "OUT"])
}

fn name() -> impl Strategy<Value = String> {
    (prop::bool::weighted(0.2), prop::collection::vec(part(), 1..4))
        .prop_map(|(rooted, parts)| format!("{}{}", if rooted { "/" } else { "" }, parts.join("/")))
}

fn kind() -> impl Strategy<Value = EntryType> {
    prop::sample::select(vec![
        EntryType::Regular,
        EntryType::Directory,
        EntryType::Symlink,
        EntryType::Link,
        EntryType::Fifo,
        EntryType::Char,
    ])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// `OUT` stands for a directory beside the root: nothing that an archive can say reaches it.
    #[test]
    fn nothing_outside_is_touched(
        lower in prop::collection::vec((kind(), name(), name()), 0..6),
        upper in prop::collection::vec((kind(), name(), name()), 1..12),
        applied in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (root, out) = (dir.path().join("root"), dir.path().join("out"));
        fs::create_dir(&root).unwrap();
        fs::create_dir(&out).unwrap();
        fs::create_dir(out.join("c")).unwrap();
        for name in ["a", "b", "c/a"] {
            fs::write(out.join(name), "untouched").unwrap();
        }
        let before = fs::metadata(&out).unwrap().mtime_nsec();
        let style = if applied { WhiteoutStyle::Apply } else { WhiteoutStyle::Overlay };
        for (bottom, entries) in [(true, &lower), (false, &upper)] {
            let mut tar = Tar::default();
            for (kind, name, link) in entries {
                let link = link.replace("OUT", out.to_str().unwrap());
                if link.len() < 100 {
                    let link = if matches!(kind, EntryType::Symlink | EntryType::Link) { link.as_bytes() } else { b"" };
                    tar = tar.raw(*kind, name.as_bytes(), link, b"");
                }
            }
            let outcome = extract_as(&root, style, bottom, &tar.end());
            prop_assert!(matches!(outcome, Ok(()) | Err(Fault::Bad(_))), "{outcome:?}");
        }
        prop_assert_eq!(fs::read_dir(&out).unwrap().count(), 3);
        prop_assert_eq!(fs::read_dir(out.join("c")).unwrap().count(), 1);
        prop_assert_eq!(fs::metadata(&out).unwrap().mtime_nsec(), before);
        for name in ["a", "b", "c/a"] {
            let file = fs::metadata(out.join(name)).unwrap();
            prop_assert_eq!((file.len(), file.nlink(), file.mode() & 0o7777), (9, 1, 0o644));
        }
        prop_assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn any_bytes_are_unpacked_or_refused(
        start in prop::sample::select(vec![&b""[..], &[0x1f, 0x8b, 8, 0], &[0x28, 0xb5, 0x2f, 0xfd]]),
        bytes in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let blob = [start, &bytes].concat();
        let outcome = unpack_blob(dir.path(), WhiteoutStyle::Overlay, true, &blob, &blob);
        prop_assert!(!matches!(outcome, Err(Fault::System { .. } | Fault::Cut)), "{outcome:?}");
    }

    #[test]
    fn a_damaged_archive_stays_beneath_its_root(at in 0_usize..4096, byte in any::<u8>()) {
        let dir = tempfile::tempdir().unwrap();
        let mut tar = Tar::default().pax(&[("path", b"long/name")]).file("a", "x").symlink("b", "/").end();
        let n = at % tar.len();
        tar[n] = byte;
        let outcome = extract_as(dir.path(), WhiteoutStyle::Overlay, true, &tar);
        prop_assert!(matches!(outcome, Ok(()) | Err(Fault::Bad(_))), "{outcome:?}");
    }
}
