//! The back end without LXC: which CT runs is a file, a volume is a file with its size, a backup holds the config alone.

use std::{
    collections::hash_map::DefaultHasher,
    fs,
    hash::{Hash, Hasher},
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::{Backend, Backup, Ct, Interface, Mount, Room, RunState, Stop, Usage, VolumeInfo};
use crate::{
    Error, Result,
    config::Storage,
    drafts::Drafts,
    error::io,
    guest::{backup, parse_pairs},
    pmxcfs::read_text,
    sim::now,
    tasks::TaskLog,
};

/// States and volumes below the state directory.
#[derive(Debug)]
pub(crate) struct Records {
    run: PathBuf,
    /// What is being written; a kill leaves it here, where nobody looks.
    drafts: Drafts,
    volumes: PathBuf,
    dumps: PathBuf,
    next_pid: AtomicU32,
}

#[derive(Debug, Serialize, Deserialize)]
struct Run {
    pid: u32,
    since: i64,
    frozen: bool,
}

impl Records {
    pub(crate) fn open(state: &Path) -> Result<Self> {
        let (run, volumes, dumps) = (state.join("run/ct"), state.join("volumes"), state.join("dumps"));
        for dir in [&run, &volumes, &dumps] {
            fs::create_dir_all(dir).map_err(io("create", dir))?;
        }
        let drafts = state.join("run/drafts/ct");
        let drafts = Drafts::open(&drafts).map_err(io("open", &drafts))?;
        Ok(Self { run, drafts, volumes, dumps, next_pid: AtomicU32::new(200_000) })
    }

    fn run_file(&self, node: &str, vmid: u32) -> PathBuf {
        self.run.join(format!("{node}-{vmid}.json"))
    }

    fn read(&self, node: &str, vmid: u32) -> Result<Option<Run>> {
        let text = read_text(&self.run_file(node, vmid))?;
        // A file that a crash left without its content is of a CT that did not come up.
        Ok(text.and_then(|t| serde_json::from_str(&t).ok()))
    }

    fn write(&self, node: &str, vmid: u32, run: &Run) -> Result<()> {
        let path = self.run_file(node, vmid);
        let temporary = self.drafts.path(&format!("{node}-{vmid}"));
        let text = serde_json::to_vec(run).unwrap_or_default();
        fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, &path)).map_err(io("write", &path))
    }

    fn dir(&self, node: &str, storage: &Storage) -> Result<PathBuf> {
        let owner = if storage.shared { "shared" } else { node };
        let dir = self.volumes.join(owner).join(&storage.name);
        fs::create_dir_all(&dir).map_err(io("create", &dir))?;
        Ok(dir)
    }
}

/// What LXC runs on the host before it starts the CT, of the files that its configuration includes.
fn pre_start(ct: Ct<'_>) -> Vec<String> {
    let included = ct.conf.main.raw.iter().filter(|(key, _)| key == "lxc.include");
    let texts = included.filter_map(|(_, path)| read_text(Path::new(path)).ok().flatten());
    let hooks = |text: String| -> Vec<String> {
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        pairs
            .filter(|(key, _)| key.trim() == "lxc.hook.pre-start")
            .map(|(_, v)| v.trim().to_owned())
            .collect()
    };
    texts.flat_map(hooks).collect()
}

#[async_trait]
impl Backend for Records {
    async fn state(&self, node: &str, vmid: u32) -> Result<RunState> {
        Ok(match self.read(node, vmid)? {
            Some(Run { pid, since, frozen }) => RunState::Running { pid, since, frozen },
            None => RunState::Stopped,
        })
    }

    async fn start(&self, ct: Ct<'_>, _: &[Mount], log: &TaskLog) -> Result<()> {
        for (key, value) in &ct.conf.main.raw {
            if key == "lxc.include" && !Path::new(value).exists() {
                log.line(&format!("lxc-start: {}: parse.c: lxc_file_for_each_line_mmap: No such file or directory - Failed to open file \"{value}\"", ct.vmid));
                return Err(Error::Backend(
                    "startup for container '".to_owned() + &ct.vmid.to_string() + "' failed",
                ));
            }
        }
        for hook in pre_start(ct) {
            let run = Command::new("sh")
                .args(["-c", &format!("{hook} {} lxc pre-start", ct.vmid)])
                .env("LXC_NAME", ct.vmid.to_string())
                .output();
            let ended = run.await.map_err(io("run", Path::new("sh")))?;
            if !ended.status.success() {
                log.line(String::from_utf8_lossy(&ended.stderr).trim());
                log.line(&format!("lxc-start: {0}: start.c: lxc_init: Failed to run lxc.hook.pre-start for container \"{0}\"", ct.vmid));
                return Err(Error::Backend(format!("startup for container '{}' failed", ct.vmid)));
            }
        }
        let pid = self.next_pid.fetch_add(1, Ordering::Relaxed);
        self.write(ct.node, ct.vmid, &Run { pid, since: now(), frozen: false })
    }

    async fn stop(&self, node: &str, vmid: u32, _how: Stop, _log: &TaskLog) -> Result<()> {
        let path = self.run_file(node, vmid);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(io("remove", &path)(e)),
            _ => Ok(()),
        }
    }

    async fn freeze(&self, node: &str, vmid: u32, frozen: bool) -> Result<()> {
        match self.read(node, vmid)? {
            Some(run) => self.write(node, vmid, &Run { frozen, ..run }),
            None => Ok(()),
        }
    }

    async fn reconfigure(&self, _ct: Ct<'_>) -> Result<()> {
        Ok(())
    }

    async fn interfaces(&self, ct: Ct<'_>) -> Result<Vec<Interface>> {
        let mut all = vec![Interface {
            name: "lo".into(),
            mac: "00:00:00:00:00:00".into(),
            addresses: vec![(IpAddr::V4(Ipv4Addr::LOCALHOST), 8)],
        }];
        for n in 0..32 {
            let Some(net) = ct.conf.get(&format!("net{n}")) else { continue };
            let parts = parse_pairs(net, "model");
            let part = |key: &str| parts.get(key).map(String::as_str);
            let mut addresses: Vec<(IpAddr, u8)> = ["ip", "ip6"]
                .iter()
                .filter_map(|key| part(key)?.split_once('/'))
                .filter_map(|(address, bits)| Some((address.parse().ok()?, bits.parse().ok()?)))
                .collect();
            if part("ip") == Some("dhcp") {
                let [_, b, c, d] = ct.vmid.to_be_bytes();
                addresses.push((IpAddr::V4(Ipv4Addr::new(10, b, c, d)), 8));
            }
            all.push(Interface {
                name: part("name").unwrap_or("eth0").to_owned(),
                mac: part("hwaddr").unwrap_or("BC:24:11:00:00:00").to_lowercase(),
                addresses,
            });
        }
        Ok(all)
    }

    async fn usage(&self, ct: Ct<'_>) -> Result<Usage> {
        let mut hasher = DefaultHasher::new();
        ct.vmid.hash(&mut hasher);
        let share = (hasher.finish() % 100) as f64 / 1000.0;
        let memory = (ct.conf.memory() as f64 * (0.1 + share)) as u64;
        Ok(Usage { cpu: share, memory, disk: 64 << 20, ..Usage::default() })
    }

    async fn forget(&self, node: &str, vmid: u32) -> Result<()> {
        let path = self.run_file(node, vmid);
        let _ = fs::remove_file(path);
        Ok(())
    }

    async fn volumes(&self, node: &str, storage: &Storage) -> Result<Vec<VolumeInfo>> {
        let mut all: Vec<VolumeInfo> = storage
            .templates
            .iter()
            .map(|name| VolumeInfo {
                name: format!("vztmpl/{name}"),
                content: "vztmpl",
                format: if name.ends_with(".tar.zst") { "tzst" } else { "tgz" },
                size: 128 << 20,
                used: 128 << 20,
                vmid: None,
            })
            .collect();
        let dir = self.dir(node, storage)?;
        for entry in fs::read_dir(&dir).map_err(io("read", &dir))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let size = read_text(&entry.path())?.and_then(|t| t.trim().parse().ok()).unwrap_or(0);
            let vmid = name.split('-').nth(1).and_then(|v| v.parse().ok());
            all.push(VolumeInfo { name, content: "rootdir", format: "subvol", size, used: 64 << 20, vmid });
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    async fn create_volume(&self, node: &str, storage: &Storage, vmid: u32, size: u64) -> Result<String> {
        let dir = self.dir(node, storage)?;
        for n in 0..1000 {
            let name = format!("subvol-{vmid}-disk-{n}");
            let path = dir.join(&name);
            match fs::OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(_) => {
                    fs::write(&path, size.to_string()).map_err(io("write", &path))?;
                    return Ok(name);
                }
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(io("create", &path)(e)),
            }
        }
        Err(Error::Backend(format!(
            "unable to allocate a volume name for VM {vmid} in storage '{}'",
            storage.name
        )))
    }

    async fn copy_volume(
        &self,
        node: &str,
        storage: &Storage,
        _: &str,
        vmid: u32,
        size: u64,
    ) -> Result<String> {
        self.create_volume(node, storage, vmid, size).await
    }

    async fn unpack(
        &self,
        _: &str,
        _: &Storage,
        _: &str,
        archive: &Path,
        _: bool,
        log: &TaskLog,
    ) -> Result<()> {
        log.line(&format!("extracting archive '{}'", archive.display()));
        Ok(())
    }

    fn dump_dir(&self, node: &str, storage: &Storage) -> Result<PathBuf> {
        let owner = if storage.shared { "shared" } else { node };
        Ok(self.dumps.join(owner).join(&storage.name))
    }

    async fn back_up(&self, backup: Backup<'_>) -> Result<()> {
        let names = [backup::CONF, backup::FIREWALL];
        let written = backup::write(backup.file, backup.compression, backup.meta, &names);
        written.map_err(io("write", backup.file))
    }

    async fn delete_snapshot(&self, _: &str, _: &Storage, _: &str, _: &str) -> Result<()> {
        Ok(())
    }

    async fn snapshot_volume(&self, _: &str, _: &Storage, _: &str, _: &str) -> Result<()> {
        Ok(())
    }

    async fn destroy_volume(&self, node: &str, storage: &Storage, volume: &str) -> Result<()> {
        if volume.contains(['/', '\0']) || volume.starts_with('.') {
            return Err(Error::Backend(format!("unable to parse zfs volume name '{volume}'")));
        }
        let path = self.dir(node, storage)?.join(volume);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(io("remove", &path)(e)),
            _ => Ok(()),
        }
    }

    async fn room(&self, node: &str, storage: &Storage) -> Result<Room> {
        let used = self.volumes(node, storage).await?.iter().map(|v| v.used).sum();
        Ok(Room { total: storage.total_mib << 20, used })
    }
}
