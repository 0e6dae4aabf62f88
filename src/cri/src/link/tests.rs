//! Both sides against one another, with certificates of all kinds.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use super::*;

/// An authority of its own.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// Writes a certificate for that name into files of that directory.
    fn files(&self, dir: &Path, name: &str, usage: ExtendedKeyUsagePurpose) -> CertificateFiles {
        self.aged(dir, name, usage, 1)
    }

    fn aged(&self, dir: &Path, name: &str, usage: ExtendedKeyUsagePurpose, days: i64) -> CertificateFiles {
        std::fs::create_dir_all(dir).unwrap();
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.extended_key_usages = vec![usage];
        let now = std::time::SystemTime::now();
        let day = Duration::from_secs(86_400);
        params.not_before = (now - 30 * day).into();
        params.not_after =
            if days < 0 { now - days.unsigned_abs() as u32 * day } else { now + days as u32 * day }.into();
        let key = KeyPair::generate().unwrap();
        let files = CertificateFiles {
            certificate: dir.join("tls.crt"),
            key: dir.join("tls.key"),
            ca: dir.join("ca.crt"),
        };
        std::fs::write(&files.certificate, params.signed_by(&key, &self.issuer).unwrap().pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
        std::fs::set_permissions(&files.key, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
        std::fs::write(&files.ca, &self.pem).unwrap();
        files
    }
}

const CLIENT: ExtendedKeyUsagePurpose = ExtendedKeyUsagePurpose::ClientAuth;
const SERVER: ExtendedKeyUsagePurpose = ExtendedKeyUsagePurpose::ServerAuth;

/// Both sides with those certificates: what each says, the client after it has waited for a byte of the server.
async fn meet(
    acceptor: &Acceptor,
    node: CertificateFiles,
    host: &str,
    protocol: Protocol,
) -> (Result<Protocol>, Result<(), String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("https://{host}:{}", listener.local_addr().unwrap().port()).parse().unwrap();
    let connector = Connector::new(endpoint, Some(node)).unwrap();
    let server = async {
        let mut accepted = acceptor.accept(listener.accept().await.unwrap().0).await?;
        accepted.stream.write_all(b"!").await.unwrap();
        accepted.stream.flush().await.unwrap();
        accepted.stream.shutdown().await.unwrap();
        Ok(accepted.protocol)
    };
    let client = async {
        let mut stream = connector.connect(protocol).await.map_err(|e| e.to_string())?;
        let read = stream.read_exact(&mut [0]).await;
        read.map(drop).map_err(|e| tls_reason(&e))
    };
    tokio::join!(server, client)
}

#[test]
fn endpoints_are_sockets_or_ports_with_tls() {
    for text in ["unix:///run/moxlet/agent.sock", "https://pve1.example:10353", "https://[fd00::1]:10353"] {
        assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
    }
    for (text, word) in [
        ("unix://agent.sock", "begin with /"),
        ("/run/moxlet/agent.sock", "https://HOST:PORT"),
        ("http://pve1:10353", "https://HOST:PORT"),
        ("https://pve1", "https://HOST:PORT"),
        ("https://pve1:0", "port"),
        ("https://pve1:99999", "port"),
        ("https://fd00::1:10353", "brackets"),
        ("https://:10353", "neither"),
        ("https://pve 1:10353", "neither"),
        ("https://user@pve1:10353", "neither"),
    ] {
        let error = text.parse::<Endpoint>().unwrap_err().to_string();
        assert!(error.contains(text) && error.contains(word), "{error}");
    }
}

#[tokio::test]
async fn a_node_and_an_agent_of_one_authority_meet_for_either_protocol() {
    let (dir, ours) = (tempfile::tempdir().unwrap(), Authority::new("ours"));
    let acceptor = Acceptor::new(ours.files(&dir.path().join("agent"), "localhost", SERVER)).unwrap();
    let node = ours.files(&dir.path().join("node"), NODE_NAME, CLIENT);
    for protocol in [Protocol::Grpc, Protocol::Streams] {
        let (server, client) = meet(&acceptor, node.clone(), "localhost", protocol).await;
        assert_eq!(server.unwrap(), protocol);
        client.unwrap();
    }
}

#[tokio::test]
async fn whoever_is_no_node_is_refused_with_the_reason() {
    let (dir, ours, other) = (tempfile::tempdir().unwrap(), Authority::new("ours"), Authority::new("other"));
    let acceptor = Acceptor::new(ours.files(&dir.path().join("agent"), "localhost", SERVER)).unwrap();
    let node = dir.path().join("node");
    for (files, word) in [
        // One who speaks for something else, an agent, one of another authority, also of the same name, one who comes too late.
        (ours.files(&node.join("1"), "moxlet-node.example", CLIENT), "not for the DNS name moxlet-node"),
        (ours.files(&node.join("2"), NODE_NAME, SERVER), "certificate"),
        (other.files(&node.join("3"), NODE_NAME, CLIENT), "authority"),
        (Authority::new("ours").files(&node.join("5"), NODE_NAME, CLIENT), "authority"),
        (ours.aged(&node.join("4"), NODE_NAME, CLIENT, -1), "`moxlet certificates` renews"),
    ] {
        // It trusts the agent all the same.
        std::fs::write(&files.ca, &ours.pem).unwrap();
        let (server, client) = meet(&acceptor, files, "localhost", Protocol::Grpc).await;
        let (server, client) = (server.unwrap_err().to_string(), client.unwrap_err());
        assert!(server.contains(word), "{server}");
        assert!(client.starts_with("no TLS with"), "it is known before anything is asked: {client}");
        assert!(client.contains("link_certificate_file"), "{client}");
    }
}

#[tokio::test]
async fn a_node_refuses_whoever_is_not_the_agent_that_it_asked_for() {
    let (dir, ours, other) = (tempfile::tempdir().unwrap(), Authority::new("ours"), Authority::new("other"));
    let node = ours.files(&dir.path().join("node"), NODE_NAME, CLIENT);
    let agent = |files: CertificateFiles| {
        std::fs::write(&files.ca, &ours.pem).unwrap();
        Acceptor::new(files).unwrap()
    };
    let at = |n: &str| dir.path().join(n);
    for (acceptor, word) in [
        (agent(ours.files(&at("1"), "pve2", SERVER)), "localhost"),
        (agent(other.files(&at("2"), "localhost", SERVER)), "authority"),
        (agent(ours.aged(&at("3"), "localhost", SERVER, -1)), "`moxlet certificates` renews"),
        (agent(ours.files(&at("4"), "localhost", CLIENT)), "certificate"),
    ] {
        let (_, client) = meet(&acceptor, node.clone(), "localhost", Protocol::Grpc).await;
        let client = client.unwrap_err();
        assert!(client.contains(word), "{client}");
    }
}

#[tokio::test]
async fn renewed_certificates_are_used_and_broken_ones_are_not() {
    let (dir, old, new) = (tempfile::tempdir().unwrap(), Authority::new("old"), Authority::new("new"));
    let at = dir.path().join("agent");
    let files = old.files(&at, "localhost", SERVER);
    let acceptor = Acceptor::new(files.clone()).unwrap();
    let node = |authority: &Authority, n: &str| authority.files(&dir.path().join(n), NODE_NAME, CLIENT);
    let works = async |files| meet(&acceptor, files, "localhost", Protocol::Grpc).await.1;

    works(node(&old, "a")).await.unwrap();
    std::fs::write(&files.certificate, "half a cert").unwrap();
    works(node(&old, "b")).await.unwrap();
    new.files(&at, "localhost", SERVER);
    works(node(&new, "c")).await.unwrap();
    works(node(&old, "d")).await.unwrap_err();
}

#[test]
fn a_file_that_cannot_be_used_is_named() {
    let (dir, ours) = (tempfile::tempdir().unwrap(), Authority::new("ours"));
    let files = ours.files(dir.path(), "localhost", SERVER);
    let refused = |files: &CertificateFiles, file: &Path, word: &str| {
        let Err(error) = Acceptor::new(files.clone()) else { panic!("{file:?}") };
        let error = error.to_string();
        assert!(error.contains(&*file.to_string_lossy()) && error.contains(word), "{error}");
    };
    let gone = CertificateFiles { key: dir.path().join("gone"), ..files.clone() };
    refused(&gone, &gone.key, "No such file");
    let swapped = CertificateFiles { ca: files.key.clone(), ..files.clone() };
    refused(&swapped, &files.key, "no certificate");
    let open = ours.files(&dir.path().join("open"), "localhost", SERVER);
    std::fs::set_permissions(&open.key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    refused(&open, &open.key, "0644");
    let other = Authority::new("other").files(&dir.path().join("other"), "localhost", SERVER);
    let mixed = CertificateFiles { key: other.key.clone(), ..files };
    refused(&mixed, &other.key, "not the key");
    let error = Connector::new("https://pve1:1".parse().unwrap(), None).err().unwrap().to_string();
    assert!(error.contains("moxlet certificates"), "{error}");
}

#[tokio::test]
async fn the_address_towards_an_agent_is_none_of_this_machine_alone() {
    let (dir, ours) = (tempfile::tempdir().unwrap(), Authority::new("ours"));
    let node = ours.files(dir.path(), NODE_NAME, CLIENT);
    for endpoint in ["https://127.0.0.1:10353", "https://localhost:10353", "unix:///run/moxlet/agent.sock"] {
        let connector = Connector::new(endpoint.parse().unwrap(), Some(node.clone())).unwrap();
        assert_eq!(connector.local_address().await, None, "{endpoint}");
    }
}
