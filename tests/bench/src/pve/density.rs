//! How starts and mounts grow dear with the number of pods: real CTs of the engine `lxc`, three containers each.
//!
//! What is mounted below the directory of the pods is shared with each CT's monitor, so that it can be moved into its CT: every
//! monitor's mount namespace holds a copy of every pod's mounts, and each mount is made in all of them.

use std::{
    fmt::Write as _,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use moxlet_tests_component::host::{Host, Pod, sleeper};
use tokio::task::spawn_blocking;

use crate::table::{Bound, Table, ms, quantile};

/// Containers of a pod.
const CONTAINERS: [&str; 3] = ["one", "two", "three"];
/// Mounts and unmounts that are timed at each point.
const TRIES: usize = 20;
/// Pods that are timed at each point.
const STEP: usize = 20;
/// A start may take so many times longer among all pods than among the first.
const GROWTH: f64 = 3.0;

/// What was measured with so many pods there.
struct Point {
    pods: usize,
    start: Duration,
    mount: Duration,
    umount: Duration,
    host_mounts: usize,
    monitor_mounts: usize,
}

/// Makes so many pods; the lines of the table that are for people.
pub(super) async fn measure(table: &mut Table, pods: usize) -> Result<String> {
    let host = Host::start().await;
    let mut points = Vec::new();
    let mut made = Vec::new();
    while made.len() < pods {
        let step = STEP.min(pods - made.len());
        let mut starts = Vec::new();
        for _ in 0..step {
            let begin = Instant::now();
            made.push(pod(&host, made.len()).await?);
            starts.push(begin.elapsed());
        }
        let (mount, umount) = mounting(host.root()).await?;
        points.push(Point {
            pods: made.len(),
            start: quantile(&starts, 0.5),
            mount,
            umount,
            host_mounts: mounts(Path::new("/proc/self/mountinfo"), host.root())?,
            monitor_mounts: monitor_mounts(host.root())?,
        });
        if let Some(p) = points.last() {
            eprintln!("{}", line(p));
        }
    }
    let begin = Instant::now();
    for pod in &made {
        host.remove_pod(&pod.id).await.with_context(|| format!("removing {}", pod.id))?;
    }
    let removal = begin.elapsed() / u32::try_from(pods)?;
    host.end().await;
    if let (Some(first), Some(last)) = (points.first(), points.last()) {
        let name = |what: &str, p: &Point| format!("{what} among {} pods of 3 containers (ms)", p.pods);
        table.row(&name("start", first), ms(first.start), None, &Bound::None);
        table.row(&name("start", last), ms(last.start), None, &Bound::None);
        let growth = last.start.as_secs_f64() / first.start.as_secs_f64();
        table.row("… times the first", growth, None, &Bound::Under(GROWTH));
        table.row("removal of each, mean (ms)", ms(removal), None, &Bound::None);
    }
    let mut text = String::new();
    for point in &points {
        let _ = writeln!(text, "{}", line(point));
    }
    Ok(text)
}

fn line(p: &Point) -> String {
    format!(
        "{:>4} pods: start {:>7.1} ms, a mount {:>6.2} ms, an unmount {:>6.2} ms; mounts of the pods {} on the host, {} in a monitor",
        p.pods,
        ms(p.start),
        ms(p.mount),
        ms(p.umount),
        p.host_mounts,
        p.monitor_mounts
    )
}

async fn pod(host: &Host, number: usize) -> Result<Pod> {
    let pod = host.try_pod(host.pod_config(&format!("p{number}"))).await.context("a pod's sandbox")?;
    for name in CONTAINERS {
        let id = host.create(&pod, sleeper(name)).await.with_context(|| format!("making {name}"))?;
        host.start_container(&id).await.with_context(|| format!("starting {name}"))?;
    }
    Ok(pod)
}

/// The medians of mounting something below the shared directory and of taking it away.
async fn mounting(root: &Path) -> Result<(Duration, Duration)> {
    let at = root.join("pods/bench");
    spawn_blocking(move || {
        use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
        fs::create_dir_all(&at)?;
        let (mut made, mut gone) = (Vec::new(), Vec::new());
        for _ in 0..TRIES {
            let begin = Instant::now();
            mount("bench", &at, "tmpfs", MountFlags::empty(), None)?;
            made.push(begin.elapsed());
            let begin = Instant::now();
            unmount(&at, UnmountFlags::empty())?;
            gone.push(begin.elapsed());
        }
        fs::remove_dir(&at)?;
        Ok((quantile(&made, 0.5), quantile(&gone, 0.5)))
    })
    .await?
}

/// The mounts of a namespace that are below this directory.
fn mounts(info: &Path, root: &Path) -> Result<usize> {
    let text = fs::read_to_string(info).with_context(|| format!("reading {}", info.display()))?;
    let root = root.to_string_lossy();
    Ok(text.lines().filter(|l| l.split(' ').nth(4).is_some_and(|at| at.starts_with(&*root))).count())
}

/// The mounts of pods in the mount namespace of a CT's monitor, the fullest of all.
fn monitor_mounts(root: &Path) -> Result<usize> {
    let wanted = format!("[lxc monitor] {}", root.display());
    let mut most = 0;
    for process in fs::read_dir("/proc")?.flatten().map(|e| e.path()) {
        let Ok(line) = fs::read(process.join("cmdline")) else { continue };
        if String::from_utf8_lossy(&line).starts_with(&wanted) {
            most = most.max(mounts(&process.join("mountinfo"), root).unwrap_or(0));
        }
    }
    Ok(most)
}
