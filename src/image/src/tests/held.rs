//! Removals of layers that take their time, or fail: what comes and goes meanwhile.

use async_trait::async_trait;
use moxlet_ids::Digest;
use moxlet_storage::{
    Error as StorageError, FsUsage, LayerDraft, LayerView, Result as StorageResult, RootOptions, TakenLayer,
    Usage, WhiteoutStyle,
};
use tokio::sync::Semaphore;

use super::{registry::Fault, *};
use crate::layer::tests::Tar;

/// OverlayFS whose removals of layers' files wait for a permit each, and which does not let go of a layer that is marked.
struct HeldDriver {
    inner: OverlayDriver,
    begun: Arc<Semaphore>,
    permits: Arc<Semaphore>,
    fails: std::sync::Mutex<Option<ChainId>>,
}

#[async_trait]
impl Driver for HeldDriver {
    fn whiteouts(&self) -> WhiteoutStyle {
        self.inner.whiteouts()
    }
    async fn has_layer(&self, chain: &ChainId) -> StorageResult<bool> {
        self.inner.has_layer(chain).await
    }
    async fn begin_layer(&self, parent: Option<&ChainId>) -> StorageResult<LayerDraft> {
        self.inner.begin_layer(parent).await
    }
    async fn commit_layer(&self, draft: LayerDraft, chain: &ChainId, usage: Usage) -> StorageResult<()> {
        self.inner.commit_layer(draft, chain, usage).await
    }
    async fn open_layer(&self, chain: &ChainId) -> StorageResult<LayerView> {
        self.inner.open_layer(chain).await
    }
    async fn take_layer(&self, chain: &ChainId) -> StorageResult<TakenLayer> {
        if self.fails.lock().unwrap().as_ref() == Some(chain) {
            return Err(StorageError::Stopped);
        }
        let taken = self.inner.take_layer(chain).await?;
        let (begun, permits) = (Arc::clone(&self.begun), Arc::clone(&self.permits));
        let runtime = tokio::runtime::Handle::current();
        Ok(TakenLayer::new(chain.clone(), move || {
            runtime.block_on(async {
                begun.add_permits(1);
                permits.acquire().await.unwrap().forget();
                taken.remove().await
            })
        }))
    }
    async fn layers(&self) -> StorageResult<Vec<ChainId>> {
        self.inner.layers().await
    }
    async fn layer_usage(&self, chain: &ChainId) -> StorageResult<Usage> {
        self.inner.layer_usage(chain).await
    }
    async fn layers_usage(&self) -> StorageResult<Usage> {
        self.inner.layers_usage().await
    }
    async fn mount_layers(&self, layers: &[ChainId], target: &Path) -> StorageResult<()> {
        self.inner.mount_layers(layers, target).await
    }
    async fn create_root(
        &self,
        id: &ContainerId,
        layers: &[ChainId],
        options: RootOptions,
    ) -> StorageResult<()> {
        self.inner.create_root(id, layers, options).await
    }
    async fn mount_root(&self, id: &ContainerId, target: &Path) -> StorageResult<()> {
        self.inner.mount_root(id, target).await
    }
    async fn unmount_root(&self, id: &ContainerId, target: &Path) -> StorageResult<()> {
        self.inner.unmount_root(id, target).await
    }
    async fn remove_root(&self, id: &ContainerId) -> StorageResult<()> {
        self.inner.remove_root(id).await
    }
    async fn roots(&self) -> StorageResult<Vec<ContainerId>> {
        self.inner.roots().await
    }
    async fn root_layers(&self, id: &ContainerId) -> StorageResult<Vec<ChainId>> {
        self.inner.root_layers(id).await
    }
    async fn root_usage(&self, id: &ContainerId) -> StorageResult<Usage> {
        self.inner.root_usage(id).await
    }
    async fn fs_usage(&self) -> StorageResult<FsUsage> {
        self.inner.fs_usage().await
    }
    async fn close(&self) -> StorageResult<()> {
        self.inner.close().await
    }
}

/// A store on such a driver.
async fn held() -> (tempfile::TempDir, Arc<HeldDriver>, Arc<ImageStore>) {
    let dir = tempfile::tempdir().unwrap();
    let driver = Arc::new(HeldDriver {
        inner: OverlayDriver::open(&dir.path().join("driver")).await.unwrap(),
        begun: Arc::new(Semaphore::new(0)),
        permits: Arc::new(Semaphore::new(0)),
        fails: std::sync::Mutex::default(),
    });
    let config = Config { dir: dir.path().join("images"), ..Config::default() };
    let store = ImageStore::open(config, Arc::clone(&driver) as Arc<dyn Driver>).await.unwrap();
    (dir, driver, store)
}

fn image(name: &str) -> Image {
    Image::new().layer(Tar::default().file(name, &"x".repeat(100_000)))
}

fn tape(dir: &tempfile::TempDir, layer: &ChainId) -> std::path::PathBuf {
    dir.path().join("images/layers").join(format!("{}.tape", layer.digest().hex()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_ends_while_layers_are_removed_keeps_its_tapes() {
    let registry = Registry::start().await;
    let (dir, driver, store) = held().await;
    let (old, new) = (image("old"), image("new"));
    registry.push("old:1", &old);
    registry.push("new:1", &new);
    store.pull(&registry.name("old:1"), &[]).await.unwrap();
    let gate = Arc::new(Semaphore::new(0));
    registry.fault(&new.digest(0), Fault::Held(Arc::clone(&gate)));
    let pull = tokio::spawn({
        let (store, name) = (Arc::clone(&store), registry.name("new:1"));
        async move { store.pull(&name, &[]).await }
    });
    eventually(|| std::future::ready(!registry.requests(&new.digest(0)).is_empty())).await;
    let removal = tokio::spawn({
        let (store, name) = (Arc::clone(&store), registry.name("old:1"));
        async move { store.remove(&name).await }
    });
    driver.begun.acquire().await.unwrap().forget();
    gate.add_permits(1);
    let record = pull.await.unwrap().unwrap();
    driver.permits.add_permits(1);
    removal.await.unwrap().unwrap();
    assert!(tape(&dir, &record.layers[0]).exists());
    let report = store.verify(&[], false).unwrap().next().await.unwrap().unwrap();
    assert_eq!((report.image.id, report.verified, report.lost), (record.id, 1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_could_not_be_removed_keeps_its_tape_and_one_that_is_gone_does_not() {
    let registry = Registry::start().await;
    let (dir, driver, store) = held().await;
    for name in ["stays:1", "goes:1"] {
        registry.push(name, &image(name));
    }
    let stays = store.pull(&registry.name("stays:1"), &[]).await.unwrap();
    let goes = store.pull(&registry.name("goes:1"), &[]).await.unwrap();
    *driver.fails.lock().unwrap() = Some(stays.layers[0].clone());
    driver.permits.add_permits(100);
    assert!(store.remove(&registry.name("stays:1")).await.is_err());
    // A tape without a layer, as a crash leaves it.
    let stray = ChainId::base(&Digest::of(b"stray"));
    std::fs::write(tape(&dir, &stray), "").unwrap();
    assert!(store.remove(&registry.name("goes:1")).await.is_err(), "the other one does not go now either");
    assert!(tape(&dir, &stays.layers[0]).exists());
    assert!(!tape(&dir, &goes.layers[0]).exists() && !tape(&dir, &stray).exists());
    store.pull(&registry.name("stays:1"), &[]).await.unwrap();
    let report = store.verify(&[], false).unwrap().next().await.unwrap().unwrap();
    assert_eq!((report.verified, report.lost), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_the_files_of_a_layer_that_is_removed() {
    let registry = Registry::start().await;
    let (dir, driver, store) = held().await;
    for name in ["old:1", "kept:1", "new:1"] {
        registry.push(name, &image(name));
    }
    let [old, kept, new] = ["old:1", "kept:1", "new:1"].map(|name| registry.name(name));
    store.pull(&old, &[]).await.unwrap();
    store.pull(&kept, &[]).await.unwrap();
    let removal = tokio::spawn({
        let (store, name) = (Arc::clone(&store), old.clone());
        async move { store.remove(&name).await }
    });
    driver.begun.acquire().await.unwrap().forget();
    let meanwhile = async {
        assert!(store.hold(&kept).await.unwrap().is_some(), "a container is made");
        store.pull(&new, &[]).await.unwrap();
        // Its layer is not in the way of itself.
        store.pull(&old, &[]).await.unwrap()
    };
    let record = tokio::time::timeout(Duration::from_secs(30), meanwhile).await.expect("nobody waits");
    driver.permits.add_permits(1);
    removal.await.unwrap().unwrap();
    assert_eq!(driver.layers().await.unwrap().len(), 3);
    assert!(tape(&dir, &record.layers[0]).exists());
    let mut verification = store.verify(&[], false).unwrap();
    while let Some(report) = verification.next().await.unwrap() {
        assert_eq!((report.verified, report.faults.len()), (1, 0));
    }
}
