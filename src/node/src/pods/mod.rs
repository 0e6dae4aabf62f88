//! Pods: who they are, what they need next, and what is published about them.
//!
//! `manager` owns one `worker` task for each pod (by UID). A worker is told what its pod shall be and poked when the
//! agent reports something; each pass asks the agent for the pod's state, does the next missing steps and publishes a
//! status. Nothing is remembered on disk: sandboxes and containers carry their pod in CRI labels.

mod act;
pub(crate) mod admission;
pub(crate) mod backoffs;
pub(crate) mod container;
pub(crate) mod image;
mod images;
pub(crate) mod manager;
pub(crate) mod plan;
pub mod registry;
mod report;
pub(crate) mod restart;
pub(crate) mod sandbox_config;
pub(crate) mod source;
pub(crate) mod state;
pub(crate) mod status;
#[cfg(test)]
mod tests;
pub(crate) mod updates;
pub(crate) mod worker;
