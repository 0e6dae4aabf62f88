//! The agent's side of the link: who may connect, and for what.

use std::sync::Arc;

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, ServerConfig, SignatureScheme,
    client::{danger::HandshakeSignatureValid, verify_server_name},
    server::{
        NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::SingleCertAndKey,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    CertificateFiles, Error, NODE_NAME, Protocol, Result, SHORT_PATIENCE,
    files::{Current, Loaded, provider},
    keep_alive, tls_reason,
};

/// A connection of a node that has proved itself.
pub struct Accepted {
    /// What it is for.
    pub protocol: Protocol,
    /// The connection.
    pub stream: TlsStream<TcpStream>,
}

/// Shakes hands with nodes.
pub struct Acceptor {
    tls: Arc<Current<ServerConfig>>,
}

impl Acceptor {
    /// With the agent's certificates.
    ///
    /// # Errors
    /// They cannot be used.
    pub fn new(files: CertificateFiles) -> Result<Self> {
        Ok(Self { tls: Arc::new(Current::new(files, config)?) })
    }

    /// Shakes hands on a new connection.
    ///
    /// # Errors
    /// The other side is no node, wants another protocol, or takes too long.
    pub async fn accept(&self, stream: TcpStream) -> Result<Accepted> {
        let peer = stream.peer_addr().map_or_else(|_| "a client that has gone".to_owned(), |a| a.to_string());
        let failed = |reason: String| Error::Handshake { with: peer.clone(), reason };
        keep_alive(&stream).map_err(|e| failed(e.to_string()))?;
        let tls = self.tls.clone();
        let shaken = async {
            // Files are looked at, on a disk that may hang.
            let config =
                tokio::task::spawn_blocking(move || tls.get()).await.map_err(std::io::Error::other)?;
            TlsAcceptor::from(config).accept(stream).await
        };
        let stream = timeout(SHORT_PATIENCE, shaken)
            .await
            .map_err(|_| failed("it took too long".to_owned()))?
            .map_err(|e| failed(tls_reason(&e)))?;
        let protocol = Protocol::of_alpn(stream.get_ref().1.alpn_protocol())
            .ok_or_else(|| failed("it names no protocol (ALPN h2 or http/1.1)".to_owned()))?;
        Ok(Accepted { protocol, stream })
    }
}

fn config(loaded: Loaded) -> Result<ServerConfig, rustls::Error> {
    let general = |e: &dyn std::fmt::Display| rustls::Error::General(e.to_string());
    let signed = WebPkiClientVerifier::builder_with_provider(loaded.roots, provider());
    let nodes = Nodes {
        signed: signed.build().map_err(|e| general(&e))?,
        name: ServerName::try_from(NODE_NAME).map_err(|e| general(&e))?,
    };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(nodes))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(loaded.certified)));
    config.alpn_protocols = [Protocol::Grpc, Protocol::Streams].map(|p| p.alpn().to_vec()).into();
    // A session that is taken up again would outlive the certificates that it began with.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Judges clients: signed by the authority, for use by a client, and for the name of a node.
#[derive(Debug)]
struct Nodes {
    signed: Arc<dyn ClientCertVerifier>,
    name: ServerName<'static>,
}

impl ClientCertVerifier for Nodes {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.signed.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.signed.verify_client_cert(end_entity, intermediates, now)?;
        verify_server_name(&ParsedCertificate::try_from(end_entity)?, &self.name)
            .map_err(|_| CertificateError::Other(OtherError(Arc::new(NotANode))))?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signed.supported_verify_schemes()
    }
}

/// Why a certificate of the right authority is not enough.
#[derive(Debug, thiserror::Error)]
#[error("its certificate is not for the DNS name {NODE_NAME}")]
struct NotANode;
