//! `pve-sim`: starts the simulator from a configuration file and flags, and says where it is.

use std::{io::Write, net::SocketAddr, path::PathBuf};

use anyhow::Context as _;
use clap::Parser;
use moxlet_pve_sim::{Config, Simulator, config::Host};
use tokio::signal::unix::{SignalKind, signal};

/// A Proxmox VE API server for development and tests.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Configuration file (TOML); what it leaves out has defaults.
    #[arg(long)]
    config: Option<PathBuf>,
    /// State directory; overrides the configuration.
    #[arg(long)]
    state: Option<PathBuf>,
    /// Address of the first host's server; the others without an address of their own get the ports after it (or port 0, if
    /// this is 0).
    #[arg(long)]
    listen: Option<SocketAddr>,
    /// How many hosts there are (pve1, pve2, …), if the configuration names none.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    hosts: u8,
    /// Address of the admin port, on loopback.
    #[arg(long)]
    admin: Option<SocketAddr>,
    /// Writes the first token here, one line `user@realm!id=secret`.
    #[arg(long)]
    token_file: Option<PathBuf>,
    /// A file of faults to begin with (JSON).
    #[arg(long)]
    faults: Option<PathBuf>,
    /// Writes one line of JSON about the running simulator here, once it can be called.
    #[arg(long)]
    ready_file: Option<PathBuf>,
}

/// What liblxc calls before it starts a CT, `pve-sim ct-hook DIR ID lxc pre-start`, and what a backup does in a process of its
/// own, `pve-sim ct-tar FILE`.
fn helper() -> Option<anyhow::Result<()>> {
    let mut args = std::env::args_os().skip(1);
    let run = match args.next()?.to_str()? {
        "ct-hook" => moxlet_pve_sim::run_ct_hook,
        "ct-tar" => moxlet_pve_sim::run_ct_tar,
        _ => return None,
    };
    Some(args.next().context("no path").and_then(|path| Ok(run(path.as_ref())?)))
}

fn main() -> anyhow::Result<()> {
    if let Some(done) = helper() {
        return done;
    }
    let filter = tracing_subscriber::EnvFilter::try_from_env("PVE_SIM_LOG").unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let args = Args::parse();
    let config = config(&args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no runtime")?;
    runtime.block_on(run(&args, config))
}

fn config(args: &Args) -> anyhow::Result<Config> {
    let mut config = match &args.config {
        Some(path) => Config::load(path)?,
        None => {
            let names = (1..=args.hosts).map(|n| format!("pve{n}"));
            Config {
                hosts: names.map(|name| Host { name, ..Host::default() }).collect(),
                ..Config::default()
            }
        }
    };
    if let Some(state) = &args.state {
        config.state_dir.clone_from(state);
    }
    config.admin = args.admin.or(config.admin);
    if let (Some(file), Some(token)) = (&args.token_file, config.tokens.first_mut()) {
        token.file = Some(file.clone());
    }
    if let Some(first) = args.listen {
        let mut port = first.port();
        for host in config.hosts.iter_mut().filter(|h| h.listen.is_none() && h.remote.is_none()) {
            host.listen = Some(SocketAddr::new(first.ip(), port));
            if port != 0 {
                port = port.checked_add(1).context("no port is left for the last host")?;
            }
        }
    }
    anyhow::ensure!(config.hosts.iter().any(|h| h.listen.is_some()), "no host has an address: give --listen");
    config.check()?;
    Ok(config)
}

async fn run(args: &Args, config: Config) -> anyhow::Result<()> {
    std::fs::create_dir_all(&config.state_dir)
        .with_context(|| format!("cannot create {}", config.state_dir.display()))?;
    let mut terminate = signal(SignalKind::terminate()).context("no signal handler")?;
    let simulator = Simulator::start(config).await?;
    if let Some(faults) = &args.faults {
        simulator.load_faults(faults)?;
    }
    let mut out = std::io::stdout().lock();
    for host in simulator.hosts() {
        writeln!(out, "{} {} fingerprint {}", host.name, host.url, host.fingerprint)?;
    }
    writeln!(out, "CA {}", simulator.ca_file().display())?;
    if let Some(admin) = simulator.admin() {
        writeln!(out, "admin http://{admin}")?;
    }
    out.flush()?;
    drop(out);
    if let Some(path) = &args.ready_file {
        ready(path, &simulator)?;
    }
    tokio::select! {
        _ = terminate.recv() => {}
        interrupted = tokio::signal::ctrl_c() => interrupted.context("no signal handler")?,
    }
    simulator.stop().await;
    Ok(())
}

fn ready(path: &PathBuf, simulator: &Simulator) -> anyhow::Result<()> {
    let hosts: Vec<_> = simulator
        .hosts()
        .iter()
        .map(|h| serde_json::json!({ "name": h.name, "url": h.url, "fingerprint": h.fingerprint }))
        .collect();
    let line = serde_json::json!({
        "hosts": hosts, "ca": simulator.ca_file(), "etc_pve": simulator.etc_pve(),
        "admin": simulator.admin().map(|a| format!("http://{a}")),
    });
    let temporary = path.with_extension("tmp");
    std::fs::write(&temporary, format!("{line}\n"))
        .with_context(|| format!("cannot write {}", temporary.display()))?;
    std::fs::rename(&temporary, path).with_context(|| format!("cannot write {}", path.display()))
}
