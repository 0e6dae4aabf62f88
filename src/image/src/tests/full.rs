//! A store whose file system is full.

use rustix::mount::{MountFlags, UnmountFlags};

use tokio::sync::Semaphore;

use super::{pipeline::noise, registry::Fault, *};
use crate::{Error, GarbagePolicy, layer::tests::Tar};

/// A file system of 4 MiB.
struct Small(tempfile::TempDir);

impl Small {
    fn mount() -> Self {
        let dir = tempfile::tempdir().unwrap();
        rustix::mount::mount("test", dir.path(), "tmpfs", MountFlags::empty(), Some(c"size=4m")).unwrap();
        Self(dir)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = moxlet_storage::mounts::unmount_all_below(self.0.path());
        let _ = rustix::mount::unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_for_which_there_is_no_room_says_how_much_is_missing_and_leaves_the_room_to_others() {
    let (registry, small) = (Registry::start().await, Small::mount());
    let (large, fits) = (
        Image::new()
            .layer(Tar::default().file("a", "small"))
            .layer(Tar::default().file("b", &noise(1, 9_000_000))),
        Image::new().layer(Tar::default().file("a", "small")),
    );
    registry.push("large:1", &large);
    registry.push("fits:1", &fits);
    let config = Config { dir: small.0.path().join("images"), ..Config::default() };
    let (driver, store) = open(small.0.path(), config).await;
    let store = store.unwrap();
    let error = store.pull(&registry.name("large:1"), &[]).await.unwrap_err();
    let Error::Full { image, needed_bytes, available_bytes, place, .. } = &error else { panic!("{error}") };
    assert_eq!(*image, registry.name("large:1"));
    assert!((6_000_000..9_000_000).contains(needed_bytes), "{error}");
    assert!(
        *available_bytes <= 4 << 20 && place.starts_with(small.0.path().canonicalize().unwrap()),
        "{error}"
    );
    for words in [needed_bytes.to_string(), available_bytes.to_string(), "prune".to_owned()] {
        assert!(error.to_string().contains(&words), "{error}");
    }
    let tmp = small.0.path().join("driver/tmp");
    eventually(|| std::future::ready(std::fs::read_dir(&tmp).unwrap().count() == 0)).await;
    assert!(driver.layers().await.unwrap().is_empty(), "what had come of it makes room again");
    store.pull(&registry.name("fits:1"), &[]).await.unwrap();
    driver.close().await.unwrap();
}

/// Pulls an image of two layers, the second of which does not come.
async fn half(registry: &Registry, place: &Place, name: &str) -> tokio::task::JoinHandle<()> {
    let image = Image::new()
        .layer(Tar::default().file(&format!("{name}-first"), "x"))
        .layer(Tar::default().file(&format!("{name}-second"), &noise(1, 100_000)));
    registry.push(&format!("{name}:1"), &image);
    registry.fault(&image.digest(1), Fault::Held(Arc::new(Semaphore::new(0))));
    let (store, name, before) =
        (Arc::clone(&place.store), registry.name(&format!("{name}:1")), place.layers().await);
    let pull = tokio::spawn(async move { drop(store.pull(&name, &[]).await) });
    eventually(|| async { place.layers().await == before + 1 }).await;
    pull
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_collection_takes_what_pulls_have_left_and_nothing_of_those_under_way() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let always = GarbagePolicy { high_percent: 0, low_percent: 0, ..GarbagePolicy::default() };
    let under_way = half(&registry, &place, "under-way").await;
    for prune in [true, false] {
        let given_up = half(&registry, &place, "given-up").await;
        given_up.abort();
        let _ = given_up.await;
        assert_eq!(place.layers().await, 2, "the next attempt finds it");
        let relaxed = GarbagePolicy { high_percent: 100, ..always };
        assert_eq!(place.store.collect_garbage(&relaxed).await.unwrap().freed_bytes, 0);
        let done = match prune {
            true => place.store.prune(Duration::ZERO).await.unwrap(),
            false => place.store.collect_garbage(&always).await.unwrap(),
        };
        assert!(done.freed_bytes > 0 && done.removed.is_empty() && done.failures.is_empty(), "{done:?}");
        assert_eq!(place.layers().await, 1);
    }
    under_way.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_freed_is_what_the_layers_took_that_went() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    registry.push("a:1", &Image::new().layer(Tar::default().file("a", &noise(1, 300_000))));
    let record = place.store.pull(&registry.name("a:1"), &[]).await.unwrap();
    let took = place.driver.layer_usage(&record.layers[0]).await.unwrap().bytes;
    assert!(took >= 300_000);
    let under_way = half(&registry, &place, "under-way").await;
    assert_eq!(place.store.prune(Duration::ZERO).await.unwrap().freed_bytes, took);
    assert_eq!(place.driver.layer_usage(&record.layers[0]).await.unwrap().bytes, 0);
    under_way.abort();
}
