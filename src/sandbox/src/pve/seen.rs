//! What was seen of a CT on its host: what is remembered with its record, and what is still to be reported of it.

use std::time::{SystemTime, UNIX_EPOCH};

use moxlet_ids::SandboxId;
use serde::{Deserialize, Serialize};

use crate::{OBSERVATION_BYTES, Observation};

/// How a CT was found; remembered with it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Seen {
    /// Why it is not ours or not there, if so.
    pub(super) astray: Option<(Astray, String)>,
    pub(super) lock: Option<String>,
    pub(super) frozen: bool,
    pub(super) ha: bool,
    pub(super) sections: Vec<String>,
    /// Why its file can be neither changed nor, perhaps, read.
    pub(super) cluster: Option<Cluster>,
    pub(super) running: bool,
    /// Since its last start we asked it to end.
    pub(super) asked_to_end: bool,
}

/// Where a CT went that is not ours or not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Astray {
    Deleted,
    Migrated,
    Foreign,
}

impl Astray {
    /// The reason of the pod's event.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Deleted => "CTDeleted",
            Self::Migrated => "CTMigrated",
            Self::Foreign => "CTForeign",
        }
    }
}

/// What is wrong with the cluster's file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Cluster {
    NoQuorum,
    Away,
}

/// The reasons that there are.
pub(super) const REASONS: [&str; 17] = [
    "CTBack",
    "CTDeleted",
    "CTEdited",
    "CTForeign",
    "CTFrozen",
    "CTLocked",
    "CTMigrated",
    "CTNotUnderHA",
    "CTReaddressed",
    "CTRelabelled",
    "CTSnapshot",
    "CTStopped",
    "CTThawed",
    "CTUnderHA",
    "CTUnlocked",
    "ClusterBack",
    "ClusterLost",
];

/// Something that was seen, as it is remembered until it is certain that it was reported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Unreported {
    pub(super) at_ns: i64,
    pub(super) reason: String,
    pub(super) warning: bool,
    pub(super) message: String,
}

impl Unreported {
    pub(super) fn new(word: Word) -> Self {
        Self { at_ns: now_ns(), reason: word.reason.to_owned(), warning: word.warning, message: word.message }
    }

    /// None of a reason that another version knows.
    pub(super) fn observation(self, sandbox: &SandboxId) -> Option<Observation> {
        let reason = REASONS.iter().find(|reason| **reason == self.reason)?;
        let word = Word { reason, warning: self.warning, message: self.message };
        Some(observation(Some(sandbox), word, self.at_ns))
    }
}

/// Nanoseconds since 1970.
pub(super) fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// One thing that was seen.
pub(super) struct Word {
    pub(super) reason: &'static str,
    pub(super) warning: bool,
    pub(super) message: String,
}

/// With a message of bounded length.
pub(super) fn word(reason: &'static str, warning: bool, message: impl Into<String>) -> Word {
    debug_assert!(REASONS.contains(&reason), "{reason}");
    let mut message = message.into();
    message.truncate(message.floor_char_boundary(OBSERVATION_BYTES));
    Word { reason, warning, message }
}

/// As the agent hears it.
pub(super) fn observation(sandbox: Option<&SandboxId>, word: Word, at_ns: i64) -> Observation {
    Observation {
        sandbox: sandbox.cloned(),
        reason: word.reason,
        warning: word.warning,
        message: word.message,
        at_ns,
    }
}
