//! Layers: made, read, shown, counted and removed.

use std::{fs, path::Path};

use moxlet_ids::{ChainId, Digest};
use moxlet_storage::{Error, Usage, WhiteoutStyle, mounts};
use moxlet_tests_component::wait::until;

use crate::{
    bed::{Store, entries, map, on_every_bed},
    content::{
        Change::{Dir, File, Gone, HardLink, Link, Opaque},
        apply, as_root_of, noise,
    },
};

fn chain(name: &str) -> ChainId {
    ChainId::base(&Digest::of(name.as_bytes()))
}

fn file(name: &'static str) -> impl FnOnce(&Path) {
    move |dir| fs::write(dir.join(name), name).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_appears_when_it_is_complete_and_a_dropped_draft_is_removed() {
    on_every_bed(async |store| {
        let one = chain("one");
        let draft = store.driver.begin_layer(None).await.unwrap();
        let rival = store.driver.begin_layer(None).await.unwrap();
        assert_eq!(draft.parent(), None);
        fs::write(draft.path().join("file"), "first").unwrap();
        fs::write(rival.path().join("file"), "second").unwrap();
        assert!(!store.driver.has_layer(&one).await.unwrap());
        store.driver.commit_layer(draft, &one, Usage::default()).await.unwrap();
        assert!(store.driver.has_layer(&one).await.unwrap());
        store.driver.commit_layer(rival, &one, Usage::default()).await.unwrap();
        let (id, target) = store.root(std::slice::from_ref(&one), map()).await;
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "first", "who is first wins");
        store.remove(&id, &target).await;

        let draft = store.driver.begin_layer(Some(&one)).await.unwrap();
        assert_eq!(draft.parent(), Some(&one));
        fs::create_dir_all(draft.path().join("a/b/c")).unwrap();
        drop(draft);
        nothing_unfinished(store).await;
        assert_eq!(store.driver.layers().await.unwrap(), std::slice::from_ref(&one));
        until("the layer to be free", async || {
            store.driver.remove_layer(&one).await.map_err(|e| e.to_string())
        })
        .await;
        store.driver.remove_layer(&one).await.unwrap();
        assert!(store.driver.layers().await.unwrap().is_empty());
    })
    .await;
}

async fn nothing_unfinished(store: &Store) {
    until("drafts to go", async || match store.unfinished() {
        left if left.is_empty() => Ok(()),
        left => Err(format!("{left:?}")),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whiteouts_and_opaque_directories_hide_what_lies_below() {
    on_every_bed(async |store| {
        let style = store.driver.whiteouts();
        let below = store
            .layer("below", |dir| {
                let all = [
                    File("gone", "below", 0),
                    File("stays", "below", 0),
                    File("changed", "below", 0),
                    Dir("opaque/old"),
                    Dir("merged/old"),
                    Dir("dir-gone/deep"),
                    HardLink("stays", "linked"),
                    Link("stays", "link"),
                ];
                apply(dir, style, &all);
            })
            .await;
        let above = store
            .layer_on(Some(&below), "above", |dir| {
                let all = [
                    Gone("gone"),
                    Gone("dir-gone"),
                    File("changed", "above", 0),
                    Opaque("opaque"),
                    Dir("opaque/new"),
                    Dir("merged/new"),
                ];
                apply(dir, style, &all);
            })
            .await;
        let (id, target) = store.root(&[below.clone(), above], map()).await;
        assert_eq!(entries(&target), ["changed", "link", "linked", "merged", "opaque", "stays"]);
        assert_eq!(fs::read_to_string(target.join("changed")).unwrap(), "above");
        assert_eq!(fs::read_to_string(target.join("link")).unwrap(), "below");
        assert_eq!(entries(&target.join("opaque")), ["new"]);
        assert_eq!(entries(&target.join("merged")), ["new", "old"]);
        let (other, all) = store.root(&[below], map()).await;
        assert_eq!(
            entries(&all),
            ["changed", "dir-gone", "gone", "link", "linked", "merged", "opaque", "stays"]
        );
        assert_eq!(fs::read_to_string(all.join("changed")).unwrap(), "below");
        store.remove(&id, &target).await;
        store.remove(&other, &all).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_layers_in_the_order_in_which_they_are_listed_removes_them_all() {
    on_every_bed(async |store| {
        let mut at = None;
        for name in ["a", "b", "c"] {
            at = Some(store.layer_on(at.as_ref(), name, file(name)).await);
        }
        let bottom = chain("a");
        let branch = store.layer_on(Some(&bottom), "x", file("x")).await;
        if store.driver.whiteouts() == WhiteoutStyle::Apply {
            let refused = store.driver.remove_layer(&bottom).await;
            assert!(matches!(refused, Err(Error::LayerInUse { .. })), "{refused:?}");
            assert!(store.driver.has_layer(&bottom).await.unwrap());
        }
        store.reopen().await;
        let all = store.driver.layers().await.unwrap();
        assert!(all.len() == 4 && all.contains(&branch));
        for chain in all {
            store.driver.remove_layer(&chain).await.unwrap();
        }
        assert!(store.driver.layers().await.unwrap().is_empty());
        store.reopen().await;
        assert!(store.driver.layers().await.unwrap().is_empty());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_taken_is_gone_at_once_and_can_be_made_anew_while_its_files_go() {
    on_every_bed(async |store| {
        let layer = store.layer("layer", file("old")).await;
        let taken = store.driver.take_layer(&layer).await.unwrap();
        assert!(!store.driver.has_layer(&layer).await.unwrap());
        assert!(store.driver.layers().await.unwrap().is_empty());
        assert_eq!(store.driver.layer_usage(&layer).await.unwrap(), moxlet_storage::Usage::default());
        let again = store.driver.take_layer(&layer).await.unwrap();
        assert_eq!(store.layer("layer", file("new")).await, layer);
        taken.remove().await.unwrap();
        again.remove().await.unwrap();
        let view = store.driver.open_layer(&layer).await.unwrap();
        assert_eq!(entries(view.path()), ["new"]);
        let refused = store.driver.take_layer(&layer).await;
        assert!(matches!(refused, Err(Error::LayerInUse { .. })), "{refused:?}");
        drop(view);
        // Nobody has to wait for it: what is dropped is removed in the background.
        drop(store.driver.take_layer(&layer).await.unwrap());
        nothing_unfinished(store).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_is_read_and_stays_for_as_long_as_it_is() {
    on_every_bed(async |store| {
        let missing = store.driver.open_layer(&chain("missing")).await;
        assert!(matches!(missing, Err(Error::LayerNotFound(_))));
        let one = store.layer("one", file("one")).await;
        let two = store.layer_on(Some(&one), "two", file("two")).await;
        let view = store.driver.open_layer(&two).await.unwrap();
        let again = store.driver.open_layer(&two).await.unwrap();
        let whole = store.driver.whiteouts() == WhiteoutStyle::Apply;
        assert_eq!(entries(view.path()), if whole { vec!["one", "two"] } else { vec!["two"] });
        drop(again);
        let refused = store.driver.remove_layer(&two).await;
        assert!(matches!(refused, Err(Error::LayerInUse { .. })), "{refused:?}");
        assert_eq!(fs::read_to_string(view.path().join("two")).unwrap(), "two");
        drop(view);
        store.driver.remove_layer(&two).await.unwrap();
        store.driver.remove_layer(&one).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_are_shown_merged_read_only_and_with_the_ids_of_the_image() {
    on_every_bed(async |store| {
        use std::os::unix::fs::MetadataExt;
        let one = store.layer("one", |dir| crate::content::write(&dir.join("one"), "1", 1000)).await;
        let two = store.layer_on(Some(&one), "two", file("two")).await;
        let (target, empty) = (store.path("shown"), store.path("empty"));
        let both = [one.clone(), two.clone()];
        store.driver.mount_layers(&both, &target).await.unwrap();
        store.driver.mount_layers(&both, &target).await.unwrap();
        store.driver.mount_layers(&[], &empty).await.unwrap();
        assert_eq!(entries(&target), ["one", "two"]);
        assert_eq!(fs::metadata(target.join("one")).unwrap().uid(), 1000);
        for dir in [&target, &empty] {
            let error = fs::write(dir.join("new"), "x").unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        }
        assert!(entries(&empty).is_empty());
        let refused = store.driver.remove_layer(&two).await;
        assert!(matches!(refused, Err(Error::LayerInUse { .. })), "{refused:?}");
        mounts::unmount(&target).unwrap();
        mounts::unmount(&empty).unwrap();
        assert!(!mounts::is_mounted(&target).unwrap());
        store.driver.remove_layer(&two).await.unwrap();
        let missing = store.driver.mount_layers(&both, &target).await;
        assert!(matches!(missing, Err(Error::LayerNotFound(_))));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn figures_grow_with_what_is_stored() {
    on_every_bed(async |store| {
        let before = store.driver.layers_usage().await.unwrap();
        let noise = noise(3_000_000);
        let one = store
            .layer("one", |dir| {
                fs::write(dir.join("noise"), &noise).unwrap();
                for n in 0..50 {
                    fs::write(dir.join(n.to_string()), "x").unwrap();
                }
            })
            .await;
        let usage = store.driver.layers_usage().await.unwrap();
        let (bytes, inodes) = (usage.bytes - before.bytes, usage.inodes - before.inodes);
        assert!((2_000_000..6_000_000).contains(&bytes), "{usage:?}");
        assert!((45..70).contains(&inodes), "{usage:?}");
        let of_fs = store.driver.fs_usage().await.unwrap();
        assert!(of_fs.capacity_bytes > of_fs.available_bytes && of_fs.used_bytes > 0, "{of_fs:?}");
        assert!(of_fs.mountpoint.starts_with(store.inside().canonicalize().unwrap()), "{of_fs:?}");

        let (id, target) = store.root(std::slice::from_ref(&one), map()).await;
        let fresh = store.driver.root_usage(&id).await.unwrap();
        assert!(fresh.inodes == 0 && fresh.bytes < 500_000, "{fresh:?}");
        as_root_of(map(), || {
            fs::write(target.join("written"), &noise).unwrap();
            fs::write(target.join("new"), "x").unwrap();
        });
        // ZFS counts what is on disk.
        rustix::fs::syncfs(fs::File::open(&target).unwrap()).unwrap();
        let seen = until("the root's figures", async || {
            let usage = store.driver.root_usage(&id).await.unwrap();
            if usage.bytes >= 2_000_000 { Ok(usage) } else { Err(format!("{usage:?}")) }
        })
        .await;
        assert!(seen.inodes == 2 && seen.bytes < 6_000_000, "{seen:?}");
        store.driver.unmount_root(&id, &target).await.unwrap();
        assert_eq!(store.driver.root_usage(&id).await.unwrap().inodes, 2, "mounted or not");
        store.driver.remove_root(&id).await.unwrap();
        let gone = store.driver.root_usage(&id).await;
        assert!(matches!(gone, Err(Error::RootNotFound(_))));
        store.driver.remove_layer(&one).await.unwrap();
        assert_eq!(store.driver.layers_usage().await.unwrap().inodes, before.inodes);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_many_layers_is_one_root() {
    on_every_bed(async |store| {
        let count = if store.bed.is_zfs() { 12 } else { 128 };
        let mut layers: Vec<ChainId> = Vec::new();
        for n in 0..count {
            let fill = |dir: &Path| fs::write(dir.join(format!("{n}")), "x").unwrap();
            layers.push(store.layer_on(layers.last(), &n.to_string(), fill).await);
        }
        let (id, target) = store.root(&layers, map()).await;
        assert_eq!(entries(&target).len(), count);
        assert_eq!(store.driver.root_layers(&id).await.unwrap(), layers);
        if store.driver.whiteouts() == WhiteoutStyle::Apply {
            let jumbled = store
                .driver
                .create_root(&moxlet_ids::ContainerId::random(), &layers[1..], map().into())
                .await;
            assert!(matches!(jumbled, Err(Error::NotAStack { .. })), "{jumbled:?}");
        }
        store.remove(&id, &target).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_that_races_the_removal_of_its_layer_is_whole_or_not_there() {
    on_every_bed(async |store| {
        let rounds = if store.bed.is_zfs() { 3 } else { 20 };
        for round in 0..rounds {
            let name = format!("round-{round}");
            let layer = store.layer(&name, file("file")).await;
            let id = moxlet_ids::ContainerId::random();
            let layers = [layer.clone()];
            let (made, removed) = futures::join!(
                store.driver.create_root(&id, &layers, map().into()),
                store.driver.remove_layer(&layer)
            );
            match (made, removed) {
                (Ok(()), Err(Error::LayerInUse { .. })) => {
                    let target = store.path(id.as_str());
                    store.driver.mount_root(&id, &target).await.unwrap();
                    assert_eq!(entries(&target), ["file"]);
                    store.remove(&id, &target).await;
                    store.driver.remove_layer(&layer).await.unwrap();
                }
                (Err(Error::LayerNotFound(_)), Ok(())) => {
                    assert!(store.driver.roots().await.unwrap().is_empty());
                }
                other => panic!("{other:?}"),
            }
        }
        nothing_unfinished(store).await;
    })
    .await;
}
