//! What the engine remembers of its CTs: one small file each, replaced as a whole.
//!
//! A record is written before anything else of a CT is made and removed after all else of it is gone: whatever a crash
//! leaves is found by it.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write as _},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use moxlet_ids::{PodUid, SandboxId, Vmid};
use moxlet_pve::{NodeName, config::LxcConfig};
use serde::{Deserialize, Serialize};

use super::{
    config::Named,
    marker::Mark,
    seen::{Seen, Unreported},
};
use crate::{Error, IdMap, Result, error::io, process::read_bounded};

const VERSION: u32 = 1;
const MAX: u64 = 1 << 20;

/// How far a CT is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Phase {
    /// Being made; found after a crash it is removed.
    Making,
    /// Complete.
    Made,
    /// Being removed; found after a crash that is ended.
    Removing,
}

/// A CT as it is remembered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    version: u32,
    pub(super) id: SandboxId,
    pub(super) phase: Phase,
    pub(super) vmid: Vmid,
    pub(super) node: NodeName,
    pub(super) uid: PodUid,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) attempt: u32,
    pub(super) map: IdMap,
    /// Whether it is in the pool that was configured.
    #[serde(default)]
    pub(super) pooled: bool,
    /// Whether Proxmox VE has to remove it: it was asked to start it or to put it into a pool, or somebody has edited it. Records
    /// of earlier versions do not say.
    #[serde(default = "yes")]
    pub(super) needs_api: bool,
    /// Addresses that were written into its configuration.
    pub(super) ips: Vec<IpAddr>,
    /// Whether its first interface asks for one by DHCP.
    pub(super) dhcp: bool,
    /// Its configuration as we last wrote or saw it.
    pub(super) known: String,
    /// Its notes as we last wrote them.
    pub(super) notes: String,
    /// How it was found by the last look, so that an agent that starts again does not tell it all again.
    #[serde(default)]
    pub(super) seen: Seen,
    /// What the last look found and may have told nobody, if the agent was killed.
    #[serde(rename = "unsaid", default, skip_serializing_if = "Vec::is_empty")]
    pub(super) unreported: Vec<Unreported>,
    /// What we are about to write, or were when a write failed or a crash came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    next: Option<Box<Written>>,
}

/// A configuration of our own and the notes in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Written {
    pub(super) known: String,
    pub(super) notes: String,
}

fn yes() -> bool {
    true
}

impl Record {
    pub(super) fn new(id: SandboxId, uid: PodUid, vmid: Vmid, node: NodeName, map: IdMap) -> Self {
        Self {
            version: VERSION,
            id,
            phase: Phase::Making,
            vmid,
            node,
            uid,
            namespace: String::new(),
            name: String::new(),
            attempt: 0,
            map,
            pooled: false,
            needs_api: false,
            ips: Vec::new(),
            dhcp: false,
            known: String::new(),
            notes: String::new(),
            seen: Seen::default(),
            unreported: Vec::new(),
            next: None,
        }
    }

    /// Notes what is about to be written.
    pub(super) fn intend(&mut self, next: Written) {
        self.next = Some(Box::new(next));
    }

    /// Takes what was about to be written for what is known if the CT's configuration says that it was, and forgets it otherwise:
    /// a change of ours must not look like somebody else's, nor the lack of it.
    pub(super) fn settle(&mut self, config: &LxcConfig) {
        let Some(next) = self.next.take() else { return };
        if config.to_file().is_ok_and(|text| text == next.known) {
            self.known = next.known;
            self.notes = next.notes;
        }
    }

    /// What its included file must say.
    pub(super) fn mark(&self) -> Mark {
        Mark::new(self.vmid, self.uid.clone(), self.id.clone(), self.node.clone())
    }

    /// The name of its root volume.
    pub(super) fn volume(&self) -> String {
        format!("subvol-{}-disk-0", self.vmid)
    }

    /// Who it is for.
    pub(super) fn named(&self) -> Named<'_> {
        Named {
            namespace: &self.namespace,
            name: &self.name,
            uid: self.uid.as_str(),
            attempt: self.attempt,
            sandbox: self.id.as_str(),
        }
    }
}

/// The directory of the records.
#[derive(Debug, Clone)]
pub(super) struct Records {
    dir: PathBuf,
    /// Held while one is read, changed and written.
    changing: Arc<Mutex<()>>,
}

impl Records {
    /// Takes over a directory, without replacements that a crash left half written.
    pub(super) fn open(dir: &Path) -> Self {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(|n| n.starts_with('.')) {
                let _ = fs::remove_file(entry.path());
            }
        }
        Self { dir: dir.to_owned(), changing: Arc::default() }
    }

    fn path(&self, id: &SandboxId) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }

    pub(super) fn get(&self, id: &SandboxId) -> Result<Option<Record>> {
        read(&self.path(id))
    }

    /// Changes a record as it stands there by now, and returns it.
    pub(super) fn change(&self, id: &SandboxId, change: impl FnOnce(&mut Record)) -> Result<Record> {
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut record) = self.get(id)? else { return Err(Error::NotFound(id.to_string())) };
        let before = record.clone();
        change(&mut record);
        if record != before {
            self.put(&record)?;
        }
        Ok(record)
    }

    pub(super) fn put(&self, record: &Record) -> Result<()> {
        let (path, draft) = (self.path(&record.id), self.dir.join(format!(".{}.new", record.id)));
        let bytes = serde_json::to_vec(record).map_err(|e| io("write", &path)(e.into()))?;
        let write = || {
            let mut file = File::create(&draft)?;
            file.write_all(&bytes)?;
            file.sync_data()?;
            fs::rename(&draft, &path)?;
            File::open(&self.dir)?.sync_all()
        };
        write().map_err(io("write", &path))
    }

    pub(super) fn remove(&self, id: &SandboxId) -> Result<()> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(io("remove", path)(e)),
            _ => Ok(()),
        }
    }

    /// All of them. One that cannot be read is an error: its CT must not be taken for nobody's.
    pub(super) fn all(&self) -> Result<Vec<Record>> {
        self.each()?.into_iter().map(|(_, record)| record).collect()
    }

    /// Each by its file's name, as far as it can be read.
    pub(super) fn each(&self) -> Result<Vec<(String, Result<Record>)>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(io("read", &self.dir))? {
            let path = entry.map_err(io("read", &self.dir))?.path();
            let Some(name) = path.file_stem().and_then(|n| n.to_str()) else { continue };
            if path.extension().is_some_and(|e| e == "json")
                && let Some(record) = read(&path).transpose()
            {
                all.push((name.to_owned(), record));
            }
        }
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(all)
    }
}

fn read(path: &Path) -> Result<Option<Record>> {
    let text = match read_bounded(path, MAX) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io("read", path)(e)),
    };
    let record: Record = serde_json::from_str(&text).map_err(|e| io("understand", path)(e.into()))?;
    if record.version > VERSION {
        return Err(Error::Host(format!("{} is of a later version of Moxlet", path.display())));
    }
    Ok(Some(record))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn what_was_to_be_written_is_known_only_if_it_was_written() {
        let node = "pve1".parse().unwrap();
        let mut record =
            Record::new(SandboxId::random(), "u".parse().unwrap(), Vmid::MIN, node, IdMap::default());
        let config = |memory| LxcConfig { memory: Some(memory), ..LxcConfig::default() };
        record.known = config(1).to_file().unwrap();
        let next = || Written { known: config(2).to_file().unwrap(), notes: "new".into() };
        record.intend(next());
        record.settle(&config(1));
        assert_eq!((record.known.as_str(), record.notes.as_str()), ("memory: 1\n", ""));
        record.intend(next());
        record.settle(&config(2));
        assert_eq!((record.known.as_str(), record.notes.as_str()), ("memory: 2\n", "new"));
        assert_eq!(record.next, None);
    }

    #[test]
    fn a_record_of_an_earlier_version_is_of_a_ct_that_may_have_run() {
        let id = SandboxId::random();
        let node = "pve1".parse().unwrap();
        let record = Record::new(id, "u".parse().unwrap(), Vmid::MIN, node, IdMap::default());
        let mut json = serde_json::to_value(&record).unwrap();
        assert!(json.as_object_mut().unwrap().remove("needsApi").is_some());
        assert!(serde_json::from_value::<Record>(json).unwrap().needs_api);
    }

    #[test]
    fn what_is_put_is_found_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path());
        let id = SandboxId::random();
        let record = Record::new(
            id.clone(),
            "u".parse().unwrap(),
            Vmid::MIN,
            "pve1".parse().unwrap(),
            IdMap::default(),
        );
        records.put(&record).unwrap();
        fs::write(dir.path().join(".x.new"), "{").unwrap();
        assert_eq!(records.all().unwrap(), std::slice::from_ref(&record));
        drop(Records::open(dir.path()));
        assert!(!dir.path().join(".x.new").exists());
        assert_eq!(records.get(&id).unwrap(), Some(record));
        assert!(records.change(&id, |r| r.needs_api = true).unwrap().needs_api);
        assert!(records.get(&id).unwrap().unwrap().needs_api);
        records.remove(&id).unwrap();
        records.remove(&id).unwrap();
        assert_eq!(records.get(&id).unwrap(), None);
        assert!(matches!(records.change(&id, |_| {}), Err(Error::NotFound(_))));
        fs::write(dir.path().join("a.json"), "nonsense").unwrap();
        assert!(records.all().is_err());
    }
}
