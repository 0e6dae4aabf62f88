//! A container's capabilities: containerd's default, what is added and what is dropped. They hold in the CT's user namespace.

use moxlet_cri::v1;

use crate::error::{Error, Result};

/// All of Linux, in the order of their numbers.
const ALL: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What a container has if nothing is said.
const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// They act on the host as a whole: no CT has them, so who asks for one by name gets an error and not a surprise.
const HOST_ONLY: [&str; 5] = ["SYS_MODULE", "SYS_RAWIO", "SYS_TIME", "MAC_OVERRIDE", "MAC_ADMIN"];

fn known(name: &str) -> Result<&'static str> {
    let upper = name.to_ascii_uppercase();
    let plain = upper.strip_prefix("CAP_").unwrap_or(&upper);
    ALL.iter()
        .find(|c| **c == plain)
        .copied()
        .ok_or_else(|| Error::Invalid(format!("unknown capability {name:?}")))
}

fn is_all(name: &str) -> bool {
    name.eq_ignore_ascii_case("ALL") || name.eq_ignore_ascii_case("CAP_ALL")
}

/// The container's capabilities with their `CAP_` prefix, in the order of their numbers.
pub(super) fn of(asked: Option<&v1::Capability>) -> Result<Vec<String>> {
    let none = v1::Capability::default();
    let asked = asked.unwrap_or(&none);
    if let Some(name) = asked.add_ambient_capabilities.first() {
        return Err(Error::Refused(format!("ambient capability {name:?}")));
    }
    let mut set: Vec<&str> = DEFAULT.to_vec();
    // As containerd: ALL first, then what is named.
    if asked.add_capabilities.iter().any(|c| is_all(c)) {
        set = ALL.iter().filter(|c| !HOST_ONLY.contains(c)).copied().collect();
    }
    if asked.drop_capabilities.iter().any(|c| is_all(c)) {
        set.clear();
    }
    for name in asked.add_capabilities.iter().filter(|c| !is_all(c)) {
        let name = known(name)?;
        if HOST_ONLY.contains(&name) {
            return Err(Error::Refused(format!("capability {name}: an unprivileged CT cannot have it")));
        }
        set.push(name);
    }
    for name in asked.drop_capabilities.iter().filter(|c| !is_all(c)) {
        let name = known(name)?;
        set.retain(|c| *c != name);
    }
    Ok(ALL.iter().filter(|c| set.contains(c)).map(|c| format!("CAP_{c}")).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn ask(add: &[&str], drop: &[&str]) -> Result<Vec<String>> {
        let list = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        of(Some(&v1::Capability {
            add_capabilities: list(add),
            drop_capabilities: list(drop),
            ..Default::default()
        }))
    }

    #[test]
    fn every_capability_is_known_to_the_specifications_crate() {
        for name in ALL {
            let known: oci_spec::runtime::Capability = name.parse().unwrap();
            assert_eq!(serde_json::to_value(known).unwrap(), format!("CAP_{name}"));
        }
    }

    #[test]
    fn the_default_is_containerds() {
        let caps = of(None).unwrap();
        assert_eq!(caps.len(), 14);
        assert!(caps.contains(&"CAP_NET_RAW".to_owned()) && !caps.contains(&"CAP_SYS_ADMIN".to_owned()));
    }

    #[test]
    fn all_may_be_dropped_and_some_added_again() {
        assert_eq!(ask(&["NET_BIND_SERVICE"], &["ALL"]).unwrap(), ["CAP_NET_BIND_SERVICE"]);
        assert_eq!(ask(&["CAP_NET_BIND_SERVICE"], &["all"]).unwrap(), ["CAP_NET_BIND_SERVICE"]);
        assert!(ask(&[], &["ALL"]).unwrap().is_empty());
        assert_eq!(ask(&["ALL"], &[]).unwrap().len(), 36);
        assert!(!ask(&["ALL"], &["cap_net_raw"]).unwrap().contains(&"CAP_NET_RAW".to_owned()));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        assert!(ask(&["FLY"], &[]).unwrap_err().to_string().contains("\"FLY\""));
        assert!(ask(&["SYS_MODULE"], &[]).unwrap_err().to_string().contains("SYS_MODULE"));
        assert!(ask(&[], &["FLY"]).is_err());
    }
}
