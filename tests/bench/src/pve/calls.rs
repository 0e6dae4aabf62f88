//! Calls of Proxmox VE: for each pod, on an idle host, with slow answers, and for many pods at once.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use moxlet_pve_sim::Simulator;
use moxlet_sandbox::{Engine, SandboxSpec, pve::PveEngine};
use moxlet_tests_component::simulated::{Calls, FIRST, Place, control, spec};
use serde_json::{Value, json};

use crate::table::{Bound, Table, ms, quantile};

/// What a pod's start may ask for.
pub(super) const CALLS: f64 = 6.0;
/// What each answer takes longer, and what a start may take longer by it.
pub(super) const LATENCY: Duration = Duration::from_millis(50);
/// How long an idle host is watched, and how often its agent looks.
const IDLE: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_secs(2);
/// What a task takes at least, as real ones do.
const TASK_MS: u64 = 200;

struct Bed {
    sim: Simulator,
    engine: PveEngine,
    _dir: tempfile::TempDir,
}

impl Bed {
    async fn new() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("moxlet-bench-pve-").tempdir()?;
        let place = Place::new(dir.path());
        let sim = place.simulate(TASK_MS).await;
        let url = sim.hosts().first().context("no host")?.url.clone();
        let engine = place.engine(&url, FIRST + 999, &Calls::default());
        Ok(Self { sim, engine, _dir: dir })
    }

    async fn counted(&self) -> Value {
        control(&self.sim, "GET", "/counts", &json!({})).await
    }

    /// What was asked while this was done.
    async fn calls<T>(&self, work: impl Future<Output = T>) -> (T, f64) {
        control(&self.sim, "DELETE", "/counts", &json!({})).await;
        let done = work.await;
        (done, self.counted().await["calls"].as_f64().unwrap_or(f64::NAN))
    }

    async fn start(&self, pod: &SandboxSpec) -> Result<()> {
        self.engine.create(pod).await?;
        self.engine.start(&pod.id).await?;
        Ok(())
    }
}

pub(super) async fn measure(table: &mut Table, rounds: usize, burst: usize) -> Result<()> {
    one_by_one(table, rounds).await?;
    idle(table).await?;
    at_once(table, burst).await
}

/// Pods one after the other, at first with quick answers and then with slow ones.
async fn one_by_one(table: &mut Table, rounds: usize) -> Result<()> {
    let bed = Bed::new().await?;
    let mut times = [Vec::new(), Vec::new()];
    let (mut starts, mut ends) = (0.0, 0.0);
    for (slow, times) in times.iter_mut().enumerate() {
        if slow == 1 {
            let rule = json!({"do": "delay", "ms": u64::try_from(LATENCY.as_millis())?});
            control(&bed.sim, "POST", "/faults/calls", &rule).await;
        }
        for round in 0..rounds {
            let (pod, begin) = (spec(&format!("p{slow}-{round}")), Instant::now());
            let (started, calls) = bed.calls(bed.start(&pod)).await;
            started?;
            times.push(begin.elapsed());
            starts = f64::max(starts, calls);
            let (ended, calls) = bed.calls(bed.engine.delete(&pod.id)).await;
            ended?;
            ends = f64::max(ends, calls);
        }
    }
    table.row("calls for a pod's start, the most", starts, None, &Bound::Under(CALLS + 1.0));
    table.row("calls for a pod's end, the most", ends, None, &Bound::None);
    let [quick, slow] = times.map(|times| quantile(&times, 0.5));
    table.row("create to running, median (ms)", ms(quick), None, &Bound::None);
    let more = ms(slow.saturating_sub(quick));
    table.row("… more with 50 ms to each call (ms)", more, None, &Bound::Under(CALLS * ms(LATENCY)));
    bed.sim.stop().await;
    Ok(())
}

/// A host with pods and nothing to do.
async fn idle(table: &mut Table) -> Result<()> {
    let bed = Bed::new().await?;
    for n in 0..10 {
        bed.start(&spec(&format!("p{n}"))).await?;
    }
    let looking = async {
        let begin = Instant::now();
        while begin.elapsed() < IDLE {
            bed.engine.look().await?;
            tokio::time::sleep(LOOK).await;
        }
        anyhow::Ok(())
    };
    let (looked, calls) = bed.calls(looking).await;
    looked?;
    let per_ten = calls * 10.0 / IDLE.as_secs_f64();
    table.row("calls of an idle host with ten pods, in 10 s", per_ten, None, &Bound::Under(1.1));
    bed.sim.stop().await;
    Ok(())
}

/// Many pods at once, against the simulator's four workers.
async fn at_once(table: &mut Table, burst: usize) -> Result<()> {
    let bed = Bed::new().await?;
    let pods: Vec<_> = (0..burst).map(|n| spec(&format!("p{n}"))).collect();
    let begin = Instant::now();
    let all = futures::future::join_all(pods.iter().map(|pod| bed.start(pod)));
    let (done, calls) = bed.calls(all).await;
    let (running, took) = (done.iter().filter(|d| d.is_ok()).count(), begin.elapsed());
    for refused in done.iter().filter_map(|d| d.as_ref().err()) {
        ensure!(!refused.to_string().is_empty(), "a pod was refused without a reason");
        eprintln!("refused: {refused:#}");
    }
    let counts = bed.counted().await;
    let want = counts["refused_for_want_of_a_worker"].as_f64().unwrap_or(f64::NAN);
    let each = calls / burst as f64;
    table.row(&format!("{burst} pods at once: running"), running as f64, None, &Bound::None);
    table.row("… calls refused for want of a worker", want, None, &Bound::Under(1.0));
    table.row("… the most calls that the host worked on at once", most(&counts), None, &Bound::Under(3.0));
    table.row("… calls for each", each, None, &Bound::Under(CALLS + 0.1));
    table.row("… until the last one runs (s)", took.as_secs_f64(), None, &Bound::None);
    bed.sim.stop().await;
    Ok(())
}

fn most(counts: &Value) -> f64 {
    counts["most_at_once"].as_f64().unwrap_or(f64::NAN)
}
