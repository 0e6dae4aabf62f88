//! Whether a pool answers. One that is suspended lets commands and system calls hang in the kernel, where nothing ends
//! them: who waits for them is told, and they end by themselves once the pool goes on or the machine is started anew.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use crate::error::{Error, Result};

/// How long a pool may be suspended before what waits for it is given up.
pub(super) const GRACE: Duration = Duration::from_secs(3);
/// How often it is looked.
pub(super) const PAUSE: Duration = Duration::from_millis(500);

/// The pool of a dataset, snapshot or pool.
pub(super) fn pool_of(name: &str) -> &str {
    name.split(['/', '@']).next().unwrap_or(name)
}

/// Whether a pool is suspended, as the kernel's module says without asking the pool.
pub(super) fn is_suspended(pool: &str) -> bool {
    fs::read_to_string(format!("/proc/spl/kstat/zfs/{pool}/state")).is_ok_and(|state| is_suspension(&state))
}

fn is_suspension(state: &str) -> bool {
    state.trim() == "SUSPENDED"
}

/// Waits for as long as the pool of a dataset is suspended.
pub(super) fn wait_until_resumed(dataset: &str) {
    while is_suspended(pool_of(dataset)) {
        thread::sleep(PAUSE);
    }
}

/// Looks at some pools from time to time.
#[derive(Debug)]
pub(super) struct Watch<'a> {
    pools: Vec<&'a str>,
    /// Since when one of them is suspended.
    since: Option<(&'a str, Instant)>,
}

impl<'a> Watch<'a> {
    /// Watches the pools of these datasets.
    pub(super) fn new(datasets: &[&'a str]) -> Self {
        Self { pools: datasets.iter().map(|name| pool_of(name)).collect(), since: None }
    }

    /// A pool that has been suspended for some time.
    pub(super) fn look(&mut self) -> Option<&'a str> {
        let suspended = self.pools.iter().copied().find(|pool| is_suspended(pool));
        let since = suspended.map(|pool| match self.since {
            Some((same, since)) if same == pool => (pool, since),
            _ => (pool, Instant::now()),
        });
        self.since = since;
        since.filter(|(_, since)| since.elapsed() >= GRACE).map(|(pool, _)| pool)
    }
}

fn suspended(pool: &str, doing: &str) -> Error {
    Error::PoolSuspended { pool: pool.to_owned(), doing: doing.to_owned() }
}

/// Ends when one of the pools of these datasets has been suspended for some time, with the reason.
pub(super) async fn stalled(datasets: &[&str], doing: &str) -> Error {
    let mut watch = Watch::new(datasets);
    loop {
        tokio::time::sleep(PAUSE).await;
        if let Some(pool) = watch.look() {
            return suspended(pool, doing);
        }
    }
}

/// Waits for work on some datasets unless a pool of theirs is or gets suspended. What was begun goes on by itself when the pool
/// does; nothing is begun on one that is suspended already, so that no thread hangs for it.
pub(super) async fn unless_stalled<T>(
    datasets: &[&str],
    doing: &str,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    if let Some(pool) = datasets.iter().map(|name| pool_of(name)).find(|pool| is_suspended(pool)) {
        return Err(suspended(pool, doing));
    }
    tokio::select! {
        biased;
        done = work => done,
        error = stalled(datasets, doing) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_pool_of_a_name_is_its_beginning() {
        for name in ["tank", "tank/a/b", "tank/a@layer", "tank@x"] {
            assert_eq!(pool_of(name), "tank");
        }
    }

    /// Recorded from OpenZFS 2.3.9.
    #[test]
    fn a_suspension_is_known_by_its_word() {
        assert!(is_suspension("SUSPENDED\n"));
        assert!(!is_suspension("ONLINE\n") && !is_suspension("DEGRADED\n"));
    }

    #[test]
    fn a_pool_that_is_not_there_is_not_suspended() {
        assert_eq!(Watch::new(&["no-such-pool/moxlet"]).look(), None);
    }

    #[tokio::test]
    async fn work_on_a_pool_that_answers_is_waited_for() {
        let done = unless_stalled(&["no-such-pool"], "wait", async { Ok(7) }).await;
        assert_eq!(done.unwrap(), 7);
    }
}
