//! What can go wrong on a streaming connection.

/// A failure of a streaming connection; the connection is of no use afterwards.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or writing the connection failed.
    #[error("the streaming connection failed: {0}")]
    Io(#[from] std::io::Error),
    /// The other side broke the protocol, or a bound of ours.
    #[error("the streaming connection broke {protocol}: {reason}")]
    Protocol {
        /// SPDY/3.1 or WebSocket.
        protocol: &'static str,
        /// What was wrong.
        reason: String,
    },
    /// The HTTP connection could not be taken over.
    #[error("the connection could not be upgraded: {0}")]
    Upgrade(String),
    /// The other side did not open what it announced in time.
    #[error("timed out after {seconds} s waiting for the streams {missing}")]
    StreamsMissing {
        /// How long was waited.
        seconds: u64,
        /// Which are missing.
        missing: String,
    },
    /// The connection ended.
    #[error("the streaming connection was closed by the other side")]
    Closed,
}

impl Error {
    pub(crate) fn spdy(reason: impl Into<String>) -> Self {
        Self::Protocol { protocol: "SPDY/3.1", reason: reason.into() }
    }

    pub(crate) fn websocket(reason: impl Into<String>) -> Self {
        Self::Protocol { protocol: "WebSocket", reason: reason.into() }
    }
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;
