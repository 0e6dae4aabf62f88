//! Processes of the host, held by pidfd so that a reused pid is never signalled, and small bounded reads of `/proc`.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::Path,
    time::Duration,
};

use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::io::{Interest, unix::AsyncFd};

/// Reads a file that must not be larger than `max` bytes; what is beyond is cut.
pub(crate) fn read_bounded(path: &Path, max: u64) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(max).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The end of a log file, at most `max` bytes, on one line; empty if there is none.
pub(crate) fn tail(path: &Path, max: usize) -> String {
    let text = read_bounded(path, 256 * 1024).unwrap_or_default();
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let mut kept: Vec<&str> = Vec::new();
    let mut size = 0;
    for line in lines.iter().rev() {
        size += line.len() + 3;
        if size > max && !kept.is_empty() {
            break;
        }
        kept.push(line);
    }
    kept.reverse();
    let joined = kept.join(" | ");
    joined.chars().take(max).collect()
}

/// One process.
#[derive(Debug)]
pub(crate) struct Process {
    fd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Opens a process; `None` if it is gone.
    pub(crate) fn open(pid: u32) -> io::Result<Option<Self>> {
        let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        match rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(fd) => {
                // SAFETY: an `OwnedFd` always is the same open descriptor, and nothing here takes it out of the `AsyncFd`.
                #[allow(unsafe_code)]
                let registered = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
                Ok(Some(Self { fd: registered.map_err(io::Error::from)? }))
            }
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Sends a signal; nothing if the process is gone.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(self.fd.get_ref(), signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Waits for the process' end.
    pub(crate) async fn ended(&self) -> io::Result<()> {
        self.fd.readable().await.map(|mut ready| ready.retain_ready())
    }

    /// Waits for the process' end; false if it still lives after `limit`.
    pub(crate) async fn ended_within(&self, limit: Duration) -> bool {
        matches!(tokio::time::timeout(limit, self.fd.readable()).await, Ok(Ok(_)))
    }
}

/// Kills a process by pid where nothing better is known than that it sits in a cgroup of ours.
pub(crate) fn kill_now(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw)
        && let Ok(fd) = rustix::process::pidfd_open(pid, PidfdFlags::empty())
    {
        let _ = rustix::process::pidfd_send_signal(&fd, Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn the_end_of_a_process_is_noticed() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let process = Process::open(child.id()).unwrap().unwrap();
        assert!(!process.ended_within(Duration::from_millis(20)).await);
        process.signal(Signal::KILL).unwrap();
        assert!(process.ended_within(Duration::from_secs(5)).await);
        child.wait().unwrap();
        assert!(process.signal(Signal::KILL).is_ok());
    }

    #[test]
    fn a_tail_is_the_end_of_a_log_on_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "one\n\ntwo\nthree\n").unwrap();
        assert_eq!(tail(&path, 1000), "one | two | three");
        assert_eq!(tail(&path, 9), "three");
        assert_eq!(tail(&dir.path().join("none"), 10), "");
    }
}
