//! The simulated cluster: everything that calls work on.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Semaphore;

use crate::{
    Result,
    access::{self, UserCfg},
    answer::{Answered, Refusal},
    backend::{Backend, lxc::Lxc, records::Records},
    config::{BackendConfig, Config, Host, Storage},
    faults::{Faults, StorageFault},
    guest::CtConf,
    pmxcfs::Pmxcfs,
    schema::Schema,
    seed,
    tasks::Tasks,
    tls::{HostTls, Validity},
};

/// What pvestatd of a host told last of its CTs.
#[derive(Debug, Clone)]
pub(crate) struct Told {
    pub(crate) status: serde_json::Value,
}

/// The cluster.
#[derive(Debug)]
pub(crate) struct Sim {
    pub(crate) config: Config,
    pub(crate) schema: Schema,
    pub(crate) cfs: Pmxcfs,
    pub(crate) tasks: Tasks,
    pub(crate) faults: Arc<Faults>,
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) started: Instant,
    workers: BTreeMap<String, Workers>,
    told: Mutex<BTreeMap<u32, Told>>,
    certificates: Mutex<BTreeMap<String, Arc<HostTls>>>,
}

/// The workers of one host.
#[derive(Debug)]
pub(crate) struct Workers {
    pub(crate) free: Semaphore,
    pub(crate) all: usize,
    pub(crate) waiting: std::sync::atomic::AtomicUsize,
}

impl Sim {
    pub(crate) async fn open(config: Config) -> Result<Arc<Self>> {
        config.check()?;
        let cfs = Pmxcfs::open(&config)?;
        seed::fill(&config, &cfs)?;
        let faults: Arc<Faults> = Arc::default();
        let names: Vec<&str> = config.hosts.iter().map(|h| h.name.as_str()).collect();
        let least = Duration::from_millis(config.behaviour.task_ms);
        let tasks = Tasks::open(&config.state_dir, &names, Arc::clone(&faults), least)?;
        let backend: Arc<dyn Backend> = match &config.backend {
            BackendConfig::Records => Arc::new(Records::open(&config.state_dir)?),
            BackendConfig::Lxc(lxc) => Arc::new(Lxc::open(lxc).await?),
        };
        let count = config.behaviour.workers.max(1);
        let workers = names
            .iter()
            .map(|name| {
                let workers = Workers { free: Semaphore::new(count), all: count, waiting: 0.into() };
                ((*name).to_owned(), workers)
            })
            .collect();
        Ok(Arc::new(Self {
            schema: Schema::embedded()?,
            cfs,
            tasks,
            faults,
            backend,
            started: Instant::now(),
            workers,
            told: Mutex::default(),
            certificates: Mutex::default(),
            config,
        }))
    }

    pub(crate) fn workers(&self, host: &str) -> Option<&Workers> {
        self.workers.get(host)
    }

    /// Users, tokens, ACLs as they are now.
    pub(crate) fn users(&self) -> Result<UserCfg> {
        access::load(&self.cfs)
    }

    pub(crate) fn lock_wait(&self) -> Duration {
        Duration::from_millis(self.config.behaviour.lock_wait_ms)
    }

    pub(crate) fn told(&self) -> MutexGuard<'_, BTreeMap<u32, Told>> {
        self.told.lock()
    }

    /// How long the hosts are up, in seconds: as long as the simulator.
    pub(crate) fn uptime(&self) -> u64 {
        self.started.elapsed().as_secs() + 1
    }

    /// Takes or gives quorum.
    pub(crate) fn set_quorate(&self, quorate: bool) -> std::io::Result<()> {
        self.cfs.set_quorate(quorate)
    }

    fn certificates(&self) -> MutexGuard<'_, BTreeMap<String, Arc<HostTls>>> {
        self.certificates.lock()
    }

    pub(crate) fn set_certificate(&self, host: &str, tls: Arc<HostTls>) {
        self.certificates().insert(host.to_owned(), tls);
    }

    /// The fingerprint of a host's certificate, empty if its server is not here.
    pub(crate) fn fingerprint(&self, host: &str) -> String {
        self.certificates().get(host).map(|t| t.fingerprint()).unwrap_or_default()
    }

    /// Gives a host a new certificate; `None` if its server is not here.
    pub(crate) fn renew_certificate(&self, host: &str, validity: Validity) -> Option<Result<String>> {
        let tls = self.certificates().get(host).map(Arc::clone)?;
        Some(tls.renew(validity))
    }

    /// A host, or the refusal of an unknown one.
    pub(crate) fn host(&self, name: &str) -> Answered<&Host> {
        self.config.host(name).ok_or_else(|| Refusal::died(format!("hostname lookup '{name}' failed - failed to get address info for: {name}: Name or service not known")))
    }

    /// The file of a CT's config below /etc/pve.
    pub(crate) fn conf_name(node: &str, vmid: u32) -> String {
        format!("nodes/{node}/lxc/{vmid}.conf")
    }

    /// PVE::AbstractConfig::load_config.
    pub(crate) fn load_conf(&self, node: &str, vmid: u32) -> Answered<CtConf> {
        let name = Self::conf_name(node, vmid);
        match self.cfs.read(&name)? {
            Some(text) => Ok(CtConf::parse(&text)),
            None => Err(Refusal::died(format!("Configuration file '{name}' does not exist"))),
        }
    }

    /// PVE::AbstractConfig::write_config.
    pub(crate) fn write_conf(&self, node: &str, vmid: u32, conf: &CtConf) -> Answered<()> {
        self.cfs.write(&Self::conf_name(node, vmid), &conf.format())
    }

    /// The storages that storage.cfg names; what the configuration knows beyond it (templates, size) comes along.
    pub(crate) fn storages(&self) -> Result<Vec<Storage>> {
        let text = self.cfs.read("storage.cfg")?.unwrap_or_default();
        Ok(crate::section::parse(&text)
            .into_iter()
            .map(|section| {
                let list = |key: &str| -> Vec<String> {
                    let value = section.keys.get(key).map_or("", String::as_str);
                    value.split(',').filter(|v| !v.is_empty()).map(str::to_owned).collect()
                };
                let known = self.config.storages.iter().find(|s| s.name == section.id);
                Storage {
                    name: section.id.clone(),
                    kind: section.kind.clone(),
                    content: list("content"),
                    pool: section.keys.get("pool").cloned(),
                    mountpoint: section.keys.get("mountpoint").map(Into::into),
                    path: section.keys.get("path").map(Into::into),
                    nodes: list("nodes"),
                    shared: section.keys.get("shared").is_some_and(|v| v == "1"),
                    total_mib: known.map_or(1 << 20, |s| s.total_mib),
                    templates: known.map(|s| s.templates.clone()).unwrap_or_default(),
                }
            })
            .filter(|storage| {
                self.config
                    .hosts
                    .iter()
                    .any(|h| self.faults.storage(&h.name, &storage.name) != Some(StorageFault::Missing))
            })
            .collect())
    }

    /// A storage as a host sees it, activated; the refusals are PVE::Storage's.
    pub(crate) fn storage(&self, node: &str, name: &str) -> Answered<Storage> {
        let missing = || Refusal::died(format!("storage '{name}' does not exist"));
        let storage = self.storages()?.into_iter().find(|s| s.name == name).ok_or_else(missing)?;
        if !storage.nodes.is_empty() && !storage.nodes.iter().any(|n| n == node) {
            return Err(Refusal::died(format!("storage '{name}' is not available on node '{node}'")));
        }
        match self.faults.storage(node, name) {
            Some(StorageFault::Missing) => Err(missing()),
            Some(StorageFault::Inactive) => Err(Refusal::died(match &storage.pool {
                Some(pool) => format!(
                    "could not activate storage '{name}', zfs error: cannot import '{}': no such pool available",
                    pool.split('/').next().unwrap_or(pool)
                ),
                None => format!(
                    "unable to activate storage '{name}' - directory is expected to be a mount point but is not mounted"
                ),
            })),
            _ => Ok(storage),
        }
    }

    /// Which VMID lies where.
    pub(crate) fn vmlist(&self) -> Result<BTreeMap<u32, String>> {
        self.cfs.vmlist()
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    i64::try_from(since).unwrap_or(i64::MAX)
}
