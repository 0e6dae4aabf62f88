//! What of a pod waits after a failure, and how long: restarts of containers, starts that could not be made, its sandbox, its
//! volumes.
//!
//! A wait of a container belongs to the image that it was tried with: who corrects the image does not wait for the old one
//! (the kubelet's key is a container's hash, of name and image).

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Container;

/// The kubelet's back-off of restarts: 10 s, doubling to 5 min, forgotten after twice the longest.
const FIRST_RESTART: Duration = Duration::from_secs(10);
const LAST_RESTART: Duration = Duration::from_secs(300);

/// Why a container waits: the reason and the message of its `state.waiting`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Waiting {
    /// One of the kubelet's words, such as `CreateContainerError`.
    pub(crate) reason: &'static str,
    /// What a person needs to know.
    pub(crate) message: String,
}

#[derive(Clone, Debug)]
struct Restart {
    image: String,
    delay: Duration,
    raised_at: Timestamp,
}

#[derive(Clone, Debug)]
struct Held {
    image: String,
    waiting: Waiting,
    until: Instant,
}

/// Doubling pauses between tries of one thing.
#[derive(Clone, Debug)]
pub(crate) struct Retry {
    first: Duration,
    longest: Duration,
    failures: u32,
    until: Option<Instant>,
}

impl Retry {
    fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, failures: 0, until: None }
    }

    /// It failed now; how long it waits.
    pub(crate) fn failed(&mut self, now: Instant) -> Duration {
        let pause = self.first.saturating_mul(2_u32.saturating_pow(self.failures.min(16))).min(self.longest);
        self.failures = self.failures.saturating_add(1);
        self.until = Some(now + pause);
        pause
    }

    /// It succeeded: the next failure waits the shortest time again.
    pub(crate) fn succeeded(&mut self) {
        (self.failures, self.until) = (0, None);
    }

    /// Whether it has failed since it last succeeded.
    pub(crate) fn has_failed(&self) -> bool {
        self.failures > 0
    }

    /// How long it is still not to be tried.
    pub(crate) fn remaining(&self, now: Instant) -> Option<Duration> {
        let left = self.until?.saturating_duration_since(now);
        (!left.is_zero()).then_some(left)
    }
}

/// An image whose pull failed.
#[derive(Clone, Debug)]
struct Image {
    retry: Retry,
    why: String,
}

/// All waits of one pod.
#[derive(Clone, Debug)]
pub(crate) struct Backoffs {
    restarts: HashMap<String, Restart>,
    images: HashMap<String, Image>,
    held: HashMap<String, Held>,
    /// Its sandbox: 1 s, doubling to 1 min.
    pub(crate) sandbox: Retry,
    /// Its volumes: the kubelet's half second, doubling to 2 min.
    pub(crate) volumes: Retry,
    /// The agent, which did not answer or answered with an error: 250 ms, doubling to 16 s.
    pub(crate) agent: Retry,
}

impl Default for Backoffs {
    fn default() -> Self {
        Self {
            restarts: HashMap::new(),
            images: HashMap::new(),
            held: HashMap::new(),
            sandbox: Retry::new(Duration::from_secs(1), Duration::from_secs(60)),
            volumes: Retry::new(Duration::from_millis(500), Duration::from_secs(120)),
            agent: Retry::new(Duration::from_millis(250), Duration::from_secs(16)),
        }
    }
}

fn image(container: &Container) -> &str {
    container.image.as_deref().unwrap_or_default()
}

fn since(later: Timestamp, earlier: Timestamp) -> Duration {
    Duration::try_from(later.duration_since(earlier)).unwrap_or(Duration::ZERO)
}

impl Backoffs {
    /// How long a container that ended at `finished` must wait before it is started again, and the whole length of its wait.
    pub(crate) fn restart(
        &self,
        container: &Container,
        finished: Timestamp,
        now: Timestamp,
    ) -> Option<(Duration, Duration)> {
        let entry = self.restarts.get(&container.name).filter(|e| e.image == image(container))?;
        if since(finished, entry.raised_at) > 2 * LAST_RESTART {
            return None;
        }
        // A clock that is set back does not make the wait longer than it is.
        let left = entry.delay.checked_sub(since(now, finished)).filter(|d| !d.is_zero())?;
        Some((left, entry.delay))
    }

    /// A container that ended at `finished` is started again now: its next end is waited for longer.
    pub(crate) fn restarting(&mut self, container: &Container, finished: Timestamp, now: Timestamp) {
        let delay = match self.restarts.get(&container.name) {
            Some(e) if e.image == image(container) && since(finished, e.raised_at) <= 2 * LAST_RESTART => {
                (e.delay * 2).min(LAST_RESTART)
            }
            _ => FIRST_RESTART,
        };
        let entry = Restart { image: image(container).to_owned(), delay, raised_at: now };
        self.restarts.insert(container.name.clone(), entry);
    }

    /// A container could not be started and is not tried again for so long.
    pub(crate) fn hold(&mut self, container: &Container, waiting: Waiting, pause: Duration, now: Instant) {
        let held = Held { image: image(container).to_owned(), waiting, until: now + pause };
        self.held.insert(container.name.clone(), held);
    }

    /// Why a container could not be started when it was last tried with this image, and how long it still waits (zero: it may be
    /// tried).
    pub(crate) fn held(&self, container: &Container, now: Instant) -> Option<(&Waiting, Duration)> {
        let held = self.held.get(&container.name).filter(|h| h.image == image(container))?;
        Some((&held.waiting, held.until.saturating_duration_since(now)))
    }

    /// How long the image of that name is not to be pulled, and why its last pull failed.
    pub(crate) fn image(&self, name: &str, now: Instant) -> Option<(Duration, String)> {
        let image = self.images.get(name)?;
        Some((image.retry.remaining(now)?, image.why.clone()))
    }

    /// The pull of an image failed: the kubelet's 10 s, doubling to 5 min.
    pub(crate) fn image_failed(&mut self, name: &str, why: String, now: Instant) {
        let new = || Image { retry: Retry::new(FIRST_RESTART, LAST_RESTART), why: String::new() };
        let image = self.images.entry(name.to_owned()).or_insert_with(new);
        image.retry.failed(now);
        image.why = why;
    }

    /// The image is there.
    pub(crate) fn image_pulled(&mut self, name: &str) {
        self.images.remove(name);
    }

    /// A container has started.
    pub(crate) fn started(&mut self, container: &Container) {
        self.held.remove(&container.name);
    }
}

/// A length of time as Go writes it: `10s`, `2m40s`, `5m0s`.
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

    fn container(image: &str) -> Container {
        Container { name: "c".into(), image: Some(image.into()), ..Container::default() }
    }

    #[test]
    fn the_first_restart_is_immediate_then_10_s_doubling_to_5_min() {
        let (mut backoffs, c) = (Backoffs::default(), container("a:1"));
        let mut now = 0;
        assert!(backoffs.restart(&c, at(now), at(now)).is_none());
        for want in [10, 20, 40, 80, 160, 300, 300] {
            backoffs.restarting(&c, at(now), at(now));
            let (left, delay) = backoffs.restart(&c, at(now), at(now)).unwrap();
            assert_eq!((left.as_secs(), delay.as_secs()), (want, want));
            now += i64::try_from(want).unwrap();
            assert!(backoffs.restart(&c, at(now - i64::try_from(want).unwrap()), at(now)).is_none());
        }
    }

    #[test]
    fn a_container_that_ran_for_10_min_starts_afresh() {
        let (mut backoffs, c) = (Backoffs::default(), container("a:1"));
        backoffs.restarting(&c, at(0), at(0));
        backoffs.restarting(&c, at(10), at(10));
        assert!(backoffs.restart(&c, at(620), at(620)).is_none());
        backoffs.restarting(&c, at(620), at(620));
        assert_eq!(backoffs.restart(&c, at(621), at(621)).unwrap().1, FIRST_RESTART);
    }

    #[test]
    fn a_corrected_image_waits_neither_for_the_restarts_nor_for_the_failed_starts_of_the_old_one() {
        let (mut backoffs, old, new) = (Backoffs::default(), container("a:1"), container("a:2"));
        let now = Instant::now();
        backoffs.restarting(&old, at(0), at(0));
        let waiting = Waiting { reason: "InvalidImageName", message: "no".into() };
        backoffs.hold(&old, waiting.clone(), Duration::from_secs(60), now);
        assert_eq!(backoffs.held(&old, now), Some((&waiting, Duration::from_secs(60))));
        assert_eq!(backoffs.held(&new, now), None);
        assert!(backoffs.restart(&old, at(1), at(1)).is_some());
        assert!(backoffs.restart(&new, at(1), at(1)).is_none());
    }

    #[test]
    fn a_clock_that_is_set_back_makes_no_wait_longer() {
        let (mut backoffs, c) = (Backoffs::default(), container("a:1"));
        backoffs.restarting(&c, at(0), at(0));
        assert_eq!(backoffs.restart(&c, at(0), at(-3600)).unwrap().0, FIRST_RESTART);
    }

    #[test]
    fn a_retry_doubles_to_its_longest_and_begins_anew_after_a_success() {
        let mut retry = Retry::new(Duration::from_secs(1), Duration::from_secs(5));
        let now = Instant::now();
        let pauses: Vec<_> = (0..5).map(|_| retry.failed(now).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 5, 5]);
        assert_eq!(retry.remaining(now), Some(Duration::from_secs(5)));
        assert_eq!(retry.remaining(now + Duration::from_secs(5)), None);
        retry.succeeded();
        assert_eq!(retry.failed(now), Duration::from_secs(1));
    }

    #[test]
    fn lengths_are_written_as_go_does() {
        assert_eq!(go_duration(FIRST_RESTART), "10s");
        assert_eq!(go_duration(Duration::from_secs(160)), "2m40s");
        assert_eq!(go_duration(LAST_RESTART), "5m0s");
    }
}
