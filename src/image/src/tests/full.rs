//! A store whose file system is full.

use rustix::mount::{MountFlags, UnmountFlags};

use super::{pipeline::noise, *};
use crate::{Error, layer::tests::Tar};

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
    store.pull(&registry.name("fits:1"), &[]).await.unwrap();
    driver.close().await.unwrap();
}
