//! What host and token must have, checked at the start so that the first pod does not find out. All that is wrong is said at
//! once, each with what to do about it.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use moxlet_pve::{Client, NodeName, PoolId, StorageId, api::access::Permissions};
use tokio::process::Command;

use super::{VmidRange, bridge};
use crate::{Error, Result, process::read_bounded};

const MAX: u64 = 1 << 20;
const DPKG: Duration = Duration::from_secs(20);
/// Packages and the oldest versions that work. Earlier ones of pve-container cannot start a CT of `ostype: unmanaged`; earlier
/// ones of lxc-pve keep nested containers from mounting their /proc.
const PACKAGES: [(&str, &str); 2] = [("pve-container", "6.1.1"), ("lxc-pve", "6.0.5-2")];
/// What is required, for a check.
#[derive(Debug, Clone)]
pub struct Requirements {
    /// The API.
    pub client: Client,
    /// This host.
    pub node: NodeName,
    /// The storage of the CTs' roots.
    pub storage: StorageId,
    /// The bridges that pods are put on, the one of their first interface first.
    pub bridges: Vec<String>,
    /// What is asked for the first interface.
    pub mtu: Option<u16>,
    /// The numbers of the pods' CTs.
    pub range: VmidRange,
    /// The pool that they are put into.
    pub cts_pool: Option<PoolId>,
    /// The cluster's file system.
    pub config_dir: PathBuf,
    /// Where the kernel lists interfaces, `/sys/class/net`.
    pub net_dir: PathBuf,
}

/// What a check came to.
#[derive(Debug)]
pub struct Checked {
    /// What the storage has.
    pub place: StoragePlace,
    /// Why the API could not be asked; what host and files say for themselves is well.
    pub away: Option<Error>,
}

/// What a storage of type `zfspool` has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoragePlace {
    /// Its pool or dataset.
    pub dataset: String,
    /// Where Proxmox VE looks for the volumes on it, which it binds into CTs by this path.
    pub mountpoint: PathBuf,
}

impl Requirements {
    /// Checks all. An agent with running pods should not end of an API that is away, or whose certificate or token is not accepted
    /// now: [`Self::check_again`] has to be tried again then. Nor, where it `takes_over` pods, of anything else that these do not
    /// need. Three calls, four with a pool.
    ///
    /// # Errors
    /// [`Error::Host`] with all that is missing.
    pub async fn check(&self, takes_over: bool) -> Result<Checked> {
        let mut missing = packages().await;
        let place = match storage_place(&self.config_dir, &self.storage, &self.node) {
            Ok(place) => Some(place),
            Err(text) => {
                missing.push(text);
                None
            }
        };
        if let Some(text) = self.range.overlap(next_id(&self.config_dir)) {
            tracing::warn!("{text}");
        }
        let mut later = self.bridge_faults();
        let mut away = None;
        match self.ask(place.is_some()).await {
            Ok(more) => later.extend(more),
            Err(error) if passes(&error) => away = Some(error.to_string()),
            Err(error) if takes_over => later.push(error.to_string()),
            Err(error) => return Err(Error::Host(error.to_string())),
        }
        let all = |lists: &[&[String]]| lists.concat().join("; ");
        match place {
            Some(place) if missing.is_empty() && (later.is_empty() || takes_over) => {
                later.extend(away);
                let away = (!later.is_empty()).then(|| Error::Host(all(&[&later])));
                Ok(Checked { place, away })
            }
            _ => {
                let away = away.map(|error| vec![error]).unwrap_or_default();
                Err(Error::Host(all(&[&missing, &later, &away])))
            }
        }
    }

    fn bridge_faults(&self) -> Vec<String> {
        let mtu = |number| self.mtu.filter(|_| number == 0);
        let bridges = self.bridges.iter().enumerate();
        bridges.filter_map(|(number, name)| bridge::fault(&self.net_dir, name, mtu(number))).collect()
    }

    /// Checks what may have been missing when the agent took pods over: the bridges, and what the API has to say, which is its
    /// version, the token's privileges, the storage, the pool.
    ///
    /// # Errors
    /// [`Error::Host`] with all that is missing, or why the API cannot be asked.
    pub async fn check_again(&self) -> Result<()> {
        let mut missing = self.bridge_faults();
        missing.extend(self.ask(true).await.map_err(|e| Error::Host(e.to_string()))?);
        if missing.is_empty() { Ok(()) } else { Err(Error::Host(missing.join("; "))) }
    }

    async fn ask(&self, storage: bool) -> moxlet_pve::Result<Vec<String>> {
        self.client.check_version().await?;
        let mut missing = self.privileges(&self.client.permissions(None).await?);
        if storage {
            // Asking activates it: the pool is imported and mounted before anything of ours is.
            match self.client.storage_status(&self.node, &self.storage).await {
                Ok(status) if status.active => {}
                Ok(_) => missing.push(format!(
                    "the storage {} is not active on {}: is its pool imported?",
                    self.storage, self.node
                )),
                Err(error) if passes(&error) => return Err(error),
                Err(error) => {
                    missing.push(format!("the storage {} cannot be asked after: {error}", self.storage));
                }
            }
        }
        missing.extend(self.pool_is_missing().await);
        Ok(missing)
    }

    async fn pool_is_missing(&self) -> Option<String> {
        let pool = self.cts_pool.as_ref()?;
        match self.client.pool(pool).await {
            Ok(Some(_)) => None,
            // Asked for one that it may not see, Proxmox VE answers as if there were none.
            Ok(None) | Err(moxlet_pve::Error::Gone { .. }) => Some(format!(
                "there is no pool {pool} that the token may see (key pool): pveum pool add {pool}, and Pool.Audit on /pool/{pool}"
            )),
            Err(error) => Some(format!("the pool {pool} cannot be asked after: {error}")),
        }
    }

    /// What the token lacks of all that the engine's calls want.
    fn privileges(&self, held: &Permissions) -> Vec<String> {
        let token = self.client.token_id();
        let user = token.split('!').next().unwrap_or(token);
        let lack = |lacks: bool, privilege: &str, grant: &str, what: &str| {
            let role = format!("Moxlet-{privilege}");
            lacks.then(|| {
                format!(
                    "the token {token} lacks {privilege} on {grant}, needed to {what}: pveum role add {role} --privs {privilege}; \
                     pveum acl modify {grant} --users {user} --roles {role}; pveum acl modify {grant} --tokens '{token}' --roles {role}"
                )
            })
        };
        // No pod gets a VMID that somebody is allowed something on, or that is in a pool: its CT has what all guests have, and in
        // its own pool what that gives. To be put there, it has to be Moxlet's before.
        let on_cts = |privilege| held.passes_down("/vms", privilege);
        let pool = self.cts_pool.as_ref().map(|pool| format!("/pool/{pool}"));
        let by_pool = |privilege| pool.as_ref().is_some_and(|pool| held.has(pool, privilege));
        let power = on_cts("VM.PowerMgmt") || by_pool("VM.PowerMgmt");
        let mut missing = vec![
            lack(!power, "VM.PowerMgmt", "/vms", "start and stop CTs"),
            lack(!on_cts("VM.Allocate"), "VM.Allocate", "/vms", "delete CTs"),
        ];
        if let Some(pool) = &pool {
            missing.push(lack(!by_pool("Pool.Audit"), "Pool.Audit", pool, "see the pool"));
            missing.push(lack(!by_pool("Pool.Allocate"), "Pool.Allocate", pool, "put CTs into it"));
        }
        let storage = format!("/storage/{}", self.storage);
        let seen = ["Datastore.Audit", "Datastore.AllocateSpace"].iter().any(|p| held.has(&storage, p));
        missing.push(lack(!seen, "Datastore.Audit", &storage, "see the storage"));
        missing.into_iter().flatten().collect()
    }
}

/// Whether it may be over without anybody changing this host: servers come back, certificates are renewed, and what is done
/// to a token must not keep an agent from the pods that run.
fn passes(error: &moxlet_pve::Error) -> bool {
    use moxlet_pve::Error as E;
    error.is_temporary() || matches!(error.reason(), E::Certificate { .. } | E::WrongToken { .. })
}

/// What a failed check says, without that it is the host which is checked.
pub(super) fn reason(error: &Error) -> String {
    match error {
        Error::Host(text) => text.clone(),
        other => other.to_string(),
    }
}

/// What a storage has, from `storage.cfg`.
fn storage_place(
    config_dir: &Path,
    storage: &StorageId,
    node: &NodeName,
) -> std::result::Result<StoragePlace, String> {
    let path = config_dir.join("storage.cfg");
    let text = read_bounded(&path, MAX).map_err(|e| format!("{} cannot be read: {e}", path.display()))?;
    let section = section(&text, storage.as_str())
        .ok_or_else(|| format!("{} has no storage {storage} (key storage)", path.display()))?;
    if section.kind != "zfspool" {
        return Err(format!(
            "the storage {storage} is of type {}, pods need one of type zfspool",
            section.kind
        ));
    }
    if !section.value("content").is_none_or(|c| c.split(',').any(|c| c.trim() == "rootdir")) {
        return Err(format!(
            "the storage {storage} does not hold containers: pvesm set {storage} --content rootdir,images"
        ));
    }
    if section.value("disable").is_some_and(|v| v != "0") {
        return Err(format!("the storage {storage} is disabled: pvesm set {storage} --disable 0"));
    }
    if section.value("nodes").is_some_and(|n| !n.split(',').any(|n| n.trim() == node.as_str())) {
        return Err(format!("the storage {storage} is not for node {node}: see its list of nodes"));
    }
    let dataset =
        section.value("pool").ok_or_else(|| format!("the storage {storage} names no pool"))?.to_owned();
    // As `PVE::Storage::ZFSPoolPlugin::path` has it.
    let mountpoint = section.value("mountpoint").map_or_else(|| format!("/{dataset}"), str::to_owned);
    Ok(StoragePlace { dataset, mountpoint: mountpoint.into() })
}

/// A section of a configuration file as Proxmox VE writes them: `type: id`, then indented keys.
struct Section<'a> {
    kind: &'a str,
    lines: Vec<&'a str>,
}

impl<'a> Section<'a> {
    fn value(&self, key: &str) -> Option<&'a str> {
        self.lines.iter().find_map(|line| {
            let (name, value) = line.split_once(char::is_whitespace).unwrap_or((line, "1"));
            (name == key).then_some(value.trim())
        })
    }
}

fn section<'a>(text: &'a str, id: &str) -> Option<Section<'a>> {
    let mut lines = text.lines();
    let kind = lines.by_ref().find_map(|line| {
        let (kind, name) = line.split_once(':').filter(|_| !line.starts_with(char::is_whitespace))?;
        (name.trim() == id).then_some(kind)
    })?;
    let own = lines.take_while(|line| line.starts_with(char::is_whitespace) && !line.trim().is_empty());
    Some(Section { kind, lines: own.map(str::trim).collect() })
}

/// The range in which Proxmox VE looks for free VMIDs, the second excluded, from `datacenter.cfg`.
fn next_id(config_dir: &Path) -> (u32, u32) {
    let text = read_bounded(&config_dir.join("datacenter.cfg"), MAX).unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("next-id:")).unwrap_or_default();
    let field = |name: &str| {
        line.split(',').find_map(|p| p.trim().strip_prefix(name)?.strip_prefix('=')?.trim().parse().ok())
    };
    (field("lower").unwrap_or(100), field("upper").unwrap_or(1_000_000))
}

/// Packages that are too old; those that are not installed are not looked for.
async fn packages() -> Vec<String> {
    let names = PACKAGES.map(|(name, _)| name);
    let asked = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${Version}\n"])
        .args(names)
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let Ok(Ok(output)) = tokio::time::timeout(DPKG, asked).await else { return Vec::new() };
    too_old(&String::from_utf8_lossy(&output.stdout))
}

fn too_old(listed: &str) -> Vec<String> {
    let installed = |package: &str| listed.lines().find_map(|l| l.strip_prefix(package)?.strip_prefix(' '));
    PACKAGES
        .iter()
        .filter_map(|(package, oldest)| {
            let version = installed(package).filter(|v| !v.trim().is_empty())?;
            (numbers(version) < numbers(oldest)).then(|| {
                format!("{package} {version} is too old, {oldest} or later is needed: apt update && apt install {package}")
            })
        })
        .collect()
}

/// The numbers of a Debian version, its epoch left out.
fn numbers(version: &str) -> Vec<u64> {
    let plain = version.split_once(':').map_or(version, |(_, rest)| rest);
    plain.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    const CFG: &str = "dir: local\n\tpath /var/lib/vz\n\tcontent iso\n\nzfspool: local-zfs\n\tpool rpool/data\n\tcontent images,rootdir\n\
        \tsparse 1\n\nzfspool: fast\n\tpool fast/ct\n\tcontent rootdir\n\tmountpoint /srv/ct\n\nzfspool: other\n\tpool tank\n\tcontent images\n\nzfspool: away\n\tpool tank\n\tcontent rootdir\n\tnodes pve7\n\
        \nzfspool: off\n\tdisable\n\tpool tank\n\tcontent rootdir\n";

    fn place(storage: &str) -> std::result::Result<StoragePlace, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("storage.cfg"), CFG).unwrap();
        storage_place(dir.path(), &storage.parse().unwrap(), &"pve1".parse().unwrap())
    }

    #[test]
    fn a_storage_that_cannot_hold_a_ct_is_refused_with_the_reason() {
        let there = |storage| place(storage).map(|p| (p.dataset, p.mountpoint)).unwrap();
        assert_eq!(there("local-zfs"), ("rpool/data".into(), "/rpool/data".into()));
        assert_eq!(there("fast"), ("fast/ct".into(), "/srv/ct".into()));
        for (storage, word) in [
            ("local", "zfspool"),
            ("other", "rootdir"),
            ("away", "not for node"),
            ("off", "disabled"),
            ("none", "no storage"),
        ] {
            let error = place(storage).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn packages_that_are_too_old_are_named() {
        assert!(too_old("pve-container 6.1.1\nlxc-pve 6.0.5-2\n").is_empty());
        assert!(too_old("pve-container 6.1.10\nlxc-pve 6.0.5-11\n").is_empty());
        assert!(too_old("").is_empty());
        let old = too_old("pve-container 6.0.19\nlxc-pve 6.0.5-1\n");
        assert!(old[0].contains("pve-container 6.0.19") && old[1].contains("lxc-pve"), "{old:?}");
    }

    #[test]
    fn the_range_of_new_vmids_is_read() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(next_id(dir.path()), (100, 1_000_000));
        std::fs::write(dir.path().join("datacenter.cfg"), "keyboard: de\nnext-id: lower=200,upper=300\n")
            .unwrap();
        assert_eq!(next_id(dir.path()), (200, 300));
    }
}
