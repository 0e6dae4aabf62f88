//! Waiting for tasks of Proxmox VE with few calls: what a task does to a CT is seen in the CT's processes; the task is asked
//! at growing intervals whether it failed.

use std::time::Duration;

use moxlet_ids::Vmid;
use moxlet_pve::{Upid, api::task::Wait};

use super::{Inner, api, record::Record};
use crate::{Error, Result};

const FIRST: Duration = Duration::from_millis(600);
const LONGEST: Duration = Duration::from_secs(20);
/// How often a CT's processes are looked for.
const LOOK: Duration = Duration::from_millis(20);
/// How long a CT's PID 1 may take to be seen after the task has ended well.
const AFTER_TASK: Duration = Duration::from_secs(3);
/// What a stop may take beyond the pod's grace.
const BEYOND_GRACE: Duration = Duration::from_secs(60);

impl Inner {
    /// Returns when a task has ended; its failure is an error with the last lines of its log.
    pub(super) async fn follow(&self, what: &'static str, vmid: Vmid, task: &Upid) -> Result<()> {
        let mut pause = FIRST;
        loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 5 / 2).min(LONGEST);
            match self.client.task_status(task).await {
                Ok(status) if status.end().is_some() => return Ok(()),
                Ok(status) if status.is_over() => {
                    // This reads the log, too.
                    let ended = self.client.wait(task, &Wait::within(LONGEST)).await;
                    return ended.map(drop).map_err(api(what, vmid));
                }
                Ok(_) => {}
                // The task runs by itself.
                Err(error) if error.is_temporary() => {
                    tracing::debug!(%error, ct = %vmid, "a task cannot be asked after");
                }
                Err(error) => return Err(api(what, vmid)(error)),
            }
        }
    }

    async fn seen(&self, record: &Record) -> u32 {
        loop {
            if let Some(pid) = self.inits.init(&record.id).filter(|pid| self.inits.has_begun(*pid)) {
                return pid;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Returns when the CT's PID 1 is there, or the task that starts it has failed.
    pub(super) async fn until_running(&self, record: &Record, task: &Upid) -> Result<u32> {
        let limit = self.config.start_timeout;
        let failed = async {
            if let Err(error) = self.follow("start", record.vmid, task).await {
                return error;
            }
            tokio::time::sleep(AFTER_TASK).await;
            let status = "ended at once".to_owned();
            let tail = format!("task {task} ended well, and the CT has no processes");
            Error::Tool { program: "init".into(), ct: record.vmid.to_string(), status, tail }
        };
        tokio::select! {
            biased;
            pid = self.seen(record) => Ok(pid),
            error = failed => Err(error),
            () = tokio::time::sleep(limit) => Err(Error::Timeout {
                what: "the start",
                ct: record.vmid.to_string(),
                seconds: limit.as_secs(),
                tail: format!(": task {task} still runs"),
            }),
        }
    }

    /// Returns when the PID 1 of a CT is there that runs, as Proxmox VE says.
    pub(super) async fn already_running(&self, record: &Record) -> Result<u32> {
        let seen = tokio::time::timeout(AFTER_TASK, self.seen(record)).await;
        seen.map_err(|_| Error::Busy {
            vmid: record.vmid,
            what: "Proxmox VE says that it runs, and it has no processes (yet)".into(),
        })
    }

    /// Returns when the CT's PID 1 is gone, or the task that stops it has failed.
    pub(super) async fn until_stopped(&self, record: &Record, task: &Upid, grace: Duration) -> Result<()> {
        let limit = grace.saturating_add(BEYOND_GRACE);
        let task_ended = async {
            self.follow("stop", record.vmid, task).await?;
            self.inits.ended(&record.id).await
        };
        tokio::select! {
            biased;
            ended = self.inits.ended(&record.id) => ended,
            ended = task_ended => ended,
            () = tokio::time::sleep(limit) => Err(Error::Timeout {
                what: "the stop",
                ct: record.vmid.to_string(),
                seconds: limit.as_secs(),
                tail: format!(": task {task} still runs"),
            }),
        }
    }
}
