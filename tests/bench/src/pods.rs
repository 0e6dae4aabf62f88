//! From the creation of a pod (nodeName set, image present) to Ready: one at a time, and a burst.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt, future};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, PostParams, WatchEvent, WatchParams},
};
use serde_json::json;

use crate::{
    Bench, memory,
    table::{Bound, Table, ms, quantile},
};

const LIMIT: Duration = Duration::from_secs(120);
/// The pods of the last measurement; they fit into the default `max_pods`.
const CROWD: usize = 100;

/// A pod that sleeps on a node.
pub(crate) fn pod(bench: &Bench, name: &str, node: &str, script: &str) -> Result<Pod> {
    Ok(serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"bench": "pod"}},
        "spec": {"nodeName": node, "terminationGracePeriodSeconds": 1, "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "main", "image": bench.image, "command": ["sh", "-c", script]}]}}))?)
}

pub(crate) const IDLE: &str = "trap 'exit 0' TERM; while true; do sleep 1000 & wait $!; done";

fn ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.is_some_and(|c| c.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

/// Creates these pods and waits until all are Ready; the time from the first request on.
pub(crate) async fn create(api: &Api<Pod>, pods: &[Pod]) -> Result<Duration> {
    let version =
        api.list(&ListParams::default().limit(1)).await?.metadata.resource_version.unwrap_or_default();
    let mut events = api.watch(&WatchParams::default().labels("bench=pod"), &version).await?.boxed();
    let mut missing: BTreeSet<String> = pods.iter().map(ResourceExt::name_any).collect();
    let start = Instant::now();
    let params = PostParams::default();
    let created = future::try_join_all(pods.iter().map(|pod| api.create(&params, pod)));
    let wait = async {
        while !missing.is_empty() {
            match events.try_next().await?.context("the watch ended")? {
                WatchEvent::Modified(pod) | WatchEvent::Added(pod) if ready(&pod) => {
                    missing.remove(&pod.name_any());
                }
                WatchEvent::Error(error) => bail!("the watch failed: {error:?}"),
                _ => {}
            }
        }
        Ok(start.elapsed())
    };
    let both = future::try_join(async { created.await.context("cannot create the pods") }, wait);
    let (_, time) = tokio::time::timeout(LIMIT, both).await.context("the pods were not Ready in time")??;
    Ok(time)
}

/// Deletes all and waits until they are gone.
pub(crate) async fn delete(api: &Api<Pod>) -> Result<Duration> {
    let start = Instant::now();
    let ours = ListParams::default().labels("bench=pod");
    api.delete_collection(&DeleteParams::default(), &ours).await?;
    while !api.list(&ours).await?.items.is_empty() {
        if start.elapsed() > LIMIT {
            bail!("the pods were not gone in time");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(start.elapsed())
}

pub(crate) async fn measure(bench: &Bench, client: &Client, table: &mut Table) -> Result<()> {
    let api: Api<Pod> = Api::default_namespaced(client.clone());
    // The image comes first, on both.
    for node in &bench.nodes {
        create(&api, &[pod(bench, &format!("warm-{node}"), node, IDLE)?])
            .await
            .with_context(|| format!("the first pod on {node}"))?;
    }
    memory::per_pod(table)?;
    delete(&api).await?;

    let mut singles = [Vec::new(), Vec::new()];
    for round in 0..bench.rounds {
        for (node, times) in bench.nodes.iter().zip(&mut singles) {
            times.push(create(&api, &[pod(bench, &format!("one-{round}-{node}"), node, IDLE)?]).await?);
            delete(&api).await?;
        }
    }
    let of = |part: f64| singles.each_ref().map(|times| ms(quantile(times, part)));
    let [ours, peer] = of(0.5);
    table.row("create to Ready, one at a time, median (ms)", ours, Some(peer), &Bound::TimesPeer(0.55));
    let [ours, peer] = of(0.99);
    table.row("create to Ready, one at a time, p99 (ms)", ours, Some(peer), &Bound::TimesPeer(2.0));

    let (mut up, mut down) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for round in 0..3 {
        for (i, node) in bench.nodes.iter().enumerate() {
            let pods = (0..bench.burst)
                .map(|n| pod(bench, &format!("burst-{round}-{n}-{node}"), node, IDLE))
                .collect::<Result<Vec<_>>>()?;
            up[i].push(create(&api, &pods).await?);
            down[i].push(delete(&api).await?);
        }
    }
    let median = |of: &[Vec<Duration>; 2]| of.each_ref().map(|times| ms(quantile(times, 0.5)));
    let [ours, peer] = median(&up);
    table.row(
        &format!("burst of {}, all Ready (ms)", bench.burst),
        ours,
        Some(peer),
        &Bound::TimesPeer(0.35),
    );
    let [ours, peer] = median(&down);
    table.row("deleted burst gone (ms)", ours, Some(peer), &Bound::TimesPeer(0.35));
    crowd(bench, &api, table).await
}

/// A hundred pods at once on Moxlet's node alone: when all are Ready, and how large it is with them.
async fn crowd(bench: &Bench, api: &Api<Pod>, table: &mut Table) -> Result<()> {
    let pods = (0..CROWD)
        .map(|n| pod(bench, &format!("crowd-{n}"), &bench.nodes[0], IDLE))
        .collect::<Result<Vec<_>>>()?;
    let time = create(api, &pods).await?;
    table.row(&format!("{CROWD} pods at once, all Ready (ms)"), ms(time), None, &Bound::Under(8000.0));
    // Starts are over; what they needed is given back.
    tokio::time::sleep(Duration::from_secs(30)).await;
    memory::with_pods(table, CROWD)?;
    delete(api).await?;
    Ok(())
}
