//! Test support for all that speaks the Proxmox VE API, whichever side it is on:
//!
//! - [`schema`]: requests and answers held against the official description of the API;
//! - [`recorder`]: the same for every request of a client;
//! - [`suite`]: the client against any endpoint; the program `pve-suite` runs it.

pub mod recorder;
pub mod schema;
pub mod suite;
