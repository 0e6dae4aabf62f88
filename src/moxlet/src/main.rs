//! The moxlet program: command line, configuration file, wiring, nothing else.
//!
//! `moxlet up` is node and agent in one process; `moxlet node` and `moxlet agent` are each alone, on one machine or two, for which
//! `moxlet certificates` makes what they know one another by; `moxlet image` works on the images of a host; `moxlet uninstall` takes
//! it from the host. What they do lives in the crates `moxlet-node` and `moxlet-agent`; here their settings are read, the machine is
//! checked, and their tasks are started and joined.

mod certificates;
mod check_config;
mod cli;
mod config;
mod duration;
mod image;
mod log_filter;
mod memory;
mod nearest;
mod preflight;
mod pve_config;
mod quantity;
mod run;
mod socket;
mod uninstall;

use std::process::ExitCode;

use crate::config::{Config, Role};

fn main() -> ExitCode {
    memory::bound_arenas();
    let cli = cli::Cli::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    let done = match &cli.command {
        cli::Command::Image(args) => image::main(args),
        cli::Command::Up(args) => Config::up(args).and_then(|c| run::main(c, Role::Up)),
        cli::Command::Node(args) => Config::node(args).and_then(|c| run::main(c, Role::Node)),
        cli::Command::Agent(args) => Config::agent(args).and_then(|c| run::main(c, Role::Agent)),
        cli::Command::Certificates(args) => certificates::main(args),
        cli::Command::CheckConfig(args) => check_config::main(args),
        cli::Command::Uninstall(args) => uninstall::main(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("moxlet: {}", moxlet_errors::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
