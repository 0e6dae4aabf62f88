//! Test support for all that speaks the Proxmox VE API, whichever side it is on:
//!
//! - [`schema`]: requests and answers held against the official description of the API.

pub mod schema;
