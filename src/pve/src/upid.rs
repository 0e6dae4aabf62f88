//! The id of a task, `UPID:node:pid:pstart:starttime:type:id:user:`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{InvalidName, NodeName};

/// The id of a task (Proxmox VE's `PVE::Tools::upid_decode`). It says where the task runs and for whom.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Upid {
    text: String,
    node: NodeName,
    pid: u32,
    start: u64,
    kind: String,
    id: String,
    user: String,
}

impl Upid {
    /// The whole id.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The node that the task runs on.
    #[must_use]
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// The worker's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// When it began, in seconds since 1970.
    #[must_use]
    pub fn start_time(&self) -> u64 {
        self.start
    }

    /// What the task does, such as `vzstart`.
    #[must_use]
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// What it is about, mostly a VMID; may be empty.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// For whom it runs: `user@realm` or `user@realm!token`.
    #[must_use]
    pub fn user(&self) -> &str {
        &self.user
    }
}

fn invalid(text: &str, reason: &'static str) -> InvalidName {
    InvalidName::new("task id (UPID)", text, reason)
}

impl FromStr for Upid {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        if text.len() > 512 || text.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(invalid(text, "it is too long or has a character that is not allowed"));
        }
        let parts: Vec<&str> = text.split(':').collect();
        let ["UPID", node, pid, pstart, start, kind, id, user, ""] = parts[..] else {
            return Err(invalid(text, "it is not UPID: and seven parts, each ended by a colon"));
        };
        let number = |s: &str| {
            let hex = s.len() >= 8 && s.bytes().all(|b| b.is_ascii_hexdigit());
            u64::from_str_radix(s, 16).ok().filter(|_| hex)
        };
        let pid =
            number(pid).and_then(|p| u32::try_from(p).ok()).ok_or_else(|| invalid(text, "the process id"))?;
        number(pstart).ok_or_else(|| invalid(text, "the process's start time"))?;
        let start = number(start).ok_or_else(|| invalid(text, "the start time"))?;
        if kind.is_empty() || user.is_empty() {
            return Err(invalid(text, "type or user is empty"));
        }
        let node = node.parse().map_err(|_| invalid(text, "the node's name"))?;
        Ok(Self {
            text: text.to_owned(),
            node,
            pid,
            start,
            kind: kind.to_owned(),
            id: id.to_owned(),
            user: user.to_owned(),
        })
    }
}

impl TryFrom<String> for Upid {
    type Error = InvalidName;
    fn try_from(s: String) -> Result<Self, InvalidName> {
        s.parse()
    }
}

impl From<Upid> for String {
    fn from(upid: Upid) -> Self {
        upid.text
    }
}

impl fmt::Display for Upid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_task_that_a_token_started_is_read() {
        let upid: Upid =
            "UPID:pve-1:0000C0DE:0A1B2C3D4:66AABBCC:vzstart:101:moxlet@pve!node:".parse().unwrap();
        assert_eq!(upid.node().as_str(), "pve-1");
        assert_eq!((upid.pid(), upid.start_time()), (0xC0DE, 0x66AA_BBCC));
        assert_eq!((upid.kind(), upid.id(), upid.user()), ("vzstart", "101", "moxlet@pve!node"));
        assert!("UPID:a:0000C0DE:0A1B2C3D4:66AABBCC:vzstart::jörg@ldap:".parse::<Upid>().is_ok());
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in ".{0,80}") {
            if let Ok(upid) = text.parse::<Upid>() {
                prop_assert_eq!(upid.to_string(), text);
            }
        }

        #[test]
        fn what_has_the_form_is_taken(
            node in "[a-z][a-z0-9]{0,10}", pid: u32, start: u32, kind in "[a-z]{1,12}", id in "[0-9a-z]{0,9}",
        ) {
            let text = format!("UPID:{node}:{pid:08X}:{:08X}:{start:08X}:{kind}:{id}:root@pam!ab:", 7);
            let upid: Upid = text.parse().unwrap();
            prop_assert_eq!(upid.as_str(), text.as_str());
            prop_assert_eq!(upid.pid(), pid);
        }
    }
}
