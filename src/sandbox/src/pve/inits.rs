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
        let (v4, v6) = (local_v4(&text("fib_trie")), global_v6(&text("if_inet6")));
        v4.into_iter().map(IpAddr::from).chain(v6.into_iter().map(IpAddr::from)).collect()
    }
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

/// Addresses in `/proc/PID/net/if_inet6`: address, index, prefix, scope (0 is global), flags, name.
fn global_v6(text: &str) -> BTreeSet<Ipv6Addr> {
    let line = |line: &str| {
        let mut fields = line.split_whitespace();
        let address = u128::from_str_radix(fields.next()?, 16).ok()?;
        let scope = fields.nth(2)?;
        let flags = u32::from_str_radix(fields.next()?, 16).ok()?;
        // Not while it is tentative: it may turn out to be somebody else's.
        (scope == "00" && flags & 0x40 == 0).then(|| Ipv6Addr::from(address))
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
        assert_eq!(global_v6(six), BTreeSet::from(["2001:db8::5".parse().unwrap()]));
    }

    #[test]
    fn the_addresses_of_this_process_are_read() {
        let inits = CgroupInits::new(ContainerCgroups::detect().unwrap());
        assert!(inits.addresses(std::process::id()).iter().all(|a| !a.is_loopback()));
    }
}
