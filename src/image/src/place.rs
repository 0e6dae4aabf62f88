//! Where a store lies, and how it is opened: its lock first, for a driver that is opened removes what another process may be
//! making, then its layers, then the records of its images.

use std::{path::PathBuf, sync::Arc};

use moxlet_storage::{Driver, OverlayDriver, ZfsConfig, ZfsDriver};

use crate::{
    Config, ImageStore, Result,
    store::{self, DirLock},
};

/// Where the records of images lie: below a store's directory, or on its dataset, so that they travel with its pool.
const RECORDS: &str = "images";

/// Where a store is.
#[derive(Debug, Clone)]
pub enum Place {
    /// On OverlayFS, in this directory: `storage/` and `images/`.
    Overlay(PathBuf),
    /// On ZFS.
    Zfs(ZfsConfig),
}

/// A place that nobody else has open.
pub struct OpenPlace {
    driver: Arc<dyn Driver>,
    records: PathBuf,
    lock: DirLock,
}

impl Place {
    /// Takes the place's lock and opens its layers.
    ///
    /// # Errors
    /// Another process has it open ([`crate::Error::Locked`]), or what the driver says.
    pub async fn open(&self) -> Result<OpenPlace> {
        match self {
            Self::Overlay(dir) => {
                let records = dir.join(RECORDS);
                let at = records.clone();
                let lock = store::blocking(move || DirLock::take(&at)).await?;
                let driver = OverlayDriver::open(&dir.join("storage")).await?;
                Ok(OpenPlace { driver: Arc::new(driver), records, lock })
            }
            Self::Zfs(config) => {
                let lock = lock_dataset(config).await?;
                let place = ZfsPlace::new(ZfsDriver::open(config.clone()).await?, lock);
                Ok(OpenPlace { driver: Arc::new(place.driver), records: place.records, lock: place.lock })
            }
        }
    }
}

impl OpenPlace {
    /// Its layers and container roots.
    #[must_use]
    pub fn driver(&self) -> Arc<dyn Driver> {
        Arc::clone(&self.driver)
    }

    /// Opens the images of the place, whose directory `config` need not name.
    ///
    /// # Errors
    /// As [`ImageStore::open`].
    pub async fn images(self, config: Config) -> Result<Arc<ImageStore>> {
        let config = Config { dir: self.records, ..config };
        ImageStore::open_locked(config, self.driver, self.lock).await
    }
}

/// A place on ZFS, open.
pub(crate) struct ZfsPlace {
    pub(crate) driver: ZfsDriver,
    pub(crate) records: PathBuf,
    pub(crate) lock: DirLock,
}

impl ZfsPlace {
    pub(crate) fn new(driver: ZfsDriver, lock: DirLock) -> Self {
        Self { records: driver.state_dir().join(RECORDS), driver, lock }
    }
}

/// The name of a dataset as that of a directory: no two have the same, since no name of a dataset has a `%` in it.
#[must_use]
pub fn dataset_dir(dataset: &str) -> String {
    dataset.replace('/', "%")
}

/// The lock of a store on a dataset.
pub(crate) async fn lock_dataset(config: &ZfsConfig) -> Result<DirLock> {
    let name = config.dataset.clone();
    store::blocking(move || DirLock::of_dataset(&name)).await
}

#[cfg(test)]
mod tests {
    use super::dataset_dir;

    #[test]
    fn no_two_datasets_share_a_directory() {
        let all = ["tank", "tank/a/b", "tank/a_b", "tank_a/b", "tank/a-b", "tank/a.b", "tank/a:b"];
        for (n, dataset) in all.iter().enumerate() {
            let dir = dataset_dir(dataset);
            assert!(!dir.contains('/') && dir.replace('%', "/") == *dataset, "{dir}");
            assert!(all[..n].iter().all(|other| dataset_dir(other) != dir), "{dir}");
        }
    }
}
