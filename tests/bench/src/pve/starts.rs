//! The same pod on the engines `lxc` and `pve`, real CTs on both, and with slow answers of the API on the latter: what Proxmox VE
//! costs a pod's start. Runs where a simulator has real CTs: `scripts/bench pve` does it in a guest, whose processor is emulated.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use moxlet_agent::EngineSettings;
use moxlet_tests_component::{
    host::{Host, sleeper},
    simulated::control_at,
    store::Bed,
};
use serde_json::json;

use super::calls::{CALLS, LATENCY};
use crate::{
    number, program,
    table::{Bound, Table, ms, quantile},
    text,
};

/// Measures, prints, and says whether the bound holds.
pub(crate) async fn measure() -> Result<bool> {
    let rounds = number("ROUNDS", 20)?.max(1);
    let admin: SocketAddr = text("BENCH_PVE_ADMIN")?.parse().context("BENCH_PVE_ADMIN is no address")?;
    let lxc = Host::start_on(Bed::chosen(), |config| config.engine = EngineSettings::Lxc).await;
    let pve = Host::start().await;
    let (mut plain, mut quick, mut slow) = (Vec::new(), Vec::new(), Vec::new());
    // The first of each makes what all others share.
    for host in [&lxc, &pve] {
        start(host, "first").await?;
    }
    for round in 0..rounds {
        let name = format!("p{round}");
        plain.push(start(&lxc, &name).await?);
        quick.push(start(&pve, &name).await?);
        let rule = json!({"do": "delay", "ms": u64::try_from(LATENCY.as_millis())?});
        control_at(admin, "POST", "/faults/calls", &rule).await;
        let started = start(&pve, &name).await;
        control_at(admin, "DELETE", "/faults", &json!({})).await;
        slow.push(started?);
    }
    for host in [lxc, pve] {
        host.end().await;
    }
    let answers: Vec<Duration> = slow.iter().zip(&quick).map(|(s, q)| s.saturating_sub(*q)).collect();
    let [plain, quick, slow, answers] = [plain, quick, slow, answers].map(|t| ms(quantile(&t, 0.5)));
    let mut table = Table::default();
    let slowness = slowness(&mut table)?;
    table.row("create to running, real CTs, beside engine lxc (ms)", quick, Some(plain), &Bound::None);
    table.row("… with 50 ms to each call, beside engine lxc (ms)", slow, Some(plain), &Bound::None);
    table.row("… more by these, medians of each round's two (ms)", answers, None, &Bound::None);
    let work = (quick - plain) / slowness;
    table.row("… more than engine lxc, at the speed of the machine itself (ms)", work, None, &Bound::None);
    let bound = Bound::Under(CALLS * ms(LATENCY));
    table.row("… and with 50 ms to each call (ms)", work + answers, None, &bound);
    println!("medians of {rounds}, in turns on one host");
    table.print();
    Ok(table.holds())
}

/// How many times slower this host is than the machine that emulates it, which says what a program's start takes there; 1 where
/// nobody says so. The time of an emulated processor is no measure of the host's work, and what is waited for is none of it.
fn slowness(table: &mut Table) -> Result<f64> {
    let Ok(there) = text("BENCH_PROGRAM_MS") else { return Ok(1.0) };
    let there: f64 = there.parse().context("BENCH_PROGRAM_MS is no number")?;
    let here = ms(program::start()?);
    table.row("a program's start, beside the machine itself (ms)", here, Some(there), &Bound::None);
    Ok((here / there).max(1.0))
}

/// How long a pod of one container takes from its creation until the container runs; then it is removed.
async fn start(host: &Host, name: &str) -> Result<Duration> {
    let begin = Instant::now();
    let pod = host.try_pod(host.pod_config(name)).await.context("a pod's sandbox")?;
    let id = host.create(&pod, sleeper("main")).await.context("making the container")?;
    host.start_container(&id).await.context("starting the container")?;
    let took = begin.elapsed();
    host.remove_pod(&pod.id).await.context("removing the pod")?;
    Ok(took)
}
