//! Removal of images for their age or for want of space, by the rules of the kubelet's image_gc_manager: never what a
//! container uses or what is pinned; what was not used for longest goes first; what has just come stays.
//!
//! Unlike the kubelet, which begins anew with each of its starts, last uses are remembered on disk, and what a removal
//! has freed is the sum of the layers that went: images share layers, so the sum of their sizes says little.

use std::time::Duration;

use jiff::Timestamp;

use crate::{ImageRecord, ImageStore, Result};

/// What is removed when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GarbagePolicy {
    /// Images are removed once the file system is this full, in percent (0 to 100); 100 turns it off.
    pub high_percent: u8,
    /// Then they are removed until it is this full, in percent.
    pub low_percent: u8,
    /// What is younger stays, whatever the disk says.
    pub min_age: Duration,
    /// What was not used for so long goes, however much space there is.
    pub max_age: Option<Duration>,
}

impl Default for GarbagePolicy {
    fn default() -> Self {
        Self { high_percent: 85, low_percent: 80, min_age: Duration::from_secs(120), max_age: None }
    }
}

/// What a garbage collection has done.
#[derive(Debug, Clone, Default)]
pub struct Garbage {
    /// The images that went.
    pub removed: Vec<ImageRecord>,
    /// Bytes of layers that went, with them or left by pulls that never ended.
    pub freed_bytes: u64,
    /// Bytes that had to go to reach the low threshold; 0 below the high one.
    pub wanted_bytes: u64,
    /// How full the file system was before, in percent.
    pub usage_percent: u8,
    /// Its size in bytes.
    pub capacity_bytes: u64,
    /// Images that could not be removed, and why.
    pub failures: Vec<String>,
}

impl Garbage {
    /// Whether less went than had to.
    #[must_use]
    pub fn fell_short(&self) -> bool {
        self.freed_bytes < self.wanted_bytes
    }
}

/// An image that may go.
#[derive(Debug, Clone)]
struct Candidate {
    image: ImageRecord,
    added_at: Timestamp,
    last_used: Timestamp,
}

/// How long ago something was; nothing where the clock was set back.
fn age(now: Timestamp, then: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(then)).unwrap_or_default()
}

/// Parts what is too old from what may go for want of space, the latter in the order in which it goes.
fn sort(mut all: Vec<Candidate>, policy: &GarbagePolicy, now: Timestamp) -> (Vec<Candidate>, Vec<Candidate>) {
    all.sort_by_key(|c| (c.last_used, c.added_at));
    let old = |c: &Candidate| policy.max_age.is_some_and(|max| age(now, c.last_used) > max);
    let (old, rest): (Vec<_>, Vec<_>) = all.into_iter().partition(old);
    (old, rest.into_iter().filter(|c| age(now, c.added_at) >= policy.min_age).collect())
}

/// How full a file system is and what has to go of it.
fn wanted(capacity: u64, available: u64, policy: &GarbagePolicy) -> (u8, u64) {
    let (capacity, available) = (u128::from(capacity), u128::from(available.min(capacity)));
    let Some(free) = (available * 100).checked_div(capacity) else { return (0, 0) };
    let used = u8::try_from(100 - free).unwrap_or(100);
    if used < policy.high_percent || policy.high_percent >= 100 {
        return (used, 0);
    }
    let free_at_low = capacity * u128::from(100 - policy.low_percent.min(100)) / 100;
    (used, u64::try_from(free_at_low.saturating_sub(available)).unwrap_or(u64::MAX))
}

impl ImageStore {
    /// Removes images by a policy.
    ///
    /// # Errors
    /// The driver cannot be asked. What could not be removed is told in [`Garbage::failures`].
    pub async fn collect_garbage(&self, policy: &GarbagePolicy) -> Result<Garbage> {
        let _one = self.collecting.lock().await;
        let now = Timestamp::now();
        let (old, rest) = sort(self.candidates().await?, policy, now);
        let mut done = Garbage::default();
        for candidate in old {
            self.discard(candidate, &mut done).await;
        }
        let disk = self.store.driver.fs_usage().await?;
        done.capacity_bytes = disk.capacity_bytes;
        let freed_before = done.freed_bytes;
        (done.usage_percent, done.wanted_bytes) = wanted(disk.capacity_bytes, disk.available_bytes, policy);
        if done.wanted_bytes > 0 {
            self.discard_leftovers(&mut done).await;
        }
        for candidate in rest {
            if done.freed_bytes - freed_before >= done.wanted_bytes {
                break;
            }
            self.discard(candidate, &mut done).await;
        }
        if done.wanted_bytes > 0 {
            // What went for its age was not part of it.
            done.wanted_bytes = done.wanted_bytes.saturating_add(freed_before);
        }
        Ok(done)
    }

    /// Removes every image that nobody uses, that is not pinned and that has been here for at least `min_age`.
    ///
    /// # Errors
    /// As [`Self::collect_garbage`].
    pub async fn prune(&self, min_age: Duration) -> Result<Garbage> {
        let _one = self.collecting.lock().await;
        let mut done = Garbage::default();
        self.discard_leftovers(&mut done).await;
        let policy = GarbagePolicy { min_age, ..GarbagePolicy::default() };
        for candidate in sort(self.candidates().await?, &policy, Timestamp::now()).1 {
            self.discard(candidate, &mut done).await;
        }
        Ok(done)
    }

    /// The images that nobody uses and that are not pinned. Those in use are noted as used now.
    async fn candidates(&self) -> Result<Vec<Candidate>> {
        let users = self.store.users().await?;
        let store = self.store.clone();
        self.store
            .writing(move || {
                let mut all = Vec::new();
                for image in store.list() {
                    if !users.of(&image).is_empty() {
                        store.touch(&image.id);
                    } else if !image.pinned {
                        let known =
                            store.look_up(image.id.as_str())?.and_then(|(_, details)| details.added_at);
                        let added_at = known.unwrap_or(Timestamp::UNIX_EPOCH);
                        let last_used = store.last_used(&image.id).unwrap_or(added_at).max(added_at);
                        all.push(Candidate { image, added_at, last_used });
                    }
                }
                Ok(all)
            })
            .await
    }

    /// Layers that no image has: a pull that failed or was given up leaves those that were complete to the next attempt.
    async fn discard_leftovers(&self, done: &mut Garbage) {
        match self.store.collect().await {
            Ok(freed) => done.freed_bytes = done.freed_bytes.saturating_add(freed),
            Err(error) => done.failures.push(format!("layers without an image: {error}")),
        }
    }

    async fn discard(&self, candidate: Candidate, done: &mut Garbage) {
        match self.store.remove_idle(&candidate.image.id).await {
            Ok(Some(freed)) => {
                let image = candidate.image;
                tracing::info!(id = %image.id, names = ?image.repo_tags, freed, "an unused image is removed");
                done.freed_bytes = done.freed_bytes.saturating_add(freed);
                done.removed.push(image);
            }
            Ok(None) => {}
            Err(error) => done.failures.push(format!("{}: {error}", candidate.image.id)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use moxlet_ids::Digest;

    use super::*;

    fn candidate(name: &str, added: i64, used: i64) -> Candidate {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let image = ImageRecord {
            id: Digest::of(name.as_bytes()),
            repo_tags: vec![name.to_owned()],
            repo_digests: Vec::new(),
            size_bytes: 0,
            layers: Vec::new(),
            pinned: false,
            config: std::sync::Arc::default(),
        };
        Candidate { image, added_at: at(added), last_used: at(used) }
    }

    fn names(all: &[Candidate]) -> Vec<&str> {
        all.iter().map(|c| c.image.repo_tags[0].as_str()).collect()
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first_and_what_is_new_stays() {
        let now = Timestamp::from_second(10_000).unwrap();
        let all = vec![
            candidate("c", 0, 9000),
            candidate("new", 9990, 9990),
            candidate("a", 5, 10),
            candidate("b", 6, 10),
        ];
        let policy = GarbagePolicy::default();
        let (old, rest) = sort(all.clone(), &policy, now);
        assert!(old.is_empty());
        assert_eq!(names(&rest), ["a", "b", "c"]);
        let policy = GarbagePolicy { max_age: Some(Duration::from_secs(5000)), ..policy };
        let (old, rest) = sort(all, &policy, now);
        assert_eq!((names(&old), names(&rest)), (vec!["a", "b"], vec!["c"]));
    }

    #[test]
    fn space_is_wanted_from_the_high_threshold_down_to_the_low_one() {
        let policy = GarbagePolicy::default();
        assert_eq!(wanted(1000, 151, &policy), (85, 49));
        assert_eq!(wanted(1000, 160, &policy), (84, 0));
        assert_eq!(wanted(1000, 0, &policy), (100, 200));
        assert_eq!(wanted(0, 0, &policy), (0, 0));
        assert_eq!(wanted(1000, 0, &GarbagePolicy { high_percent: 100, ..policy }), (100, 0));
        assert_eq!(wanted(u64::MAX, 0, &policy).0, 100);
    }
}
