//! Containers of an image that is there: how long the roots of many take, one after the other, all of them staying mounted.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use moxlet_ids::{ChainId, ContainerId};
use moxlet_storage::{Driver, OverlayDriver, RootOptions};

/// Makes and mounts roots; the time of each. All are taken away again.
pub(crate) async fn clones(
    store: &Path,
    layers: &[ChainId],
    dir: &Path,
    count: usize,
) -> Result<Vec<Duration>> {
    let driver = OverlayDriver::open(store).await.context("cannot open the store")?;
    fs::create_dir_all(dir).context("cannot make a directory for the roots")?;
    let (mut made, mut times) = (Vec::with_capacity(count), Vec::with_capacity(count));
    let outcome = async {
        for n in 0..count {
            let (id, target) = (ContainerId::random(), dir.join(n.to_string()));
            made.push((id.clone(), target.clone()));
            let start = Instant::now();
            driver.create_root(&id, layers, RootOptions::default()).await?;
            driver.mount_root(&id, &target).await?;
            times.push(start.elapsed());
            fs::metadata(target.join("bin/busybox")).context("a root lacks what the image brings")?;
        }
        anyhow::Ok(())
    }
    .await;
    for (id, target) in &made {
        driver.unmount_root(id, target).await?;
        driver.remove_root(id).await?;
    }
    driver.close().await?;
    outcome.context("cannot make a root")?;
    Ok(times)
}
