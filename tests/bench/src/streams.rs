//! kubectl as people use it: exec, logs and cp of 100 MB, the whole program timed.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};

use crate::{
    Bench,
    pods::{IDLE, create, delete, pod},
    table::{Bound, Table, ms, quantile},
};

fn timed(bench: &Bench, args: &[&str], bytes: Option<usize>) -> Result<Duration> {
    let start = Instant::now();
    let output =
        Command::new(&bench.kubectl).args(args).stdin(Stdio::null()).stderr(Stdio::piped()).output()?;
    let time = start.elapsed();
    if !output.status.success() {
        bail!("kubectl {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    if let Some(bytes) = bytes.filter(|b| *b != output.stdout.len()) {
        bail!("kubectl {args:?} gave {} bytes, not {bytes}", output.stdout.len());
    }
    Ok(time)
}

/// Takes `rounds` turns of `call` on both pods; the medians.
fn alternate(rounds: usize, call: impl Fn(usize) -> Result<Duration>) -> Result<[f64; 2]> {
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        for (i, times) in times.iter_mut().enumerate() {
            times.push(call(i)?);
        }
    }
    Ok(times.each_ref().map(|t| ms(quantile(t, 0.5))))
}

pub(crate) async fn measure(bench: &Bench, client: &Client, table: &mut Table) -> Result<()> {
    let api: Api<Pod> = Api::default_namespaced(client.clone());
    let bytes = bench.megabytes * 1_000_000;
    // A hundred bytes a line, written before the pod goes idle.
    let script = format!("yes {} | head -n {} ; touch /root/written; {IDLE}", "x".repeat(99), bytes / 100);
    let names = ["talk-moxlet", "talk-peer"];
    for (name, node) in names.iter().zip(&bench.nodes) {
        create(&api, &[pod(bench, name, node, &script)?]).await?;
        let start = Instant::now();
        while timed(bench, &["exec", name, "--", "test", "-e", "/root/written"], None).is_err() {
            if start.elapsed() > Duration::from_secs(120) {
                bail!("{name} did not write its log in time");
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    let [ours, peer] = alternate(20, |i| timed(bench, &["exec", names[i], "--", "true"], None))?;
    // What kubectl and the API server need for any call at all.
    let [floor, _] = alternate(20, |_| timed(bench, &["get", "--raw", "/version"], None))?;
    table.row("kubectl get --raw /version, median (ms)", floor, None, &Bound::None);
    table.row("kubectl exec true, median (ms)", ours, Some(peer), &Bound::TimesPeer(1.0));
    table.row("kubectl exec true over /version (ms)", ours - floor, Some(peer - floor), &Bound::Under(30.0));
    let size = format!("{} MB", bench.megabytes);
    let [ours, peer] = alternate(3, |i| timed(bench, &["logs", names[i]], Some(bytes)))?;
    table.row(&format!("kubectl logs, {size} (ms)"), ours, Some(peer), &Bound::TimesPeer(0.5));
    let count = bytes.to_string();
    let [ours, peer] = alternate(3, |i| {
        timed(bench, &["exec", names[i], "--", "head", "-c", &count, "/dev/zero"], Some(bytes))
    })?;
    table.row(&format!("kubectl exec, {size} (ms)"), ours, Some(peer), &Bound::TimesPeer(1.0));

    let dir = std::env::temp_dir().join(format!("moxlet-bench-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let (there, back) = (dir.join("there"), dir.join("back"));
    std::fs::write(&there, vec![7_u8; bytes])?;
    let (there, back) = (there.to_string_lossy().into_owned(), back.to_string_lossy().into_owned());
    let copied = (|| {
        let into =
            alternate(3, |i| timed(bench, &["cp", &there, &format!("{}:/root/data", names[i])], None))?;
        let out = alternate(3, |i| timed(bench, &["cp", &format!("{}:/root/data", names[i]), &back], None))?;
        anyhow::Ok([into, out])
    })();
    drop(std::fs::remove_dir_all(&dir));
    let [[ours_in, peer_in], [ours_out, peer_out]] = copied?;
    table.row(&format!("kubectl cp in, {size} (ms)"), ours_in, Some(peer_in), &Bound::TimesPeer(1.0));
    table.row(&format!("kubectl cp out, {size} (ms)"), ours_out, Some(peer_out), &Bound::TimesPeer(1.0));
    delete(&api).await?;
    Ok(())
}
