//! The link between a node and an agent: a unix socket on the same host, or one TCP port of the agent's with TLS, where each side
//! proves with a certificate who it is.
//!
//! On the port both of the agent's protocols are spoken; which one a connection is for is said by ALPN: `h2` is gRPC, `http/1.1`
//! the streaming server of exec, attach and port-forward. Whoever holds a certificate for [`NODE_NAME`] is root on the agent's host,
//! in effect; so a certificate of the right authority that is for something else is not enough.
//!
//! | file | what it does |
//! |---|---|
//! | `files` | certificate, key and authority: read, and read again once they have changed |
//! | `client` | the node's side |
//! | `server` | the agent's side |

mod client;
mod files;
mod server;
#[cfg(test)]
mod tests;

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use rustix::net::sockopt;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;

pub use client::{Connection, Connector};
pub use files::CertificateFiles;
pub use server::{Accepted, Acceptor};

/// The DNS name that a node's certificate has to be for.
pub const NODE_NAME: &str = "moxlet-node";

/// How long a node waits for an agent: for each of its addresses to be connected to, and for it to shake hands.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an agent waits for whoever connects: well below the other, so that strangers do not outlast a node.
const SHORT_PATIENCE: Duration = Duration::from_secs(4);
/// A connection on which nothing comes is asked whether it is there after so many seconds, then each so many, and given up after
/// so many questions: streams may be idle for days.
const KEEP_ALIVE: (u32, u32, u32) = (20, 10, 3);

/// Has the kernel notice that the other machine is gone, also where it went without a word.
fn keep_alive(stream: &TcpStream) -> std::io::Result<()> {
    let (idle, interval, count) = KEEP_ALIVE;
    let seconds = |n: u32| Duration::from_secs(n.into());
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, seconds(idle))?;
    sockopt::set_tcp_keepintvl(stream, seconds(interval))?;
    sockopt::set_tcp_keepcnt(stream, count)?;
    // The same for what was sent and nobody has said to have got; in milliseconds.
    sockopt::set_tcp_user_timeout(stream, (idle + interval * count) * 1000)?;
    Ok(())
}

/// What is spoken on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// gRPC: CRI and `moxlet.host.v1`.
    Grpc,
    /// HTTP/1.1 with upgrades: the streams of exec, attach and port-forward.
    Streams,
}

impl Protocol {
    /// Its name in ALPN (RFC 7301).
    const fn alpn(self) -> &'static [u8] {
        match self {
            Self::Grpc => b"h2",
            Self::Streams => b"http/1.1",
        }
    }

    fn of_alpn(name: Option<&[u8]>) -> Option<Self> {
        [Self::Grpc, Self::Streams].into_iter().find(|p| name == Some(p.alpn()))
    }
}

/// Where an agent listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A socket of the same host: `unix:///run/moxlet/agent.sock`.
    Unix(PathBuf),
    /// A port with TLS: `https://pve1.example:10353`, `https://[fd00::1]:10353`.
    Tls {
        /// The name or address that the agent's certificate is for.
        host: ServerName<'static>,
        /// The port.
        port: u16,
    },
}

impl FromStr for Endpoint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |reason| Error::Endpoint { endpoint: text.to_owned(), reason };
        if let Some(path) = text.strip_prefix("unix://") {
            let path = PathBuf::from(path);
            return if path.is_absolute() {
                Ok(Self::Unix(path))
            } else {
                Err(wrong("the path of its socket has to begin with /, as in unix:///run/moxlet/agent.sock"))
            };
        }
        const FORM: &str = "it has to look like unix:///PATH or https://HOST:PORT";
        let authority = text.strip_prefix("https://").ok_or_else(|| wrong(FORM))?;
        let (host, port) = authority.trim_end_matches('/').rsplit_once(':').ok_or_else(|| wrong(FORM))?;
        let port = port
            .parse()
            .ok()
            .filter(|p| *p > 0)
            .ok_or_else(|| wrong("its port is not a number from 1 to 65535"))?;
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        if bare.is_none() && host.contains(':') {
            return Err(wrong("an IPv6 address has to be in brackets"));
        }
        let host = ServerName::try_from(bare.unwrap_or(host).to_owned());
        Ok(Self::Tls {
            host: host.map_err(|_| wrong("its host is neither a DNS name nor an IP address"))?,
            port,
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tls { host, port } => match host.to_str() {
                host if host.contains(':') => write!(f, "https://[{host}]:{port}"),
                host => write!(f, "https://{host}:{port}"),
            },
        }
    }
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong on the link.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is not an endpoint.
    #[error("{endpoint:?} is not the endpoint of an agent: {reason}")]
    Endpoint {
        /// The text.
        endpoint: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A port of an agent needs certificates.
    #[error(
        "{endpoint} needs a certificate, its key and the authority of the other side (`moxlet certificates` makes them)"
    )]
    NoCertificates {
        /// The agent's.
        endpoint: String,
    },
    /// A file of the link cannot be used.
    #[error("cannot use {path}: {reason}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The other side cannot be reached.
    #[error("cannot connect to {to}: {source}")]
    Connect {
        /// Whom.
        to: String,
        /// Why.
        source: std::io::Error,
    },
    /// Each side did not prove who it is.
    #[error("no TLS with {with}: {reason}")]
    Handshake {
        /// With whom.
        with: String,
        /// Why, and what to do.
        reason: String,
    },
}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Connect { source, .. } => source.kind(),
            Error::Handshake { .. } => Self::other("").kind(),
            _ => std::io::ErrorKind::InvalidInput,
        };
        Self::new(kind, error)
    }
}

/// What went wrong with TLS, with what to do about it where the reason does not say.
fn tls_reason(error: &std::io::Error) -> String {
    use rustls::{AlertDescription as Alert, CertificateError as Why, Error as Tls};

    let inner = error.get_ref().and_then(|e| e.downcast_ref::<Tls>());
    let hint = match inner {
        Some(Tls::InvalidCertificate(Why::UnknownIssuer)) => {
            "its certificate is not of the authority in link_ca_file"
        }
        // Of an authority of the same name.
        Some(Tls::InvalidCertificate(Why::BadSignature)) => {
            "its certificate is not of the authority in link_ca_file, but of one that is called the same"
        }
        Some(Tls::InvalidCertificate(Why::Expired | Why::ExpiredContext { .. })) => {
            "`moxlet certificates` renews it (look at both hosts' clocks, too)"
        }
        Some(Tls::InvalidCertificate(Why::NotValidYet | Why::NotValidYetContext { .. })) => {
            "look at both hosts' clocks"
        }
        // Of these the error itself shows no more than the name of a type.
        Some(Tls::InvalidCertificate(Why::Other(why))) => return why.0.to_string(),
        Some(Tls::NoCertificatesPresented) => "it showed no certificate",
        Some(Tls::AlertReceived(
            Alert::UnknownCA
            | Alert::BadCertificate
            | Alert::CertificateUnknown
            | Alert::CertificateExpired
            | Alert::CertificateRequired
            | Alert::AccessDenied
            | Alert::DecryptError
            | Alert::UnsupportedCertificate,
        )) => "the other side refused our certificate (link_certificate_file); its log says why",
        Some(Tls::InvalidMessage(_)) => "what listens there does not speak TLS",
        _ if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            "the other side hung up; its log may say why"
        }
        _ => return error.to_string(),
    };
    format!("{error}: {hint}")
}
