//! Whether an interface of this host is a bridge that CTs can be put on, from what the kernel shows of it.
//!
//! ```text
//! <net>/<name>/bridge/       a Linux bridge; a virtual network of Proxmox VE is one, too
//! <net>/ovs-system           Open vSwitch has bridges here
//! ```
//! A bridge of Open vSwitch looks like any other virtual Ethernet interface. Where Open vSwitch runs, one of those that the
//! kernel shows as nothing else is therefore taken for one, as Proxmox VE itself takes all that are no Linux bridges.

use std::path::Path;

use crate::process::read_bounded;

const MAX: u64 = 1 << 12;
/// `ARPHRD_ETHER`.
const ETHERNET: &str = "1";

/// What is wrong with a bridge, and with an MTU that interfaces on it are to have.
pub(super) fn fault(net_dir: &Path, name: &str, mtu: Option<u16>) -> Option<String> {
    let dir = net_dir.join(name);
    if name.is_empty() || name.contains('/') || name.starts_with('.') || !dir.exists() {
        return Some(format!("there is no bridge {name} on this host (key bridge)"));
    }
    let ovs = net_dir.join("ovs-system").exists() && may_be_ovs(&dir);
    if !(ovs || dir.join("bridge").is_dir()) {
        return Some(format!("the interface {name} is no bridge (key bridge): pods need one, such as vmbr0"));
    }
    let own: u32 = text(&dir, "mtu").parse().ok()?;
    let wanted = mtu.filter(|m| u32::from(*m) > own)?;
    Some(format!(
        "mtu = {wanted} is above the {own} of bridge {name} (key mtu): no CT would start; raise the bridge's or leave the key out"
    ))
}

fn text(dir: &Path, file: &str) -> String {
    read_bounded(&dir.join(file), MAX).unwrap_or_default().trim().to_owned()
}

/// Whether an interface is a virtual Ethernet one that the kernel shows as no device, bond, TAP or the like.
fn may_be_ovs(dir: &Path) -> bool {
    let other = ["device", "bonding", "tun_flags", "master", "brport"];
    text(dir, "type") == ETHERNET
        && other.iter().all(|entry| !dir.join(entry).exists())
        && !text(dir, "uevent").contains("DEVTYPE=")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use super::*;

    /// An interface with these files; a name that ends in a slash is a directory.
    fn add(net: &Path, name: &str, files: &[(&str, &str)]) {
        fs::create_dir_all(net.join(name)).unwrap();
        for (file, text) in files {
            match file.strip_suffix('/') {
                Some(dir) => fs::create_dir(net.join(name).join(dir)).unwrap(),
                None => fs::write(net.join(name).join(file), text).unwrap(),
            }
        }
    }

    #[test]
    fn only_what_can_be_a_bridge_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let net = dir.path();
        add(
            net,
            "vmbr0",
            &[("bridge/", ""), ("type", "1"), ("mtu", "1500\n"), ("uevent", "DEVTYPE=bridge\n")],
        );
        add(net, "vmbr1", &[("type", "1\n"), ("mtu", "1500\n"), ("uevent", "INTERFACE=vmbr1\n")]);
        add(net, "lo", &[("type", "772\n"), ("mtu", "65536\n")]);
        add(net, "eno1", &[("type", "1\n"), ("device/", ""), ("mtu", "1500\n")]);
        add(net, "bond0", &[("type", "1\n"), ("uevent", "DEVTYPE=bond\n"), ("bonding/", "")]);
        let fault = |name: &str| super::fault(net, name, None);
        assert_eq!(fault("vmbr0"), None);
        for other in ["vmbr1", "lo", "eno1", "bond0"] {
            assert!(fault(other).unwrap().contains(&format!("{other} is no bridge")), "{other}");
        }
        for none in ["vmbr7", "", "..", "vmbr0/bridge"] {
            assert!(fault(none).unwrap().contains("there is no bridge"), "{none}");
        }
        add(net, "ovs-system", &[("type", "1\n")]);
        assert_eq!(fault("vmbr1"), None);
        for other in ["lo", "eno1", "bond0"] {
            assert!(fault(other).is_some(), "{other}");
        }
    }

    #[test]
    fn an_mtu_above_the_bridges_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        add(dir.path(), "vmbr0", &[("bridge/", ""), ("mtu", "1500\n")]);
        assert_eq!(fault(dir.path(), "vmbr0", Some(1500)), None);
        let text = fault(dir.path(), "vmbr0", Some(9000)).unwrap();
        assert!(text.contains("9000") && text.contains("1500") && text.contains("key mtu"), "{text}");
    }
}
