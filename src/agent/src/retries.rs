//! What could not be done is tried again in the background, each thing at growing intervals: a queue with one entry a key. Proxmox
//! VE's API or a store may be away for a while; what a failed pod had (a CT, its number, its address) must not stay taken for as
//! long as the agent runs. `reconcile` does the work, anybody puts it here.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use moxlet_ids::{ContainerId, SandboxId};
use tokio::sync::mpsc;

/// The first pause, doubled after each failure.
const FIRST: Duration = Duration::from_millis(500);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(60);

/// Something to be done until it succeeds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Work {
    /// Remove a sandbox that is not wanted any more.
    Remove(SandboxId),
    /// Remove what is left of a sandbox that the ledger does not know.
    RemoveStray(SandboxId),
    /// Remove the root of a container that the ledger does not know.
    RemoveRoot(ContainerId),
    /// Take over a sandbox of the ledger.
    Recover(SandboxId),
    /// End a CT that had ended and was started again by somebody else.
    EndStarted(SandboxId),
    /// Check whether the engine accepts new pods again.
    CheckEngine,
}

impl std::fmt::Display for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Remove(id) => write!(f, "removing sandbox {id}"),
            Self::RemoveStray(id) => write!(f, "removing what is left of sandbox {id}"),
            Self::RemoveRoot(id) => write!(f, "removing the root of container {id}"),
            Self::Recover(id) => write!(f, "taking over sandbox {id}"),
            Self::EndStarted(id) => write!(f, "ending the CT of sandbox {id}, which was started on the host"),
            Self::CheckEngine => f.write_str("checking whether the engine accepts new pods"),
        }
    }
}

/// Where work is put. Clones put into the same queue.
#[derive(Debug, Clone)]
pub(crate) struct Retries(mpsc::UnboundedSender<Work>);

impl Retries {
    /// An empty queue, and what comes into it. There are no more entries than sandboxes and roots: each is kept once.
    pub(crate) fn new() -> (Self, mpsc::UnboundedReceiver<Work>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }

    /// Has something done; nothing where it waits already.
    pub(crate) fn add(&self, work: Work) {
        // Without a receiver the agent is at its end; the next start finds what is to be done.
        let _ = self.0.send(work);
    }
}

#[derive(Debug)]
struct Entry {
    /// When it is done next; none while it is being done.
    due: Option<Instant>,
    pause: Duration,
    failures: u32,
}

/// What waits, and for how long.
#[derive(Debug, Default)]
pub(crate) struct Queue(BTreeMap<Work, Entry>);

impl Queue {
    /// Takes work up; nothing where it waits or is being done.
    pub(crate) fn add(&mut self, work: Work, now: Instant) {
        self.0.entry(work).or_insert(Entry { due: Some(now + FIRST), pause: FIRST, failures: 0 });
    }

    /// When something is due next.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.0.values().filter_map(|e| e.due).min()
    }

    /// What is due, to be done now.
    pub(crate) fn take_due(&mut self, now: Instant) -> Vec<Work> {
        let due = self.0.iter_mut().filter(|(_, e)| e.due.is_some_and(|due| due <= now));
        due.map(|(work, entry)| {
            entry.due = None;
            work.clone()
        })
        .collect()
    }

    /// It is done.
    pub(crate) fn done(&mut self, work: &Work) {
        self.0.remove(work);
    }

    /// It failed and is done again later; whether that was the first failure in a row.
    pub(crate) fn failed(&mut self, work: &Work, now: Instant) -> bool {
        let Some(entry) = self.0.get_mut(work) else { return true };
        entry.pause = (entry.pause * 2).min(LONGEST);
        entry.due = Some(now + entry.pause);
        entry.failures += 1;
        entry.failures == 1
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn each_thing_is_kept_once_and_tried_at_growing_intervals() {
        let (mut queue, begun) = (Queue::default(), Instant::now());
        let after = |ms| begun + Duration::from_millis(ms);
        let work = Work::Remove(SandboxId::random());
        queue.add(work.clone(), begun);
        queue.add(work.clone(), after(400));
        assert_eq!(queue.next(), Some(after(500)));
        assert!(queue.take_due(after(499)).is_empty());
        assert_eq!(queue.take_due(after(500)), std::slice::from_ref(&work));
        queue.add(work.clone(), after(600));
        assert_eq!(queue.next(), None, "it is being done");
        assert!(queue.failed(&work, after(700)), "the first failure is for people");
        assert_eq!(queue.next(), Some(after(1700)));
        for _ in 0..9 {
            queue.take_due(after(1_000_000));
            assert!(!queue.failed(&work, after(0)));
        }
        assert_eq!(queue.next(), Some(after(60_000)));
        queue.done(&work);
        assert_eq!(queue.next(), None);
        queue.add(work.clone(), begun);
        queue.take_due(after(500));
        assert!(queue.failed(&work, begun), "another time");
    }
}
