//! Memory that a burst of pods or a large stream needed goes back to the system: glibc keeps what was freed in arenas of its
//! threads until it is told to trim them, and this program shall stay small on a host that is there for pods.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// Arenas of the allocator: more would each keep their own free memory; two are enough for what runs side by side here.
const ARENAS: libc::c_int = 2;
/// How often the size is looked at.
const PERIOD: Duration = Duration::from_secs(10);
/// How many bytes of growth since the last time are worth a trim.
const WORTH: u64 = 2 << 20;

/// Bounds the allocator's arenas; to be called before threads are started.
pub(crate) fn bound_arenas() {
    // SAFETY: sets a parameter of the allocator; nothing else runs yet.
    #[allow(unsafe_code)]
    let done = unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
    debug_assert_eq!(done, 1);
}

/// Gives memory back until the token is cancelled.
pub(crate) async fn keep_small(stop: CancellationToken) {
    let mut low = resident().unwrap_or(0);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(PERIOD) => {}
        }
        if resident().is_none_or(|now| now < low.saturating_add(WORTH)) {
            continue;
        }
        let trimmed = tokio::task::spawn_blocking(|| {
            // SAFETY: releases free memory of the allocator; it may be called at any time from any thread.
            #[allow(unsafe_code)]
            unsafe {
                libc::malloc_trim(0)
            }
        });
        let _ = trimmed.await;
        low = resident().unwrap_or(0);
    }
}

/// Bytes of this process in memory.
fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let kilobytes: u64 =
        text.lines().find_map(|l| l.strip_prefix("VmRSS:"))?.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_process_has_a_size() {
        assert!(super::resident().is_some_and(|bytes| bytes > 100_000));
    }
}
