//! The cluster's certificate authority and the hosts' certificates: made once, kept in the state directory, changed on
//! request.

use std::{
    fs,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::RwLock;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::{ServerConfig, crypto::ring};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use sha2::{Digest, Sha256};

use crate::{Error, Result, error::io};

/// A certificate's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Validity {
    /// It holds now.
    Now,
    /// It held once.
    Expired,
}

/// The server side of TLS of one host.
#[derive(Debug)]
pub(crate) struct HostTls {
    dir: PathBuf,
    names: Vec<String>,
    current: RwLock<Current>,
}

#[derive(Debug, Clone)]
struct Current {
    config: Arc<ServerConfig>,
    fingerprint: String,
}

impl HostTls {
    /// Loads the host's certificate, or makes one.
    pub(crate) fn open(tls_dir: &Path, host: &str, ips: &[String]) -> Result<Self> {
        fs::create_dir_all(tls_dir).map_err(io("create", tls_dir))?;
        let mut names = vec![host.to_owned(), "localhost".to_owned()];
        names.extend(ips.iter().cloned());
        names.dedup();
        let current = match load(tls_dir, host)? {
            Some(current) => current,
            None => make(tls_dir, &names, Validity::Now)?,
        };
        Ok(Self { dir: tls_dir.to_path_buf(), names, current: RwLock::new(current) })
    }

    /// What new connections use.
    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.read().config)
    }

    /// SHA-256 of the certificate, as Proxmox VE writes it.
    pub(crate) fn fingerprint(&self) -> String {
        self.current.read().fingerprint.clone()
    }

    /// Makes a new certificate, as `pvecm updatecerts --force` does; open connections keep the old one.
    pub(crate) fn renew(&self, validity: Validity) -> Result<String> {
        let current = make(&self.dir, &self.names, validity)?;
        let fingerprint = current.fingerprint.clone();
        *self.current.write() = current;
        Ok(fingerprint)
    }
}

fn failed(what: &'static str) -> impl Fn(&dyn std::fmt::Display) -> Error {
    move |e| Error::Tls(format!("cannot {what}: {e}"))
}

/// The CA's certificate, PEM; made at the first call.
pub(crate) fn ca(dir: &Path) -> Result<(String, KeyPair)> {
    let (cert, key) = (dir.join("pve-root-ca.pem"), dir.join("pve-root-ca.key"));
    if let (Ok(cert), Ok(key)) = (fs::read_to_string(&cert), fs::read_to_string(&key)) {
        let key = KeyPair::from_pem(&key).map_err(|e| failed("read the CA's key")(&e))?;
        return Ok((cert, key));
    }
    fs::create_dir_all(dir).map_err(io("create", dir))?;
    let pair = KeyPair::generate().map_err(|e| failed("make a key")(&e))?;
    let params = ca_params();
    let made = params.self_signed(&pair).map_err(|e| failed("make the CA")(&e))?;
    secret(&key, &pair.serialize_pem())?;
    fs::write(&cert, made.pem()).map_err(io("write", &cert))?;
    Ok((made.pem(), pair))
}

fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, "Proxmox Virtual Environment");
    name.push(DnType::OrganizationName, "PVE Cluster Manager CA");
    params.distinguished_name = name;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn secret(path: &Path, text: &str) -> Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(io("create", path))?;
    file.write_all(text.as_bytes()).map_err(io("write", path))
}

fn make(dir: &Path, names: &[String], validity: Validity) -> Result<Current> {
    let (_, ca_key) = ca(dir)?;
    let issuer = Issuer::new(ca_params(), ca_key);
    let host = names.first().map_or("pve", String::as_str);
    let mut params = CertificateParams::new(names.to_vec()).map_err(|e| failed("name the host")(&e))?;
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, host);
    name.push(DnType::OrganizationName, "Proxmox Virtual Environment");
    params.distinguished_name = name;
    params.use_authority_key_identifier_extension = true;
    params.extended_key_usages.push(rcgen::ExtendedKeyUsagePurpose::ServerAuth);
    if validity == Validity::Expired {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    }
    let key = KeyPair::generate().map_err(|e| failed("make a key")(&e))?;
    let cert = params.signed_by(&key, &issuer).map_err(|e| failed("sign a certificate")(&e))?;
    secret(&dir.join(format!("{host}.key")), &key.serialize_pem())?;
    let path = dir.join(format!("{host}.pem"));
    fs::write(&path, cert.pem()).map_err(io("write", &path))?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    current(vec![cert.der().clone()], key)
}

fn load(dir: &Path, host: &str) -> Result<Option<Current>> {
    let (cert, key) = (dir.join(format!("{host}.pem")), dir.join(format!("{host}.key")));
    let (Ok(cert), Ok(key)) = (fs::read(&cert), fs::read(&key)) else { return Ok(None) };
    // A crash between the two writes leaves a pair that does not fit: it is made anew.
    let (Ok(cert), Ok(key)) = (CertificateDer::from_pem_slice(&cert), PrivateKeyDer::from_pem_slice(&key))
    else {
        return Ok(None);
    };
    Ok(current(vec![cert], key).ok())
}

fn current(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Current> {
    let digest = Sha256::digest(chain.first().map(AsRef::as_ref).unwrap_or_default());
    let fingerprint = digest.iter().map(|b| format!("{b:02X}")).collect::<Vec<_>>().join(":");
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|b| b.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|e| failed("use the certificate")(&e))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Current { config: Arc::new(config), fingerprint })
}
