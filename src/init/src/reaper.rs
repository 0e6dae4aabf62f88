//! Reaping: PID 1 inherits every orphan of the CT. Whoever waits for a process says so here.

use std::{
    collections::{HashMap, VecDeque},
    sync::Mutex,
};

use crate::sys::{lock, now_ns};

/// How many exits of processes that nobody has asked for yet are remembered: a container can be dead before its creator
/// has told its PID.
const UNCLAIMED: usize = 64;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// The exit code, 128 + n after signal n.
    pub(crate) code: i32,
    /// The signal that ended it.
    pub(crate) signal: Option<i32>,
    /// When, in nanoseconds since 1970.
    pub(crate) at_ns: i64,
}

type Callback = Box<dyn FnOnce(Exit) + Send>;

#[derive(Default)]
struct Inner {
    watched: HashMap<i32, Callback>,
    unclaimed: VecDeque<(i32, Exit)>,
}

/// Who is waited for.
#[derive(Default)]
pub(crate) struct Reaper(Mutex<Inner>);

impl Reaper {
    /// Calls `then` once when the process has ended, also if it already has.
    pub(crate) fn watch(&self, pid: i32, then: impl FnOnce(Exit) + Send + 'static) {
        let mut inner = lock(&self.0);
        if let Some(at) = inner.unclaimed.iter().position(|(p, _)| *p == pid) {
            let exit = inner.unclaimed.remove(at);
            drop(inner);
            if let Some((_, exit)) = exit {
                then(exit);
            }
        } else {
            inner.watched.insert(pid, Box::new(then));
        }
    }

    /// Sends a signal to a watched process; `false` when it has been reaped. Its PID cannot have been given away meanwhile.
    pub(crate) fn signal(&self, pid: i32, signal: i32) -> std::io::Result<bool> {
        self.send(pid, pid, signal)
    }

    /// The same to the whole process group that a watched process leads.
    pub(crate) fn signal_group(&self, pid: i32, signal: i32) -> std::io::Result<bool> {
        self.send(pid, -pid, signal)
    }

    fn send(&self, watched: i32, to: i32, signal: i32) -> std::io::Result<bool> {
        let inner = lock(&self.0);
        if !inner.watched.contains_key(&watched) {
            return Ok(false);
        }
        // SAFETY: a plain call; the process is not reaped while the lock is held.
        match unsafe { libc::kill(to, signal) } {
            0 => Ok(true),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    /// Takes all dead children.
    pub(crate) fn reap(&self) {
        let mut due = Vec::new();
        {
            let mut inner = lock(&self.0);
            loop {
                let mut status = 0;
                // SAFETY: a valid pointer.
                let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
                if pid <= 0 {
                    break;
                }
                let exit = if libc::WIFSIGNALED(status) {
                    let signal = libc::WTERMSIG(status);
                    Exit { code: 128 + signal, signal: Some(signal), at_ns: now_ns() }
                } else {
                    Exit { code: libc::WEXITSTATUS(status), signal: None, at_ns: now_ns() }
                };
                if let Some(then) = inner.watched.remove(&pid) {
                    due.push((then, exit));
                } else {
                    if inner.unclaimed.len() >= UNCLAIMED {
                        inner.unclaimed.pop_front();
                    }
                    inner.unclaimed.push_back((pid, exit));
                }
            }
        }
        for (then, exit) in due {
            then(exit);
        }
    }
}
