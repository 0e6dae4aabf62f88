//! The same pod on the engines `lxc` and `pve`, real CTs on both, and with slow answers of the API on the latter: what Proxmox VE
//! costs a pod's start. Runs where a simulator has real CTs: `scripts/bench pve` does it in a guest.

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
    number,
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
    let [plain, quick, slow] = [plain, quick, slow].map(|times| ms(quantile(&times, 0.5)));
    let mut table = Table::default();
    table.row("create to running, real CTs, beside engine lxc (ms)", quick, Some(plain), &Bound::None);
    table.row("… with 50 ms to each call, beside engine lxc (ms)", slow, Some(plain), &Bound::None);
    table.row("… more than engine lxc (ms)", slow - plain, None, &Bound::Under(CALLS * ms(LATENCY)));
    println!("medians of {rounds}, in turns on one host");
    table.print();
    Ok(table.holds())
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
