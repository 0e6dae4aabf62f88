//! Pods on a simulated host of Proxmox VE whose CTs are real ones: `tests/lab/pve` runs this.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod admin;
mod backup;
mod enter;
mod kills;
mod pod;
