//! What the kernel tells of a running CT: `/proc`, cgroup v2, its network namespace.

use std::{
    fs,
    net::IpAddr,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{Interface, QUICK, Usage, run};
use crate::{Error, Result};

fn cgroup(vmid: u32) -> PathBuf {
    Path::new("/sys/fs/cgroup/lxc").join(vmid.to_string())
}

fn number(path: &Path) -> u64 {
    fs::read_to_string(path).ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0)
}

/// Whether a CT's monitor listens: its abstract socket is in `/proc/net/unix`. One read, where asking liblxc is a process.
pub(super) fn is_active(lxcpath: &Path, vmid: u32) -> bool {
    let socket = format!("@{}/{vmid}/command", lxcpath.display());
    fs::read_to_string("/proc/net/unix").is_ok_and(|text| text.lines().any(|line| line.ends_with(&socket)))
}

/// When a process started, in seconds since 1970.
pub(super) fn started(pid: u32) -> i64 {
    fs::metadata(format!("/proc/{pid}")).map_or(0, |m| m.ctime())
}

pub(super) fn is_frozen(vmid: u32) -> bool {
    number(&cgroup(vmid).join("cgroup.freeze")) == 1
}

pub(super) fn cpu_micros(vmid: u32) -> u64 {
    let text = fs::read_to_string(cgroup(vmid).join("cpu.stat")).unwrap_or_default();
    text.lines().find_map(|l| l.strip_prefix("usage_usec ")?.trim().parse().ok()).unwrap_or(0)
}

pub(super) fn usage(vmid: u32, pid: u32) -> Usage {
    let dir = cgroup(vmid);
    let disk =
        rustix::fs::statvfs(format!("/proc/{pid}/root")).map_or(0, |s| (s.f_blocks - s.f_bfree) * s.f_frsize);
    let (net_out, net_in) = network(vmid);
    Usage {
        cpu: 0.0,
        memory: number(&dir.join("memory.current")),
        swap: number(&dir.join("memory.swap.current")),
        disk,
        net_in,
        net_out,
    }
}

/// Bytes that the host's ends of the CT's interfaces received and sent: the CT's sent and received ones.
fn network(vmid: u32) -> (u64, u64) {
    let ours = format!("veth{vmid}i");
    let text = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    let mut sums = (0, 0);
    for line in text.lines() {
        let Some((name, figures)) = line.split_once(':') else { continue };
        if !name.trim().starts_with(&ours) {
            continue;
        }
        let figures: Vec<u64> = figures.split_whitespace().filter_map(|f| f.parse().ok()).collect();
        sums.0 += figures.first().copied().unwrap_or(0);
        sums.1 += figures.get(8).copied().unwrap_or(0);
    }
    sums
}

#[derive(Debug, Deserialize)]
struct Link {
    ifname: String,
    #[serde(default)]
    address: String,
    #[serde(default)]
    addr_info: Vec<Address>,
}

#[derive(Debug, Deserialize)]
struct Address {
    #[serde(default)]
    local: Option<IpAddr>,
    #[serde(default)]
    prefixlen: u8,
}

/// The interfaces in the CT's network namespace.
pub(super) async fn interfaces(pid: u32) -> Result<Vec<Interface>> {
    let net = format!("--net=/proc/{pid}/ns/net");
    let text = run("nsenter", &[&net, "ip", "-json", "address", "show"], QUICK).await?;
    let links: Vec<Link> =
        serde_json::from_str(&text).map_err(|e| Error::Backend(format!("ip -json: {e}")))?;
    Ok(links
        .into_iter()
        .map(|link| Interface {
            name: link.ifname,
            mac: link.address,
            addresses: link.addr_info.into_iter().filter_map(|a| Some((a.local?, a.prefixlen))).collect(),
        })
        .collect())
}
