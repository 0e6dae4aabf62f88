//! Quotas of containers: one that is used up is felt by its container alone.

use std::{fs, io::Write, path::Path};

use moxlet_ids::ContainerId;
use moxlet_storage::{Driver, Error, OverlayDriver, RootOptions};
use moxlet_tests_component::wait::until;

use crate::{
    bed::{Store, entries, map, on_beds_with_quota, on_overlay, on_overlay_with_quota},
    content::{as_root_of, noise},
};

const QUOTA: u64 = 8 << 20;

fn with_quota() -> RootOptions {
    RootOptions { map: map(), quota_bytes: Some(QUOTA) }
}

/// Writes as the container does until the system says no; how many bytes went, and what it said. ZFS notices with its next
/// transactions.
fn fill(path: &Path) -> (u64, std::io::Error) {
    let noise = noise(256 << 10);
    as_root_of(map(), || {
        let mut file = fs::File::create(path).unwrap();
        let mut written = 0;
        loop {
            match file.write_all(&noise).and_then(|()| file.sync_data()) {
                Ok(()) => written += noise.len() as u64,
                Err(error) => return (written, error),
            }
            assert!(written < 10 * QUOTA, "no end at {written} bytes");
        }
    })
}

async fn big_layer(store: &Store) -> moxlet_ids::ChainId {
    store.layer("big", |dir| fs::write(dir.join("big"), vec![7; 1 << 20]).unwrap()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_uses_up_its_quota_is_told_so_and_others_go_on() {
    on_beds_with_quota(async |store| {
        let layers = [big_layer(store).await];
        let (id, target) = store.root(&layers, with_quota()).await;
        let (other, of_other) = store.root(&layers, with_quota()).await;
        let (written, error) = fill(&target.join("fill"));
        let full = matches!(error.raw_os_error(), Some(122 | 28)); // EDQUOT, ENOSPC
        assert!(full, "{error}");
        // What the image brings does not count.
        assert!((QUOTA * 3 / 4..QUOTA * 2).contains(&written), "{written}");
        as_root_of(map(), || fs::write(of_other.join("file"), vec![1; 1 << 20]).unwrap());
        assert_eq!(fs::metadata(of_other.join("big")).unwrap().len(), 1 << 20);
        let fresh = store.driver.create_root(&ContainerId::random(), &layers, with_quota()).await;
        fresh.unwrap();
        as_root_of(map(), || fs::remove_file(target.join("fill")).unwrap());
        until("room again", async || {
            let _ = rustix::fs::syncfs(fs::File::open(&target).unwrap());
            as_root_of(map(), || fs::write(target.join("again"), vec![1; 1 << 20])).map_err(|e| e.to_string())
        })
        .await;
        store.remove(&id, &target).await;
        store.remove(&other, &of_other).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_with_another_quota_is_another_root_also_after_a_restart() {
    on_beds_with_quota(async |store| {
        let id = ContainerId::random();
        store.driver.create_root(&id, &[], with_quota()).await.unwrap();
        for _ in 0..2 {
            store.driver.create_root(&id, &[], with_quota()).await.unwrap();
            let without = store.driver.create_root(&id, &[], map().into()).await;
            assert!(matches!(without, Err(Error::RootExists(_))));
            store.reopen().await;
        }
        let target = store.path("again");
        store.driver.mount_root(&id, &target).await.unwrap();
        let (written, _) = fill(&target.join("fill"));
        assert!(written < QUOTA * 2, "{written}");
        store.remove(&id, &target).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_is_refused_by_name_where_the_file_system_keeps_none() {
    on_overlay(async |store| {
        let id = ContainerId::random();
        let refused = store.driver.create_root(&id, &[], with_quota()).await.unwrap_err();
        let words = refused.to_string();
        assert!(matches!(refused, Error::NoProjectQuota { .. }), "{words}");
        assert!(
            words.contains("prjquota")
                && words.contains(store.inside().canonicalize().unwrap().to_str().unwrap())
        );
        assert!(store.driver.roots().await.unwrap().is_empty() && store.unfinished().is_empty());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn quota_projects_are_given_back_and_never_given_twice() {
    on_overlay_with_quota(async |store| {
        let ids: Vec<ContainerId> = (0..12).map(|_| ContainerId::random()).collect();
        let made = ids.iter().map(|id| store.driver.create_root(id, &[], with_quota()));
        futures::future::join_all(made).await.into_iter().collect::<Result<Vec<_>, _>>().unwrap();
        let project = |store: &Store, id: &ContainerId| {
            let text = fs::read(store.inside().join("roots").join(id.as_str()).join("root.json")).unwrap();
            serde_json::from_slice::<serde_json::Value>(&text).unwrap()["project"].as_u64().unwrap()
        };
        let mut all: Vec<u64> = ids.iter().map(|id| project(store, id)).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 12);
        // Another store on the same file system takes others.
        let second = OverlayDriver::open(&store.inside().parent().unwrap().join("second")).await.unwrap();
        let guest = ContainerId::random();
        second.create_root(&guest, &[], with_quota()).await.unwrap();
        let path =
            store.inside().parent().unwrap().join("second/roots").join(guest.as_str()).join("root.json");
        let text: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        assert!(!all.contains(&text["project"].as_u64().unwrap()));
        second.remove_root(&guest).await.unwrap();
        second.close().await.unwrap();
        store.reopen().await;
        let next = ContainerId::random();
        store.driver.create_root(&next, &[], with_quota()).await.unwrap();
        assert!(!all.contains(&project(store, &next)), "those of an earlier run are known");
        for id in ids.iter().chain([&next]) {
            store.driver.remove_root(id).await.unwrap();
        }
        assert!(entries(&store.inside().join("roots")).is_empty());
        let again = ContainerId::random();
        store.driver.create_root(&again, &[], with_quota()).await.unwrap();
        store.driver.remove_root(&again).await.unwrap();
    })
    .await;
}
