//! moxlet-init: PID 1 of every CT.
//!
//! It creates the pod's containers from OCI specs, reaps, writes their logs in CRI format, runs further commands in them and
//! records exits on disk before it reports them. It knows nothing of Kubernetes, and it outlives restarts of its agent, so
//! it remembers all that the agent may ask later.
//!
//! PID 1 has a few small threads and no runtime: one for signals and reaping (the main one), one that accepts, one for each
//! request, one for each container's output. What must be single-threaded (libcontainer forks by raw `clone3`, `setns` into
//! a mount namespace) happens in a short-lived child: this same binary again, as `moxlet-init create` or `moxlet-init exec`.
//! Called `sh` it lists the containers and enters one; see [`shell`]. On the host it is the hook `moxlet-init check-ct`.

mod attach;
mod cgroup;
mod check_ct;
mod console;
mod container;
mod error;
mod events;
mod execs;
mod helper;
mod log;
mod output;
mod pod;
mod reaper;
mod server;
mod shell;
mod spec;
mod sys;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use error::{Error, Result};

/// Where things lie and how long to wait; all by arguments.
#[derive(Debug)]
pub(crate) struct Options {
    socket: PathBuf,
    state: PathBuf,
    run: PathBuf,
    grace: Duration,
}

const USAGE: &str = "usage: moxlet-init [--socket PATH] [--state-dir PATH] [--run-dir PATH] [--grace SECONDS]

PID 1 of a Moxlet CT; nothing to be started by hand.
  --socket     where to listen (default /run/moxlet/pod/run/init.sock)
  --state-dir  exit records (default: state/ beside the socket's directory)
  --run-dir    bundles, on a tmpfs (default /run/moxlet)
  --grace      seconds between the stop signal and SIGKILL on a shutdown by signal (default 30)";

fn options(mut args: impl Iterator<Item = String>) -> Result<Options> {
    let mut options = Options {
        socket: PathBuf::from("/run/moxlet/pod/run/init.sock"),
        state: PathBuf::new(),
        run: PathBuf::from("/run/moxlet"),
        grace: Duration::from_secs(30),
    };
    while let Some(name) = args.next() {
        let mut value = || args.next().ok_or_else(|| Error::Usage(format!("{name} needs a value")));
        match name.as_str() {
            "--socket" => options.socket = value()?.into(),
            "--state-dir" => options.state = value()?.into(),
            "--run-dir" => options.run = value()?.into(),
            "--grace" => {
                let seconds =
                    value()?.parse().map_err(|_| Error::Usage("--grace needs a number of seconds".into()))?;
                options.grace = Duration::from_secs(seconds);
            }
            _ => return Err(Error::Usage(format!("unknown argument {name}"))),
        }
    }
    if options.state.as_os_str().is_empty() {
        let beside = options.socket.parent().and_then(|p| p.parent());
        options.state = beside.unwrap_or(std::path::Path::new("/run/moxlet/pod")).join("state");
    }
    Ok(options)
}

fn main() -> ExitCode {
    let mut args = std::env::args();
    if shell::is_wanted(args.next().as_deref()) {
        return shell::main(&args.collect::<Vec<_>>());
    }
    let mut args = args.peekable();
    let done = match args.peek().map(String::as_str) {
        Some("create") => return helper::create::main(args.skip(1)),
        Some("exec") => return helper::exec::main(args.skip(1)),
        Some("check-ct") => return check_ct::main(args.skip(1)),
        Some("--help" | "-h") => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Some("--version") => {
            println!("moxlet-init {} (protocol {})", env!("CARGO_PKG_VERSION"), moxlet_init_proto::VERSION);
            return ExitCode::SUCCESS;
        }
        _ => options(args).and_then(server::run),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("moxlet-init: {e}");
            if matches!(e, Error::Usage(_)) {
                eprintln!("{USAGE}");
            }
            ExitCode::FAILURE
        }
    }
}
