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
    Link(String),
    HardLink(String, String),
    Whiteout(String),
    Opaque(String),
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4).prop_map(|p| p.join("/"))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => path().prop_map(Step::File),
        2 => (path(), prop::sample::select(vec![0o700, 0o1777, 0o755])).prop_map(|(p, m)| Step::Dir(p, m)),
        1 => path().prop_map(Step::Link),
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
            Step::Link(path) => tar.symlink(path, "nowhere"),
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
                "link".to_owned()
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
        let work = move || {
            let target = Target {
                root: draft.path(),
                style: WhiteoutStyle::Overlay,
                bottom: n == 0,
                tape: None,
                below: Some(Box::new(move || Ok(Lower::from(views)))),
            };
            unpack(pieces(&tar, true), &claim(&tar, &tar), target).map(|_| draft)
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn stacked_layers_look_like_applied_ones(
        layers in prop::collection::vec(prop::collection::vec(step(), 1..7), 2..4),
    ) {
        let layers: Vec<_> = layers.iter().enumerate().map(|(n, steps)| archive(n, steps)).collect();
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let stacked = runtime.block_on(stacked(&dir.path().join("driver"), &layers));
        let root = dir.path().join("applied");
        fs::create_dir(&root).unwrap();
        let mut applied = Ok(());
        for (n, tar) in layers.iter().enumerate() {
            applied = applied.and_then(|()| extract_as(&root, WhiteoutStyle::Apply, n == 0, tar));
        }
        if let (Some(stacked), Ok(())) = (stacked, applied) {
            prop_assert_eq!(stacked, tree(&root));
        }
    }
}
