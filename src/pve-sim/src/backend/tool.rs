//! Programs of the host: explicit arguments, a fixed environment, no shell, a bounded time.

use std::{process::Stdio, time::Duration};

use tokio::process::Command;

use crate::{Error, Result};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const STDERR_MAX: usize = 2000;

/// A program with the environment that all get.
pub(super) fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", PATH)
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

/// Runs a program to its end and returns what it wrote to stdout.
pub(super) async fn run(program: &str, args: &[&str], limit: Duration) -> Result<String> {
    let failed = |status: String, stderr: &[u8]| {
        let text = String::from_utf8_lossy(stderr);
        let skip = text.chars().count().saturating_sub(STDERR_MAX);
        Error::Tool {
            program: program.to_owned(),
            args: args.join(" "),
            status,
            stderr: text.chars().skip(skip).collect::<String>().trim().to_owned(),
        }
    };
    let output = match tokio::time::timeout(limit, command(program).args(args).output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return Err(failed(error.to_string(), &[])),
        Err(_) => return Err(failed(format!("no end after {} s", limit.as_secs()), &[])),
    };
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(failed(output.status.to_string(), &output.stderr))
    }
}

/// A program that writes down how it was called and then does something, and where it writes. A shell makes it: a file that
/// this process itself had open for writing could not be run while another test forks.
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) fn script(dir: &std::path::Path, then: &str) -> (String, std::path::PathBuf) {
    let (program, asked) = (dir.join("program"), dir.join("asked"));
    let text = format!("#!/bin/sh\necho \"$*\" >>'{}'\n{then}\n", asked.display());
    let made = std::process::Command::new("sh")
        .args(["-c", "printf %s \"$1\" >\"$0\" && chmod 755 \"$0\""])
        .arg(&program)
        .arg(text)
        .status();
    assert!(made.unwrap().success());
    (program.display().to_string(), asked)
}
