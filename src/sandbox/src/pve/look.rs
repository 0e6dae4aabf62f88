//! What somebody else did to the CTs of pods: each look compares what is on this host with what is remembered. Only local
//! files are read, so that an idle host makes no calls.
//!
//! `docs/proxmox.md` has the table of what follows from what.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{MutexGuard, PoisonError},
};

use moxlet_ids::{SandboxId, Vmid};
use moxlet_pve::config::LxcConfig;

use super::{
    Inner,
    file::{Content, Held, has_address},
    marker,
    record::{Phase, Record},
    seen::{Astray, Cluster, Seen, Unreported, Word, now_ns, observation, word},
    standing::Standing,
};
use crate::{Error, Observation, Result};

/// Keys that go with what is told by itself: a lock, and the snapshot that a CT descends from. A backup's snapshot stands there for a
/// moment without the backup's lock.
const BESIDE: [&str; 2] = ["lock", "parent"];
/// Keys that say what a CT is rather than what it may use.
const LABELS: [&str; 3] = ["description", "hostname", "tags"];

/// What was said and is remembered with no CT; forgotten with the process.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// Of whom the last look has told something.
    sandboxes: BTreeSet<SandboxId>,
    strangers: BTreeSet<Vmid>,
    /// Numbers that no pod gets since the cluster has rules for them.
    pub(super) rules: BTreeSet<Vmid>,
    /// Why a CT could not be looked at, by its record.
    troubles: BTreeMap<String, String>,
}

/// What is kept for a look that comes after a kill; there is more only where the agent is killed again and again.
const UNREPORTED: usize = 32;

/// A configuration that is not the one that is known.
struct Edited {
    _held: Held,
    config: LxcConfig,
    text: String,
}

impl Inner {
    /// What was done to the CTs since the last look. One that cannot be looked at holds up no other.
    pub(super) fn look(&self) -> Result<Vec<Observation>> {
        let mut said = Vec::new();
        let mut records = Vec::new();
        let mut troubles = BTreeMap::new();
        for (name, record) in self.records.each()? {
            match record {
                Ok(record) => records.push(record),
                Err(error) => drop(troubles.insert(name, with_causes(&error))),
            }
        }
        let all_known = troubles.is_empty();
        let quorate = !matches!(self.folder.check_quorum(Path::new("")), Err(Error::NoQuorum { .. }));
        let before = std::mem::take(&mut self.told().sandboxes);
        for record in records.iter().filter(|r| r.phase == Phase::Made) {
            match self.look_at(record, quorate, before.contains(&record.id)) {
                Ok(words) => {
                    said.extend(words.into_iter().filter_map(|word| word.observation(&record.id)));
                }
                // It went meanwhile.
                Err(Error::NotFound(_)) => {}
                Err(error) => drop(troubles.insert(record.id.to_string(), with_causes(&error))),
            }
        }
        let mut told = self.told();
        told.sandboxes = said.iter().filter_map(|seen| seen.sandbox.clone()).collect();
        for (record, error) in &troubles {
            if told.troubles.get(record) != Some(error) {
                tracing::warn!(record, error, "cannot look what was done to a CT; it is looked at again");
            }
        }
        told.troubles = troubles;
        // A CT whose record cannot be read is no stranger.
        if !all_known {
            return Ok(said);
        }
        match self.strangers(&records) {
            Ok(strangers) => {
                let new = strangers.difference(&told.strangers);
                said.extend(new.map(|vmid| observation(None, stranger(*vmid), now_ns())));
                told.strangers = strangers;
            }
            Err(error) => tracing::debug!(%error, "cannot look for copies of CTs"),
        }
        Ok(said)
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was done to one CT. It is remembered with it, and said until the look after: `said` is whether the last one has told of
    /// it, and nobody was killed since.
    fn look_at(&self, record: &Record, quorate: bool, said: bool) -> Result<Vec<Unreported>> {
        let standing = match self.standing(record) {
            Ok(standing) => Some(standing),
            Err(Error::NoClusterFs { .. }) => None,
            Err(error) => return Err(error),
        };
        let now = match &standing {
            Some(standing) => self.seen_of(record, standing, quorate),
            // Nothing else is known then.
            None => Seen { cluster: Some(Cluster::Away), ..record.seen.clone() },
        };
        let edited = match &standing {
            Some(Standing::Ours(content)) if content.config.lock.is_none() => self.edited(record, content)?,
            _ => None,
        };
        let record = self.records.change(&record.id, |r| {
            let now = Seen { asked_to_end: r.seen.asked_to_end, ..now };
            let mut words = differences(r, &r.seen, &now);
            r.seen = now;
            if let Some(edited) = edited.filter(|_| r.phase == Phase::Made) {
                words.extend(accept(r, edited));
            }
            if said {
                r.unreported.clear();
            }
            r.unreported.extend(words.into_iter().map(Unreported::new));
            r.unreported.drain(..r.unreported.len().saturating_sub(UNREPORTED));
        })?;
        Ok(record.unreported)
    }

    fn seen_of(&self, record: &Record, standing: &Standing, quorate: bool) -> Seen {
        let ours = matches!(standing, Standing::Ours(_));
        let astray = match standing {
            Standing::Ours(_) => None,
            Standing::Gone => Some((Astray::Deleted, "was deleted on the host".to_owned())),
            Standing::Destroyed => Some((
                Astray::Deleted,
                "was deleted on the host; its file is left with `lock: destroyed`".to_owned(),
            )),
            Standing::Moved(node) => Some((
                Astray::Migrated,
                format!(
                    "was migrated to host {node}, where it cannot start; migrate it back, or delete the pod and the CT"
                ),
            )),
            Standing::Torn => Some((Astray::Foreign, "has a file that cannot be read".to_owned())),
            Standing::Foreign { reason, .. } => {
                Some((Astray::Foreign, format!("is not Moxlet's any more: {reason}; it is left as it is")))
            }
        };
        let (lock, sections) = match standing {
            Standing::Ours(content) => (content.config.lock.clone(), content.sections.clone()),
            _ => (None, Vec::new()),
        };
        Seen {
            astray,
            lock,
            frozen: ours && self.inits.is_frozen(&record.id),
            ha: self.folder.is_under_ha(record.vmid),
            sections,
            cluster: (!quorate).then_some(Cluster::NoQuorum),
            running: ours && self.inits.init(&record.id).is_some(),
            asked_to_end: false,
        }
    }

    /// The configuration of a CT if it is not the one that is known. While somebody is changing it, it is looked at again later.
    fn edited(&self, record: &Record, content: &Content) -> Result<Option<Edited>> {
        if content.config.to_file().is_ok_and(|text| text == record.known) {
            return Ok(None);
        }
        // Under the CT's lock, as our own changes: one of those must not look like somebody else's.
        let Some(held) = self.folder.try_lock(record.vmid)? else { return Ok(None) };
        let Standing::Ours(content) = self.standing(record)? else { return Ok(None) };
        let Ok(text) = content.config.to_file() else { return Ok(None) };
        Ok(Some(Edited { _held: held, config: content.config, text }))
    }

    /// CTs on this host that include a file of ours and have no record: copies, restored ones, left ones.
    fn strangers(&self, records: &[Record]) -> Result<BTreeSet<Vmid>> {
        let mut found = BTreeSet::new();
        for vmid in self.folder.own_cts()? {
            if records.iter().any(|r| r.vmid == vmid) {
                continue;
            }
            let Ok(Some(content)) = self.folder.read(vmid) else { continue };
            if marker::resembles(&self.layout.includes, &content.config) {
                found.insert(vmid);
            }
        }
        Ok(found)
    }
}

/// Takes an edit over as what holds from now on; says what it was.
fn accept(record: &mut Record, edited: Edited) -> Vec<Word> {
    record.settle(&edited.config);
    if record.known == edited.text {
        return Vec::new();
    }
    let known = LxcConfig::from_file(&record.known).map(|f| f.config).unwrap_or_default();
    let mut words = edits(record, &known, &edited.config);
    words.extend(readdressed(record, &known, &edited.config));
    record.known = edited.text;
    record.needs_api = true;
    words
}

/// What follows from an edit that took an address of the pod away: everybody is told the one that the pod was given.
fn readdressed(record: &Record, known: &LxcConfig, now: &LxcConfig) -> Option<Word> {
    let lost = record.ips.iter().find(|ip| has_address(known, **ip) && !has_address(now, **ip))?;
    let text = format!(
        "CT {} was given another address on the host: the pod's is {lost}, by which it is looked for; replace the pod to have it right",
        record.vmid
    );
    Some(word("CTReaddressed", true, text))
}

fn stranger(vmid: Vmid) -> Word {
    let message = format!(
        "CT {vmid} includes a file of Moxlet's and belongs to no pod of this host: a copy, a restored backup, or left by an agent \
         whose directory was removed; it is left as it is"
    );
    word("CTForeign", true, message)
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// That the cluster's file system takes no changes, or takes them again.
fn of_cluster(ct: &str, cluster: Option<Cluster>) -> Word {
    let (what, until) = match cluster {
        Some(Cluster::NoQuorum) => ("the cluster has no quorum", "it has"),
        Some(Cluster::Away) => {
            ("the cluster's file system is not mounted on the host (service pve-cluster)", "it is")
        }
        None => {
            return word("ClusterBack", false, format!("{ct} can be changed again: the cluster is back"));
        }
    };
    let text = format!("{what}: {ct} goes on; it is neither started, changed nor deleted until {until}");
    word("ClusterLost", true, text)
}

/// The section that a backup in snapshot mode has in the file while it runs.
const BACKUP: &str = "vzdump";

/// What changed between two looks.
fn differences(record: &Record, before: &Seen, now: &Seen) -> Vec<Word> {
    let ct = format!("CT {}", record.vmid);
    let mut words = Vec::new();
    if before.astray != now.astray {
        match &now.astray {
            Some((astray, text)) => words.push(word(astray.reason(), true, format!("{ct} {text}"))),
            None => words.push(word("CTBack", false, format!("{ct} is here again as it was"))),
        }
    }
    if before.cluster != now.cluster {
        words.push(of_cluster(&ct, now.cluster));
    }
    if before.running && !now.running && now.astray.is_none() && !now.asked_to_end {
        let text = "has ended without Moxlet having asked for it: it was stopped on the host, the host went down, or its first process \
                    ended; the pod's restart policy decides";
        words.push(word("CTStopped", false, format!("{ct} {text}")));
    }
    if before.lock != now.lock {
        match (&before.lock, &now.lock) {
            (_, Some(lock)) => words.push(word(
                "CTLocked",
                false,
                format!(
                    "{ct} is locked ({lock}): it is neither stopped, changed nor deleted until that is over"
                ),
            )),
            (Some(lock), None) if now.astray.is_none() => {
                words.push(word("CTUnlocked", false, format!("{ct} is not locked ({lock}) any more")));
            }
            _ => {}
        }
    }
    if before.frozen != now.frozen {
        words.push(if now.frozen {
            word(
                "CTFrozen",
                false,
                format!("{ct} is frozen: it is neither stopped nor deleted until it is thawed"),
            )
        } else {
            word("CTThawed", false, format!("{ct} is not frozen any more"))
        });
    }
    if before.ha != now.ha {
        words.push(if now.ha {
            let text =
                "is a resource of HA: HA starts and stops it, Moxlet does not restart it; remove it from HA";
            word("CTUnderHA", true, format!("{ct} {text}"))
        } else {
            word("CTNotUnderHA", false, format!("{ct} is no resource of HA any more"))
        });
    }
    for section in now.sections.iter().filter(|s| !before.sections.contains(s) && *s != BACKUP) {
        words.push(if section == "pve:pending" {
            word("CTEdited", false, format!("{ct} has changes that wait for its next start"))
        } else {
            word("CTSnapshot", false, format!("{ct} has a snapshot {section}; it goes with the pod"))
        });
    }
    words
}

/// What an edit changed.
fn edits(record: &Record, known: &LxcConfig, now: &LxcConfig) -> Vec<Word> {
    let pairs = |config: &LxcConfig| -> BTreeMap<String, String> {
        let raw = config.lxc.iter().map(|(k, v)| (format!("{k} {v}"), String::new()));
        let raw = raw.chain(config.unread.iter().map(|line| (line.clone(), String::new())));
        config.pairs().into_iter().filter(|(k, _)| !BESIDE.contains(&k.as_str())).chain(raw).collect()
    };
    let (old, new) = (pairs(known), pairs(now));
    let mut labels = Vec::new();
    let mut limits = Vec::new();
    let keys: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    for key in keys {
        let (from, to) = (old.get(key), new.get(key));
        if from == to {
            continue;
        }
        let cut = |v: Option<&String>| v.map_or_else(|| "none".to_owned(), |v| v.chars().take(60).collect());
        if LABELS.contains(&key.as_str()) {
            labels.push(if key == "hostname" {
                format!("{key} {} to {}", cut(from), cut(to))
            } else {
                key.clone()
            });
        } else {
            limits.push(format!("{key} {} to {}", cut(from), cut(to)));
        }
    }
    let ct = format!("CT {}", record.vmid);
    let mut words = Vec::new();
    if !labels.is_empty() {
        let text = "was relabelled on the host";
        words.push(word("CTRelabelled", false, format!("{ct} {text}: {}; it stays so", labels.join(", "))));
    }
    if !limits.is_empty() {
        let text = "was edited on the host";
        words.push(word(
            "CTEdited",
            true,
            format!("{ct} {text}: {}; it stays so until the pod is replaced", limits.join(", ")),
        ));
    }
    words
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use moxlet_ids::Vmid;

    use super::*;
    use crate::IdMap;

    fn record() -> Record {
        let id = SandboxId::random();
        Record::new(id, "u".parse().unwrap(), Vmid::MIN, "pve1".parse().unwrap(), IdMap::default())
    }

    fn reasons(words: &[Word]) -> Vec<&'static str> {
        words.iter().map(|w| w.reason).collect()
    }

    #[test]
    fn each_change_is_said_once_and_its_end_as_well() {
        let record = record();
        let quiet = Seen::default();
        let locked = Seen { lock: Some("backup".into()), frozen: true, ha: true, ..Seen::default() };
        assert_eq!(reasons(&differences(&record, &quiet, &locked)), ["CTLocked", "CTFrozen", "CTUnderHA"]);
        assert!(differences(&record, &locked, &locked).is_empty());
        assert_eq!(
            reasons(&differences(&record, &locked, &quiet)),
            ["CTUnlocked", "CTThawed", "CTNotUnderHA"]
        );
        let gone = Seen { astray: Some((Astray::Deleted, "was deleted".into())), ..Seen::default() };
        assert_eq!(reasons(&differences(&record, &quiet, &gone)), ["CTDeleted"]);
        assert_eq!(reasons(&differences(&record, &gone, &quiet)), ["CTBack"]);
        let lost = Seen { cluster: Some(Cluster::NoQuorum), ..Seen::default() };
        assert_eq!(reasons(&differences(&record, &quiet, &lost)), ["ClusterLost"]);
        assert_eq!(reasons(&differences(&record, &lost, &quiet)), ["ClusterBack"]);
        let runs = Seen { running: true, ..Seen::default() };
        assert!(differences(&record, &quiet, &runs).is_empty());
        assert_eq!(reasons(&differences(&record, &runs, &quiet)), ["CTStopped"]);
        let asked = Seen { asked_to_end: true, ..Seen::default() };
        assert!(differences(&record, &runs, &asked).is_empty());
        assert_eq!(reasons(&differences(&record, &runs, &gone)), ["CTDeleted"]);
        let snapshot = Seen { sections: vec!["before-update".into()], ..Seen::default() };
        assert_eq!(reasons(&differences(&record, &quiet, &snapshot)), ["CTSnapshot"]);
        let backup = Seen { sections: vec!["vzdump".into()], ..Seen::default() };
        assert!(differences(&record, &quiet, &backup).is_empty(), "a backup's own goes with the backup");
    }

    #[test]
    fn what_is_remembered_of_a_reason_that_is_not_known_is_left_out() {
        let id = SandboxId::random();
        let unreported = Unreported::new(word("CTLocked", true, "it is locked"));
        let seen = unreported.clone().observation(&id).unwrap();
        assert_eq!((seen.reason, seen.warning, seen.at_ns), ("CTLocked", true, unreported.at_ns));
        assert!(Unreported { reason: "CTOther".into(), ..unreported }.observation(&id).is_none());
        for reason in [Astray::Deleted, Astray::Migrated, Astray::Foreign].map(Astray::reason) {
            assert!(super::super::seen::REASONS.contains(&reason));
        }
    }

    #[test]
    fn an_edit_names_what_was_changed_from_and_to() {
        let known = LxcConfig { memory: Some(512), hostname: Some("a".into()), ..LxcConfig::default() };
        let mut now = known.clone();
        now.memory = Some(1024);
        now.lock = Some("backup".into());
        let words = edits(&record(), &known, &now);
        assert_eq!(reasons(&words), ["CTEdited"]);
        assert!(words[0].message.contains("memory 512 to 1024"), "{}", words[0].message);
        now = known.clone();
        now.hostname = Some("b".into());
        now.description = Some("mine\n".into());
        let words = edits(&record(), &known, &now);
        assert_eq!(reasons(&words), ["CTRelabelled"]);
        assert!(words[0].message.contains("hostname a to b") && words[0].message.contains("description"));
        assert!(edits(&record(), &known, &known).is_empty());
        let backed_up =
            LxcConfig::from_file(&format!("{}parent: vzdump\n", known.to_file().unwrap())).unwrap();
        assert!(
            edits(&record(), &known, &backed_up.config).is_empty(),
            "what a backup leaves until it cleans up"
        );
    }
}
