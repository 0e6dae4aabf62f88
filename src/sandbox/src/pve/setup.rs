//! The engine from what an administrator writes: texts become names, files are read, host and token are checked.

use std::{
    fmt::Display,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use moxlet_ids::Vmid;
use moxlet_pve::{Client, Endpoint, Fingerprint, PoolId, Token, Trust};

use super::{CgroupInits, PveConfig, PveEngine, Requirements, VmidRange, ZfsVolumes};
use crate::{
    Error, Result,
    cgroup::{ContainerCgroups, Numbers},
    error::io,
    process::read_bounded,
};

/// A token's file is not larger, nor is a list of certificates.
const MAX_FILE: u64 = 1 << 20;

/// A host of Proxmox VE, in an administrator's words. Errors name the key of the section `[pve]`.
#[derive(Debug, Clone)]
pub struct PveHost {
    /// The API's servers, this host's first.
    pub endpoints: Vec<String>,
    /// A file with `user@realm!id=secret`.
    pub token_file: PathBuf,
    /// Who signs the servers' certificates; without it and without a fingerprint the system's authorities.
    pub ca_file: Option<PathBuf>,
    /// The SHA-256 fingerprint of the server's certificate; it goes before `ca_file`.
    pub fingerprint: Option<String>,
    /// This host's name in the cluster.
    pub node: String,
    /// The storage of the CTs' roots, of type `zfspool`.
    pub storage: String,
    /// The first and the last VMID of pods.
    pub vmids: (u32, u32),
    /// The bridges that pods are put on.
    pub bridges: Vec<String>,
    /// Whether CTs are written as protected.
    pub protection: bool,
    /// The pool that CTs are put into.
    pub pool: Option<String>,
    /// The cluster's file system, `/etc/pve`.
    pub config_dir: PathBuf,
    /// Where Proxmox VE locks CTs, `/run/lock/lxc`.
    pub lock_dir: PathBuf,
    /// The engine's own directory.
    pub dir: PathBuf,
    /// Memory of a pod without a limit, in bytes.
    pub memory_bytes: u64,
    /// The host's processors.
    pub cores: u32,
    /// How long a start may take.
    pub start_timeout: Duration,
}

fn unfit(key: &str, why: &dyn Display) -> Error {
    Error::Host(format!("pve.{key}: {why}"))
}

impl PveHost {
    /// Checks host and token and opens the engine, with the cgroups of its CTs.
    ///
    /// # Errors
    /// A text is no such name, a file cannot be read, the host or the token lacks something ([`Error::Host`] with all of it), or
    /// as [`PveEngine::new`].
    pub async fn open(self) -> Result<(PveEngine, ContainerCgroups)> {
        let node = self.node.parse().map_err(|e| unfit("node", &e))?;
        let storage = self.storage.parse().map_err(|e| unfit("storage", &e))?;
        let number = |key: &str, n: u32| Vmid::new(n).map_err(|e| unfit(key, &e));
        let range = VmidRange::new(number("vmid_min", self.vmids.0)?, number("vmid_max", self.vmids.1)?)?;
        let pool =
            self.pool.as_ref().map(|p| p.parse::<PoolId>().map_err(|e| unfit("pool", &e))).transpose()?;
        let client = self.client()?;
        let required = Requirements {
            client: &client,
            node: &node,
            storage: &storage,
            bridges: &self.bridges,
            range,
            cts_pool: pool.as_ref(),
            config_dir: &self.config_dir,
            net_dir: Path::new("/sys/class/net"),
        };
        let dataset = required.check().await?;
        let numbers = Numbers::default();
        let cgroups = ContainerCgroups::numbered(numbers.clone())?;
        let config = PveConfig {
            dir: self.dir,
            config_dir: self.config_dir,
            lock_dir: self.lock_dir,
            node,
            storage,
            range,
            protection: self.protection,
            pool,
            memory_bytes: self.memory_bytes,
            cores: self.cores,
            start_timeout: self.start_timeout,
        };
        let volumes = Arc::new(ZfsVolumes::open(&dataset).await?);
        let inits = Arc::new(CgroupInits::new(cgroups.clone()));
        Ok((PveEngine::new(config, client, volumes, inits, numbers)?, cgroups))
    }

    /// A client of the API, from the files that are named.
    fn client(&self) -> Result<Client> {
        let token: Token = text("token_file", &self.token_file)?
            .trim()
            .parse()
            .map_err(|e| unfit("token_file", &format!("{}: {e}", self.token_file.display())))?;
        let trust = match (&self.fingerprint, &self.ca_file) {
            (Some(fingerprint), _) => {
                let fingerprint: Fingerprint = fingerprint.parse().map_err(|e| unfit("fingerprint", &e))?;
                Trust::Fingerprint(fingerprint)
            }
            (None, Some(path)) => Trust::Authorities(text("ca_file", path)?.into_bytes()),
            (None, None) => Trust::System,
        };
        let mut builder = Client::builder(token);
        for url in &self.endpoints {
            let endpoint = Endpoint::new(url, trust.clone());
            builder = builder.endpoint(endpoint.map_err(|e| unfit("endpoints", &format!("{url}: {e}")))?);
        }
        builder.build().map_err(|e| Error::Host(e.to_string()))
    }
}

/// A small file that a key names.
fn text(key: &str, path: &Path) -> Result<String> {
    if std::fs::metadata(path).is_ok_and(|m| m.len() > MAX_FILE) {
        return Err(unfit(key, &format!("{} is too large", path.display())));
    }
    read_bounded(path, MAX_FILE).map_err(io("read", path))
}
