//! The only hands of the pod machine: what a plan says is done here, and nowhere else.

mod container;
mod kill;
mod sandbox;

pub(super) use container::{Held, words};
