//! What moxlet-init (PID 1 of every CT) and the agent say to each other, versioned: an init outlives upgrades of its agent.
//!
//! A unix stream socket, one connection a request (connecting costs some 30 µs, and nothing has to be multiplexed). A message
//! is a big-endian `u32` length and that many bytes of JSON; file descriptors travel by `SCM_RIGHTS` with its first byte.
//! Rules of compatibility: unknown fields are ignored, new fields have defaults, an unknown request is answered with
//! [`ErrorClass::Unsupported`], an unknown event is [`Event::Unknown`]. All that comes from a CT is hostile to the agent:
//! lengths, counts and kinds are bounded and checked here.
//!
//! **Logs.** A container's log is `log_path`; when it would grow beyond `log_max_bytes` it is renamed to
//! `log_path.<YYYYMMDD-HHMMSS.nanoseconds>` (UTC; so sorting by name is sorting by age) and a new one is begun. At most
//! `log_max_files` exist, the live one included; the oldest go. A record of the log (`<time> <stream> P|F <text>`) is never split between two files.
//!
//! **Exit records.** `state/<container id>.json` beside the socket's directory holds a [`ContainerState`], replaced atomically
//! before an exit is reported; [`read_exit_record`] reads it when the CT is gone.

#[cfg(feature = "client")]
mod asyncfd;
#[cfg(feature = "client")]
pub mod client;
pub mod frame;
mod record;

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};

#[cfg(feature = "client")]
pub use asyncfd::AsyncFile;
pub use record::{read_exit_record, write_exit_record};

/// The protocol's version. Raised only when an older peer could misunderstand a message.
pub const VERSION: u32 = 1;
/// The longest message in bytes: an OCI spec with a large environment fits.
pub const MAX_MESSAGE: usize = 4 << 20;
/// The most file descriptors of one message.
pub const MAX_FDS: usize = 3;
/// The most containers that a CT may report.
pub const MAX_CONTAINERS: usize = 1024;
/// The longest text of an error or message that is kept from a CT, in bytes.
pub const MAX_TEXT: usize = 4096;

/// What can go wrong between the agent and an init.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens at the socket, or it is not one.
    #[error("moxlet-init does not answer at {path}: {source}")]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// No answer in time.
    #[error("moxlet-init did not answer within {seconds} s to {request}")]
    Timeout {
        /// How long was waited.
        seconds: u64,
        /// Which request.
        request: &'static str,
    },
    /// The connection ended in the middle.
    #[error("moxlet-init closed the connection before it answered")]
    Closed,
    /// A message is longer than [`MAX_MESSAGE`].
    #[error("a message of {0} bytes is longer than {MAX_MESSAGE}")]
    TooLarge(usize),
    /// A message is no JSON of the expected form.
    #[error("a message from moxlet-init is not understood: {0}")]
    Malformed(String),
    /// The request was understood and refused or failed.
    #[error("{message}")]
    Remote {
        /// The kind of failure.
        class: ErrorClass,
        /// What the init said, bounded.
        message: String,
    },
    /// Reading or writing failed.
    #[error("talking to moxlet-init failed: {0}")]
    Io(#[from] std::io::Error),
    /// An exit record could not be read or written.
    #[error("exit record {path}: {reason}")]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl Error {
    /// The class of a failure that the init reported.
    #[must_use]
    pub fn class(&self) -> Option<ErrorClass> {
        match self {
            Self::Remote { class, .. } => Some(*class),
            _ => None,
        }
    }
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// The kind of a failure reported by the init.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ErrorClass {
    /// The process could not be started: missing command, no permission, bad working directory.
    StartError,
    /// No such container or exec.
    NotFound,
    /// The container exists.
    AlreadyExists,
    /// The container is not in the state that the request needs.
    InvalidState,
    /// The request makes no sense.
    InvalidArgument,
    /// The init is too old for the request.
    Unsupported,
    /// Something failed in the CT.
    Internal,
    /// A class that this version does not know.
    #[serde(other)]
    Other,
}

/// A request with the sender's version.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Envelope {
    /// The sender's [`VERSION`].
    #[serde(default)]
    pub version: u32,
    /// The request.
    pub request: Request,
}

/// What the agent asks.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "camelCase")]
pub enum Request {
    /// Which version is this? Answer: [`Response::Hello`].
    Hello,
    /// Make a container up to the moment before its command is executed. Answer: [`Response::Container`].
    Create(Box<CreateRequest>),
    /// Execute the container's command. Answer: [`Response::Container`].
    Start {
        /// The container.
        id: String,
    },
    /// Send a signal.
    Signal {
        /// The container.
        id: String,
        /// The signal's number.
        signal: i32,
        /// To all processes of the container, not only its first.
        #[serde(default)]
        all: bool,
    },
    /// Run another command in a container. Answer: [`Response::Execed`] with the streams.
    Exec(Box<ExecRequest>),
    /// Set a terminal's size.
    ResizeTty {
        /// The container.
        id: String,
        /// The exec; the container's own terminal without.
        #[serde(default)]
        exec_id: Option<String>,
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
    /// Copies of the container's output from now on, and its input. Answer: [`Response::Attached`] with the streams.
    ///
    /// A reader that takes nothing for 2 s is dropped, so that it never holds up the container and its log for longer.
    Attach {
        /// The container.
        id: String,
        /// Its input, if it has one (`stdin` of its [`CreateRequest`]).
        #[serde(default)]
        stdin: bool,
        /// Its output.
        #[serde(default)]
        stdout: bool,
        /// Its error output; a terminal has none.
        #[serde(default)]
        stderr: bool,
    },
    /// Wait for the end of an exec. Answer: [`Response::ExecExited`]; the exec is then forgotten.
    WaitExec {
        /// From [`Response::Execed`].
        exec_id: String,
    },
    /// Send a signal to a command of [`Request::Exec`] and to what it started in its process group.
    SignalExec {
        /// From [`Response::Execed`].
        exec_id: String,
        /// The signal's number.
        signal: i32,
    },
    /// All containers. Answer: [`Response::Containers`].
    List,
    /// Forget a container that is not running: bundle, state record and all.
    Remove {
        /// The container.
        id: String,
    },
    /// Open the log file anew, after someone else renamed it.
    ReopenLog {
        /// The container.
        id: String,
    },
    /// A TCP connection to a port of the pod's loopback. Answer: [`Response::Done`] with one socket.
    Connect {
        /// The port.
        port: u16,
    },
    /// Report what happens from now on: [`Response::Done`], then [`Response::Event`] without end.
    Events,
    /// Stop all containers and end. Answer: [`Response::Done`] when all have stopped.
    Shutdown {
        /// How long a container may take after its stop signal, in milliseconds.
        grace_ms: u64,
    },
    /// A request of a later version.
    #[serde(other)]
    Unknown,
}

/// A new container.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct CreateRequest {
    /// Its id, a [ContainerId](https://docs.rs/moxlet-ids) in effect: `[a-zA-Z0-9_.-]`, at most 64 characters.
    pub id: String,
    /// The OCI runtime spec; `root.path` and mount sources as the CT sees them.
    pub spec: serde_json::Value,
    /// The CRI log file as the CT sees it; none: output is thrown away.
    pub log_path: Option<PathBuf>,
    /// Rotate the log before it is longer; 0: never.
    pub log_max_bytes: u64,
    /// Log files kept, the live one included; 0 is taken as 1.
    pub log_max_files: u32,
    /// A terminal instead of pipes.
    pub tty: bool,
    /// Keep its input open for [`Request::Attach`].
    pub stdin: bool,
    /// Close the input when the first attached input ends.
    pub stdin_once: bool,
    /// The signal that [`Request::Shutdown`] sends first; 0: SIGTERM.
    pub stop_signal: i32,
}

/// Another command in a running container. User, groups, capabilities, seccomp and limits are those of the container's spec.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecRequest {
    /// The container.
    pub id: String,
    /// The command and its arguments.
    pub args: Vec<String>,
    /// Variables to set or replace in the container's environment.
    pub env: BTreeMap<String, String>,
    /// The working directory, if not the container's.
    pub cwd: Option<String>,
    /// A terminal: one stream for all.
    pub tty: bool,
    /// Hand over its input.
    pub stdin: bool,
    /// Hand over its output.
    pub stdout: bool,
    /// Hand over its error output.
    pub stderr: bool,
    /// The terminal's columns; 0: unset.
    pub width: u16,
    /// The terminal's rows; 0: unset.
    pub height: u16,
}

/// What the init answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "re", rename_all = "camelCase")]
pub enum Response {
    /// Done; nothing more to say.
    Done,
    /// The init's version.
    Hello {
        /// Its [`VERSION`].
        version: u32,
    },
    /// A container as it is now.
    Container {
        /// The container.
        container: ContainerState,
    },
    /// All containers.
    Containers {
        /// The containers, in no order.
        containers: Vec<ContainerState>,
    },
    /// A command runs; its streams come with the message.
    Execed {
        /// For [`Request::WaitExec`].
        exec_id: String,
        /// Which streams come with the message.
        streams: StreamSet,
    },
    /// Streams come with the message.
    Attached {
        /// Which.
        streams: StreamSet,
    },
    /// An exec has ended.
    ExecExited {
        /// The exit code, 128 + n after signal n.
        code: i32,
    },
    /// Something happened.
    Event {
        /// What.
        event: Event,
    },
    /// It did not work.
    Error {
        /// The kind.
        class: ErrorClass,
        /// For people.
        message: String,
    },
}

/// Which streams come with a message, in this order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StreamSet {
    /// A writable end.
    pub stdin: bool,
    /// A readable end.
    pub stdout: bool,
    /// A readable end.
    pub stderr: bool,
    /// A terminal's master, then the only stream.
    pub terminal: bool,
}

impl StreamSet {
    /// How many descriptors that makes.
    #[must_use]
    pub fn count(self) -> usize {
        [self.stdin, self.stdout, self.stderr, self.terminal].into_iter().filter(|x| *x).count()
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "camelCase")]
pub enum Event {
    /// A container's command was executed.
    Started {
        /// The container, running.
        container: ContainerState,
    },
    /// A container has ended; its output is in the log, its record on disk.
    Exited {
        /// The container, exited.
        container: ContainerState,
    },
    /// An event of a later version.
    #[serde(other)]
    Unknown,
}

/// A container and its state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerState {
    /// Its id.
    pub id: String,
    /// Its state.
    pub status: Status,
    /// Its first process in the CT's PID namespace, from `Created` to the exit.
    #[serde(default)]
    pub pid: Option<u32>,
    /// Nanoseconds since 1970.
    #[serde(default)]
    pub created_at_ns: i64,
}

/// A container's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "camelCase")]
pub enum Status {
    /// Made, its command not executed.
    Created,
    /// Running.
    Running {
        /// Its first process in the CT's PID namespace.
        pid: u32,
        /// Nanoseconds since 1970.
        #[serde(default)]
        started_at_ns: i64,
    },
    /// Ended.
    Exited {
        /// The exit code, 128 + n after signal n, 128 when it could not be started.
        code: i32,
        /// The signal that ended it.
        #[serde(default)]
        signal: Option<i32>,
        /// Nanoseconds since 1970; 0: it never started.
        #[serde(default)]
        started_at_ns: i64,
        /// Nanoseconds since 1970.
        #[serde(default)]
        finished_at_ns: i64,
        /// Why it could not be started.
        #[serde(default)]
        message: Option<String>,
    },
}

/// Whether this may be a container's id: it becomes a file name.
#[must_use]
pub fn valid_id(id: &str) -> bool {
    !id.is_empty()
        && id.len() <= 64
        && !id.starts_with(['.', '-'])
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// A text from a CT, cut to [`MAX_TEXT`] bytes and without control characters.
#[must_use]
pub fn bounded(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if out.len() + c.len_utf8() > MAX_TEXT {
            break;
        }
        out.push(if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c });
    }
    out
}
