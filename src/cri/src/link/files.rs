//! Certificate, key and authority of one side of the link.
//!
//! They are looked at for each connection and read again once one has changed, so that a renewal needs no restart. While the new
//! ones cannot be used, the last ones that could be are.

use std::{
    fs::File,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use rustls::{RootCertStore, crypto::CryptoProvider, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};

use super::{Error, Result};

/// The largest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Where they lie; PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFiles {
    /// The certificate, with those between it and its authority.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities of the other side.
    pub ca: PathBuf,
}

/// What lies in them.
pub(super) struct Loaded {
    pub(super) certified: Arc<CertifiedKey>,
    pub(super) roots: Arc<RootCertStore>,
}

impl CertificateFiles {
    /// Whether a connection can be made with them now.
    ///
    /// # Errors
    /// The first that cannot be used, and why.
    pub fn check(&self) -> Result<()> {
        self.load().map(drop)
    }

    /// Reads them.
    pub(super) fn load(&self) -> Result<Loaded> {
        let wrong = |path: &Path, reason: &dyn std::fmt::Display| unusable(path, reason.to_string());
        let chain = certificates(&self.certificate)?;
        let key = PrivateKeyDer::from_pem_slice(&read_key(&self.key)?)
            .map_err(|e| wrong(&self.key, &format!("it holds no private key: {e}")))?;
        let certified = CertifiedKey::from_der(chain, key, &provider());
        let certified = certified.map_err(|e| {
            wrong(&self.key, &format!("it is not the key of {}: {e}", self.certificate.display()))
        })?;
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.ca)? {
            roots.add(certificate).map_err(|e| wrong(&self.ca, &e))?;
        }
        Ok(Loaded { certified: Arc::new(certified), roots: Arc::new(roots) })
    }

    /// What tells whether one has changed.
    fn stamp(&self) -> Stamp {
        [&self.certificate, &self.key, &self.ca].map(|path| {
            let seen = std::fs::metadata(path).ok()?;
            Some((seen.ino(), seen.size(), seen.mtime(), seen.mtime_nsec()))
        })
    }
}

type Stamp = [Option<(u64, u64, i64, i64)>; 3];

/// The provider of cryptography, named rather than the process's default, so that the link works in any process.
pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    moxlet_files::read_bounded(path, MAX_FILE).map_err(|e| unusable(path, e.to_string()))
}

/// Reads a private key, unless everybody on the host can read it as well. A group may: that is how a pod of another user gets
/// a Secret.
fn read_key(path: &Path) -> Result<Vec<u8>> {
    let wrong = |e: std::io::Error| unusable(path, e.to_string());
    let file = File::open(path).map_err(wrong)?;
    let mode = file.metadata().map_err(wrong)?.mode() & 0o777;
    if mode & 0o007 != 0 {
        return Err(unusable(
            path,
            format!(
                "its mode is {mode:04o}, which lets every user of this host at the private key: chmod 0600 it, and make a new key"
            ),
        ));
    }
    moxlet_files::read_to_bound(file, MAX_FILE).map_err(wrong)
}

fn unusable(path: &Path, reason: String) -> Error {
    Error::File { path: path.to_owned(), reason }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let wrong = |reason: String| unusable(path, reason);
    let all: Vec<_> = CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<_, _>>()
        .map_err(|e| wrong(e.to_string()))?;
    if all.is_empty() {
        return Err(wrong("it holds no certificate".to_owned()));
    }
    Ok(all)
}

/// What is made of the files, made anew when they change.
pub(super) struct Current<T> {
    files: CertificateFiles,
    make: fn(Loaded) -> Result<T, rustls::Error>,
    last: Mutex<(Stamp, Arc<T>)>,
}

impl<T> Current<T> {
    /// Reads the files for the first time.
    pub(super) fn new(files: CertificateFiles, make: fn(Loaded) -> Result<T, rustls::Error>) -> Result<Self> {
        let stamp = files.stamp();
        let first = made(&files, make)?;
        Ok(Self { files, make, last: Mutex::new((stamp, Arc::new(first))) })
    }

    /// What holds for the next connection.
    pub(super) fn get(&self) -> Arc<T> {
        let mut last = self.last.lock();
        let stamp = self.files.stamp();
        if stamp != last.0 {
            last.0 = stamp;
            match made(&self.files, self.make) {
                Ok(new) => {
                    tracing::info!(certificate = %self.files.certificate.display(), "new certificates of the link are used");
                    last.1 = Arc::new(new);
                }
                Err(error) => tracing::warn!(%error, "the link goes on with the certificates that it had"),
            }
        }
        last.1.clone()
    }
}

fn made<T>(files: &CertificateFiles, make: fn(Loaded) -> Result<T, rustls::Error>) -> Result<T> {
    make(files.load()?).map_err(|e| Error::File { path: files.certificate.clone(), reason: e.to_string() })
}
