//! The table of `scripts/bench image`: how images come, and what a container of one costs, everything on one RAM disk.

mod contender;
mod proxy;
mod roots;
mod source;

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result};

use crate::{
    number,
    table::{Bound, Table, ms, quantile},
    text,
};
use contender::{Contender, Run};
use source::{Image, Source};

/// The image whose times have bounds: large layers of gzip. Of the others, which are like images in use, the same is told.
const BOUND: &str = "big";
/// What a pull may hold of memory, in MB.
const MEMORY: f64 = 64.0;
/// What a registry says beside the layers: manifest, config, headers.
const BESIDE: u64 = 128 << 10;

/// What the environment of `scripts/bench` says.
pub(crate) struct Bench {
    /// The directory on the RAM disk for all that is measured.
    pub(crate) dir: PathBuf,
    /// Address of the registry.
    pub(crate) registry: String,
    /// The program.
    pub(crate) moxlet: PathBuf,
    rounds: usize,
    clones: usize,
}

/// Measures, prints, and says whether all bounds hold.
pub(crate) async fn measure() -> Result<bool> {
    let bench = Bench {
        dir: text("BENCH_DIR")?.into(),
        registry: text("BENCH_REGISTRY")?,
        moxlet: text("BENCH_MOXLET")?.into(),
        rounds: number("ROUNDS", 3)?.max(1),
        clones: number("CLONES", 500)?.max(20),
    };
    let source = Source::open(&PathBuf::from(text("BENCH_LAYOUT")?))?;
    let mut table = Table::default();
    for tag in ["big", "debian-gzip", "debian-zstd"] {
        pulls(&bench, &source.image(tag)?, &mut table)?;
    }
    present(&bench, &source, &mut table).await?;
    println!(
        "medians of {} rounds in turns; podman with its {} driver",
        bench.rounds,
        contender::PODMAN_DRIVER
    );
    table.print();
    Ok(table.holds())
}

/// All who can bring one image, in turns.
fn pulls(bench: &Bench, image: &Image, table: &mut Table) -> Result<()> {
    let all = [Contender::Moxlet, Contender::Pipe, Contender::Podman, Contender::SkopeoUmoci];
    let absent = all.map(|c| c.absent(image));
    let present: Vec<usize> = (0..all.len()).filter(|n| absent[*n].is_none()).collect();
    let mut runs: [Vec<Run>; 4] = Default::default();
    for round in 0..bench.rounds {
        for turn in 0..present.len() {
            let n = present[(turn + round) % present.len()];
            let run = all[n].pull(bench, image)?;
            let (name, time, peak) = (all[n].name(), run.time.as_secs_f64(), run.peak >> 20);
            eprintln!("{}: {name}: {time:.2} s, {peak} MB ({})", image.tag, load());
            runs[n].push(run);
        }
    }
    let median = |n: usize| quantile(&runs[n].iter().map(|r| r.time).collect::<Vec<Duration>>(), 0.5);
    let ours = ms(median(0));
    for (n, bound) in [(1, Bound::TimesPeer(0.65)), (2, Bound::Faster(3.3)), (3, Bound::Faster(5.0))] {
        let what = format!("{}: pull, beside {} (ms)", image.tag, all[n].name());
        match &absent[n] {
            Some(why) => table.without(&what, why),
            None if image.tag == BOUND => table.row(&what, ours, Some(ms(median(n))), &bound),
            None => table.row(&what, ours, Some(ms(median(n))), &Bound::None),
        }
    }
    let peak = runs[0].iter().map(|r| r.peak).max().unwrap_or_default();
    let theirs = runs[2].iter().map(|r| r.peak as f64 / 1e6).reduce(f64::max);
    let what = format!("{}: pull, peak memory beside podman (MB)", image.tag);
    table.row(&what, peak as f64 / 1e6, theirs, &Bound::Under(MEMORY));
    Ok(())
}

/// What comes after the first pull: another tag of the same layers, and containers.
async fn present(bench: &Bench, source: &Source, table: &mut Table) -> Result<()> {
    let (big, next) = (source.image("big")?, source.image("big-next")?);
    let store = bench.dir.join("present");
    fs::create_dir_all(&store).context("cannot make the store")?;
    contender::moxlet(bench, &store, &bench.registry, "big")?.run()?;

    let proxy = proxy::Proxy::start(&bench.registry)?;
    contender::moxlet(bench, &store, &proxy.address, "big-next")?.run()?;
    let new: u64 = next.layers.iter().filter(|l| !big.layers.contains(l)).map(|l| l.size).sum();
    table.row(
        "big-next after big, 11 of 12 layers shared: moved (MB)",
        proxy.moved() as f64 / 1e6,
        None,
        &Bound::Under((new + BESIDE) as f64 / 1e6),
    );

    let times =
        roots::clones(&store.join("storage"), &big.chains, &bench.dir.join("roots"), bench.clones).await?;
    let worst = times.iter().skip(1).take(10).max().copied().unwrap_or_default();
    table.row(
        "another container of a present image, the slowest of ten (ms)",
        ms(worst),
        None,
        &Bound::Under(100.0),
    );
    let (first, last) = (quantile(&times[..10], 0.5), quantile(&times[times.len() - 10..], 0.5));
    let what = format!("container {} beside container 1, medians of ten (ms)", times.len());
    table.row(&what, ms(last), Some(ms(first)), &Bound::TimesPeer(1.5));
    fs::remove_dir_all(&store).context("cannot remove the store")
}

/// What else the machine does.
fn load() -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    format!("load {}", load.split(' ').next().unwrap_or_default())
}
