//! How a pod is attached: CNI invocation and the files of its resolver and hosts.
//!
//! * [`Cni`]: runs the plugins of a conflist (ADD, DEL, CHECK; CNI spec 1.0) on a CT's network namespace, remembers
//!   what it attached on disk, and writes a conflist of its own where it is told to.
//! * [`files`]: the text of `resolv.conf` and `hosts`.
//! * [`Slice`]: addresses for CTs that their engine attaches, one file each.
//! * [`resolver`]: the resolver of a host as its pods can use it.
//! * [`forwarding`]: records and restores the host's `ip_forward`, which CNI's bridge switches on.

mod cni;
mod error;
pub mod files;
pub mod forwarding;
mod host;
mod program;
pub mod resolver;
mod slice;

use std::net::IpAddr;

pub use cni::{Cni, CniConfig, take_down};
pub use error::{Error, Result};
pub use program::PROGRAM_PATH;
pub use slice::{Slice, SliceConfig};

/// What a pod got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Its addresses, the primary one first.
    pub ips: Vec<IpAddr>,
    /// The interface in the pod, `eth0`.
    pub interface: String,
    /// The interface's hardware address.
    pub mac: Option<String>,
}
