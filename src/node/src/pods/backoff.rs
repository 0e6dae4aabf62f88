//! The kubelet's back-off: 10 s, doubling to 5 min, forgotten 10 min after it was last raised.

use std::{collections::HashMap, time::Duration};

use jiff::Timestamp;

const FIRST: Duration = Duration::from_secs(10);
const MOST: Duration = Duration::from_secs(300);

#[derive(Clone, Copy, Debug)]
struct Entry {
    delay: Duration,
    raised_at: Timestamp,
}

/// Back-offs by key (a container's name, an image).
#[derive(Clone, Debug, Default)]
pub(crate) struct Backoff {
    entries: HashMap<String, Entry>,
}

fn since(later: Timestamp, earlier: Timestamp) -> Duration {
    Duration::try_from(later.duration_since(earlier)).unwrap_or(Duration::ZERO)
}

impl Backoff {
    /// How long `key`, which failed at `failed_at`, must still wait, and the back-off's whole length.
    pub(crate) fn remaining(
        &self,
        key: &str,
        failed_at: Timestamp,
        now: Timestamp,
    ) -> Option<(Duration, Duration)> {
        let entry = self.entries.get(key)?;
        if since(failed_at, entry.raised_at) > 2 * MOST {
            return None;
        }
        let left = entry.delay.checked_sub(since(now, failed_at)).filter(|d| !d.is_zero())?;
        Some((left, entry.delay))
    }

    /// `key` is tried again now: the next failure waits longer.
    pub(crate) fn raise(&mut self, key: &str, failed_at: Timestamp, now: Timestamp) {
        let delay = match self.entries.get(key) {
            Some(e) if since(failed_at, e.raised_at) <= 2 * MOST => (e.delay * 2).min(MOST),
            _ => FIRST,
        };
        self.entries.insert(key.to_owned(), Entry { delay, raised_at: now });
    }

    /// `key` has succeeded.
    pub(crate) fn clear(&mut self, key: &str) {
        self.entries.remove(key);
    }
}

/// A back-off's length as Go writes it: `10s`, `2m40s`, `5m0s`.
pub(crate) fn go_duration(d: Duration) -> String {
    match (d.as_secs() / 60, d.as_secs() % 60) {
        (0, s) => format!("{s}s"),
        (m, s) => format!("{m}m{s}s"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + seconds).unwrap()
    }

    #[test]
    fn the_first_restart_is_immediate_then_10_s_doubling_to_5_min() {
        let mut backoff = Backoff::default();
        let mut now = 0;
        assert!(backoff.remaining("c", at(now), at(now)).is_none());
        for want in [10, 20, 40, 80, 160, 300, 300] {
            backoff.raise("c", at(now), at(now));
            let (left, delay) = backoff.remaining("c", at(now), at(now)).unwrap();
            assert_eq!((left.as_secs(), delay.as_secs()), (want, want));
            now += i64::try_from(want).unwrap();
            assert!(backoff.remaining("c", at(now - i64::try_from(want).unwrap()), at(now)).is_none());
        }
    }

    #[test]
    fn a_container_that_ran_for_10_min_starts_afresh() {
        let mut backoff = Backoff::default();
        backoff.raise("c", at(0), at(0));
        backoff.raise("c", at(10), at(10));
        assert!(backoff.remaining("c", at(620), at(620)).is_none());
        backoff.raise("c", at(620), at(620));
        assert_eq!(backoff.remaining("c", at(621), at(621)).unwrap().1, FIRST);
    }

    #[test]
    fn lengths_are_written_as_go_does() {
        assert_eq!(go_duration(FIRST), "10s");
        assert_eq!(go_duration(Duration::from_secs(160)), "2m40s");
        assert_eq!(go_duration(MOST), "5m0s");
    }
}
