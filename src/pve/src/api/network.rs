//! The networks of a node.

use serde::Deserialize;

use crate::{Client, NodeName, Result, http::Request, lenient};

/// Which interfaces to list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InterfaceKind {
    /// Bridges of the node's own, Linux' and Open vSwitch's.
    LocalBridges,
    /// All that a guest can be put on: bridges and virtual networks.
    AnyBridge,
    /// All, virtual networks included.
    All,
}

/// A network interface of a node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct NodeInterface {
    /// Its name; an alias has a colon in it.
    pub iface: String,
    /// `bridge`, `bond`, `eth`, `vlan`, `vnet`, `OVSBridge`, ….
    #[serde(rename = "type", default, deserialize_with = "lenient::string")]
    pub kind: String,
    /// Whether it is up.
    #[serde(default, deserialize_with = "lenient::bool")]
    pub active: bool,
    /// Whether it comes up with the node.
    #[serde(default, deserialize_with = "lenient::bool")]
    pub autostart: bool,
    /// Whether a bridge passes VLANs on.
    #[serde(default, deserialize_with = "lenient::bool")]
    pub bridge_vlan_aware: bool,
    /// Its IPv4 address with the prefix's length.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub cidr: Option<String>,
    /// Its IPv6 address with the prefix's length.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub cidr6: Option<String>,
    /// Its gateway.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub gateway: Option<String>,
    /// Its MTU, where it is configured.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub mtu: Option<u64>,
}

impl Client {
    /// The interfaces of a node.
    ///
    /// # Errors
    /// As every call. Bridges that we may not use are left out.
    pub async fn interfaces(&self, node: &NodeName, kind: InterfaceKind) -> Result<Vec<NodeInterface>> {
        let kind = match kind {
            InterfaceKind::LocalBridges => "any_local_bridge",
            InterfaceKind::AnyBridge => "any_bridge",
            InterfaceKind::All => "include_sdn",
        };
        let request = Request::new("GET", "/nodes/{node}/network").at("node", node).with("type", kind);
        self.list(request, "the list of interfaces").await
    }
}
