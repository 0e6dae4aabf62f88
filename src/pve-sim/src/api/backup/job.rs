//! A backup job: its guests one after another, each as `PVE::VZDump::exec_backup_task` and `PVE::VZDump::LXC` go about it. One
//! that fails leaves the others their turn and makes the job end in `job errors`.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{
    super::{ha, lxc},
    Mode, Options, Target,
    cleanup::Cleanup,
};
use crate::{
    access::{Caller, Rights},
    answer::Refusal,
    backend::{BackedUp, Backup, Stop},
    faults::{BackupStep, StorageFault},
    guest::{
        CtConf, VolumeKind,
        backup::{CONF, FIREWALL, backed_up, basename, conf_for_backup, format_size, is_backed_up},
        mount_points,
    },
    sim::{Sim, now},
    tasks::TaskLog,
};

/// A job's log, in which each line has its level.
#[derive(Debug)]
pub(super) struct JobLog {
    log: TaskLog,
    quiet: bool,
}

impl JobLog {
    pub(super) fn info(&self, text: &str) {
        self.put(&format!("INFO: {text}"));
    }

    fn error(&self, text: &str) {
        self.put(&format!("ERROR: {text}"));
    }

    pub(super) fn warn(&self, text: &str) {
        self.log.warn(text);
    }

    fn put(&self, line: &str) {
        if !self.quiet {
            self.log.line(line);
        }
    }

    /// Says how long a CT was away.
    pub(super) fn online(&self, since: i64) {
        let seconds = now() - since;
        let seconds = if seconds < 1 { "<1".to_owned() } else { seconds.to_string() };
        self.info(&format!("guest is online again after {seconds} seconds"));
    }

    pub(super) fn task(&self) -> &TaskLog {
        &self.log
    }
}

/// One call's job.
#[derive(Debug)]
pub(super) struct Job {
    sim: Arc<Sim>,
    caller: Caller,
    options: Options,
    log: JobLog,
    cleanup: Cleanup,
}

/// The files of one guest's backup.
struct Files {
    /// Where the archive is written, and its name when it is whole.
    draft: PathBuf,
    archive: PathBuf,
    /// What goes into it beside the CT's files.
    meta: PathBuf,
}

fn refused(refusal: Refusal) -> String {
    refusal.message
}

fn died(error: &impl std::fmt::Display) -> String {
    error.to_string()
}

fn clock() -> String {
    jiff::Zoned::now().strftime("%Y-%m-%d %H:%M:%S").to_string()
}

impl Job {
    pub(super) fn new(sim: Arc<Sim>, caller: Caller, options: Options, log: TaskLog) -> Self {
        let log = JobLog { log, quiet: options.quiet };
        Self { sim, caller, options, log, cleanup: Cleanup::default() }
    }

    /// All of it.
    pub(super) async fn run(&self) -> Result<(), String> {
        let (sim, options, log) = (&self.sim, &self.options, &self.log);
        let dump_dir = self.dump_dir()?;
        let _alone = self.alone().await?;
        log.info(&format!("starting new backup job: {}", options.command));
        if !options.elsewhere.is_empty() {
            let list: Vec<String> = options.elsewhere.iter().map(ToString::to_string).collect();
            log.info(&format!("skip external VMs: {}", list.join(", ")));
        }
        // Who is there is looked at once, before the first.
        let there = sim.vmlist().map_err(|e| died(&e))?;
        let mut guests = Vec::new();
        for vmid in &options.vmids {
            if there.contains_key(vmid) && !self.may_back_up(*vmid)? {
                continue;
            }
            guests.push((*vmid, there.contains_key(vmid)));
        }
        let mut errors = 0;
        for (vmid, known) in guests {
            let since = now();
            self.cleanup.begin(vmid);
            let done = if known {
                self.guest(vmid, &dump_dir).await
            } else {
                Err(format!("unable to find VM '{vmid}'"))
            };
            self.cleanup.tidy(sim, &options.node, log).await;
            match done {
                Ok(()) => {
                    let (s, m) = ((now() - since) % 60, (now() - since) / 60);
                    log.info(&format!("Finished Backup of VM {vmid} ({:02}:{:02}:{s:02})", m / 60, m % 60));
                    log.info(&format!("Backup finished at {}", clock()));
                }
                Err(why) => {
                    errors += 1;
                    log.error(&format!("Backup of VM {vmid} failed - {why}"));
                    log.info(&format!("Failed at {}", clock()));
                }
            }
        }
        log.info(if errors > 0 {
            "Backup job finished with errors"
        } else {
            "Backup job finished successfully"
        });
        if errors > 0 { Err("job errors".into()) } else { Ok(()) }
    }

    /// Ends a job that was interrupted.
    pub(super) async fn interrupted(&self) -> String {
        self.cleanup.tidy(&self.sim, &self.options.node, &self.log).await;
        self.log.error("Backup job failed - interrupted by signal");
        "interrupted by signal".into()
    }

    /// Where archives go; PVE::VZDump::new and storage_info.
    fn dump_dir(&self) -> Result<PathBuf, String> {
        let node = &self.options.node;
        let storage = match &self.options.target {
            Target::Dir(dir) if Path::new(dir).is_dir() => return Ok(dir.into()),
            Target::Dir(dir) => return Err(format!("dumpdir '{dir}' does not exist")),
            Target::Storage(storage) => storage,
        };
        let could_not = |why: String| format!("could not get storage information for '{storage}': {why}");
        let known = self.sim.storage(node, storage).map_err(refused);
        let known = known.map_err(|why| format!("could not activate storage '{storage}': {why}"))?;
        if !known.content.iter().any(|c| c == "backup") {
            return Err(could_not(format!("can't use storage '{storage}' for backups - wrong content type")));
        }
        let dir = self.sim.backend.dump_dir(node, &known).map_err(|e| could_not(died(&e)))?;
        fs::create_dir_all(&dir).map_err(|e| could_not(format!("mkdir {}: {e}", dir.display())))?;
        Ok(dir)
    }

    /// A host makes one backup at a time.
    async fn alone(&self) -> Result<crate::pmxcfs::Held, String> {
        let lock = async |wait: Duration| {
            self.sim.cfs.lock_backups(&self.options.node, wait).await.map_err(|e| died(&e))
        };
        if let Some(held) = lock(Duration::ZERO).await? {
            return Ok(held);
        }
        let failed = |why: &str| format!("can't acquire lock '/var/run/vzdump.lock' {why}");
        if self.options.lockwait_minutes == 0 {
            return Err(failed("(wait = 0)"));
        }
        self.log.info("trying to get global lock - waiting...");
        let held = lock(Duration::from_secs(60 * self.options.lockwait_minutes)).await?;
        self.log.info("got global lock");
        held.ok_or_else(|| failed("- got timeout"))
    }

    fn may_back_up(&self, vmid: u32) -> Result<bool, String> {
        if self.caller.is_root() {
            return Ok(true);
        }
        let users = self.sim.users().map_err(|e| died(&e))?;
        match Rights::of(&users, &self.caller).check(&format!("/vms/{vmid}"), &["VM.Backup"]) {
            Ok(()) => Ok(true),
            Err(_) if self.options.all => Ok(false),
            Err(refusal) => Err(format!("403 {}", refusal.message)),
        }
    }

    /// One guest's backup, all but its cleanup.
    async fn guest(&self, vmid: u32, dump_dir: &Path) -> Result<(), String> {
        let (sim, node, log) = (&self.sim, self.options.node.as_str(), &self.log);
        let managed = ha::state_of(sim, vmid).map_err(refused)?;
        if self.options.mode == Mode::Stop && managed.as_deref() == Some("started") {
            return Err("Cannot execute a backup with stop mode on a HA managed and enabled Service. Use snapshot mode or disable the Service.".into());
        }
        let files = self.files(vmid, dump_dir)?;
        log.info(&format!("Starting Backup of VM {vmid} (lxc)"));
        log.info(&format!("Backup started at {}", clock()));
        let running = sim.backend.state(node, vmid).await.map_err(|e| died(&e))?.is_running();
        log.info(&format!("status = {}", if running { "running" } else { "stopped" }));
        lxc::set_lock(sim, node, vmid, "backup").await?;
        self.cleanup.locked();
        let mode = match self.options.mode {
            _ if !running => Mode::Stop,
            Mode::Snapshot if !self.can_snapshot(vmid)? => {
                log.info("mode failure - some volumes do not support snapshots");
                log.info("trying 'suspend' mode instead");
                Mode::Suspend
            }
            asked => asked,
        };
        match mode {
            Mode::Snapshot => {
                let volumes = self.snapshot(vmid).await?;
                self.announce(&files);
                self.write(vmid, &volumes, Some(lxc::BACKUP), &files).await?;
            }
            Mode::Suspend => {
                self.suspend(vmid, &files).await?;
                self.announce(&files);
            }
            Mode::Stop => {
                let volumes = self.stop(vmid, running).await?;
                self.announce(&files);
                self.write(vmid, &volumes, None, &files).await?;
            }
        }
        self.finish(&files).await
    }

    fn files(&self, vmid: u32, dump_dir: &Path) -> Result<Files, String> {
        let name = basename(vmid, &jiff::Zoned::now());
        let files = Files {
            draft: dump_dir.join(format!("{name}.dat")),
            archive: dump_dir.join(format!("{name}.{}", self.options.compression.extension())),
            meta: dump_dir.join(format!("{name}.tmp")),
        };
        let made = fs::create_dir_all(files.meta.join("etc/vzdump"));
        made.map_err(|_| format!("unable to create temporary directory '{}'", files.meta.display()))?;
        self.cleanup.files(files.draft.clone(), files.meta.clone());
        Ok(files)
    }

    /// Whether a snapshot can be made of all that is backed up.
    fn can_snapshot(&self, vmid: u32) -> Result<bool, String> {
        let conf = self.sim.load_conf(&self.options.node, vmid).map_err(refused)?;
        Ok(self.volumes(&conf)?.iter().all(|v| v.storage.pool.is_some()))
    }

    fn volumes(&self, conf: &CtConf) -> Result<Vec<BackedUp>, String> {
        let mut all = Vec::new();
        for point in backed_up(conf) {
            let VolumeKind::Storage { storage, volume } = &point.kind else { continue };
            let storage = self.sim.storage(&self.options.node, storage).map_err(refused)?;
            let target = point.options.get("mp").cloned().unwrap_or_else(|| "/".into());
            all.push(BackedUp { storage, volume: volume.clone(), target });
        }
        Ok(all)
    }

    /// Says what is backed up and what is not.
    fn prepare(&self, vmid: u32) -> Result<Vec<BackedUp>, String> {
        let conf = self.sim.load_conf(&self.options.node, vmid).map_err(refused)?;
        if let Some(name) = conf.get("hostname") {
            self.log.info(&format!("CT Name: {name}"));
        }
        for point in mount_points(&conf) {
            let (included, reason) = is_backed_up(&point);
            let (key, kind) = (&point.key, point.kind_name());
            let place = point.options.get("mp").map_or("/", String::as_str);
            self.log.info(&if included {
                format!("including mount point {key} ('{place}') in backup")
            } else {
                format!("excluding {kind} mount point {key} ('{place}') from backup ({reason})")
            });
        }
        self.volumes(&conf)
    }

    fn say_mode(&self, mode: Mode) {
        self.log.info(&format!("backup mode: {}", mode.name()));
        if self.options.bwlimit > 0 {
            self.log.info(&format!("bandwidth limit: {} KiB/s", self.options.bwlimit));
        }
        self.log.info(&format!("ionice priority: {}", self.options.ionice));
    }

    /// Makes the snapshot that is backed up; the CT is frozen for a moment and goes on.
    async fn snapshot(&self, vmid: u32) -> Result<Vec<BackedUp>, String> {
        let (sim, node) = (&self.sim, self.options.node.as_str());
        let volumes = self.prepare(vmid)?;
        let conf = sim.load_conf(node, vmid).map_err(refused)?;
        if conf.snapshots.contains_key(lxc::BACKUP) {
            self.log.info("found old vzdump snapshot (force removal)");
            lxc::remove_lock(sim, node, vmid, &["backup"]).await?;
            lxc::remove_snapshot(sim, node, vmid, lxc::BACKUP).await?;
            lxc::set_lock(sim, node, vmid, "backup").await?;
        }
        self.say_mode(Mode::Snapshot);
        self.log.info("create storage snapshot 'vzdump'");
        self.cleanup.snapshot();
        self.cleanup.frozen(true);
        // The CT's lock is held all the while: nobody finds it without a `lock:`.
        let taken = async {
            let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await.map_err(refused)?;
            let mut conf = sim.load_conf(node, vmid).map_err(refused)?;
            conf.main.values.remove("lock");
            sim.write_conf(node, vmid, &conf).map_err(refused)?;
            lxc::take_snapshot(sim, node, vmid, lxc::BACKUP, "vzdump backup snapshot").await?;
            let mut conf = sim.load_conf(node, vmid).map_err(refused)?;
            conf.main.values.insert("lock".into(), "backup".into());
            sim.write_conf(node, vmid, &conf).map_err(refused)
        };
        let taken = taken.await;
        self.cleanup.frozen(false);
        taken.map(|()| volumes)
    }

    /// Copies the CT while it is frozen. The real one has copied it before and copies now what has changed.
    async fn suspend(&self, vmid: u32, files: &Files) -> Result<(), String> {
        let (sim, node, log) = (&self.sim, self.options.node.as_str(), &self.log);
        self.say_mode(Mode::Suspend);
        let volumes = self.prepare(vmid)?;
        log.info("suspending guest");
        let since = now();
        sim.backend.freeze(node, vmid, true).await.map_err(|e| died(&e))?;
        self.cleanup.frozen(true);
        self.write(vmid, &volumes, None, files).await?;
        sim.faults.passed(BackupStep::Frozen).await;
        log.info("resuming guest");
        self.cleanup.frozen(false);
        sim.backend.freeze(node, vmid, false).await.map_err(|e| died(&e))?;
        log.online(since);
        Ok(())
    }

    /// Ends the CT, which is started again when all is done.
    async fn stop(&self, vmid: u32, running: bool) -> Result<Vec<BackedUp>, String> {
        self.say_mode(Mode::Stop);
        let volumes = self.prepare(vmid)?;
        if running {
            self.log.info("stopping virtual guest");
            let how = Stop::Shutdown { seconds: 60 * self.options.stopwait_minutes, then_kill: false };
            let stopped = self.sim.backend.stop(&self.options.node, vmid, how, self.log.task());
            stopped.await.map_err(|e| died(&e))?;
            self.cleanup.stopped();
        }
        Ok(volumes)
    }

    fn announce(&self, files: &Files) {
        self.log.info(&format!("creating vzdump archive '{}'", files.archive.display()));
    }

    /// Writes the archive where it is not yet one.
    async fn write(
        &self,
        vmid: u32,
        volumes: &[BackedUp],
        snapshot: Option<&str>,
        files: &Files,
    ) -> Result<(), String> {
        let sim = &self.sim;
        let conf = sim.load_conf(&self.options.node, vmid).map_err(refused)?;
        let rules = sim.cfs.read(&format!("firewall/{vmid}.fw")).map_err(|e| died(&e))?;
        for (name, text) in [(CONF, conf_for_backup(&conf).format()), (FIREWALL, rules.unwrap_or_default())] {
            let path = files.meta.join(name);
            fs::write(&path, text).map_err(|e| format!("unable to write '{}' - {e}", path.display()))?;
        }
        let written = sim.backend.back_up(Backup {
            volumes,
            snapshot,
            meta: &files.meta,
            excluded: &self.options.excluded,
            unprivileged: conf.flag("unprivileged"),
            compression: self.options.compression,
            file: &files.draft,
        });
        written.await.map_err(|e| died(&e))?;
        match &self.options.target {
            Target::Storage(storage)
                if sim.faults.storage(&self.options.node, storage) == Some(StorageFault::Full) =>
            {
                Err(format!("write to '{}' failed - No space left on device", files.draft.display()))
            }
            _ => Ok(()),
        }
    }

    /// Gives the archive its name.
    async fn finish(&self, files: &Files) -> Result<(), String> {
        self.sim.faults.passed(BackupStep::Archive).await;
        let size = fs::metadata(&files.draft).map_or(0, |m| m.len());
        fs::rename(&files.draft, &files.archive).map_err(|_| {
            format!("unable to rename '{}' to '{}'", files.draft.display(), files.archive.display())
        })?;
        self.cleanup.named();
        self.log.info(&format!("archive file size: {}", format_size(size)));
        Ok(())
    }
}
