//! What can fail in the simulator itself (not what its API refuses: that is [`crate::answer::Refusal`]).

use std::path::PathBuf;

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure of the simulator.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory of the state could not be read or written.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// The operation, such as `read`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The configuration says something that cannot be.
    #[error("configuration: {0}")]
    Config(String),
    /// The configuration file is no TOML of the expected form.
    #[error("cannot parse {}: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: toml::de::Error,
    },
    /// The embedded API schema could not be read.
    #[error("the embedded API schema: {0}")]
    Schema(String),
    /// No certificate could be made or loaded.
    #[error("TLS: {0}")]
    Tls(String),
    /// An address could not be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// A program of the host failed.
    #[error("{program} {args}: {status}: {stderr}")]
    Tool {
        /// The program.
        program: String,
        /// Its arguments, joined by blanks.
        args: String,
        /// Its exit status or why it did not run.
        status: String,
        /// The end of what it wrote.
        stderr: String,
    },
    /// What a back end cannot do now, in Proxmox VE's words.
    #[error("{0}")]
    Backend(String),
}

/// Names the operation and the file for an I/O error.
pub(crate) fn io<'a>(
    what: &'static str,
    path: &'a std::path::Path,
) -> impl FnOnce(std::io::Error) -> Error + use<'a> {
    move |source| Error::Io { what, path: path.to_path_buf(), source }
}
