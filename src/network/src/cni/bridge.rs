//! The bridge of our own network and the gateways' addresses on it.
//!
//! CNI's bridge plugin knows one gateway for a bridge. A cluster that registers a node anew allots it another range while pods
//! of the old one run on: so the bridge carries a gateway for each range in use, and the plugin is told to leave it alone.

use std::{fs, net::Ipv4Addr};

use crate::{
    Error, Result,
    error::io,
    program::{self, Ended},
};

const FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";

/// An IPv4 range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    network: Ipv4Addr,
    length: u8,
}

impl Range {
    /// Reads `a.b.c.d/length`; host bits are dropped.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (address, length) = text.split_once('/')?;
        Self::of(address.parse().ok()?, length.parse().ok()?)
    }

    fn of(address: Ipv4Addr, length: u8) -> Option<Self> {
        let mask = u32::MAX.checked_shl(32_u32.checked_sub(length.into())?).unwrap_or(0);
        Some(Self { network: (u32::from(address) & mask).into(), length })
    }

    /// The address that host-local gives the gateway: the first one.
    pub(super) fn gateway(self) -> Ipv4Addr {
        u32::from(self.network).saturating_add(1).into()
    }

    pub(super) fn contains(self, address: Ipv4Addr) -> bool {
        Self::of(address, self.length) == Some(self)
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.network, self.length)
    }
}

/// The addresses of the bridge with their ranges.
pub(super) fn addresses(bridge: &str) -> Vec<(Ipv4Addr, Range)> {
    let found = nix::ifaddrs::getifaddrs().into_iter().flatten().filter(|i| i.interface_name == bridge);
    found
        .filter_map(|i| {
            let address = i.address?.as_sockaddr_in()?.ip();
            let mask = u32::from(i.netmask?.as_sockaddr_in()?.ip());
            Some((address, Range::of(address, u8::try_from(mask.leading_ones()).ok()?)?))
        })
        .collect()
}

/// Makes sure that the bridge is there with the range's gateway, and that the host forwards.
pub(super) async fn ensure(bridge: &str, range: Range) -> Result<()> {
    if addresses(bridge).iter().any(|(address, own)| *own == range && *address == range.gateway()) {
        return Ok(());
    }
    if !std::path::Path::new("/sys/class/net").join(bridge).exists() {
        // Without an address of its own a bridge takes that of its first port, and another when that goes.
        let mac = format!("0a:58:{}", range.gateway().octets().map(|o| format!("{o:02x}")).join(":"));
        ip(&["link", "add", "name", bridge, "address", &mac, "type", "bridge"]).await?;
    }
    let address = format!("{}/{}", range.gateway(), range.length);
    ip(&["address", "replace", &address, "dev", bridge]).await?;
    let up = ip(&["link", "set", "dev", bridge, "up"]).await?;
    if !up.status.success() || addresses(bridge).is_empty() {
        return Err(Error::Bridge { bridge: bridge.to_owned(), what: "make", said: up.said() });
    }
    fs::write(FORWARD, "1").map_err(io("write", FORWARD))
}

/// Takes a gateway from the bridge.
pub(super) async fn drop_gateway(bridge: &str, address: Ipv4Addr, range: Range) -> Result<()> {
    ip(&["address", "delete", &format!("{address}/{}", range.length), "dev", bridge]).await.map(drop)
}

/// Removes the bridge. Idempotent.
pub(super) async fn remove(bridge: &str) -> Result<()> {
    if !std::path::Path::new("/sys/class/net").join(bridge).join("bridge").exists() {
        return Ok(());
    }
    let ended = ip(&["link", "delete", "dev", bridge]).await?;
    if ended.status.success() {
        return Ok(());
    }
    Err(Error::Bridge { bridge: bridge.to_owned(), what: "remove", said: ended.said() })
}

/// Runs `ip`.
async fn ip(args: &[&str]) -> Result<Ended> {
    program::run("ip", args, "").await
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_range_has_its_first_address_for_the_gateway() {
        let range = Range::parse("10.244.2.9/24").unwrap();
        assert_eq!(
            (range.to_string().as_str(), range.gateway()),
            ("10.244.2.0/24", Ipv4Addr::new(10, 244, 2, 1))
        );
        assert!(
            range.contains(Ipv4Addr::new(10, 244, 2, 255)) && !range.contains(Ipv4Addr::new(10, 244, 3, 0))
        );
        assert!(Range::parse("10.0.0.0/33").is_none() && Range::parse("10.0.0.0").is_none());
    }
}
