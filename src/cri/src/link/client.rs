//! The node's side of the link.

use std::{
    io::Cursor,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use rustls::{ClientConfig, client::Resumption, sign::SingleCertAndKey};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite},
    net::{TcpStream, UdpSocket, UnixStream},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    CertificateFiles, Endpoint, Error, PATIENCE, Protocol, Result,
    files::{Current, Loaded, provider},
    tls_reason,
};

/// What bytes go over, either way.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection to an agent.
pub type Connection = Box<dyn Stream>;

/// Makes connections to one agent.
#[derive(Clone)]
pub struct Connector {
    endpoint: Endpoint,
    tls: Option<Arc<Current<ClientConfig>>>,
}

impl Connector {
    /// For that agent, with the node's certificates if it is on a port.
    ///
    /// # Errors
    /// There are no certificates for a port, or they cannot be used.
    pub fn new(endpoint: Endpoint, files: Option<CertificateFiles>) -> Result<Self> {
        let tls = match (&endpoint, files) {
            (Endpoint::Unix(_), _) => None,
            (Endpoint::Tls { .. }, Some(files)) => Some(Arc::new(Current::new(files, config)?)),
            (Endpoint::Tls { .. }, None) => {
                return Err(Error::NoCertificates { endpoint: endpoint.to_string() });
            }
        };
        Ok(Self { endpoint, tls })
    }

    /// Where the agent is.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The address of this machine from which an agent on another one is reached. Nothing is sent.
    pub async fn local_address(&self) -> Option<IpAddr> {
        let Endpoint::Tls { host, port } = &self.endpoint else { return None };
        let to = tokio::net::lookup_host((&*host.to_str(), *port)).await.ok()?.next()?;
        let any: SocketAddr = match to {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = UdpSocket::bind(any).await.ok()?;
        socket.connect(to).await.ok()?;
        Some(socket.local_addr().ok()?.ip())
    }

    /// Connects. What is spoken on a unix socket is up to who listens there.
    ///
    /// # Errors
    /// Nobody answers in time, or one side does not accept the other's certificate.
    pub async fn connect(&self, protocol: Protocol) -> Result<Connection> {
        let to = || self.endpoint.to_string();
        let (host, port, tls) = match (&self.endpoint, &self.tls) {
            (Endpoint::Tls { host, port }, Some(tls)) => (host, *port, tls.clone()),
            (Endpoint::Tls { .. }, None) => return Err(Error::NoCertificates { endpoint: to() }),
            (Endpoint::Unix(path), _) => {
                let stream = UnixStream::connect(path).await;
                let stream = stream.map_err(|source| Error::Connect { to: to(), source })?;
                return Ok(Box::new(stream));
            }
        };
        let failed = |source: std::io::Error| Error::Connect { to: to(), source };
        let late = |_| failed(std::io::ErrorKind::TimedOut.into());
        let name = host.to_str();
        let stream = timeout(PATIENCE, TcpStream::connect((&*name, port)));
        let stream = stream.await.map_err(late)?.map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        // Files are looked at, on a disk that may hang.
        let config = tokio::task::spawn_blocking(move || tls.get()).await;
        let mut config = ClientConfig::clone(&*config.map_err(|e| failed(std::io::Error::other(e)))?);
        config.alpn_protocols = vec![protocol.alpn().to_vec()];
        let handshake = TlsConnector::from(Arc::new(config)).connect(host.clone(), stream);
        let refused = |e: std::io::Error| Error::Handshake { with: to(), reason: tls_reason(&e) };
        let stream = timeout(PATIENCE, handshake).await.map_err(late)?.map_err(refused)?;
        match protocol {
            Protocol::Grpc => timeout(PATIENCE, greeted(stream)).await.map_err(late)?.map_err(refused),
            Protocol::Streams => Ok(Box::new(stream)),
        }
    }
}

/// Waits for the agent's first word. By TLS 1.3 a client is done before the server has looked at its certificate: what the server
/// says of that would be lost in whatever the client does next. An HTTP/2 server speaks first (RFC 9113, section 3.4).
async fn greeted(mut stream: TlsStream<TcpStream>) -> std::io::Result<Connection> {
    let mut first = vec![0; 1024];
    let count = stream.read(&mut first).await?;
    if count == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    first.truncate(count);
    let (read, write) = tokio::io::split(stream);
    Ok(Box::new(tokio::io::join(Cursor::new(first).chain(read), write)))
}

fn config(loaded: Loaded) -> Result<ClientConfig, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(loaded.roots)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(loaded.certified)));
    // A session that is taken up again would outlive the certificates that it began with.
    config.resumption = Resumption::disabled();
    Ok(config)
}
