//! The engine from what an administrator writes: texts become names, files are read, host and token are checked.

use std::{
    fmt::Display,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use moxlet_ids::Vmid;
use moxlet_pve::{Client, Endpoint, NodeName, PoolId, StorageId, Token, Trust};

use super::{
    CgroupInits, PveConfig, PveEngine, Requirements, VmidRange, ZfsVolumes,
    check::{Checked, reason},
    config::Layout,
    record::Records,
};
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
    /// The SHA-256 fingerprints of the servers' certificates, one for each; they go before `ca_file`.
    pub fingerprints: Vec<String>,
    /// This host's name in the cluster.
    pub node: String,
    /// The storage of the CTs' roots, of type `zfspool`.
    pub storage: String,
    /// The first and the last VMID of pods.
    pub vmids: (u32, u32),
    /// The bridges that pods are put on.
    pub bridges: Vec<String>,
    /// What is asked for the pods' first interface.
    pub mtu: Option<u16>,
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
    /// as [`PveEngine::new`]. An API that cannot be asked now is none: pods that run are taken over, and the engine has a
    /// [fault](crate::Engine::fault) until a check passes.
    pub async fn open(self) -> Result<(PveEngine, ContainerCgroups)> {
        let node: NodeName = self.node.parse().map_err(|e| unfit("node", &e))?;
        let storage: StorageId = self.storage.parse().map_err(|e| unfit("storage", &e))?;
        let number = |key: &str, n: u32| Vmid::new(n).map_err(|e| unfit(key, &e));
        let range = VmidRange::new(number("vmid_min", self.vmids.0)?, number("vmid_max", self.vmids.1)?)?;
        let pool =
            self.pool.as_ref().map(|p| p.parse::<PoolId>().map_err(|e| unfit("pool", &e))).transpose()?;
        let client = self.client()?;
        let required = Requirements {
            client: client.clone(),
            node: node.clone(),
            storage: storage.clone(),
            bridges: self.bridges,
            mtu: self.mtu,
            range,
            cts_pool: pool.clone(),
            config_dir: self.config_dir.clone(),
            net_dir: "/sys/class/net".into(),
        };
        let records = Records::open(&Layout::below(&self.dir).records);
        let takes_over = records.all().is_ok_and(|all| !all.is_empty());
        let Checked { place, away } = required.check(takes_over).await?;
        if let Some(error) = &away {
            tracing::error!(
                error = reason(error),
                "running pods are taken over, new ones wait until this is right"
            );
        }
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
        let volumes = Arc::new(ZfsVolumes::open(place).await?);
        let inits = Arc::new(CgroupInits::new(cgroups.clone()));
        let engine = PveEngine::new(config, client, volumes, inits, numbers)?;
        if let Some(error) = away {
            engine.unchecked(required, &error);
        }
        Ok((engine, cgroups))
    }

    /// How each server proves who it is.
    fn trusts(&self) -> Result<Vec<Trust>> {
        let servers = self.endpoints.len();
        if self.fingerprints.is_empty() {
            let trust = match &self.ca_file {
                Some(path) => Trust::Authorities(text("ca_file", path)?.into_bytes()),
                None => Trust::System,
            };
            return Ok(vec![trust; servers]);
        }
        if self.fingerprints.len() != servers {
            // Each host of a cluster has a certificate of its own.
            let given = self.fingerprints.len();
            return Err(unfit(
                "fingerprint",
                &format!(
                    "{given} for {servers} servers: one for each, in their order, or ca_file for all of them"
                ),
            ));
        }
        let parse = |text: &String| text.parse().map_err(|e| unfit("fingerprint", &e));
        self.fingerprints.iter().map(|f| Ok(Trust::Fingerprint(parse(f)?))).collect()
    }

    /// A client of the API, from the files that are named.
    fn client(&self) -> Result<Client> {
        check_secret(&self.token_file)?;
        let token: Token = text("token_file", &self.token_file)?
            .trim()
            .parse()
            .map_err(|e| unfit("token_file", &format!("{}: {e}", self.token_file.display())))?;
        let mut builder = Client::builder(token);
        for (url, trust) in self.endpoints.iter().zip(self.trusts()?) {
            let endpoint = Endpoint::new(url, trust);
            builder = builder.endpoint(endpoint.map_err(|e| unfit("endpoints", &format!("{url}: {e}")))?);
        }
        builder.build().map_err(|e| Error::Host(e.to_string()))
    }
}

/// Who reads the token can do with the pods' CTs as it likes: nobody but root should.
fn check_secret(path: &Path) -> Result<()> {
    let found = std::fs::metadata(path).map_err(io("read", path))?;
    let (mode, owner) = (found.mode() & 0o777, found.uid());
    let path = path.display();
    if mode & 0o007 != 0 {
        let why = format!(
            "{path} has mode {mode:04o}, which lets everybody at it: chmod 0600 {path}, and make a new token"
        );
        return Err(unfit("token_file", &why));
    }
    // The cluster's file system has 0640 for root and www-data, the web server's user.
    if mode & 0o070 != 0 || owner != 0 {
        tracing::warn!(
            "pve.token_file: {path} has mode {mode:04o} and belongs to user {owner}: others than root can read the token; \
             0600 and root are right"
        );
    }
    Ok(())
}

/// A small file that a key names.
fn text(key: &str, path: &Path) -> Result<String> {
    if std::fs::metadata(path).is_ok_and(|m| m.len() > MAX_FILE) {
        return Err(unfit(key, &format!("{} is too large", path.display())));
    }
    read_bounded(path, MAX_FILE).map_err(io("read", path))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    fn host(dir: &Path, servers: &[&str], fingerprints: &[&str]) -> PveHost {
        let token_file = dir.join("token");
        fs::write(&token_file, "moxlet@pve!node=00000000-0000-4000-8000-000000000000\n").unwrap();
        fs::set_permissions(&token_file, fs::Permissions::from_mode(0o600)).unwrap();
        let texts = |all: &[&str]| all.iter().map(|t| (*t).to_owned()).collect();
        PveHost {
            endpoints: texts(servers),
            token_file,
            ca_file: None,
            fingerprints: texts(fingerprints),
            node: "pve1".into(),
            storage: "local-zfs".into(),
            vmids: (1000, 1999),
            bridges: vec!["vmbr0".into()],
            mtu: None,
            protection: false,
            pool: None,
            config_dir: dir.into(),
            lock_dir: dir.into(),
            dir: dir.into(),
            memory_bytes: 1 << 30,
            cores: 1,
            start_timeout: Duration::from_secs(1),
        }
    }

    #[test]
    fn each_of_several_servers_has_a_fingerprint_of_its_own_or_none_has() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (["AA"; 32].join(":"), ["BB"; 32].join(":"));
        let both = ["https://pve1", "https://pve2"];
        host(dir.path(), &both[..1], &[&one]).client().unwrap();
        host(dir.path(), &both, &[]).client().unwrap();
        let trusts = host(dir.path(), &both, &[&one, &other]).trusts().unwrap();
        assert!(trusts[0] != trusts[1], "{trusts:?}");
        let error = host(dir.path(), &both, &[&one]).client().unwrap_err().to_string();
        assert!(error.contains("pve.fingerprint") && error.contains("ca_file"), "{error}");
    }

    #[test]
    fn a_token_that_everybody_can_read_or_replace_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let host = host(dir.path(), &["https://pve1"], &[]);
        for (mode, fit) in [(0o600, true), (0o400, true), (0o640, true), (0o644, false), (0o602, false)] {
            fs::set_permissions(&host.token_file, fs::Permissions::from_mode(mode)).unwrap();
            match host.client() {
                Ok(_) => assert!(fit, "{mode:o}"),
                Err(error) => {
                    let text = error.to_string();
                    assert!(
                        !fit && text.contains("chmod 0600") && !text.contains("4000"),
                        "{mode:o}: {text}"
                    );
                }
            }
        }
    }
}
