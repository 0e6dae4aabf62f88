//! A pull: manifest, config, layers, record.

use std::sync::Arc;

use futures::{StreamExt, stream};
use moxlet_ids::{ChainId, Digest};
use moxlet_storage::WhiteoutStyle;
use oci_spec::image::ImageConfiguration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    Credentials, Error, ImageRecord, Origin, Reference, Result,
    download::download,
    layer::{self, Claim, Fault, Piece, Target},
    registry::{
        Session,
        manifest::{self, Descriptor, Manifest},
    },
    store::{NewImage, Store},
};

const MAX_CONFIG: u64 = 8 << 20;
/// Bytes of a layer's blob.
const MAX_LAYER: u64 = 64 << 30;

/// A layer of the image, with all that its extraction needs to know.
struct Job {
    part: String,
    blob: Descriptor,
    claim: Claim,
    chain: ChainId,
    parent: Option<ChainId>,
}

/// Brings an image. Dropping the future stops it; layers that are complete by then stay for the next pull, until
/// something is removed.
pub(crate) async fn pull(
    store: Arc<Store>,
    reference: Reference,
    auths: Vec<Credentials>,
) -> Result<ImageRecord> {
    let session = store.registry.session(&reference, &auths).await?;
    let outcome = pull_from(&store, &session).await;
    if matches!(outcome, Err(Error::DigestMismatch { .. } | Error::BadImage { .. }))
        && let Err(error) = store.collect().await
    {
        tracing::warn!(%error, "layers of an image that was refused stay for now");
    }
    outcome
}

async fn pull_from(store: &Arc<Store>, session: &Session<'_>) -> Result<ImageRecord> {
    let manifest = manifest::fetch(session).await?;
    check_sizes(session, &manifest)?;
    let (config, blob) = match store.config(&manifest.config.digest) {
        Some(config) => (config, None),
        None => {
            let blob = small_blob(session, &manifest.config, "config").await?;
            (read_config(session, &blob)?, Some(blob))
        }
    };
    let jobs = jobs(session, &manifest, &config)?;
    let layers: Vec<ChainId> = jobs.iter().map(|j| j.chain.clone()).collect();
    let pins = store.pin(&layers).await;

    let at_once = match store.driver.whiteouts() {
        WhiteoutStyle::Overlay => store.settings.max_parallel_downloads.max(1),
        // Each begins as a copy of the one below.
        WhiteoutStyle::Apply => 1,
    };
    // After a failure the others are stopped and waited for, so that nothing appears once the pull has ended.
    let stop = CancellationToken::new();
    let fetches = jobs.into_iter().map(|job| Box::pin(fetch_layer(store, session, job, &stop)));
    let mut fetches = stream::iter(fetches).buffer_unordered(at_once);
    let (mut fetched, mut failed) = (0_u64, None);
    while let Some(outcome) = fetches.next().await {
        match outcome {
            Ok(bytes) => fetched += bytes,
            Err(error) => {
                stop.cancel();
                failed.get_or_insert(error);
            }
        }
    }
    drop(fetches);
    if let Some(error) = failed {
        return Err(error);
    }

    let reference = session.reference;
    let image = NewImage {
        id: manifest.config.digest.clone(),
        tags: reference.repo_tag().into_iter().collect(),
        digests: vec![format!("{}@{}", reference.name(), manifest.top)],
        size_bytes: manifest.layers.iter().fold(manifest.config.size, |sum, l| sum.saturating_add(l.size)),
        layers,
        config,
        blob,
        blobs: manifest.layers.into_iter().map(Into::into).collect(),
        manifest: Some(manifest.raw),
        origin: Origin::Pulled,
        access: None,
    };
    let record = store.add(image, pins).await?;
    tracing::info!(image = %reference, id = %record.id, layers = record.layers.len(), fetched, "image pulled");
    Ok(record)
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

/// A blob that fits into memory, checked.
async fn small_blob(session: &Session<'_>, blob: &Descriptor, part: &str) -> Result<Vec<u8>> {
    let (out, mut pieces) = mpsc::channel(layer::WAITING);
    let gather = async {
        let mut bytes = Vec::new();
        while let Some(Piece::Bytes(piece)) = pieces.recv().await {
            bytes.extend_from_slice(&piece);
        }
        bytes
    };
    let (downloaded, bytes) = futures::join!(download(session, blob, part, out), gather);
    downloaded?;
    let actual = Digest::of(&bytes);
    if actual != blob.digest {
        return Err(mismatch(session, part, blob.digest.to_string(), actual.to_string()));
    }
    Ok(bytes)
}

fn mismatch(session: &Session<'_>, part: &str, expected: String, actual: String) -> Error {
    Error::DigestMismatch { reference: session.name(), part: part.to_owned(), expected, actual }
}

fn read_config(session: &Session<'_>, blob: &[u8]) -> Result<ImageConfiguration> {
    let config: ImageConfiguration =
        serde_json::from_slice(blob).map_err(|e| session.bad("config", format!("it cannot be read: {e}")))?;
    let (os, architecture) = (config.os().to_string(), config.architecture().to_string());
    let host = manifest::host_architecture();
    if os != "linux" || architecture != host {
        let reason = format!("it is for {os}/{architecture}, this host is linux/{host}");
        return Err(session.bad("config", reason));
    }
    Ok(config)
}

/// The layers with their chain IDs, from what manifest and config say of them.
fn jobs(session: &Session<'_>, manifest: &Manifest, config: &ImageConfiguration) -> Result<Vec<Job>> {
    let diff_ids = config.rootfs().diff_ids();
    if diff_ids.len() != manifest.layers.len() {
        let (said, there) = (diff_ids.len(), manifest.layers.len());
        return Err(session.bad("config", format!("it names {said} layers, the manifest {there}")));
    }
    let mut jobs: Vec<Job> = Vec::with_capacity(diff_ids.len());
    for (n, (blob, diff_id)) in manifest.layers.iter().zip(diff_ids).enumerate() {
        let diff_id: Digest = diff_id.parse().map_err(|e| session.bad("config", format!("{e}")))?;
        let parent = jobs.last().map(|j| j.chain.clone());
        let chain = parent.as_ref().map_or_else(|| ChainId::base(&diff_id), |p| p.push(&diff_id));
        let claim =
            Claim { digest: Some(blob.digest.clone()), size: Some(blob.size), diff_id: Some(diff_id) };
        jobs.push(Job { part: part(n, blob), blob: blob.clone(), claim, chain, parent });
    }
    Ok(jobs)
}

/// Makes sure that a layer is in the store; how many bytes that took.
async fn fetch_layer(
    store: &Store,
    session: &Session<'_>,
    job: Job,
    stop: &CancellationToken,
) -> Result<u64> {
    // Images that share a layer are often pulled at the same time; the second one finds it.
    let turn = store.turn(&job.chain);
    let Some(_turn) = stop.run_until_cancelled(turn.lock()).await else { return Err(Error::Stopped) };
    if store.driver.has_layer(&job.chain).await? {
        return Ok(0);
    }
    let draft = store.driver.begin_layer(job.parent.as_ref()).await?;
    let (out, pieces) = mpsc::channel(layer::WAITING);
    let (claim, style, bottom) = (job.claim, store.driver.whiteouts(), job.parent.is_none());
    // The draft goes with the worker: it is not removed while something is still written in it.
    let worker = tokio::task::spawn_blocking(move || {
        let target = Target { root: draft.path(), style, bottom, tape: None, below: None };
        layer::unpack(pieces, &claim, target).map(|unpacked| (draft, unpacked))
    });
    let downloaded = stop.run_until_cancelled(download(session, &job.blob, &job.part, out)).await;
    let unpacked = worker.await.map_err(|_| Error::Stopped)?;
    downloaded.unwrap_or(Err(Error::Stopped))?;
    let (draft, unpacked) = unpacked.map_err(|fault| match fault {
        Fault::Bad(reason) => session.bad(&job.part, reason),
        Fault::Mismatch { what, expected, actual } => {
            mismatch(session, &format!("{}{what}", job.part), expected, actual)
        }
        Fault::System { what, path, source } => Error::Io { what, path, source: Arc::new(source) },
        Fault::Cut => Error::Stopped,
    })?;
    store.driver.commit_layer(draft, &job.chain, unpacked.usage).await?;
    Ok(job.blob.size)
}
