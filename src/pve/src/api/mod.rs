//! The calls, one file a subject, with the types of their answers.
//!
//! A type lists the fields that are of use to callers; others are ignored. What the schema calls optional is an `Option` or has
//! its zero.

pub mod access;
pub mod cluster;
pub mod ct;
pub mod firewall;
pub mod ha;
pub mod network;
pub mod node;
pub mod pool;
pub mod snapshot;
pub mod storage;
pub mod task;
