//! A Proxmox VE API server for development and tests: a cluster of hosts over real LXC or none.
//!
//! ```text
//!  client ──HTTPS──▶ http (one server a host) ──▶ access (who may) ──▶ schema (what is well formed) ──▶ workers
//!                                                                                                       │
//!                        admin port ──▶ faults, counts ◀── every call and task                           ▼
//!                                                           api (the methods) ──▶ tasks, pmxcfs, guest, backend
//! ```
//!
//! Everything that must survive is a file below the state directory: the folder `etc/pve` as pmxcfs shows it, logs of
//! tasks, certificates. It is read anew at each call, so that other programs may change it and a kill at any point leaves
//! what a restart understands.
//!
//! `docs/pve-sim.md` says what is simulated, what is not, and how to use the admin port.
//!
//! ```no_run
//! # async fn example() -> Result<(), moxlet_pve_sim::Error> {
//! let mut config = moxlet_pve_sim::Config { state_dir: "/tmp/pve-sim".into(), ..Default::default() };
//! config.hosts[0].listen = Some(([127, 0, 0, 1], 0).into());
//! let running = moxlet_pve_sim::Simulator::start(config).await?;
//! println!("{} {}", running.hosts()[0].url, running.hosts()[0].fingerprint);
//! running.stop().await;
//! # Ok(())
//! # }
//! ```

mod access;
mod admin;
mod answer;
mod api;
mod backend;
pub mod config;
mod drafts;
mod error;
mod faults;
mod guest;
mod http;
mod mounted;
mod pmxcfs;
mod schema;
mod section;
mod seed;
mod sim;
mod tasks;
mod tls;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

pub use backend::lxc::{archive::run as run_ct_tar, hook::run as run_ct_hook};
pub use config::Config;
pub use error::{Error, Result};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// A running simulator; dropping it leaves its tasks running until the runtime ends, [`Simulator::stop`] ends them.
#[derive(Debug)]
pub struct Simulator {
    sim: Arc<sim::Sim>,
    hosts: Vec<HostServer>,
    admin: Option<SocketAddr>,
    stop: CancellationToken,
    tracker: TaskTracker,
}

/// One host's server.
#[derive(Debug, Clone)]
pub struct HostServer {
    /// The host's name.
    pub name: String,
    /// Where its API is, without `/api2/json`.
    pub url: String,
    /// SHA-256 of its certificate at the start.
    pub fingerprint: String,
}

impl Simulator {
    /// Opens the state directory, listens, and serves until stopped.
    ///
    /// # Errors
    /// The configuration does not fit together, the state cannot be used, or an address cannot be listened on.
    pub async fn start(config: Config) -> Result<Self> {
        let sim = sim::Sim::open(config).await?;
        let (stop, tracker) = (CancellationToken::new(), TaskTracker::new());
        let mut hosts = Vec::new();
        for host in &sim.config.hosts {
            let Some(address) = host.listen else { continue };
            let tls_dir = sim.config.state_dir.join("tls");
            let tls = Arc::new(tls::HostTls::open(&tls_dir, &host.name, &names(host, address))?);
            let (listener, address) = http::Server::bind(address).await?;
            hosts.push(HostServer {
                name: host.name.clone(),
                url: format!("https://{address}"),
                fingerprint: tls.fingerprint(),
            });
            sim.set_certificate(&host.name, Arc::clone(&tls));
            let server =
                http::Server { sim: Arc::clone(&sim), host: host.name.clone(), tls, stop: stop.clone() };
            tracker.spawn(server.serve(listener, tracker.clone()));
        }
        if sim.config.behaviour.resources_ms > 0 {
            tracker.spawn(api::tell_statuses(Arc::clone(&sim), stop.clone()));
        }
        let admin = match sim.config.admin {
            Some(address) => Some(serve_admin(&sim, &hosts, address, &stop, &tracker).await?),
            None => None,
        };
        Ok(Self { sim, hosts, admin, stop, tracker })
    }

    /// The servers, in the order of the configuration.
    #[must_use]
    pub fn hosts(&self) -> &[HostServer] {
        &self.hosts
    }

    /// Where the admin port is.
    #[must_use]
    pub fn admin(&self) -> Option<SocketAddr> {
        self.admin
    }

    /// The certificate of the cluster's CA, PEM.
    #[must_use]
    pub fn ca_file(&self) -> PathBuf {
        self.sim.config.state_dir.join("tls/pve-root-ca.pem")
    }

    /// The folder that is /etc/pve.
    #[must_use]
    pub fn etc_pve(&self) -> &Path {
        self.sim.cfs.root()
    }

    /// Reads a file of faults: JSON, as the admin port takes it at `/faults`.
    ///
    /// # Errors
    /// The file cannot be read or says something that is none.
    pub fn load_faults(&self, path: &Path) -> Result<()> {
        let text = pmxcfs::read_text(path)?.unwrap_or_default();
        let set =
            serde_json::from_str(&text).map_err(|e| Error::Config(format!("{}: {e}", path.display())))?;
        self.sim.faults.replace(set).map_err(|why| Error::Config(format!("{}: {why}", path.display())))
    }

    /// Ends everything: connections are closed, tasks end as by a signal; CTs go on.
    pub async fn stop(self) {
        self.stop.cancel();
        self.sim.tasks.close().await;
        self.tracker.close();
        self.tracker.wait().await;
    }
}

fn names(host: &config::Host, address: SocketAddr) -> Vec<String> {
    let mut all = vec![host.ip.clone()];
    if !address.ip().is_unspecified() {
        all.push(address.ip().to_string());
    }
    all.push("127.0.0.1".into());
    all.sort();
    all.dedup();
    all
}

async fn serve_admin(
    sim: &Arc<sim::Sim>,
    hosts: &[HostServer],
    address: SocketAddr,
    stop: &CancellationToken,
    tracker: &TaskTracker,
) -> Result<SocketAddr> {
    let (listener, address) = http::Server::bind(address).await?;
    let urls: BTreeMap<String, String> = hosts.iter().map(|h| (h.name.clone(), h.url.clone())).collect();
    let router = admin::router(admin::Admin { sim: Arc::clone(sim), urls, held: Arc::default() });
    let stop = stop.clone();
    tracker.spawn(async move {
        let served = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned());
        if let Err(error) = served.await {
            tracing::warn!(%error, "the admin port ended");
        }
    });
    Ok(address)
}
