//! The tables of `scripts/bench`, each with the peers measured in the same run, rounds taken in turns: what was measured beside
//! the bound that is wanted.
//!
//! `pod` is Moxlet and a kubelet with containerd, two nodes of one cluster. `image` is Moxlet and others that pull images,
//! `clones` is containers on ZFS beside bare clones, `pve` is the engine on Proxmox VE against the simulator, `pve-starts` the
//! same with real CTs in a guest: all fail where a bound does not hold. `program` prints what a program's start takes
//! here, in milliseconds: what `pve-starts` knows a guest's slowness by.

mod clones;
mod image;
mod memory;
mod pods;
mod program;
mod pve;
mod streams;
mod table;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::table::Table;

/// What the environment of `scripts/bench pod` says.
pub(crate) struct Bench {
    /// Moxlet's node, then the peer's.
    pub(crate) nodes: [String; 2],
    pub(crate) kubectl: String,
    pub(crate) image: String,
    pub(crate) rounds: usize,
    pub(crate) burst: usize,
    pub(crate) megabytes: usize,
}

fn number(name: &str, default: usize) -> Result<usize> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name} is no number: {text}")),
        Err(_) => Ok(default),
    }
}

fn text(name: &str) -> Result<String> {
    std::env::var(name).with_context(|| format!("{name} is not set: run scripts/bench"))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode> {
    match std::env::args().nth(1).as_deref() {
        Some("pod") => Ok(if pod().await? { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
        Some("image") => Ok(if image::measure().await? { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
        Some("clones") => Ok(if clones::measure().await? { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
        Some("pve") => Ok(if pve::measure().await? { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
        Some("pve-starts") => {
            Ok(if pve::starts::measure().await? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Some("program") => {
            println!("{}", table::ms(program::start()?));
            Ok(ExitCode::SUCCESS)
        }
        Some(program::NOTHING) => Ok(ExitCode::SUCCESS),
        _ => bail!("usage: moxlet-bench pod|image|clones|pve|pve-starts|program; run scripts/bench"),
    }
}

async fn pod() -> Result<bool> {
    let bench = Bench {
        nodes: [text("MOXLET_NODE")?, "peer".to_owned()],
        kubectl: text("MOXLET_KUBECTL")?,
        image: format!("{}/demo/busybox:1", text("MOXLET_REGISTRY")?),
        rounds: number("ROUNDS", 50)?.max(1),
        burst: number("BURST", 40)?.max(1),
        megabytes: number("MEGABYTES", 100)?.max(1),
    };
    let mut table = Table::default();
    memory::idle(&mut table, "resident, idle, no pod yet (MB)")?;
    let client = kube::Client::try_default().await.context("cannot reach the cluster")?;
    pods::measure(&bench, &client, &mut table).await?;
    streams::measure(&bench, &client, &mut table).await?;
    // Both give back what they needed when they have nothing to do.
    tokio::time::sleep(std::time::Duration::from_secs(30)).await;
    memory::idle(&mut table, "resident, idle, half a minute after the run (MB)")?;
    table.print();
    Ok(table.holds())
}
