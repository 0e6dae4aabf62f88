//! From the server's words to a variant of [`Error`].
//!
//! The server says most things as status 500 and a sentence. The sentences are those of the Proxmox VE sources
//! (`PVE::AbstractConfig`, `PVE::LXC`, `PVE::Cluster`, `PVE::RPCEnvironment`); what is none of them stays
//! [`Error::Server`].

use crate::{Error, error::CallName};

/// The longest message that is kept.
const MAX_MESSAGE: usize = 1000;

/// An answer that is no success.
pub(crate) struct Failure<'a> {
    pub(crate) call: CallName,
    pub(crate) status: u16,
    /// `message` of the body, else the status line's text.
    pub(crate) message: &'a str,
    /// The `errors` map of the body.
    pub(crate) errors: Vec<(String, String)>,
    pub(crate) endpoint: &'a str,
    /// The node that the call is for.
    pub(crate) node: Option<&'a str>,
    /// Our token's id.
    pub(crate) token: &'a str,
}

/// The error that an answer stands for.
pub(crate) fn answer(failure: Failure<'_>) -> Error {
    let message = bounded(failure.message);
    let Failure { call, status, errors, endpoint, node, token, .. } = failure;
    match status {
        401 => Error::WrongToken {
            call,
            endpoint: endpoint.to_owned(),
            token: token.to_owned(),
            reason: message,
        },
        403 => not_allowed(call, &message, token),
        501 => Error::Unsupported { call, message },
        502..=504 | 595..=599 => {
            let endpoint = match (status, node) {
                (595.., Some(node)) => format!("node {node} through {endpoint}"),
                _ => endpoint.to_owned(),
            };
            // 595: the connection from one node to the other could not be made.
            Error::Unreachable { call, endpoint, reason: format!("{status} {message}"), sent: status != 595 }
        }
        _ => {
            let all = errors.iter().fold(message.clone(), |all, (_, why)| format!("{all}\n{why}"));
            match sentence(&call, &all) {
                Some(error) => error,
                None if status == 400 || !errors.is_empty() => {
                    Error::InvalidParameters { call, parameters: errors, message }
                }
                None => Error::Server { call, status, message },
            }
        }
    }
}

/// The error that a sentence stands for: an answer's message or a task's exit status.
pub(crate) fn sentence(call: &CallName, text: &str) -> Option<Error> {
    let call = call.clone();
    let message = bounded(text);
    if let Some(lock) = between(text, " is locked (", ")") {
        return Some(Error::Locked { call, lock: lock.to_owned(), message });
    }
    if text.starts_with("Permission check failed") {
        return Some(not_allowed(call, &message, ""));
    }
    let lower = text.to_ascii_lowercase();
    let has = |needles: &[&str]| needles.iter().any(|n| lower.contains(n));
    Some(if has(&["no quorum", "not quorate"]) {
        Error::NoQuorum { call, message }
    } else if has(&["detected modified configuration"]) {
        Error::Changed { call, message }
    } else if has(&["protection mode enabled"]) {
        Error::Protected { call, message }
    } else if has(&["got timeout", "got lock request timeout", "can't lock file", "unable to acquire lock"]) {
        Error::Busy { call, message }
    } else if has(&["already running"]) {
        Error::AlreadyRunning { call, message }
    } else if has(&["not running"]) {
        Error::NotRunning { call, message }
    } else if has(&["already exists", "file exists", "already used", "already defined"]) {
        Error::AlreadyExists { call, message }
    } else if is_gone(&call, &lower) {
        Error::Gone { call, message }
    } else {
        return None;
    })
}

/// Only sentences that are about the thing asked for: that a template, a bridge, a volume or a storage does not exist says
/// nothing on the guest, and what is believed gone may be cleaned up. A pool or a snapshot is what was asked for in the calls on
/// pools and snapshots alone.
fn is_gone(call: &CallName, lower: &str) -> bool {
    const NO_SUCH: &[&str] = &["vm ", "task", "pool", "resource", "rule", "snapshot"];
    let line = lower.trim();
    if let Some(rest) = line.strip_prefix("no such ") {
        return NO_SUCH.iter().any(|n| rest.starts_with(n));
    }
    let asked_for = line.starts_with("configuration file 'nodes/")
        || (line.starts_with("pool '") && call.path.starts_with("/pools"))
        || (line.starts_with("snapshot '") && call.path.contains("snapshot"));
    asked_for && line.contains("does not exist")
}

/// `Permission check failed (/vms/100, VM.Allocate|VM.Clone)`, or a sentence.
fn not_allowed(call: CallName, message: &str, token: &str) -> Error {
    let inner = between(message, "Permission check failed (", ")").unwrap_or_default();
    let (path, privileges) = match inner.split_once(", ") {
        Some((path, privileges)) if path.starts_with('/') => {
            (Some(Box::from(path)), privileges.split('|').map(|p| p.trim().to_owned()).collect())
        }
        _ => (None, Vec::new()),
    };
    let grant = path.as_deref().and_then(|path| grant(path, &privileges, token)).map(String::into_boxed_str);
    Error::NotAllowed { call, path, privileges, message: message.to_owned(), grant }
}

/// The commands that grant a privilege. With privilege separation both the user and its token need it.
fn grant(path: &str, privileges: &[String], token: &str) -> Option<String> {
    let privilege = privileges.first()?;
    let word =
        |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b));
    if !word(privilege) || !word(path) {
        return None;
    }
    let role = format!("only-{privilege}");
    let (user, token) = match token.split_once('!') {
        Some((user, _)) => (user, token),
        None => ("USER@REALM", "USER@REALM!TOKEN"),
    };
    Some(format!(
        "pveum role add {role} --privs {privilege}; pveum acl modify {path} --users {user} --roles {role}; pveum acl modify {path} \
         --tokens '{token}' --roles {role}"
    ))
}

fn between<'a>(text: &'a str, before: &str, after: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(before)?;
    rest.split_once(after).map(|(inner, _)| inner)
}

/// On one line and bounded.
pub(crate) fn bounded(text: &str) -> String {
    let mut out: String = text.trim().chars().take(MAX_MESSAGE).collect();
    out = out.replace(['\n', '\r'], " ");
    if text.trim().chars().nth(MAX_MESSAGE).is_some() {
        out.push('…');
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn failure(status: u16, message: &str) -> Error {
        failure_of("/nodes/a/lxc", status, message)
    }

    fn failure_of(path: &str, status: u16, message: &str) -> Error {
        let call = CallName { method: "POST", path: path.into() };
        let errors = Vec::new();
        let (endpoint, node, token) = ("https://h:8006", Some("a"), "u@pve!tk");
        answer(Failure { call, status, message, errors, endpoint, node, token })
    }

    #[test]
    fn the_servers_sentences_are_told_apart() {
        type Is = fn(&Error) -> bool;
        let cases: &[(u16, &str, Is)] = &[
            (500, "Configuration file 'nodes/a/lxc/100.conf' does not exist", Error::is_gone),
            (500, "no such VM ('100')", Error::is_gone),
            (500, "CT is locked (backup)", |e| e.lock() == Some("backup")),
            (500, "cluster not ready - no quorum?", |e| matches!(e, Error::NoQuorum { .. })),
            (500, "can't lock file '/run/lock/lxc/pve-config-100.lock' - got timeout", |e| {
                matches!(e, Error::Busy { .. })
            }),
            (500, "cfs-lock 'file-user_cfg' error: got lock request timeout", |e| {
                matches!(e, Error::Busy { .. })
            }),
            (500, "CT 100 already exists on node 'a'", |e| matches!(e, Error::AlreadyExists { .. })),
            (500, "unable to open file '/etc/pve/x' - File exists", |e| {
                matches!(e, Error::AlreadyExists { .. })
            }),
            (500, "CT 101 already running", |e| matches!(e, Error::AlreadyRunning { .. })),
            (500, "CT 120 not running", |e| matches!(e, Error::NotRunning { .. })),
            (500, "detected modified configuration - file changed by other user? Try again.", |e| {
                matches!(e, Error::Changed { .. })
            }),
            (500, "can't remove CT 100 - protection mode enabled", |e| matches!(e, Error::Protected { .. })),
            (401, "", |e| matches!(e, Error::WrongToken { .. })),
            (501, "Method 'GET /x' not implemented", |e| matches!(e, Error::Unsupported { .. })),
            (595, "No route to host", |e| matches!(e, Error::Unreachable { sent: false, .. })),
            (599, "Too many redirections", |e| e.may_have_happened()),
            (500, "something new", |e| matches!(e, Error::Server { status: 500, .. })),
        ];
        for (status, message, is) in cases {
            let error = failure(*status, message);
            assert!(is(&error), "{status} {message}: {error:?}");
        }
    }

    #[test]
    fn what_only_mentions_that_something_is_missing_says_nothing_on_the_guest() {
        for text in [
            "bridge 'vmbr9' does not exist",
            "volume 'local:vztmpl/x.tar' does not exist",
            "unable to create CT 100 - template 'x' does not exist",
            "no such logical volume pve/x",
            "no such storage 'x'",
            "pool 'x' does not exist",
            "snapshot 'x' does not exist",
        ] {
            assert!(!failure(500, text).is_gone(), "{text}");
        }
        assert!(failure_of("/pools", 500, "pool 'x' does not exist").is_gone());
        assert!(failure_of("/nodes/a/lxc/1/snapshot/x", 500, "snapshot 'x' does not exist").is_gone());
    }

    #[test]
    fn a_guest_whose_storage_is_gone_is_not_gone_and_the_storage_is_named() {
        let call = CallName { method: "task", path: "vzdestroy 100".into() };
        let text = "storage 'x' does not exist";
        let reason = sentence(&call, text);
        assert!(reason.is_none(), "{reason:?}");
        let error = failure_of("/nodes/a/lxc/100", 500, text);
        assert!(matches!(error, Error::Server { .. }) && error.to_string().contains(text), "{error}");
    }

    #[test]
    fn a_missing_privilege_names_path_privilege_and_the_command() {
        let error = failure(403, "Permission check failed (/vms/100, VM.Allocate)");
        let text = error.to_string();
        assert!(
            text.contains("pveum acl modify /vms/100 --tokens 'u@pve!tk' --roles only-VM.Allocate"),
            "{text}"
        );
        assert!(text.contains("--users u@pve"), "{text}");
        let Error::NotAllowed { path, privileges, .. } = error else { panic!("{error:?}") };
        assert_eq!((path.as_deref(), privileges), (Some("/vms/100"), vec!["VM.Allocate".to_owned()]));
        let Error::NotAllowed { privileges, grant, .. } =
            failure(403, "Permission check failed (user != root@pam)")
        else {
            panic!()
        };
        assert!(privileges.is_empty() && grant.is_none());
    }

    #[test]
    fn a_hostile_message_gets_no_command_and_has_a_bound() {
        let error = failure(403, "Permission check failed (/x;rm -rf /, A)");
        assert!(matches!(error, Error::NotAllowed { grant: None, .. }), "{error:?}");
        assert!(failure(500, &"x\n".repeat(10_000)).to_string().len() < 3000);
    }
}
