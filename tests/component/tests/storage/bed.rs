//! The places that a store can lie on. Which of them this machine has is found when the tests run; what could not be run is
//! said on standard error.

use std::{
    ffi::CString,
    fs::{self, File},
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Once, OnceLock},
};

use moxlet_ids::{ChainId, ContainerId, Digest};
use moxlet_storage::{
    Driver, IdMap, IdStyle, OverlayDriver, RootOptions, Usage, ZfsConfig, ZfsDriver, mounts,
};

/// The dataset below which stores on ZFS are made.
const DATASET: &str = "MOXLET_TEST_ZFS";
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

pub(crate) fn parent_dataset() -> Option<String> {
    std::env::var(DATASET).ok().filter(|d| !d.is_empty())
}

/// Past the capture of output: who reads the end of a run is to know what it did not cover.
fn announce(text: &str) {
    let _ = writeln!(std::io::stderr(), "storage tests: {text}");
}

pub(crate) fn zfs_beds() -> Vec<Bed> {
    static SAID: Once = Once::new();
    if parent_dataset().is_none() {
        SAID.call_once(|| {
            announce(&format!("NOTHING IS RUN ON ZFS, since {DATASET} names no dataset (scripts/test lab does it in a guest)"));
        });
        return Vec::new();
    }
    [IdStyle::Idmapped, IdStyle::Shifted].into_iter().map(Bed::Zfs).filter(|b| b.is_wanted()).collect()
}

/// Whether ext4 keeps project quotas here.
fn quota_bed() -> Option<Bed> {
    static FOUND: OnceLock<bool> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let can = mount_ext4_with_quota(dir.path());
        let _ = mounts::unmount(&dir.path().join("ext4"));
        if let Err(why) = &can {
            let what = "PROJECT QUOTAS ARE NOT RUN, since this kernel does not mount ext4 with them";
            announce(&format!("{what}: {}", why.lines().next().unwrap_or_default()));
        }
        can.is_ok()
    });
    Some(Bed::OverlayWithQuota).filter(|b| *found && b.is_wanted())
}

fn mount_ext4_with_quota(dir: &Path) -> Result<PathBuf, String> {
    let (image, at) = (dir.join("ext4.img"), dir.join("ext4"));
    File::create(&image).unwrap().set_len(256 << 20).unwrap();
    fs::create_dir_all(&at).unwrap();
    run("mkfs.ext4", &["-q", "-O", "quota,project", "-E", "quotatype=prjquota", image.to_str().unwrap()])?;
    run("mount", &["-o", "loop,prjquota", image.to_str().unwrap(), at.to_str().unwrap()])?;
    Ok(at)
}

/// Runs a program; what it printed, or what went wrong.
pub(crate) fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let out = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .output()
        .map_err(|e| format!("{program}: {e}"))?;
    if out.status.success() {
        return Ok(String::from_utf8(out.stdout).unwrap());
    }
    Err(format!("{program} {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim()))
}

pub(crate) fn zfs(args: &[&str]) -> String {
    run("zfs", args).unwrap()
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
            Bed::OverlayWithQuota => drop(mount_ext4_with_quota(dir.path()).unwrap()),
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
    format!("{}/{}", parent_dataset().unwrap(), dir.file_name().unwrap().to_str().unwrap())
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
