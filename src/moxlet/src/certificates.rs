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
use clap::Args;
use moxlet_cri::link::NODE_NAME;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData as _,
};
use x509_parser::{
    pem::parse_x509_pem,
    prelude::{GeneralName, X509Certificate},
};

/// What `moxlet certificates` takes.
#[derive(Debug, Args)]
pub(crate) struct CertificatesArgs {
    /// Where they are written; keep it: it holds the authority's key
    #[arg(long, value_name = "DIR", default_value = "/etc/moxlet/link")]
    pub(crate) dir: PathBuf,
    /// The names and addresses by which the node reaches an agent; its files are named after the first. May be given several times
    #[arg(long = "agent", value_name = "NAME[,NAME…]")]
    pub(crate) agents: Vec<String>,
    /// How long node's and agents' certificates last, in days
    #[arg(long, value_name = "N", default_value_t = 825, value_parser = clap::value_parser!(u32).range(91..=3650))]
    pub(crate) days: u32,
}

const DAY: Duration = Duration::from_secs(86_400);
/// How long the authority lasts.
const CA_DAYS: u32 = 3650;
/// What ends sooner is made anew.
const RENEW: Duration = Duration::from_secs(90 * 86_400);
/// Names of files that no agent may have.
const TAKEN: [&str; 2] = ["ca", "node"];

/// Makes what is missing, near its end or of another authority.
///
/// # Errors
/// A name is none, a file cannot be read or written, or the authority is near its end or not of its key.
pub(crate) fn main(args: &CertificatesArgs) -> Result<()> {
    let mut all =
        vec![Leaf { file: "node".to_owned(), names: vec![NODE_NAME.to_owned()], usage: Usage::Node }];
    for text in &args.agents {
        all.push(Leaf::of_agent(text)?);
    }
    let dir = &args.dir;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("cannot make {}", dir.display()))?;
    let authority = Authority::open(dir)?;
    // Those of earlier runs end, too.
    all.extend(earlier(dir, &all)?);
    for leaf in &all {
        leaf.provide(dir, &authority, args.days)?;
    }
    println!(
        "\nThe node's machine needs node.crt, node.key and ca.crt, each agent's its own two files and ca.crt, as"
    );
    println!(
        "link_certificate_file, link_key_file and link_ca_file. Nobody but this directory needs ca.key."
    );
    Ok(())
}

/// What a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Usage {
    Node,
    Agent,
}

/// The certificate of an agent, or of the node: the name of its files, and the names that it is for.
struct Leaf {
    file: String,
    names: Vec<String>,
    usage: Usage,
}

impl Leaf {
    /// What `--agent` says.
    fn of_agent(text: &str) -> Result<Self> {
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
        Ok(Self { file, names, usage: Usage::Agent })
    }

    /// Makes it, unless there is one that does.
    fn provide(&self, dir: &Path, authority: &Authority, days: u32) -> Result<()> {
        let (certificate, key) = paths(dir, &self.file);
        if let (Some(pem), Some(key)) = (read(&certificate)?, read(&key)?)
            && self.is_done_by(&pem, &key, authority).unwrap_or(false)
        {
            println!("kept     {}", certificate.display());
            return Ok(());
        }
        let mut params = CertificateParams::new(self.names.clone())
            .with_context(|| format!("cannot name {} in a certificate", self.names.join(", ")))?;
        let common = self.names.first().map_or("", String::as_str);
        params.distinguished_name.push(DnType::CommonName, common);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match self.usage {
            Usage::Node => ExtendedKeyUsagePurpose::ClientAuth,
            Usage::Agent => ExtendedKeyUsagePurpose::ServerAuth,
        }];
        params.use_authority_key_identifier_extension = true;
        lasts(&mut params, (SystemTime::now() + days * DAY).min(authority.ends));
        let new = KeyPair::generate().context("cannot make a key")?;
        let signed = params.signed_by(&new, &authority.issuer).context("cannot sign a certificate")?;
        write(&key, &new.serialize_pem(), 0o600)?;
        write(&certificate, &signed.pem(), 0o644)?;
        println!("made     {} for {}", certificate.display(), self.names.join(", "));
        Ok(())
    }

    /// Whether a certificate is for these names, of this authority and key, and lasts a while.
    fn is_done_by(&self, pem: &str, key: &str, authority: &Authority) -> Result<bool> {
        let key = KeyPair::from_pem(key)?;
        let (_, pem) = parse_x509_pem(pem.as_bytes())?;
        let certificate = pem.parse_x509()?;
        let (_, by) = parse_x509_pem(authority.pem.as_bytes())?;
        let by = by.parse_x509()?;
        let used = certificate.extended_key_usage()?.map(|usage| match self.usage {
            Usage::Node => usage.value.client_auth,
            Usage::Agent => usage.value.server_auth,
        });
        let known = names_of(&certificate)?;
        let shown = |name: &String| name.parse::<IpAddr>().map_or_else(|_| name.clone(), |ip| ip.to_string());
        Ok(used == Some(true)
            && certificate.issuer().as_raw() == by.subject().as_raw()
            && certificate.verify_signature(Some(by.public_key())).is_ok()
            && certificate.public_key().raw == key.subject_public_key_info()
            && end_of(&certificate) > SystemTime::now() + RENEW
            && self.names.iter().all(|name| known.contains(&shown(name))))
    }
}

/// The agents of earlier runs that were not named in this one.
fn earlier(dir: &Path, named: &[Leaf]) -> Result<Vec<Leaf>> {
    let mut found = Vec::new();
    let context = || format!("cannot read {}", dir.display());
    for entry in fs::read_dir(dir).with_context(context)? {
        let path = entry.with_context(context)?.path();
        let Some(file) = path.file_stem().and_then(|f| f.to_str()) else { continue };
        let other = path.extension().is_some_and(|e| e == "crt")
            && !TAKEN.contains(&file)
            && named.iter().all(|leaf| leaf.file != file);
        if !other || !paths(dir, file).1.exists() {
            continue;
        }
        let pem = read(&path)?.unwrap_or_default();
        let names = parse_x509_pem(pem.as_bytes())
            .ok()
            .and_then(|(_, pem)| names_of(&pem.parse_x509().ok()?).ok())
            .with_context(|| format!("cannot use {}", path.display()))?;
        found.push(Leaf { file: file.to_owned(), names, usage: Usage::Agent });
    }
    found.sort_by(|a, b| a.file.cmp(&b.file));
    Ok(found)
}

/// Who signs.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    ends: SystemTime,
}

impl Authority {
    /// The one that is there, or a new one.
    fn open(dir: &Path) -> Result<Self> {
        let (certificate, key) = paths(dir, "ca");
        let known_key = match read(&key)? {
            Some(pem) => {
                Some(KeyPair::from_pem(&pem).with_context(|| format!("cannot use {}", key.display()))?)
            }
            None => None,
        };
        match (read(&certificate)?, known_key) {
            (Some(pem), Some(known)) => {
                let authority =
                    Self::of(pem, known).with_context(|| format!("cannot use {}", certificate.display()))?;
                println!("kept     {}", certificate.display());
                Ok(authority)
            }
            (Some(_), None) => bail!(
                "{} is there and {} is not: run it in the directory that holds the authority's key, or in an empty one for a \
                 new authority",
                certificate.display(),
                key.display()
            ),
            (None, known) => Self::make(&certificate, &key, known),
        }
    }

    /// Makes one. A key without its certificate is one that was half made, or that somebody kept: it stays.
    fn make(certificate: &Path, key: &Path, known: Option<KeyPair>) -> Result<Self> {
        let mut params = CertificateParams::default();
        // Two authorities are told apart by their names.
        let name = format!("moxlet link {:08x}", rand::random::<u32>());
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        lasts(&mut params, SystemTime::now() + CA_DAYS * DAY);
        let used = match known {
            Some(known) => known,
            None => {
                let new = KeyPair::generate().context("cannot make a key")?;
                write(key, &new.serialize_pem(), 0o600)?;
                new
            }
        };
        let signed = params.self_signed(&used).context("cannot make the authority")?;
        write(certificate, &signed.pem(), 0o644)?;
        println!("made     {}", certificate.display());
        Self::of(signed.pem(), used)
    }

    fn of(pem: String, key: KeyPair) -> Result<Self> {
        let (_, parsed) = parse_x509_pem(pem.as_bytes()).context("it is no PEM file")?;
        let certificate = parsed.parse_x509().context("it holds no certificate")?;
        if certificate.public_key().raw != key.subject_public_key_info() {
            bail!("ca.key is not its key");
        }
        let ends = end_of(&certificate);
        if ends < SystemTime::now() + RENEW {
            bail!(
                "the authority ends on {}: make a new one in an empty directory, and give all machines their files of it",
                certificate.validity().not_after
            );
        }
        let issuer = Issuer::from_ca_cert_pem(&pem, key)?;
        Ok(Self { issuer, pem, ends })
    }
}

/// From an hour ago, for clocks that differ.
fn lasts(params: &mut CertificateParams, until: SystemTime) {
    params.not_before = (SystemTime::now() - Duration::from_secs(3600)).into();
    params.not_after = until.into();
}

fn end_of(certificate: &X509Certificate<'_>) -> SystemTime {
    let ends = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
    SystemTime::UNIX_EPOCH + Duration::from_secs(ends)
}

/// The names and addresses that a certificate is for.
fn names_of(certificate: &X509Certificate<'_>) -> Result<Vec<String>> {
    let extension = certificate.subject_alternative_name()?;
    let all = extension.iter().flat_map(|e| &e.value.general_names);
    let names = all.filter_map(|name| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(raw) => address(raw),
        _ => None,
    });
    Ok(names.collect())
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
        fs::rename(&draft, path)?;
        path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
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

        let authority = Authority::open(dir).unwrap();
        Leaf::of_agent("pve3,10.0.0.13").unwrap().provide(dir, &authority, 80).unwrap();
        let ending = text("pve3.crt");
        main(&args(dir, &[])).unwrap();
        assert_ne!(text("pve3.crt"), ending, "also one that is not named in this run");
        let (_, pem) = parse_x509_pem(text("pve3.crt").as_bytes()).unwrap();
        assert_eq!(names_of(&pem.parse_x509().unwrap()).unwrap(), ["pve3", "10.0.0.13"]);
        assert_eq!(text("ca.crt"), ca);
    }

    #[test]
    fn what_is_of_another_authority_or_key_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let text = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
        main(&args(dir, &["pve1", "pve2"])).unwrap();
        let (node, first, second) = (text("node.crt"), text("pve1.crt"), text("pve2.crt"));
        // A crash between a new key and its certificate.
        fs::copy(dir.join("pve2.key"), dir.join("pve1.key")).unwrap();
        main(&args(dir, &[])).unwrap();
        assert_ne!(text("pve1.crt"), first);
        assert_eq!((text("node.crt"), text("pve2.crt")), (node.clone(), second.clone()));
        // The authority's key has leaked.
        fs::remove_file(dir.join("ca.crt")).unwrap();
        fs::remove_file(dir.join("ca.key")).unwrap();
        main(&args(dir, &[])).unwrap();
        assert_ne!(text("node.crt"), node);
        assert_ne!(text("pve2.crt"), second);
        Acceptor::new(files(dir, "pve2")).unwrap();
    }

    #[test]
    fn an_authority_near_its_end_or_of_another_key_signs_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        main(&args(dir, &[])).unwrap();
        fs::copy(dir.join("node.key"), dir.join("ca.key")).unwrap();
        let error = format!("{:#}", main(&args(dir, &["pve1"])).unwrap_err());
        assert!(error.contains("ca.key is not its key"), "{error}");
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        lasts(&mut params, SystemTime::now() + 80 * DAY);
        fs::write(dir.join("ca.crt"), params.self_signed(&key).unwrap().pem()).unwrap();
        fs::write(dir.join("ca.key"), key.serialize_pem()).unwrap();
        let error = format!("{:#}", main(&args(dir, &["pve1"])).unwrap_err());
        assert!(error.contains("the authority ends on"), "{error}");
        assert!(!dir.join("pve1.crt").exists());
    }

    #[test]
    fn an_authority_without_its_certificate_keeps_its_key_and_one_without_its_key_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        main(&args(dir.path(), &[])).unwrap();
        let key = fs::read_to_string(dir.path().join("ca.key")).unwrap();
        fs::remove_file(dir.path().join("ca.crt")).unwrap();
        main(&args(dir.path(), &[])).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("ca.key")).unwrap(), key);
        Acceptor::new(files(dir.path(), "node")).unwrap();
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
