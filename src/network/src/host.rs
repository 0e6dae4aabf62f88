//! Addresses that this host and its gateways have: no pod may get one of these. They are looked for each time, since they change
//! while pods come and go.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{ErrorKind, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use crate::{Result, error::io};

/// Where the kernel shows the routes of the namespace.
const ROUTES_V4: &str = "/proc/net/route";
const ROUTES_V6: &str = "/proc/net/ipv6_route";
/// Bytes of such a table that are looked at: ten thousand routes and more.
const ROUTES_MAX: u64 = 4 << 20;

/// The addresses of all interfaces of this host, and the gateways that its routes name.
pub(crate) fn addresses() -> Result<BTreeSet<IpAddr>> {
    let path = Path::new("/proc/net");
    let interfaces = nix::ifaddrs::getifaddrs().map_err(|e| io("read the addresses in", path)(e.into()))?;
    let mut all: BTreeSet<IpAddr> = interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
        })
        .collect();
    all.extend(gateways_v4(&routes(ROUTES_V4)?).map(IpAddr::V4));
    all.extend(gateways_v6(&routes(ROUTES_V6)?).map(IpAddr::V6));
    Ok(all)
}

/// The beginning of a table of routes, which on a router is as long as the Internet; one of a family that the kernel does not have is
/// empty.
fn routes(path: &str) -> Result<String> {
    let mut text = String::new();
    match File::open(path).and_then(|file| file.take(ROUTES_MAX).read_to_string(&mut text)) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(String::new()),
        read => read.map(|_| text).map_err(io("read", path)),
    }
}

/// Gateways in `/proc/net/route`: interface, destination, gateway; addresses as the kernel has them in memory.
fn gateways_v4(text: &str) -> impl Iterator<Item = Ipv4Addr> {
    let gateway = |line: &str| {
        let number = u32::from_str_radix(line.split_whitespace().nth(2)?, 16).ok()?;
        Some(Ipv4Addr::from(number.to_ne_bytes())).filter(|gateway| !gateway.is_unspecified())
    };
    text.lines().filter_map(gateway)
}

/// Gateways in `/proc/net/ipv6_route`: destination, its length, source, its length, gateway.
fn gateways_v6(text: &str) -> impl Iterator<Item = Ipv6Addr> {
    let gateway = |line: &str| {
        let number = u128::from_str_radix(line.split_whitespace().nth(4)?, 16).ok()?;
        Some(Ipv6Addr::from(number)).filter(|gateway| !gateway.is_unspecified())
    };
    text.lines().filter_map(gateway)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn gateways_are_read_from_the_routes() {
        let four = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\n\
            vmbr0\t00000000\t0132A8C0\t0003\t0\t0\t0\t00000000\n\
            vmbr0\t0032A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\nnonsense\n";
        assert_eq!(gateways_v4(four).collect::<Vec<_>>(), [Ipv4Addr::new(192, 168, 50, 1)]);
        let none = "0".repeat(32);
        let six = format!(
            "{none} 00 {none} 00 20010db8000000000000000000000001 00000400 00000001 00000000 00000003 vmbr0\n\
             20010db8000000000000000000000000 40 {none} 00 {none} 00000100 00000001 00000000 00000001 vmbr0\nnonsense\n"
        );
        assert_eq!(gateways_v6(&six).collect::<Vec<_>>(), ["2001:db8::1".parse::<Ipv6Addr>().unwrap()]);
    }

    #[test]
    fn the_loopback_address_is_one_of_the_hosts() {
        assert!(addresses().unwrap().contains(&IpAddr::V4(Ipv4Addr::LOCALHOST)));
    }
}
