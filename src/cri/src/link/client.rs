//! The node's side of the link.

use std::{
    io::Cursor,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use rustls::{ClientConfig, client::Resumption, sign::SingleCertAndKey};
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite},
    net::{TcpStream, UdpSocket, UnixStream},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    CertificateFiles, Endpoint, Error, PATIENCE, Protocol, Result,
    files::{Current, Loaded, provider},
    keep_alive, tls_reason,
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

    /// The address of this machine from which an agent on another one is reached. Nothing is sent. None for an agent on this machine,
    /// also where it is reached by a port.
    pub async fn local_address(&self) -> Option<IpAddr> {
        let Endpoint::Tls { host, port } = &self.endpoint else { return None };
        for to in addresses(&host.to_str(), *port).await.ok()? {
            let any: SocketAddr = match to {
                SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
                SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
            };
            let Ok(socket) = UdpSocket::bind(any).await else { continue };
            let known = socket.connect(to).await.and_then(|()| socket.local_addr());
            match known.map(|a| a.ip()) {
                Ok(ip) if !ip.is_loopback() && !ip.is_unspecified() => return Some(ip),
                _ => {}
            }
        }
        None
    }

    /// Connects. What is spoken on a unix socket is up to who listens there.
    ///
    /// # Errors
    /// Nobody answers in time, or one side does not accept the other's certificate.
    pub async fn connect(&self, protocol: Protocol) -> Result<Connection> {
        let failed = |source: std::io::Error| Error::Connect { to: self.endpoint.to_string(), source };
        match (&self.endpoint, &self.tls) {
            (Endpoint::Unix(path), _) => Ok(Box::new(UnixStream::connect(path).await.map_err(failed)?)),
            (Endpoint::Tls { host, port }, Some(tls)) => {
                let stream = reach(&host.to_str(), *port).await.map_err(failed)?;
                keep_alive(&stream).map_err(failed)?;
                let late = |_| failed(std::io::ErrorKind::TimedOut.into());
                let shaken = timeout(PATIENCE, self.shake_hands(stream, host, tls.clone(), protocol));
                shaken.await.map_err(late)?
            }
            (Endpoint::Tls { .. }, None) => {
                Err(Error::NoCertificates { endpoint: self.endpoint.to_string() })
            }
        }
    }

    async fn shake_hands(
        &self,
        stream: TcpStream,
        host: &ServerName<'static>,
        tls: Arc<Current<ClientConfig>>,
        protocol: Protocol,
    ) -> Result<Connection> {
        let refused =
            |e: std::io::Error| Error::Handshake { with: self.endpoint.to_string(), reason: tls_reason(&e) };
        // Files are looked at, on a disk that may hang.
        let config = tokio::task::spawn_blocking(move || tls.get()).await;
        let mut config = ClientConfig::clone(&*config.map_err(|e| refused(std::io::Error::other(e)))?);
        config.alpn_protocols = vec![protocol.alpn().to_vec()];
        let stream = TlsConnector::from(Arc::new(config)).connect(host.clone(), stream);
        let stream = stream.await.map_err(refused)?;
        match protocol {
            Protocol::Grpc => greeted(stream).await.map_err(refused),
            Protocol::Streams => Ok(Box::new(stream)),
        }
    }
}

/// The addresses of a host.
async fn addresses(host: &str, port: u16) -> std::io::Result<Vec<SocketAddr>> {
    let found = timeout(PATIENCE, tokio::net::lookup_host((host, port))).await;
    Ok(found.map_err(|_| std::io::Error::other("its name is not resolved in time"))??.collect())
}

/// Connects to the first of a host's addresses that answers; one that swallows packets does not keep from the next.
async fn reach(host: &str, port: u16) -> std::io::Result<TcpStream> {
    let mut last = std::io::Error::other("its name has no address");
    for address in addresses(host, port).await? {
        let tried = timeout(PATIENCE, TcpStream::connect(address)).await;
        match tried.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
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
