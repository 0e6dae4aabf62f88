//! Container roots: their ids, their lives, who sees them.

use std::{
    ffi::CStr,
    fs,
    io::Read,
    os::unix::fs::{FileTypeExt, MetadataExt},
    sync::mpsc,
    thread,
};

use moxlet_ids::{ChainId, ContainerId, Digest};
use moxlet_storage::{Error, IdMap, mounts};
use moxlet_tests_component::wait::until;
use rustix::{
    fs::{CWD, FileType, Mode, XattrFlags, makedev, mknodat, setxattr},
    mount::MountPropagationFlags,
};

use crate::{
    bed::{entries, map, on_every_bed},
    content::{as_root_of, attribute, net_raw, set_mode, write},
};

#[tokio::test(flavor = "multi_thread")]
async fn roots_on_one_layer_have_the_ids_of_their_maps_and_writes_of_their_own() {
    on_every_bed(async |store| {
        let layer = store
            .layer("ids", |dir| {
                write(&dir.join("root"), "layer", 0);
                write(&dir.join("app"), "layer", 1000);
                set_mode(&dir.join("app"), 0o4755);
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
            fs::write(target.join("root"), map.host_base.to_string()).unwrap();
            roots.push((id, target, map));
        }
        for (_, target, map) in &roots {
            assert_eq!(fs::read_to_string(target.join("root")).unwrap(), map.host_base.to_string());
        }
        let (fresh, target) = store.root(std::slice::from_ref(&layer), maps[0]).await;
        assert_eq!(fs::read_to_string(target.join("root")).unwrap(), "layer", "the layer is as it was");
        store.remove(&fresh, &target).await;
        let (empty, target) = store.root(&[], maps[1]).await;
        assert_eq!(fs::metadata(&target).unwrap().uid(), 400_000, "of an empty root as well");
        assert!(entries(&target).is_empty());
        store.remove(&empty, &target).await;
        for (id, target, _) in roots {
            store.remove(&id, &target).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_files_carry_is_the_same_in_a_root() {
    on_every_bed(async |store| {
        let layer = store
            .layer("attributes", |dir| {
                let file = dir.join("capable");
                write(&file, "x", 7);
                set_mode(&file, 0o6755);
                setxattr(&file, "security.capability", &net_raw(), XattrFlags::empty()).unwrap();
                setxattr(&file, "user.note", b"hello", XattrFlags::empty()).unwrap();
                fs::hard_link(&file, dir.join("again")).unwrap();
                fs::create_dir(dir.join("sticky")).unwrap();
                set_mode(&dir.join("sticky"), 0o1777);
                mknodat(CWD, dir.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
                std::os::unix::fs::symlink("/nowhere", dir.join("link")).unwrap();
                std::os::unix::fs::lchown(dir.join("link"), Some(8), Some(9)).unwrap();
                fs::File::open(&file)
                    .unwrap()
                    .set_modified(std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000, 7))
                    .unwrap();
            })
            .await;
        let (id, target) = store.root(&[layer], map()).await;
        let file = fs::metadata(target.join("capable")).unwrap();
        assert_eq!((file.uid(), file.gid(), file.mode() & 0o7777), (100_007, 100_007, 0o6755));
        assert_eq!((file.mtime(), file.mtime_nsec()), (1_000_000, 7));
        let again = fs::metadata(target.join("again")).unwrap();
        assert_eq!((again.ino(), again.nlink()), (file.ino(), 2), "a hard link is one");
        assert_eq!(attribute(&target.join("again"), "user.note"), b"hello");
        // For us, outside of the container, it is a capability of the container's root.
        let capability = attribute(&target.join("capable"), "security.capability");
        assert_eq!((capability[3], &capability[4..8]), (3, &net_raw()[4..8]), "{capability:?}");
        assert_eq!(capability[20..], 100_000_u32.to_le_bytes(), "{capability:?}");
        assert_eq!(fs::metadata(target.join("sticky")).unwrap().mode() & 0o7777, 0o1777);
        assert!(fs::metadata(target.join("fifo")).unwrap().file_type().is_fifo());
        let link = fs::symlink_metadata(target.join("link")).unwrap();
        assert_eq!((link.uid(), link.gid()), (100_008, 100_009));
        store.remove(&id, &target).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_a_layer_brings_does_not_open() {
    on_every_bed(async |store| {
        let layer = store
            .layer("device", |dir| {
                let (path, mode) = (dir.join("null"), Mode::from_raw_mode(0o666));
                mknodat(CWD, path, FileType::CharacterDevice, mode, makedev(1, 3)).unwrap();
            })
            .await;
        let (id, target) = store.root(&[layer], map()).await;
        let error = fs::File::open(target.join("null")).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied, "{error}");
        store.remove(&id, &target).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_is_made_mounted_unmounted_and_removed_again_and_again() {
    on_every_bed(async |store| {
        let layer = store.layer("one", |dir| fs::write(dir.join("file"), "x").unwrap()).await;
        let (id, target) = (ContainerId::random(), store.path("target"));
        let layers = [layer.clone()];
        let made = (0..8).map(|_| store.driver.create_root(&id, &layers, map().into()));
        for done in futures::future::join_all(made).await {
            done.unwrap();
        }
        let other = store.driver.create_root(&id, &[], map().into()).await;
        assert!(matches!(other, Err(Error::RootExists(_))));
        let missing = [ChainId::base(&Digest::of(b"missing"))];
        let missing = store.driver.create_root(&ContainerId::random(), &missing, map().into()).await;
        assert!(matches!(missing, Err(Error::LayerNotFound(_))));
        let bad = IdMap { host_base: 0, size: 0 };
        let bad = store.driver.create_root(&ContainerId::random(), &layers, bad.into()).await;
        assert!(matches!(bad, Err(Error::BadIdMap { .. })));
        let unknown = ContainerId::random();
        assert!(matches!(store.driver.mount_root(&unknown, &target).await, Err(Error::RootNotFound(_))));
        for _ in 0..2 {
            store.driver.mount_root(&id, &target).await.unwrap();
            store.driver.mount_root(&id, &target).await.unwrap();
            as_root_of(map(), || fs::write(target.join("kept"), "x").unwrap());
            store.driver.unmount_root(&id, &target).await.unwrap();
            store.driver.unmount_root(&id, &target).await.unwrap();
            assert!(!mounts::is_mounted(&target).unwrap() && !target.join("kept").exists());
        }
        store.reopen().await;
        store.driver.create_root(&id, &layers, map().into()).await.unwrap();
        store.driver.mount_root(&id, &target).await.unwrap();
        assert_eq!(entries(&target), ["file", "kept"]);
        store.driver.unmount_root(&id, &target).await.unwrap();
        assert_eq!(store.driver.root_layers(&id).await.unwrap(), layers);
        assert!(matches!(store.driver.remove_layer(&layer).await, Err(Error::LayerInUse { .. })));
        store.driver.remove_root(&id).await.unwrap();
        store.driver.remove_root(&id).await.unwrap();
        assert!(store.driver.roots().await.unwrap().is_empty());
        store.driver.remove_layer(&layer).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn roots_that_are_made_at_once_are_all_there() {
    on_every_bed(async |store| {
        let layer = store.layer("one", |dir| fs::write(dir.join("file"), "x").unwrap()).await;
        let layers = [layer];
        let ids: Vec<ContainerId> = (0..10).map(|_| ContainerId::random()).collect();
        let made = ids.iter().map(|id| async {
            store.driver.create_root(id, &layers, map().into()).await.unwrap();
            let target = store.path(id.as_str());
            store.driver.mount_root(id, &target).await.unwrap();
            as_root_of(map(), || fs::write(target.join("own"), id.as_str()).unwrap());
        });
        futures::future::join_all(made).await;
        assert_eq!(store.driver.roots().await.unwrap().len(), 10);
        for id in &ids {
            assert_eq!(fs::read_to_string(store.path(id.as_str()).join("own")).unwrap(), id.as_str());
        }
        let removed = ids.iter().map(|id| async { store.remove(id, &store.path(id.as_str())).await });
        futures::future::join_all(removed).await;
        assert!(store.driver.roots().await.unwrap().is_empty());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_root_is_unmounted_and_removed_and_who_reads_in_it_reads_on() {
    on_every_bed(async |store| {
        let layer = store.layer("one", |dir| fs::write(dir.join("file"), "still here").unwrap()).await;
        let (id, target) = store.root(std::slice::from_ref(&layer), map()).await;
        let mut open = fs::File::open(target.join("file")).unwrap();
        store.remove(&id, &target).await;
        assert!(!mounts::is_mounted(&target).unwrap());
        assert!(store.driver.roots().await.unwrap().is_empty());
        let mut text = String::new();
        open.read_to_string(&mut text).unwrap();
        assert_eq!(text, "still here");
        // Under the same name another one can come at once.
        store.driver.create_root(&id, &[], map().into()).await.unwrap();
        store.driver.remove_root(&id).await.unwrap();
        drop(open);
        until("the layer to be free", async || {
            store.driver.remove_layer(&layer).await.map_err(|e| e.to_string())
        })
        .await;
        assert!(store.unfinished().is_empty(), "{:?}", store.unfinished());
    })
    .await;
}

/// Answers in a mount namespace of its own, which receives what is mounted in ours.
struct Slave {
    ask: mpsc::Sender<std::path::PathBuf>,
    answers: mpsc::Receiver<bool>,
}

impl Slave {
    fn new() -> Self {
        let (ask, questions) = mpsc::channel::<std::path::PathBuf>();
        let (answer, answers) = mpsc::channel();
        thread::spawn(move || {
            // Other threads keep their namespace: a thread that unshares has a working directory of its own, too.
            #[allow(unsafe_code)]
            // SAFETY: the thread opens nothing before and shares no descriptors that depend on the namespace.
            unsafe {
                rustix::thread::unshare_unsafe(
                    rustix::thread::UnshareFlags::NEWNS | rustix::thread::UnshareFlags::FS,
                )
                .unwrap();
            }
            rustix::mount::mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM)
                .unwrap();
            answer.send(true).unwrap();
            for path in questions {
                answer.send(path.exists()).unwrap();
            }
        });
        assert!(answers.recv().unwrap());
        Self { ask, answers }
    }

    fn sees(&self, path: &std::path::Path) -> bool {
        self.ask.send(path.to_owned()).unwrap();
        self.answers.recv().unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_below_a_shared_directory_appears_in_namespaces_that_were_there_before() {
    on_every_bed(async |store| {
        let shared = store.path("shared");
        mounts::make_shared_dir(&shared).unwrap();
        let slave = Slave::new();
        let layer = store.layer("one", |dir| fs::write(dir.join("file"), "x").unwrap()).await;
        let (id, target) = (ContainerId::random(), shared.join("pod/rootfs"));
        store.driver.create_root(&id, &[layer], map().into()).await.unwrap();
        store.driver.mount_root(&id, &target).await.unwrap();
        assert!(slave.sees(&target.join("file")));
        store.driver.unmount_root(&id, &target).await.unwrap();
        assert!(!slave.sees(&target.join("file")));
        store.driver.remove_root(&id).await.unwrap();
        assert!(store.unfinished().is_empty(), "no namespace keeps it: {:?}", store.unfinished());
        mounts::unmount(&shared).unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_directory_passes_on_what_is_mounted_below_it() {
    let place = tempfile::tempdir().unwrap();
    let (dir, view) = (place.path().join("shared"), place.path().join("view"));
    mounts::make_shared_dir(&dir).unwrap();
    mounts::make_shared_dir(&dir).unwrap();
    assert_eq!(mounts::mounted_below(place.path()).unwrap(), [dir.canonicalize().unwrap()], "once");
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

#[tokio::test(flavor = "multi_thread")]
async fn no_user_of_the_host_gets_into_a_store() {
    on_every_bed(async |store| {
        assert_eq!(fs::metadata(store.inside()).unwrap().mode() & 0o777, 0o700);
    })
    .await;
}
