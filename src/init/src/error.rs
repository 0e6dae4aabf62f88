//! What can go wrong in the CT, and the class under which the agent hears of it.

use moxlet_init_proto::{ErrorClass, Response, bounded};

/// An error of moxlet-init.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Wrong arguments.
    #[error("{0}")]
    Usage(String),
    /// The command cannot be executed.
    #[error("{0}")]
    Start(String),
    /// No such container or exec.
    #[error("{kind} {id:?} is not known")]
    NotFound {
        /// "container" or "exec".
        kind: &'static str,
        /// Its id.
        id: String,
    },
    /// The id is taken.
    #[error("container {0:?} exists")]
    Exists(String),
    /// Not in the needed state.
    #[error("container {id:?} is {is}; the request needs {needs}")]
    State {
        /// The container.
        id: String,
        /// Its state.
        is: &'static str,
        /// The needed one.
        needs: &'static str,
    },
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// A request of a later version.
    #[error("this moxlet-init does not know the request; it is older than its agent")]
    Unsupported,
    /// libcontainer or a helper failed.
    #[error("{0}")]
    Container(String),
    /// A system call failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Talking to the agent or a helper failed.
    #[error(transparent)]
    Proto(#[from] moxlet_init_proto::Error),
}

/// The crate's result.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Says what was tried when a system call fails.
pub(crate) trait Context<T> {
    fn context(self, what: impl Into<String>) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|e| Error::System { what: what.into(), source: e.into() })
    }
}

impl Error {
    /// The answer to the agent.
    pub(crate) fn response(&self) -> Response {
        let class = match self {
            Self::Start(_) => ErrorClass::StartError,
            Self::NotFound { .. } => ErrorClass::NotFound,
            Self::Exists(_) => ErrorClass::AlreadyExists,
            Self::State { .. } => ErrorClass::InvalidState,
            Self::Usage(_) | Self::Invalid(_) => ErrorClass::InvalidArgument,
            Self::Unsupported => ErrorClass::Unsupported,
            Self::Container(_) | Self::System { .. } | Self::Proto(_) => ErrorClass::Internal,
        };
        Response::Error { class, message: bounded(&self.to_string()) }
    }
}
