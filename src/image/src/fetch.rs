//! The layers of an image: several come at once, each is extracted while it comes.
//!
//! A layer begins after those below it have begun, so that whoever waits waits for something further down. On a driver
//! with [`WhiteoutStyle::Overlay`] layers are extracted side by side; what one needs of those below is looked up at its
//! end. With [`WhiteoutStyle::Apply`] a layer is extracted when the one below is there, and fetched ahead before.
//!
//! An extraction blocks a thread, and may wait there for those below. It has one of the store's [`WORKERS`](crate::store::WORKERS), and has it before
//! the layers above begin: so the lowest layer that is not there yet always goes on, and enough threads are left for all else.

use std::{path::PathBuf, sync::Arc};

use futures::{StreamExt, stream::FuturesUnordered};
use moxlet_ids::ChainId;
use moxlet_storage::{Driver, LayerDraft, WhiteoutStyle};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    Error, Result,
    download::download,
    layer::{self, Claim, Fault, Lower, Source, Target, Unpacked},
    progress::{Counter, LayerState, Reporter},
    registry::{Served, Session, manifest::Descriptor},
    store::{Store, TapeDraft},
};

/// A layer of the image, with all that its extraction needs to know.
pub(crate) struct Job {
    pub(crate) part: String,
    pub(crate) blob: Descriptor,
    pub(crate) claim: Claim,
    pub(crate) chain: ChainId,
    pub(crate) parent: Option<ChainId>,
}

/// Why a layer was not extracted.
enum Failed {
    Unpack(Fault),
    /// Its tape was not put in its place.
    Keep(Error),
}

/// What the layers of one pull share.
struct Pull<'a> {
    store: &'a Arc<Store>,
    session: &'a Session<'a>,
    chains: Vec<ChainId>,
    /// After a failure the others are stopped and waited for, so that nothing appears once the pull has ended.
    stop: CancellationToken,
    /// How many layers have begun, from the bottom.
    begun: watch::Sender<usize>,
    /// Which layers are in the store.
    done: watch::Sender<Vec<bool>>,
    /// How many come at once.
    slots: Semaphore,
    ahead: Arc<Semaphore>,
}

/// Makes sure that all layers are in the store; how many bytes that took.
pub(crate) async fn layers(
    store: &Arc<Store>,
    session: &Session<'_>,
    jobs: Vec<Job>,
    progress: &Reporter,
) -> Result<u64> {
    let counters = progress.begin(jobs.iter().map(|j| (j.blob.digest.clone(), j.blob.size)));
    let pull = Pull {
        store,
        session,
        chains: jobs.iter().map(|j| j.chain.clone()).collect(),
        stop: CancellationToken::new(),
        begun: watch::Sender::new(0),
        done: watch::Sender::new(vec![false; jobs.len()]),
        slots: Semaphore::new(store.settings.max_parallel_downloads.clamp(1, Semaphore::MAX_PERMITS)),
        ahead: Arc::new(layer::room(store.settings.prefetch_max_bytes)),
    };
    let pull = &pull;
    // Whoever gives the pull up gives its extractions up.
    let _stopped = pull.stop.clone().drop_guard();
    let mut fetches: FuturesUnordered<_> = jobs
        .into_iter()
        .zip(counters)
        .enumerate()
        .map(|(n, (job, counter))| Box::pin(pull.layer(n, job, counter)))
        .collect();
    let all = async {
        let (mut fetched, mut failed) = (0_u64, None);
        while let Some(outcome) = fetches.next().await {
            match outcome {
                Ok(bytes) => fetched += bytes,
                // Those that were stopped say nothing new.
                Err(error) => {
                    pull.stop.cancel();
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(fetched), Err)
    };
    tokio::select! {
        outcome = all => outcome,
        never = progress.run() => match never {},
    }
}

/// What a layer holds while it comes.
struct Seat<'a> {
    slot: Option<SemaphorePermit<'a>>,
    _worker: Option<SemaphorePermit<'a>>,
}

impl Pull<'_> {
    /// Makes sure that the layer is in the store; how many bytes that took.
    async fn layer(&self, n: usize, job: Job, counter: Arc<Counter>) -> Result<u64> {
        let mut begun = self.begun.subscribe();
        self.unless_stopped(begun.wait_for(|b| *b >= n)).await?.map_err(|_| Error::Stopped)?;
        // Images that share a layer are often pulled at the same time; the second one finds it.
        let turn = self.store.turn(&job.chain);
        let _turn = self.unless_stopped(turn.lock()).await?;
        if self.store.driver.has_layer(&job.chain).await? {
            counter.set(LayerState::Present);
            self.finished(n);
            return Ok(0);
        }
        let mut seat = self.seat(n).await?;
        let (draft, unpacked) = loop {
            let mut served = Served::default();
            match self.bring(n, &job, &counter, &mut served, &mut seat).await {
                // Another host may have the right one.
                Err(_) if self.session.distrust(&served) => counter.restart(),
                brought => break brought?,
            }
        };
        self.store.driver.commit_layer(draft, &job.chain, unpacked.usage).await?;
        counter.set(LayerState::Done);
        self.finished(n);
        Ok(job.blob.size)
    }

    /// What a layer needs to begin, which it keeps however often it is tried: those above it wait for it with theirs.
    async fn seat(&self, n: usize) -> Result<Seat<'_>> {
        let slot = self.unless_stopped(self.slots.acquire()).await?.map_err(|_| Error::Stopped)?;
        // Applied one after the other, layers wait for their turn without a thread.
        let worker = match self.store.driver.whiteouts() {
            WhiteoutStyle::Overlay => Some(self.worker().await?),
            WhiteoutStyle::Apply => None,
        };
        self.begun.send_modify(|begun| *begun = (*begun).max(n + 1));
        Ok(Seat { slot: Some(slot), _worker: worker })
    }

    async fn worker(&self) -> Result<SemaphorePermit<'_>> {
        self.unless_stopped(self.store.workers.acquire()).await?.map_err(|_| Error::Stopped)
    }

    /// Downloads and extracts a layer.
    async fn bring(
        &self,
        n: usize,
        job: &Job,
        counter: &Arc<Counter>,
        served: &mut Served,
        seat: &mut Seat<'_>,
    ) -> Result<(LayerDraft, Unpacked)> {
        counter.set(LayerState::Downloading);
        let (out, pieces) = mpsc::channel(layer::WAITING);
        let downloading = async {
            let got =
                self.unless_stopped(download(self.session, &job.blob, &job.part, out, &mut *served)).await;
            // The next one is fetched ahead. Where several are extracted at once it comes when one of them has gone.
            if self.store.driver.whiteouts() == WhiteoutStyle::Apply {
                seat.slot = None;
            }
            counter.set(LayerState::Extracting);
            got?
        };
        let source = Source::new(pieces, Some(Arc::clone(counter))).until(self.stop.clone());
        let (downloaded, extracted) = futures::join!(downloading, self.extract(n, job, source));
        // Why nothing more came is known better by who fetched it.
        downloaded?;
        // The blob's own digest or length; that of the archive in it is the config's matter.
        served.lied |= matches!(&extracted, Err(Error::DigestMismatch { part, .. }) if *part == job.part);
        extracted
    }

    async fn unless_stopped<T>(&self, what: impl Future<Output = T>) -> Result<T> {
        self.stop.run_until_cancelled(what).await.ok_or(Error::Stopped)
    }

    fn finished(&self, n: usize) {
        self.begun.send_modify(|begun| *begun = (*begun).max(n + 1));
        self.done.send_modify(|done| {
            if let Some(layer) = done.get_mut(n) {
                *layer = true;
            }
        });
    }

    /// Extracts a layer into a draft; its tape is in place then.
    async fn extract(&self, n: usize, job: &Job, mut source: Source) -> Result<(LayerDraft, Unpacked)> {
        let style = self.store.driver.whiteouts();
        if style == WhiteoutStyle::Apply {
            let mut done = self.done.subscribe();
            let turn = self.unless_stopped(async move {
                done.wait_for(|done| done.iter().take(n).all(|d| *d)).await.map(drop)
            });
            let path = self.store.records.draft_path();
            let turn = source.fetch_ahead(turn, &self.ahead, &path).await;
            let turn = turn.map_err(|e| match layer::is_cut(&e) {
                true => Error::Stopped,
                false => Error::Io { what: "write", path, source: Arc::new(e) },
            });
            turn??.map_err(|_| Error::Stopped)?;
        }
        let _worker = match style {
            WhiteoutStyle::Apply => Some(self.worker().await?),
            WhiteoutStyle::Overlay => None,
        };
        let draft = self.store.driver.begin_layer(job.parent.as_ref()).await?;
        let tape = TapeDraft::new(&self.store.records);
        let (store, chain) = (Arc::clone(self.store), job.chain.clone());
        let below = self.below(n);
        let claim = job.claim.clone();
        // Draft and tape go with the worker: they are not removed while something is still written in them.
        let worker = tokio::task::spawn_blocking(move || {
            let target = Target {
                root: draft.path(),
                style,
                bottom: n == 0,
                tape: Some(tape.path()),
                below: Some(Box::new(below)),
            };
            let unpacked = layer::unpack(source, &claim, target).map_err(Failed::Unpack)?;
            tape.keep(&store.records, &chain).map_err(Failed::Keep)?;
            Ok((draft, unpacked))
        });
        worker.await.map_err(|_| Error::Stopped)?.map_err(|failed| match failed {
            Failed::Keep(error) => error,
            Failed::Unpack(fault) => self.told(job, fault),
        })
    }

    fn told(&self, job: &Job, fault: Fault) -> Error {
        match fault {
            Fault::Bad(reason) => self.session.bad(&job.part, reason),
            Fault::Mismatch { what, expected, actual } => {
                self.session.mismatch(&format!("{}{what}", job.part), expected, actual)
            }
            Fault::System { what, path, source } => Error::Io { what, path, source: Arc::new(source) },
            Fault::Cut => Error::Stopped,
        }
    }

    /// Waits for the layers below one, and opens them.
    fn below(&self, n: usize) -> impl FnOnce() -> std::result::Result<Lower, Fault> + Send + 'static {
        let chains: Vec<ChainId> = self.chains.iter().take(n).rev().cloned().collect();
        let (mut done, stop) = (self.done.subscribe(), self.stop.clone());
        let (driver, runtime) = (Arc::clone(&self.store.driver), tokio::runtime::Handle::current());
        move || {
            runtime.block_on(async {
                let there = done.wait_for(|done| done.iter().take(n).all(|d| *d));
                // It ends as well when the pull has gone.
                stop.run_until_cancelled(there).await.and_then(std::result::Result::ok).ok_or(Fault::Cut)?;
                open(&*driver, &chains).await
            })
        }
    }
}

async fn open(driver: &dyn Driver, chains: &[ChainId]) -> std::result::Result<Lower, Fault> {
    let mut views = Vec::with_capacity(chains.len());
    for chain in chains {
        let view = driver.open_layer(chain).await.map_err(|e| Fault::System {
            what: "open the layer",
            path: PathBuf::from(chain.to_string()),
            source: std::io::Error::other(e),
        })?;
        views.push(view);
    }
    Ok(Lower::from(views))
}
