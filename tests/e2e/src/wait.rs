//! Waiting: poll until something holds, and say what was waited for and what was seen last.

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

/// How many times longer everything takes here than on an idle machine: `MOXLET_TEST_SLOW`, 1 unless set.
static SLOW: LazyLock<u32> = LazyLock::new(|| {
    std::env::var("MOXLET_TEST_SLOW").map_or(1, |text| text.parse().expect("MOXLET_TEST_SLOW is a number"))
});

/// For what takes seconds on an idle machine.
pub const SHORT: Duration = Duration::from_secs(60);
/// For what takes longer by design, such as a back-off.
pub const LONG: Duration = Duration::from_secs(180);

/// Polls until `check` gives a value; its error is what was seen last.
///
/// # Panics
/// After [`SHORT`].
pub fn eventually<T>(what: &str, check: impl FnMut() -> Result<T, String>) -> T {
    eventually_within(SHORT, what, check)
}

/// As [`eventually`], with a limit.
///
/// # Panics
/// When the limit has passed.
pub fn eventually_within<T>(limit: Duration, what: &str, mut check: impl FnMut() -> Result<T, String>) -> T {
    let (start, limit) = (Instant::now(), limit * *SLOW);
    loop {
        match check() {
            Ok(value) => return value,
            Err(seen) if start.elapsed() > limit => {
                panic!("waited {} s in vain for {what}; last seen: {seen}", limit.as_secs())
            }
            Err(_) => std::thread::sleep(Duration::from_millis(150)),
        }
    }
}
