//! The root volume of a CT: a dataset `<pool>/subvol-<vmid>-disk-0`, which Proxmox VE takes for a volume of this CT by its
//! name alone. It holds mount points and nothing else; the pod's own containers have roots of their own.
//!
//! Moxlet makes it, since the API makes none without an archive; Proxmox VE mounts it at each start and destroys it with the
//! CT. A user property says that it is ours and whose: a dataset of the name without it belongs to somebody else.

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, lchown},
    path::Path,
    process::Stdio,
    time::Duration,
};

use async_trait::async_trait;
use moxlet_ids::SandboxId;
use moxlet_storage::mounts;
use tokio::process::Command;

use super::{StoragePlace, blocking};
use crate::{Error, INIT_IN_CT, IdMap, Result, error::io};

/// The property that says whose a dataset is.
const OWNER: &str = "dev.moxlet:owner";
const ZFS: &str = "zfs";
const LIMIT: Duration = Duration::from_secs(120);
const DIRS: [&str; 11] = ["bin", "dev", "etc", "mnt", "proc", "root", "run", "sbin", "sys", "tmp", "var"];
/// How often a dataset that is still busy is tried again.
const BUSY_TRIES: u32 = 20;
const BUSY_PAUSE: Duration = Duration::from_millis(250);

/// Whose a volume is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeOwner {
    /// There is none of the name.
    Nobody,
    /// This sandbox.
    Sandbox(SandboxId),
    /// Not Moxlet.
    Other,
}

/// What holds the root volumes of CTs.
#[async_trait]
pub trait Volumes: Send + Sync + std::fmt::Debug {
    /// Makes a volume of so many bytes for a sandbox and fills it; made again it is completed.
    /// [`Error::VolumeTaken`] if there is one of the name that is not this sandbox'.
    async fn create(&self, name: &str, bytes: u64, owner: &SandboxId, map: IdMap) -> Result<()>;
    /// Whose a volume is.
    async fn owner(&self, name: &str) -> Result<VolumeOwner>;
    /// Removes a volume of this sandbox with all snapshots of it. One of somebody else is left alone. Idempotent.
    async fn destroy(&self, name: &str, owner: &SandboxId) -> Result<()>;
}

/// Datasets on the pool (or a dataset) that a storage of type `zfspool` has.
#[derive(Debug)]
pub struct ZfsVolumes {
    pool: StoragePlace,
}

impl ZfsVolumes {
    /// Volumes on this storage.
    ///
    /// # Errors
    /// There is none of the name, or no `zfs` program.
    pub async fn open(place: StoragePlace) -> Result<Self> {
        let pool = place.dataset.as_str();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.:/".contains(c);
        if pool.is_empty() || pool.starts_with(['-', '/']) || !pool.chars().all(plain) {
            return Err(Error::Invalid {
                what: "pool".into(),
                value: pool.into(),
                reason: "it is no dataset's name".into(),
            });
        }
        run(&["list", "-H", "-o", "name", pool]).await?;
        Ok(Self { pool: place })
    }

    fn dataset(&self, name: &str) -> String {
        format!("{}/{name}", self.pool.dataset)
    }

    /// Fails if a volume would not be mounted where Proxmox VE binds it from: it would start the CT on something else. The table of
    /// mounts knows that without a program where the pool itself is mounted.
    async fn check_place(&self, name: &str) -> Result<()> {
        let StoragePlace { dataset, mountpoint } = &self.pool;
        let (source, at) = (dataset.clone(), mountpoint.clone());
        if blocking(move || Ok(mounts::is_mounted_from(&at, &source)?)).await? {
            return Ok(());
        }
        let volume = self.dataset(name);
        let text = run(&["get", "-Hp", "-o", "value", "mountpoint", &volume]).await?;
        if Path::new(text.trim()) == mountpoint.join(name) {
            return Ok(());
        }
        let at = mountpoint.display();
        Err(Error::Host(format!(
            "the dataset {volume} would be mounted at {:?}, and Proxmox VE looks for it below {at}: zfs set mountpoint={at} {dataset}, \
             or pvesm set STORAGE --mountpoint to where it is",
            text.trim(),
        )))
    }
}

#[async_trait]
impl Volumes for ZfsVolumes {
    async fn create(&self, name: &str, bytes: u64, owner: &SandboxId, map: IdMap) -> Result<()> {
        let dataset = self.dataset(name);
        let quota = format!("refquota={bytes}");
        let own = format!("{OWNER}={owner}");
        // Not mounted with all others at the boot: Proxmox VE mounts it when it starts the CT.
        let options =
            ["-o", "acltype=posixacl", "-o", "xattr=sa", "-o", "canmount=noauto", "-o", &quota, "-o", &own];
        let mut args = vec!["create"];
        args.extend(options);
        args.push(&dataset);
        match run(&args).await {
            Ok(_) => {}
            Err(error) if said(&error, "dataset already exists") => match self.owner(name).await? {
                VolumeOwner::Sandbox(id) if id == *owner => {}
                _ => return Err(Error::VolumeTaken(dataset)),
            },
            Err(error) => return Err(error),
        }
        self.check_place(name).await?;
        let place = self.pool.mountpoint.join(name);
        // Proxmox VE finds it mounted when it starts the CT.
        blocking(move || {
            moxlet_storage::mount_dataset(&dataset, &place)?;
            fill(&place, map)
        })
        .await
    }

    async fn owner(&self, name: &str) -> Result<VolumeOwner> {
        match run(&["get", "-H", "-o", "value", OWNER, &self.dataset(name)]).await {
            Ok(text) => Ok(text.trim().parse().map_or(VolumeOwner::Other, VolumeOwner::Sandbox)),
            Err(error) if said(&error, "dataset does not exist") => Ok(VolumeOwner::Nobody),
            Err(error) => Err(error),
        }
    }

    async fn destroy(&self, name: &str, owner: &SandboxId) -> Result<()> {
        let dataset = self.dataset(name);
        for attempt in 0..BUSY_TRIES {
            if self.owner(name).await? != VolumeOwner::Sandbox(owner.clone()) {
                return Ok(());
            }
            match run(&["destroy", "-r", &dataset]).await {
                Err(error) if said(&error, "busy") && attempt + 1 < BUSY_TRIES => {
                    tokio::time::sleep(BUSY_PAUSE).await;
                }
                Err(error) if said(&error, "dataset does not exist") => return Ok(()),
                done => return done.map(drop),
            }
        }
        Ok(())
    }
}

fn said(error: &Error, words: &str) -> bool {
    matches!(error, Error::Zfs { stderr, .. } if stderr.contains(words))
}

async fn run(args: &[&str]) -> Result<String> {
    let command = || format!("{ZFS} {}", args.join(" "));
    let child = Command::new(ZFS)
        .args(args)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(LIMIT, child).await;
    let output = output
        .map_err(|_| Error::Zfs {
            command: command(),
            stderr: format!("no answer within {} s", LIMIT.as_secs()),
        })?
        .map_err(|source| Error::Spawn { program: ZFS.into(), package: "zfsutils-linux", source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr: String = String::from_utf8_lossy(&output.stderr).trim().chars().take(1500).collect();
    Err(Error::Zfs { command: command(), stderr })
}

/// Makes the small root of a CT. No CT has run on it, so nothing in it leads elsewhere.
fn fill(root: &Path, map: IdMap) -> Result<()> {
    let own = |path: &Path| lchown(path, Some(map.host_base), Some(map.host_base)).map_err(io("own", path));
    own(root)?;
    for dir in DIRS {
        let path = root.join(dir);
        match fs::DirBuilder::new().mode(0o755).create(&path) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(io("create", path)(e)),
            _ => own(&path)?,
        }
    }
    let init = root.join(&INIT_IN_CT[1..]);
    let open = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o755).open(&init);
    open.map_err(io("create", &init))?;
    own(&init)?;
    // What `pct enter` runs.
    let shell = root.join("bin/sh");
    match std::os::unix::fs::symlink(INIT_IN_CT, &shell) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(io("create", shell)(e)),
        _ => own(&shell)?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_root_has_mount_points_and_a_shell_that_is_the_init() {
        let dir = tempfile::tempdir().unwrap();
        // The ids of whoever runs it, so that it needs no privilege.
        let map = IdMap { host_base: rustix::process::getuid().as_raw(), size: 1 };
        fill(dir.path(), map).unwrap();
        fill(dir.path(), map).unwrap();
        assert_eq!(fs::read_link(dir.path().join("bin/sh")).unwrap(), Path::new("/sbin/moxlet-init"));
        assert!(dir.path().join("sbin/moxlet-init").is_file() && dir.path().join("run").is_dir());
    }

    #[tokio::test]
    async fn a_pool_that_could_be_an_option_is_refused() {
        for bad in ["", "-r", "/tank", "a b"] {
            let place = StoragePlace { dataset: bad.to_owned(), mountpoint: "/x".into() };
            assert!(matches!(ZfsVolumes::open(place).await, Err(Error::Invalid { .. })), "{bad:?}");
        }
    }
}
