//! `netN`: a network interface of a CT.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use super::property::{Extra, Fields, Writer};
use crate::{InterfaceName, InvalidName};

/// A network interface (`pve-container`'s `$netconf_desc`).
#[derive(Debug, Clone, PartialEq)]
pub struct NetInterface {
    /// Its name in the CT, such as `eth0`.
    pub name: InterfaceName,
    /// The bridge that it is on.
    pub bridge: Option<InterfaceName>,
    /// Whether the CT's firewall rules hold for it.
    pub firewall: Option<bool>,
    /// The IPv4 gateway.
    pub gw: Option<Ipv4Addr>,
    /// The IPv6 gateway.
    pub gw6: Option<Ipv6Addr>,
    /// Whether the host sets address and gateway, as it must where the guest's own files are left alone (9.1 and later).
    pub host_managed: Option<bool>,
    /// The MAC address; the server makes one if there is none.
    pub hwaddr: Option<MacAddr>,
    /// Its IPv4 address.
    pub ip: Option<IpConfig<Ipv4Addr>>,
    /// Its IPv6 address.
    pub ip6: Option<IpConfig<Ipv6Addr>>,
    /// Whether it is down from the start.
    pub link_down: Option<bool>,
    /// 64 to 65535; no more than the bridge's.
    pub mtu: Option<u16>,
    /// A limit in megabytes a second.
    pub rate: Option<f64>,
    /// The VLAN, 1 to 4094.
    pub tag: Option<u16>,
    /// VLANs that are passed through.
    pub trunks: Vec<u16>,
    /// `type`; there is only `veth`.
    pub kind: Option<InterfaceName>,
    /// Keys that this version does not know.
    pub extra: Extra,
}

impl NetInterface {
    /// An interface with nothing but a name.
    #[must_use]
    pub fn new(name: InterfaceName) -> Self {
        Self {
            name,
            bridge: None,
            firewall: None,
            gw: None,
            gw6: None,
            host_managed: None,
            hwaddr: None,
            ip: None,
            ip6: None,
            link_down: None,
            mtu: None,
            rate: None,
            tag: None,
            trunks: Vec::new(),
            kind: None,
            extra: Extra::new(),
        }
    }
}

impl FromStr for NetInterface {
    type Err = InvalidName;
    fn from_str(s: &str) -> Result<Self, InvalidName> {
        let mut fields = Fields::parse("network interface", s, None)?;
        let net = Self {
            name: fields.needed("name", "the name is missing or none")?,
            bridge: fields.parsed("bridge", "the bridge is no interface name")?,
            firewall: fields.flag("firewall")?,
            gw: fields.parsed("gw", "the gateway is no IPv4 address")?,
            gw6: fields.parsed("gw6", "the gateway is no IPv6 address")?,
            host_managed: fields.flag("host-managed")?,
            hwaddr: fields.parsed("hwaddr", "the MAC address is none")?,
            ip: fields.parsed("ip", "the IPv4 address is none")?,
            ip6: fields.parsed("ip6", "the IPv6 address is none")?,
            link_down: fields.flag("link_down")?,
            mtu: fields.parsed("mtu", "the MTU is no number up to 65535")?,
            rate: fields.parsed("rate", "the rate is no number")?,
            tag: fields.parsed("tag", "the VLAN is no number")?,
            trunks: fields.list("trunks", "the trunks are no VLANs")?,
            kind: fields.parsed("type", "the type is no word")?,
            extra: Extra::new(),
        };
        if net.rate.is_some_and(|r| !r.is_finite() || r < 0.0) {
            return Err(fields.wrong("the rate is no number"));
        }
        if net.tag.is_some_and(|t| !(1..=4094).contains(&t)) {
            return Err(fields.wrong("the VLAN is not between 1 and 4094"));
        }
        Ok(Self { extra: fields.rest()?, ..net })
    }
}

impl fmt::Display for NetInterface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut w = Writer::default();
        w.field("name", &self.name);
        w.maybe("bridge", self.bridge.as_ref());
        w.flag("firewall", self.firewall);
        w.maybe("gw", self.gw);
        w.maybe("gw6", self.gw6);
        w.flag("host-managed", self.host_managed);
        w.maybe("hwaddr", self.hwaddr);
        w.maybe("ip", self.ip.as_ref());
        w.maybe("ip6", self.ip6.as_ref());
        w.flag("link_down", self.link_down);
        w.maybe("mtu", self.mtu);
        w.maybe("rate", self.rate);
        w.maybe("tag", self.tag);
        w.list("trunks", &self.trunks);
        w.maybe("type", self.kind.as_ref());
        w.extra(&self.extra);
        w.finish(f)
    }
}

/// How an interface gets its address of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IpConfig<A> {
    /// By DHCP.
    Dhcp,
    /// From the guest's own configuration.
    Manual,
    /// By router advertisements; IPv6 alone.
    Auto,
    /// This one.
    Static {
        /// The address.
        address: A,
        /// The prefix's length.
        prefix: u8,
    },
}

/// IPv4 or IPv6.
pub trait Family: FromStr + fmt::Display + Into<IpAddr> + Copy {
    /// The longest prefix.
    const BITS: u8;
    /// Whether addresses come by router advertisements.
    const AUTO: bool;
}

impl Family for Ipv4Addr {
    const BITS: u8 = 32;
    const AUTO: bool = false;
}

impl Family for Ipv6Addr {
    const BITS: u8 = 128;
    const AUTO: bool = true;
}

impl<A: Family> FromStr for IpConfig<A> {
    type Err = InvalidName;
    fn from_str(s: &str) -> Result<Self, InvalidName> {
        let wrong = |reason| InvalidName::new("address of an interface", s, reason);
        match s {
            "dhcp" => return Ok(Self::Dhcp),
            "manual" => return Ok(Self::Manual),
            "auto" if A::AUTO => return Ok(Self::Auto),
            _ => {}
        }
        let (address, prefix) = s.split_once('/').ok_or_else(|| wrong("it has no prefix length"))?;
        let address = address.parse().map_err(|_| wrong("it is no address of its family"))?;
        let prefix = prefix.parse().ok().filter(|p| (1..=A::BITS).contains(p));
        Ok(Self::Static { address, prefix: prefix.ok_or_else(|| wrong("its prefix length is none"))? })
    }
}

impl<A: fmt::Display> fmt::Display for IpConfig<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dhcp => f.write_str("dhcp"),
            Self::Manual => f.write_str("manual"),
            Self::Auto => f.write_str("auto"),
            Self::Static { address, prefix } => write!(f, "{address}/{prefix}"),
        }
    }
}

/// A unicast MAC address, written in upper case as the server does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// A MAC address; none if it is a group's.
    #[must_use]
    pub fn new(bytes: [u8; 6]) -> Option<Self> {
        (bytes[0] & 1 == 0).then_some(Self(bytes))
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddr {
    type Err = InvalidName;
    fn from_str(s: &str) -> Result<Self, InvalidName> {
        let wrong = || InvalidName::new("MAC address", s, "it is not six bytes of a unicast address");
        let mut bytes = [0; 6];
        let mut parts = s.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = part.and_then(|p| u8::from_str_radix(p, 16).ok()).ok_or_else(wrong)?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        Self::new(bytes).ok_or_else(wrong)
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02X}:{b:02X}:{c:02X}:{d:02X}:{e:02X}:{g:02X}")
    }
}
