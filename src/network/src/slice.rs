//! Addresses of a slice of the pods' network that this host may give out, for CTs whose engine attaches them.
//!
//! ```text
//! <dir>/10.10.1.7   whose it is: a sandbox id
//! ```
//! A file appears under its name only when it is complete and on disk (it is linked there, which fails if the name is
//! taken), and goes when its CT is gone: an address is never two pods', whatever was killed when. One that the host or a gateway
//! of its routes has at that moment is passed over.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{ErrorKind, Write as _},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use moxlet_ids::SandboxId;

use crate::{Error, Result, error::io, host};

const MAX: u64 = 128;

/// What a slice is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceConfig {
    /// Its first address.
    pub first: IpAddr,
    /// Its last address.
    pub last: IpAddr,
    /// The length of the whole subnet's prefix, not the slice's.
    pub prefix: u8,
    /// The subnet's gateway; it is never given out.
    pub gateway: Option<IpAddr>,
}

/// A slice and who has what of it. Two programs must not share its directory.
#[derive(Debug)]
pub struct Slice {
    dir: PathBuf,
    config: SliceConfig,
    given: Mutex<Given>,
    /// The addresses that the host and its gateways have.
    hosts: Hosts,
}

type Hosts = fn() -> Result<BTreeSet<IpAddr>>;

#[derive(Debug, Default)]
struct Given {
    owners: BTreeMap<IpAddr, SandboxId>,
    /// The number of the address given last: the next ones come first, so that one is not used again at once.
    last: u128,
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

impl SliceConfig {
    fn address(&self, number: u128) -> IpAddr {
        match self.first {
            IpAddr::V4(_) => IpAddr::from(std::net::Ipv4Addr::from(u32::try_from(number).unwrap_or(0))),
            IpAddr::V6(_) => IpAddr::from(std::net::Ipv6Addr::from(number)),
        }
    }

    /// The network's own address and, of IPv4, the broadcast address.
    fn ends(&self) -> [u128; 2] {
        let bits: u8 = if self.first.is_ipv4() { 32 } else { 128 };
        let host = u32::from(bits.saturating_sub(self.prefix));
        let mask = 1u128.checked_shl(host).map_or(u128::MAX, |m| m - 1);
        let network = number(self.first) & !mask;
        [network, if self.first.is_ipv4() && host > 1 { network | mask } else { network }]
    }

    fn check(&self) -> Result<()> {
        let wrong = |reason: &str| Err(Error::BadSlice(format!("{} to {}: {reason}", self.first, self.last)));
        let bits = if self.first.is_ipv4() { 32 } else { 128 };
        if self.first.is_ipv4() != self.last.is_ipv4()
            || self.gateway.is_some_and(|g| g.is_ipv4() != self.first.is_ipv4())
        {
            return wrong("its ends and its gateway are not of one family");
        }
        if self.first > self.last {
            return wrong("its first address is above its last");
        }
        if !(1..bits).contains(&self.prefix) {
            return wrong("the prefix length is none of a network with more than one address");
        }
        let host = u32::from(bits - self.prefix);
        let same = |ip: IpAddr| number(ip) >> host == number(self.first) >> host;
        if !same(self.last) || !self.gateway.is_none_or(same) {
            return wrong("its last address or its gateway is in another subnet than its first");
        }
        Ok(())
    }
}

impl Slice {
    /// Opens (and makes) its directory and reads what is given.
    ///
    /// # Errors
    /// The slice is none, or a file cannot be read: to guess would be to give an address twice.
    pub fn open(dir: &Path, config: SliceConfig) -> Result<Self> {
        Self::on(dir, config, host::addresses)
    }

    fn on(dir: &Path, config: SliceConfig, hosts: Hosts) -> Result<Self> {
        config.check()?;
        fs::create_dir_all(dir).map_err(io("create", dir))?;
        let mut given = Given::default();
        for entry in fs::read_dir(dir).map_err(io("read", dir))? {
            let path = entry.map_err(io("read", dir))?.path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let Ok(ip) = name.parse::<IpAddr>() else {
                // A draft that a crash left: nobody was told of it.
                fs::remove_file(&path).map_err(io("remove", &path))?;
                continue;
            };
            given.owners.insert(ip, owner(&path)?);
        }
        Ok(Self { dir: dir.to_owned(), config, given: Mutex::new(given), hosts })
    }

    /// What it is of.
    #[must_use]
    pub fn config(&self) -> &SliceConfig {
        &self.config
    }

    fn lock(&self) -> MutexGuard<'_, Given> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a sandbox an address; asked again, the same.
    ///
    /// # Errors
    /// [`Error::SliceFull`], a file could not be written, or which addresses the host has cannot be told.
    pub fn allot(&self, sandbox: &SandboxId) -> Result<IpAddr> {
        let mut given = self.lock();
        if let Some((ip, _)) = given.owners.iter().find(|(_, owner)| *owner == sandbox) {
            return Ok(*ip);
        }
        let (first, last) = (number(self.config.first), number(self.config.last));
        let mut not = self.config.ends().to_vec();
        not.extend(self.config.gateway.map(number));
        let hosts = (self.hosts)()?;
        let start = if (first..last).contains(&given.last) { given.last + 1 } else { first };
        for number in (start..=last).chain(first..start).filter(|n| !not.contains(n)) {
            let ip = self.config.address(number);
            if given.owners.contains_key(&ip) || hosts.contains(&ip) {
                continue;
            }
            match self.claim(ip, sandbox)? {
                // Another way than through here; whose it is, is known from now on.
                Some(owner) => drop(given.owners.insert(ip, owner)),
                None => {
                    // It stands there: what goes wrong from here on takes it back as any other address.
                    given.owners.insert(ip, sandbox.clone());
                    given.last = number;
                    let path = self.dir.join(ip.to_string());
                    moxlet_files::sync_dir(&self.dir).map_err(io("write", &path))?;
                    return Ok(ip);
                }
            }
        }
        Err(Error::SliceFull(format!("{} to {}", self.config.first, self.config.last)))
    }

    /// Has the address' file be a sandbox'; whose it is, if there is one already. No draft stays.
    fn claim(&self, ip: IpAddr, sandbox: &SandboxId) -> Result<Option<SandboxId>> {
        let (draft, path) = (self.dir.join(format!(".{sandbox}")), self.dir.join(ip.to_string()));
        let write = || {
            let mut file = File::create(&draft)?;
            file.write_all(sandbox.as_str().as_bytes())?;
            file.sync_all()?;
            fs::hard_link(&draft, &path)
        };
        let written = write();
        // A draft that cannot be removed says nothing: it goes when the directory is opened, or is written over.
        let _ = fs::remove_file(&draft);
        match written {
            Ok(()) => Ok(None),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => owner(&path).map(Some),
            Err(e) => Err(io("write", &path)(e)),
        }
    }

    /// Takes a sandbox' address back: its CT must be gone. Idempotent.
    ///
    /// # Errors
    /// A file could not be removed.
    pub fn release(&self, sandbox: &SandboxId) -> Result<()> {
        let mut given = self.lock();
        let own: Vec<IpAddr> =
            given.owners.iter().filter(|(_, o)| *o == sandbox).map(|(ip, _)| *ip).collect();
        for ip in own {
            let path = self.dir.join(ip.to_string());
            match fs::remove_file(&path) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(io("remove", &path)(e)),
                _ => given.owners.remove(&ip),
            };
        }
        Ok(())
    }

    /// Who has an address.
    #[must_use]
    pub fn owners(&self) -> Vec<SandboxId> {
        self.lock().owners.values().cloned().collect()
    }
}

/// Whose an address is by its file.
fn owner(path: &Path) -> Result<SandboxId> {
    let size = fs::metadata(path).map_err(io("look at", path))?.len();
    let text = if size > MAX { String::new() } else { fs::read_to_string(path).map_err(io("read", path))? };
    text.trim().parse().map_err(|e| io("understand", path)(std::io::Error::other(e)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::sync::Arc;

    use super::*;

    fn config(first: &str, last: &str) -> SliceConfig {
        SliceConfig {
            first: first.parse().unwrap(),
            last: last.parse().unwrap(),
            prefix: 24,
            gateway: Some("10.0.0.1".parse().unwrap()),
        }
    }

    /// A slice on a host that has none of its addresses.
    fn open(dir: &Path, config: SliceConfig) -> Result<Slice> {
        Slice::on(dir, config, || Ok(BTreeSet::new()))
    }

    #[test]
    fn each_sandbox_gets_one_of_its_own_and_keeps_it_over_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let slice = open(dir.path(), config("10.0.0.0", "10.0.0.3")).unwrap();
        let (a, b, c) = (SandboxId::random(), SandboxId::random(), SandboxId::random());
        // Neither the network's own address nor the gateway's.
        assert_eq!(slice.allot(&a).unwrap().to_string(), "10.0.0.2");
        assert_eq!(slice.allot(&b).unwrap().to_string(), "10.0.0.3");
        assert!(matches!(slice.allot(&c), Err(Error::SliceFull(_))));
        drop(slice);
        fs::write(dir.path().join(".draft"), "").unwrap();
        let slice = open(dir.path(), config("10.0.0.0", "10.0.0.3")).unwrap();
        assert_eq!(slice.allot(&a).unwrap().to_string(), "10.0.0.2");
        slice.release(&b).unwrap();
        slice.release(&b).unwrap();
        assert_eq!(slice.allot(&c).unwrap().to_string(), "10.0.0.3");
        assert_eq!(slice.owners().len(), 2);
        assert!(!dir.path().join(".draft").exists());
    }

    #[test]
    fn an_address_that_was_taken_back_is_not_the_next_one() {
        let dir = tempfile::tempdir().unwrap();
        let slice = open(dir.path(), config("10.0.0.10", "10.0.0.20")).unwrap();
        let a = SandboxId::random();
        assert_eq!(slice.allot(&a).unwrap().to_string(), "10.0.0.10");
        slice.release(&a).unwrap();
        assert_eq!(slice.allot(&SandboxId::random()).unwrap().to_string(), "10.0.0.11");
    }

    #[test]
    fn an_address_that_the_host_has_by_now_is_given_to_no_pod() {
        let dir = tempfile::tempdir().unwrap();
        let own = |last: &str| SliceConfig { gateway: None, ..config("127.0.0.1", last) };
        let slice = Slice::open(dir.path(), own("127.0.0.2")).unwrap();
        assert_eq!(slice.allot(&SandboxId::random()).unwrap().to_string(), "127.0.0.2");
        let none = tempfile::tempdir().unwrap();
        let slice = Slice::open(none.path(), own("127.0.0.1")).unwrap();
        let error = slice.allot(&SandboxId::random()).unwrap_err().to_string();
        assert!(error.contains("127.0.0.1 to 127.0.0.1") && error.contains("the host"), "{error}");
    }

    #[test]
    fn an_address_whose_file_stands_is_passed_over_and_known_from_then_on() {
        let dir = tempfile::tempdir().unwrap();
        let slice = open(dir.path(), config("10.0.0.10", "10.0.0.20")).unwrap();
        let (a, b, c) = (SandboxId::random(), SandboxId::random(), SandboxId::random());
        // As a write leaves it that failed after the file stood there.
        fs::write(dir.path().join("10.0.0.10"), a.as_str()).unwrap();
        assert_eq!(slice.allot(&b).unwrap().to_string(), "10.0.0.11");
        assert_eq!(slice.allot(&a).unwrap().to_string(), "10.0.0.10");
        assert_eq!(slice.allot(&c).unwrap().to_string(), "10.0.0.12");
        slice.release(&a).unwrap();
        assert!(!dir.path().join("10.0.0.10").exists());
    }

    #[test]
    fn a_write_that_fails_leaves_nothing_and_the_next_one_works() {
        let dir = tempfile::tempdir().unwrap();
        let slice = open(dir.path(), config("10.0.0.10", "10.0.0.10")).unwrap();
        let a = SandboxId::random();
        fs::write(dir.path().join("10.0.0.10"), "?").unwrap();
        slice.allot(&a).unwrap_err();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no draft stays");
        assert!(slice.owners().is_empty());
        fs::remove_file(dir.path().join("10.0.0.10")).unwrap();
        assert_eq!(slice.allot(&a).unwrap().to_string(), "10.0.0.10");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn asked_at_once_no_two_get_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let slice = Arc::new(open(dir.path(), config("10.0.0.10", "10.0.0.99")).unwrap());
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let slice = slice.clone();
                std::thread::spawn(move || {
                    (0..10).map(|_| slice.allot(&SandboxId::random()).unwrap()).collect::<Vec<_>>()
                })
            })
            .collect();
        let all: Vec<IpAddr> = threads.into_iter().flat_map(|t| t.join().unwrap()).collect();
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 80);
    }

    #[test]
    fn what_is_no_slice_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut wrong = vec![
            config("10.0.0.9", "10.0.0.8"),
            config("10.0.0.9", "10.0.1.8"),
            config("10.0.1.2", "10.0.1.8"),
        ];
        wrong.push(SliceConfig { last: "::9".parse().unwrap(), ..config("10.0.0.8", "10.0.0.9") });
        wrong.push(SliceConfig { prefix: 0, ..config("10.0.0.8", "10.0.0.9") });
        for wrong in wrong {
            assert!(matches!(open(dir.path(), wrong.clone()), Err(Error::BadSlice(_))), "{wrong:?}");
        }
        fs::write(dir.path().join("10.0.0.8"), "?").unwrap();
        assert!(open(dir.path(), config("10.0.0.8", "10.0.0.9")).is_err());
    }

    #[test]
    fn ipv6_works_alike() {
        let dir = tempfile::tempdir().unwrap();
        let config = SliceConfig {
            first: "fd00::".parse().unwrap(),
            last: "fd00::ffff".parse().unwrap(),
            prefix: 64,
            gateway: None,
        };
        let slice = open(dir.path(), config).unwrap();
        assert_eq!(slice.allot(&SandboxId::random()).unwrap().to_string(), "fd00::1");
    }
}
