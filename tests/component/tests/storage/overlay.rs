//! What only the store on OverlayFS has: its files.

use std::fs;

use moxlet_ids::ContainerId;
use moxlet_storage::{Error, OverlayDriver, mounts};

use crate::bed::{entries, map, on_overlay};

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_left_is_swept_at_open_and_what_is_whole_stays() {
    on_overlay(async |store| {
        let layer = store.layer("one", |dir| fs::write(dir.join("file"), "x").unwrap()).await;
        let (whole, target) = store.root(std::slice::from_ref(&layer), map()).await;
        fs::write(target.join("written"), "x").unwrap();
        let damaged = ContainerId::random();
        store.driver.create_root(&damaged, std::slice::from_ref(&layer), map().into()).await.unwrap();
        let inside = store.inside();
        fs::write(inside.join("roots").join(damaged.as_str()).join("root.json"), "{").unwrap();
        let empty = ContainerId::random();
        fs::create_dir(inside.join("roots").join(empty.as_str())).unwrap();
        fs::create_dir_all(inside.join("tmp/layer-1/deep/er")).unwrap();
        fs::create_dir_all(inside.join("tmp/del-1/0")).unwrap();
        fs::create_dir_all(inside.join("tmp/root-1/upper")).unwrap();

        store.reopen().await;
        assert!(entries(&inside.join("tmp")).is_empty());
        assert_eq!(store.driver.roots().await.unwrap(), std::slice::from_ref(&whole));
        assert_eq!(entries(&inside.join("roots")), [whole.as_str()]);
        assert_eq!(store.driver.layers().await.unwrap(), [layer]);
        store.driver.mount_root(&whole, &target).await.unwrap();
        assert_eq!(entries(&target), ["file", "written"], "mounted all the while");
        store.remove(&whole, &target).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_of_an_earlier_version_is_taken_over_and_one_of_a_later_version_is_refused() {
    on_overlay(async |store| {
        let layer = store.layer("one", |dir| fs::write(dir.join("file"), "x").unwrap()).await;
        let id = ContainerId::random();
        let layers = [layer.clone()];
        store.driver.create_root(&id, &layers, map().into()).await.unwrap();
        let path = store.inside().join("roots").join(id.as_str()).join("root.json");
        let write = |version: u32| {
            let map = "\"map\":{\"host_base\":100000,\"size\":65536}";
            fs::write(&path, format!("{{\"version\":{version},\"layers\":[\"{layer}\"],{map}}}")).unwrap();
        };
        write(1);
        store.reopen().await;
        store.driver.create_root(&id, &layers, map().into()).await.unwrap();
        assert_eq!(store.driver.root_layers(&id).await.unwrap(), layers);
        write(99);
        let refused = OverlayDriver::open(&store.inside()).await.unwrap_err();
        assert!(matches!(refused, Error::TooNew { version: 99, .. }), "{refused}");
        assert!(path.exists());
        write(1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_on_an_overlay_is_refused_by_name() {
    on_overlay(async |store| {
        let (id, target) = store.root(&[], map()).await;
        let refused = OverlayDriver::open(&target.join("store")).await.unwrap_err();
        let words = refused.to_string();
        assert!(matches!(refused, Error::UnfitFileSystem { .. }) && words.contains("overlay"), "{words}");
        store.remove(&id, &target).await;
        assert!(!mounts::is_mounted(&target).unwrap());
    })
    .await;
}
