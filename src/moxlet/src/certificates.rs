//! `moxlet certificates`: what a node and agents on other machines know one another by. An authority of their own, so that nobody
//! who has a certificate for another purpose is root on a host.
//!
//! | file below the directory | what it is |
//! |---|---|
//! | `ca.crt`, `ca.key` | the authority, ten years; the key is needed here only |
//! | `node.crt`, `node.key` | for `moxlet node` |
//! | `NAME.crt`, `NAME.key` | for the agent of that name |

use std::{
    fs::{self, File},
    io::{ErrorKind, Write as _},
    net::IpAddr,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, bail};
use moxlet_cri::link::NODE_NAME;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use x509_parser::{pem::parse_x509_pem, prelude::GeneralName};

use crate::cli::CertificatesArgs;

const DAY: Duration = Duration::from_secs(86_400);
/// How long the authority lasts.
const CA_DAYS: u32 = 3650;
/// What ends sooner is made anew.
const RENEW: Duration = Duration::from_secs(90 * 86_400);
/// Names of files that no agent may have.
const TAKEN: [&str; 2] = ["ca", "node"];

/// Makes what is missing or near its end.
///
/// # Errors
/// A name is none, a file cannot be read or written, or a certificate that is there is of another authority.
pub(crate) fn main(args: &CertificatesArgs) -> Result<()> {
    let agents = args.agents.iter().map(|text| Agent::parse(text)).collect::<Result<Vec<_>>>()?;
    let dir = &args.dir;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("cannot make {}", dir.display()))?;
    let authority = authority(dir)?;
    let node = Agent { file: "node".to_owned(), names: vec![NODE_NAME.to_owned()] };
    leaf(dir, &authority, &node, ExtendedKeyUsagePurpose::ClientAuth, args.days)?;
    for agent in &agents {
        leaf(dir, &authority, agent, ExtendedKeyUsagePurpose::ServerAuth, args.days)?;
    }
    println!(
        "\nThe node's machine needs node.crt, node.key and ca.crt, each agent's its own two files and ca.crt, as"
    );
    println!(
        "link_certificate_file, link_key_file and link_ca_file. Nobody but this directory needs ca.key."
    );
    Ok(())
}

/// An agent, or the node: the name of its files, and what its certificate is for.
struct Agent {
    file: String,
    names: Vec<String>,
}

impl Agent {
    fn parse(text: &str) -> Result<Self> {
        let names: Vec<_> = text.split(',').map(|name| name.trim().to_owned()).collect();
        let plain = |name: &str| {
            name.parse::<IpAddr>().is_ok()
                || (name.len() <= 253
                    && name.split('.').all(|label| {
                        (1..=63).contains(&label.len())
                            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                            && !label.starts_with('-')
                    }))
        };
        if let Some(bad) = names.iter().find(|name| !plain(name)) {
            bail!("--agent {text}: {bad:?} is no host name and no address");
        }
        let file = names.first().cloned().unwrap_or_default();
        if TAKEN.contains(&file.as_str()) || names.iter().any(|n| n == NODE_NAME) {
            bail!(
                "--agent {text}: an agent cannot be called so; ca, node and {NODE_NAME} are other things' names here"
            );
        }
        Ok(Self { file, names })
    }
}

/// The authority: the one that is there, or a new one.
fn authority(dir: &Path) -> Result<Issuer<'static, KeyPair>> {
    let (certificate, key) = paths(dir, "ca");
    match (read(&certificate)?, read(&key)?) {
        (Some(certificate_pem), Some(key_pem)) => {
            let key = KeyPair::from_pem(&key_pem).with_context(|| format!("cannot use {}", key.display()))?;
            println!("kept     {}", certificate.display());
            Issuer::from_ca_cert_pem(&certificate_pem, key)
                .with_context(|| format!("cannot use {}", certificate.display()))
        }
        (None, None) => {
            let mut params = CertificateParams::default();
            // Two authorities are told apart by their names.
            let name = format!("moxlet link {:08x}", rand::random::<u32>());
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            lasts(&mut params, CA_DAYS);
            let new = KeyPair::generate().context("cannot make a key")?;
            let signed = params.self_signed(&new).context("cannot make the authority")?;
            // The key first: a certificate without its key would be taken for another's authority.
            write(&key, &new.serialize_pem(), 0o600)?;
            write(&certificate, &signed.pem(), 0o644)?;
            println!("made     {}", certificate.display());
            Ok(Issuer::new(params, new))
        }
        (None, Some(_)) => {
            fs::remove_file(&key).with_context(|| format!("cannot remove {}", key.display()))?;
            authority(dir)
        }
        (Some(_), None) => bail!(
            "{} is there and {} is not: run it in the directory that holds the authority's key, or in an empty one for a new \
             authority",
            certificate.display(),
            key.display()
        ),
    }
}

/// A certificate with its key, unless there is one that lasts.
fn leaf(
    dir: &Path,
    authority: &Issuer<'_, KeyPair>,
    of: &Agent,
    usage: ExtendedKeyUsagePurpose,
    days: u32,
) -> Result<()> {
    let (certificate, key) = paths(dir, &of.file);
    let known = match (read(&certificate)?, read(&key)?) {
        (Some(pem), Some(_)) => {
            serves(&pem, &of.names).with_context(|| format!("cannot use {}", certificate.display()))?
        }
        _ => false,
    };
    if known {
        println!("kept     {}", certificate.display());
        return Ok(());
    }
    let mut params = CertificateParams::new(of.names.clone())
        .with_context(|| format!("cannot name {} in a certificate", of.names.join(", ")))?;
    let common = of.names.first().map_or("", String::as_str);
    params.distinguished_name.push(DnType::CommonName, common);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
    lasts(&mut params, days);
    let new = KeyPair::generate().context("cannot make a key")?;
    let signed = params.signed_by(&new, authority).context("cannot sign a certificate")?;
    write(&key, &new.serialize_pem(), 0o600)?;
    write(&certificate, &signed.pem(), 0o644)?;
    println!("made     {} for {}, {days} days", certificate.display(), of.names.join(", "));
    Ok(())
}

/// From an hour ago, for clocks that differ.
fn lasts(params: &mut CertificateParams, days: u32) {
    let now = SystemTime::now();
    params.not_before = (now - Duration::from_secs(3600)).into();
    params.not_after = (now + days * DAY).into();
}

/// Whether a certificate is for these names and lasts a while.
fn serves(pem: &str, names: &[String]) -> Result<bool> {
    let (_, pem) = parse_x509_pem(pem.as_bytes()).context("it is no PEM file")?;
    let certificate = pem.parse_x509().context("it holds no certificate")?;
    let ends = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
    let lasts = SystemTime::UNIX_EPOCH + Duration::from_secs(ends) > SystemTime::now() + RENEW;
    let extension = certificate.subject_alternative_name().context("it names no host")?;
    let known: Vec<String> = extension
        .iter()
        .flat_map(|e| &e.value.general_names)
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            GeneralName::IPAddress(raw) => address(raw),
            _ => None,
        })
        .collect();
    let shown = |name: &String| name.parse::<IpAddr>().map_or_else(|_| name.clone(), |ip| ip.to_string());
    Ok(lasts && names.iter().all(|name| known.contains(&shown(name))))
}

fn address(raw: &[u8]) -> Option<String> {
    let v4 = <[u8; 4]>::try_from(raw).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(raw).map(IpAddr::from)).ok().map(|ip| ip.to_string())
}

fn paths(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
    (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")))
}

fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Replaces a file as a whole.
fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    let draft = path.with_added_extension("tmp");
    let written = (|| {
        let _ = fs::remove_file(&draft);
        let mut file = File::options().write(true).create_new(true).mode(mode).open(&draft)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&draft, path)
    })();
    written.with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt as _;

    use moxlet_cri::link::{Acceptor, CertificateFiles, Connector, Endpoint, Protocol};
    use tokio::net::TcpListener;

    use super::*;

    fn args(dir: &Path, agents: &[&str]) -> CertificatesArgs {
        CertificatesArgs {
            dir: dir.to_owned(),
            agents: agents.iter().map(|a| (*a).to_owned()).collect(),
            days: 825,
        }
    }

    fn files(dir: &Path, name: &str) -> CertificateFiles {
        let (certificate, key) = paths(dir, name);
        CertificateFiles { certificate, key, ca: dir.join("ca.crt") }
    }

    #[tokio::test]
    async fn a_node_and_an_agent_meet_by_what_it_makes() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("link");
        main(&args(&dir, &["localhost,127.0.0.1"])).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let acceptor = Acceptor::new(files(&dir, "localhost")).unwrap();
        for host in ["localhost", "127.0.0.1"] {
            let endpoint: Endpoint = format!("https://{host}:{port}").parse().unwrap();
            let connector = Connector::new(endpoint, Some(files(&dir, "node"))).unwrap();
            let (accepted, connected) = tokio::join!(
                async { acceptor.accept(listener.accept().await.unwrap().0).await },
                connector.connect(Protocol::Streams)
            );
            connected.unwrap();
            assert_eq!(accepted.unwrap().protocol, Protocol::Streams);
        }
        let key = fs::metadata(dir.join("localhost.key")).unwrap();
        assert_eq!(key.permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_is_there_stays_and_what_is_new_or_ends_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let text = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
        main(&args(dir, &["pve1,10.0.0.11"])).unwrap();
        let (ca, node, first) = (text("ca.crt"), text("node.crt"), text("pve1.crt"));
        main(&args(dir, &["pve1,10.0.0.11", "pve2"])).unwrap();
        assert_eq!((text("ca.crt"), text("node.crt"), text("pve1.crt")), (ca.clone(), node, first.clone()));
        assert!(dir.join("pve2.key").exists());
        main(&args(dir, &["pve1,10.0.0.11,fd00:0::11"])).unwrap();
        let named = text("pve1.crt");
        assert_ne!(named, first, "it has another name");
        main(&args(dir, &["pve1,fd00::11"])).unwrap();
        assert_eq!(text("pve1.crt"), named, "the same address, spelt otherwise");

        let soon = leaf(
            dir,
            &authority(dir).unwrap(),
            &Agent::parse("pve3").unwrap(),
            ExtendedKeyUsagePurpose::ServerAuth,
            80,
        );
        soon.unwrap();
        let ending = text("pve3.crt");
        main(&args(dir, &["pve3"])).unwrap();
        assert_ne!(text("pve3.crt"), ending);
        assert_eq!(text("ca.crt"), ca);
    }

    #[test]
    fn an_authority_that_was_half_made_is_made_and_one_without_its_key_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("ca.key"), "half").unwrap();
        main(&args(dir.path(), &[])).unwrap();
        fs::remove_file(dir.path().join("ca.key")).unwrap();
        let error = main(&args(dir.path(), &[])).unwrap_err().to_string();
        assert!(error.contains("ca.key is not"), "{error}");
    }

    #[test]
    fn names_that_would_be_other_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["../pve1", "pve1,", "", "ca", "node,pve1", "pve1,moxlet-node", "pve 1", "*"] {
            let error = main(&args(dir.path(), &[name])).unwrap_err().to_string();
            assert!(error.contains("--agent"), "{error}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
