//! Faults that are asked for, and the count of all calls.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};

/// How often a backup that is held looks whether it may go on.
const HOLD_POLL: Duration = Duration::from_millis(10);

/// What happens to calls that a rule is for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum CallFault {
    /// The call takes this much longer; other rules still apply. With `hold_worker` a worker of the host is busy meanwhile.
    Delay {
        ms: u64,
        #[serde(default)]
        hold_worker: bool,
    },
    /// An error answer instead of the call.
    Error {
        code: u16,
        message: String,
        #[serde(default)]
        errors: BTreeMap<String, String>,
        /// The call is done all the same; only its answer is the error.
        #[serde(default)]
        after: bool,
    },
    /// The connection is closed without an answer.
    Drop {
        /// The call is done before.
        #[serde(default)]
        after: bool,
    },
    /// The answer breaks off in the middle of its body.
    HalfAnswer,
    /// Something else than JSON with status 200.
    Body { text: String },
    /// No answer, ever.
    Hang,
}

/// Which calls, how often, and what.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct CallRule {
    /// GET, POST, …; absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) method: Option<String>,
    /// A regular expression for the decoded path below `/api2/json`; absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) path: Option<String>,
    /// `user@realm!id`; absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) token: Option<String>,
    /// How many calls to let through first.
    #[serde(default)]
    pub(crate) skip: u64,
    /// How many calls it is for; absent: all from then on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) times: Option<u64>,
    #[serde(flatten)]
    pub(crate) fault: CallFault,
}

/// What happens to tasks that a rule is for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "do", content = "with", rename_all = "kebab-case")]
pub(crate) enum TaskFault {
    /// It does nothing and never ends.
    NeverEnds,
    /// It does nothing and fails with this text.
    FailsBefore(String),
    /// It does its work and fails with this text.
    FailsAfter(String),
    /// It takes at least this long (milliseconds in JSON).
    #[serde(with = "millis")]
    Takes(Duration),
    /// Its log ends without a last line.
    CutLog,
}

mod millis {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    #[allow(clippy::trivially_copy_pass_by_ref)]
    pub(super) fn serialize<S: Serializer>(d: &Duration, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        u64::deserialize(d).map(Duration::from_millis)
    }
}

/// Which tasks, how often, and what.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct TaskRule {
    /// Such as `vzstart`; absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<String>,
    /// The guest's VMID or what else the task is of; absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    /// How many tasks to let through first.
    #[serde(default)]
    pub(crate) skip: u64,
    /// How many tasks it is for; absent: all from then on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) times: Option<u64>,
    #[serde(flatten)]
    pub(crate) fault: TaskFault,
}

/// What is wrong with a storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum StorageFault {
    /// No room is left.
    Full,
    /// It is not in the configuration.
    Missing,
    /// It cannot be activated.
    Inactive,
}

/// A moment of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum BackupStep {
    /// The CT is frozen: for its snapshot, or while it is copied.
    Frozen,
    /// The archive is being written.
    Archive,
    /// The CT is not locked any more; what the backup made of it is still there, and it was not started again.
    Unlocked,
}

/// Lasting conditions of the cluster.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Conditions {
    /// Hosts that are lost.
    pub(crate) offline: BTreeSet<String>,
    /// Storages by `name` or `node/name`.
    pub(crate) storages: BTreeMap<String, StorageFault>,
    /// What `/version` tells instead of the configured version.
    pub(crate) version: Option<String>,
    /// Where backups stop until this is another step, or none.
    pub(crate) backups: Option<BackupStep>,
}

/// A fault file: what the admin port takes at `/faults`, too.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct FaultSet {
    pub(crate) calls: Vec<CallRule>,
    pub(crate) tasks: Vec<TaskRule>,
    pub(crate) conditions: Conditions,
}

/// How often what was called.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Counts {
    /// All calls of the API.
    pub(crate) calls: u64,
    /// Calls that waited for a worker in vain or met a full queue.
    pub(crate) refused_for_want_of_a_worker: u64,
    /// The most calls that one host worked on at once.
    pub(crate) most_at_once: u64,
    /// By method, path template and token, with status codes.
    pub(crate) by: BTreeMap<String, Count>,
}

/// One line of the counts.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Count {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) token: String,
    pub(crate) count: u64,
    pub(crate) status: BTreeMap<u16, u64>,
}

/// Faults and counts.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    set: Mutex<FaultSet>,
    counts: Mutex<Counts>,
}

impl Faults {
    fn set(&self) -> MutexGuard<'_, FaultSet> {
        self.set.lock()
    }

    pub(crate) fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock()
    }

    /// What there is.
    pub(crate) fn current(&self) -> FaultSet {
        self.set().clone()
    }

    /// Replaces everything; a rule with an expression that is none is refused.
    pub(crate) fn replace(&self, set: FaultSet) -> Result<(), String> {
        for rule in &set.calls {
            check(rule)?;
        }
        *self.set() = set;
        Ok(())
    }

    /// Adds a rule for calls.
    pub(crate) fn add_call(&self, rule: CallRule) -> Result<(), String> {
        check(&rule)?;
        self.set().calls.push(rule);
        Ok(())
    }

    /// Adds a rule for tasks.
    pub(crate) fn add_task(&self, rule: TaskRule) {
        self.set().tasks.push(rule);
    }

    /// Changes the conditions.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Conditions)) {
        change(&mut self.set().conditions);
    }

    /// The conditions.
    pub(crate) fn conditions(&self) -> Conditions {
        self.set().conditions.clone()
    }

    pub(crate) fn is_offline(&self, host: &str) -> bool {
        self.set().conditions.offline.contains(host)
    }

    pub(crate) fn storage(&self, node: &str, storage: &str) -> Option<StorageFault> {
        let set = self.set();
        let storages = &set.conditions.storages;
        storages.get(&format!("{node}/{storage}")).or_else(|| storages.get(storage)).copied()
    }

    /// Returns once no backup is held at this step.
    pub(crate) async fn passed(&self, step: BackupStep) {
        while self.set().conditions.backups == Some(step) {
            tokio::time::sleep(HOLD_POLL).await;
        }
    }

    /// The faults of one call: delays first, then at most one other.
    pub(crate) fn call(&self, method: &str, path: &str, token: &str) -> Vec<CallFault> {
        let mut found = Vec::new();
        let mut set = self.set();
        for rule in &mut set.calls {
            let fits = rule.method.as_deref().is_none_or(|m| m.eq_ignore_ascii_case(method))
                && rule.token.as_deref().is_none_or(|t| t == token)
                && rule.path.as_deref().is_none_or(|p| regex::Regex::new(p).is_ok_and(|r| r.is_match(path)));
            let is_delay = matches!(rule.fault, CallFault::Delay { .. });
            if fits
                && (is_delay || found.iter().all(|f| matches!(f, CallFault::Delay { .. })))
                && take(&mut rule.skip, &mut rule.times)
            {
                found.push(rule.fault.clone());
            }
        }
        set.calls.retain(|rule| rule.times != Some(0));
        found
    }

    /// The fault of one task.
    pub(crate) fn task(&self, kind: &str, id: &str) -> Option<TaskFault> {
        let mut set = self.set();
        let mut found = None;
        for rule in &mut set.tasks {
            let fits =
                rule.kind.as_deref().is_none_or(|k| k == kind) && rule.id.as_deref().is_none_or(|i| i == id);
            if found.is_none() && fits && take(&mut rule.skip, &mut rule.times) {
                found = Some(rule.fault.clone());
            }
        }
        set.tasks.retain(|rule| rule.times != Some(0));
        found
    }

    /// Counts a call that was answered.
    pub(crate) fn count(&self, method: &str, path: &str, token: &str, status: u16) {
        let mut counts = self.counts();
        counts.calls += 1;
        let line = counts.by.entry(format!("{method} {path} {token}")).or_default();
        line.method = method.into();
        line.path = path.into();
        line.token = token.into();
        line.count += 1;
        *line.status.entry(status).or_default() += 1;
    }
}

fn check(rule: &CallRule) -> Result<(), String> {
    rule.path.as_deref().map_or(Ok(()), |p| regex::Regex::new(p).map(|_| ()).map_err(|e| e.to_string()))
}

fn take(skip: &mut u64, times: &mut Option<u64>) -> bool {
    if *skip > 0 {
        *skip -= 1;
        return false;
    }
    match times {
        Some(0) => false,
        Some(n) => {
            *n -= 1;
            true
        }
        None => true,
    }
}
