//! The processes and addresses of CTs, read from cgroups and `/proc`.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use moxlet_ids::SandboxId;

use crate::{
    Result,
    cgroup::ContainerCgroups,
    error::io,
    find::find,
    process::{Process, read_bounded},
};

const MAX: u64 = 1 << 20;
/// The file name of what is run as PID 1.
const INIT_NAME: &str = "moxlet-init";

/// What can be seen of running CTs.
#[async_trait]
pub trait Inits: Send + Sync + fmt::Debug {
    /// PID 1 of a CT, by its number on the host.
    fn init(&self, id: &SandboxId) -> Option<u32>;
    /// Whether PID 1 is moxlet-init by now: before that liblxc may still fail in it.
    fn has_begun(&self, pid: u32) -> bool;
    /// Whether a CT is frozen.
    fn is_frozen(&self, id: &SandboxId) -> bool;
    /// Returns when a CT has no PID 1 (any more).
    async fn ended(&self, id: &SandboxId) -> Result<()>;
    /// The addresses of a CT, by its PID 1.
    fn addresses(&self, pid: u32) -> Vec<IpAddr>;
}

/// The real ones.
#[derive(Debug)]
pub struct CgroupInits(ContainerCgroups);

impl CgroupInits {
    /// CTs with these cgroups.
    #[must_use]
    pub fn new(cgroups: ContainerCgroups) -> Self {
        Self(cgroups)
    }
}

#[async_trait]
impl Inits for CgroupInits {
    fn init(&self, id: &SandboxId) -> Option<u32> {
        find(&self.0, id).init
    }

    fn has_begun(&self, pid: u32) -> bool {
        // The kernel keeps 15 bytes of the name.
        read_bounded(Path::new(&format!("/proc/{pid}/comm")), 64).is_ok_and(|name| name.trim() == INIT_NAME)
    }

    fn is_frozen(&self, id: &SandboxId) -> bool {
        self.0.is_frozen(id)
    }

    async fn ended(&self, id: &SandboxId) -> Result<()> {
        while let Some(pid) = self.init(id) {
            let path = || PathBuf::from(format!("/proc/{pid}"));
            let Some(process) = Process::open(pid).map_err(io("open the process", path()))? else { continue };
            // The number may have passed on to another process between the look and the opening.
            if self.init(id) == Some(pid) {
                process.ended().await.map_err(io("wait for", path()))?;
            }
        }
        Ok(())
    }

    fn addresses(&self, pid: u32) -> Vec<IpAddr> {
        let text =
            |file: &str| read_bounded(Path::new(&format!("/proc/{pid}/net/{file}")), MAX).unwrap_or_default();
        in_order(&local_v4(&text("fib_trie")), &connected(&text("route")), &global_v6(&text("if_inet6")))
    }
}

/// The interface that has the pod's own address.
const FIRST: &str = "eth0";

/// A network that an interface is on.
#[derive(Debug, PartialEq, Eq)]
struct Connected {
    interface: String,
    network: u32,
    mask: u32,
}

/// Addresses as a pod has them: those of its first interface before the others', IPv4 before IPv6. None before the first
/// interface has one of IPv4: that is the one that is waited for.
fn in_order(
    v4: &BTreeSet<Ipv4Addr>,
    networks: &[Connected],
    v6: &BTreeSet<(String, Ipv6Addr)>,
) -> Vec<IpAddr> {
    let interface = |ip: &Ipv4Addr| {
        let on = networks.iter().filter(|n| u32::from(*ip) & n.mask == n.network);
        on.max_by_key(|n| n.mask).map_or("", |n| n.interface.as_str())
    };
    let (own, others): (Vec<Ipv4Addr>, Vec<Ipv4Addr>) = v4.iter().partition(|ip| interface(ip) == FIRST);
    if own.is_empty() {
        return Vec::new();
    }
    let six = |first: bool| {
        v6.iter().filter(move |(name, _)| (name == FIRST) == first).map(|(_, ip)| IpAddr::from(*ip))
    };
    let own = own.into_iter().map(IpAddr::from).chain(six(true));
    own.chain(others.into_iter().map(IpAddr::from)).chain(six(false)).collect()
}

/// The networks in `/proc/PID/net/route` that are reached without a gateway: interface, destination, gateway, flags, …, and the
/// mask as the eighth; numbers as the kernel has them in memory.
fn connected(text: &str) -> Vec<Connected> {
    let line = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| {
            let number = u32::from_str_radix(fields.get(at)?, 16).ok()?;
            Some(u32::from_be_bytes(number.to_ne_bytes()))
        };
        let (network, mask) = (number(1)?, number(7)?);
        (number(2)? == 0 && mask != 0).then(|| Connected {
            interface: fields.first().copied().unwrap_or_default().to_owned(),
            network,
            mask,
        })
    };
    text.lines().filter_map(line).collect()
}

/// Addresses of the network namespace in `/proc/PID/net/fib_trie`: a leaf and below it what it is for.
fn local_v4(text: &str) -> BTreeSet<Ipv4Addr> {
    let mut found = BTreeSet::new();
    let mut leaf: Option<Ipv4Addr> = None;
    for line in text.lines().map(str::trim) {
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.trim().parse().ok();
        } else if line == "/32 host LOCAL" {
            found.extend(leaf.filter(|a| !a.is_loopback() && !a.is_link_local()));
        }
    }
    found
}

/// Addresses in `/proc/PID/net/if_inet6` with their interfaces: address, index, prefix, scope (0 is global), flags, name.
fn global_v6(text: &str) -> BTreeSet<(String, Ipv6Addr)> {
    let line = |line: &str| {
        let mut fields = line.split_whitespace();
        let address = u128::from_str_radix(fields.next()?, 16).ok()?;
        let scope = fields.nth(2)?;
        let flags = u32::from_str_radix(fields.next()?, 16).ok()?;
        let name = fields.next()?.to_owned();
        // Not while it is tentative: it may turn out to be somebody else's.
        (scope == "00" && flags & 0x40 == 0).then(|| (name, Ipv6Addr::from(address)))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn addresses_are_read_without_entering_the_namespace() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     +-- 10.0.0.0/24 2 0 2\n\
            \x20       |-- 10.0.0.0\n           /24 link UNICAST\n        |-- 10.0.0.7\n           /32 host LOCAL\n\
            \x20    |-- 127.0.0.1\n        /32 host LOCAL\n";
        assert_eq!(local_v4(trie), BTreeSet::from([Ipv4Addr::new(10, 0, 0, 7)]));
        let six = "fe80000000000000020000fffe000001 02 40 20 80 eth0\n20010db8000000000000000000000005 02 40 00 80 eth0\n\
            20010db8000000000000000000000006 02 40 00 c0 eth0\nnonsense\n";
        assert_eq!(global_v6(six), BTreeSet::from([("eth0".to_owned(), "2001:db8::5".parse().unwrap())]));
    }

    /// `/proc/net/route` of a CT on two bridges, as the kernel of a little-endian machine writes it.
    const ROUTES: &str = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
        eth0\t00000000\t0132A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
        eth1\t0000050A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n\
        eth0\t0032A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";

    #[test]
    #[cfg(target_endian = "little")]
    fn the_first_interfaces_addresses_come_first_whatever_their_numbers_are() {
        let networks = connected(ROUTES);
        assert_eq!(networks.len(), 2, "the default route is none of them: {networks:?}");
        let (own, other) = (Ipv4Addr::new(192, 168, 50, 9), Ipv4Addr::new(10, 5, 0, 4));
        let six = |name: &str, ip: &str| (name.to_owned(), ip.parse::<Ipv6Addr>().unwrap());
        let v6 = BTreeSet::from([six("eth0", "2001:db8::9"), six("eth1", "2001:db8::1")]);
        let order = in_order(&BTreeSet::from([other, own]), &networks, &v6);
        let text: Vec<String> = order.iter().map(ToString::to_string).collect();
        assert_eq!(text, ["192.168.50.9", "2001:db8::9", "10.5.0.4", "2001:db8::1"]);
        assert!(in_order(&BTreeSet::from([other]), &networks, &v6).is_empty(), "it is waited for");
    }

    #[test]
    fn the_addresses_of_this_process_are_read() {
        let inits = CgroupInits::new(ContainerCgroups::detect().unwrap());
        assert!(inits.addresses(std::process::id()).iter().all(|a| !a.is_loopback()));
    }
}
