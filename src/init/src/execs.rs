//! The commands that run beside a container's own, until someone has asked for their exit codes.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::Duration,
};

use crate::{
    error::{Error, Result},
    sys::lock,
};

/// Exit codes that are kept for a caller who has gone away, perhaps to come back.
const KEPT: usize = 256;

/// One command.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) pid: i32,
    pub(crate) container: String,
    code: Mutex<Option<i32>>,
    changed: Condvar,
}

impl Exec {
    /// Waits for its end; asks now and then whether somebody still wants to know.
    pub(crate) fn wait(&self, wanted: impl Fn() -> bool) -> Option<i32> {
        let mut code = lock(&self.code);
        loop {
            if let Some(code) = *code {
                return Some(code);
            }
            code = self
                .changed
                .wait_timeout(code, Duration::from_secs(5))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            if code.is_none() && !wanted() {
                return None;
            }
        }
    }

    pub(crate) fn ended(&self) -> bool {
        lock(&self.code).is_some()
    }
}

#[derive(Debug, Default)]
struct Inner {
    all: HashMap<String, Arc<Exec>>,
    finished: VecDeque<String>,
    last: u64,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Execs(Mutex<Inner>);

impl Execs {
    /// A new one, running.
    pub(crate) fn add(&self, pid: i32, container: &str) -> (String, Arc<Exec>) {
        let mut inner = lock(&self.0);
        inner.last += 1;
        let id = format!("exec-{}", inner.last);
        let exec = Arc::new(Exec {
            pid,
            container: container.to_owned(),
            code: Mutex::new(None),
            changed: Condvar::new(),
        });
        inner.all.insert(id.clone(), Arc::clone(&exec));
        (id, exec)
    }

    /// It has ended.
    pub(crate) fn finish(&self, id: &str, exec: &Exec, code: i32) {
        *lock(&exec.code) = Some(code);
        exec.changed.notify_all();
        let mut inner = lock(&self.0);
        inner.finished.push_back(id.to_owned());
        if inner.finished.len() > KEPT
            && let Some(oldest) = inner.finished.pop_front()
        {
            inner.all.remove(&oldest);
        }
    }

    /// How many have not ended.
    pub(crate) fn running(&self) -> usize {
        lock(&self.0).all.values().filter(|exec| !exec.ended()).count()
    }

    pub(crate) fn get(&self, id: &str) -> Result<Arc<Exec>> {
        let inner = lock(&self.0);
        inner
            .all
            .get(id)
            .cloned()
            .ok_or_else(|| Error::NotFound { kind: "exec", id: id.chars().take(80).collect() })
    }

    /// Its exit code was told.
    pub(crate) fn forget(&self, id: &str) {
        let mut inner = lock(&self.0);
        inner.all.remove(id);
        inner.finished.retain(|f| f != id);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn codes_are_kept_but_not_without_bound() {
        let execs = Execs::default();
        for n in 0..KEPT + 10 {
            let (id, exec) = execs.add(1, "c");
            execs.finish(&id, &exec, i32::try_from(n).unwrap());
        }
        assert!(execs.get("exec-1").is_err());
        let last = execs.get(&format!("exec-{}", KEPT + 10)).unwrap();
        assert_eq!(last.wait(|| true), Some(265));
        let (id, running) = execs.add(1, "c");
        assert!(!running.ended() && execs.running() == 1);
        execs.forget(&id);
        assert!(execs.get(&id).is_err());
    }
}
