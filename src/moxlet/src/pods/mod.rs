//! The pods of this host by the CRI socket of its agent, for whoever works on the host: `moxlet pods`, `logs`, `exec`, `inspect` and
//! `events`. Their options and tables are kubectl's; a file a verb.

mod connect;
mod events;
mod exec;
mod inspect;
mod list;
mod logs;
mod model;
mod status;
mod table;
mod terminal;

use std::{future::Future, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};

pub(crate) use events::{EventsArgs, events};
pub(crate) use exec::{ExecArgs, exec};
pub(crate) use inspect::{InspectArgs, inspect};
pub(crate) use list::{PodsArgs, pods};
pub(crate) use logs::{LogsArgs, logs};

/// Runs a verb to its end, or to SIGINT or SIGTERM, which end it with the shell's status for them.
fn run(verb: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let outcome = runtime.block_on(async {
        let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        tokio::select! {
            outcome = verb => outcome,
            _ = term.recv() => Ok(ExitCode::from(143)),
            _ = int.recv() => Ok(ExitCode::from(130)),
        }
    });
    // A read of standard input cannot be ended; its thread must not keep the program.
    runtime.shutdown_timeout(Duration::from_millis(100));
    outcome
}
