//! What somebody else did to pods' CTs on the host: looked for, logged, and told to whoever turns it into events of the pods.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use moxlet_cri::host;
use tokio::sync::broadcast;
use tracing::{info, warn};

use crate::{
    config::EngineSettings,
    core::{Core, Sandbox, lock, now_ns},
    error::chain,
};

/// How often is looked. Only local files are read.
const PERIOD: Duration = Duration::from_secs(2);
/// Notices that are kept for a node that comes later.
const KEPT: usize = 256;

/// Those of late, and who wants to hear the next ones.
pub(crate) struct Notices {
    late: Mutex<VecDeque<host::Notice>>,
    next: broadcast::Sender<host::Notice>,
}

impl Default for Notices {
    fn default() -> Self {
        Self { late: Mutex::default(), next: broadcast::Sender::new(KEPT) }
    }
}

impl Notices {
    /// Those of late that are younger than this time (nanoseconds since 1970), and the next ones; nothing falls between.
    pub(crate) fn since(&self, at_ns: i64) -> (Vec<host::Notice>, broadcast::Receiver<host::Notice>) {
        let late = lock(&self.late);
        (late.iter().filter(|n| n.at_ns > at_ns).cloned().collect(), self.next.subscribe())
    }

    fn say(&self, notice: host::Notice) {
        let mut late = lock(&self.late);
        if late.len() == KEPT {
            late.pop_front();
        }
        late.push_back(notice.clone());
        let _ = self.next.send(notice);
    }
}

/// Looks until the agent ends. CTs of plain LXC are nobody else's business.
pub(crate) fn spawn(core: &Arc<Core>) {
    if matches!(core.config.engine, EngineSettings::Lxc) {
        return;
    }
    let core = core.clone();
    core.tasks.clone().spawn(async move {
        // What holds a CT since before the agent started is no news to the engine.
        for sandbox in core.sandboxes() {
            ask_holder(&core, &sandbox).await;
        }
        loop {
            look(&core).await;
            tokio::select! {
                () = core.stop.cancelled() => return,
                () = tokio::time::sleep(PERIOD) => {}
            }
        }
    });
}

/// Notes who holds a pod's CT.
async fn ask_holder(core: &Core, sandbox: &Sandbox) {
    match core.engine.held_by(&sandbox.id).await {
        Ok(holder) => sandbox.set_held_by(holder),
        Err(error) => {
            warn!(sandbox = %sandbox.id, error = chain(&error), "cannot tell who holds a CT");
        }
    }
}

async fn look(core: &Core) {
    let seen = match core.engine.look().await {
        Ok(seen) => seen,
        Err(error) => return warn!(error = chain(&error), "cannot look what was done to the CTs"),
    };
    for observation in seen {
        let sandbox = observation.sandbox.as_ref().and_then(|id| core.sandbox(id.as_str()).ok());
        if let Some(sandbox) = &sandbox {
            ask_holder(core, sandbox).await;
        }
        let record = sandbox.map(|s| s.record());
        let pod = record.as_ref().map_or_else(String::new, |r| format!("{}/{}", r.namespace, r.name));
        if observation.warning {
            warn!(pod, reason = observation.reason, "{}", observation.message);
        } else {
            info!(pod, reason = observation.reason, "{}", observation.message);
        }
        let record = record.as_ref();
        core.notices.say(host::Notice {
            pod_sandbox_id: record.map(|r| r.id.to_string()).unwrap_or_default(),
            pod_namespace: record.map(|r| r.namespace.clone()).unwrap_or_default(),
            pod_name: record.map(|r| r.name.clone()).unwrap_or_default(),
            pod_uid: record.map(|r| r.uid.to_string()).unwrap_or_default(),
            reason: observation.reason.to_owned(),
            message: observation.message,
            warning: observation.warning,
            at_ns: now_ns(),
        });
    }
}

/// Shows people on the host which containers a pod has. It is nothing to wait for: what goes wrong is only logged.
pub(crate) fn describe(core: &Arc<Core>, sandbox: &Arc<Sandbox>) {
    let (core, sandbox) = (core.clone(), sandbox.clone());
    core.tasks.clone().spawn(async move { described(&core, &sandbox).await });
}

async fn described(core: &Core, sandbox: &Sandbox) {
    let names: std::collections::BTreeSet<String> =
        core.containers_of(&sandbox.id).iter().map(|c| c.record().name).collect();
    let names: Vec<String> = names.into_iter().collect();
    if let Err(error) = core.engine.describe(&sandbox.id, &names).await {
        info!(sandbox = %sandbox.id, error = chain(&error), "the notes of a CT are not up to date");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_listener_hears_what_was_before_and_old_ones_are_forgotten() {
        let notices = Notices::default();
        for at_ns in 1..=300 {
            notices.say(host::Notice { at_ns, ..host::Notice::default() });
        }
        assert_eq!(notices.since(0).0.len(), KEPT);
        let (late, mut next) = notices.since(299);
        assert_eq!(late.len(), 1);
        notices.say(host::Notice { at_ns: 301, ..host::Notice::default() });
        assert_eq!(next.try_recv().map(|n| n.at_ns).ok(), Some(301));
    }
}
