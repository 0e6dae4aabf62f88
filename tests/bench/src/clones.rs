//! Containers of one image on ZFS: what the five hundredth costs beside the first, and beside a bare `zfs clone` with a mount in
//! a dataset that grows alike. Runs where there is a pool: `scripts/bench clones` does it in a guest.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use moxlet_ids::{ChainId, ContainerId, Digest};
use moxlet_storage::{Driver, RootOptions, Usage, ZfsConfig, ZfsDriver};

use crate::{
    number,
    table::{Bound, Table, ms, quantile},
    text,
};

/// How many are taken together, at the beginning and at the end.
const SAMPLE: usize = 10;
/// What a container may cost at the end beside the beginning.
const GROWTH: f64 = 1.5;

/// Measures, prints, and says whether all bounds hold.
pub(crate) async fn measure() -> Result<bool> {
    let (dataset, dir) = (text("BENCH_ZFS")?, std::path::PathBuf::from(text("BENCH_DIR")?));
    let count = number("CLONES", 500)?.max(2 * SAMPLE);
    let bare = format!("{dataset}/bare");
    zfs(&["create", "-o", "mountpoint=none", &bare])?;
    let config = ZfsConfig { dataset: format!("{dataset}/moxlet"), run_dir: dir.join("store"), ids: None };
    let driver = ZfsDriver::open(config).await.context("cannot open the store")?;
    let chain = layer(&driver).await?;
    let origin = format!("{dataset}/moxlet/layers/{}@layer", chain.digest().hex());

    let (mut ours, mut theirs) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for n in 0..count {
        let (id, target) = (ContainerId::random(), dir.join(format!("root-{n}")));
        let clone = (format!("{bare}/{n}"), dir.join(format!("bare-{n}")));
        // In turns, so that neither always has the pool's last transaction of the other to wait for.
        if n % 2 == 0 {
            ours.push(container(&driver, &id, &chain, &target).await?);
            theirs.push(bare_clone(&origin, &clone.0, &clone.1)?);
        } else {
            theirs.push(bare_clone(&origin, &clone.0, &clone.1)?);
            ours.push(container(&driver, &id, &chain, &target).await?);
        }
        if (n + 1) % 100 == 0 {
            eprintln!("{} containers: {:.0} ms, bare {:.0} ms", n + 1, ms(last(&ours)), ms(last(&theirs)));
        }
    }
    let mut table = Table::default();
    let what = format!("container {count} beside container 1, on ZFS (ms)");
    table.row(&what, ms(last(&ours)), Some(ms(first(&ours))), &Bound::TimesPeer(GROWTH));
    let what = format!("container {count} beside a bare clone and mount (ms)");
    table.row(&what, ms(last(&ours)), Some(ms(last(&theirs))), &Bound::TimesPeer(1.0));
    let what = format!("for comparison: bare clone {count} beside bare clone 1 (ms)");
    table.row(&what, ms(last(&theirs)), Some(ms(first(&theirs))), &Bound::None);
    println!("medians of {SAMPLE}, in turns on one pool");
    table.print();
    Ok(table.holds())
}

fn first(times: &[Duration]) -> Duration {
    quantile(&times[..SAMPLE], 0.5)
}

fn last(times: &[Duration]) -> Duration {
    quantile(&times[times.len().saturating_sub(SAMPLE)..], 0.5)
}

/// A layer of some files.
async fn layer(driver: &ZfsDriver) -> Result<ChainId> {
    let chain = ChainId::base(&Digest::of(b"layer"));
    let draft = driver.begin_layer(None).await.context("cannot begin a layer")?;
    for n in 0..100 {
        fs::write(draft.path().join(n.to_string()), vec![1; 10_000]).context("cannot fill a layer")?;
    }
    driver.commit_layer(draft, &chain, Usage::default()).await.context("cannot store a layer")?;
    Ok(chain)
}

async fn container(driver: &ZfsDriver, id: &ContainerId, chain: &ChainId, target: &Path) -> Result<Duration> {
    let begun = Instant::now();
    driver.create_root(id, std::slice::from_ref(chain), RootOptions::default()).await?;
    driver.mount_root(id, target).await?;
    let time = begun.elapsed();
    fs::metadata(target.join("99")).context("a root lacks what the image brings")?;
    Ok(time)
}

fn bare_clone(origin: &str, dataset: &str, target: &Path) -> Result<Duration> {
    fs::create_dir_all(target).context("cannot make a mount point")?;
    let begun = Instant::now();
    zfs(&["clone", "-o", "mountpoint=legacy", origin, dataset])?;
    run(Command::new("mount").args(["-t", "zfs", dataset]).arg(target))?;
    Ok(begun.elapsed())
}

fn zfs(args: &[&str]) -> Result<()> {
    run(Command::new("zfs").args(args))
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {command:?}"))?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}
