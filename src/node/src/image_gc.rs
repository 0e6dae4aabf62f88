//! Garbage collection of images, as the kubelet does it: every five minutes, events on the Node where it does not help.
//!
//! The policy is the node's; what is in use, pinned, young or long unused is known to the agent, which removes.

use std::{sync::Arc, time::Duration};

use moxlet_cri::host;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::{
    config::ImageGc,
    cri_client::Runtime,
    error::chain,
    events::{self, Kind, Recorder},
};

/// The kubelet's `ImageGCPeriod`.
const PERIOD: Duration = Duration::from_secs(300);

/// Works until stopped.
pub(crate) async fn run(
    agent: Arc<dyn Runtime>,
    recorder: Recorder,
    node: String,
    policy: ImageGc,
    stop: CancellationToken,
) {
    if policy.high_percent >= 100 && policy.max_age.is_none() {
        info!("garbage collection of images is off: its high threshold is 100 % and no age is too great");
        return;
    }
    let mut failed_before = false;
    let mut period = tokio::time::interval(PERIOD);
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = period.tick() => {}
        }
        let answer = tokio::select! {
            () = stop.cancelled() => return,
            answer = agent.collect_garbage(request(&policy)) => answer,
        };
        let outcome = match answer {
            Ok(done) => {
                for image in &done.removed {
                    info!(id = image.id, names = ?image.repo_tags, "an unused image was removed");
                }
                debug!(
                    usage_percent = done.usage_percent,
                    freed_bytes = done.freed_bytes,
                    "images collected"
                );
                match judge(&done) {
                    Some((Some(reason), message)) => {
                        recorder.emit(events::node_reference(&node), Kind::Warning, reason, message.clone());
                        Err(message)
                    }
                    Some((None, message)) => Err(message),
                    None => Ok(()),
                }
            }
            Err(error) => Err(chain(&error)),
        };
        match outcome {
            Ok(()) => failed_before = false,
            // Only what fails again is worth an event.
            Err(message) if failed_before => {
                error!(message, "image garbage collection failed again");
                recorder.emit(events::node_reference(&node), Kind::Warning, "ImageGCFailed", message);
            }
            Err(message) => {
                warn!(message, "image garbage collection failed");
                failed_before = true;
            }
        }
    }
}

fn request(policy: &ImageGc) -> host::ImageGarbageRequest {
    host::ImageGarbageRequest {
        everything_unused: false,
        high_percent: policy.high_percent.into(),
        low_percent: policy.low_percent.into(),
        min_age_seconds: policy.min_age.as_secs(),
        max_age_seconds: policy.max_age.map_or(0, |age| age.as_secs()),
    }
}

/// What was wrong with a collection: the reason of an event of its own, if it has one, and the kubelet's words.
fn judge(done: &host::ImageGarbageResponse) -> Option<(Option<&'static str>, String)> {
    if done.capacity_bytes == 0 {
        return Some((Some("InvalidDiskCapacity"), "invalid capacity 0 on image filesystem".to_owned()));
    }
    if !done.failures.is_empty() {
        let message = format!(
            "wanted to free {} bytes, but freed {} bytes space with errors in image deletion: [{}]",
            done.wanted_bytes,
            done.freed_bytes,
            done.failures.join(", ")
        );
        return Some((None, message));
    }
    if done.freed_bytes < done.wanted_bytes {
        let message = format!(
            "Insufficient free disk space on the node's image filesystem ({}% of {} used). Failed to free sufficient space by \
             deleting unused images (freed {} bytes). Investigate disk usage, as it could be used by active images, logs, \
             volumes, or other data.",
            done.usage_percent,
            size(done.capacity_bytes),
            done.freed_bytes
        );
        return Some((Some("FreeDiskSpaceFailed"), message));
    }
    None
}

/// Bytes in the units that the kubelet's message has.
fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_collection_that_freed_too_little_is_an_event() {
        let enough = host::ImageGarbageResponse { capacity_bytes: 10 << 30, ..Default::default() };
        assert!(judge(&enough).is_none());
        let short = host::ImageGarbageResponse {
            wanted_bytes: 5,
            freed_bytes: 4,
            usage_percent: 91,
            ..enough.clone()
        };
        let (reason, message) = judge(&short).unwrap();
        assert_eq!(reason, Some("FreeDiskSpaceFailed"));
        assert!(
            message.contains("(91% of 10.0 GiB used)") && message.contains("(freed 4 bytes)"),
            "{message}"
        );
        let failed = host::ImageGarbageResponse { failures: vec!["x: busy".into()], ..enough };
        assert_eq!(judge(&failed).unwrap().0, None);
        assert_eq!(judge(&host::ImageGarbageResponse::default()).unwrap().0, Some("InvalidDiskCapacity"));
    }
}
