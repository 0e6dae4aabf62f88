//! The moxlet program: command line, configuration file, wiring.

fn main() {}
