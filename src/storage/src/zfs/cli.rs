//! The `zfs` and `zpool` programs: explicit arguments, an empty environment, bounded time and output, and errors that say
//! what was run and what it answered.
//!
//! Output is asked for as `-H -p` (tabs, exact numbers): that is stable over all versions of OpenZFS, while `-j` exists
//! only from 2.3 on.

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fs::FlockOperation,
    io::Errno,
};

use super::health::{self, Watch};
use crate::error::{Attempt, CommandFailure, Error, Result};

/// How long one command may take. Even a large dataset is destroyed in the background.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long the transfer of one layer may take.
const TRANSFER: Duration = Duration::from_secs(12 * 3600);
/// How long a sender may take to end once its receiver has.
const SHORT: Duration = Duration::from_secs(5);
const MAX_OUTPUT: usize = 64 << 20;
const MAX_STDERR: usize = 4 << 10;
const DIRS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];

/// How often it is looked whether commands of an earlier run have ended.
const PAUSE: Duration = Duration::from_millis(50);

/// The programs and how often they were run.
///
/// A program outlives an agent that is killed, and would change datasets behind the next one's back. So each holds a shared
/// lock on a file for as long as it runs, by a descriptor that it inherits; and nothing is looked at before all are gone.
#[derive(Debug)]
pub(super) struct Cli {
    lock: PathBuf,
    zfs: PathBuf,
    runs: AtomicU64,
    /// Whether a program that hangs on a suspended pool is waited for, so that what it did in the end is known. Before the
    /// store is open it is given up.
    waits: AtomicBool,
}

impl Cli {
    /// Finds the programs, and waits until those of an earlier run have ended.
    pub(super) fn find(run_dir: &Path) -> Result<Self> {
        let find = |name| DIRS.iter().map(|d| PathBuf::from(d).join(name)).find(|p| p.is_file());
        let zfs = find("zfs").ok_or(Error::NoProgram("zfs"))?;
        let (runs, waits) = (AtomicU64::new(0), AtomicBool::new(false));
        let cli = Self { lock: run_dir.join("commands.lock"), zfs, runs, waits };
        let file = cli.open_lock()?;
        let end = Instant::now() + PATIENCE;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(cli),
                Err(Errno::WOULDBLOCK) if Instant::now() < end => thread::sleep(PAUSE),
                Err(Errno::WOULDBLOCK) => {
                    let command = "zfs, started by an earlier run".to_owned();
                    return Err(Error::TimedOut { command, seconds: PATIENCE.as_secs() });
                }
                Err(e) => return Err(e).attempt("lock", &cli.lock),
            }
        }
    }

    fn open_lock(&self) -> Result<File> {
        let open = File::options().create(true).truncate(false).read(true).write(true).open(&self.lock);
        open.attempt("open", &self.lock)
    }

    /// A descriptor that says, for as long as a program has it, that the program is running.
    fn running(&self) -> Result<File> {
        let file = self.open_lock()?;
        rustix::fs::flock(&file, FlockOperation::LockShared).attempt("lock", &self.lock)?;
        Ok(file)
    }

    /// How many programs were run.
    pub(super) fn runs(&self) -> u64 {
        self.runs.load(Ordering::Relaxed)
    }

    /// Runs `zfs` with these arguments; what it printed.
    pub(super) fn zfs(&self, args: &[&str]) -> Result<String> {
        let mut command = self.command(&self.zfs, args);
        // The file is empty: to read from it is to read nothing.
        command.stdin(self.running()?).stdout(Stdio::piped());
        let shown = format!("zfs {}", args.join(" "));
        let patience = self.patience(&[args.last().copied().unwrap_or_default()], PATIENCE);
        finish(&mut command, &shown, patience)
    }

    /// From now on programs that hang on a suspended pool are waited for until it goes on.
    pub(super) fn wait_for_suspended_pools(&self) {
        self.waits.store(true, Ordering::Relaxed);
    }

    fn patience<'a>(&self, datasets: &[&'a str], limit: Duration) -> Patience<'a> {
        let end = Instant::now() + limit;
        Patience { watch: Watch::new(datasets), limit, end, waits: self.waits.load(Ordering::Relaxed) }
    }

    /// Runs `zfs` and splits what it printed into lines and columns.
    pub(super) fn table(&self, args: &[&str]) -> Result<Vec<Vec<String>>> {
        let text = self.zfs(args)?;
        Ok(text.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect())
    }

    /// Feeds one `zfs` (a `send`) into another (a `recv`).
    pub(super) fn pipe(&self, from: &[&str], to: &[&str]) -> Result<()> {
        let (sending, receiving) = (format!("zfs {}", from.join(" ")), format!("zfs {}", to.join(" ")));
        let mut sender = self.command(&self.zfs, from);
        let mut sender =
            sender.stdin(self.running()?).stdout(Stdio::piped()).spawn().attempt("run", &self.zfs)?;
        let Some(stream) = sender.stdout.take() else { return Err(Error::Stopped) };
        let mut receiver = self.command(&self.zfs, to);
        receiver.stdin(stream).stdout(Stdio::null());
        let running = self.running()?;
        let fd = running.as_raw_fd();
        // SAFETY: between fork and exec only one system call is made, on a descriptor that is open until the child is there.
        #[allow(unsafe_code)]
        unsafe {
            receiver.pre_exec(move || match libc::fcntl(fd, libc::F_SETFD, 0) {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
        let datasets = [from, to].map(|args| args.last().copied().unwrap_or_default());
        let received = finish(&mut receiver, &receiving, self.patience(&datasets, TRANSFER));
        drop(running);
        // Holds the other end of the pipe: with it closed, a sender that still writes ends.
        drop(receiver);
        let sent = wait(&mut sender, &sending, self.patience(&datasets, SHORT));
        match (sent, received) {
            // When the receiver fails first, the sender's broken pipe says nothing.
            (_, Err(error)) => Err(error),
            (Err(error), Ok(_)) => Err(error),
            (Ok(_), Ok(_)) => Ok(()),
        }
    }

    fn command(&self, program: &PathBuf, args: &[&str]) -> Command {
        self.runs.fetch_add(1, Ordering::Relaxed);
        let mut command = Command::new(program);
        command
            .args(args)
            .env_clear()
            .env("LC_ALL", "C")
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null())
            .stderr(Stdio::piped());
        command
    }
}

fn finish(command: &mut Command, shown: &str, patience: Patience<'_>) -> Result<String> {
    let mut child = command.spawn().attempt("run", command.get_program())?;
    wait(&mut child, shown, patience)
}

/// How long a program is waited for.
struct Patience<'a> {
    watch: Watch<'a>,
    limit: Duration,
    end: Instant,
    waits: bool,
}

impl Patience<'_> {
    /// Until it is looked again.
    fn pause(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now()).min(health::PAUSE)
    }

    /// Whether a program that says nothing is waited for any longer. The time that a pool is suspended does not count.
    fn check(&mut self, shown: &str) -> Result<()> {
        let now = Instant::now();
        match self.watch.look() {
            Some(_) if self.waits => self.end = now + self.limit,
            Some(pool) => {
                return Err(Error::PoolSuspended { pool: pool.to_owned(), doing: format!("run `{shown}`") });
            }
            None if now >= self.end => {
                let (command, seconds) = (shown.to_owned(), self.limit.as_secs());
                return Err(Error::TimedOut { command, seconds });
            }
            None => {}
        }
        Ok(())
    }
}

/// Reads what a program writes until it ends; what it printed, if all went well.
fn wait(child: &mut Child, shown: &str, mut patience: Patience<'_>) -> Result<String> {
    let gathered = gather(child, shown, &mut patience);
    if gathered.is_err() {
        let _ = child.kill();
        // One that hangs in the kernel cannot be killed; somebody has to reap it when it ends after all.
        if !matches!(child.try_wait(), Ok(Some(_))) {
            let pid = child.id();
            thread::spawn(move || reap(pid));
        }
    }
    let (out, err) = gathered?;
    let status = child.wait().attempt("wait for", shown)?;
    if status.success() {
        return String::from_utf8(out)
            .map_err(|_| Error::BadOutput { command: shown.to_owned(), line: "no UTF-8".into() });
    }
    Err(classify(failure(shown, status, &err)))
}

fn reap(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
    }
}

/// Standard output and the beginning of standard error, up to their ends.
fn gather(child: &mut Child, shown: &str, patience: &mut Patience<'_>) -> Result<(Vec<u8>, Vec<u8>)> {
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let (mut out, mut err) = (Vec::new(), Vec::new());
    while stdout.is_some() || stderr.is_some() {
        let (out_ready, err_ready) =
            ready(stdout.as_ref().map(AsFd::as_fd), stderr.as_ref().map(AsFd::as_fd), patience.pause())
                .attempt("wait for", shown)?;
        if !out_ready && !err_ready {
            patience.check(shown)?;
        }
        if out_ready && !read_some(&mut stdout, &mut out).attempt("read from", shown)? {
            stdout = None;
        }
        if err_ready && !read_some(&mut stderr, &mut err).attempt("read from", shown)? {
            stderr = None;
        }
        if out.len() > MAX_OUTPUT {
            return Err(Error::TooMuchOutput(shown.to_owned()));
        }
        err.truncate(MAX_STDERR);
    }
    Ok((out, err))
}

fn ready(
    out: Option<BorrowedFd<'_>>,
    err: Option<BorrowedFd<'_>>,
    left: Duration,
) -> rustix::io::Result<(bool, bool)> {
    let mut fds: Vec<PollFd<'_>> =
        out.iter().chain(&err).map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 });
    match rustix::event::poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(e) => return Err(e),
    }
    let mut seen = fds.iter().map(|fd| !fd.revents().is_empty());
    let out = out.is_some() && seen.next().unwrap_or(false);
    let err = err.is_some() && seen.next().unwrap_or(false);
    Ok((out, err))
}

/// False at the end.
fn read_some(from: &mut Option<impl Read>, into: &mut Vec<u8>) -> io::Result<bool> {
    let Some(from) = from else { return Ok(false) };
    let mut buffer = [0_u8; 16 << 10];
    let n = from.read(&mut buffer)?;
    into.extend_from_slice(&buffer[..n]);
    Ok(n > 0)
}

fn failure(shown: &str, status: ExitStatus, stderr: &[u8]) -> CommandFailure {
    let stderr = String::from_utf8_lossy(stderr).trim().replace('\n', "; ");
    CommandFailure { command: shown.to_owned(), exit: status.code(), stderr }
}

/// What a failure means, by the words of libzfs (`lib/libzfs/libzfs_util.c`), which are the same in all versions since 2.2.
fn classify(failure: CommandFailure) -> Error {
    let says = |words: &[&str]| words.iter().any(|w| failure.stderr.contains(w));
    let doing = || format!("run {failure}");
    if says(&["currently suspended"]) {
        let named = failure.command.rsplit(' ').next().unwrap_or_default();
        Error::PoolSuspended {
            pool: health::pool_of(named).to_owned(),
            doing: format!("run `{}`", failure.command),
        }
    } else if says(&["out of space", "No space left"]) {
        Error::NoSpace { doing: doing() }
    } else if says(&["quota exceeded", "exceeds quota", "limit of dataset is exceeded"]) {
        Error::QuotaExceeded { doing: doing() }
    } else if says(&["read-only", "Read-only"]) {
        Error::ReadOnly { doing: doing() }
    } else if says(&["permission denied", "Permission denied", "Operation not permitted"]) {
        Error::NotPermitted(failure)
    } else if says(&["does not exist", "no such pool", "could not find any snapshots"]) {
        Error::NoSuchDataset(failure)
    } else if says(&["already exists"]) {
        Error::DatasetExists(failure)
    } else if says(&["has children", "has dependent clones"]) {
        Error::DatasetHasDependents(failure)
    } else if says(&["is busy"]) {
        let dataset = failure.command.rsplit(' ').next().unwrap_or_default().to_owned();
        Error::DatasetBusy(failure, dataset)
    } else if says(&["name is too long", "name too long"]) {
        Error::NameTooLong(failure)
    } else if says(&["key not loaded", "key must be loaded", "encryption key"]) {
        Error::KeyNotLoaded(failure)
    } else {
        Error::Zfs(failure)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    fn error(stderr: &str) -> Error {
        classify(CommandFailure {
            command: "zfs destroy tank/p/b@layer".into(),
            exit: Some(1),
            stderr: stderr.into(),
        })
    }

    /// Recorded from OpenZFS 2.3.9.
    #[test]
    fn what_zfs_says_becomes_an_error_with_a_name() {
        assert!(matches!(
            error("cannot destroy snapshot tank/p/b@layer: dataset is busy"),
            Error::DatasetBusy(_, dataset) if dataset == "tank/p/b@layer"
        ));
        for text in [
            "cannot destroy 'tank/p/b': filesystem has children\nuse '-r' to destroy the following datasets:\ntank/p/b@layer",
            "cannot destroy 'tank/p/b@layer': snapshot has dependent clones\nuse '-R' to destroy the following datasets:\ntank/p/c",
        ] {
            assert!(matches!(error(text), Error::DatasetHasDependents(_)), "{text}");
        }
        for text in [
            "cannot open 'tank/nope': dataset does not exist",
            "cannot create 'tank/nope/x': parent does not exist",
        ] {
            assert!(matches!(error(text), Error::NoSuchDataset(_)), "{text}");
        }
        let exists = error("cannot rename 'tank/p/c': dataset already exists");
        assert!(matches!(exists, Error::DatasetExists(_)));
    }

    fn run(program: &str, args: &[&str], limit: Duration) -> Result<String> {
        let mut command = Command::new(program);
        let mut child = command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let patience = Patience { watch: Watch::new(&[]), limit, end: Instant::now() + limit, waits: false };
        wait(&mut child, program, patience)
    }

    #[test]
    fn a_program_that_hangs_is_ended_and_named() {
        let error = run("sleep", &["1000"], Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, Error::TimedOut { ref command, .. } if command == "sleep"), "{error}");
    }

    #[test]
    fn output_and_failure_of_a_program_are_told() {
        let long = run("seq", &["100000"], Duration::from_secs(60)).unwrap();
        assert_eq!(long.lines().count(), 100_000);
        let error = run("ls", &["/nonexistent"], Duration::from_secs(60)).unwrap_err();
        assert!(matches!(error, Error::Zfs(CommandFailure { exit: Some(2), .. })), "{error}");
    }
}
