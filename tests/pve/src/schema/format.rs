//! The named formats of the schema (`pve-node`, `mac-addr`, …) that matter to containers, as Proxmox VE's own sources
//! define them. A name that is not here is taken as it is.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::pattern::matches;

/// What is wrong with a text in a named format.
pub(super) fn check(format: &str, text: &str) -> Result<(), String> {
    if let Some(fits) = whole(format, text) {
        return said(fits, format, text);
    }
    // A list of anything is split at commas, semicolons, blanks or NULs.
    if let Some(item) = format.strip_suffix("-list") {
        let mut items = text.split([',', ';', ' ', '\t', '\n', '\0']).filter(|i| !i.is_empty());
        return items.try_for_each(|i| whole(item, i).map_or(Ok(()), |fits| said(fits, item, i)));
    }
    Ok(())
}

fn said(fits: bool, format: &str, text: &str) -> Result<(), String> {
    if fits { Ok(()) } else { Err(format!("{text:?} is no {format}")) }
}

const STORAGE_ID: &str = "(?i:[a-z][a-z0-9\\-_.]*[a-z0-9])";
const CONTENTS: &[&str] = &["images", "rootdir", "vztmpl", "iso", "backup", "snippets", "import", "none"];

/// Whether a text fits, if the format is known.
fn whole(format: &str, text: &str) -> Option<bool> {
    Some(match format {
        "pve-vmid" => matches("[1-9][0-9]{2,8}", text),
        "pve-node" => matches("(?i:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)", text),
        "pve-configid" => matches("(?i:[a-z][a-z0-9_-]+)", text),
        "pve-storage-id" => matches(STORAGE_ID, text),
        "pve-poolid" => matches("[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+){0,2}", text),
        "pve-volume-id" => matches(&format!("{STORAGE_ID}:.+"), text),
        "pve-iface" => matches("(?i:[a-z][a-z0-9_]{1,20}(?:[:.]\\d+)?)", text),
        "pve-bridge-id" => matches("[-_.\\w\\d]+", text),
        "pve-userid" => matches("[^\\s:/]+@[A-Za-z][A-Za-z0-9._-]+", text),
        "pve-tokenid" => matches("[^\\s:/]+@[A-Za-z][A-Za-z0-9._-]+![A-Za-z][A-Za-z0-9._-]+", text),
        "pve-storage-content" => CONTENTS.contains(&text),
        "pve-task-status-type" => ["ok", "error", "warning", "unknown"].contains(&text),
        "pve-tag" => matches("(?i:[a-z0-9_][a-z0-9_+.-]*)", text),
        "pve-startup-order" => matches("(?:(?:(?:order=)?\\d+|up=\\d+|down=\\d+)(?:,|$))+", text),
        "pve-ha-resource-id" => matches("(?:ct|vm):[1-9][0-9]{2,8}", text),
        "pve-ha-resource-or-vm-id" => matches("(?:(?:ct|vm):)?[1-9][0-9]{2,8}", text),
        "pve-ha-node" => matches("(?i:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)(?::\\d+)?", text),
        "pve-lxc-mp-string" => !text.split('/').any(|s| s == "." || s == ".."),
        "pve-lxc-dev-string" => text.starts_with("/dev/"),
        "ip" => text.parse::<IpAddr>().is_ok(),
        "ipv4" => text.parse::<Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<Ipv6Addr>().is_ok(),
        "CIDRv4" => cidr(text, true, false),
        "CIDRv6" => cidr(text, false, true),
        "CIDR" => cidr(text, true, true),
        "pve-ipv4-config" => ["dhcp", "manual"].contains(&text) || cidr(text, true, false),
        "pve-ipv6-config" => ["auto", "dhcp", "manual"].contains(&text) || cidr(text, false, true),
        "lxc-ip-with-ll-iface" => {
            text == "host" || text.split('%').next().is_some_and(|a| a.parse::<IpAddr>().is_ok())
        }
        "dns-name" => matches(
            "(?i:(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)(?:\\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*)",
            text,
        ),
        "address" => text.parse::<IpAddr>().is_ok() || whole("dns-name", text) == Some(true),
        "mac-addr" => matches("(?i:[a-f0-9][02468ace](?::[a-f0-9]{2}){5})", text),
        "disk-size" => matches("\\d+(?:\\.\\d+)?[KMGT]?", text),
        "storage-pair" => matches(&format!("{STORAGE_ID}(?::{STORAGE_ID})?|1"), text),
        _ => return None,
    })
}

fn cidr(text: &str, v4: bool, v6: bool) -> bool {
    let Some((address, prefix)) = text.split_once('/') else { return false };
    let Ok(prefix) = prefix.parse::<u8>() else { return false };
    match address.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => v4 && (1..=32).contains(&prefix),
        Ok(IpAddr::V6(_)) => v6 && (1..=128).contains(&prefix),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn formats_take_what_they_should_and_nothing_else() {
        for (format, good, bad) in [
            ("pve-node", "pve-1", "pve_1"),
            ("pve-vmid", "1000000", "99"),
            ("pve-storage-id", "local-zfs", "local zfs"),
            ("pve-configid-list", "net0,mp1;lock", "net0,1mp"),
            ("pve-ipv4-config", "10.0.0.2/24", "10.0.0.2"),
            ("pve-ipv6-config", "auto", "10.0.0.2/24"),
            ("mac-addr", "BC:24:11:00:00:01", "BD:24:11:00:00:01"),
            ("pve-startup-order", "order=1,up=2,down=40", "down"),
            ("pve-tag-list", "moxlet;ns-default", "a b;ü"),
            ("dns-name", "a.b-c.d", "a_b"),
            ("storage-pair-list", "a1:b1,c1", "a1:"),
            ("lxc-ip-with-ll-iface-list", "fe80::1%eth0 1.1.1.1", "x"),
            ("pve-ha-resource-id", "ct:100", "lxc:100"),
        ] {
            assert_eq!(check(format, good), Ok(()), "{format}");
            assert!(check(format, bad).is_err(), "{format} takes {bad:?}");
        }
    }
}
