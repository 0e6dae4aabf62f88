//! The agent's error and what its callers see of it: a gRPC status.

use moxlet_errors::chain;
use tonic::Status;

/// What can go wrong on a host.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call to the system failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, on what.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// There is no such sandbox, container or image.
    #[error("{0} not found")]
    NotFound(String),
    /// The request asks for what this agent does not do; the text names it.
    #[error("not supported: {0}")]
    Refused(String),
    /// It is not in the state that the request needs.
    #[error("{0}")]
    State(String),
    /// Somebody else holds the CT: a backup, or it is frozen.
    #[error("sandbox {sandbox} is held ({by}); it is left alone until that is over")]
    Held {
        /// Which.
        sandbox: String,
        /// By what.
        by: String,
    },
    /// It took longer than allowed.
    #[error("{0}")]
    Timeout(String),
    /// So much is used at one time that there is no more; the text says of what.
    #[error("{0}")]
    Exhausted(String),
    /// The host cannot run pods; the text says what to do.
    #[error("{0}")]
    Unfit(String),
    /// A file of the ledger.
    #[error("ledger {path}: {reason}")]
    Ledger {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The CT.
    #[error(transparent)]
    Sandbox(#[from] moxlet_sandbox::Error),
    /// Its network.
    #[error(transparent)]
    Network(#[from] moxlet_network::Error),
    /// Layers and roots.
    #[error(transparent)]
    Storage(#[from] moxlet_storage::Error),
    /// Images.
    #[error(transparent)]
    Image(#[from] moxlet_image::Error),
    /// moxlet-init.
    #[error(transparent)]
    Init(#[from] moxlet_init_proto::Error),
    /// The link to a node on another machine.
    #[error(transparent)]
    Link(#[from] moxlet_cri::link::Error),
    /// An id from outside.
    #[error(transparent)]
    Id(#[from] moxlet_ids::InvalidId),
}

impl Error {
    /// A failed call to the system.
    pub fn io(what: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Io { what: what.into(), source: source.into() }
    }
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

impl From<std::io::Error> for Error {
    /// Of work that the runtime could not run to its end; whoever calls the system says what was tried, by [`Error::io`].
    fn from(source: std::io::Error) -> Self {
        Self::Io { what: "work on a thread of its own did not end".to_owned(), source }
    }
}

/// The code of a failed image operation. A kubelet tells pulls apart by their texts, people by both.
fn of_image(error: &moxlet_image::Error, text: String) -> Status {
    use moxlet_image::Error as E;
    match error {
        E::NotFound { .. } | E::Missing(_) => Status::not_found(text),
        E::InvalidName { .. }
        | E::Ambiguous(_)
        | E::PullPolicy(_)
        | E::MountPoint { .. }
        | E::Compression(_)
        | E::BadArchive { .. } => Status::invalid_argument(text),
        E::InUse { .. } | E::NeverPull(_) | E::NotRestorable { .. } => Status::failed_precondition(text),
        E::Damaged { .. } => Status::data_loss(text),
        full if full.is_full() => Status::resource_exhausted(text),
        E::Storage(error) => of_storage(error, text),
        _ => Status::unknown(text),
    }
}

/// The code of a failure of a CT or of a cgroup.
fn of_sandbox(error: &moxlet_sandbox::Error, text: String) -> Status {
    use moxlet_sandbox::Error as E;
    match error {
        temporary if temporary.is_temporary() => Status::unavailable(text),
        E::NotFound(_) => Status::not_found(text),
        E::Exists(_) => Status::already_exists(text),
        E::Invalid { .. } => Status::invalid_argument(text),
        E::NoVmid { .. } => Status::resource_exhausted(text),
        E::NoCgroup(_) | E::Foreign { .. } | E::Moved { .. } | E::VolumeTaken(_) => {
            Status::failed_precondition(text)
        }
        E::Timeout { .. } => Status::deadline_exceeded(text),
        E::Mount(error) => of_storage(error, text),
        _ => Status::internal(text),
    }
}

/// The code of a failure of the pods' network.
fn of_network(error: &moxlet_network::Error, text: String) -> Status {
    use moxlet_network::Error as E;
    match error {
        E::NoConfig { .. } | E::BadConfig { .. } => Status::unavailable(text),
        E::Invalid { .. } => Status::invalid_argument(text),
        E::Timeout { .. } | E::ProgramTimeout { .. } => Status::deadline_exceeded(text),
        E::NotAttached(_) | E::Attached(_) => Status::failed_precondition(text),
        _ => Status::internal(text),
    }
}

/// The code of a failed call to the system.
fn of_system(error: &std::io::Error, text: String) -> Status {
    use std::io::ErrorKind as Kind;
    match error.kind() {
        Kind::StorageFull | Kind::QuotaExceeded => Status::resource_exhausted(text),
        Kind::TimedOut => Status::deadline_exceeded(text),
        _ => Status::internal(text),
    }
}

/// The code of what an init answers, or does not.
fn of_init(error: &moxlet_init_proto::Error, text: String) -> Status {
    use moxlet_init_proto::{Error as E, ErrorClass as Class};
    match error {
        E::Timeout { .. } => Status::deadline_exceeded(text),
        E::Unreachable { .. } | E::Closed => Status::unavailable(text),
        E::Remote { class: Class::NotFound, .. } => Status::not_found(text),
        E::Remote { class: Class::AlreadyExists, .. } => Status::already_exists(text),
        E::Remote { class: Class::InvalidState, .. } => Status::failed_precondition(text),
        E::Remote { class: Class::InvalidArgument, .. } => Status::invalid_argument(text),
        E::Remote { class: Class::Unsupported, .. } => Status::unimplemented(text),
        _ => Status::internal(text),
    }
}

/// The code of a failure of the store: what an admin has to see to, and what goes by itself afterwards.
fn of_storage(error: &moxlet_storage::Error, text: String) -> Status {
    use moxlet_storage::Error as E;
    match error {
        full if full.is_full() => Status::resource_exhausted(text),
        E::PoolSuspended { .. } | E::TimedOut { .. } => Status::unavailable(text),
        E::LayerNotFound(_) | E::RootNotFound(_) => Status::not_found(text),
        E::LayerInUse { .. } | E::RootExists(_) => Status::failed_precondition(text),
        _ => Status::internal(text),
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let text = chain(&error);
        match &error {
            Error::Invalid(_) | Error::Id(_) => Status::invalid_argument(text),
            Error::NotFound(_) => Status::not_found(text),
            Error::Refused(_) => Status::unimplemented(text),
            Error::State(_) => Status::failed_precondition(text),
            Error::Timeout(_) => Status::deadline_exceeded(text),
            Error::Exhausted(_) => Status::resource_exhausted(text),
            Error::Init(error) => of_init(error, text),
            Error::Unfit(_) | Error::Held { .. } => Status::unavailable(text),
            Error::Sandbox(error) => of_sandbox(error, text),
            Error::Network(error) => of_network(error, text),
            Error::Io { source, .. } => of_system(source, text),
            Error::Ledger { .. } | Error::Link(_) => Status::internal(text),
            Error::Image(error) => of_image(error, text),
            Error::Storage(error) => of_storage(error, text),
        }
    }
}
