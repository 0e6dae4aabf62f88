//! Waiting: poll until something holds; what was seen last is in the message when it never does.

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

/// For what takes a moment on an idle machine; `MOXLET_TEST_SLOW` multiplies it where everything takes that many times longer.
static LIMIT: LazyLock<Duration> = LazyLock::new(|| {
    let times = std::env::var("MOXLET_TEST_SLOW")
        .map_or(1, |text| text.parse().expect("MOXLET_TEST_SLOW is a number"));
    Duration::from_secs(30).saturating_mul(times)
});
const PAUSE: Duration = Duration::from_millis(20);

/// Polls until `check` gives a value; its error is what was seen.
pub async fn until<T>(what: &str, mut check: impl AsyncFnMut() -> Result<T, String>) -> T {
    let start = Instant::now();
    loop {
        match check().await {
            Ok(value) => return value,
            Err(seen) if start.elapsed() > *LIMIT => {
                panic!("waited {} s in vain for {what}; last seen: {seen}", LIMIT.as_secs())
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}
