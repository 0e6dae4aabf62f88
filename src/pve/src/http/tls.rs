//! Whom we trust: the system's certificate authorities, one of a file, or one certificate by its fingerprint.

use std::{
    fmt,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Error, InvalidName, Result};

/// The SHA-256 of a certificate, written as Proxmox VE shows it: `AA:BB:…`, 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// The fingerprint of a certificate in DER form.
    #[must_use]
    pub fn of(der: &[u8]) -> Self {
        Self(Sha256::digest(der).into())
    }
}

impl FromStr for Fingerprint {
    type Err = InvalidName;
    /// Colons may be left out; either case is taken.
    fn from_str(s: &str) -> std::result::Result<Self, InvalidName> {
        let bare = s.trim().replace(':', "");
        let mut bytes = [0; 32];
        hex::decode_to_slice(bare, &mut bytes)
            .map_err(|_| InvalidName::new("SHA-256 fingerprint", s, "it is not 32 bytes in hexadecimal"))?;
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = InvalidName;
    fn try_from(s: String) -> std::result::Result<Self, InvalidName> {
        s.parse()
    }
}

impl From<Fingerprint> for String {
    fn from(f: Fingerprint) -> Self {
        f.to_string()
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(":")?;
            }
            write!(f, "{byte:02X}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// How the server proves who it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Trust {
    /// A certificate authority of the system's.
    #[default]
    System,
    /// One of these, in PEM form (a cluster's own is `/etc/pve/pve-root-ca.pem`).
    Authorities(Vec<u8>),
    /// This one certificate, whatever its name, issuer and dates.
    Fingerprint(Fingerprint),
}

/// The certificate that was refused last, for the error's text.
#[derive(Debug, Default)]
pub(crate) struct Refused(Mutex<Option<(Fingerprint, String)>>);

impl Refused {
    fn set(&self, fingerprint: Fingerprint, reason: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((fingerprint, reason));
    }

    pub(crate) fn take(&self) -> Option<(Fingerprint, String)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The TLS configuration for a kind of trust; none where `reqwest`'s own (the system's authorities) will do.
pub(crate) fn config(trust: &Trust, refused: &Arc<Refused>) -> Result<Option<ClientConfig>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let rule = match trust {
        Trust::System => return Ok(None),
        Trust::Fingerprint(expected) => Rule::Pinned(*expected),
        Trust::Authorities(pem) => Rule::Authorities(verifier(pem, &provider)?),
    };
    let verifier = Verifier { rule, provider: Arc::clone(&provider), refused: Arc::clone(refused) };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::Setup(format!("TLS: {e}")))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    Ok(Some(config))
}

fn verifier(pem: &[u8], provider: &Arc<CryptoProvider>) -> Result<Arc<WebPkiServerVerifier>> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate =
            certificate.map_err(|e| Error::Setup(format!("the CA file is not readable as PEM: {e}")))?;
        roots
            .add(certificate)
            .map_err(|e| Error::Setup(format!("a certificate of the CA file is not usable: {e}")))?;
    }
    if roots.is_empty() {
        return Err(Error::Setup("the CA file holds no certificate".to_owned()));
    }
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
        .build()
        .map_err(|e| Error::Setup(format!("TLS: {e}")))
}

#[derive(Debug)]
enum Rule {
    Pinned(Fingerprint),
    Authorities(Arc<WebPkiServerVerifier>),
}

#[derive(Debug)]
struct Verifier {
    rule: Rule,
    provider: Arc<CryptoProvider>,
    refused: Arc<Refused>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let seen = Fingerprint::of(end_entity);
        let result = match &self.rule {
            Rule::Pinned(expected) if *expected == seen => Ok(ServerCertVerified::assertion()),
            Rule::Pinned(_) => {
                Err(rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
            }
            Rule::Authorities(verifier) => {
                verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp, now)
            }
        };
        if let Err(error) = &result {
            let reason = match self.rule {
                Rule::Pinned(_) => "it has another fingerprint than the one configured".to_owned(),
                Rule::Authorities(_) => error.to_string(),
            };
            self.refused.set(seen, reason);
        }
        result
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_fingerprint_is_read_as_proxmox_shows_it() {
        let text = "AA:".repeat(31) + "0F";
        let fingerprint: Fingerprint = text.parse().unwrap();
        assert_eq!(fingerprint.to_string(), text);
        assert_eq!(text.to_lowercase().replace(':', "").parse::<Fingerprint>().unwrap(), fingerprint);
        for bad in ["", "AA:BB", &("GG:".repeat(31) + "00")] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad:?}");
        }
    }
}
