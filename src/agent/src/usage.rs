//! How much containers have written into their roots, measured in the background: where a file system keeps no count, that is a walk through
//! all their files, for which no call waits.
//!
//! One root is measured at a time. Each is measured every 10 s, or less often where it takes long: no more than a twentieth of the time.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use moxlet_errors::chain;
use moxlet_ids::ContainerId;
use moxlet_storage::{Driver, Usage};
use parking_lot::Mutex;
use tracing::debug;

use crate::{clock::now_ns, state::State, tasks::Tasks};

/// How often is looked for roots to measure.
const LOOK: Duration = Duration::from_secs(1);
/// How often a root is measured.
const EVERY: Duration = Duration::from_secs(10);
/// How many times longer than a measurement the time until the next one is.
const REST: u32 = 20;

/// A root's usage as it was measured last.
#[derive(Debug, Clone, Copy)]
struct Measured {
    usage: Usage,
    /// Nanoseconds since 1970.
    at_ns: i64,
    ended: Instant,
    took: Duration,
}

/// The last measurements.
pub(crate) struct Usages {
    driver: Arc<dyn Driver>,
    state: Arc<State>,
    last: Mutex<BTreeMap<ContainerId, Measured>>,
}

impl Usages {
    /// None yet.
    pub(crate) fn new(driver: Arc<dyn Driver>, state: Arc<State>) -> Self {
        Self { driver, state, last: Mutex::default() }
    }

    /// Measures until the agent ends.
    pub(crate) fn spawn(self: &Arc<Self>, tasks: &Tasks) {
        let (own, stop) = (self.clone(), tasks.stop.clone());
        tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = own.run() => {}
            }
        });
    }

    /// What a container has written, and when that was measured (nanoseconds since 1970); none of one that is not measured yet.
    pub(crate) fn of(&self, id: &ContainerId) -> Option<(Usage, i64)> {
        self.last.lock().get(id).map(|measured| (measured.usage, measured.at_ns))
    }

    /// What all containers have written.
    pub(crate) fn sum(&self) -> Usage {
        self.last.lock().values().fold(Usage::default(), |sum, measured| Usage {
            bytes: sum.bytes.saturating_add(measured.usage.bytes),
            inodes: sum.inodes.saturating_add(measured.usage.inodes),
        })
    }

    async fn run(&self) {
        loop {
            let ids: Vec<_> = self.state.containers().iter().map(|c| c.id.clone()).collect();
            for id in self.due(&ids, Instant::now()) {
                let begun = Instant::now();
                match self.driver.root_usage(&id).await {
                    Ok(usage) => self.put(id, usage, begun, Instant::now()),
                    // It is being made, or removed.
                    Err(error) => debug!(container = %id, error = chain(&error), "a root is not measured"),
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn put(&self, id: ContainerId, usage: Usage, begun: Instant, ended: Instant) {
        let measured = Measured { usage, at_ns: now_ns(), ended, took: ended - begun };
        self.last.lock().insert(id, measured);
    }

    /// Which of these containers are to be measured; all others are forgotten.
    fn due(&self, ids: &[ContainerId], now: Instant) -> Vec<ContainerId> {
        let mut last = self.last.lock();
        last.retain(|id, _| ids.contains(id));
        let is_due = |id: &&ContainerId| {
            last.get(id).is_none_or(|m| now.saturating_duration_since(m.ended) >= EVERY.max(m.took * REST))
        };
        ids.iter().filter(is_due).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::fake;

    #[tokio::test]
    async fn a_root_that_takes_long_is_measured_less_often_and_one_that_is_gone_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let (rooms, _work) = fake::rooms(dir.path(), Arc::default()).await;
        let usages = Usages::new(rooms.driver.clone(), rooms.state.clone());
        let (small, large) = (ContainerId::random(), ContainerId::random());
        let (both, begun) = ([small.clone(), large.clone()], Instant::now());
        let after = |s| begun + Duration::from_secs(s);
        assert_eq!(usages.due(&both, begun), both);
        let usage = |bytes| Usage { bytes, ..Usage::default() };
        usages.put(small.clone(), usage(1), begun, begun);
        usages.put(large.clone(), usage(2), begun, after(3));
        assert_eq!((usages.sum().bytes, usages.of(&large).unwrap().0.bytes), (3, 2));
        assert!(usages.due(&both, after(9)).is_empty());
        assert_eq!(usages.due(&both, after(10)), std::slice::from_ref(&small));
        assert_eq!(usages.due(&both, after(63)), both);
        assert!(usages.due(&[small], begun).is_empty());
        assert_eq!((usages.sum().bytes, usages.of(&large)), (1, None));
    }
}
