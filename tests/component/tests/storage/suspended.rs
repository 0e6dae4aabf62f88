//! A pool whose device has ceased to write: everybody is told by name, nothing hangs, and once it goes on all works again.
//!
//! The pool lies in a file of a file system that is full: what it writes fails until there is space again.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use moxlet_ids::{ChainId, ContainerId, Digest};
use moxlet_image::{Config, Place, RootfsOptions, feed};
use moxlet_storage::{Driver, Error, Usage, ZfsConfig, ZfsDriver, mounts};
use moxlet_tests_component::{
    store::{Pool, run},
    wait::until,
};

use crate::{
    bed::{entries, map, zfs_beds},
    content::noise,
};

/// Within this an operation on a suspended pool has to end; a hanging one never does.
const LIMIT: Duration = Duration::from_secs(100);

/// A file system with a pool on it, and what fills it.
struct Device {
    dir: tempfile::TempDir,
    pool: Option<Pool>,
}

impl Device {
    fn new(failmode: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("moxlet-suspended-").tempdir().unwrap();
        let at = dir.path().join("device");
        fs::create_dir(&at).unwrap();
        run("mount", &["-t", "tmpfs", "-o", "size=64m", "test", at.to_str().unwrap()]).unwrap();
        let pool = Some(Pool::create_in(&at, &["-o", &format!("failmode={failmode}")]));
        Self { dir, pool }
    }

    fn pool(&self) -> &str {
        &self.pool.as_ref().unwrap().name
    }

    fn device(&self) -> PathBuf {
        self.dir.path().join("device")
    }

    /// From now on nothing more can be written.
    fn fail(&self) {
        let filler = self.device().join("filler");
        let full = fs::write(&filler, vec![1; 64 << 20]).unwrap_err();
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    }

    fn is_suspended(&self) -> bool {
        let path = format!("/proc/spl/kstat/zfs/{}/state", self.pool());
        fs::read_to_string(path).unwrap().trim() == "SUSPENDED"
    }

    /// Space again, and the admin's word.
    fn mend(&self) {
        fs::remove_file(self.device().join("filler")).unwrap();
        run("zpool", &["clear", self.pool()]).unwrap();
    }

    fn config(&self) -> ZfsConfig {
        let dataset = format!("{}/moxlet", self.pool());
        ZfsConfig { dataset, run_dir: self.dir.path().join("store"), ids: None }
    }

    /// What lies below a group of the store.
    fn names(&self, group: &str) -> Vec<String> {
        let top = format!("{}/moxlet/{group}", self.pool());
        let all = run("zfs", &["list", "-H", "-o", "name", "-d", "1", "-r", &top]).unwrap();
        all.lines().skip(1).map(str::to_owned).collect()
    }
}

impl Drop for Device {
    /// Also where a test has failed: a pool that stays suspended would hang whoever comes next.
    fn drop(&mut self) {
        if self.device().join("filler").exists() {
            let _ = fs::remove_file(self.device().join("filler"));
            let _ = run("zpool", &["clear", self.pool()]);
        }
        let _ = mounts::unmount_all_below(&self.dir.path().join("store"));
        let _ = mounts::unmount(&self.dir.path().join("store"));
        drop(self.pool.take());
        let _ = mounts::unmount(&self.device());
    }
}

/// Fails with the name of the pool and what to do, in time.
async fn refused<T>(device: &Device, what: &str, work: impl Future<Output = Result<T, Error>>) {
    let begun = Instant::now();
    let done = tokio::time::timeout(LIMIT, work).await;
    let error =
        done.unwrap_or_else(|_| panic!("{what} hangs")).err().unwrap_or_else(|| panic!("{what} worked"));
    println!("{what}: {error} ({:?})", begun.elapsed());
    let words = error.to_string();
    assert!(matches!(&error, Error::PoolSuspended { pool, .. } if pool == device.pool()), "{what}: {error}");
    for word in [format!("zpool status {}", device.pool()), format!("zpool clear {}", device.pool())] {
        assert!(words.contains(&word), "{what}: {error}");
    }
}

async fn layer(driver: &ZfsDriver, name: &str, fill: impl FnOnce(&Path)) -> Result<ChainId, Error> {
    let chain = ChainId::base(&Digest::of(name.as_bytes()));
    let draft = driver.begin_layer(None).await?;
    fill(draft.path());
    driver.commit_layer(draft, &chain, Usage::default()).await?;
    Ok(chain)
}

fn large(dir: &Path) {
    fs::write(dir.join("noise"), noise(6 << 20)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_pool_is_named_and_nothing_is_leaked_once_it_goes_on() {
    for failmode in ["wait", "continue"] {
        if zfs_beds().is_empty() {
            return;
        }
        println!("failmode={failmode}");
        suspended(&Device::new(failmode)).await;
    }
}

/// The records of images lie on the pool as well: whoever changes one waits in vain, and is told.
#[tokio::test(flavor = "multi_thread")]
async fn images_cannot_be_changed_on_a_suspended_pool_and_nothing_hangs() {
    if zfs_beds().is_empty() {
        return;
    }
    let device = Device::new("wait");
    let place = Place::Zfs(device.config()).open().await.unwrap();
    let driver = place.driver();
    let images = place.images(Config::default()).await.unwrap();
    let (feed, source) = feed();
    let options = RootfsOptions { name: Some("mine:1".into()), ..RootfsOptions::default() };
    let give = async {
        feed.send(tar::Builder::new(Vec::new()).into_inner().unwrap().into()).await;
        feed.end().await;
    };
    let record = tokio::join!(images.import_rootfs(source, options), give).0.unwrap();
    let draft = driver.begin_layer(None).await.unwrap();
    large(draft.path());

    device.fail();
    let chain = ChainId::base(&Digest::of(b"large"));
    refused(&device, "commit_layer", driver.commit_layer(draft, &chain, Usage::default())).await;
    assert!(device.is_suspended());
    let told = |error| match error {
        moxlet_image::Error::Storage(error) => match Arc::into_inner(error) {
            Some(error) => error,
            None => panic!("somebody else has the error"),
        },
        other => panic!("{other}"),
    };
    refused(&device, "tag", async { images.tag("mine:1", "other:1").await.map_err(told) }).await;
    refused(&device, "pin", async { images.set_pinned("mine:1", true).await.map_err(told) }).await;
    refused(&device, "hold", async { images.hold("mine:1").await.map_err(told) }).await;

    device.mend();
    // What was begun comes to its end.
    until("the pin", async || match images.resolve("other:1").await.unwrap() {
        Some(found) if found.id == record.id && found.pinned => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    images.close().await.unwrap();
}

async fn suspended(device: &Device) {
    let driver = ZfsDriver::open(device.config()).await.unwrap();
    let one = layer(&driver, "one", |dir| fs::write(dir.join("file"), "x").unwrap()).await.unwrap();
    let (id, target) = (ContainerId::random(), device.dir.path().join("root"));
    driver.create_root(&id, std::slice::from_ref(&one), map().into()).await.unwrap();
    driver.mount_root(&id, &target).await.unwrap();
    let draft = driver.begin_layer(Some(&one)).await.unwrap();
    // Before it fails: a write to a suspended pool hangs its thread for as long as that lasts.
    large(draft.path());

    device.fail();
    let two = one.push(&Digest::of(b"two"));
    refused(device, "commit_layer", driver.commit_layer(draft, &two, Usage::default())).await;
    assert!(device.is_suspended());
    let lost = ContainerId::random();
    let stack = std::slice::from_ref(&one);
    refused(device, "create_root", driver.create_root(&lost, stack, map().into())).await;
    refused(device, "begin_layer", driver.begin_layer(Some(&one))).await;
    refused(device, "open_layer", driver.open_layer(&one)).await;
    refused(device, "remove_root", driver.remove_root(&id)).await;
    refused(device, "unmount_root", driver.unmount_root(&id, &target)).await;
    refused(device, "fs_usage", driver.fs_usage()).await;
    refused(device, "close", driver.close()).await;
    refused(device, "stalled", async { Err::<(), _>(driver.stalled().await) }).await;
    let again = ZfsConfig { run_dir: device.dir.path().join("other"), ..device.config() };
    refused(device, "open", ZfsDriver::open(again)).await;

    device.mend();
    // Whether the layer that hung in the middle has come to its end or not, it can be had.
    until("the layer", async || {
        if driver.has_layer(&two).await.unwrap() {
            return Ok(());
        }
        let draft = driver.begin_layer(Some(&one)).await.map_err(|e| e.to_string())?;
        large(draft.path());
        driver.commit_layer(draft, &two, Usage::default()).await.map_err(|e| e.to_string())
    })
    .await;
    driver.create_root(&lost, stack, map().into()).await.unwrap();
    driver.remove_root(&lost).await.unwrap();
    assert_eq!(entries(&target), ["file"]);
    until("drafts to go", async || match device.names("drafts") {
        left if left.is_empty() => Ok(()),
        left => Err(format!("{left:?}")),
    })
    .await;
    assert_eq!((device.names("layers").len(), device.names("roots").len()), (2, 1));
    driver.unmount_root(&id, &target).await.unwrap();
    driver.remove_root(&id).await.unwrap();
    driver.close().await.unwrap();
    run("zpool", &["export", device.pool()]).unwrap();
    let pool = device.pool.as_ref().unwrap();
    pool.import();
    let driver = ZfsDriver::open(device.config()).await.unwrap();
    assert_eq!(driver.layers().await.unwrap().len(), 2);
    driver.close().await.unwrap();
}
