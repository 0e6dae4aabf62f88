//! The HTTP clients: one for each way of speaking TLS that the settings of a registry ask for.
//!
//! Trusted are the system's CAs and those that are named for a host; a server's own certificate that is named in their
//! place is taken as well, as by other engines. Of several client certificates the one is shown whose
//! issuer the server has named.

use std::{
    collections::{HashMap, HashSet},
    io::Read,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use reqwest::{Client, Proxy, Url};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme,
    client::{
        ResolvesClientCert, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::ParsedCertificate,
    sign::CertifiedKey,
};

use super::{hosts::Host, is_loopback};
use crate::{Error, Result, error::chain};

/// The largest certificate file that is read, in bytes.
const MAX_PEM: u64 = 4 << 20;
/// How many clients are kept; each change of a certificate makes a new one.
const MAX_CLIENTS: usize = 64;

/// The clients for one way of speaking.
#[derive(Debug)]
pub(super) struct Clients {
    remote: Client,
    /// For hosts on loopback, which no proxy could reach.
    local: Client,
}

impl Clients {
    pub(super) fn of(&self, url: &Url) -> &Client {
        if url.host_str().is_some_and(is_loopback) { &self.local } else { &self.remote }
    }
}

/// What makes a client differ from another, with the contents of the files.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
struct Material {
    ca: Vec<Vec<u8>>,
    client: Vec<(Vec<u8>, Vec<u8>)>,
    skip_verify: bool,
    connect: Duration,
    proxy: Option<Url>,
}

/// The clients that are in use.
#[derive(Default)]
pub(super) struct Cache {
    roots: OnceLock<Arc<RootCertStore>>,
    clients: Mutex<HashMap<Material, Arc<Clients>>>,
    /// Hosts about which the log has been told that they are not verified.
    unverified: Mutex<HashSet<String>>,
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file of bounded size.
pub(super) fn read_file(path: &Path, max: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(std::io::Error::other(format!("it is larger than {max} bytes")));
    }
    Ok(bytes)
}

fn settings(path: &Path, reason: impl Into<String>) -> Error {
    Error::Settings { path: path.to_owned(), line: None, reason: reason.into() }
}

impl Cache {
    /// The clients for a host; reads its certificate files.
    ///
    /// # Errors
    /// [`Error::Settings`]: a file that cannot be read or used.
    pub(super) fn clients(&self, host: &Host, connect: Duration) -> Result<Arc<Clients>> {
        let read = |path: &Path| {
            read_file(path, MAX_PEM).map_err(|e| settings(path, format!("it cannot be read: {e}")))
        };
        let mut material = Material {
            skip_verify: host.skip_verify,
            connect: host.dial_timeout.unwrap_or(connect),
            proxy: host.proxy.clone(),
            ..Material::default()
        };
        for path in &host.ca {
            material.ca.push(read(path)?);
        }
        for (cert, key) in &host.client {
            material.client.push((read(cert)?, read(key.as_ref().unwrap_or(cert))?));
        }
        if host.skip_verify {
            let name = host.api.as_ref().map_or("the registry", Url::as_str);
            if lock(&self.unverified).insert(name.to_owned()) {
                tracing::warn!(host = name, "skip_verify: whoever answers is taken for the registry");
            }
        }
        if let Some(clients) = lock(&self.clients).get(&material) {
            return Ok(Arc::clone(clients));
        }
        let clients = Arc::new(self.build(host, &material)?);
        let mut all = lock(&self.clients);
        if all.len() >= MAX_CLIENTS {
            all.clear();
        }
        all.insert(material, Arc::clone(&clients));
        Ok(clients)
    }

    fn build(&self, host: &Host, material: &Material) -> Result<Clients> {
        let tls = self.config(host, material)?;
        let builder = || {
            // Waiting is bounded where it is known for what.
            Client::builder()
                .user_agent(concat!("moxlet/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(material.connect)
                .redirect(reqwest::redirect::Policy::none())
                .referer(false)
                .tls_backend_preconfigured(tls.clone())
        };
        let error = |e: reqwest::Error| Error::Client(chain(&e));
        let local = builder().no_proxy().build().map_err(error)?;
        let remote = match &material.proxy {
            Some(proxy) => builder().proxy(Proxy::all(proxy.clone()).map_err(error)?),
            None => builder(),
        };
        Ok(Clients { remote: remote.build().map_err(error)?, local })
    }

    fn config(&self, host: &Host, material: &Material) -> Result<ClientConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|e| Error::Client(e.to_string()))?;
        let builder = if material.skip_verify {
            let anybody = Arc::new(Anybody(Arc::clone(&provider)));
            builder.dangerous().with_custom_certificate_verifier(anybody)
        } else {
            let (roots, own) = self.roots(host, material)?;
            if own.is_empty() {
                // A machine without any CAs may still have registries without TLS.
                builder.with_root_certificates(roots)
            } else {
                let chain = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider)).build();
                let chain = chain.map_err(|e| Error::Client(e.to_string()))?;
                builder.dangerous().with_custom_certificate_verifier(Arc::new(Named { chain, own }))
            }
        };
        if material.client.is_empty() {
            return Ok(builder.with_no_client_auth());
        }
        let mut keys = Vec::new();
        for ((path, _), (cert, key)) in host.client.iter().zip(&material.client) {
            keys.push(certified(path, cert, key, &provider)?);
        }
        Ok(builder.with_client_cert_resolver(Arc::new(Ours(keys))))
    }

    /// The CAs for a host, and the certificates that are named for it alone.
    fn roots(&self, host: &Host, material: &Material) -> Result<(Arc<RootCertStore>, OwnCerts)> {
        let system = self.roots.get_or_init(|| {
            let mut roots = RootCertStore::empty();
            let found = rustls_native_certs::load_native_certs();
            for error in &found.errors {
                tracing::warn!(%error, "some of the system's CA certificates cannot be read");
            }
            roots.add_parsable_certificates(found.certs);
            Arc::new(roots)
        });
        if material.ca.is_empty() {
            return Ok((Arc::clone(system), Vec::new()));
        }
        let (mut roots, mut own) = (RootCertStore::clone(system), Vec::new());
        for (path, bytes) in host.ca.iter().zip(&material.ca) {
            let before = own.len();
            for cert in CertificateDer::pem_slice_iter(bytes) {
                let cert = cert.map_err(|e| settings(path, format!("it is no PEM file: {e}")))?;
                roots.add(cert.clone()).map_err(|e| settings(path, format!("no CA certificate: {e}")))?;
                own.push(cert);
            }
            if own.len() == before {
                return Err(settings(path, "there is no certificate in it"));
            }
        }
        Ok((Arc::new(roots), own))
    }
}

type OwnCerts = Vec<CertificateDer<'static>>;

fn certified(path: &Path, cert: &[u8], key: &[u8], provider: &CryptoProvider) -> Result<Arc<CertifiedKey>> {
    let certs: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(cert).collect();
    let certs = certs.map_err(|e| settings(path, format!("it is no PEM file: {e}")))?;
    if certs.is_empty() {
        return Err(settings(path, "there is no certificate in it"));
    }
    // The error of a key that cannot be read says nothing of it.
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| settings(path, "it has no private key"))?;
    CertifiedKey::from_der(certs, key, provider)
        .map(Arc::new)
        .map_err(|e| settings(path, format!("certificate and key cannot be used: {e}")))
}

/// Our client certificates.
#[derive(Debug)]
struct Ours(Vec<Arc<CertifiedKey>>);

impl ResolvesClientCert for Ours {
    fn resolve(&self, hints: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let mut usable = self.0.iter().filter(|key| key.key.choose_scheme(schemes).is_some());
        let first = usable.clone().next();
        let named = usable.find(|key| {
            key.cert.iter().any(|cert| issuer(cert).is_some_and(|issuer| hints.contains(&issuer.as_ref())))
        });
        named.or(first).cloned()
    }

    fn has_certs(&self) -> bool {
        !self.0.is_empty()
    }
}

fn issuer(cert: &CertificateDer<'_>) -> Option<DistinguishedName> {
    let (_, cert) = x509_parser::parse_x509_certificate(cert).ok()?;
    Some(DistinguishedName::from(cert.issuer().as_raw().to_vec()))
}

/// Takes what a CA has signed, and a server's certificate that is named itself. Such a self-signed one often says that it is
/// a CA, or is none at all; a chain of certificates begins with neither.
#[derive(Debug)]
struct Named {
    chain: Arc<WebPkiServerVerifier>,
    own: OwnCerts,
}

impl Named {
    fn is_named(
        &self,
        cert: &CertificateDer<'_>,
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> std::result::Result<bool, rustls::Error> {
        if !self.own.iter().any(|own| own == cert) {
            return Ok(false);
        }
        verify_server_name(&ParsedCertificate::try_from(cert)?, name)?;
        let Ok((_, parsed)) = x509_parser::parse_x509_certificate(cert) else { return Ok(false) };
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let validity = parsed.validity();
        if now < validity.not_before.timestamp() {
            return Err(rustls::CertificateError::NotValidYet.into());
        }
        if now > validity.not_after.timestamp() {
            return Err(rustls::CertificateError::Expired.into());
        }
        Ok(true)
    }
}

impl ServerCertVerifier for Named {
    fn verify_server_cert(
        &self,
        cert: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        if self.is_named(cert, name, now)? {
            return Ok(ServerCertVerified::assertion());
        }
        self.chain.verify_server_cert(cert, intermediates, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Takes every certificate; that the server has its key is still seen to.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
