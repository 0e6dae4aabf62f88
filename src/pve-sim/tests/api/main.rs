//! The simulator's behaviour, each test named by it; [`cluster`] holds every request and answer against the schema.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, unreachable_pub)]

mod access;
mod backup;
mod cluster;
mod config_file;
mod crash;
mod faults;
mod http;
mod lifecycle;
mod processes;
mod resources;
mod restore;
mod tasks;
mod vmids;
