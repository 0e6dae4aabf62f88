//! What can go wrong with a call: one variant for each thing that a caller would do something different about.

use std::{fmt, time::Duration};

use crate::{Fingerprint, InvalidName, Upid, Version};

/// The result of a call.
pub type Result<T> = std::result::Result<T, Error>;

/// Which call it was: method and path, without parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallName {
    /// The method.
    pub method: &'static str,
    /// The path below `/api2/json`.
    pub path: Box<str>,
}

impl fmt::Display for CallName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.path)
    }
}

/// Why a call failed. No variant holds a secret.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server does not know our token (401).
    #[error("{call}: {endpoint} does not accept the API token {token}: {reason}")]
    WrongToken {
        /// The call.
        call: CallName,
        /// The server asked.
        endpoint: String,
        /// The token's id, without its secret.
        token: String,
        /// The server's word; it is short by intention.
        reason: String,
    },
    /// Token or user lack a privilege (403).
    #[error("{call}: not allowed: {message}{}", hint(.grant.as_deref()))]
    NotAllowed {
        /// The call.
        call: CallName,
        /// The path in the tree of permissions, such as `/vms/100`, where the server names one.
        path: Option<Box<str>>,
        /// The privileges that it wants; any one of them where there are several. Empty if it is for root@pam alone.
        privileges: Vec<String>,
        /// The server's word.
        message: String,
        /// The commands that grant it, where privileges can.
        grant: Option<Box<str>>,
    },
    /// Somebody works on the guest: a backup, a migration, a snapshot, ….
    #[error("{call}: locked ({lock}): {message}")]
    Locked {
        /// The call or what the task did.
        call: CallName,
        /// By what: `backup`, `migrate`, `snapshot`, `create`, `destroyed`, ….
        lock: String,
        /// The server's word.
        message: String,
    },
    /// The cluster has no quorum; nothing can be changed.
    #[error("{call}: the cluster has no quorum: {message}")]
    NoQuorum {
        /// The call.
        call: CallName,
        /// The server's word.
        message: String,
    },
    /// A lock of the server's own could not be had in time, or it has no worker to spare. Trying again later helps.
    #[error("{call}: busy: {message}")]
    Busy {
        /// The call.
        call: CallName,
        /// The server's word: which lock.
        message: String,
    },
    /// What the call is about does not exist (a guest without configuration file, an unknown storage, pool or task).
    #[error("{call}: gone: {message}")]
    Gone {
        /// The call.
        call: CallName,
        /// The server's word.
        message: String,
    },
    /// It exists already: a VMID that another took, a snapshot's name, ….
    #[error("{call}: it exists already: {message}")]
    AlreadyExists {
        /// The call.
        call: CallName,
        /// The server's word.
        message: String,
    },
    /// The guest runs already.
    #[error("{call}: it is running already: {message}")]
    AlreadyRunning {
        /// The call.
        call: CallName,
        /// The server's word.
        message: String,
    },
    /// The guest does not run.
    #[error("{call}: it is not running: {message}")]
    NotRunning {
        /// The call.
        call: CallName,
        /// The server's word.
        message: String,
    },
    /// The configuration's digest is another one: somebody changed it since it was read.
    #[error("{call}: changed by somebody else since it was read: {message}")]
    Changed {
        /// The call.
        call: CallName,
        /// The server's word.
        message: String,
    },
    /// The guest's protection flag is set.
    #[error("{call}: protected: {message}")]
    Protected {
        /// The call.
        call: CallName,
        /// The server's word.
        message: String,
    },
    /// The server refuses parameters (400).
    #[error("{call}: invalid parameters: {}", list(.parameters, .message))]
    InvalidParameters {
        /// The call.
        call: CallName,
        /// Which, and why.
        parameters: Vec<(String, String)>,
        /// The server's word on the whole.
        message: String,
    },
    /// We refuse to send it.
    #[error("{call}: not sent: {reason}")]
    Refused {
        /// The call.
        call: CallName,
        /// Why.
        reason: String,
    },
    /// The server does not have this call (501), as an older version would not.
    #[error("{call}: the server does not have this call: {message}")]
    Unsupported {
        /// The call.
        call: CallName,
        /// The server's word.
        message: String,
    },
    /// The server says no for a reason that is none of the others.
    #[error("{call}: the server answers {status}: {message}")]
    Server {
        /// The call.
        call: CallName,
        /// The HTTP status.
        status: u16,
        /// The server's word.
        message: String,
    },
    /// A task was started and failed.
    #[error("task {upid} failed: {exit}{}", log_tail(.log))]
    TaskFailed {
        /// The task.
        upid: Box<Upid>,
        /// Its exit status as the server has it.
        exit: String,
        /// The last lines of its log.
        log: Vec<String>,
        /// The exit status as one of the other variants, where it is one.
        reason: Option<Box<Error>>,
    },
    /// A task did not end within the time given for it. It still runs.
    #[error("task {upid} still runs after {} s", .waited.as_secs())]
    TaskTimeout {
        /// The task.
        upid: Box<Upid>,
        /// How long we waited.
        waited: Duration,
    },
    /// Waiting for a task was called off. It may still run.
    #[error("waiting for task {upid} was called off")]
    Cancelled {
        /// The task.
        upid: Box<Upid>,
    },
    /// No server could be reached, or the one asked cannot reach the node (595, 596, 599).
    #[error("{call}: {endpoint} is unreachable: {reason}{}", unsure(*.sent))]
    Unreachable {
        /// The call.
        call: CallName,
        /// The last server asked; `node X through URL` where the server is there and the node is not.
        endpoint: String,
        /// The cause.
        reason: String,
        /// Whether the call may have reached the server and taken effect.
        sent: bool,
    },
    /// The server's certificate is not the one expected.
    #[error("{endpoint}: the certificate is not accepted: {reason}{}", fingerprints(.seen.as_ref(), .expected.as_ref()))]
    Certificate {
        /// The server.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
        /// The fingerprint that it has, where it was seen.
        seen: Option<Fingerprint>,
        /// The fingerprint that was configured.
        expected: Option<Fingerprint>,
    },
    /// The server is older than what we can work with.
    #[error("Proxmox VE {found} is too old: {needed} or later is needed")]
    TooOld {
        /// What it is.
        found: Version,
        /// What is needed.
        needed: Version,
    },
    /// The answer is not what the API says it is.
    #[error("{call}: unexpected answer: {expected} was expected: {reason}; it begins with {got:?}")]
    Unexpected {
        /// The call.
        call: CallName,
        /// What was expected.
        expected: &'static str,
        /// What is wrong with what came.
        reason: String,
        /// Its beginning, at most 200 characters.
        got: String,
    },
    /// The client itself cannot be built: no endpoint, no usable certificate file, ….
    #[error("the Proxmox VE client cannot be set up: {0}")]
    Setup(String),
    /// A name that is none.
    #[error(transparent)]
    InvalidName(#[from] InvalidName),
}

impl Error {
    /// The innermost reason: for a failed task what it failed of, where that is known, else the error itself.
    #[must_use]
    pub fn reason(&self) -> &Self {
        match self {
            Self::TaskFailed { reason: Some(reason), .. } => reason.reason(),
            other => other,
        }
    }

    /// What the call is about does not exist.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self.reason(), Self::Gone { .. })
    }

    /// The lock that is in the way, such as `backup`.
    #[must_use]
    pub fn lock(&self) -> Option<&str> {
        match self.reason() {
            Self::Locked { lock, .. } => Some(lock),
            _ => None,
        }
    }

    /// Whether the same call may well succeed later without anybody changing anything.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        matches!(
            self.reason(),
            Self::Locked { .. } | Self::NoQuorum { .. } | Self::Busy { .. } | Self::Unreachable { .. }
        )
    }

    /// Whether the call may have taken effect although it failed.
    #[must_use]
    pub fn may_have_happened(&self) -> bool {
        match self {
            Self::Unreachable { sent, call, .. } => *sent && call.method != "GET",
            Self::Unexpected { call, .. } => call.method != "GET",
            Self::TaskTimeout { .. } | Self::Cancelled { .. } => true,
            _ => false,
        }
    }
}

fn hint(grant: Option<&str>) -> String {
    grant.map(|g| format!(" (to grant it: {g})")).unwrap_or_default()
}

fn list(parameters: &[(String, String)], message: &str) -> String {
    if parameters.is_empty() {
        return message.to_owned();
    }
    let each: Vec<String> = parameters.iter().map(|(name, why)| format!("{name}: {why}")).collect();
    each.join("; ")
}

fn log_tail(log: &[String]) -> String {
    if log.is_empty() { String::new() } else { format!("; its log ends with: {}", log.join(" | ")) }
}

fn unsure(sent: bool) -> &'static str {
    if sent { "; the call may have taken effect" } else { "" }
}

fn fingerprints(seen: Option<&Fingerprint>, expected: Option<&Fingerprint>) -> String {
    match (seen, expected) {
        (Some(seen), Some(expected)) => format!("; its fingerprint is {seen}, expected is {expected}"),
        (Some(seen), None) => format!("; its fingerprint is {seen}"),
        _ => String::new(),
    }
}

/// An error with its causes, since `reqwest` hides them behind its own text.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
