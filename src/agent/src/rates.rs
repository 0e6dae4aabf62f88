//! CPU time used a second, CRI's `usageNanoCores`: what has been used since somebody asked before.

use std::collections::BTreeMap;

use moxlet_ids::{ContainerId, SandboxId};
use parking_lot::Mutex;

/// Over a shorter time than this a rate says nothing, in nanoseconds.
const SHORTEST: i64 = 1_000_000_000;
/// Whoever was not asked after for so long is forgotten, in nanoseconds.
const LONGEST: i64 = 600_000_000_000;

/// Whose CPU time it is: a CT's, or a container's in it.
type Key = (SandboxId, Option<ContainerId>);

#[derive(Debug)]
struct Sample {
    at_ns: i64,
    cpu_ns: u64,
    rate: Option<u64>,
}

/// The last samples.
#[derive(Debug, Default)]
pub(crate) struct Rates(Mutex<BTreeMap<Key, Sample>>);

impl Rates {
    /// Billionths of a CPU, given the time used until now; none at the first sample.
    pub(crate) fn rate(&self, key: Key, cpu_ns: u64, now_ns: i64) -> Option<u64> {
        let mut samples = self.0.lock();
        samples.retain(|_, sample| now_ns - sample.at_ns < LONGEST);
        let Some(last) = samples.get_mut(&key) else {
            samples.insert(key, Sample { at_ns: now_ns, cpu_ns, rate: None });
            return None;
        };
        let time = now_ns - last.at_ns;
        if time < SHORTEST {
            return last.rate;
        }
        let used = u128::from(cpu_ns.saturating_sub(last.cpu_ns)) * 1_000_000_000;
        let rate = u64::try_from(used / u128::from(time.unsigned_abs())).ok();
        *last = Sample { at_ns: now_ns, cpu_ns, rate };
        rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_of_the_time_since_the_last_sample_that_is_a_second_old() {
        let (rates, key) = (Rates::default(), (SandboxId::random(), None));
        let at = |s: i64| s * 1_000_000_000;
        assert_eq!(rates.rate(key.clone(), 5, at(100)), None);
        assert_eq!(rates.rate(key.clone(), 500_000_005, at(101)), Some(500_000_000));
        assert_eq!(rates.rate(key.clone(), 500_000_006, at(101) + 10), Some(500_000_000), "too soon");
        assert_eq!(rates.rate(key.clone(), 4_500_000_005, at(103)), Some(2_000_000_000));
        assert_eq!(rates.rate(key.clone(), 0, at(104)), Some(0), "a cgroup that was made anew");
        assert_eq!(rates.rate(key, 1, at(1000)), None, "forgotten");
    }
}
