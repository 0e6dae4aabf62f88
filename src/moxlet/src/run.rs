//! Wiring: settings become an agent and a node, signals become one cancellation, and everything is joined.

use std::{fs::File, os::unix::fs::DirBuilderExt, path::Path, time::Duration};

use anyhow::{Context, Result, bail};
use moxlet_cri::link::Endpoint;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::{
    args::LogFormat,
    config::{Config, Role},
    log_filter, memory, preflight,
};

/// How long pods get to end with `--stop-pods`.
const STOP_PODS_GRACE: Duration = Duration::from_secs(30);

/// Range of the pods of a machine without a cluster.
const ALONE_CIDR: &str = "10.244.0.0/24";

/// Runs agent, node or both until a signal ends them.
///
/// # Errors
/// Whatever kept it from starting, or ended it, in words for the person at the terminal.
pub(crate) fn main(config: Config, role: Role) -> Result<()> {
    init_logs(&config)?;
    if role != Role::Node {
        preflight::check(&config)?;
    }
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        bail!("another TLS provider was installed before ring");
    }
    let _locks = lock(&config.root_dir, role)?;
    if role != Role::Agent {
        preflight::can_listen(config.listen)?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8)))
        .max_blocking_threads(64)
        .thread_keep_alive(Duration::from_secs(5))
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let outcome = runtime.block_on(serve(config, role));
    // A thread that hangs in the kernel must not keep the program.
    runtime.shutdown_timeout(Duration::from_secs(2));
    outcome
}

/// Sends the log where and how the configuration says.
///
/// # Errors
/// It is not a filter.
pub(crate) fn init_logs(config: &Config) -> Result<()> {
    let filter = log_filter::parse("log", &config.log)?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => builder.with_ansi(false).init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

/// Makes `root_dir` and takes its locks: two agents, or two nodes, on one directory would undo each other's work.
///
/// # Errors
/// It cannot be made, or another program has a lock.
pub(crate) fn lock(root: &Path, role: Role) -> Result<Vec<File>> {
    let names: &[&str] = match role {
        Role::Up => &["moxlet.lock", "moxlet-node.lock"],
        Role::Agent => &["moxlet.lock"],
        Role::Node => &["moxlet-node.lock"],
    };
    let run = root.join("run");
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(&run)
        .with_context(|| format!("cannot make {}", run.display()))?;
    names.iter().map(|name| take_lock(root, &run.join(name))).collect()
}

fn take_lock(root: &Path, path: &Path) -> Result<File> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => bail!(
            "another moxlet runs on {} (it holds {}); stop it, or give this one a --root-dir of its own",
            root.display(),
            path.display()
        ),
        Err(std::fs::TryLockError::Error(e)) => {
            Err(e).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

async fn serve(config: Config, role: Role) -> Result<()> {
    let stop = CancellationToken::new();
    let signals = tokio::spawn(watch_signals(stop.clone()));
    let ended = CancellationToken::new();
    let small = tokio::spawn(memory::keep_small(ended.clone()));
    let outcome = match role {
        Role::Node => node(&config, config.agent_endpoint(), &stop).await,
        Role::Agent | Role::Up => agent(&config, role, &stop).await,
    };
    ended.cancel();
    let _ = small.await;
    signals.abort();
    info!("stopped");
    outcome
}

/// Runs the agent, and with `up` the node, until they are stopped.
async fn agent(config: &Config, role: Role, stop: &CancellationToken) -> Result<()> {
    // The agent outlives the node: a node that stops still talks to it.
    let agent_stop = CancellationToken::new();
    let agent = moxlet_agent::Agent::start(agent_config(config, role)?, agent_stop.clone())
        .await
        .context("the agent could not start")?;
    info!(socket = %config.cri_socket().display(), "agent ready");
    let outcome = if role == Role::Up {
        node(config, Endpoint::Unix(config.cri_socket()), stop).await
    } else {
        stop.cancelled().await;
        Ok(())
    };
    if config.stop_pods && outcome.is_ok() {
        info!("stopping all pods");
        agent.stop_pods(STOP_PODS_GRACE).await;
    }
    agent_stop.cancel();
    agent.join().await;
    outcome
}

/// Runs the node until it is stopped.
async fn node(config: &Config, endpoint: Endpoint, stop: &CancellationToken) -> Result<()> {
    moxlet_node::run(node_config(config, endpoint)?, stop.clone()).await.context("the node stopped")
}

/// Turns SIGTERM and SIGINT into the one cancellation; a second one ends the process at once.
async fn watch_signals(stop: CancellationToken) {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        error!("cannot listen for signals");
        return;
    };
    let mut seen = false;
    loop {
        let name = tokio::select! {
            _ = term.recv() => "SIGTERM",
            _ = int.recv() => "SIGINT",
        };
        if seen {
            info!(signal = name, "second signal, ending at once; pods are left as they are");
            std::process::exit(130);
        }
        seen = true;
        info!(signal = name, "stopping");
        stop.cancel();
    }
}

/// Whether there is no cluster.
fn alone(config: &Config) -> bool {
    config.kubeconfig.is_none() && config.bootstrap_kubeconfig.is_none()
}

/// What the agent takes of the configuration.
///
/// # Errors
/// Keys of `[pve]` contradict one another.
pub(crate) fn agent_config(config: &Config, role: Role) -> Result<moxlet_agent::Config> {
    let engine = match config.engine {
        crate::config::Engine::Lxc => moxlet_agent::EngineSettings::Lxc,
        crate::config::Engine::Pve => {
            moxlet_agent::EngineSettings::Pve(Box::new(config.pve.clone().unwrap_or_default().settings()?))
        }
    };
    let storage = match (config.storage, &config.zfs_dataset) {
        (crate::config::Storage::Zfs, Some(dataset)) => moxlet_agent::Storage::Zfs(dataset.clone()),
        // Checked when the configuration was read.
        _ => moxlet_agent::Storage::Overlay,
    };
    let link = match (config.agent_listen, config.link_files()?) {
        (Some(listen), Some(files)) => Some(moxlet_agent::LinkSettings { listen, files }),
        _ => None,
    };
    let defaults = moxlet_agent::Config::default();
    Ok(moxlet_agent::Config {
        root_dir: config.root_dir.clone(),
        cri_socket: config.cri_socket(),
        stream_listen: config.stream_listen.or(defaults.stream_listen),
        link,
        init_binary: config.init_binary.clone(),
        engine,
        storage,
        container_root_quota: config.container_root_quota.map(|b| b.0),
        // Nobody allots a range to a machine without a cluster.
        pod_cidr: config
            .pod_cidr
            .clone()
            .or_else(|| (role == Role::Up && alone(config)).then(|| ALONE_CIDR.to_owned())),
        cni: moxlet_agent::CniSettings {
            use_host_conf: config.cni_conf_dir.clone(),
            bin_dirs: config.cni_bin_dirs.clone(),
            bridge: config.bridge.clone(),
        },
        resolv_conf: config.resolv_conf.clone(),
        plain_http_registries: config.plain_http_registries.clone(),
        registry_config_dir: config.registry_config_dir.clone(),
        docker_config: config.docker_config.clone(),
        image_prefetch_max_bytes: config.image_prefetch_max_bytes.0,
        log_max_bytes: config.container_log_max_bytes.0,
        log_max_files: config.container_log_max_files,
        sandbox_overhead_memory_bytes: config.sandbox_overhead_memory_bytes.0,
        system_reserved_memory_bytes: config.system_reserved_memory_bytes.map(|b| b.0),
        ..defaults
    })
}

fn node_config(config: &Config, endpoint: Endpoint) -> Result<moxlet_node::Config> {
    let defaults = moxlet_node::Config::default();
    Ok(moxlet_node::Config {
        node_name: config.node_name.clone().unwrap_or(defaults.node_name),
        agent_endpoint: endpoint,
        link_files: config.link_files()?,
        kubeconfig: config.kubeconfig.clone(),
        bootstrap_kubeconfig: config.bootstrap_kubeconfig.clone(),
        allow_any_identity: config.allow_any_identity,
        client_ca_file: config.client_ca_file.clone(),
        state_dir: config.root_dir.join("node"),
        listen: config.listen,
        node_ip: config.node_ip,
        static_pod_dir: config.static_pod_dir.clone(),
        register_taints: config.register_taints.clone(),
        labels: config.node_labels.clone(),
        max_pods: config.max_pods,
        pod_pids_limit: config.pod_pids_limit,
        image_gc: moxlet_node::ImageGc {
            high_percent: config.image_gc_high_threshold_percent,
            low_percent: config.image_gc_low_threshold_percent,
            min_age: config.image_minimum_gc_age.0,
            max_age: config.image_maximum_gc_age.map(|age| age.0),
        },
        pressure: config.pressure_thresholds.clone(),
        cluster_dns: config.cluster_dns.clone(),
        cluster_domain: config.cluster_domain.clone(),
        ..defaults
    })
}
