//! A pull: manifest, config, layers, record.

use std::sync::Arc;

use moxlet_ids::{ChainId, Digest};
use tokio::sync::mpsc;

use crate::{
    Credentials, Error, ImageConfig, ImageRecord, Origin, Reference, Result,
    download::download,
    ensure::Taker,
    fetch::{self, Job},
    layer::{self, Claim, Piece},
    progress::{LayerState, Reporter},
    registry::{
        Registry, Served, Session,
        manifest::{self, Descriptor, Manifest},
        platform,
    },
    store::{NewImage, Store},
};

const MAX_CONFIG: u64 = 8 << 20;
/// Bytes of a layer's blob.
const MAX_LAYER: u64 = 64 << 30;

/// Brings an image. Dropping the future stops it; layers that are complete by then stay for the next pull, until
/// something is removed.
pub(crate) async fn pull(
    store: Arc<Store>,
    registry: Arc<Registry>,
    reference: Reference,
    auths: Vec<Credentials>,
    taker: Taker,
    progress: Reporter,
) -> Result<ImageRecord> {
    let session = registry.session(&reference, &auths).await?;
    let outcome = pull_from(&store, &session, taker, &progress).await;
    progress.publish();
    // Of a pull that can be tried again the layers that came stay for that, unless it is they who fill the disk.
    if matches!(outcome, Err(Error::DigestMismatch { .. } | Error::BadImage { .. } | Error::Full { .. }))
        && let Err(error) = store.collect().await
    {
        tracing::warn!(%error, "layers of an image that did not come stay for now");
    }
    outcome
}

async fn pull_from(
    store: &Arc<Store>,
    session: &Session<'_>,
    taker: Taker,
    progress: &Reporter,
) -> Result<ImageRecord> {
    if let Some(record) = unchanged(store, session, &taker, progress).await? {
        return Ok(record);
    }
    let manifest = manifest::fetch(session).await?;
    check_sizes(session, &manifest)?;
    let (config, blob) = match store.config(&manifest.config.digest) {
        Some(config) => (config, None),
        None => {
            let blob = small_blob(session, &manifest.config, "config").await?;
            (Arc::new(read_config(session, &blob)?), Some(blob))
        }
    };
    let jobs = jobs(session, &manifest, &config)?;
    let layers: Vec<ChainId> = jobs.iter().map(|j| j.chain.clone()).collect();
    let pins = store.pin(&layers).await;

    let mut needed = 0_u64;
    for job in &jobs {
        if !store.driver.has_layer(&job.chain).await? {
            needed = needed.saturating_add(job.blob.size);
        }
    }
    let fetched = match fetch::layers(store, session, jobs, progress).await {
        Err(error) if error.is_full() => return Err(full(store, session, needed, error).await),
        fetched => fetched?,
    };

    let reference = session.reference;
    let image = NewImage {
        // Ids are by sha256, whatever the manifest has its config by.
        id: blob.as_ref().map_or_else(|| manifest.config.digest.clone(), |blob| Digest::of(blob)),
        tags: reference.repo_tag().into_iter().collect(),
        digests: vec![format!("{}@{}", reference.name(), manifest.top)],
        size_bytes: manifest.layers.iter().fold(manifest.config.size, |sum, l| sum.saturating_add(l.size)),
        layers,
        config,
        blob,
        blobs: manifest.layers.into_iter().map(Into::into).collect(),
        manifest: Some(manifest.raw),
        origin: Origin::Pulled,
        // In the record's first write: an image that were free for all even for a moment would stay so after a crash.
        access: taker.access().map(|access| (reference.name(), access)),
    };
    let record = store.add(image, pins).await?;
    tracing::info!(image = %reference, id = %record.id, layers = record.layers.len(), fetched, "image pulled");
    Ok(record)
}

/// The image, where it is here whole and its name stands for it still: the registry is asked for no manifest then, of which
/// many give out only so many a day. Whatever is unclear is left to a pull.
async fn unchanged(
    store: &Arc<Store>,
    session: &Session<'_>,
    taker: &Taker,
    progress: &Reporter,
) -> Result<Option<ImageRecord>> {
    let reference = session.reference;
    if store.look_up_name(&session.name(), reference).is_none() {
        return Ok(None);
    }
    let Some(digest) = session.announced(reference.wanted()).await else { return Ok(None) };
    let name = format!("{}@{digest}", reference.name());
    let Some((record, details)) = store.look_up_digest(&name) else { return Ok(None) };
    let _pins = store.pin(&record.layers).await;
    for layer in &record.layers {
        if !store.driver.has_layer(layer).await? {
            return Ok(None);
        }
    }
    let access = taker.clone().access().map(|access| (reference.name(), access));
    let Some(record) = store.renew(&record.id, reference.repo_tag(), access).await? else { return Ok(None) };
    for counter in progress.begin(details.blobs.into_iter().map(|blob| (blob.digest, blob.size))) {
        counter.set(LayerState::Present);
    }
    tracing::info!(image = %reference, id = %record.id, "image is here as the registry has it");
    Ok(Some(record))
}

/// Says how much is missing where there is no space left.
async fn full(store: &Store, session: &Session<'_>, needed_bytes: u64, error: Error) -> Error {
    match store.driver.fs_usage().await {
        Ok(usage) => Error::Full {
            image: session.name(),
            needed_bytes,
            available_bytes: usage.available_bytes,
            place: usage.mountpoint,
            source: Box::new(error),
        },
        Err(_) => error,
    }
}

fn check_sizes(session: &Session<'_>, manifest: &Manifest) -> Result<()> {
    if manifest.config.size > MAX_CONFIG {
        return Err(session.bad("config", format!("it is larger than {MAX_CONFIG} bytes")));
    }
    for (n, layer) in manifest.layers.iter().enumerate() {
        if layer.size > MAX_LAYER {
            return Err(session.bad(&part(n, layer), format!("it is larger than {MAX_LAYER} bytes")));
        }
    }
    Ok(())
}

fn part(n: usize, layer: &Descriptor) -> String {
    format!("layer {} ({})", n + 1, layer.digest)
}

/// A blob that fits into memory, checked; from another host where one has sent another blob.
async fn small_blob(session: &Session<'_>, blob: &Descriptor, part: &str) -> Result<Vec<u8>> {
    loop {
        let mut served = Served::default();
        match small_blob_once(session, blob, part, &mut served).await {
            Err(_) if session.distrust(&served) => {}
            outcome => return outcome,
        }
    }
}

async fn small_blob_once(
    session: &Session<'_>,
    blob: &Descriptor,
    part: &str,
    served: &mut Served,
) -> Result<Vec<u8>> {
    let (out, mut pieces) = mpsc::channel(layer::WAITING);
    let gather = async {
        let mut bytes = Vec::new();
        while let Some(Piece::Bytes(piece)) = pieces.recv().await {
            bytes.extend_from_slice(&piece);
        }
        bytes
    };
    let (downloaded, bytes) = futures::join!(download(session, blob, part, out, served), gather);
    downloaded?;
    let actual = Digest::by(blob.digest.algorithm(), &bytes);
    if actual != blob.digest {
        served.lied = true;
        return Err(session.mismatch(part, blob.digest.to_string(), actual.to_string()));
    }
    Ok(bytes)
}

fn read_config(session: &Session<'_>, blob: &[u8]) -> Result<ImageConfig> {
    let config = ImageConfig::read(blob).map_err(|reason| session.bad("config", reason))?;
    if let Some(other) = platform::foreign(&config.os, &config.architecture) {
        let host = platform::host_architecture();
        return Err(session.bad("config", format!("it is for {other}, this host is linux/{host}")));
    }
    Ok(config)
}

/// The layers with their chain IDs, from what manifest and config say of them.
fn jobs(session: &Session<'_>, manifest: &Manifest, config: &ImageConfig) -> Result<Vec<Job>> {
    let diff_ids = &config.diff_ids;
    if diff_ids.len() != manifest.layers.len() {
        let (said, there) = (diff_ids.len(), manifest.layers.len());
        return Err(session.bad("config", format!("it names {said} layers, the manifest {there}")));
    }
    let mut jobs: Vec<Job> = Vec::with_capacity(diff_ids.len());
    for (n, (blob, diff_id)) in manifest.layers.iter().zip(diff_ids).enumerate() {
        let parent = jobs.last().map(|j| j.chain.clone());
        let chain = parent.as_ref().map_or_else(|| ChainId::base(diff_id), |p| p.push(diff_id));
        let claim = Claim {
            digest: Some(blob.digest.clone()),
            size: Some(blob.size),
            diff_id: Some(diff_id.clone()),
        };
        jobs.push(Job { part: part(n, blob), blob: blob.clone(), claim, chain, parent });
    }
    Ok(jobs)
}
