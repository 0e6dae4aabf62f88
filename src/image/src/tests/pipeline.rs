//! Layers that need each other, layers that are applied one after the other, and how far a pull has come.

use std::path::PathBuf;

use moxlet_storage::fake::ApplyingDriver;
use tokio::sync::Semaphore;

use super::{registry::Fault, *};
use crate::{Config, LayerState, layer::tests::Tar};

async fn applying(dir: &Path) -> (Arc<ApplyingDriver>, Arc<ImageStore>) {
    applying_with(dir, Config::default().prefetch_max_bytes).await
}

async fn applying_with(dir: &Path, prefetch_max_bytes: u64) -> (Arc<ApplyingDriver>, Arc<ImageStore>) {
    let driver = Arc::new(ApplyingDriver(OverlayDriver::open(&dir.join("driver")).await.unwrap()));
    let config = Config {
        dir: dir.join("images"),
        max_parallel_downloads: 3,
        prefetch_max_bytes,
        ..Config::default()
    };
    let store = ImageStore::open(config, Arc::clone(&driver) as Arc<dyn Driver>).await.unwrap();
    (driver, store)
}

/// Text of this length that gzip does not make much shorter.
pub(super) fn noise(seed: u64, length: usize) -> String {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        char::from(b' ' + u8::try_from(state >> 58).unwrap())
    };
    (0..length).map(|_| next()).collect()
}

fn three_layers() -> Image {
    Image::new()
        .layer(Tar::default().file("a", &noise(1, 900_000)).file("gone", "").dir("d").file("d/f", "below"))
        .layer(Tar::default().file("b", &noise(2, 3_000_000)).file(".wh.gone", "").link("linked", "d/f"))
        .layer(Tar::default().file("c", &noise(3, 3_000_000)).file("d/new", "").link("again", "linked"))
}

fn files(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

/// The files without a name that this process has open below a directory.
fn nameless(dir: &Path) -> usize {
    let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let links = open.filter_map(|e| std::fs::read_link(e.path()).ok());
    links.filter(|l: &PathBuf| l.starts_with(dir) && l.to_string_lossy().ends_with("(deleted)")).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_are_applied_in_order_come_ahead_and_leave_nothing_else() {
    let (registry, dir) = (Registry::start().await, tempfile::tempdir().unwrap());
    let image = three_layers();
    registry.push("a:1", &image);
    let (driver, store) = applying(dir.path()).await;
    let gate = Arc::new(Semaphore::new(0));
    registry.fault(&image.digest(0), Fault::Held(Arc::clone(&gate)));
    let (mut progress, pull) = store.pull_with_progress(&registry.name("a:1"), &[]).unwrap();
    let pull = tokio::spawn(pull);
    let came = |p: &crate::PullProgress| {
        p.layers.len() == 3
            && p.layers[1..].iter().all(|l| l.downloaded == l.total && l.state != LayerState::Done)
    };
    progress.wait_for(came).await.unwrap();
    assert!(nameless(dir.path()) >= 2, "what came ahead is in files that no crash leaves behind");
    gate.add_permits(1);
    let record = pull.await.unwrap().unwrap();
    assert!(progress.borrow().layers.iter().all(|l| l.state == LayerState::Done && l.downloaded == l.total));
    let top = driver.open_layer(&record.layers[2]).await.unwrap();
    for (name, length) in [("a", 900_000), ("b", 3_000_000), ("c", 3_000_000), ("again", 5)] {
        assert_eq!(std::fs::metadata(top.path().join(name)).unwrap().len(), length, "{name}");
    }
    assert!(!top.path().join("gone").exists());
    assert_eq!((nameless(dir.path()), files(&dir.path().join("images/tmp"))), (0, 0));
    assert_eq!(files(&dir.path().join("images/layers")), 3, "each layer has its tape");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_comes_ahead_than_the_settings_say() {
    let (registry, dir) = (Registry::start().await, tempfile::tempdir().unwrap());
    let image = three_layers();
    registry.push("a:1", &image);
    let (_driver, store) = applying_with(dir.path(), 0).await;
    let gate = Arc::new(Semaphore::new(0));
    registry.fault(&image.digest(0), Fault::Held(Arc::clone(&gate)));
    let (mut progress, pull) = store.pull_with_progress(&registry.name("a:1"), &[]).unwrap();
    let pull = tokio::spawn(pull);
    let begun =
        |p: &crate::PullProgress| p.layers.len() == 3 && p.layers[1..].iter().all(|l| l.downloaded > 0);
    progress.wait_for(begun).await.unwrap();
    assert_eq!(nameless(dir.path()), 0);
    assert!(progress.borrow().layers[1..].iter().all(|l| l.downloaded < l.total));
    gate.add_permits(1);
    assert_eq!(pull.await.unwrap().unwrap().layers.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_came_ahead_stays_after_a_failure_or_a_cancellation() {
    let (registry, dir) = (Registry::start().await, tempfile::tempdir().unwrap());
    let (driver, store) = applying(dir.path()).await;
    let image = three_layers();
    registry.push("a:1", &image);
    registry.fault(&image.digest(1), Fault::Damaged);
    store.pull(&registry.name("a:1"), &[]).await.unwrap_err();
    let clean = || {
        let left = files(&dir.path().join("images/tmp")) + files(&dir.path().join("driver/tmp"));
        std::future::ready(nameless(dir.path()) + left == 0)
    };
    eventually(clean).await;
    let gate = Arc::new(Semaphore::new(0));
    registry.fault(&image.digest(0), Fault::Held(Arc::clone(&gate)));
    let (mut progress, pull) = store.pull_with_progress(&registry.name("a:1"), &[]).unwrap();
    let pull = tokio::spawn(pull);
    progress.wait_for(|p| p.layers.len() == 3 && p.layers[2].downloaded > 0).await.unwrap();
    pull.abort();
    eventually(clean).await;
    assert_eq!(files(&dir.path().join("images/layers")), driver.layers().await.unwrap().len());
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_side_by_side_find_what_lies_below_whatever_comes_first() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let image = three_layers();
    registry.push("a:1", &image);
    let gate = Arc::new(Semaphore::new(0));
    registry.fault(&image.digest(0), Fault::Held(Arc::clone(&gate)));
    let (mut progress, pull) = place.store.pull_with_progress(&registry.name("a:1"), &[]).unwrap();
    let pull = tokio::spawn(pull);
    let waits = |p: &crate::PullProgress| {
        p.layers.len() == 3 && p.layers[1..].iter().all(|l| l.state == LayerState::Extracting)
    };
    progress.wait_for(waits).await.unwrap();
    gate.add_permits(1);
    let record = pull.await.unwrap().unwrap();
    let seen = place.read(&record.layers, &["linked", "again", "d/f", "gone"]).await;
    let below = Some("below".to_owned());
    assert_eq!(seen, [below.clone(), below.clone(), below, None]);
    let (second, pull) = place.store.pull_with_progress(&registry.name("a:1"), &[]).unwrap();
    pull.await.unwrap();
    assert!(second.borrow().layers.iter().all(|l| l.state == LayerState::Present && l.downloaded == 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_joins_a_pull_sees_how_far_it_is() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let image = Image::new().layer(Tar::default().file("a", &noise(1, 600_000)));
    registry.push("a:1", &image);
    let gate = Arc::new(Semaphore::new(0));
    registry.fault(&image.digest(0), Fault::Held(Arc::clone(&gate)));
    let name = registry.name("a:1");
    let (mut first, pull) = place.store.pull_with_progress(&name, &[]).unwrap();
    let pull = tokio::spawn(pull);
    first.wait_for(|p| p.layers.first().is_some_and(|l| l.downloaded > 0)).await.unwrap();
    let (second, joined) = place.store.pull_with_progress(&name, &[]).unwrap();
    let seen = second.borrow().layers[0].clone();
    assert_eq!((seen.state, seen.total), (LayerState::Downloading, image.size() - image.config_size()));
    assert!(seen.downloaded > 0 && seen.downloaded < seen.total);
    gate.add_permits(1);
    joined.await.unwrap();
    pull.await.unwrap().unwrap();
    assert_eq!(registry.requests(&image.digest(0)).len(), 1);
}

#[test]
fn layers_that_wait_for_those_below_leave_threads_for_these() {
    let threads = crate::store::WORKERS + 4;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(threads)
        .enable_all()
        .build()
        .unwrap();
    let pulled = runtime.block_on(async {
        let registry = Registry::start().await;
        let place = Place::with(|config| config.max_parallel_downloads = 2 * threads).await;
        let layer = |n: u32| Tar::default().dir("d").file(&format!("d/{n}"), &n.to_string());
        let image = (0..100).fold(Image::new(), |image, n| image.layer(layer(n)));
        registry.push("a:1", &image);
        let gate = Arc::new(Semaphore::new(0));
        registry.fault(&image.digest(0), Fault::Held(Arc::clone(&gate)));
        let (mut progress, pull) = place.store.pull_with_progress(&registry.name("a:1"), &[]).unwrap();
        let pull = tokio::spawn(pull);
        // As many as may, and the one below all of them.
        let waiting = |p: &crate::PullProgress| {
            p.layers.iter().filter(|l| l.state == LayerState::Extracting).count() >= crate::store::WORKERS - 1
        };
        progress.wait_for(waiting).await.unwrap();
        gate.add_permits(1);
        let limit = std::time::Duration::from_secs(600);
        tokio::time::timeout(limit, pull).await.expect("no pull waits for its own layers").unwrap()
    });
    assert_eq!(pulled.unwrap().layers.len(), 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_extraction_ends_with_its_pull_whatever_is_at_hand() {
    let (out, pieces) = tokio::sync::mpsc::channel(4);
    out.send(crate::layer::Piece::Bytes("abc".into())).await.unwrap();
    let stop = tokio_util::sync::CancellationToken::new();
    let mut source = crate::layer::Source::new(pieces, None).until(stop.clone());
    stop.cancel();
    let read = tokio::task::spawn_blocking(move || std::io::read_to_string(&mut source)).await.unwrap();
    assert!(crate::layer::is_cut(&read.unwrap_err()));
}
