//! One container: what is known of it and how it moves from created to exited.
//!
//! ```text
//! Created ──start──▶ Starting ──executed, or not──▶ Running ──dead and its output drained──▶ Exited
//!    └──────────────────────────── killed ─────────────────────────────────────────────────────▲
//! ```

use std::{
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Condvar, Mutex},
    time::{Duration, Instant},
};

use moxlet_init_proto::{ContainerState, Event, Status, write_exit_record};

use crate::{
    attach::Readers,
    error::{Error, Result},
    helper::Notes,
    log::LogFile,
    pod::Pod,
    reaper::Exit,
    sys::{Wake, lock},
};

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Created,
    Starting,
    Running,
    Exited,
}

impl Phase {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Exited => "exited",
        }
    }
}

/// What changes.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) phase: Phase,
    pub(crate) started_at_ns: i64,
    pub(crate) exit: Option<Exit>,
    pub(crate) start_error: Option<String>,
    pub(crate) control: Option<Notes>,
}

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    /// What people call it.
    pub(crate) name: String,
    pub(crate) pid: i32,
    pub(crate) created_at_ns: i64,
    pub(crate) bundle: PathBuf,
    pub(crate) cgroups_path: String,
    /// The user and group of its command.
    pub(crate) owner: (u32, u32),
    /// It has no PID namespace of its own: its end does not take its other processes with it.
    pub(crate) shares_pids: bool,
    pub(crate) wants_stdin: bool,
    pub(crate) stdin_once: bool,
    pub(crate) stop_signal: i32,
    /// The write end of its input.
    pub(crate) stdin: Mutex<Option<OwnedFd>>,
    /// Its terminal.
    pub(crate) master: Option<OwnedFd>,
    pub(crate) log: Mutex<LogFile>,
    pub(crate) readers: Readers,
    /// Wakes the thread that reads its output.
    pub(crate) wake: Wake,
    pub(crate) state: Mutex<State>,
    pub(crate) changed: Condvar,
}

impl Container {
    /// Its first process has ended.
    pub(crate) fn died(&self, exit: Exit) {
        if self.shares_pids {
            crate::cgroup::kill(&self.cgroups_path);
        }
        lock(&self.state).exit = Some(exit);
        self.wake.wake();
    }

    /// Whether its end can be reported once its output is drained.
    pub(crate) fn is_over(&self) -> bool {
        let state = lock(&self.state);
        state.exit.is_some() && state.phase != Phase::Starting
    }

    /// Its output is drained: writes the record, then tells.
    pub(crate) fn finish(&self, pod: &Pod) {
        let exited = self.describe(Self::exited(&lock(&self.state)));
        if let Err(e) = write_exit_record(&pod.options.state, &exited) {
            eprintln!("moxlet-init: {e}");
        }
        lock(&self.state).phase = Phase::Exited;
        self.changed.notify_all();
        self.readers.clear();
        lock(&self.stdin).take();
        if let Status::Exited { code, .. } = &exited.status {
            pod.console.say(&format!("{} has exited with {code}", self.name));
        }
        pod.bus.publish(&Event::Exited { container: exited });
    }

    /// Waits until it has exited; `false` when the time is over before.
    pub(crate) fn wait_exited(&self, until: Instant) -> bool {
        let mut state = lock(&self.state);
        while state.phase != Phase::Exited {
            let left = until.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return false;
            }
            state =
                self.changed.wait_timeout(state, left).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        true
    }

    /// As the agent sees it.
    pub(crate) fn report(&self) -> ContainerState {
        let state = lock(&self.state);
        let pid = u32::try_from(self.pid).unwrap_or_default();
        let status = match state.phase {
            Phase::Created | Phase::Starting => Status::Created,
            Phase::Running => Status::Running { pid, started_at_ns: state.started_at_ns },
            Phase::Exited => Self::exited(&state),
        };
        self.describe(status)
    }

    fn exited(state: &State) -> Status {
        let exit = state.exit.unwrap_or(Exit { code: 255, signal: None, at_ns: crate::sys::now_ns() });
        let failed = state.start_error.is_some();
        Status::Exited {
            code: if failed { 128 } else { exit.code },
            signal: exit.signal.filter(|_| !failed),
            started_at_ns: state.started_at_ns,
            finished_at_ns: exit.at_ns,
            message: state.start_error.clone(),
        }
    }

    fn describe(&self, status: Status) -> ContainerState {
        let pid = match status {
            Status::Exited { .. } => None,
            _ => u32::try_from(self.pid).ok(),
        };
        ContainerState { id: self.id.clone(), status, pid, created_at_ns: self.created_at_ns }
    }

    /// The error of a request that needs another state.
    pub(crate) fn not_in(&self, is: Phase, needs: &'static str) -> Error {
        Error::State { id: self.id.clone(), is: is.name(), needs }
    }

    /// Fails unless it has a process.
    pub(crate) fn alive(&self) -> Result<()> {
        match lock(&self.state).phase {
            Phase::Exited => Err(self.not_in(Phase::Exited, "a process")),
            _ => Ok(()),
        }
    }
}
