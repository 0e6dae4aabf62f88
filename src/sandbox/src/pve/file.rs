//! The files of CTs in the cluster's file system (`/etc/pve`), written as Proxmox VE writes them.
//!
//! A new file is created exclusively: across the whole cluster only one succeeds for a VMID. Later changes are made to a file
//! beside it that then replaces it. Both are done under the lock that Proxmox VE itself takes for a CT
//! (`/run/lock/lxc/pve-config-ID.lock`), and a `lock:` in the configuration is respected. The file system takes no changes of
//! modes and owners, and none at all without quorum.
//!
//! That a file is not there says something only while the file system is: an unmounted `/etc/pve` is an empty directory, and
//! not one CT of it was deleted. So each look begins at the folder as it is mounted at that moment.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self as std_io, ErrorKind, Read as _, Write as _},
    net::IpAddr,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use moxlet_ids::Vmid;
use moxlet_pve::{NodeName, config::LxcConfig};
use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, statat},
    io::Errno,
};

use crate::{Error, Result, error::io, process::read_bounded};

/// The largest file that the cluster's file system takes.
const MAX: u64 = 1 << 20;
/// How long the lock of a CT is waited for, as Proxmox VE does.
const LOCK_WAIT: Duration = Duration::from_secs(10);
const LOCK_PAUSE: Duration = Duration::from_millis(20);
/// What every folder of a cluster has, of however many nodes, and no other directory.
const MEMBERS: &str = ".members";

/// A CT's file as it was read.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Content {
    /// The main section.
    pub(super) config: LxcConfig,
    /// Snapshots and pending changes: all from the first further section on, as it stands there.
    rest: String,
    /// The names of those sections.
    pub(super) sections: Vec<String>,
}

impl Content {
    pub(super) fn parse(text: &str) -> std::result::Result<Self, moxlet_pve::config::InvalidConfig> {
        let read = LxcConfig::from_file(text)?;
        Ok(Self {
            config: read.config,
            rest: text.get(read.main_len..).unwrap_or_default().to_owned(),
            sections: read.sections,
        })
    }

    /// Whether a volume of this name is in use here, by the CT or by a snapshot of it.
    pub(super) fn uses(&self, volume: &str) -> bool {
        let in_words =
            |text: &str| text.split(|c: char| c.is_whitespace() || ",:=/@".contains(c)).any(|w| w == volume);
        self.config.pairs().iter().any(|(key, value)| key != "description" && in_words(value))
            || in_words(&self.rest)
    }

    /// Whether the CT has this address.
    pub(super) fn has_address(&self, address: IpAddr) -> bool {
        has_address(&self.config, address)
    }

    fn text(&self, path: &Path) -> Result<String> {
        let mut text =
            self.config.to_file().map_err(|e| Error::Config { path: path.to_owned(), source: e })?;
        if !self.rest.is_empty() {
            text.push('\n');
            text.push_str(&self.rest);
        }
        Ok(text)
    }
}

/// Whether a CT has this address, in a key of its own or in a raw one.
pub(super) fn has_address(config: &LxcConfig, address: IpAddr) -> bool {
    let in_words = |text: &str| {
        let mut words = text.split(|c: char| c.is_whitespace() || ",=/".contains(c));
        words.any(|word| word.parse() == Ok(address))
    };
    let pairs = config.pairs();
    let values = pairs.iter().filter(|(key, _)| key != "description").map(|(_, value)| value);
    values.chain(config.lxc.iter().map(|(_, value)| value)).any(|value| in_words(value))
}

/// The lock of one CT, held.
#[derive(Debug)]
pub(super) struct Held {
    _file: File,
    vmid: Vmid,
}

/// The cluster's file system as this node has it.
#[derive(Debug, Clone)]
pub(super) struct ConfigDir {
    dir: PathBuf,
    node: NodeName,
    locks: PathBuf,
}

impl ConfigDir {
    /// Checks that it is there.
    pub(super) fn open(dir: &Path, node: NodeName, locks: &Path) -> Result<Self> {
        let this = Self { dir: dir.to_owned(), node, locks: locks.to_owned() };
        if let Err(error) = this.mounted().and_then(|mounted| mounted.check()) {
            tracing::debug!(%error, dir = %dir.display(), "the cluster's file system");
            return Err(Error::Host(format!(
                "{} is no directory of a cluster's file system: this is no Proxmox VE host, its pve-cluster service is down, or its \
                 node is not called {} (keys config_dir and node)",
                this.own_dir().display(),
                this.node
            )));
        }
        fs::create_dir_all(locks).map_err(io("create", locks))?;
        Ok(this)
    }

    /// The folder itself.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn own_dir(&self) -> PathBuf {
        self.dir.join(cts_of(self.node.as_str()))
    }

    /// The folder as it is mounted now.
    fn mounted(&self) -> Result<Mounted<'_>> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, &self.dir, flags, Mode::empty());
        let root = root.map_err(|e| {
            tracing::debug!(error = %e, dir = %self.dir.display(), "the folder cannot be opened");
            Error::NoClusterFs { path: self.dir.clone() }
        })?;
        Ok(Mounted { of: self, root })
    }

    /// Fails while the cluster's file system is away: then nothing follows from what is not there.
    pub(super) fn check(&self) -> Result<()> {
        self.mounted()?.check()
    }

    pub(super) fn path(&self, vmid: Vmid) -> PathBuf {
        self.own_dir().join(format!("{vmid}.conf"))
    }

    /// On which other node a CT of this number is that includes this file.
    pub(super) fn elsewhere(&self, vmid: Vmid, include: &Path) -> Result<Option<String>> {
        let mounted = self.mounted()?;
        mounted.check()?;
        let Some(include) = include.to_str() else { return Ok(None) };
        for name in mounted.nodes()?.into_iter().filter(|name| name != self.node.as_str()) {
            let text = mounted.text(&cts_of(&name).join(format!("{vmid}.conf")))?.unwrap_or_default();
            let includes = |l: &str| l.starts_with("lxc.include") && l.trim_end().ends_with(include);
            if text.lines().any(includes) {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// The VMIDs of this node's CTs.
    pub(super) fn own_cts(&self) -> Result<Vec<Vmid>> {
        let dir = self.own_dir();
        let entries = fs::read_dir(&dir).map_err(io("read", &dir))?;
        Ok(entries
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.strip_suffix(".conf")?.parse().ok())
            .collect())
    }

    /// Whether HA looks after a CT: it is one of its resources.
    pub(super) fn is_under_ha(&self, vmid: Vmid) -> bool {
        let text = read_bounded(&self.dir.join("ha/resources.cfg"), MAX).unwrap_or_default();
        let head = vmid.to_string();
        text.lines().any(|l| l.strip_prefix("ct:").is_some_and(|id| id.trim() == head))
    }

    /// Whether a CT has firewall rules of its own.
    pub(super) fn has_firewall(&self, vmid: Vmid) -> bool {
        self.dir.join(format!("firewall/{vmid}.fw")).exists()
    }

    /// Fails if the cluster has no quorum, as far as the file system's own list of members says, or it is away.
    pub(super) fn check_quorum(&self, path: &Path) -> Result<()> {
        let mounted = self.mounted()?;
        mounted.check()?;
        let text = mounted.text(Path::new(MEMBERS))?.unwrap_or_default();
        let members: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        match members["cluster"]["quorate"].as_u64() {
            Some(0) => Err(Error::NoQuorum { path: path.to_owned() }),
            _ => Ok(()),
        }
    }

    /// Takes the lock of a CT, waiting for whoever has it.
    pub(super) fn lock(&self, vmid: Vmid) -> Result<Held> {
        let since = Instant::now();
        loop {
            if let Some(held) = self.try_lock(vmid)? {
                return Ok(held);
            }
            if since.elapsed() >= LOCK_WAIT {
                let what = format!("somebody holds {}", self.lock_path(vmid).display());
                return Err(Error::Busy { vmid, what });
            }
            thread::sleep(LOCK_PAUSE);
        }
    }

    /// Takes the lock of a CT; none if somebody has it.
    pub(super) fn try_lock(&self, vmid: Vmid) -> Result<Option<Held>> {
        let path = self.lock_path(vmid);
        let open = OpenOptions::new().create(true).append(true).open(&path);
        let file = open.map_err(io("open", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Held { _file: file, vmid })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(io("lock", path)(e)),
        }
    }

    fn lock_path(&self, vmid: Vmid) -> PathBuf {
        self.locks.join(format!("pve-config-{vmid}.lock"))
    }

    /// Reads a CT's file; none if this node has no such CT.
    pub(super) fn read(&self, vmid: Vmid) -> Result<Option<Content>> {
        let mounted = self.mounted()?;
        let Some(text) = mounted.text(&cts_of(self.node.as_str()).join(format!("{vmid}.conf")))? else {
            mounted.check()?;
            return Ok(None);
        };
        let path = self.path(vmid);
        Content::parse(&text).map(Some).map_err(|source| Error::Config { path, source })
    }

    /// Creates a CT's file; false if there is one of the number anywhere in the cluster.
    pub(super) fn create(&self, held: &Held, config: &LxcConfig) -> Result<bool> {
        let path = self.path(held.vmid);
        let text = config.to_file().map_err(|source| Error::Config { path: path.clone(), source })?;
        self.check_quorum(&path)?;
        let mut file = match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::AlreadyExists => return Ok(false),
            Err(e) => return Err(refused(path, e)),
        };
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(|e| refused(path, e))?;
        Ok(true)
    }

    /// Replaces a CT's file as a whole.
    pub(super) fn replace(&self, held: &Held, content: &Content) -> Result<()> {
        let path = self.path(held.vmid);
        let text = content.text(&path)?;
        self.check_quorum(&path)?;
        let draft = self.own_dir().join(format!("{}.conf.tmp.{}", held.vmid, std::process::id()));
        let write = || {
            let mut file = File::create(&draft)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            drop(file);
            fs::rename(&draft, &path)
        };
        write().map_err(|e| {
            let _ = fs::remove_file(&draft);
            refused(path.clone(), e)
        })
    }

    /// Removes a CT's file and what a crash left beside it. Idempotent.
    pub(super) fn remove(&self, held: &Held) -> Result<()> {
        let path = self.path(held.vmid);
        self.sweep(held);
        if !path.exists() {
            return Ok(());
        }
        self.check_quorum(&path)?;
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(refused(path, e)),
            _ => Ok(()),
        }
    }

    /// Removes replacements that a crash left; the lock is held, so nobody is writing one.
    pub(super) fn sweep(&self, held: &Held) {
        let prefix = format!("{}.conf.tmp.", held.vmid);
        let Ok(entries) = fs::read_dir(self.own_dir()) else { return };
        for entry in entries.flatten() {
            if entry.file_name().to_str().is_some_and(|n| n.starts_with(&prefix)) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// The folder at one moment: all that is looked up by it is of the same mount, whatever is mounted or unmounted meanwhile.
struct Mounted<'a> {
    of: &'a ConfigDir,
    root: OwnedFd,
}

impl Mounted<'_> {
    /// Fails unless it is the cluster's file system.
    fn check(&self) -> Result<()> {
        let own = cts_of(self.of.node.as_str());
        for (name, kind) in [(Path::new(MEMBERS), FileType::RegularFile), (&own, FileType::Directory)] {
            match statat(&self.root, name, AtFlags::empty()) {
                Ok(stat) if FileType::from_raw_mode(stat.st_mode) == kind => {}
                _ => return Err(Error::NoClusterFs { path: self.of.dir.join(name) }),
            }
        }
        Ok(())
    }

    /// A file of it; none if it is not there, which may mean that nothing is.
    fn text(&self, name: &Path) -> Result<Option<String>> {
        let read = || -> std_io::Result<String> {
            let file = openat(&self.root, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
            let mut bytes = Vec::new();
            File::from(file).take(MAX).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        match read() {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(unreadable(self.of.dir.join(name), e)),
        }
    }

    /// The names of the cluster's nodes.
    fn nodes(&self) -> Result<Vec<String>> {
        let path = || self.of.dir.join("nodes");
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = openat(&self.root, "nodes", flags, Mode::empty()).and_then(Dir::new);
        let mut names = Vec::new();
        for entry in dir.map_err(|e| unreadable(path(), e.into()))? {
            let entry = entry.map_err(|e| unreadable(path(), e.into()))?;
            names.extend(entry.file_name().to_str().ok().filter(|n| !n.starts_with('.')).map(str::to_owned));
        }
        Ok(names)
    }
}

/// Where the CTs of a node are.
fn cts_of(node: &str) -> PathBuf {
    Path::new("nodes").join(node).join("lxc")
}

/// A failed read: where the service of the cluster's file system has died, its mount is still there and answers nobody.
fn unreadable(path: PathBuf, error: std_io::Error) -> Error {
    let died = [Errno::NOTCONN, Errno::CONNABORTED].map(Errno::raw_os_error);
    if error.raw_os_error().is_some_and(|code| died.contains(&code)) {
        return Error::NoClusterFs { path };
    }
    io("read", path)(error)
}

/// A failed write: without quorum the cluster's file system is read-only for all, root included; a directory that is not
/// there is one of a file system that is not.
fn refused(path: PathBuf, error: std_io::Error) -> Error {
    match error.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Error::NoQuorum { path },
        ErrorKind::NotFound => Error::NoClusterFs { path },
        _ => match unreadable(path, error) {
            Error::Io { path, source, .. } => io("write", path)(source),
            away => away,
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn folder() -> (tempfile::TempDir, ConfigDir) {
        let dir = tempfile::tempdir().unwrap();
        for node in ["pve1", "pve2"] {
            fs::create_dir_all(dir.path().join("pve/nodes").join(node).join("lxc")).unwrap();
        }
        fs::write(dir.path().join("pve/.members"), r#"{"nodename":"pve1","version":1}"#).unwrap();
        let config =
            ConfigDir::open(&dir.path().join("pve"), "pve1".parse().unwrap(), &dir.path().join("lock"))
                .unwrap();
        (dir, config)
    }

    fn v(number: u32) -> Vmid {
        Vmid::new(number).unwrap()
    }

    fn named(name: &str) -> LxcConfig {
        LxcConfig { hostname: Some(name.into()), ..LxcConfig::default() }
    }

    #[test]
    fn only_the_first_of_a_number_is_created() {
        let (_dir, folder) = folder();
        let held = folder.lock(v(100)).unwrap();
        assert!(folder.create(&held, &named("one")).unwrap());
        assert!(!folder.create(&held, &named("two")).unwrap());
        assert_eq!(folder.read(v(100)).unwrap().unwrap().config, named("one"));
        assert_eq!(folder.own_cts().unwrap(), [v(100)]);
        folder.remove(&held).unwrap();
        folder.remove(&held).unwrap();
        assert!(folder.read(v(100)).unwrap().is_none());
    }

    #[test]
    fn a_change_keeps_snapshots_and_pending_values() {
        let (_dir, folder) = folder();
        let rest = "[pve:pending]\nmemory: 7\n\n[snap]\nhostname: old\n";
        fs::write(folder.path(v(100)), format!("hostname: a\nmemory: 5\n\n{rest}")).unwrap();
        let held = folder.lock(v(100)).unwrap();
        let mut content = folder.read(v(100)).unwrap().unwrap();
        assert_eq!(content.sections, ["pve:pending", "snap"]);
        content.config.memory = Some(6);
        fs::write(folder.own_dir().join("100.conf.tmp.1"), "left").unwrap();
        folder.replace(&held, &content).unwrap();
        folder.sweep(&held);
        assert_eq!(
            fs::read_to_string(folder.path(v(100))).unwrap(),
            format!("hostname: a\nmemory: 6\n\n{rest}")
        );
        assert_eq!(fs::read_dir(folder.own_dir()).unwrap().count(), 1);
    }

    #[test]
    fn a_line_in_brackets_that_opens_no_section_stays_once() {
        let (_dir, folder) = folder();
        let rest = "[snap]\nmemory: 7\n";
        fs::write(folder.path(v(100)), format!("hostname: a\n[no section]\nmemory: 5\n{rest}")).unwrap();
        let held = folder.lock(v(100)).unwrap();
        let content = folder.read(v(100)).unwrap().unwrap();
        assert_eq!((content.config.memory, content.sections.as_slice()), (Some(5), &["snap".to_owned()][..]));
        folder.replace(&held, &content).unwrap();
        let text = fs::read_to_string(folder.path(v(100))).unwrap();
        assert_eq!(text, format!("hostname: a\nmemory: 5\n[no section]\n\n{rest}"));
        assert_eq!(folder.read(v(100)).unwrap().unwrap(), content);
    }

    #[test]
    fn no_quorum_is_told_apart() {
        let (dir, folder) = folder();
        fs::write(
            dir.path().join("pve/.members"),
            r#"{"nodename":"pve1","cluster":{"name":"c","quorate":0}}"#,
        )
        .unwrap();
        let held = folder.lock(v(100)).unwrap();
        assert!(matches!(folder.create(&held, &named("a")), Err(Error::NoQuorum { .. })));
        let denied = refused("/x".into(), ErrorKind::PermissionDenied.into());
        assert!(matches!(denied, Error::NoQuorum { .. }), "{denied}");
    }

    #[test]
    fn a_ct_on_another_node_is_found_there() {
        let (dir, folder) = folder();
        fs::write(dir.path().join("pve/nodes/pve2/lxc/100.conf"), "memory: 5\nlxc.include: /x/100-u.conf\n")
            .unwrap();
        let elsewhere = |vmid, include| folder.elsewhere(v(vmid), Path::new(include)).unwrap();
        assert_eq!(elsewhere(100, "/x/100-u.conf").as_deref(), Some("pve2"));
        // The number was used again there.
        assert_eq!(elsewhere(100, "/x/100-v.conf"), None);
        assert_eq!(elsewhere(101, "/x/100-u.conf"), None);
    }

    #[test]
    fn volumes_and_addresses_of_a_ct_are_found_as_whole_words() {
        let text = "#10.0.0.9 on subvol-9-disk-0\nnet0: name=eth0,gw=10.0.0.1,ip=10.0.0.7/24,ip6=fd00::7/64\n\
            rootfs: local-zfs:subvol-100-disk-0,size=1G\nlxc.net.1.ipv4.address: 10.0.0.8/24\n\n[snap]\nmp0: z:subvol-8-disk-1,mp=/x\n";
        let content = Content::parse(text).unwrap();
        assert!(content.uses("subvol-100-disk-0") && content.uses("subvol-8-disk-1"));
        assert!(!content.uses("subvol-10-disk-0") && !content.uses("subvol-9-disk-0"));
        for (address, has) in [
            ("10.0.0.7", true),
            ("10.0.0.8", true),
            ("fd00:0::7", true),
            ("10.0.0.9", false),
            ("10.0.0.70", false),
        ] {
            assert_eq!(content.has_address(address.parse().unwrap()), has, "{address}");
        }
    }

    #[test]
    fn a_file_that_is_not_there_says_nothing_while_the_file_system_is_not_there() {
        let (dir, folder) = folder();
        let (here, away) = (dir.path().join("pve"), dir.path().join("away"));
        assert_eq!(folder.read(v(100)).unwrap(), None);
        let nothing_is_known = || {
            assert!(matches!(folder.read(v(100)), Err(Error::NoClusterFs { .. })));
            assert!(matches!(folder.elsewhere(v(100), Path::new("/x")), Err(Error::NoClusterFs { .. })));
            let held = folder.lock(v(100)).unwrap();
            assert!(matches!(folder.create(&held, &named("a")), Err(Error::NoClusterFs { .. })));
            assert!(folder.check().unwrap_err().is_temporary());
        };
        fs::rename(&here, &away).unwrap();
        nothing_is_known();
        fs::create_dir(&here).unwrap();
        nothing_is_known();
        // Directories that somebody made in the mount point.
        fs::create_dir_all(here.join("nodes/pve1/lxc")).unwrap();
        nothing_is_known();
        fs::remove_dir_all(&here).unwrap();
        fs::rename(&away, &here).unwrap();
        assert_eq!(folder.read(v(100)).unwrap(), None);
    }

    #[test]
    fn a_resource_of_ha_is_known_by_its_number() {
        let (dir, folder) = folder();
        fs::create_dir(dir.path().join("pve/ha")).unwrap();
        fs::write(dir.path().join("pve/ha/resources.cfg"), "ct: 1000\n\tstate started\n\nvm: 101\n").unwrap();
        assert!(folder.is_under_ha(v(1000)) && !folder.is_under_ha(v(101)) && !folder.is_under_ha(v(100)));
    }

    #[test]
    fn a_host_that_is_none_of_proxmox_ves_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = ConfigDir::open(dir.path(), "pve1".parse().unwrap(), dir.path()).unwrap_err().to_string();
        assert!(error.contains("nodes/pve1/lxc") && error.contains("pve-cluster"), "{error}");
    }
}
