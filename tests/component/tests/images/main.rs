//! `moxlet image` as a person uses it: on a store of one's own and through an agent, with a real registry, skopeo and umoci.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod agent;
mod crashes;
mod migration;
mod proxy;
mod store;
mod support;
mod tools;
mod zfs;
