//! Tasks: UPIDs, their logs on disk, their ends.
//!
//! A task is a log file named by its UPID. Its last line says how it ended; a file without such a line whose task is not
//! known to this process belongs to a worker that died, and reads `unexpected status`, as after a crash of the real one.
//! Nothing else is stored, so that a kill at any point leaves what a restart understands.

use std::{
    collections::HashMap,
    fs::{self, File},
    future::Future,
    io::{BufRead, BufReader, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use parking_lot::{Mutex, MutexGuard};
use serde_json::{Value, json};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    Result,
    access::Caller,
    error::io,
    faults::{Faults, TaskFault},
};

/// How many ended tasks a host keeps.
const KEPT: usize = 5000;
/// The longest line of a log.
const LINE_MAX: usize = 8192;

/// All tasks.
#[derive(Debug)]
pub(crate) struct Tasks {
    dir: PathBuf,
    running: Arc<Mutex<HashMap<String, CancellationToken>>>,
    next_pid: AtomicU32,
    started: Instant,
    tracker: TaskTracker,
    faults: Arc<Faults>,
    least: std::time::Duration,
}

/// The parts of a UPID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Upid {
    pub(crate) text: String,
    pub(crate) node: String,
    pub(crate) pid: u32,
    pub(crate) pstart: u32,
    pub(crate) starttime: i64,
    pub(crate) kind: String,
    pub(crate) id: String,
    pub(crate) user: Caller,
}

impl Upid {
    /// PVE::Tools::upid_decode.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let fields: Vec<&str> = text.split(':').collect();
        let [start, node, pid, pstart, starttime, kind, id, user, end] = fields.as_slice() else {
            return None;
        };
        let hex = |t: &str| {
            (t.len() >= 8 && t.chars().all(|c| c.is_ascii_hexdigit()))
                .then(|| u32::from_str_radix(t, 16).ok())
                .flatten()
        };
        let plain = |t: &str| !t.contains(['/', '\0', ' ']) && !t.is_empty() && !t.starts_with('.');
        (*start == "UPID"
            && end.is_empty()
            && plain(node)
            && plain(kind)
            && !id.contains('/')
            && plain(user))
        .then_some(())?;
        Some(Self {
            text: text.to_owned(),
            node: (*node).to_owned(),
            pid: hex(pid)?,
            pstart: hex(pstart)?,
            starttime: i64::from(hex(starttime)?),
            kind: (*kind).to_owned(),
            id: (*id).to_owned(),
            user: Caller::parse(user),
        })
    }

    /// The fields that the API tells of a task; the token's id stands apart from the user.
    pub(crate) fn to_json(&self) -> Value {
        let mut task = json!({
            "upid": self.text, "node": self.node, "pid": self.pid, "pstart": self.pstart,
            "starttime": self.starttime, "type": self.kind, "id": self.id, "user": self.user.user,
        });
        if let Some(token) = &self.user.token {
            task["tokenid"] = json!(token);
        }
        task
    }
}

/// What a task writes to.
#[derive(Debug, Clone)]
pub(crate) struct TaskLog {
    path: PathBuf,
    warnings: Arc<AtomicU32>,
}

impl TaskLog {
    /// One line.
    pub(crate) fn line(&self, text: &str) {
        let text: String = text.chars().take(LINE_MAX).map(|c| if c == '\n' { ' ' } else { c }).collect();
        let written = fs::OpenOptions::new()
            .append(true)
            .open(&self.path)
            .and_then(|mut file| file.write_all(format!("{text}\n").as_bytes()));
        if let Err(error) = written {
            tracing::warn!(path = %self.path.display(), %error, "a task's log cannot be written");
        }
    }

    /// A warning: the task ends with `WARNINGS: n`.
    pub(crate) fn warn(&self, text: &str) {
        self.warnings.fetch_add(1, Ordering::Relaxed);
        self.line(&format!("WARN: {text}"));
    }
}

/// One listed task.
#[derive(Debug, Clone)]
pub(crate) struct Listed {
    pub(crate) upid: Upid,
    /// When and how it ended, if it did.
    pub(crate) end: Option<(i64, String)>,
}

impl Tasks {
    pub(crate) fn open(
        state: &Path,
        hosts: &[&str],
        faults: Arc<Faults>,
        least: std::time::Duration,
    ) -> Result<Self> {
        let dir = state.join("tasks");
        for host in hosts {
            let dir = dir.join(host);
            fs::create_dir_all(&dir).map_err(io("create", &dir))?;
        }
        let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.subsec_micros());
        Ok(Self {
            dir,
            running: Arc::default(),
            next_pid: AtomicU32::new(1000 + seed % 1_000_000),
            started: Instant::now(),
            tracker: TaskTracker::new(),
            faults,
            least,
        })
    }

    fn running(&self) -> MutexGuard<'_, HashMap<String, CancellationToken>> {
        self.running.lock()
    }

    fn path(&self, upid: &Upid) -> PathBuf {
        self.dir.join(&upid.node).join(&upid.text)
    }

    /// Starts a task and returns its UPID at once.
    pub(crate) fn fork<F, W>(
        &self,
        node: &str,
        kind: &str,
        id: &str,
        caller: &Caller,
        work: W,
    ) -> Result<String>
    where
        F: Future<Output = std::result::Result<(), String>> + Send + 'static,
        W: FnOnce(TaskLog) -> F,
    {
        let interrupted = || async { "received interrupt".to_owned() };
        self.fork_tidied(node, kind, id, caller, |log| (work(log), interrupted()))
    }

    /// Starts a task that has something to put right when it is interrupted: its second future does that, and says how the task
    /// has ended.
    pub(crate) fn fork_tidied<F, T, W>(
        &self,
        node: &str,
        kind: &str,
        id: &str,
        caller: &Caller,
        work: W,
    ) -> Result<String>
    where
        F: Future<Output = std::result::Result<(), String>> + Send + 'static,
        T: Future<Output = String> + Send + 'static,
        W: FnOnce(TaskLog) -> (F, T),
    {
        let pid = self.next_pid.fetch_add(1, Ordering::Relaxed);
        let pstart = u32::try_from(self.started.elapsed().as_millis() / 10).unwrap_or(u32::MAX);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let text = format!("UPID:{node}:{pid:08X}:{pstart:08X}:{now:08X}:{kind}:{id}:{}:", caller.full());
        let path = self.dir.join(node).join(&text);
        File::create_new(&path).map_err(io("create", &path))?;
        self.prune(node);
        let log = TaskLog { path, warnings: Arc::default() };
        let cancel = CancellationToken::new();
        self.running().insert(text.clone(), cancel.clone());
        let fault = self.faults.task(kind, id);
        let (work, tidy) = work(log.clone());
        let running = Arc::clone(&self.running);
        let upid = text.clone();
        let least = self.least;
        self.tracker.spawn(async move {
            let outcome = tokio::select! {
                outcome = run(work, fault.clone(), least) => outcome,
                () = cancel.cancelled() => Err(tidy.await),
            };
            let truncated = matches!(fault, Some(TaskFault::CutLog));
            if !truncated {
                match outcome {
                    Ok(()) => match log.warnings.load(Ordering::Relaxed) {
                        0 => log.line("TASK OK"),
                        n => log.line(&format!("TASK WARNINGS: {n}")),
                    },
                    Err(why) => log.line(&format!("TASK ERROR: {}", why.trim_end())),
                }
            }
            running.lock().remove(&upid);
        });
        Ok(text)
    }

    /// Ends all running tasks, as a shutdown of the daemon's host would.
    pub(crate) async fn close(&self) {
        for cancel in self.running().values() {
            cancel.cancel();
        }
        self.tracker.close();
        self.tracker.wait().await;
    }

    pub(crate) fn is_running(&self, upid: &str) -> bool {
        self.running().contains_key(upid)
    }

    /// Asks a task to end.
    pub(crate) fn cancel(&self, upid: &str) {
        if let Some(cancel) = self.running().get(upid) {
            cancel.cancel();
        }
    }

    /// Whether there is a log of this task.
    pub(crate) fn exists(&self, upid: &Upid) -> bool {
        self.path(upid).is_file()
    }

    /// PVE::Tools::upid_read_status.
    pub(crate) fn exit_status(&self, upid: &Upid) -> String {
        let last = last_line(&self.path(upid)).unwrap_or_default();
        match last.strip_prefix("TASK ") {
            Some("OK") => "OK".to_owned(),
            Some(rest) => match rest.strip_prefix("ERROR: ") {
                Some(why) => why.to_owned(),
                None if rest.starts_with("WARNINGS: ") => rest.to_owned(),
                None => "unexpected status".to_owned(),
            },
            None => "unexpected status".to_owned(),
        }
    }

    /// Lines `start`, … of a log (at most `limit`; 0: all), each with its number from 1, and the number of all lines.
    pub(crate) fn read_log(&self, upid: &Upid, start: u64, limit: u64) -> Result<(Vec<(u64, String)>, u64)> {
        let path = self.path(upid);
        let file = File::open(&path).map_err(io("read", &path))?;
        let mut lines = Vec::new();
        let mut count = 0u64;
        for line in BufReader::new(file).lines() {
            let line = line.map_err(io("read", &path))?;
            if count >= start && (limit == 0 || (lines.len() as u64) < limit) {
                lines.push((count + 1, line));
            }
            count += 1;
        }
        if count == 0 {
            count = 1;
            lines.push((1, "no content".to_owned()));
        }
        Ok((lines, count))
    }

    /// All tasks of a host, the newest first.
    pub(crate) fn list(&self, node: &str) -> Vec<Listed> {
        let mut all: Vec<Listed> = fs::read_dir(self.dir.join(node))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let upid = Upid::parse(&entry.file_name().to_string_lossy())?;
                let end = (!self.is_running(&upid.text)).then(|| {
                    let at = entry.metadata().and_then(|m| m.modified()).unwrap_or(UNIX_EPOCH);
                    let at = at.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
                    (i64::try_from(at).unwrap_or(0), self.exit_status(&upid))
                });
                Some(Listed { upid, end })
            })
            .collect();
        all.sort_by_key(|task| std::cmp::Reverse((task.upid.starttime, task.upid.pid)));
        all
    }

    fn prune(&self, node: &str) {
        let dir = self.dir.join(node);
        let count = fs::read_dir(&dir).map_or(0, Iterator::count);
        if count > KEPT + KEPT / 10 {
            for old in self.list(node).into_iter().skip(KEPT).filter(|t| t.end.is_some()) {
                let _ = fs::remove_file(dir.join(&old.upid.text));
            }
        }
    }
}

async fn run(
    work: impl Future<Output = std::result::Result<(), String>>,
    fault: Option<TaskFault>,
    least: std::time::Duration,
) -> std::result::Result<(), String> {
    match fault {
        Some(TaskFault::NeverEnds) => std::future::pending().await,
        Some(TaskFault::FailsBefore(why)) => {
            tokio::time::sleep(least).await;
            Err(why)
        }
        Some(TaskFault::FailsAfter(why)) => {
            let (outcome, ()) = tokio::join!(work, tokio::time::sleep(least));
            outcome.and(Err(why))
        }
        Some(TaskFault::Takes(more)) => {
            let (outcome, ()) = tokio::join!(work, tokio::time::sleep(more.max(least)));
            outcome
        }
        Some(TaskFault::CutLog) | None => {
            let (outcome, ()) = tokio::join!(work, tokio::time::sleep(least));
            outcome
        }
    }
}

fn last_line(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let size = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(LINE_MAX as u64 + 64))).ok()?;
    let mut bytes = Vec::new();
    file.take(LINE_MAX as u64 + 64).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    // A line without its newline was cut off by a crash.
    text.ends_with('\n').then(|| text.lines().last().map(str::to_owned)).flatten()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn upids_are_taken_apart_and_odd_ones_refused() {
        let text = "UPID:pve1:0000A1B2:00C3D4E5:65F0A1B2:vzstart:100:a@pve!tok:";
        let upid = Upid::parse(text).unwrap();
        assert_eq!(
            (upid.kind.as_str(), upid.id.as_str(), upid.user.token.as_deref()),
            ("vzstart", "100", Some("tok"))
        );
        for odd in [
            "",
            "UPID:x",
            "UPID:../..:0000A1B2:00C3D4E5:65F0A1B2:vzstart:100:a@pve:",
            "UPID:pve1:zz:00C3D4E5:65F0A1B2:vzstart:100:a:",
        ] {
            assert!(Upid::parse(odd).is_none(), "{odd}");
        }
    }

    #[tokio::test]
    async fn a_task_that_a_crash_cut_off_has_an_unexpected_status() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Tasks::open(dir.path(), &["pve1"], Arc::default(), std::time::Duration::ZERO).unwrap();
        let tasks = open();
        let caller = Caller::parse("a@pve!tok");
        let upid = tasks
            .fork("pve1", "vzstart", "100", &caller, |log| async move {
                log.line("working");
                std::future::pending().await
            })
            .unwrap();
        while tasks.read_log(&Upid::parse(&upid).unwrap(), 0, 0).unwrap().0[0].1 != "working" {
            tokio::task::yield_now().await;
        }
        assert!(tasks.is_running(&upid));
        let restarted = open();
        assert!(!restarted.is_running(&upid));
        assert_eq!(restarted.exit_status(&Upid::parse(&upid).unwrap()), "unexpected status");
        tasks.close().await;
        assert_eq!(tasks.exit_status(&Upid::parse(&upid).unwrap()), "received interrupt");
    }
}
