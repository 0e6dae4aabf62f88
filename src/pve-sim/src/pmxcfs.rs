//! The cluster's configuration folder, `<state>/etc/pve`, with pmxcfs' habits as far as plain files have them.
//!
//! Everything that the API knows of users, storages, CTs, HA and firewalls lies in files here and is read anew at each
//! call: other programs may write them, another process may share them, and a crash at any point leaves what a restart
//! reads. What plain files cannot do is done for the API's own writes: refusal without quorum, the bound of 1 MiB, one
//! VMID on one node. A program that writes into the folder by itself is stopped by the loss of quorum alone, and only with
//! `cfs_mount` (see `docs/pve-sim.md`).

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{ErrorKind, Read, Write},
    os::unix::fs::{OpenOptionsExt, symlink},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use rustix::fs::FlockOperation;
use serde_json::{Value, json};

use crate::{
    Result,
    answer::{Answered, Refusal},
    config::Config,
    drafts::Drafts,
    error::io,
    mounted::Mounted,
};

/// pmxcfs' bound on a file.
pub(crate) const FILE_MAX: u64 = 1024 * 1024;
/// How often a held lock is tried again.
const LOCK_POLL: Duration = Duration::from_millis(20);

/// The folder and the locks beside it.
#[derive(Debug)]
pub(crate) struct Pmxcfs {
    root: PathBuf,
    /// What is being written; a kill leaves it here, where nobody looks.
    drafts: Drafts,
    locks: PathBuf,
    ct_locks: PathBuf,
    quorate: AtomicBool,
    mounted: Option<Mounted>,
    members: Members,
    serial: AtomicU64,
}

/// Of whom `.members` tells, and where it is: each host's view has its own.
#[derive(Debug)]
struct Members {
    cluster: String,
    views: Vec<(String, PathBuf)>,
}

impl Members {
    fn write(&self, quorate: bool) -> std::io::Result<()> {
        let nodes: serde_json::Map<String, Value> = (1..)
            .zip(&self.views)
            .map(|(id, (name, _))| (name.clone(), json!({ "id": id, "online": 1 })))
            .collect();
        for (name, view) in &self.views {
            let text = json!({
                "nodename": name, "version": 1,
                "cluster": { "name": self.cluster, "version": 1, "nodes": nodes.len(), "quorate": u8::from(quorate) },
                "nodelist": nodes,
            });
            let (draft, path) = (view.join(".members.new"), view.join(".members"));
            fs::write(&draft, text.to_string())?;
            fs::rename(&draft, &path)?;
        }
        Ok(())
    }
}

/// A lock that is held until dropped.
#[derive(Debug)]
pub(crate) struct Held {
    _file: File,
}

impl Pmxcfs {
    /// Makes the folder's directories and links; what is there stays.
    pub(crate) fn open(config: &Config) -> Result<Self> {
        let state = &config.state_dir;
        let (etc, root) = (state.join("etc"), state.join("etc/pve"));
        fs::create_dir_all(&etc).map_err(io("create", &etc))?;
        let mounted =
            if config.cfs_mount { Some(Mounted::open(&etc).map_err(io("mount", &etc))?) } else { None };
        let locks = state.join("run/lock/cfs");
        let ct_locks = config.lock_dir.clone().unwrap_or_else(|| state.join("run/lock/lxc"));
        for dir in ["priv", "ha", "firewall", "nodes"].map(|d| root.join(d)).iter().chain([&locks, &ct_locks])
        {
            fs::create_dir_all(dir).map_err(io("create", dir))?;
        }
        let mut views = Vec::new();
        for host in &config.hosts {
            let dir = root.join("nodes").join(&host.name).join("lxc");
            fs::create_dir_all(&dir).map_err(io("create", &dir))?;
            // The folder as this host sees it: `lxc` and `local` are its own.
            let view = state.join("hosts").join(&host.name).join("etc/pve");
            fs::create_dir_all(&view).map_err(io("create", &view))?;
            link(&root.join("nodes"), &view.join("nodes"))?;
            link(&root.join("nodes").join(&host.name), &view.join("local"))?;
            link(&dir, &view.join("lxc"))?;
            for name in ["user.cfg", "storage.cfg", "datacenter.cfg", "ha", "firewall", "priv"] {
                link(&root.join(name), &view.join(name))?;
            }
            views.push((host.name.clone(), view));
        }
        let members = Members { cluster: config.cluster_name.clone(), views };
        members.write(true).map_err(io("write .members below", state))?;
        if let Some(first) = config.hosts.first() {
            link(&Path::new("nodes").join(&first.name), &root.join("local"))?;
            link(&Path::new("nodes").join(&first.name).join("lxc"), &root.join("lxc"))?;
        }
        // Within the mount: nothing can be moved from one to another.
        let drafts = etc.join(".drafts");
        let drafts = Drafts::open(&drafts).map_err(io("open", &drafts))?;
        let serial = AtomicU64::new(0);
        Ok(Self { root, drafts, locks, ct_locks, quorate: AtomicBool::new(true), mounted, members, serial })
    }

    /// The folder.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn is_quorate(&self) -> bool {
        self.quorate.load(Ordering::Relaxed)
    }

    pub(crate) fn set_quorate(&self, quorate: bool) -> std::io::Result<()> {
        self.quorate.store(quorate, Ordering::Relaxed);
        self.members.write(quorate)?;
        self.mounted.as_ref().map_or(Ok(()), |mounted| mounted.set_writable(quorate))
    }

    /// PVE::Cluster::check_cfs_quorum.
    pub(crate) fn check_quorum(&self) -> Answered<()> {
        if self.is_quorate() { Ok(()) } else { Err(Refusal::died("cluster not ready - no quorum?")) }
    }

    /// A file's text, `None` if there is none.
    pub(crate) fn read(&self, name: &str) -> Result<Option<String>> {
        read_text(&self.root.join(name))
    }

    /// Replaces a file: written elsewhere, synced, moved here.
    pub(crate) fn write(&self, name: &str, text: &str) -> Answered<()> {
        let path = self.root.join(name);
        if !self.is_quorate() {
            return Err(Refusal::died(format!(
                "unable to open file '/etc/pve/{name}.tmp.{}' - Permission denied",
                std::process::id()
            )));
        }
        if text.len() as u64 > FILE_MAX {
            return Err(Refusal::died(format!("unable to write '/etc/pve/{name}' - File too large")));
        }
        let n = self.serial.fetch_add(1, Ordering::Relaxed);
        let temporary = self.drafts.path(&n.to_string());
        let write = || -> std::io::Result<()> {
            let mut file =
                fs::OpenOptions::new().write(true).create_new(true).mode(0o640).open(&temporary)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|e| {
            let _ = fs::remove_file(&temporary);
            Refusal::died(format!("unable to write '/etc/pve/{name}' - {}", plain(&e)))
        })
    }

    /// Creates a file that must not be there.
    pub(crate) fn create(&self, name: &str, text: &str) -> Answered<()> {
        self.check_quorum()?;
        let path = self.root.join(name);
        let made = fs::OpenOptions::new().write(true).create_new(true).mode(0o640).open(&path);
        made.and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
            .map_err(|e| Refusal::died(format!("unable to create '/etc/pve/{name}' - {}", plain(&e))))
    }

    /// Removes a file; it may be gone already.
    pub(crate) fn remove(&self, name: &str) -> Answered<()> {
        self.check_quorum()?;
        match fs::remove_file(self.root.join(name)) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                Err(Refusal::died(format!("unable to delete '/etc/pve/{name}' - {}", plain(&e))))
            }
            _ => Ok(()),
        }
    }

    /// Moves a file to another name, as a migration does with a config.
    pub(crate) fn rename(&self, from: &str, to: &str) -> Answered<()> {
        self.check_quorum()?;
        fs::rename(self.root.join(from), self.root.join(to)).map_err(|e| {
            Refusal::died(format!("Failed to move config to node - rename failed: {}", plain(&e)))
        })
    }

    /// Which VMID lies on which node: pmxcfs' `.vmlist`. A VMID that plain files allowed twice is where its file is older.
    pub(crate) fn vmlist(&self) -> Result<BTreeMap<u32, String>> {
        let mut found: BTreeMap<u32, (std::time::SystemTime, String)> = BTreeMap::new();
        let nodes = self.root.join("nodes");
        for node in fs::read_dir(&nodes).map_err(io("read", &nodes))?.flatten() {
            let name = node.file_name().to_string_lossy().into_owned();
            for kind in ["lxc", "qemu-server"] {
                for file in fs::read_dir(node.path().join(kind)).into_iter().flatten().flatten() {
                    let Some(vmid) = vmid_of(&file.file_name().to_string_lossy()) else { continue };
                    let made = file
                        .metadata()
                        .and_then(|m| m.created().or_else(|_| m.modified()))
                        .unwrap_or(std::time::UNIX_EPOCH);
                    match found.get(&vmid) {
                        Some((earlier, other)) if *earlier <= made => {
                            tracing::warn!(vmid, first = %other, second = %name, "the VMID is on two nodes; pmxcfs would have refused the second");
                        }
                        _ => {
                            found.insert(vmid, (made, name.clone()));
                        }
                    }
                }
            }
        }
        Ok(found.into_iter().map(|(vmid, (_, node))| (vmid, node)).collect())
    }

    /// The flock that guards a CT's config, waited for at most `limit`.
    pub(crate) async fn lock_ct(&self, vmid: u32, limit: Duration) -> Answered<Held> {
        let name = format!("pve-config-{vmid}.lock");
        let real = format!("/run/lock/lxc/{name}");
        lock(&self.ct_locks.join(&name), limit)
            .await?
            .ok_or_else(|| Refusal::died(format!("can't lock file '{real}' - got timeout")))
    }

    /// The lock that lets a node make one backup at a time; none if it is not got in time.
    pub(crate) async fn lock_backups(&self, node: &str, limit: Duration) -> Result<Option<Held>> {
        lock(&self.locks.join(format!("vzdump-{node}")), limit).await
    }

    /// The cluster-wide lock of a configuration file such as `user.cfg`.
    pub(crate) async fn lock_cfs(&self, file: &str, limit: Duration) -> Answered<Held> {
        self.check_quorum()?;
        let name = format!("file-{}", file.replace(['.', '/'], "_"));
        lock(&self.locks.join(&name), limit)
            .await?
            .ok_or_else(|| Refusal::died(format!("cfs-lock '{name}' error: got lock request timeout")))
    }
}

async fn lock(path: &Path, limit: Duration) -> Result<Option<Held>> {
    let file =
        fs::OpenOptions::new().append(true).create(true).mode(0o644).open(path).map_err(io("open", path))?;
    let since = Instant::now();
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(Held { _file: file })),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
            Err(e) => return Err(io("lock", path)(e.into())),
        }
        if since.elapsed() >= limit {
            return Ok(None);
        }
        tokio::time::sleep(LOCK_POLL).await;
    }
}

fn link(target: &Path, at: &Path) -> Result<()> {
    match symlink(target, at) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(io("link", at)(e)),
        _ => Ok(()),
    }
}

/// The text of a file of at most 1 MiB, `None` if there is none.
pub(crate) fn read_text(path: &Path) -> Result<Option<String>> {
    let mut bytes = Vec::new();
    match File::open(path).and_then(|f| f.take(FILE_MAX).read_to_end(&mut bytes)) {
        Ok(_) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io("read", path)(e)),
    }
}

/// What errno is called in Perl's `$!`.
fn plain(e: &std::io::Error) -> String {
    let text = e.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_owned()
}

/// The VMID of a config file's name.
pub(crate) fn vmid_of(name: &str) -> Option<u32> {
    let digits = name.strip_suffix(".conf")?;
    let vmid: u32 = digits.parse().ok()?;
    (vmid >= 100 && !digits.starts_with('0')).then_some(vmid)
}
