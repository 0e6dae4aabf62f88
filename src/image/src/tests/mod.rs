//! The store against a registry in the same process, with layers on a real OverlayFS.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod access;
mod archives;
mod bad_registry;
mod full;
mod held;
mod logins;
mod mirrors;
mod operations;
mod pipeline;
mod pulls;
mod pushes;
mod raw;
mod registry;
mod removal;
mod uploads;

use std::{future::Future, path::Path, sync::Arc, time::Duration};

use moxlet_ids::{ChainId, ContainerId};
use moxlet_storage::{Driver, IdMap, OverlayDriver};

use crate::{Config, ImageStore};
pub(crate) use registry::{Image, Registry};

/// A store in a directory of its own.
struct Place {
    dir: tempfile::TempDir,
    driver: Arc<OverlayDriver>,
    store: Arc<ImageStore>,
    config: Config,
}

impl Place {
    async fn new() -> Self {
        Self::with(|_| ()).await
    }

    /// One whose settings are changed.
    async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config {
            dir: dir.path().join("images"),
            max_parallel_downloads: 3,
            retry_pause: Duration::from_millis(20),
            ..Config::default()
        };
        change(&mut config);
        let (driver, store) = open(dir.path(), config.clone()).await;
        Self { dir, driver, store: store.unwrap(), config }
    }

    /// As after a restart.
    async fn reopen(self) -> Self {
        let Self { dir, config, driver, store } = self;
        drop((driver, store));
        let (driver, store) = open(dir.path(), config.clone()).await;
        Self { dir, config, driver, store: store.unwrap() }
    }

    async fn layers(&self) -> usize {
        self.driver.layers().await.unwrap().len()
    }

    /// Waits until no half-made layer is left; they are removed in the background.
    async fn no_drafts(&self) {
        let tmp = self.dir.path().join("driver/tmp");
        eventually(|| std::future::ready(std::fs::read_dir(&tmp).unwrap().count() == 0)).await;
    }

    /// Reads files of an image as a container sees them.
    async fn read(&self, layers: &[ChainId], names: &[&str]) -> Vec<Option<String>> {
        let (id, target) = (ContainerId::random(), self.dir.path().join("mount"));
        self.driver.create_root(&id, layers, IdMap::default().into()).await.unwrap();
        self.driver.mount_root(&id, &target).await.unwrap();
        let seen = names.iter().map(|n| std::fs::read_to_string(target.join(n)).ok()).collect();
        self.driver.unmount_root(&id, &target).await.unwrap();
        self.driver.remove_root(&id).await.unwrap();
        self.driver.close().await.unwrap();
        seen
    }
}

async fn open(dir: &Path, config: Config) -> (Arc<OverlayDriver>, crate::Result<Arc<ImageStore>>) {
    let driver = Arc::new(OverlayDriver::open(&dir.join("driver")).await.unwrap());
    let store = ImageStore::open(config, Arc::clone(&driver) as Arc<dyn Driver>).await;
    (driver, store)
}

/// Waits for a condition, with a limit.
pub(crate) async fn eventually<F: Future<Output = bool>>(mut condition: impl FnMut() -> F) {
    for _ in 0..3000 {
        if condition().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it never came to be");
}

#[test]
fn the_futures_can_be_sent() {
    fn sent<T: Send>(_: T) {}
    #[allow(clippy::let_underscore_future)]
    fn check(store: &ImageStore) {
        sent(store.pull("a", &[]));
        sent(store.resolve("a"));
        sent(store.list());
        sent(store.remove("a"));
    }
    let _ = check;
    fn shared<T: Send + Sync>() {}
    shared::<ImageStore>();
}
