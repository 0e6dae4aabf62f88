//! Certificates: the right one, another one, one that is over.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::{Error, Fingerprint};

struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        let mut name = DistinguishedName::new();
        name.push(
            DnType::CommonName,
            format!("authority {}", hex::encode(KeyPair::generate().unwrap().public_key_raw())),
        );
        params.distinguished_name = name;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    fn trust(&self) -> Trust {
        Trust::Authorities(self.issuer.pem().into_bytes())
    }

    fn certificate(&self, name: &str, over: bool) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        if over {
            params.not_after = rcgen::date_time_ymd(2020, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.der().clone(), PrivatePkcs8KeyDer::from(key.serialize_der()).into())
    }
}

/// A TLS server that answers every request with a version.
async fn serve(
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> (String, JoinHandle<()>) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let config =
        ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate], key).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let task = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let mut buffer = [0; 4096];
            let _ = stream.read(&mut buffer).await;
            let body = r#"{"data":{"version":"9.2.1"}}"#;
            let text = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
            let _ = stream.write_all(text.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
    });
    (url, task)
}

fn client(url: &str, trust: Trust) -> Client {
    builder(&[]).endpoint(Endpoint::new(url, trust).unwrap()).build().unwrap()
}

#[tokio::test]
async fn a_certificate_is_accepted_by_fingerprint_or_by_its_authority() {
    let authority = Authority::new();
    let (certificate, key) = authority.certificate("localhost", false);
    let fingerprint = Fingerprint::of(&certificate);
    let (url, task) = serve(certificate, key).await;
    client(&url, Trust::Fingerprint(fingerprint)).version().await.unwrap();
    client(&url, authority.trust()).version().await.unwrap();
    task.abort();
}

#[tokio::test]
async fn another_certificate_is_refused_and_both_fingerprints_are_named() {
    let (certificate, key) = Authority::new().certificate("localhost", false);
    let seen = Fingerprint::of(&certificate);
    let (url, task) = serve(certificate, key).await;
    let expected: Fingerprint = "00".repeat(32).parse().unwrap();
    let error = client(&url, Trust::Fingerprint(expected)).version().await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Certificate { .. }), "{error:?}");
    assert!(text.contains(&seen.to_string()) && text.contains(&expected.to_string()), "{text}");
    task.abort();
}

#[tokio::test]
async fn what_is_wrong_with_a_certificate_is_named() {
    let authority = Authority::new();
    for (name, over, trust, why) in [
        ("localhost", true, authority.trust(), "xpired"),
        ("elsewhere", false, authority.trust(), "name"),
        ("localhost", false, Authority::new().trust(), "Issuer"),
        ("localhost", false, Trust::System, "certificate"),
    ] {
        let (certificate, key) = authority.certificate(name, over);
        let (url, task) = serve(certificate, key).await;
        let error = client(&url, trust).version().await.unwrap_err();
        assert!(matches!(error, Error::Certificate { .. }), "{why}: {error:?}");
        assert!(error.to_string().contains(why), "{why}: {error}");
        task.abort();
    }
}

#[tokio::test]
async fn a_server_with_a_bad_certificate_is_passed_over_for_a_good_one() {
    let authority = Authority::new();
    let (bad, bad_key) = Authority::new().certificate("localhost", false);
    let (good, good_key) = authority.certificate("localhost", false);
    let (bad_url, bad_task) = serve(bad, bad_key).await;
    let (good_url, good_task) = serve(good, good_key).await;
    let endpoint = |url: &str| Endpoint::new(url, authority.trust()).unwrap();
    let client = builder(&[]).endpoint(endpoint(&bad_url)).endpoint(endpoint(&good_url)).build().unwrap();
    client.version().await.unwrap();
    bad_task.abort();
    good_task.abort();
}

#[test]
fn a_ca_file_without_a_certificate_is_refused() {
    let endpoint = |pem: &str| Endpoint::new("https://a", Trust::Authorities(pem.into())).unwrap();
    for pem in ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        let error = builder(&[]).endpoint(endpoint(pem)).build().unwrap_err();
        assert!(matches!(error, Error::Setup(_)), "{error:?}");
    }
    assert!(builder(&[]).build().is_err());
}
