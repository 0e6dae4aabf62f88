//! The engine on Proxmox VE against the simulator without LXC: files, calls, what an administrator does, and kills.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod admin;
mod away;
mod backup;
mod bad_input;
mod crash;
mod hook;
mod life;
mod network;
mod quorum;
mod restored;
mod role;
mod start;
mod world;
