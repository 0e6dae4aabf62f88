//! Pods: who they are, what they need next, and what is published about them.

pub mod registry;
