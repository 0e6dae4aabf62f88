//! The contract of a storage driver, fulfilled by every driver on what is there: OverlayFS on a directory and on a tmpfs, ZFS
//! below the dataset that `MOXLET_TEST_ZFS` names, with ids shifted at the mount and on disk. `bed` tells which.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod bed;
mod binds;
mod content;
mod crash;
mod layers;
mod overlay;
mod quota;
mod roots;
mod suspended;
mod zfs;
