//! What the agent remembers on disk: one small file for each sandbox and container, and one of the last notices.
//!
//! A file is replaced as a whole (temporary file, fsync, rename), so that a crash leaves the old or the new one. What a
//! host really has (CTs, mounts, roots, addresses) is compared with it at the start; see `reconcile`. No environment
//! variable is written: they may hold secrets.

use std::{
    collections::BTreeMap,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use moxlet_errors::chain;
use moxlet_ids::{ContainerId, Digest, PodUid, SandboxId};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tracing::error;

use crate::error::{Error, Result};

/// The format of the files.
const VERSION: u32 = 1;
/// The largest file that is read, in bytes: annotations of a pod are at most 256 KiB.
const MAX_FILE: u64 = 2 << 20;

/// How far a sandbox is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum SandboxPhase {
    /// Being made; found after a crash it is removed.
    Creating,
    /// Its CT runs and has its network.
    Ready,
    /// Its CT is stopped, its network is released.
    NotReady,
    /// Being removed; found after a crash that is ended.
    Removing,
}

/// A sandbox as it is remembered.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SandboxRecord {
    version: u32,
    /// Its id, also the CT's name.
    pub(crate) id: SandboxId,
    /// How far it is.
    pub(crate) phase: SandboxPhase,
    /// Nanoseconds since 1970.
    pub(crate) created_at_ns: i64,
    /// The pod.
    pub(crate) namespace: String,
    /// The pod.
    pub(crate) name: String,
    /// The pod.
    pub(crate) uid: PodUid,
    /// How many sandboxes the pod had before.
    pub(crate) attempt: u32,
    /// The pod's host name.
    pub(crate) hostname: String,
    /// Where its logs lie on the host.
    pub(crate) log_directory: Option<PathBuf>,
    /// CRI labels.
    pub(crate) labels: BTreeMap<String, String>,
    /// CRI annotations.
    pub(crate) annotations: BTreeMap<String, String>,
    /// Its addresses.
    pub(crate) ips: Vec<IpAddr>,
    /// Whether its containers see one another's processes.
    pub(crate) share_pids: bool,
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Exit {
    /// 128 + n after signal n.
    pub(crate) code: i32,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, `ContainerStatusUnknown`.
    pub(crate) reason: String,
    /// Why it could not be started.
    pub(crate) message: String,
    /// Nanoseconds since 1970, 0 if it never started.
    pub(crate) started_at_ns: i64,
    /// Nanoseconds since 1970.
    pub(crate) finished_at_ns: i64,
}

/// A container as it is remembered.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ContainerRecord {
    version: u32,
    /// Its id.
    pub(crate) id: ContainerId,
    /// Its sandbox.
    pub(crate) sandbox: SandboxId,
    /// Whether it is complete; found otherwise after a crash it is removed.
    pub(crate) created: bool,
    /// Whether `StartContainer` was called.
    pub(crate) started: bool,
    /// Nanoseconds since 1970.
    pub(crate) created_at_ns: i64,
    /// Its name in the pod.
    pub(crate) name: String,
    /// How many of the name were before.
    pub(crate) attempt: u32,
    /// The image as it was asked for.
    pub(crate) image: String,
    /// The image as the user wrote it.
    pub(crate) user_image: String,
    /// The image's digest reference, or its id where it has none.
    pub(crate) image_ref: String,
    /// The image's id.
    pub(crate) image_id: Digest,
    /// CRI labels.
    pub(crate) labels: BTreeMap<String, String>,
    /// CRI annotations.
    pub(crate) annotations: BTreeMap<String, String>,
    /// Its log on the host; none: it is not kept.
    pub(crate) log_file: Option<PathBuf>,
    /// Whether it has a terminal.
    pub(crate) tty: bool,
    /// Whether it has a standard input.
    pub(crate) stdin: bool,
    /// The signal that asks it to end.
    pub(crate) stop_signal: i32,
    /// Bytes of memory it may use.
    pub(crate) memory_limit: Option<u64>,
    /// What it may use, as the request named it; unknown of one that an older version made.
    #[serde(default)]
    pub(crate) resources: ResourcesRecord,
    /// What is mounted in it, for `ContainerStatus`.
    pub(crate) mounts: Vec<MountRecord>,
    /// Who its first process is; unknown of one that an older version made.
    #[serde(default)]
    pub(crate) user: Option<UserRecord>,
    /// How it ended.
    pub(crate) exit: Option<Exit>,
}

/// Who a container's first process is, by the ids in the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct UserRecord {
    /// User.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
    /// All groups; the alias is the OCI spec's name for them.
    #[serde(alias = "additionalGids")]
    pub(crate) groups: Vec<u32>,
}

/// What a container may use, by CRI's names; 0 and empty: not named.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ResourcesRecord {
    /// Microseconds.
    pub(crate) cpu_period: i64,
    /// Microseconds of a period; -1: no quota.
    pub(crate) cpu_quota: i64,
    /// As cgroup v1 counts them.
    pub(crate) cpu_shares: i64,
    /// Bytes; -1: unlimited.
    pub(crate) memory_limit: i64,
    /// Bytes, of memory and swap together.
    pub(crate) memory_swap_limit: i64,
    /// -1000 to 1000.
    pub(crate) oom_score_adj: i64,
    /// Files of cgroup v2.
    pub(crate) unified: BTreeMap<String, String>,
}

/// A mount of a container, as `ContainerStatus` shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct MountRecord {
    /// Where on the host.
    pub(crate) host_path: String,
    /// Where in the container.
    pub(crate) container_path: String,
    /// Whether it is read-only.
    pub(crate) read_only: bool,
}

impl SandboxRecord {
    /// A record of the present format; the rest is filled in by the caller.
    pub(crate) fn new(id: SandboxId, uid: PodUid, created_at_ns: i64) -> Self {
        Self {
            version: VERSION,
            id,
            phase: SandboxPhase::Creating,
            created_at_ns,
            namespace: String::new(),
            name: String::new(),
            uid,
            attempt: 0,
            hostname: String::new(),
            log_directory: None,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            ips: Vec::new(),
            share_pids: false,
        }
    }
}

impl ContainerRecord {
    /// A record of the present format; the rest is filled in by the caller.
    pub(crate) fn new(id: ContainerId, sandbox: SandboxId, image_id: Digest, created_at_ns: i64) -> Self {
        Self {
            version: VERSION,
            id,
            sandbox,
            created: false,
            started: false,
            created_at_ns,
            name: String::new(),
            attempt: 0,
            image: String::new(),
            user_image: String::new(),
            image_ref: String::new(),
            image_id,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            log_file: None,
            tty: false,
            stdin: false,
            stop_signal: 15,
            memory_limit: None,
            resources: ResourcesRecord::default(),
            mounts: Vec::new(),
            user: None,
            exit: None,
        }
    }
}

/// What somebody did to a CT on the host; empty where it is no pod's.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NoticeRecord {
    pub(crate) sandbox: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) reason: String,
    pub(crate) message: String,
    pub(crate) warning: bool,
    pub(crate) at_ns: i64,
}

/// The last notices.
#[derive(Debug, Serialize, Deserialize)]
struct NoticesRecord {
    version: u32,
    notices: Vec<NoticeRecord>,
}

/// The name of the file of notices.
const NOTICES: &str = "notices";

/// The files.
#[derive(Debug)]
pub(crate) struct Ledger {
    dir: PathBuf,
    sandboxes: PathBuf,
    containers: PathBuf,
}

fn fault(path: &Path, reason: impl std::fmt::Display) -> Error {
    Error::Ledger { path: path.to_owned(), reason: reason.to_string() }
}

/// Replaces a file as a whole.
fn replace(dir: &Path, name: &str, record: &impl Serialize) -> Result<()> {
    let path = dir.join(format!("{name}.json"));
    let bytes = serde_json::to_vec(record).map_err(|e| fault(&path, e))?;
    moxlet_files::replace(&path, &bytes, 0o600).map_err(|e| fault(&path, e))
}

fn remove(dir: &Path, name: &str) -> Result<()> {
    let path = dir.join(format!("{name}.json"));
    match fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(fault(&path, e)),
        _ => Ok(()),
    }
}

/// Why a record is not there.
enum Unread {
    /// It is no record: cut, overwritten, somebody else's.
    Damaged(Error),
    /// It may be one: the disk does not give it, or it is of a later version.
    Unknown(Error),
}

impl From<Unread> for Error {
    fn from(unread: Unread) -> Self {
        let (Unread::Damaged(error) | Unread::Unknown(error)) = unread;
        error
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> std::result::Result<T, Unread> {
    let damaged = |reason: String| Unread::Damaged(fault(path, reason));
    let bytes = moxlet_files::read_bounded(path, MAX_FILE).map_err(|e| match e.kind() {
        std::io::ErrorKind::FileTooLarge => damaged(e.to_string()),
        _ => Unread::Unknown(fault(path, e)),
    })?;
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(v) if v <= u64::from(VERSION) => {
            serde_json::from_value(value).map_err(|e| damaged(e.to_string()))
        }
        Some(v) => Err(Unread::Unknown(fault(
            path,
            format!("is of format {v}; this version of Moxlet reads up to {VERSION}"),
        ))),
        None => Err(damaged("has no version".to_owned())),
    }
}

/// All records of a directory; what is damaged is moved to `aside`.
fn read_all<T: DeserializeOwned>(dir: &Path, aside: &Path) -> Result<Vec<T>> {
    let mut records = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| fault(dir, e))? {
        let path = entry.map_err(|e| fault(dir, e))?.path();
        if path.extension().and_then(|e| e.to_str()) != Some("json") {
            // What a crash left of a replacement.
            let _ = fs::remove_file(&path);
            continue;
        }
        match read(&path) {
            Ok(record) => records.push(record),
            Err(Unread::Unknown(error)) => return Err(error),
            Err(Unread::Damaged(error)) => {
                let kept = aside.join(path.file_name().unwrap_or_default());
                fs::create_dir_all(aside)
                    .and_then(|()| fs::rename(&path, &kept))
                    .map_err(|e| fault(&path, e))?;
                error!(
                    error = chain(&error),
                    kept = %kept.display(),
                    "a record of the ledger is damaged: it is put aside, and what it was of is removed from this host"
                );
            }
        }
    }
    Ok(records)
}

impl Ledger {
    /// Opens or makes the directory of the ledger.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let (sandboxes, containers) = (dir.join("sandboxes"), dir.join("containers"));
        let ledger = Self { dir: dir.to_owned(), sandboxes, containers };
        for dir in [&ledger.sandboxes, &ledger.containers] {
            fs::create_dir_all(dir).map_err(|e| fault(dir, e))?;
        }
        Ok(ledger)
    }

    /// Writes a sandbox.
    pub(crate) fn put_sandbox(&self, record: &SandboxRecord) -> Result<()> {
        replace(&self.sandboxes, record.id.as_str(), record)
    }

    /// Forgets a sandbox. Idempotent.
    pub(crate) fn remove_sandbox(&self, id: &SandboxId) -> Result<()> {
        remove(&self.sandboxes, id.as_str())
    }

    /// Writes a container.
    pub(crate) fn put_container(&self, record: &ContainerRecord) -> Result<()> {
        replace(&self.containers, record.id.as_str(), record)
    }

    /// Forgets a container. Idempotent.
    pub(crate) fn remove_container(&self, id: &ContainerId) -> Result<()> {
        remove(&self.containers, id.as_str())
    }

    /// Writes the last notices, few and short ones.
    pub(crate) fn put_notices(&self, notices: Vec<NoticeRecord>) -> Result<()> {
        replace(&self.dir, NOTICES, &NoticesRecord { version: VERSION, notices })
    }

    /// The notices as they were written last.
    ///
    /// # Errors
    /// The file cannot be read. No pod hangs on it.
    pub(crate) fn notices(&self) -> Result<Vec<NoticeRecord>> {
        let path = self.dir.join(format!("{NOTICES}.json"));
        if !path.exists() {
            return Ok(Vec::new());
        }
        Ok(read::<NoticesRecord>(&path)?.notices)
    }

    /// All that is remembered of sandboxes and containers.
    ///
    /// # Errors
    /// A file that the disk does not give, or that a later version wrote, stops the agent: to guess would be to lose a pod. One that is no
    /// record is put aside, and the log names it.
    pub(crate) fn load(&self) -> Result<(Vec<SandboxRecord>, Vec<ContainerRecord>)> {
        let aside = self.dir.join("damaged");
        Ok((read_all(&self.sandboxes, &aside)?, read_all(&self.containers, &aside)?))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn record() -> SandboxRecord {
        SandboxRecord::new(SandboxId::random(), "uid-1".parse().unwrap(), 1)
    }

    #[test]
    fn what_is_put_is_loaded_and_what_is_removed_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        let (one, two) = (record(), record());
        ledger.put_sandbox(&one).unwrap();
        ledger.put_sandbox(&two).unwrap();
        ledger.remove_sandbox(&one.id).unwrap();
        ledger.remove_sandbox(&one.id).unwrap();
        let (sandboxes, containers) = Ledger::open(dir.path()).unwrap().load().unwrap();
        assert_eq!(sandboxes.iter().map(|s| s.id.clone()).collect::<Vec<_>>(), [two.id]);
        assert!(containers.is_empty());
    }

    #[test]
    fn a_half_written_replacement_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        fs::write(dir.path().join("sandboxes/.x.json.new"), b"{").unwrap();
        assert!(ledger.load().unwrap().0.is_empty());
        assert!(!dir.path().join("sandboxes/.x.json.new").exists());
    }

    #[test]
    fn a_file_that_was_cut_is_put_aside_and_the_others_are_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        let (whole, cut) = (record(), record());
        for record in [&whole, &cut] {
            ledger.put_sandbox(record).unwrap();
        }
        let path = dir.path().join(format!("sandboxes/{}.json", cut.id));
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        for _ in 0..2 {
            let (sandboxes, _) = ledger.load().unwrap();
            assert_eq!(sandboxes.iter().map(|s| &s.id).collect::<Vec<_>>(), [&whole.id]);
        }
        assert!(!path.exists() && dir.path().join(format!("damaged/{}.json", cut.id)).exists());
    }

    #[test]
    fn a_file_of_a_later_format_stops_the_start_and_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        fs::write(dir.path().join("sandboxes/a.json"), br#"{"version": 9}"#).unwrap();
        let error = ledger.load().unwrap_err().to_string();
        assert!(error.contains("a.json") && error.contains("format 9"), "{error}");
    }
}
