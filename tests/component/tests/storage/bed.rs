//! The places that a store can lie on. Which of them this machine has is found when the tests run; what could not be run is
//! said on standard error.

use std::{
    ffi::CString,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use moxlet_ids::{ChainId, ContainerId, Digest};
use moxlet_storage::{
    Driver, IdMap, IdStyle, OverlayDriver, RootOptions, Usage, ZfsConfig, ZfsDriver, mounts,
};
use moxlet_tests_component::store::{dataset_or_word, ext4_keeps_quotas, mount_ext4_with_quota, run, zfs};

/// Runs only the beds whose name holds this.
const ONLY: &str = "MOXLET_TEST_BED";

/// What a store lies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bed {
    Overlay,
    OverlayOnTmpfs,
    /// A loop-mounted ext4 with project quotas.
    OverlayWithQuota,
    Zfs(IdStyle),
}

impl Bed {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Overlay => "overlay",
            Self::OverlayOnTmpfs => "overlay-tmpfs",
            Self::OverlayWithQuota => "overlay-quota",
            Self::Zfs(IdStyle::Idmapped) => "zfs-idmapped",
            Self::Zfs(IdStyle::Shifted) => "zfs-shifted",
        }
    }

    pub(crate) fn is_zfs(self) -> bool {
        matches!(self, Self::Zfs(_))
    }

    fn is_wanted(self) -> bool {
        std::env::var(ONLY).map_or(true, |only| self.name().contains(&only))
    }
}

pub(crate) fn zfs_beds() -> Vec<Bed> {
    let styles = dataset_or_word().map(|_| [IdStyle::Idmapped, IdStyle::Shifted]);
    styles.into_iter().flatten().map(Bed::Zfs).filter(|b| b.is_wanted()).collect()
}

fn quota_bed() -> Option<Bed> {
    static FOUND: OnceLock<bool> = OnceLock::new();
    Some(Bed::OverlayWithQuota).filter(|b| *FOUND.get_or_init(ext4_keeps_quotas) && b.is_wanted())
}

/// Runs a test on all beds.
pub(crate) async fn on_every_bed(test: impl AsyncFn(&mut Store)) {
    let overlays = [Bed::Overlay, Bed::OverlayOnTmpfs].into_iter().filter(|b| b.is_wanted());
    run_on(overlays.chain(zfs_beds()), test).await;
}

pub(crate) async fn on_zfs(test: impl AsyncFn(&mut Store)) {
    run_on(zfs_beds(), test).await;
}

pub(crate) async fn on_overlay(test: impl AsyncFn(&mut Store)) {
    run_on([Bed::Overlay, Bed::OverlayOnTmpfs].into_iter().filter(|b| b.is_wanted()), test).await;
}

/// Runs a test on the beds that keep quotas.
pub(crate) async fn on_beds_with_quota(test: impl AsyncFn(&mut Store)) {
    run_on(quota_bed().into_iter().chain(zfs_beds()), test).await;
}

pub(crate) async fn on_overlay_with_quota(test: impl AsyncFn(&mut Store)) {
    run_on(quota_bed(), test).await;
}

async fn run_on(beds: impl IntoIterator<Item = Bed>, test: impl AsyncFn(&mut Store)) {
    for bed in beds {
        // Captured like any output, and so shown beside a failure.
        println!("on {}", bed.name());
        let mut store = Store::new(bed).await;
        test(&mut store).await;
        store.end().await;
    }
}

/// A store of a test's own; whatever is mounted below it goes with it.
pub(crate) struct Store {
    pub(crate) bed: Bed,
    pub(crate) driver: Arc<dyn Driver>,
    /// The same, where it is one.
    pub(crate) zfs: Option<ZfsDriver>,
    dir: tempfile::TempDir,
}

impl Store {
    pub(crate) async fn new(bed: Bed) -> Self {
        let dir = tempfile::Builder::new().prefix("moxlet-storage-").tempdir().unwrap();
        match bed {
            Bed::OverlayOnTmpfs => {
                let options = CString::new("mode=0755,size=512m").unwrap();
                rustix::mount::mount(
                    "test",
                    dir.path(),
                    "tmpfs",
                    rustix::mount::MountFlags::NODEV,
                    Some(&*options),
                )
                .unwrap();
            }
            Bed::OverlayWithQuota => {
                mount_ext4_with_quota(&dir.path().join("ext4.img"), &dir.path().join("ext4")).unwrap();
            }
            _ => {}
        }
        // A container's root gets to what is its own.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let (driver, zfs) = open(bed, dir.path()).await;
        Self { bed, driver, zfs, dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where the store itself lies, or its mount points.
    pub(crate) fn inside(&self) -> PathBuf {
        inside(self.bed, self.dir.path())
    }

    /// The store's dataset.
    pub(crate) fn dataset(&self) -> String {
        dataset(self.dir.path())
    }

    /// A further store on ZFS with a directory of its own below this one's.
    pub(crate) fn config(&self, dataset: &str, run_dir: &str) -> ZfsConfig {
        let ids = match self.bed {
            Bed::Zfs(ids) => Some(ids),
            _ => None,
        };
        ZfsConfig { dataset: dataset.to_owned(), run_dir: self.path(run_dir), ids }
    }

    pub(crate) async fn reopen(&mut self) {
        (self.driver, self.zfs) = open(self.bed, self.dir.path()).await;
    }

    /// A layer on a parent.
    pub(crate) async fn layer_on(
        &self,
        parent: Option<&ChainId>,
        name: &str,
        fill: impl FnOnce(&Path),
    ) -> ChainId {
        let chain = match parent {
            None => ChainId::base(&Digest::of(name.as_bytes())),
            Some(parent) => parent.push(&Digest::of(name.as_bytes())),
        };
        let draft = self.driver.begin_layer(parent).await.unwrap();
        fill(draft.path());
        self.driver.commit_layer(draft, &chain, Usage::default()).await.unwrap();
        chain
    }

    pub(crate) async fn layer(&self, name: &str, fill: impl FnOnce(&Path)) -> ChainId {
        self.layer_on(None, name, fill).await
    }

    /// A mounted root on these layers.
    pub(crate) async fn root(
        &self,
        layers: &[ChainId],
        options: impl Into<RootOptions>,
    ) -> (ContainerId, PathBuf) {
        let id = ContainerId::random();
        self.driver.create_root(&id, layers, options.into()).await.unwrap();
        let target = self.path(id.as_str());
        self.driver.mount_root(&id, &target).await.unwrap();
        (id, target)
    }

    pub(crate) async fn remove(&self, id: &ContainerId, target: &Path) {
        self.driver.unmount_root(id, target).await.unwrap();
        self.driver.remove_root(id).await.unwrap();
    }

    /// What lies in the store that is neither a layer nor a root.
    pub(crate) fn unfinished(&self) -> Vec<String> {
        match self.bed {
            Bed::Zfs(_) => {
                let all = zfs(&[
                    "list",
                    "-H",
                    "-o",
                    "name",
                    "-d",
                    "1",
                    "-r",
                    &format!("{}/drafts", self.dataset()),
                ]);
                all.lines().skip(1).map(str::to_owned).collect()
            }
            _ => {
                entries(&self.inside().join("tmp")).into_iter().filter(|n| !n.starts_with("empty-")).collect()
            }
        }
    }

    async fn end(self) {
        self.driver.close().await.unwrap();
        let left: Vec<_> = mounts::mounted_below(self.dir.path())
            .unwrap()
            .into_iter()
            .filter(|p| !p.ends_with("ext4"))
            .collect();
        assert!(left.is_empty(), "{}: still mounted after close: {left:?}", self.bed.name());
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = mounts::unmount_all_below(self.dir.path());
        if self.bed == Bed::OverlayOnTmpfs {
            let _ = mounts::unmount(self.dir.path());
        }
        if self.bed.is_zfs() {
            // The test's own dataset, whatever a failed test left in it.
            let _ = run("zfs", &["destroy", "-R", &self.dataset()]);
        }
    }
}

fn dataset(dir: &Path) -> String {
    format!("{}/{}", dataset_or_word().unwrap(), dir.file_name().unwrap().to_str().unwrap())
}

fn inside(bed: Bed, dir: &Path) -> PathBuf {
    dir.join(if bed == Bed::OverlayWithQuota { "ext4/store" } else { "store" })
}

async fn open(bed: Bed, dir: &Path) -> (Arc<dyn Driver>, Option<ZfsDriver>) {
    open_at(bed, &dataset_or_none(bed, dir), &inside(bed, dir)).await
}

fn dataset_or_none(bed: Bed, dir: &Path) -> String {
    if bed.is_zfs() { dataset(dir) } else { String::new() }
}

/// A driver on a dataset, or on a directory.
pub(crate) async fn open_at(bed: Bed, dataset: &str, dir: &Path) -> (Arc<dyn Driver>, Option<ZfsDriver>) {
    match bed {
        Bed::Zfs(ids) => {
            let config = ZfsConfig { dataset: dataset.to_owned(), run_dir: dir.to_owned(), ids: Some(ids) };
            let driver = ZfsDriver::open(config).await.unwrap();
            (Arc::new(driver.clone()), Some(driver))
        }
        _ => (Arc::new(OverlayDriver::open(dir).await.unwrap()), None),
    }
}

pub(crate) fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

pub(crate) fn map() -> IdMap {
    IdMap::default()
}
