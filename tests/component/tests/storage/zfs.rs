//! What only the store on ZFS has: its datasets, beside those of others.

use std::{fs, process::Command};

use moxlet_ids::{ChainId, ContainerId, Digest};
use moxlet_storage::{Driver, Error, IdStyle, Usage, ZfsConfig, ZfsDriver, mounts};
use moxlet_tests_component::store::{Pool, run, zfs};

use crate::{
    bed::{Bed, Store, entries, map, on_zfs},
    content::{as_root_of, noise, write},
};

/// All that ZFS and the files say of datasets that are not ours.
fn seen(datasets: &[String]) -> Vec<String> {
    let mut all = Vec::new();
    for dataset in datasets {
        let properties = "name,guid,createtxg,origin,mountpoint,canmount,readonly,quota,dev.example:note";
        all.push(zfs(&["get", "-H", "-p", "-o", "property,value,source", properties, dataset]));
        all.push(zfs(&["list", "-H", "-p", "-t", "all", "-r", "-o", "name,guid,referenced", dataset]));
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn datasets_of_others_below_the_store_are_left_as_they_are() {
    on_zfs(async |store| {
        let layer = store.layer("one", |dir| fs::write(dir.join("file"), "x").unwrap()).await;
        let (id, target) = store.root(std::slice::from_ref(&layer), map()).await;
        let top = store.dataset();
        let mut foreign = Vec::new();
        // They inherit our mark, which must not make them ours.
        for place in ["", "/layers", "/drafts", "/roots", "/shifted"] {
            let name = format!("{top}{place}/of-others");
            zfs(&["create", "-u", "-o", "mountpoint=legacy", "-o", "dev.example:note=hands off", &name]);
            zfs(&["snapshot", &format!("{name}@theirs")]);
            foreign.push(name);
        }
        let hex = layer.digest().hex();
        let clone = format!("{top}/clone-of-others");
        zfs(&["clone", "-o", "mountpoint=legacy", &format!("{top}/layers/{hex}@layer"), &clone]);
        foreign.push(clone.clone());
        let before = seen(&foreign);

        store.driver.unmount_root(&id, &target).await.unwrap();
        // A schedule that snapshots everything keeps a root; we say so and keep it, too.
        let theirs = format!("{top}/roots/{id}@hourly");
        zfs(&["snapshot", &theirs]);
        let refused = store.driver.remove_root(&id).await.unwrap_err();
        assert!(matches!(&refused, Error::Foreign { dataset, .. } if *dataset == theirs), "{refused}");
        store.reopen().await;
        assert_eq!(store.driver.roots().await.unwrap(), std::slice::from_ref(&id));
        zfs(&["destroy", &theirs]);
        store.driver.remove_root(&id).await.unwrap();

        let refused = store.driver.remove_layer(&layer).await.unwrap_err();
        assert!(matches!(&refused, Error::LayerInUse { .. }), "{refused}");
        assert!(refused.to_string().contains(&clone), "{refused}");
        assert!(store.driver.has_layer(&layer).await.unwrap());
        assert_eq!(seen(&foreign), before);
        zfs(&["destroy", &clone]);
        store.driver.remove_layer(&layer).await.unwrap();
        store.reopen().await;
        foreign.pop();
        assert_eq!(seen(&foreign), before[..before.len() - 2]);
    })
    .await;
}

async fn open(store: &Store, dataset: &str, run_dir: &str) -> Result<ZfsDriver, Error> {
    ZfsDriver::open(store.config(dataset, run_dir)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stands_in_the_way_of_a_store_is_named_and_nothing_is_changed() {
    on_zfs(async |store| {
        let top = store.dataset();
        let missing = open(store, "no-such-pool/moxlet", "other").await.unwrap_err();
        assert!(matches!(missing, Error::NoSuchDataset(_)), "{missing}");
        let missing = open(store, &format!("{top}/a/b"), "other").await.unwrap_err();
        assert!(matches!(missing, Error::NoSuchDataset(_)), "{missing}");
        let bad = open(store, &format!("{top}/subvol-100-disk-0"), "other").await.unwrap_err();
        assert!(matches!(bad, Error::BadDataset { .. }), "{bad}");

        let taken = format!("{top}/taken");
        zfs(&["create", "-u", "-o", "mountpoint=none", &taken]);
        zfs(&["create", "-u", &format!("{taken}/layers")]);
        let before = zfs(&["list", "-H", "-r", "-o", "name", &taken]);
        let foreign = open(store, &taken, "other").await.unwrap_err();
        assert!(
            matches!(&foreign, Error::Foreign { dataset, .. } if dataset.ends_with("/taken/layers")),
            "{foreign}"
        );
        assert_eq!(zfs(&["list", "-H", "-r", "-o", "name", &taken]), before);
        mounts::unmount(&store.path("other")).unwrap();

        // From here on the store itself is spoilt, one thing after the other.
        let layer = store.layer("one", |dir| fs::write(dir.join("file"), "x").unwrap()).await;
        let of_layer = format!("{top}/layers/{}", layer.digest().hex());
        zfs(&["set", "dev.moxlet:version=99", &of_layer]);
        let newer = open(store, &top, "store").await.unwrap_err();
        assert!(matches!(newer, Error::TooNew { version: 99, .. }), "{newer}");
        zfs(&["set", "dev.moxlet:version=1", &of_layer]);

        store.driver.close().await.unwrap();
        zfs(&["set", "readonly=on", &top]);
        let read_only = open(store, &top, "store").await.unwrap_err();
        assert!(matches!(read_only, Error::ReadOnly { .. }), "{read_only}");
        mounts::unmount_all_below(&store.inside()).unwrap();
        zfs(&["set", "readonly=off", &top]);
        store.reopen().await;
        assert_eq!(store.driver.layers().await.unwrap(), [layer]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_dataset_is_named_and_the_store_works_on_when_there_is_room() {
    on_zfs(async |store| {
        let top = store.dataset();
        let one = store.layer("one", |dir| fs::write(dir.join("file"), "x").unwrap()).await;
        zfs(&["set", "quota=3M", &top]);
        let draft = store.driver.begin_layer(Some(&one)).await.unwrap();
        let noise = noise(500_000);
        let path = draft.path().join("noise");
        let written = fs::File::create(&path).and_then(|mut file| {
            use std::io::Write;
            for _ in 0..100 {
                file.write_all(&noise)?;
                // A quota of ZFS is looked at from one transaction to the next.
                rustix::fs::syncfs(&file)?;
            }
            Ok(())
        });
        let code = written.unwrap_err().raw_os_error();
        assert!(matches!(code, Some(122 | 28)), "{code:?}");
        drop(draft);
        moxlet_tests_component::wait::until("the draft to go", async || match store.unfinished() {
            left if left.is_empty() => Ok(()),
            left => Err(format!("{left:?}")),
        })
        .await;
        let usage = store.driver.fs_usage().await.unwrap();
        assert!(usage.capacity_bytes <= 3 << 20, "a quota is the capacity: {usage:?}");
        zfs(&["set", "quota=none", &top]);
        store.layer_on(Some(&one), "two", |dir| fs::write(dir.join("noise"), &noise).unwrap()).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_works_whatever_the_mount_point_above_it_is() {
    on_zfs(async |store| {
        for (name, mountpoint) in [("at-none", "none"), ("at-legacy", "legacy"), ("at-path", "")] {
            let above = format!("{}/{name}", store.dataset());
            let path = store.path(name);
            let value = if mountpoint.is_empty() { path.to_str().unwrap() } else { mountpoint };
            zfs(&["create", "-o", &format!("mountpoint={value}"), &above]);
            let driver = open(store, &format!("{above}/moxlet"), &format!("run-{name}")).await.unwrap();
            let chain = ChainId::base(&Digest::of(b"one"));
            let draft = driver.begin_layer(None).await.unwrap();
            fs::write(draft.path().join("file"), "x").unwrap();
            driver.commit_layer(draft, &chain, Usage::default()).await.unwrap();
            let (id, target) = (ContainerId::random(), store.path(&format!("root-{name}")));
            driver.create_root(&id, &[chain], map().into()).await.unwrap();
            driver.mount_root(&id, &target).await.unwrap();
            assert_eq!(entries(&target), ["file"]);
            driver.unmount_root(&id, &target).await.unwrap();
            driver.close().await.unwrap();
            let all = zfs(&["list", "-H", "-r", "-o", "mountpoint,mounted", &format!("{above}/moxlet")]);
            assert!(all.lines().all(|line| line == "legacy\tno"), "{all}");
            zfs(&["destroy", "-r", &above]);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_of_a_present_image_is_one_command_however_many_there_are() {
    on_zfs(async |store| {
        let driver = store.zfs.clone().unwrap();
        let mut layers = vec![store.layer("one", |dir| write(&dir.join("file"), "x", 0)).await];
        layers.push(store.layer_on(layers.last(), "two", |dir| write(&dir.join("two"), "x", 0)).await);
        // The first one on shifted ids makes the copy that all others are clones of.
        let (id, target) = store.root(&layers, map()).await;
        store.remove(&id, &target).await;
        for _ in 0..5 {
            let before = driver.commands_run();
            let (id, target) = (ContainerId::random(), store.path("root"));
            driver.create_root(&id, &layers, map().into()).await.unwrap();
            driver.mount_root(&id, &target).await.unwrap();
            driver.unmount_root(&id, &target).await.unwrap();
            assert_eq!(driver.commands_run() - before, 1);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_with_a_store_comes_along_to_another_place() {
    on_zfs(async |store| {
        let driver = store.zfs.clone().unwrap();
        fs::write(driver.state_dir().join("record"), "kept").unwrap();
        driver.close().await.unwrap();
        assert!(!driver.state_dir().join("record").exists());
        let elsewhere = format!("{}-moved", store.dataset());
        zfs(&["rename", &store.dataset(), &elsewhere]);
        let moved = open(store, &elsewhere, "elsewhere").await.unwrap();
        assert_eq!(fs::read_to_string(moved.state_dir().join("record")).unwrap(), "kept");
        moved.close().await.unwrap();
        zfs(&["rename", &elsewhere, &store.dataset()]);
        store.reopen().await;
        assert_eq!(fs::read_to_string(driver.state_dir().join("record")).unwrap(), "kept");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_are_shifted_at_the_mount_where_the_kernel_can() {
    on_zfs(async |store| {
        if store.bed != Bed::Zfs(IdStyle::Idmapped) {
            return;
        }
        let config = ZfsConfig { ids: None, ..store.config(&store.dataset(), "store") };
        assert_eq!(ZfsDriver::open(config).await.unwrap().id_style(), IdStyle::Idmapped);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_the_map_does_not_have_is_refused_with_its_file() {
    on_zfs(async |store| {
        if store.bed != Bed::Zfs(IdStyle::Shifted) {
            return;
        }
        let layer = store.layer("one", |dir| write(&dir.join("file"), "x", 70_000)).await;
        let refused =
            store.driver.create_root(&ContainerId::random(), &[layer], map().into()).await.unwrap_err();
        assert!(
            matches!(&refused, Error::IdBeyondMap { id: 70_000, path, .. } if path.ends_with("file")),
            "{refused}"
        );
        assert!(store.driver.roots().await.unwrap().is_empty() && store.unfinished().is_empty());
    })
    .await;
}

fn origin(dataset: &str) -> String {
    zfs(&["list", "-H", "-o", "origin", dataset]).trim().to_owned()
}

/// The snapshots of a dataset, by what stands behind the `@`.
fn snapshots(dataset: &str) -> Vec<String> {
    let names = zfs(&["list", "-H", "-t", "snapshot", "-d", "1", "-o", "name", "-s", "createtxg", dataset]);
    names.lines().filter_map(|name| name.split_once('@')).map(|(_, name)| name.to_owned()).collect()
}

async fn bare_root(store: &Store, layer: &ChainId) -> ContainerId {
    let id = ContainerId::random();
    store.driver.create_root(&id, std::slice::from_ref(layer), map().into()).await.unwrap();
    id
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_somebody_reads_in_is_none_any_more_and_goes_when_he_has_done() {
    on_zfs(async |store| {
        let layer = store.layer("one", |dir| fs::write(dir.join("file"), "x").unwrap()).await;
        let (top, place) = (store.dataset(), store.path("theirs"));
        let dataset = format!("{top}/layers/{}", layer.digest().hex());
        fs::create_dir(&place).unwrap();
        let mounted = Command::new("mount").args(["-t", "zfs", &dataset]).arg(&place).status().unwrap();
        assert!(mounted.success());
        let file = fs::File::open(place.join("file")).unwrap();
        store.driver.remove_layer(&layer).await.unwrap();
        assert!(!store.driver.has_layer(&layer).await.unwrap(), "nobody may build on it");
        assert_eq!(std::io::read_to_string(&file).unwrap(), "x");
        // The same layer can come again meanwhile.
        let again = store.layer("one", |dir| fs::write(dir.join("file"), "x").unwrap()).await;
        assert_eq!(again, layer);
        let root = bare_root(store, &layer).await;
        store.driver.remove_root(&root).await.unwrap();
        drop(file);
        let _ = Command::new("umount").arg(&place).status();
        store.driver.remove_layer(&layer).await.unwrap();
        store.reopen().await;
        let left = zfs(&["list", "-H", "-r", "-o", "name", &top]);
        assert!(!left.contains("/drafts/") && !left.contains("/layers/"), "{left}");
    })
    .await;
}

/// One more clone of a snapshot costs the more the more it has, so that there are several of the same.
#[tokio::test(flavor = "multi_thread")]
async fn many_roots_of_one_layer_are_clones_of_several_snapshots_of_it() {
    const CLONES: usize = 64;
    on_zfs(async |store| {
        let layer = store.layer("one", |dir| fs::write(dir.join("file"), "x").unwrap()).await;
        let top = store.dataset();
        let origin = |id: &ContainerId| origin(&format!("{top}/roots/{id}"));
        let mut first = Vec::new();
        for _ in 0..CLONES {
            first.push(bare_root(store, &layer).await);
        }
        let dataset = origin(&first[0]).strip_suffix("@layer").unwrap().to_owned();
        assert_eq!(origin(&first[CLONES - 1]), format!("{dataset}@layer"));
        assert_eq!(snapshots(&dataset), ["layer"]);
        let (above, both) = (bare_root(store, &layer).await, bare_root(store, &layer).await);
        assert_eq!(origin(&above), format!("{dataset}@layer-1"));
        assert_eq!(origin(&both), format!("{dataset}@layer-1"));
        let target = store.path("above");
        store.driver.mount_root(&above, &target).await.unwrap();
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "x");
        store.driver.unmount_root(&above, &target).await.unwrap();

        // What is full and what has room is known after a start, too.
        store.driver.remove_root(&first.pop().unwrap()).await.unwrap();
        store.reopen().await;
        first.push(bare_root(store, &layer).await);
        assert_eq!(origin(first.last().unwrap()), format!("{dataset}@layer"));
        let third = bare_root(store, &layer).await;
        assert_eq!(origin(&third), format!("{dataset}@layer-1"));

        // One that nothing is cloned from may go, and is taken again.
        for id in [above, both, third] {
            store.driver.remove_root(&id).await.unwrap();
        }
        zfs(&["destroy", &format!("{dataset}@layer-1")]);
        let again = bare_root(store, &layer).await;
        assert_eq!(origin(&again), format!("{dataset}@layer-1"));

        // Somebody's clone keeps the layer, with all of its snapshots.
        let theirs = format!("{top}/clone-of-others");
        zfs(&["clone", "-o", "mountpoint=legacy", &format!("{dataset}@layer-1"), &theirs]);
        for id in first.iter().chain([&again]) {
            store.driver.remove_root(id).await.unwrap();
        }
        let refused = store.driver.remove_layer(&layer).await.unwrap_err();
        assert!(matches!(&refused, Error::LayerInUse { .. }), "{refused}");
        assert!(refused.to_string().contains(&theirs), "{refused}");
        assert_eq!(snapshots(&dataset), ["layer", "layer-1"]);
        zfs(&["destroy", &theirs]);
        store.driver.remove_layer(&layer).await.unwrap();
        assert!(store.driver.layers().await.unwrap().is_empty());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_moves_to_another_pool_and_shares_there_what_it_shared() {
    on_zfs(async |store| {
        let files = tempfile::tempdir().unwrap();
        let pool = Pool::create_in(files.path(), &[]);
        let from = store.zfs.clone().unwrap();
        let base = store.layer("base", |dir| fs::write(dir.join("base"), vec![1; 1 << 20]).unwrap()).await;
        let mut layers = vec![base.clone()];
        for name in ["left", "right"] {
            layers.push(
                store.layer_on(Some(&base), name, |dir| fs::write(dir.join(name), name).unwrap()).await,
            );
        }
        let to = open(store, &format!("{}/moxlet", pool.name), "other").await.unwrap();
        let mut brought = from.copy_layers_to(&to, &from.layers().await.unwrap()).await.unwrap();
        brought.sort();
        layers.sort();
        assert_eq!(brought, layers);
        let again = from.copy_layers_to(&to, &from.layers().await.unwrap()).await.unwrap();
        assert!(again.is_empty(), "a second time nothing is missing");
        for chain in layers.iter().filter(|c| **c != base) {
            let dataset = format!("{}/moxlet/layers/{}", pool.name, chain.digest().hex());
            assert_eq!(
                origin(&dataset),
                format!("{}/moxlet/layers/{}@layer", pool.name, base.digest().hex())
            );
        }
        assert_eq!(to.layers_usage().await.unwrap().inodes, from.layers_usage().await.unwrap().inodes);

        // A layer whose parent was made there and not brought goes as a whole.
        let above =
            store.layer_on(Some(&base), "above", |dir| fs::write(dir.join("above"), "x").unwrap()).await;
        for chain in to.layers().await.unwrap() {
            to.remove_layer(&chain).await.unwrap();
        }
        let draft = to.begin_layer(None).await.unwrap();
        fs::write(draft.path().join("base"), vec![1; 1 << 20]).unwrap();
        to.commit_layer(draft, &base, Usage::default()).await.unwrap();
        assert_eq!(from.copy_layers_to(&to, &from.layers().await.unwrap()).await.unwrap().len(), 3);
        to.close().await.unwrap();

        let to = open(store, &format!("{}/moxlet", pool.name), "other").await.unwrap();
        let (id, target) = (ContainerId::random(), store.path("there"));
        to.create_root(&id, &[base, above], map().into()).await.unwrap();
        to.mount_root(&id, &target).await.unwrap();
        assert_eq!(entries(&target), ["above", "base"]);
        to.unmount_root(&id, &target).await.unwrap();
        to.close().await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_left_is_swept_at_open() {
    on_zfs(async |store| {
        let layer = store.layer("one", |dir| fs::write(dir.join("file"), "x").unwrap()).await;
        let (id, target) = store.root(std::slice::from_ref(&layer), map()).await;
        as_root_of(map(), || fs::write(target.join("written"), "x").unwrap());
        let top = store.dataset();
        let mark = |name: &str| format!("dev.moxlet:owner=moxlet:{name}");
        let legacy = "mountpoint=legacy";
        let snapshot = format!("{top}/layers/{}@layer", layer.digest().hex());
        // Between any two steps of making or removing something.
        let hex = Digest::of(b"half").hex().to_owned();
        let half = format!("layers/{hex}");
        zfs(&[
            "clone",
            "-o",
            legacy,
            "-o",
            &mark("drafts/layer-1"),
            &snapshot,
            &format!("{top}/drafts/layer-1"),
        ]);
        zfs(&["clone", "-o", legacy, "-o", &mark(&half), &snapshot, &format!("{top}/drafts/layer-2")]);
        zfs(&["snapshot", &format!("{top}/drafts/layer-2@layer")]);
        zfs(&["clone", "-o", legacy, "-o", &mark(&half), &snapshot, &format!("{top}/{half}")]);
        let stray = format!("roots/{}", ContainerId::random());
        zfs(&["clone", "-o", legacy, "-o", &mark(&stray), &snapshot, &format!("{top}/{stray}")]);
        let view = store.inside().join("views/view-1");
        fs::create_dir(&view).unwrap();
        run("mount", &["-t", "zfs", &snapshot, view.to_str().unwrap()]).unwrap();

        store.reopen().await;
        assert!(store.unfinished().is_empty(), "{:?}", store.unfinished());
        assert!(!view.exists());
        assert_eq!(store.driver.layers().await.unwrap(), std::slice::from_ref(&layer));
        assert_eq!(store.driver.roots().await.unwrap(), std::slice::from_ref(&id));
        let all = zfs(&["list", "-H", "-o", "name", "-r", &format!("{top}/layers"), &format!("{top}/roots")]);
        assert_eq!(all.lines().count(), 4, "{all}");
        assert_eq!(entries(&target), ["file", "written"], "mounted all the while");
        store.remove(&id, &target).await;
    })
    .await;
}
