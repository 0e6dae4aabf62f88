//! kubectl as a test calls it: arguments in, exit code and output out, never longer than a limit.

use std::{
    io::{Read, Write},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::Cluster;

/// How long one call may take.
const LIMIT: Duration = Duration::from_secs(180);

/// A program that has ended.
#[derive(Debug)]
pub struct Finished {
    /// The exit code; -1 for a signal.
    pub code: i32,
    /// Standard output, as it came.
    pub stdout: Vec<u8>,
    /// Standard error, as text.
    pub stderr: String,
}

impl Finished {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard output, of a call that must have succeeded.
    ///
    /// # Panics
    /// It has not.
    pub fn ok(self) -> String {
        assert!(self.code == 0, "exit code {}: {}{}", self.code, self.text(), self.stderr);
        self.text()
    }

    /// Output and error of a call that must have failed.
    ///
    /// # Panics
    /// It has not.
    pub fn fails(self) -> String {
        assert!(self.code != 0, "succeeded unexpectedly: {}", self.text());
        self.text() + &self.stderr
    }
}

/// A call being put together.
#[derive(Debug)]
pub struct Kubectl {
    command: Command,
    stdin: Vec<u8>,
}

impl Kubectl {
    /// `kubectl [-n namespace] ARGS…`.
    pub fn new(namespace: Option<&str>, args: &[&str]) -> Self {
        let cluster = Cluster::get();
        let mut command = Command::new(&cluster.kubectl);
        command.env("KUBECONFIG", &cluster.kubeconfig);
        if let Some(namespace) = namespace {
            command.args(["-n", namespace]);
        }
        command.args(args);
        Self { command, stdin: Vec::new() }
    }

    /// The call's standard input.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// A variable of its environment, such as the one that turns WebSockets off.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Leaves it running: port-forward and followed logs. The caller ends it.
    pub fn spawn(mut self) -> Child {
        self.command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// It cannot be started, or takes over three minutes.
    pub fn run(mut self) -> Finished {
        let what = format!("{:?}", self.command);
        let mut child =
            self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let bytes = std::mem::take(&mut self.stdin);
        // A program that does not read all of its input closes the pipe: no error of ours.
        thread::spawn(move || drop(stdin.write_all(&bytes)));
        let stdout = drain(child.stdout.take().unwrap());
        let stderr = drain(child.stderr.take().unwrap());
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if start.elapsed() > LIMIT {
                drop(child.kill());
                drop(child.wait());
                panic!("{what} took over {} s", LIMIT.as_secs());
            }
            thread::sleep(Duration::from_millis(10));
        };
        Finished {
            code: status.code().unwrap_or(-1),
            stdout: stdout.join().unwrap(),
            stderr: String::from_utf8_lossy(&stderr.join().unwrap()).into_owned(),
        }
    }

    /// Runs it and parses what it printed.
    ///
    /// # Panics
    /// It failed or printed no JSON.
    pub fn json(self) -> Value {
        serde_json::from_str(&self.run().ok()).unwrap()
    }
}

fn drain(mut from: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        drop(from.read_to_end(&mut bytes));
        bytes
    })
}
