//! The contract of a storage driver, fulfilled by OverlayFS on a real directory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    ffi::CStr,
    fs,
    io::Read,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
};

use moxlet_ids::{ChainId, ContainerId, Digest};
use moxlet_storage::{Driver, Error, IdMap, OverlayDriver, Usage, WhiteoutStyle, mounts};
use moxlet_tests_component::wait::until;
use rustix::fs::{CWD, FileType, Mode, XattrFlags, makedev, mknodat, setxattr};

/// A store of a test's own; whatever is mounted below it goes with it.
struct Store {
    driver: OverlayDriver,
    dir: tempfile::TempDir,
}

impl Store {
    async fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("moxlet-storage-").tempdir().unwrap();
        Self { driver: OverlayDriver::open(&dir.path().join("store")).await.unwrap(), dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn reopen(&mut self) {
        self.driver = OverlayDriver::open(&self.path("store")).await.unwrap();
    }

    async fn layer(&self, name: &str, fill: impl FnOnce(&Path)) -> ChainId {
        let chain = chain(name);
        let draft = self.driver.begin_layer(None).await.unwrap();
        fill(draft.path());
        self.driver.commit_layer(draft, &chain, Usage::default()).await.unwrap();
        chain
    }

    /// A mounted root on these layers.
    async fn root(&self, layers: &[ChainId], map: IdMap) -> (ContainerId, PathBuf) {
        let id = ContainerId::random();
        self.driver.create_root(&id, layers, map.into()).await.unwrap();
        let target = self.path(id.as_str());
        self.driver.mount_root(&id, &target).await.unwrap();
        (id, target)
    }

    async fn remove(&self, id: &ContainerId, target: &Path) {
        self.driver.unmount_root(id, target).await.unwrap();
        self.driver.remove_root(id).await.unwrap();
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = mounts::unmount_all_below(self.dir.path());
    }
}

fn chain(name: &str) -> ChainId {
    ChainId::base(&Digest::of(name.as_bytes()))
}

fn write(path: &Path, text: &str, owner: u32) {
    fs::write(path, text).unwrap();
    chown(path, Some(owner), Some(owner)).unwrap();
}

fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_appears_when_it_is_complete_and_a_dropped_draft_is_removed() {
    let store = Store::new().await;
    let (one, drafts) = (chain("one"), store.path("store/tmp"));
    let draft = store.driver.begin_layer(None).await.unwrap();
    let rival = store.driver.begin_layer(None).await.unwrap();
    assert_eq!(draft.parent(), None);
    fs::write(draft.path().join("file"), "first").unwrap();
    fs::write(rival.path().join("file"), "second").unwrap();
    assert!(!store.driver.has_layer(&one).await.unwrap());
    store.driver.commit_layer(draft, &one, Usage::default()).await.unwrap();
    assert!(store.driver.has_layer(&one).await.unwrap());
    store.driver.commit_layer(rival, &one, Usage::default()).await.unwrap();
    let (id, target) = store.root(std::slice::from_ref(&one), IdMap::default()).await;
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "first", "who is first wins");
    store.remove(&id, &target).await;

    let draft = store.driver.begin_layer(Some(&one)).await.unwrap();
    fs::create_dir_all(draft.path().join("a/b/c")).unwrap();
    drop(draft);
    until("drafts to go", async || match entries(&drafts) {
        left if left.is_empty() => Ok(()),
        left => Err(format!("{left:?}")),
    })
    .await;
    assert_eq!(store.driver.layers().await.unwrap(), std::slice::from_ref(&one));
    store.driver.remove_layer(&one).await.unwrap();
    store.driver.remove_layer(&one).await.unwrap();
    assert!(store.driver.layers().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn whiteouts_and_opaque_directories_hide_what_lies_below() {
    let store = Store::new().await;
    assert_eq!(store.driver.whiteouts(), WhiteoutStyle::Overlay);
    let below = store
        .layer("below", |dir| {
            for name in ["gone", "stays", "changed"] {
                fs::write(dir.join(name), "below").unwrap();
            }
            fs::create_dir_all(dir.join("opaque/old")).unwrap();
            fs::create_dir_all(dir.join("merged/old")).unwrap();
        })
        .await;
    let above = store
        .layer("above", |dir| {
            mknodat(CWD, dir.join("gone"), FileType::CharacterDevice, Mode::empty(), makedev(0, 0)).unwrap();
            fs::write(dir.join("changed"), "above").unwrap();
            fs::create_dir_all(dir.join("opaque/new")).unwrap();
            fs::create_dir_all(dir.join("merged/new")).unwrap();
            setxattr(dir.join("opaque"), "trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
        })
        .await;
    let (id, target) = store.root(&[below.clone(), above], IdMap::default()).await;
    assert_eq!(entries(&target), ["changed", "merged", "opaque", "stays"]);
    assert_eq!(fs::read_to_string(target.join("changed")).unwrap(), "above");
    assert_eq!(entries(&target.join("opaque")), ["new"]);
    assert_eq!(entries(&target.join("merged")), ["new", "old"]);
    let (other, all) = store.root(&[below], IdMap::default()).await;
    assert_eq!(entries(&all), ["changed", "gone", "merged", "opaque", "stays"]);
    store.remove(&id, &target).await;
    store.remove(&other, &all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn roots_on_one_layer_have_the_ids_of_their_maps_and_writes_of_their_own() {
    let store = Store::new().await;
    let layer = store
        .layer("ids", |dir| {
            write(&dir.join("root"), "layer", 0);
            write(&dir.join("app"), "layer", 1000);
            fs::set_permissions(dir.join("app"), fs::Permissions::from_mode(0o4755)).unwrap();
        })
        .await;
    let maps = [IdMap::default(), IdMap { host_base: 400_000, size: 65_536 }];
    let mut roots = Vec::new();
    for map in maps {
        let (id, target) = store.root(std::slice::from_ref(&layer), map).await;
        let owner = |name: &str| fs::metadata(target.join(name)).unwrap().uid();
        assert_eq!(
            (owner(""), owner("root"), owner("app")),
            (map.host_base, map.host_base, map.host_base + 1000)
        );
        assert_eq!(fs::metadata(target.join("app")).unwrap().mode() & 0o7777, 0o4755);
        assert_eq!(store.driver.root_usage(&id).await.unwrap().inodes, 0);
        fs::write(target.join("root"), map.host_base.to_string()).unwrap();
        fs::write(target.join("new"), vec![1; 10_000]).unwrap();
        let usage = store.driver.root_usage(&id).await.unwrap();
        assert!(usage.inodes == 2 && usage.bytes >= 10_000, "{usage:?}");
        roots.push((id, target, map));
    }
    for (_, target, map) in &roots {
        assert_eq!(fs::read_to_string(target.join("root")).unwrap(), map.host_base.to_string());
    }
    let (fresh, target) = store.root(std::slice::from_ref(&layer), maps[0]).await;
    assert_eq!(fs::read_to_string(target.join("root")).unwrap(), "layer", "the layer is as it was");
    store.remove(&fresh, &target).await;
    for (id, target, _) in roots {
        store.remove(&id, &target).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_a_layer_brings_does_not_open() {
    let store = Store::new().await;
    let layer = store
        .layer("device", |dir| {
            let null = makedev(1, 3);
            mknodat(CWD, dir.join("null"), FileType::CharacterDevice, Mode::from_raw_mode(0o666), null)
                .unwrap();
        })
        .await;
    let (id, target) = store.root(&[layer], IdMap::default()).await;
    let error = fs::File::open(target.join("null")).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied, "{error}");
    store.remove(&id, &target).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_is_made_mounted_unmounted_and_removed_again_and_again() {
    let store = Store::new().await;
    let layer = store.layer("one", |dir| fs::write(dir.join("file"), "x").unwrap()).await;
    let (id, target, map) = (ContainerId::random(), store.path("target"), IdMap::default());
    let layers = [layer.clone()];
    let made = (0..8).map(|_| store.driver.create_root(&id, &layers, map.into()));
    for done in futures::future::join_all(made).await {
        done.unwrap();
    }
    assert!(matches!(store.driver.create_root(&id, &[], map.into()).await, Err(Error::RootExists(_))));
    let missing = store.driver.create_root(&ContainerId::random(), &[chain("missing")], map.into()).await;
    assert!(matches!(missing, Err(Error::LayerNotFound(_))));
    let unknown = ContainerId::random();
    assert!(matches!(store.driver.mount_root(&unknown, &target).await, Err(Error::RootNotFound(_))));
    for _ in 0..2 {
        store.driver.mount_root(&id, &target).await.unwrap();
        store.driver.mount_root(&id, &target).await.unwrap();
        fs::write(target.join("kept"), "x").unwrap();
        store.driver.unmount_root(&id, &target).await.unwrap();
        store.driver.unmount_root(&id, &target).await.unwrap();
        assert!(!mounts::is_mounted(&target).unwrap() && !target.join("kept").exists());
    }
    assert_eq!(store.driver.root_layers(&id).await.unwrap(), layers);
    assert!(matches!(store.driver.remove_layer(&layer).await, Err(Error::LayerInUse { .. })));
    store.driver.remove_root(&id).await.unwrap();
    store.driver.remove_root(&id).await.unwrap();
    assert!(store.driver.roots().await.unwrap().is_empty());
    store.driver.remove_layer(&layer).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_root_is_unmounted_and_removed_and_who_reads_in_it_reads_on() {
    let store = Store::new().await;
    let layer = store.layer("one", |dir| fs::write(dir.join("file"), "still here").unwrap()).await;
    let (id, target) = store.root(&[layer], IdMap::default()).await;
    let mut open = fs::File::open(target.join("file")).unwrap();
    store.remove(&id, &target).await;
    assert!(!mounts::is_mounted(&target).unwrap());
    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still here");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_left_is_swept_at_open_and_what_is_whole_stays() {
    let mut store = Store::new().await;
    let layer = store.layer("one", |dir| fs::write(dir.join("file"), "x").unwrap()).await;
    let (whole, target) = store.root(std::slice::from_ref(&layer), IdMap::default()).await;
    fs::write(target.join("written"), "x").unwrap();
    let damaged = ContainerId::random();
    store.driver.create_root(&damaged, std::slice::from_ref(&layer), IdMap::default().into()).await.unwrap();
    let inside = store.path("store");
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
    store.driver.close().await.unwrap();
    assert!(mounts::mounted_below(store.dir.path()).unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_user_of_the_host_gets_into_a_store_and_its_figures_are_those_of_its_disk() {
    let store = Store::new().await;
    assert_eq!(fs::metadata(store.path("store")).unwrap().mode() & 0o777, 0o700);
    let usage = store.driver.fs_usage().await.unwrap();
    assert!(usage.capacity_bytes > usage.available_bytes && usage.used_bytes > 0, "{usage:?}");
    assert_eq!(usage.mountpoint, store.path("store").canonicalize().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_directory_passes_on_what_is_mounted_below_it() {
    let store = Store::new().await;
    let (dir, view) = (store.path("shared"), store.path("view"));
    mounts::make_shared_dir(&dir).unwrap();
    mounts::make_shared_dir(&dir).unwrap();
    assert_eq!(mounts::mounted_below(store.dir.path()).unwrap(), [dir.canonicalize().unwrap()], "once");
    fs::create_dir(&view).unwrap();
    rustix::mount::mount_bind_recursive(&dir, &view).unwrap();
    let below = dir.join("with blank");
    fs::create_dir(&below).unwrap();
    let options: Option<&CStr> = None;
    rustix::mount::mount("test", &below, "tmpfs", rustix::mount::MountFlags::NODEV, options).unwrap();
    fs::write(below.join("file"), "x").unwrap();
    assert!(view.join("with blank/file").exists());
    mounts::unmount_all_below(&dir).unwrap();
    assert!(!view.join("with blank/file").exists() && mounts::is_mounted(&dir).unwrap());
    mounts::unmount(&view).unwrap();
    mounts::unmount(&dir).unwrap();
}
