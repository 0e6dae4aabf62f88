//! What somebody else did to pods' CTs on the host: looked for, logged, and published for the node, which makes events of the pods.
//!
//! The last ones lie in the ledger as well, before they are published: those that a node has not fetched when the agent is killed are
//! published after its start, once. What an engine's look found just before a kill it finds again, with the same time.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use moxlet_cri::{host, v1};
use moxlet_errors::chain;
use moxlet_sandbox::{Engine, Observation};
use parking_lot::Mutex;
use tokio::sync::broadcast;
use tracing::{info, warn};

use crate::{
    events::Events,
    ledger::{Ledger, NoticeRecord},
    state::{Sandbox, State},
    tasks::{Tasks, blocking},
};

/// How often is looked. Only local files are read.
const PERIOD: Duration = Duration::from_secs(2);
/// Notices that are kept for a node that comes later.
const KEPT: usize = 256;

/// Those of late, and who wants to hear the next ones.
pub(crate) struct Notices {
    ledger: Arc<Ledger>,
    late: Mutex<VecDeque<host::Notice>>,
    /// Held while some are kept and published: the ledger has all of them.
    publishing: tokio::sync::Mutex<()>,
    next: broadcast::Sender<host::Notice>,
}

impl Notices {
    /// Takes over those of the ledger. Without them nobody but people misses anything.
    pub(crate) fn open(ledger: Arc<Ledger>) -> Self {
        let late = ledger.notices().unwrap_or_else(|error| {
            warn!(
                error = chain(&error),
                "the notices of the ledger cannot be read; those that were not fetched are lost"
            );
            Vec::new()
        });
        let late = Mutex::new(late.into_iter().map(notice).collect());
        Self { ledger, late, publishing: tokio::sync::Mutex::default(), next: broadcast::Sender::new(KEPT) }
    }

    /// Those of late that are younger than this time (nanoseconds since 1970), and the next ones; nothing falls between.
    pub(crate) fn since(&self, at_ns: i64) -> (Vec<host::Notice>, broadcast::Receiver<host::Notice>) {
        let late = self.late.lock();
        (late.iter().filter(|n| n.at_ns > at_ns).cloned().collect(), self.next.subscribe())
    }

    /// Whether it is one of those of late. What is no pod's has no memory but this: after a start it is found as if it were new.
    fn is_known(&self, new: &host::Notice, started: bool) -> bool {
        let pods = !new.pod_sandbox_id.is_empty();
        self.late.lock().iter().any(|old| {
            let same_time = old.at_ns == new.at_ns || (started && !pods);
            same_time
                && (&old.pod_sandbox_id, &old.reason, &old.message)
                    == (&new.pod_sandbox_id, &new.reason, &new.message)
        })
    }

    /// Publishes one thing of a pod's CT that no look of the engine finds.
    pub(crate) async fn tell(&self, sandbox: &Sandbox, observation: Observation) {
        let notice = of_pod(observation, Some(sandbox));
        log(&notice);
        self.publish(vec![notice]).await;
    }

    /// Keeps new ones, on disk first, and publishes them.
    async fn publish(&self, new: Vec<host::Notice>) {
        if new.is_empty() {
            return;
        }
        let _one = self.publishing.lock().await;
        let records = {
            let mut late = self.late.lock().clone();
            late.extend(new.iter().cloned());
            late.drain(..late.len().saturating_sub(KEPT));
            late.into_iter().map(record).collect()
        };
        let ledger = self.ledger.clone();
        let written = blocking(move || ledger.put_notices(records)).await;
        if let Err(error) = written {
            warn!(
                error = chain(&error),
                "notices are published and not kept: after a kill of the agent those that were not fetched are lost"
            );
        }
        let mut late = self.late.lock();
        for notice in new {
            if late.len() == KEPT {
                late.pop_front();
            }
            late.push_back(notice.clone());
            let _ = self.next.send(notice);
        }
    }
}

fn notice(r: NoticeRecord) -> host::Notice {
    host::Notice {
        pod_sandbox_id: r.sandbox,
        pod_namespace: r.namespace,
        pod_name: r.name,
        pod_uid: r.uid,
        reason: r.reason,
        message: r.message,
        warning: r.warning,
        at_ns: r.at_ns,
    }
}

fn record(n: host::Notice) -> NoticeRecord {
    NoticeRecord {
        sandbox: n.pod_sandbox_id,
        namespace: n.pod_namespace,
        name: n.pod_name,
        uid: n.pod_uid,
        reason: n.reason,
        message: n.message,
        warning: n.warning,
        at_ns: n.at_ns,
    }
}

/// Looks at the CTs of an engine that others have a hand in, until the agent ends, and shows them which containers a pod has.
pub(crate) struct Watcher {
    pub(crate) notices: Arc<Notices>,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) state: Arc<State>,
    pub(crate) tasks: Tasks,
}

impl Watcher {
    /// Starts its two tasks.
    pub(crate) fn spawn(self: Arc<Self>, events: &Events) {
        let stop = self.tasks.stop.clone();
        let (own, tasks) = (self.clone(), self.tasks.clone());
        tasks.spawn(async move {
            tokio::select! {
                () = own.tasks.stop.cancelled() => {}
                () = own.looks() => {}
            }
        });
        let mut events = events.subscribe();
        tasks.spawn(async move {
            loop {
                let event = tokio::select! {
                    () = stop.cancelled() => return,
                    event = events.recv() => event,
                };
                match event {
                    Ok(event) => self.describe(&event),
                    // The next event of the same pod brings its notes up to date.
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return,
                }
            }
        });
    }

    async fn looks(&self) {
        // What holds a CT since before the agent started is no news to the engine.
        for sandbox in self.state.sandboxes() {
            self.ask_holder(&sandbox).await;
        }
        let mut started = true;
        loop {
            self.look(std::mem::take(&mut started)).await;
            tokio::time::sleep(PERIOD).await;
        }
    }

    /// Notes who holds a pod's CT.
    async fn ask_holder(&self, sandbox: &Sandbox) {
        match self.engine.held_by(&sandbox.id).await {
            Ok(holder) => sandbox.set_held_by(holder),
            Err(error) => {
                warn!(sandbox = %sandbox.id, error = chain(&error), "cannot tell who holds a CT");
            }
        }
    }

    /// Looks once; `started` is whether it is the first time since the start.
    async fn look(&self, started: bool) {
        let seen = match self.engine.look().await {
            Ok(seen) => seen,
            Err(error) => return warn!(error = chain(&error), "cannot look what was done to the CTs"),
        };
        let mut new = Vec::new();
        for observation in seen {
            let sandbox = observation.sandbox.as_ref().and_then(|id| self.state.sandbox(id.as_str()).ok());
            if let Some(sandbox) = &sandbox {
                self.ask_holder(sandbox).await;
            }
            let notice = of_pod(observation, sandbox.as_deref());
            if self.notices.is_known(&notice, started) {
                continue;
            }
            log(&notice);
            new.push(notice);
        }
        self.notices.publish(new).await;
    }

    /// Shows people on the host which containers a pod has, once one of them has started or ended. Nobody waits for it: what goes wrong
    /// is only logged.
    fn describe(self: &Arc<Self>, event: &v1::ContainerEventResponse) {
        let Some(pod) = &event.pod_sandbox_status else { return };
        let Ok(sandbox) = self.state.sandbox(&pod.id) else { return };
        if event.container_id == pod.id || event.containers_statuses.is_empty() {
            return;
        }
        let own = self.clone();
        self.tasks.spawn(async move {
            let containers = own.state.containers_of(&sandbox.id);
            let names: BTreeSet<String> = containers.iter().map(|c| c.record().name).collect();
            let names: Vec<String> = names.into_iter().collect();
            if let Err(error) = own.engine.describe(&sandbox.id, &names).await {
                info!(sandbox = %sandbox.id, error = chain(&error), "the notes of a CT are not up to date");
            }
        });
    }
}

fn log(notice: &host::Notice) {
    let pod = match &*notice.pod_name {
        "" => String::new(),
        name => format!("{}/{name}", notice.pod_namespace),
    };
    if notice.warning {
        warn!(pod, reason = notice.reason, "{}", notice.message);
    } else {
        info!(pod, reason = notice.reason, "{}", notice.message);
    }
}

fn of_pod(observation: Observation, sandbox: Option<&Sandbox>) -> host::Notice {
    let record = sandbox.map(Sandbox::record);
    let record = record.as_ref();
    host::Notice {
        pod_sandbox_id: record.map(|r| r.id.to_string()).unwrap_or_default(),
        pod_namespace: record.map(|r| r.namespace.clone()).unwrap_or_default(),
        pod_name: record.map(|r| r.name.clone()).unwrap_or_default(),
        pod_uid: record.map(|r| r.uid.to_string()).unwrap_or_default(),
        reason: observation.reason.to_owned(),
        message: observation.message,
        warning: observation.warning,
        at_ns: observation.at_ns,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn of(at_ns: i64, sandbox: &str, message: &str) -> host::Notice {
        host::Notice {
            at_ns,
            pod_sandbox_id: sandbox.into(),
            message: message.into(),
            ..host::Notice::default()
        }
    }

    /// The notices of an agent that starts on what another left there.
    fn started(dir: &std::path::Path) -> Notices {
        Notices::open(Arc::new(Ledger::open(dir).unwrap()))
    }

    #[tokio::test]
    async fn a_late_listener_hears_what_was_before_and_old_ones_are_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let notices = started(dir.path());
        notices.publish((1..=300).map(|at_ns| of(at_ns, "", "")).collect()).await;
        assert_eq!(notices.since(0).0.len(), KEPT);
        let (late, mut next) = notices.since(299);
        assert_eq!(late.len(), 1);
        notices.publish(vec![of(301, "", "")]).await;
        assert_eq!(next.try_recv().map(|n| n.at_ns).ok(), Some(301));
        assert_eq!(started(dir.path()).since(0).0.len(), KEPT, "the file holds no more either");
    }

    #[tokio::test]
    async fn what_was_not_fetched_before_a_kill_is_told_after_the_next_start_and_once() {
        let dir = tempfile::tempdir().unwrap();
        let notices = started(dir.path());
        notices.publish(vec![of(1, "s", "edited"), of(2, "", "a stranger")]).await;
        // Nothing is done at its end.
        std::mem::forget(notices);
        let notices = started(dir.path());
        let (late, mut next) = notices.since(0);
        assert_eq!(late, [of(1, "s", "edited"), of(2, "", "a stranger")]);
        // The engine finds again what it found just before the kill; what is no pod's, with another time.
        assert!(
            notices.is_known(&of(1, "s", "edited"), true) && notices.is_known(&of(9, "", "a stranger"), true)
        );
        // Later it is news.
        assert!(
            !notices.is_known(&of(9, "s", "edited"), true)
                && !notices.is_known(&of(9, "", "a stranger"), false)
        );
        notices.publish(vec![of(9, "s", "edited")]).await;
        assert_eq!(next.try_recv().ok(), Some(of(9, "s", "edited")));
    }

    #[tokio::test]
    async fn a_file_of_notices_that_cannot_be_read_keeps_no_agent_from_starting() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("notices.json"), "{").unwrap();
        let notices = started(dir.path());
        assert!(notices.since(0).0.is_empty());
        notices.publish(vec![of(1, "s", "edited")]).await;
        assert_eq!(started(dir.path()).since(0).0.len(), 1);
        assert!(Ledger::open(dir.path()).unwrap().load().unwrap().0.is_empty());
    }
}
