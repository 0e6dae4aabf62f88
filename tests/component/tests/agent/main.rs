//! moxlet-agent as a CRI client sees it, on real LXC, OverlayFS, CNI and a registry: each test has an agent of its own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod containers;
mod events;
mod limits;
mod recovery;
mod refusals;
mod sandboxes;
mod volumes;
