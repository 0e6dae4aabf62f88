//! What a backup has changed of a CT, and how that is put right: at its end, and when it is interrupted.

use std::{fs, path::PathBuf};

use parking_lot::{Mutex, MutexGuard};

use super::{super::lxc, job::JobLog};
use crate::{
    backend::RunState,
    faults::BackupStep,
    sim::{Sim, now},
};

/// What is to be undone.
#[derive(Debug, Default)]
struct Undo {
    vmid: u32,
    /// Its config has our lock, or that of our snapshot that is just being made.
    locked: bool,
    snapshot: bool,
    frozen: bool,
    stopped: bool,
    /// When it was stopped or frozen.
    since: i64,
    draft: Option<PathBuf>,
    directory: Option<PathBuf>,
}

/// The same, shared by the backup and by who ends it.
#[derive(Debug, Default)]
pub(super) struct Cleanup(Mutex<Undo>);

impl Cleanup {
    fn undo(&self) -> MutexGuard<'_, Undo> {
        self.0.lock()
    }

    pub(super) fn begin(&self, vmid: u32) {
        *self.undo() = Undo { vmid, ..Undo::default() };
    }

    pub(super) fn files(&self, draft: PathBuf, directory: PathBuf) {
        let mut undo = self.undo();
        (undo.draft, undo.directory) = (Some(draft), Some(directory));
    }

    pub(super) fn locked(&self) {
        self.undo().locked = true;
    }

    pub(super) fn snapshot(&self) {
        self.undo().snapshot = true;
    }

    pub(super) fn frozen(&self, frozen: bool) {
        let mut undo = self.undo();
        (undo.frozen, undo.since) = (frozen, now());
    }

    pub(super) fn stopped(&self) {
        let mut undo = self.undo();
        (undo.stopped, undo.since) = (true, now());
    }

    /// The archive has its name.
    pub(super) fn named(&self) {
        self.undo().draft = None;
    }

    /// Puts all right, in the order of `PVE::VZDump::exec_backup_task`: the lock goes first, and a CT that was stopped is
    /// started last, with nothing held.
    pub(super) async fn tidy(&self, sim: &Sim, node: &str, log: &JobLog) {
        let undo = std::mem::take(&mut *self.undo());
        let vmid = undo.vmid;
        let warn = |done: Result<(), String>| {
            if let Err(why) = done {
                log.warn(&why);
            }
        };
        if undo.locked {
            warn(lxc::remove_lock(sim, node, vmid, &["backup", "snapshot"]).await);
            sim.faults.passed(BackupStep::Unlocked).await;
        }
        let left = || sim.load_conf(node, vmid).is_ok_and(|c| c.snapshots.contains_key(lxc::BACKUP));
        if undo.snapshot && left() {
            log.info("cleanup temporary 'vzdump' snapshot");
            let removed = lxc::remove_snapshot(sim, node, vmid, lxc::BACKUP).await;
            warn(removed.map_err(|why| format!("snapshot 'vzdump' was not (fully) removed - {why}")));
        }
        if undo.frozen {
            log.info("resume vm");
            warn(sim.backend.freeze(node, vmid, false).await.map_err(|e| e.to_string()));
            log.online(undo.since);
        }
        let runs = async || sim.backend.state(node, vmid).await.is_ok_and(RunState::is_running);
        if undo.stopped && !runs().await {
            log.info("restarting vm");
            match lxc::start_unlocked(sim, node, vmid, log.task()).await {
                Ok(()) => log.online(undo.since),
                Err(why) => log.warn(&why),
            }
        }
        if let Some(draft) = undo.draft {
            let _ = fs::remove_file(draft);
        }
        if let Some(directory) = undo.directory {
            let _ = fs::remove_dir_all(directory);
        }
    }
}
