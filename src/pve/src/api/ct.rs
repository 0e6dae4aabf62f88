//! Containers (CTs): the list of a node, and one of them by its number.

use std::{net::IpAddr, time::Duration};

use moxlet_ids::Vmid;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    Client, Error, NodeName, PoolId, Result, StorageId, Upid, VolumeId, config::LxcConfig, http::Request,
    lenient,
};

/// A CT of a node.
#[derive(Debug, Clone, Copy)]
pub struct Ct<'a> {
    client: &'a Client,
    node: &'a NodeName,
    vmid: Vmid,
}

/// How a CT does; also an entry of the list.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct CtStatus {
    /// Its number; not in every answer.
    #[serde(default)]
    pub vmid: Option<Vmid>,
    /// `running` or `stopped`.
    #[serde(default, deserialize_with = "lenient::string")]
    pub status: String,
    /// Its host name.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub name: Option<String>,
    /// Who works on it.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub lock: Option<String>,
    /// Its tags, parted by semicolons.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub tags: Option<String>,
    /// Whether it is a template.
    #[serde(default, deserialize_with = "lenient::bool")]
    pub template: bool,
    /// CPU use, 1 for one core.
    #[serde(default, deserialize_with = "lenient::opt_f64")]
    pub cpu: Option<f64>,
    /// CPUs that it may use.
    #[serde(default, deserialize_with = "lenient::opt_f64")]
    pub cpus: Option<f64>,
    /// Memory used, in bytes.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub mem: Option<u64>,
    /// Memory that it may use, in bytes.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub maxmem: Option<u64>,
    /// Swap that it may use, in bytes.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub maxswap: Option<u64>,
    /// Root file system used, in bytes.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub disk: Option<u64>,
    /// Size of the root file system, in bytes.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub maxdisk: Option<u64>,
    /// Seconds since it started.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub uptime: Option<u64>,
    /// What HA makes of it; in the status of one CT alone.
    #[serde(default)]
    pub ha: Option<HaState>,
}

/// What HA makes of a CT.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct HaState {
    /// Whether it looks after it: start and stop then end when they are asked for, not when they are done.
    #[serde(deserialize_with = "lenient::bool")]
    pub managed: bool,
    /// The state asked for.
    #[serde(deserialize_with = "lenient::opt_string")]
    pub state: Option<String>,
}

impl CtStatus {
    /// Whether it runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.status == "running"
    }
}

/// A network interface as the running CT has it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CtInterface {
    /// Its name.
    pub name: String,
    /// Its MAC address.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub hardware_address: Option<String>,
    /// Its addresses.
    #[serde(default, deserialize_with = "lenient::list")]
    pub ip_addresses: Vec<CtAddress>,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CtAddress {
    /// The address.
    #[serde(default, deserialize_with = "lenient::readable")]
    pub ip_address: Option<IpAddr>,
    /// The prefix's length.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub prefix: Option<u64>,
}

/// A key of the configuration that has a value which holds from the next start on.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct PendingKey {
    /// The key.
    pub key: String,
    /// Its value now.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub value: Option<String>,
    /// Its value then.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub pending: Option<String>,
    /// Whether it goes then: 1, or 2 if by force.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub delete: Option<u64>,
}

/// A change of the configuration.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ConfigChange {
    /// What is set; what is `None` or empty in it stays as it is.
    pub set: LxcConfig,
    /// Keys that go.
    pub delete: Vec<String>,
    /// Keys whose pending value goes.
    pub revert: Vec<String>,
    /// The digest that was read: the change is refused if the configuration is another by now.
    pub digest: Option<String>,
}

/// What a CT is created from.
#[derive(Debug, Clone, PartialEq)]
pub struct NewCt {
    /// An archive on a storage: the API knows no other way.
    pub template: VolumeId,
    /// Its configuration. `rootfs` is `storage:size in GiB`.
    pub config: LxcConfig,
    /// Where volumes go that name no storage.
    pub storage: Option<StorageId>,
    /// The pool that it belongs to.
    pub pool: Option<PoolId>,
    /// Whether it is started at once.
    pub start: bool,
}

/// What else a deletion takes along.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Delete {
    /// Stop it first if it runs.
    pub force: bool,
    /// Its entries in backup jobs, HA and replication; without it such an entry makes the server refuse.
    pub purge: bool,
    /// Volumes that bear its number and are not in its configuration.
    pub destroy_unreferenced_disks: bool,
}

/// How a CT is moved to another node.
#[derive(Debug, Clone, PartialEq)]
pub struct Migrate {
    /// Where to.
    pub target: NodeName,
    /// Stop it, move it, start it there. A running CT is refused otherwise.
    pub restart: bool,
    /// How long it gets to stop.
    pub timeout: Option<Duration>,
    /// The storage there, if it is another.
    pub target_storage: Option<StorageId>,
}

impl Client {
    /// A CT. Nothing is asked.
    #[must_use]
    pub fn ct<'a>(&'a self, node: &'a NodeName, vmid: Vmid) -> Ct<'a> {
        Ct { client: self, node, vmid }
    }

    /// The CTs of a node that we may see.
    ///
    /// # Errors
    /// As every call. Those without VM.Audit are left out.
    pub async fn cts(&self, node: &NodeName) -> Result<Vec<CtStatus>> {
        self.list(Request::new("GET", "/nodes/{node}/lxc").at("node", node), "the list of CTs").await
    }
}

impl<'a> Ct<'a> {
    pub(super) fn client(&self) -> &'a Client {
        self.client
    }

    pub(super) fn request(&self, method: &'static str, template: &'static str) -> Request {
        Request::new(method, template).at("node", self.node).at("vmid", self.vmid)
    }

    /// Its number.
    #[must_use]
    pub fn vmid(&self) -> Vmid {
        self.vmid
    }

    /// Its node.
    #[must_use]
    pub fn node(&self) -> &NodeName {
        self.node
    }

    /// Creates it from an archive. That the VMID is taken may show at once ([`Error::AlreadyExists`]) or in the task.
    ///
    /// # Errors
    /// As every call; wants VM.Allocate on `/vms/VMID` or the pool, Datastore.AllocateSpace on the storages, SDN.Use on the
    /// bridges. A configuration with raw lines is refused: the API takes none.
    pub async fn create(&self, new: &NewCt) -> Result<Upid> {
        let mut request = Request::new("POST", "/nodes/{node}/lxc")
            .at("node", self.node)
            .with("vmid", self.vmid)
            .with("ostemplate", &new.template)
            .maybe("storage", new.storage.as_ref())
            .maybe("pool", new.pool.as_ref())
            .flag("start", new.start);
        request = with_config(request, &new.config)?;
        self.client.task(request).await
    }

    /// Its configuration as it is in effect, without what is pending.
    ///
    /// # Errors
    /// As every call; wants VM.Audit on `/vms/VMID`. [`Error::Gone`] says that this node has no such CT: another may.
    pub async fn config(&self) -> Result<LxcConfig> {
        let request = self.request("GET", "/nodes/{node}/lxc/{vmid}/config").with("current", 1);
        let fields: Map<String, Value> = self.client.get(request, "a CT's configuration").await?;
        Ok(LxcConfig::from_answer(&fields))
    }

    /// Its configuration key by key, with what is pending.
    ///
    /// # Errors
    /// As every call; wants VM.Audit on `/vms/VMID`.
    pub async fn pending(&self) -> Result<Vec<PendingKey>> {
        let request = self.request("GET", "/nodes/{node}/lxc/{vmid}/pending");
        self.client.list(request, "the pending configuration").await
    }

    /// Changes its configuration. What a running CT cannot take at once is pending until its next start.
    ///
    /// # Errors
    /// As every call; which privilege it wants depends on the keys: VM.Config.Options, .CPU, .Memory, .Network, .Disk.
    /// [`Error::Changed`] if the digest is another. A configuration with raw lines is refused: the API takes none.
    pub async fn set_config(&self, change: &ConfigChange) -> Result<()> {
        let request = self
            .request("PUT", "/nodes/{node}/lxc/{vmid}/config")
            .maybe("delete", joined(&change.delete))
            .maybe("revert", joined(&change.revert))
            .maybe("digest", change.digest.as_ref());
        self.client.done(with_config(request, &change.set)?).await
    }

    /// How it does.
    ///
    /// # Errors
    /// As every call; wants VM.Audit on `/vms/VMID`.
    pub async fn status(&self) -> Result<CtStatus> {
        self.client.get(self.request("GET", "/nodes/{node}/lxc/{vmid}/status/current"), "a CT's status").await
    }

    /// Starts it.
    ///
    /// # Errors
    /// As every call; wants VM.PowerMgmt on `/vms/VMID`. That it is locked shows in the task.
    pub async fn start(&self) -> Result<Upid> {
        self.client.task(self.request("POST", "/nodes/{node}/lxc/{vmid}/status/start")).await
    }

    /// Stops it at once. `overrule_shutdown` ends a shutdown of it that is under way.
    ///
    /// # Errors
    /// As every call; wants VM.PowerMgmt on `/vms/VMID`.
    pub async fn stop(&self, overrule_shutdown: bool) -> Result<Upid> {
        let request = self.request("POST", "/nodes/{node}/lxc/{vmid}/status/stop");
        self.client.task(request.flag("overrule-shutdown", overrule_shutdown)).await
    }

    /// Asks it to end; `force_stop` stops it when the time (60 seconds if none is given) is over.
    ///
    /// # Errors
    /// As every call; wants VM.PowerMgmt on `/vms/VMID`.
    pub async fn shutdown(&self, timeout: Option<Duration>, force_stop: bool) -> Result<Upid> {
        let request = self.request("POST", "/nodes/{node}/lxc/{vmid}/status/shutdown");
        let request = request.maybe("timeout", timeout.map(|t| t.as_secs())).flag("forceStop", force_stop);
        self.client.task(request).await
    }

    /// Asks it to end and starts it again, which also makes pending changes come true.
    ///
    /// # Errors
    /// As every call; wants VM.PowerMgmt on `/vms/VMID`.
    pub async fn reboot(&self, timeout: Option<Duration>) -> Result<Upid> {
        let request = self.request("POST", "/nodes/{node}/lxc/{vmid}/status/reboot");
        self.client.task(request.maybe("timeout", timeout.map(|t| t.as_secs()))).await
    }

    /// Freezes it. The server calls this experimental: it is done with CRIU and mostly fails.
    ///
    /// # Errors
    /// As every call; wants VM.PowerMgmt on `/vms/VMID`.
    pub async fn suspend(&self) -> Result<Upid> {
        self.client.task(self.request("POST", "/nodes/{node}/lxc/{vmid}/status/suspend")).await
    }

    /// Thaws it.
    ///
    /// # Errors
    /// As every call; wants VM.PowerMgmt on `/vms/VMID`.
    pub async fn resume(&self) -> Result<Upid> {
        self.client.task(self.request("POST", "/nodes/{node}/lxc/{vmid}/status/resume")).await
    }

    /// Removes it and its volumes. The server takes a cluster-wide lock for this: few at once. If it cannot have it in time,
    /// the CT is left with the lock `destroyed`.
    ///
    /// # Errors
    /// As every call; wants VM.Allocate on `/vms/VMID`.
    pub async fn delete(&self, options: Delete) -> Result<Upid> {
        let request = self
            .request("DELETE", "/nodes/{node}/lxc/{vmid}")
            .flag("force", options.force)
            .flag("purge", options.purge)
            // Without it said, the server does not remove them.
            .flag("destroy-unreferenced-disks", options.destroy_unreferenced_disks);
        self.client.task(request).await
    }

    /// Moves it to another node.
    ///
    /// # Errors
    /// As every call; wants VM.Migrate on `/vms/VMID`.
    pub async fn migrate(&self, options: &Migrate) -> Result<Upid> {
        let request = self
            .request("POST", "/nodes/{node}/lxc/{vmid}/migrate")
            .with("target", &options.target)
            .flag("restart", options.restart)
            .maybe("timeout", options.timeout.map(|t| t.as_secs()))
            .maybe("target-storage", options.target_storage.as_ref());
        self.client.task(request).await
    }

    /// The interfaces of the running CT; none if it does not run.
    ///
    /// # Errors
    /// As every call; wants VM.Audit on `/vms/VMID`.
    pub async fn interfaces(&self) -> Result<Vec<CtInterface>> {
        self.client
            .list(self.request("GET", "/nodes/{node}/lxc/{vmid}/interfaces"), "a CT's interfaces")
            .await
    }
}

fn joined(keys: &[String]) -> Option<String> {
    (!keys.is_empty()).then(|| keys.join(","))
}

fn with_config(mut request: Request, config: &LxcConfig) -> Result<Request> {
    if !config.lxc.is_empty() {
        let reason = "the API takes no raw `lxc.*` lines; they are written into the configuration file";
        return Err(Error::refused(request.method, request.template, reason));
    }
    for (key, value) in config.pairs() {
        request = request.with(key, value);
    }
    Ok(request)
}
