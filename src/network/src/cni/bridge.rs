//! The bridge of our own network and the gateways' addresses on it.
//!
//! CNI's bridge plugin knows one gateway for a bridge. A cluster that registers a node anew allots it another range while pods
//! of the old one run on: so the bridge carries a gateway for each range in use, and the plugin is told to leave it alone.
//!
//! A bridge that Moxlet makes carries its mark, an interface alias, from the same run of `ip` that makes it. One without the mark is
//! somebody else's (`vmbr0` of a host of Proxmox VE, say): it is used if it has the range's gateway already, refused by name if not,
//! and never changed or removed.

use std::{fs, net::Ipv4Addr, path::PathBuf};

use moxlet_files::read_text_bounded;

use crate::{
    Error, Result,
    error::io,
    program::{self, Ended},
};

const FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
/// The interface alias of a bridge that Moxlet made.
const MARK: &str = "dev.moxlet:bridge";

/// Whose an interface of the configured name is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// There is no interface of this name.
    Nobody,
    /// Moxlet made it.
    Moxlet,
    /// Somebody else made it.
    Other,
}

fn interface(name: &str) -> PathBuf {
    PathBuf::from("/sys/class/net").join(name)
}

/// Whose the bridge is. One without a mark is ours too if it has the hardware address that Moxlet makes of a gateway which it
/// carries: older versions set no mark.
///
/// # Errors
/// What is there could not be read.
pub(super) fn owner(bridge: &str) -> Result<Owner> {
    let dir = interface(bridge);
    let read = |name: &str| {
        let path = dir.join(name);
        read_text_bounded(&path, 4096).map(|text| text.trim().to_owned()).map_err(io("read", path))
    };
    if !dir.exists() {
        return Ok(Owner::Nobody);
    }
    if !dir.join("bridge").is_dir() {
        return Ok(Owner::Other);
    }
    let alias = read("ifalias")?;
    if alias == MARK {
        return Ok(Owner::Moxlet);
    }
    let address = read("address")?;
    let made =
        |(at, range): &(Ipv4Addr, Range)| *at == range.gateway() && hardware_address(*range) == address;
    let ours = alias.is_empty() && addresses(bridge).iter().any(made);
    Ok(if ours { Owner::Moxlet } else { Owner::Other })
}

/// Without an address of its own a bridge takes that of its first port, and another when that goes.
fn hardware_address(range: Range) -> String {
    format!("0a:58:{}", range.gateway().octets().map(|o| format!("{o:02x}")).join(":"))
}

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
///
/// # Errors
/// [`Error::ForeignBridge`] where somebody else's interface of this name has another address, or `ip` failed.
pub(super) async fn ensure(bridge: &str, range: Range) -> Result<()> {
    if addresses(bridge).iter().any(|(address, own)| *own == range && *address == range.gateway()) {
        return forward();
    }
    match owner(bridge)? {
        Owner::Other => {
            return Err(Error::ForeignBridge {
                bridge: bridge.to_owned(),
                gateway: format!("{}/{}", range.gateway(), range.length),
            });
        }
        Owner::Nobody => make(bridge, range).await?,
        Owner::Moxlet => {}
    }
    let address = format!("{}/{}", range.gateway(), range.length);
    ip(&["address", "replace", &address, "dev", bridge]).await?;
    let up = ip(&["link", "set", "dev", bridge, "up"]).await?;
    if !up.status.success() || addresses(bridge).is_empty() {
        return Err(Error::Bridge { bridge: bridge.to_owned(), what: "make", said: up.said() });
    }
    forward()
}

/// Makes the bridge with its mark. `ip` does not go on to the mark where the name is taken.
async fn make(bridge: &str, range: Range) -> Result<()> {
    let commands = format!(
        "link add name {bridge} address {} type bridge\nlink set dev {bridge} alias {MARK}\n",
        hardware_address(range)
    );
    let made = program::run("ip", &["-batch", "-"], &commands).await?;
    if made.status.success() {
        return Ok(());
    }
    Err(Error::Bridge { bridge: bridge.to_owned(), what: "make", said: made.said() })
}

fn forward() -> Result<()> {
    let on = read_text_bounded(std::path::Path::new(FORWARD), 16).is_ok_and(|text| text.trim() == "1");
    if on { Ok(()) } else { fs::write(FORWARD, "1").map_err(io("write", FORWARD)) }
}

/// Marks a bridge of ours that an older version made; without its first gateway it could not be told any more.
///
/// # Errors
/// `ip` failed.
pub(super) async fn mark(bridge: &str) -> Result<()> {
    let marked = ip(&["link", "set", "dev", bridge, "alias", MARK]).await?;
    if marked.status.success() {
        return Ok(());
    }
    Err(Error::Bridge { bridge: bridge.to_owned(), what: "mark", said: marked.said() })
}

/// Takes a gateway from the bridge.
pub(super) async fn drop_gateway(bridge: &str, address: Ipv4Addr, range: Range) -> Result<()> {
    ip(&["address", "delete", &format!("{address}/{}", range.length), "dev", bridge]).await.map(drop)
}

/// Removes the bridge if Moxlet made it. Idempotent.
///
/// # Errors
/// `ip` failed.
pub(super) async fn remove(bridge: &str) -> Result<()> {
    match owner(bridge)? {
        Owner::Nobody => return Ok(()),
        Owner::Other => {
            tracing::warn!(bridge, "the bridge was not made by Moxlet and stays");
            return Ok(());
        }
        Owner::Moxlet => {}
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
