//! What somebody else did to the CTs of pods: each look compares what is on this host with what is remembered. Only local
//! files are read, so that an idle host makes no calls.
//!
//! `docs/proxmox.md` has the table of what follows from what.

use std::{collections::BTreeMap, sync::PoisonError};

use moxlet_ids::SandboxId;
use moxlet_pve::config::LxcConfig;

use super::{
    Inner, Standing,
    file::Content,
    marker,
    record::{Phase, Record},
};
use crate::{Observation, Result};

/// Keys that say what a CT is rather than what it may use.
const LABELS: [&str; 3] = ["description", "hostname", "tags"];

/// How a CT was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// Why it is not ours or not there, if so.
    astray: Option<(&'static str, String)>,
    lock: Option<String>,
    frozen: bool,
    ha: bool,
    sections: Vec<String>,
}

/// One thing that was seen.
struct Word {
    reason: &'static str,
    warning: bool,
    message: String,
}

fn word(reason: &'static str, warning: bool, message: impl Into<String>) -> Word {
    Word { reason, warning, message: message.into() }
}

impl Inner {
    pub(super) fn look(&self) -> Result<Vec<Observation>> {
        let mut said = Vec::new();
        let records = self.records.all()?;
        let mut seen = BTreeMap::new();
        let before = self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for record in records.iter().filter(|r| r.phase == Phase::Made).cloned() {
            let id = record.id.clone();
            let earlier = before.get(&id).cloned().unwrap_or_default();
            let standing = self.standing(&record)?;
            let now = self.seen_of(&record, &standing);
            let mut words = differences(&record, &earlier, &now);
            if let Standing::Ours(content) = &standing
                && content.config.lock.is_none()
            {
                words.extend(self.accept(&record, content)?);
            }
            said.extend(words.into_iter().map(|w| observation(Some(&id), w)));
            seen.insert(id, now);
        }
        said.extend(self.strangers(&records, &before, &mut seen)?);
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = seen;
        Ok(said)
    }

    fn seen_of(&self, record: &Record, standing: &Standing) -> Seen {
        let astray = match standing {
            Standing::Ours(_) => None,
            Standing::Gone => Some(("CTDeleted", "was deleted on the host".to_owned())),
            Standing::Destroyed => Some((
                "CTDeleted",
                "was deleted on the host; its file is left with `lock: destroyed`".to_owned(),
            )),
            Standing::Moved(node) => Some((
                "CTMigrated",
                format!(
                    "was migrated to host {node}, where it cannot start; migrate it back, or delete the pod and the CT"
                ),
            )),
            Standing::Torn => Some(("CTForeign", "has a file that cannot be read".to_owned())),
            Standing::Foreign { reason, .. } => {
                Some(("CTForeign", format!("is not Moxlet's any more: {reason}; it is left as it is")))
            }
        };
        let (lock, sections) = match standing {
            Standing::Ours(content) => (content.config.lock.clone(), content.sections.clone()),
            _ => (None, Vec::new()),
        };
        Seen {
            astray,
            lock,
            frozen: matches!(standing, Standing::Ours(_)) && self.inits.is_frozen(&record.id),
            ha: self.folder.is_under_ha(record.vmid),
            sections,
        }
    }

    /// Takes an edit over as what holds from now on; says what it was.
    fn accept(&self, record: &Record, content: &Content) -> Result<Vec<Word>> {
        let Ok(text) = content.config.to_file() else { return Ok(Vec::new()) };
        if text == record.known {
            return Ok(Vec::new());
        }
        // Under the CT's lock, as our own changes: one of those must not look like somebody else's.
        let _held = self.folder.lock(record.vmid)?;
        let (Some(mut current), Standing::Ours(content)) =
            (self.records.get(&record.id)?, self.standing(record)?)
        else {
            return Ok(Vec::new());
        };
        current.settle(&content.config);
        let Ok(text) = content.config.to_file() else { return Ok(Vec::new()) };
        let known = LxcConfig::from_file(&current.known).map(|f| f.config).unwrap_or_default();
        let words = edits(&current, &known, &content.config);
        self.records.change(&record.id, |r| {
            r.settle(&content.config);
            if r.phase == Phase::Made && r.known != text {
                r.known = text;
                r.needs_api = true;
            }
        })?;
        Ok(words)
    }

    /// CTs on this host that include a file of ours and have no record: copies, restored ones, left ones.
    fn strangers(
        &self,
        records: &[Record],
        before: &BTreeMap<SandboxId, Seen>,
        seen: &mut BTreeMap<SandboxId, Seen>,
    ) -> Result<Vec<Observation>> {
        let mut said = Vec::new();
        for vmid in self.folder.own_cts()? {
            if records.iter().any(|r| r.vmid == vmid) {
                continue;
            }
            let Ok(Some(content)) = self.folder.read(vmid) else { continue };
            if !marker::resembles(&self.layout.includes, &content.config) {
                continue;
            }
            // Said once: remembered under an id that no sandbox has.
            let Ok(id) = format!("{:064x}", vmid.get()).parse::<SandboxId>() else { continue };
            if !before.contains_key(&id) {
                let message = format!(
                    "CT {vmid} includes a file of Moxlet's and belongs to no pod of this host: a copy, a restored backup, or \
                     left by an agent whose directory was removed; it is left as it is"
                );
                said.push(observation(None, word("CTForeign", true, message)));
            }
            seen.insert(id, Seen::default());
        }
        Ok(said)
    }
}

fn observation(sandbox: Option<&SandboxId>, word: Word) -> Observation {
    Observation {
        sandbox: sandbox.cloned(),
        reason: word.reason,
        warning: word.warning,
        message: word.message,
    }
}

/// What changed between two looks.
fn differences(record: &Record, before: &Seen, now: &Seen) -> Vec<Word> {
    let ct = format!("CT {}", record.vmid);
    let mut words = Vec::new();
    if before.astray != now.astray {
        match &now.astray {
            Some((reason, text)) => words.push(word(reason, true, format!("{ct} {text}"))),
            None => words.push(word("CTBack", false, format!("{ct} is here again as it was"))),
        }
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
    let snapshots: Vec<&String> = now.sections.iter().filter(|s| !before.sections.contains(s)).collect();
    for section in snapshots {
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
        config.pairs().into_iter().filter(|(k, _)| k != "lock").chain(raw).collect()
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
        let gone = Seen { astray: Some(("CTDeleted", "was deleted".into())), ..Seen::default() };
        assert_eq!(reasons(&differences(&record, &quiet, &gone)), ["CTDeleted"]);
        assert_eq!(reasons(&differences(&record, &gone, &quiet)), ["CTBack"]);
        let snapshot = Seen { sections: vec!["before-update".into()], ..Seen::default() };
        assert_eq!(reasons(&differences(&record, &quiet, &snapshot)), ["CTSnapshot"]);
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
    }
}
