//! Programs of the host: the environment is ours, each has a time limit, and what is read of its output is bounded. No shell.
//!
//! A program outlives neither its limit nor whoever waits for it: it is killed when its run is dropped.

use std::{
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::{ChildStdin, Command},
};

use crate::{Error, Result};

/// Where programs are looked for, by us and by what we run; the caller's PATH is not asked.
pub const PROGRAM_PATH: &str = "/usr/sbin:/sbin:/usr/bin:/bin";
/// How long a program of the system may take: `iptables` waits for a lock, `ip` for one of the kernel.
const LIMIT: Duration = Duration::from_secs(20);
/// The most that is read of each output.
const OUTPUT_MAX: u64 = 1 << 20;
/// The most that is told of what a program said.
const SAID_MAX: usize = 400;

/// How a program ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Ended {
    /// What it said of its failure, on one line; how it ended if it said nothing.
    pub(crate) fn said(&self) -> String {
        let text = String::from_utf8_lossy(&self.stderr);
        let words: Vec<&str> = text.split_whitespace().collect();
        if words.is_empty() {
            return self.status.to_string();
        }
        words.join(" ").chars().take(SAID_MAX).collect()
    }
}

/// Whether a program of the system is there, and where.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    PROGRAM_PATH.split(':').map(|dir| Path::new(dir).join(name)).find(|path| path.is_file())
}

/// A command with nothing of our own environment.
pub(crate) fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", PROGRAM_PATH).env("LC_ALL", "C").current_dir("/");
    command
}

/// Runs a command with that input; `None` if it did not end in time and was killed.
pub(crate) async fn talk(mut command: Command, input: &[u8], limit: Duration) -> io::Result<Option<Ended>> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let ended = async {
        let (written, stdout, stderr) = tokio::join!(give(stdin, input), taken(stdout), taken(stderr));
        written?;
        Ok(Ended { status: child.wait().await?, stdout: stdout?, stderr: stderr? })
    };
    tokio::time::timeout(limit, ended).await.ok().transpose()
}

async fn give(stdin: Option<ChildStdin>, input: &[u8]) -> io::Result<()> {
    let Some(mut stdin) = stdin else { return Ok(()) };
    match stdin.write_all(input).await {
        // It ended, or did not want to hear all: its status says what came of it.
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(e),
        _ => Ok(()),
    }
}

async fn taken(output: Option<impl tokio::io::AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(output) = output {
        output.take(OUTPUT_MAX).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

/// Runs a program of the system to its end, whatever that is.
///
/// # Errors
/// It is not there, cannot be run or takes too long.
pub(crate) async fn run(name: &'static str, args: &[&str], input: &str) -> Result<Ended> {
    run_within(name, args, input, LIMIT).await
}

async fn run_within(name: &'static str, args: &[&str], input: &str, limit: Duration) -> Result<Ended> {
    let failed = |source| Error::Program { program: name, source };
    let path = find(name).ok_or_else(|| failed(ErrorKind::NotFound.into()))?;
    let mut command = command(&path);
    command.args(args);
    talk(command, input.as_bytes(), limit)
        .await
        .map_err(failed)?
        .ok_or(Error::ProgramTimeout { program: name, seconds: limit.as_secs() })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn a_program_has_our_environment_its_input_and_a_status() {
        let ended = run("env", &[], "").await.unwrap();
        assert_eq!(String::from_utf8(ended.stdout).unwrap(), format!("LC_ALL=C\nPATH={PROGRAM_PATH}\n"));
        let ended = run("cat", &[], "some input").await.unwrap();
        assert!(ended.status.success() && ended.stdout == b"some input");
        let ended = run("cat", &["/nonexistent/file"], "").await.unwrap();
        assert!(!ended.status.success() && ended.said().contains("/nonexistent/file"), "{}", ended.said());
        let ended = run("false", &[], &"unread ".repeat(100_000)).await.unwrap();
        assert_eq!(ended.said(), "exit status: 1");
    }

    #[tokio::test]
    async fn a_program_that_does_not_end_is_killed_and_named() {
        let error = run_within("sleep", &["1000"], "", Duration::ZERO).await.unwrap_err();
        assert_eq!(error.to_string(), "the program sleep did not end within 0 s; it was killed");
    }

    #[tokio::test]
    async fn no_more_is_read_than_is_wanted_of_a_program_that_goes_on_for_ever() {
        let ended = run("yes", &[], "").await.unwrap();
        assert_eq!(ended.stdout.len() as u64, OUTPUT_MAX);
        assert!(!ended.status.success());
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_no_plugin() {
        let error = run("nonexistent-program", &[], "").await.unwrap_err();
        assert_eq!(error.to_string(), "could not run the program nonexistent-program");
    }
}
