//! How far a pull has come, for all who wait for it.
//!
//! What is counted is counted without locks; a look at it is taken five times a second and published where something
//! has changed.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    time::Duration,
};

use moxlet_ids::Digest;
use tokio::sync::watch;

/// The time between two looks.
const INTERVAL: Duration = Duration::from_millis(200);

/// How far a pull has come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PullProgress {
    /// The layers of the image, the bottom one first; none until its manifest is known.
    pub layers: Vec<LayerProgress>,
}

/// How far a layer has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerProgress {
    /// The digest of its blob.
    pub digest: Digest,
    /// The length of its blob in bytes.
    pub total: u64,
    /// How many of these have come.
    pub downloaded: u64,
    /// What is done with it.
    pub state: LayerState,
}

/// What is done with a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LayerState {
    /// Its turn has not come.
    Waiting,
    /// It comes, and is extracted on the way where it can be.
    Downloading,
    /// All of it has come, and the rest is extracted.
    Extracting,
    /// It is in the store.
    Done,
    /// It was in the store already.
    Present,
}

const STATES: [LayerState; 5] = [
    LayerState::Waiting,
    LayerState::Downloading,
    LayerState::Extracting,
    LayerState::Done,
    LayerState::Present,
];

/// What is counted of a layer.
#[derive(Debug, Default)]
pub(crate) struct Counter {
    downloaded: AtomicU64,
    state: AtomicU8,
}

impl Counter {
    /// So many bytes more have come.
    pub(crate) fn add(&self, bytes: usize) {
        self.downloaded.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// None of what has come counts.
    pub(crate) fn restart(&self) {
        self.downloaded.store(0, Ordering::Relaxed);
    }

    pub(crate) fn set(&self, state: LayerState) {
        let index = STATES.iter().position(|s| *s == state).unwrap_or(0);
        self.state.store(u8::try_from(index).unwrap_or(0), Ordering::Relaxed);
    }
}

/// What is published of one pull.
pub(crate) struct Reporter {
    out: watch::Sender<PullProgress>,
    layers: Mutex<Vec<(Digest, u64, Arc<Counter>)>>,
}

impl Reporter {
    pub(crate) fn new() -> (Self, watch::Receiver<PullProgress>) {
        let (out, progress) = watch::channel(PullProgress::default());
        (Self { out, layers: Mutex::default() }, progress)
    }

    /// Names the layers; their counters, in the same order.
    pub(crate) fn begin(&self, layers: impl Iterator<Item = (Digest, u64)>) -> Vec<Arc<Counter>> {
        let layers: Vec<_> = layers.map(|(digest, total)| (digest, total, Arc::default())).collect();
        let counters = layers.iter().map(|(_, _, counter)| Arc::clone(counter)).collect();
        *self.layers.lock().unwrap_or_else(PoisonError::into_inner) = layers;
        self.publish();
        counters
    }

    /// Publishes what has changed, for as long as it is polled.
    pub(crate) async fn run(&self) -> std::convert::Infallible {
        loop {
            tokio::time::sleep(INTERVAL).await;
            self.publish();
        }
    }

    /// Publishes what has changed, at once.
    pub(crate) fn publish(&self) {
        let layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let look = |(digest, total, counter): &(Digest, u64, Arc<Counter>)| {
            let state = STATES.get(usize::from(counter.state.load(Ordering::Relaxed)));
            LayerProgress {
                digest: digest.clone(),
                total: *total,
                downloaded: counter.downloaded.load(Ordering::Relaxed),
                state: state.copied().unwrap_or(LayerState::Waiting),
            }
        };
        let now = PullProgress { layers: layers.iter().map(look).collect() };
        self.out.send_if_modified(|published| {
            let changed = *published != now;
            *published = now;
            changed
        });
    }
}
