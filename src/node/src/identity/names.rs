//! Names and addresses that a serving certificate is for.

use std::net::IpAddr;

/// What the serving certificate must name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServingNames {
    /// DNS names, as a rule the host's name.
    pub dns: Vec<String>,
    /// The node's addresses.
    pub ips: Vec<IpAddr>,
}
