//! moxlet-init: PID 1 of every CT.

fn main() {}
