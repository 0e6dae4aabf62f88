//! The moxlet program: command line, configuration file, wiring, nothing else.
//!
//! `moxlet up` is node and agent in one process; `moxlet node` and `moxlet agent` are each alone, on one machine or two, for which
//! `moxlet certificates` makes what they know one another by; `moxlet pods` and the verbs beside it show what runs here; `moxlet image` works on
//! the images of a host; `moxlet uninstall` takes it from the host. What they do lives in the crates `moxlet-node` and `moxlet-agent`; here their settings are read, the machine is
//! checked, and their tasks are started and joined.

mod args;
mod certificates;
mod check_config;
mod cli;
mod cli_docs;
mod config;
mod duration;
mod image;
mod log_filter;
mod memory;
mod nearest;
mod pods;
mod preflight;
mod pve_config;
mod quantity;
mod run;
mod socket;
mod uninstall;

use std::process::ExitCode;

use anyhow::Result;

use crate::{
    cli::Command,
    config::{Config, Role},
};

fn main() -> ExitCode {
    memory::bound_arenas();
    let cli = cli::Cli::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    run(&cli.command).unwrap_or_else(|error| {
        eprintln!("moxlet: {}", moxlet_errors::chain(error.as_ref()));
        ExitCode::FAILURE
    })
}

/// Runs a verb. One that runs a command of somebody else's ends as that did.
fn run(command: &Command) -> Result<ExitCode> {
    match command {
        Command::Image(args) => image::main(args),
        Command::Up(args) => Config::up(args).and_then(|c| run::main(c, Role::Up)),
        Command::Node(args) => Config::node(args).and_then(|c| run::main(c, Role::Node)),
        Command::Agent(args) => Config::agent(args).and_then(|c| run::main(c, Role::Agent)),
        Command::Certificates(args) => certificates::main(args),
        Command::CheckConfig(args) => check_config::main(args),
        Command::Uninstall(args) => uninstall::main(args),
        Command::Completion(args) => cli_docs::completion(args),
        Command::Man(args) => cli_docs::man(args),
        Command::Pods(args) => return pods::pods(args),
        Command::Logs(args) => return pods::logs(args),
        Command::Exec(args) => return pods::exec(args),
        Command::Inspect(args) => return pods::inspect(args),
        Command::Events(args) => return pods::events(args),
    }
    .map(|()| ExitCode::SUCCESS)
}
