//! moxlet-agent as a CRI client sees it, on real LXC, CNI and a registry, with its store on OverlayFS or ZFS
//! (`MOXLET_TEST_STORAGE`): each test has an agent of its own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod containers;
mod events;
mod limits;
mod recovery;
mod refusals;
mod sandboxes;
mod storage;
mod uninstall;
mod volumes;
