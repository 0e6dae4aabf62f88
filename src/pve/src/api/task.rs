//! Tasks: what long calls start. Lists, status, log, waiting, calling off.

use std::time::{Duration, Instant};

use moxlet_ids::Vmid;
use rand::RngExt;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use crate::{
    Client, Error, NodeName, Result, Upid, classify, client::decode, error::CallName, http::Request, lenient,
};

/// How many lines of a failed task's log its error shows.
const ERROR_LINES: u64 = 12;
/// The most lines that one call returns.
const MAX_LINES: u64 = 5000;
/// The longest line that is kept, in characters.
const MAX_LINE: usize = 2000;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(2);

/// How a task does.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct TaskStatus {
    /// Its id.
    pub upid: Upid,
    /// `running` or `stopped`.
    #[serde(default, deserialize_with = "lenient::string")]
    pub status: String,
    /// How it ended: `OK`, `WARNINGS: n`, or what went wrong. None while it runs.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub exitstatus: Option<String>,
}

/// How a task ended that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskEnd {
    /// Without a word.
    Ok,
    /// With so many warnings in its log.
    Warnings(u64),
}

impl TaskStatus {
    /// Whether it has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.status == "stopped"
    }

    /// How it ended, if it has and did not fail.
    #[must_use]
    pub fn end(&self) -> Option<TaskEnd> {
        match self.exitstatus.as_deref().filter(|_| self.is_over())? {
            "OK" => Some(TaskEnd::Ok),
            other => other.strip_prefix("WARNINGS: ")?.trim().parse().ok().map(TaskEnd::Warnings),
        }
    }
}

/// An entry of a node's list of tasks.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct TaskEntry {
    /// The task.
    pub upid: Upid,
    /// How it ended; none while it runs.
    #[serde(default, deserialize_with = "lenient::opt_string")]
    pub status: Option<String>,
    /// When it ended, in seconds since 1970.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub endtime: Option<u64>,
}

/// Which tasks to list.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TaskFilter {
    /// Of one guest.
    pub vmid: Option<Vmid>,
    /// Of one kind, such as `vzdump`.
    pub kind: Option<String>,
    /// Those that run, too, not only those that have ended.
    pub running: bool,
    /// Begun at that time or later, in seconds since 1970.
    pub since: Option<u64>,
    /// At most so many; 50 if none is given.
    pub limit: Option<u32>,
}

#[derive(Debug, Deserialize)]
struct LogLine {
    #[serde(default, deserialize_with = "lenient::string")]
    t: String,
}

/// How long to wait for a task.
#[derive(Debug, Clone)]
pub struct Wait {
    /// No longer than this. The task goes on by itself.
    pub deadline: Duration,
    /// Calls off the waiting, not the task.
    pub cancel: CancellationToken,
}

impl Wait {
    /// No longer than this.
    #[must_use]
    pub fn within(deadline: Duration) -> Self {
        Self { deadline, cancel: CancellationToken::new() }
    }

    /// Until the token is cancelled, too.
    #[must_use]
    pub fn or_until(mut self, cancel: CancellationToken) -> Self {
        self.cancel = cancel;
        self
    }
}

impl Client {
    /// How a task does.
    ///
    /// # Errors
    /// As every call; wants Sys.Audit on `/nodes/NODE` unless the task is ours.
    pub async fn task_status(&self, task: &Upid) -> Result<TaskStatus> {
        self.get(on(task, "GET", "/nodes/{node}/tasks/{upid}/status"), "a task's status").await
    }

    /// The last lines of a task's log, at most 5000.
    ///
    /// # Errors
    /// As [`Client::task_status`].
    pub async fn task_log_tail(&self, task: &Upid, lines: u64) -> Result<Vec<String>> {
        let lines = lines.clamp(1, MAX_LINES);
        let page = |start: u64| {
            on(task, "GET", "/nodes/{node}/tasks/{upid}/log").with("start", start).with("limit", lines)
        };
        let first = self.send(page(0)).await?;
        // Without a total the first page is all that is known to be there.
        let total = first.total.unwrap_or(0);
        let answer = if total > lines { self.send(page(total - lines)).await? } else { first };
        let mut read: Vec<LogLine> =
            decode::<Option<_>>(answer, "the lines of a task's log")?.unwrap_or_default();
        let surplus = read.len().saturating_sub(usize::try_from(lines).unwrap_or(usize::MAX));
        read.drain(..surplus);
        Ok(read
            .into_iter()
            .map(|l| l.t.chars().filter(|c| !c.is_control()).take(MAX_LINE).collect())
            .collect())
    }

    /// Ends a task.
    ///
    /// # Errors
    /// As every call; wants Sys.Modify on `/nodes/NODE` unless the task is ours.
    pub async fn cancel_task(&self, task: &Upid) -> Result<()> {
        self.done(on(task, "DELETE", "/nodes/{node}/tasks/{upid}")).await
    }

    /// Tasks of a node, the latest first: ours, or with Sys.Audit all.
    ///
    /// # Errors
    /// As every call.
    pub async fn tasks(&self, node: &NodeName, filter: &TaskFilter) -> Result<Vec<TaskEntry>> {
        let request = Request::new("GET", "/nodes/{node}/tasks")
            .at("node", node)
            .maybe("vmid", filter.vmid)
            .maybe("typefilter", filter.kind.as_ref())
            .maybe("source", filter.running.then_some("all"))
            .maybe("since", filter.since)
            .maybe("limit", filter.limit);
        self.list(request, "the list of tasks").await
    }

    /// Waits until a task has ended. It asks ten times a second at first and every two seconds later. While the server cannot
    /// be reached it goes on asking: the task runs by itself.
    ///
    /// # Errors
    /// [`Error::TaskFailed`] with the end of its log; [`Error::TaskTimeout`]; [`Error::Cancelled`]; or as every call.
    pub async fn wait(&self, task: &Upid, wait: &Wait) -> Result<TaskEnd> {
        let started = Instant::now();
        let deadline = tokio::time::Instant::now() + wait.deadline;
        tokio::select! {
            result = self.poll(task) => result,
            () = wait.cancel.cancelled() => Err(Error::Cancelled { upid: Box::new(task.clone()) }),
            () = tokio::time::sleep_until(deadline) => {
                Err(Error::TaskTimeout { upid: Box::new(task.clone()), waited: started.elapsed() })
            }
        }
    }

    async fn poll(&self, task: &Upid) -> Result<TaskEnd> {
        let mut pause = FIRST_PAUSE;
        loop {
            match self.task_status(task).await {
                Ok(status) if status.is_over() => {
                    return match status.end() {
                        Some(end) => Ok(end),
                        None => Err(self.failed(task, status.exitstatus).await),
                    };
                }
                Ok(_) => {}
                Err(error @ (Error::Unreachable { .. } | Error::Busy { .. } | Error::NoQuorum { .. })) => {
                    tracing::debug!(%error, upid = %task, "waiting for a task, its server does not answer");
                }
                Err(error) => return Err(error),
            }
            let jitter = rand::rng().random_range(0.8..1.2);
            tokio::time::sleep(pause.mul_f64(jitter)).await;
            pause = pause.mul_f64(1.5).min(LAST_PAUSE);
        }
    }

    async fn failed(&self, task: &Upid, exit: Option<String>) -> Error {
        // A worker that was killed leaves no word.
        let exit = exit.unwrap_or_else(|| "it ended without saying how".to_owned());
        let log = match self.task_log_tail(task, ERROR_LINES).await {
            Ok(log) => log,
            Err(error) => vec![format!("(its log cannot be read: {error})")],
        };
        let call = CallName { method: "task", path: format!("{} {}", task.kind(), task.id()).into() };
        let reason = classify::sentence(&call, &exit).map(Box::new);
        Error::TaskFailed { upid: Box::new(task.clone()), exit: classify::bounded(&exit), log, reason }
    }
}

fn on(task: &Upid, method: &'static str, template: &'static str) -> Request {
    Request::new(method, template).at("node", task.node()).at("upid", task)
}
