//! The two ways of expressing whiteouts against each other: layers side by side under a real OverlayFS look as if
//! they had been applied one after the other.

use std::{collections::BTreeMap, sync::Arc};

use moxlet_ids::{ChainId, ContainerId};
use moxlet_storage::{Driver, IdMap, OverlayDriver};
use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    File(String),
    Dir(String, u32),
    Link(String, &'static str),
    HardLink(String, String),
    Whiteout(String),
    Opaque(String),
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4).prop_map(|p| p.join("/"))
}

/// Where links lead to.
const LEADS: &[&str] = &["nowhere", "a", "b/c", "/c", "../b", "../../a/b", ".", ".."];

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => path().prop_map(Step::File),
        2 => (path(), prop::sample::select(vec![0o700, 0o1777, 0o755])).prop_map(|(p, m)| Step::Dir(p, m)),
        1 => (path(), prop::sample::select(LEADS)).prop_map(|(p, t)| Step::Link(p, t)),
        1 => (path(), path()).prop_map(|(p, t)| Step::HardLink(p, t)),
        2 => path().prop_map(Step::Whiteout),
        1 => path().prop_map(Step::Opaque),
    ]
}

fn archive(layer: usize, steps: &[Step]) -> Vec<u8> {
    let mut tar = Tar::default();
    for (n, step) in steps.iter().enumerate() {
        tar = match step {
            Step::File(path) => tar.file(path, &format!("{layer}.{n}")),
            Step::Dir(path, mode) => {
                let mut header = header(EntryType::Directory, path.as_bytes(), 0);
                header.set_mode(*mode);
                header.set_uid(layer as u64);
                tar.header(header, b"")
            }
            Step::HardLink(path, target) => tar.link(path, target),
            Step::Link(path, to) => tar.symlink(path, to),
            Step::Whiteout(path) => {
                let (dir, name) = path.rsplit_once('/').unwrap_or((".", path));
                tar.file(&format!("{dir}/.wh.{name}"), "")
            }
            Step::Opaque(path) => tar.file(&format!("{path}/.wh..wh..opq"), ""),
        };
    }
    tar.end()
}

/// Paths and what is there.
fn tree(root: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            // A whiteout in a directory that only one layer has is listed, but cannot be looked at.
            let Ok(meta) = fs::symlink_metadata(&path) else { continue };
            let what = if meta.is_dir() {
                waiting.push(path.clone());
                format!("directory {:o} of {}", meta.mode(), meta.uid() % 100_000)
            } else if meta.is_symlink() {
                format!("link to {}", fs::read_link(&path).unwrap().display())
            } else {
                fs::read_to_string(&path).unwrap()
            };
            found.insert(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned(), what);
        }
    }
    found
}

async fn stacked(dir: &Path, layers: &[Vec<u8>]) -> Option<BTreeMap<String, String>> {
    let driver = Arc::new(OverlayDriver::open(dir).await.unwrap());
    let mut chains: Vec<ChainId> = Vec::new();
    for (n, tar) in layers.iter().enumerate() {
        let diff_id = Digest::of(tar);
        let chain = chains.last().map_or_else(|| ChainId::base(&diff_id), |c| c.push(&diff_id));
        let draft = driver.begin_layer(chains.last()).await.unwrap();
        let tar = tar.clone();
        let mut views = Vec::new();
        for chain in chains.iter().rev() {
            views.push(driver.open_layer(chain).await.unwrap());
        }
        let tape = dir.join(format!("{n}.tape"));
        let work = move || {
            let target = Target {
                root: draft.path(),
                style: WhiteoutStyle::Overlay,
                bottom: n == 0,
                tape: Some(&tape),
                below: Some(Box::new(move || Ok(Lower::from(views)))),
            };
            unpack(pieces(&tar, true), &claim(&tar, &tar), target)?;
            assert!(rebuilt(&tape, draft.path()).unwrap() == tar, "the archive is another one");
            let check = check(draft.path(), &tape, WhiteoutStyle::Overlay, n == 0).unwrap();
            assert_eq!(check.differences, Vec::<String>::new());
            Ok(draft)
        };
        match tokio::task::spawn_blocking(work).await.unwrap() {
            Ok(draft) => driver.commit_layer(draft, &chain, moxlet_storage::Usage::default()).await.unwrap(),
            Err(Fault::Bad(_)) => {
                // The draft is removed in the background, and has to be before its directory.
                let tmp = dir.join("tmp");
                crate::tests::eventually(|| std::future::ready(fs::read_dir(&tmp).unwrap().count() == 0))
                    .await;
                return None;
            }
            Err(other) => panic!("{other:?}"),
        }
        chains.push(chain);
    }
    let (id, target) = (ContainerId::random(), dir.join("mount"));
    driver.create_root(&id, &chains, IdMap::default().into()).await.unwrap();
    driver.mount_root(&id, &target).await.unwrap();
    let seen = tree(&target);
    driver.unmount_root(&id, &target).await.unwrap();
    driver.close().await.unwrap();
    Some(seen)
}

/// What both ways show of an image; nothing where one of them refuses it.
fn both(layers: &[Vec<u8>]) -> Option<[BTreeMap<String, String>; 2]> {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let stacked = runtime.block_on(stacked(&dir.path().join("driver"), layers));
    let root = dir.path().join("applied");
    fs::create_dir(&root).unwrap();
    for (n, tar) in layers.iter().enumerate() {
        extract_as(&root, WhiteoutStyle::Apply, n == 0, tar).ok()?;
    }
    Some([stacked?, tree(&root)])
}

fn seen(layers: &[Tar]) -> BTreeMap<String, String> {
    let layers: Vec<_> = layers.iter().map(|l| l.clone().end()).collect();
    let [stacked, applied] = both(&layers).unwrap();
    assert_eq!(stacked, applied);
    stacked
}

/// As containerd makes a directory that no layer below has: of root, with the mode 0755.
#[test]
fn a_removed_directory_with_entries_is_a_new_one() {
    let mut old = header(EntryType::Directory, b"a", 0);
    old.set_mode(0o700);
    old.set_uid(7);
    let base = || Tar::default().header(old.clone(), b"").file("a/old", "");
    for top in [
        Tar::default().file("a/a", "new").file(".wh.a", ""),
        Tar::default().file(".wh.a", "").file("a/a", "new"),
    ] {
        let seen = seen(&[base(), top]);
        assert_eq!(seen["a"], "directory 40755 of 0");
        assert_eq!((seen["a/a"].as_str(), seen.get("a/old")), ("new", None));
    }
}

#[test]
fn entries_behind_links_of_a_lower_layer_go_to_where_they_lead() {
    let base = Tar::default()
        .dir("usr/lib")
        .file("usr/lib/old", "old")
        .file("usr/lib/gone", "")
        .file("usr/lib/sub/gone", "")
        .symlink("lib", "usr/lib")
        .symlink("chain", "abs/../lib")
        .symlink("abs", "/usr/lib")
        .symlink("up", "../../../../usr");
    let seen = seen(&[
        base,
        Tar::default()
            .file("lib/x", "first")
            .file("usr/lib/x", "second")
            .file("lib/y", "y")
            .link("lib/z", "abs/old")
            .file("abs/deep/er", "er")
            .file("up/share/s", "s")
            .file("chain/.wh.gone", "")
            .file("lib/sub/.wh..wh..opq", "")
            .file("chain/sub/new", "new"),
        Tar::default().file("lib/y", "again").file("lib/deep/.wh.er", ""),
    ]);
    for (name, what) in [
        ("lib", "link to usr/lib"),
        ("usr/lib/x", "second"),
        ("usr/lib/y", "again"),
        ("usr/lib/z", "old"),
        ("usr/lib/old", "old"),
        ("usr/lib/sub/new", "new"),
        ("usr/share/s", "s"),
    ] {
        assert_eq!(seen.get(name).map(String::as_str), Some(what), "{name}");
    }
    for name in ["usr/lib/gone", "usr/lib/sub/gone", "usr/lib/deep/er", "share"] {
        assert_eq!(seen.get(name), None, "{name}");
    }
}

#[test]
fn a_link_of_a_lower_layer_leads_nowhere_once_it_is_removed_or_replaced() {
    let base = Tar::default().dir("usr/lib").symlink("lib", "usr/lib").symlink("bin", "usr/lib");
    let seen = seen(&[
        base,
        Tar::default()
            .file("lib/before", "")
            .file(".wh.lib", "")
            .file("lib/after", "")
            .file("bin/before", "")
            .dir("bin")
            .file("bin/d/after", ""),
    ]);
    let names: Vec<&str> = seen.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        ["bin", "bin/d", "bin/d/after", "lib", "lib/after", "usr", "usr/lib", "usr/lib/before"]
    );
}

#[test]
fn a_directory_has_the_attributes_of_its_last_entry_alone() {
    let base = Tar::default()
        .pax(&[("SCHILY.xattr.user.a", b"old"), ("SCHILY.xattr.user.b", b"old")])
        .dir("d")
        .end();
    let top = Tar::default()
        .pax(&[("SCHILY.xattr.user.c", b"first")])
        .dir("d")
        .pax(&[("SCHILY.xattr.user.a", b"new")])
        .dir("d")
        .end();
    for style in [WhiteoutStyle::Overlay, WhiteoutStyle::Apply] {
        let root = tempfile::tempdir().unwrap();
        extract_as(root.path(), style, true, &base).unwrap();
        extract_as(root.path(), style, false, &top).unwrap();
        let names: Vec<_> = xattr::list(root.path().join("d")).unwrap().collect();
        assert_eq!(names, ["user.a"]);
        assert_eq!(xattr::get(root.path().join("d"), "user.a").unwrap().unwrap(), b"new");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn stacked_layers_look_like_applied_ones(
        layers in prop::collection::vec(prop::collection::vec(step(), 1..7), 2..4),
    ) {
        let layers: Vec<_> = layers.iter().enumerate().map(|(n, steps)| archive(n, steps)).collect();
        if let Some([stacked, applied]) = both(&layers) {
            prop_assert_eq!(stacked, applied);
        }
    }
}
