//! How many blobs come from one host at a time, over all pulls.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The hosts from which something comes.
#[derive(Debug)]
pub(super) struct Slots {
    each: usize,
    hosts: Mutex<HashMap<String, Weak<Semaphore>>>,
}

/// The places at one host.
#[derive(Debug, Clone)]
pub(super) struct Host(Arc<Semaphore>);

/// A place; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Slot(#[expect(dead_code, reason = "held for its drop")] Option<OwnedSemaphorePermit>);

impl Slots {
    pub(super) fn new(each: usize) -> Self {
        Self { each: each.clamp(1, Semaphore::MAX_PERMITS), hosts: Mutex::default() }
    }

    pub(super) fn host(&self, name: &str) -> Host {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        hosts.retain(|_, host| host.strong_count() > 0);
        if let Some(host) = hosts.get(name).and_then(Weak::upgrade) {
            return Host(host);
        }
        let host = Arc::new(Semaphore::new(self.each));
        hosts.insert(name.to_owned(), Arc::downgrade(&host));
        Host(host)
    }
}

impl Host {
    /// Waits for a place, in the order of asking.
    pub(super) async fn take(&self) -> Slot {
        // It is never closed.
        Slot(Arc::clone(&self.0).acquire_owned().await.ok())
    }
}
