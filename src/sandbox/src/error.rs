//! The crate's error: one variant an operation, saying what was attempted on what.

use std::{io, path::PathBuf};

/// Result with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with a CT.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No CT of this id.
    #[error("there is no CT {0}")]
    NotFound(String),
    /// A CT of this id exists already.
    #[error("CT {0} exists already")]
    Exists(String),
    /// A value that must not get into the CT's configuration, or cannot work.
    #[error("{what} {value:?} cannot be used: {reason}")]
    Invalid {
        /// Which value.
        what: String,
        /// The value, cut.
        value: String,
        /// Why not.
        reason: String,
    },
    /// The host lacks something; the text says what to do.
    #[error("this host cannot run CTs: {0}")]
    Host(String),
    /// A file operation failed.
    #[error("could not {what} {}", path.display())]
    Io {
        /// What was attempted, a verb.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A host tool could not be run at all.
    #[error("could not run {program}: is the package `lxc` installed?")]
    Spawn {
        /// The tool.
        program: String,
        /// Why not.
        source: io::Error,
    },
    /// A host tool failed.
    #[error("{program} of CT {ct} failed ({status}): {tail}")]
    Tool {
        /// The tool.
        program: String,
        /// The CT.
        ct: String,
        /// How it ended.
        status: String,
        /// The end of what it wrote.
        tail: String,
    },
    /// Something took too long.
    #[error("{what} of CT {ct} took longer than {seconds} s{tail}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// The CT.
        ct: String,
        /// How long.
        seconds: u64,
        /// `: ` and the end of what was written, or nothing.
        tail: String,
    },
    /// A limit or a figure of a cgroup could not be written or read.
    #[error("could not {what} the cgroup file {}", path.display())]
    Cgroup {
        /// What was attempted.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The cgroup does not exist (any more).
    #[error("there is no cgroup {}", .0.display())]
    NoCgroup(PathBuf),
}

pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io { what, path, source }
}
