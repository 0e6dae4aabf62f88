//! Waiting: poll until something holds; what was seen last is in the message when it never does.

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

/// How many times longer everything takes here than on an idle machine: `MOXLET_TEST_SLOW`, 1 unless set.
static SLOW: LazyLock<u32> = LazyLock::new(|| {
    std::env::var("MOXLET_TEST_SLOW").map_or(1, |text| text.parse().expect("MOXLET_TEST_SLOW is a number"))
});
/// For what takes a moment on an idle machine.
const LIMIT: Duration = Duration::from_secs(30);
/// Looking is work, too: the slower the machine, the more rarely.
const PAUSE: Duration = Duration::from_millis(20);

/// So many times longer everything takes here.
#[must_use]
pub fn slowness() -> u32 {
    *SLOW
}

/// Polls until `check` gives a value; its error is what was seen.
pub async fn until<T>(what: &str, mut check: impl AsyncFnMut() -> Result<T, String>) -> T {
    let (start, limit, pause) = (Instant::now(), LIMIT * *SLOW, PAUSE * *SLOW);
    loop {
        match check().await {
            Ok(value) => return value,
            Err(seen) if start.elapsed() > limit => {
                panic!("waited {} s in vain for {what}; last seen: {seen}", limit.as_secs())
            }
            Err(_) => tokio::time::sleep(pause).await,
        }
    }
}
