//! Keys, certificate requests and certificates: made here, read here, and judged (is it ours, how long does it last).

use std::{net::IpAddr, sync::Arc};

use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::names::ServingNames;
use crate::{Error, Result};

/// The group of all nodes, exactly the organisation that the signers accept.
pub(super) const NODES_GROUP: &str = "system:nodes";

/// The user name of a node.
pub(super) fn node_user(node: &str) -> String {
    format!("system:node:{node}")
}

fn failed(what: &'static str) -> impl FnOnce(&dyn std::fmt::Display) -> Error {
    move |reason| Error::Certificate { what, reason: reason.to_string() }
}

/// A new ECDSA P-256 key.
pub(super) fn generate() -> Result<KeyPair> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| failed("make a key")(&e))
}

/// A key from its PEM text.
pub(super) fn key_from_pem(pem: &str) -> Result<KeyPair> {
    KeyPair::from_pem(pem).map_err(|e| failed("read a key")(&e))
}

fn params(node: &str, names: Option<&ServingNames>) -> Result<CertificateParams> {
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, NODES_GROUP);
    subject.push(DnType::CommonName, node_user(node));
    params.distinguished_name = subject;
    if let Some(names) = names {
        for dns in &names.dns {
            let name = dns
                .as_str()
                .try_into()
                .map_err(|e: rcgen::Error| failed("name a host in a certificate")(&e))?;
            params.subject_alt_names.push(SanType::DnsName(name));
        }
        params.subject_alt_names.extend(names.ips.iter().copied().map(SanType::IpAddress));
    }
    Ok(params)
}

/// A certificate request in PEM: for the API server's client without names, for serving with them.
pub(super) fn request_pem(key: &KeyPair, node: &str, names: Option<&ServingNames>) -> Result<String> {
    let request = params(node, names)?.serialize_request(key);
    request.and_then(|r| r.pem()).map_err(|e| failed("make a certificate request")(&e))
}

/// A certificate signed by its own key, good for a year.
pub(super) fn self_signed(node: &str, names: &ServingNames) -> Result<Pair> {
    let key = generate()?;
    let mut params = params(node, Some(names))?;
    let now = std::time::SystemTime::now();
    let day = std::time::Duration::from_secs(86_400);
    params.not_before = (now - day).into();
    params.not_after = (now + 365 * day).into();
    params.extended_key_usages.push(rcgen::ExtendedKeyUsagePurpose::ServerAuth);
    let certificate = params.self_signed(&key).map_err(|e| failed("sign a certificate")(&e))?;
    Pair::parse(&key.serialize_pem(), &certificate.pem())
}

/// A key and the certificate chain that belongs to it.
#[derive(Clone)]
pub(super) struct Pair {
    /// The private key, PEM.
    pub(super) key_pem: String,
    /// The chain, leaf first, PEM.
    pub(super) chain_pem: String,
    /// What the leaf says.
    pub(super) leaf: Leaf,
    /// Both, ready for TLS.
    pub(super) certified: Arc<CertifiedKey>,
}

/// What matters of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Leaf {
    /// The common name.
    pub(super) common_name: String,
    /// The organisations.
    pub(super) organizations: Vec<String>,
    /// What it is good for.
    pub(super) names: ServingNames,
    /// Start of its life, UNIX seconds.
    pub(super) not_before: i64,
    /// End of its life, UNIX seconds.
    pub(super) not_after: i64,
}

impl Leaf {
    /// Reads a certificate in DER.
    pub(super) fn parse(der: &[u8]) -> Result<Self> {
        let (_, cert) = X509Certificate::from_der(der).map_err(|e| failed("read a certificate")(&e))?;
        let text =
            |a: &x509_parser::x509::AttributeTypeAndValue<'_>| a.as_str().unwrap_or_default().to_owned();
        let mut names = ServingNames::default();
        if let Ok(Some(extension)) = cert.subject_alternative_name() {
            for name in &extension.value.general_names {
                match name {
                    GeneralName::DNSName(dns) => names.dns.push((*dns).to_owned()),
                    GeneralName::IPAddress(raw) => names.ips.extend(ip_from_octets(raw)),
                    _ => {}
                }
            }
        }
        Ok(Self {
            common_name: cert.subject().iter_common_name().next().map(text).unwrap_or_default(),
            organizations: cert.subject().iter_organization().map(text).collect(),
            names,
            not_before: cert.validity().not_before.timestamp(),
            not_after: cert.validity().not_after.timestamp(),
        })
    }

    /// Whether it is within its life at that time.
    pub(super) fn valid_at(&self, now: i64) -> bool {
        self.not_before <= now && now < self.not_after
    }

    /// Whether it speaks for that node.
    pub(super) fn is_node(&self, node: &str) -> bool {
        self.common_name == node_user(node) && self.organizations.iter().any(|o| o == NODES_GROUP)
    }

    /// Whether it holds all those names.
    pub(super) fn covers(&self, names: &ServingNames) -> bool {
        names.dns.iter().all(|d| self.names.dns.contains(d))
            && names.ips.iter().all(|i| self.names.ips.contains(i))
    }

    /// When to renew it: at a fraction of its life, 70 % to 90 % by `jitter` between 0 and 1.
    pub(super) fn renew_at(&self, jitter: f64) -> i64 {
        let life = (self.not_after - self.not_before).max(0);
        let permille = 700 + (jitter.clamp(0.0, 1.0) * 200.0) as i64;
        self.not_before + life / 1000 * permille + life % 1000 * permille / 1000
    }
}

fn ip_from_octets(raw: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(raw) {
        return Some(IpAddr::from(v4));
    }
    <[u8; 16]>::try_from(raw).ok().map(IpAddr::from)
}

impl Pair {
    /// Reads key and chain, and sees that they belong together.
    pub(super) fn parse(key_pem: &str, chain_pem: &str) -> Result<Self> {
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|e| failed("read a key")(&e))?;
        let chain = CertificateDer::pem_slice_iter(chain_pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| failed("read a certificate")(&e))?;
        let Some(first) = chain.first() else {
            return Err(failed("read a certificate")(&"there is none"));
        };
        let leaf = Leaf::parse(first)?;
        let signer =
            rustls::crypto::ring::sign::any_supported_type(&key).map_err(|e| failed("use a key")(&e))?;
        let certified = CertifiedKey::new(chain, signer);
        certified.keys_match().map_err(|e| failed("use a certificate with its key")(&e))?;
        Ok(Self {
            key_pem: key_pem.to_owned(),
            chain_pem: chain_pem.to_owned(),
            leaf,
            certified: Arc::new(certified),
        })
    }

    /// Reads both from one PEM text.
    pub(super) fn parse_joined(pem: &str) -> Result<Self> {
        let split = pem
            .find("-----BEGIN CERTIFICATE-----")
            .ok_or_else(|| failed("read a certificate")(&"there is none"))?;
        let (key, chain) = pem.split_at(split);
        Self::parse(key, chain)
    }

    /// Both as one PEM text, the key first.
    pub(super) fn joined(&self) -> String {
        let mut text = self.key_pem.trim_end().to_owned();
        text.push('\n');
        text.push_str(&self.chain_pem);
        text
    }
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair").field("leaf", &self.leaf).finish_non_exhaustive()
    }
}

/// The present time, UNIX seconds.
pub(super) fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

/// Sleeps until that UNIX second, with looks at the clock between: it may be set.
pub(super) async fn sleep_until(when: i64) {
    loop {
        let left = when - now();
        if left <= 0 {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_secs(left.unsigned_abs().min(3600))).await;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use x509_parser::{
        certification_request::X509CertificationRequest, extensions::ParsedExtension, pem::parse_x509_pem,
    };

    use super::*;

    fn names() -> ServingNames {
        ServingNames {
            dns: vec!["n1".into()],
            ips: vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()],
        }
    }

    #[test]
    fn a_serving_request_is_what_the_signer_accepts() {
        let key = generate().unwrap();
        let pem = request_pem(&key, "n1", Some(&names())).unwrap();
        let (_, pem) = parse_x509_pem(pem.as_bytes()).unwrap();
        assert_eq!(pem.label, "CERTIFICATE REQUEST");
        let (_, csr) = X509CertificationRequest::from_der(&pem.contents).unwrap();
        let subject = &csr.certification_request_info.subject;
        assert_eq!(subject.to_string(), "O=system:nodes, CN=system:node:n1");
        let sans: Vec<_> = csr
            .requested_extensions()
            .unwrap()
            .filter_map(|e| match e {
                ParsedExtension::SubjectAlternativeName(san) => Some(san.general_names.len()),
                _ => None,
            })
            .collect();
        assert_eq!(sans, [3]);
    }

    #[test]
    fn a_client_request_names_no_host() {
        let pem = request_pem(&generate().unwrap(), "n1", None).unwrap();
        let (_, pem) = parse_x509_pem(pem.as_bytes()).unwrap();
        let (_, csr) = X509CertificationRequest::from_der(&pem.contents).unwrap();
        assert!(csr.requested_extensions().is_none());
        assert_eq!(csr.certification_request_info.subject.to_string(), "O=system:nodes, CN=system:node:n1");
    }

    #[test]
    fn a_pair_survives_its_text() {
        let pair = self_signed("n1", &names()).unwrap();
        let again = Pair::parse_joined(&pair.joined()).unwrap();
        assert_eq!(again.leaf, pair.leaf);
        assert!(again.leaf.is_node("n1") && !again.leaf.is_node("n2"));
        assert!(again.leaf.covers(&names()));
        assert!(!again.leaf.covers(&ServingNames { dns: vec!["n2".into()], ips: vec![] }));
        assert!(again.leaf.valid_at(now()));
        assert!(!format!("{again:?}").contains("PRIVATE"));
    }

    #[test]
    fn a_foreign_key_is_refused() {
        let pair = self_signed("n1", &names()).unwrap();
        let other = generate().unwrap().serialize_pem();
        assert!(Pair::parse(&other, &pair.chain_pem).is_err());
        assert!(Pair::parse_joined("").is_err());
    }

    #[test]
    fn renewal_lies_between_70_and_90_percent() {
        let mut leaf = self_signed("n1", &names()).unwrap().leaf;
        leaf.not_before = 1_000_000;
        leaf.not_after = 2_000_000;
        assert_eq!(leaf.renew_at(0.0), 1_700_000);
        assert_eq!(leaf.renew_at(1.0), 1_900_000);
        assert_eq!(leaf.renew_at(7.0), 1_900_000);
        assert!(!leaf.valid_at(2_000_000) && leaf.valid_at(1_000_000) && !leaf.valid_at(999_999));
    }
}
