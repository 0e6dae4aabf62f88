//! The moxlet program: command line, configuration file, wiring, nothing else.
//!
//! `moxlet up` is node and agent in one process; `moxlet agent` is the CRI runtime alone, for crictl or an
//! ordinary kubelet; `moxlet image` works on the images of a host; `moxlet uninstall` takes it from the host. What they do lives in
//! the crates `moxlet-node` and `moxlet-agent`; here their settings are read, the machine is checked, and their tasks are started
//! and joined.

mod cli;
mod config;
mod duration;
mod image;
mod memory;
mod preflight;
mod pve_config;
mod run;
mod uninstall;

use std::process::ExitCode;

fn main() -> ExitCode {
    memory::bound_arenas();
    let cli = cli::Cli::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    let done = match &cli.command {
        cli::Command::Image(args) => image::main(args),
        cli::Command::Up(args) => run::main(&args.common, Some(args)),
        cli::Command::Agent(args) => run::main(args, None),
        cli::Command::Uninstall(args) => uninstall::main(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("moxlet: {error:#}");
            ExitCode::FAILURE
        }
    }
}
