//! `moxlet.host.v1`'s ImageStore: what people and nodes do with images beside CRI.
//!
//! It needs nothing of an agent but its image store, so that `moxlet image --store` serves it to itself.

use std::{path::Path, pin::Pin, sync::Arc, time::Duration};

use futures::{FutureExt, Stream, StreamExt, stream};
use jiff::Timestamp;
use moxlet_cri::host::{self, image_store_server::ImageStore as Rpc};
use moxlet_image::{
    Compression, Credentials, Error, Feed, Garbage, GarbagePolicy, ImageRecord, ImageStore, Imported,
    Keyring, LayerProgress, LayerState, ListedImage, PullPolicy, PullProgress, Reference, Removed,
    RootfsOptions, VerifyReport, feed,
};
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming};

use super::images::pull_status;
use crate::error;

type Answer<T> = std::result::Result<Response<T>, Status>;
/// An answer that comes in parts.
type Updates<T> = Pin<Box<dyn Stream<Item = std::result::Result<T, Status>> + Send>>;

/// The service over a store.
#[derive(Clone)]
pub struct ImageStoreService {
    images: Arc<ImageStore>,
}

impl ImageStoreService {
    /// Serves this store.
    #[must_use]
    pub fn new(images: Arc<ImageStore>) -> Self {
        Self { images }
    }
}

fn status(error: Error) -> Status {
    Status::from(error::Error::from(error))
}

fn plain(record: ImageRecord) -> host::StoredImage {
    shown(ListedImage { record, added_at: None, last_used_at: None, in_use_by: Vec::new() })
}

fn shown(image: ListedImage) -> host::StoredImage {
    let ListedImage { record, added_at, last_used_at, in_use_by } = image;
    host::StoredImage {
        id: record.id.to_string(),
        repo_tags: record.repo_tags,
        repo_digests: record.repo_digests,
        size_bytes: record.size_bytes,
        pinned: record.pinned,
        added_at: added_at.map_or(0, Timestamp::as_second),
        last_used_at: last_used_at.map_or(0, Timestamp::as_second),
        in_use_by,
    }
}

/// The credentials of a request for an image: its own, then those of config files that fit.
fn credentials(
    image: &str,
    logins: Vec<host::ImageLogin>,
    configs: &[Vec<u8>],
) -> std::result::Result<Vec<Credentials>, Error> {
    let mut all: Vec<Credentials> = logins
        .into_iter()
        .map(|l| Credentials {
            username: l.username,
            password: l.password,
            identity_token: l.identity_token,
            registry_token: l.registry_token,
        })
        .collect();
    all.extend(keyring(configs)?.lookup(&Reference::parse(image)?));
    Ok(all)
}

fn keyring(configs: &[Vec<u8>]) -> std::result::Result<Keyring, Error> {
    let mut keyring = Keyring::default();
    for config in configs {
        keyring.add(Keyring::from_docker_config(config)?);
    }
    Ok(keyring)
}

fn done(record: ImageRecord, present: bool) -> host::ImagePullUpdate {
    let done = host::ImagePullDone {
        id: record.id.to_string(),
        present,
        size_bytes: record.size_bytes,
        repo_tags: record.repo_tags,
        repo_digests: record.repo_digests,
    };
    host::ImagePullUpdate { update: Some(host::image_pull_update::Update::Done(done)) }
}

fn begun() -> host::ImagePullUpdate {
    let progress = host::ImagePullProgress::default();
    host::ImagePullUpdate { update: Some(host::image_pull_update::Update::Progress(progress)) }
}

fn progress_of(progress: &PullProgress) -> host::ImagePullProgress {
    let layer = |l: &LayerProgress| {
        let complete = matches!(l.state, LayerState::Done | LayerState::Present);
        host::ImageLayerProgress {
            digest: l.digest.to_string(),
            size_bytes: l.total,
            done_bytes: if complete { l.total } else { l.downloaded },
            complete,
        }
    };
    host::ImagePullProgress { layers: progress.layers.iter().map(layer).collect() }
}

/// The updates of a pull that is under way; who drops them stops it.
fn followed(
    first: Option<host::ImagePullUpdate>,
    seen: watch::Receiver<PullProgress>,
    work: impl Future<Output = std::result::Result<host::ImagePullUpdate, Status>> + Send + 'static,
) -> Response<Updates<host::ImagePullUpdate>> {
    let updates = stream::unfold((Some(work.boxed()), seen), |(work, mut seen)| async move {
        let mut work = work?;
        tokio::select! {
            biased;
            Ok(()) = seen.changed() => {
                let update = host::image_pull_update::Update::Progress(progress_of(&seen.borrow_and_update()));
                Some((Ok(host::ImagePullUpdate { update: Some(update) }), (Some(work), seen)))
            }
            done = &mut work => Some((done, (None, seen))),
        }
    });
    Response::new(stream::iter(first.map(Ok)).chain(updates).boxed())
}

fn collected(done: Garbage) -> host::ImageGarbageResponse {
    host::ImageGarbageResponse {
        removed: done.removed.into_iter().map(plain).collect(),
        freed_bytes: done.freed_bytes,
        wanted_bytes: done.wanted_bytes,
        usage_percent: done.usage_percent.into(),
        capacity_bytes: done.capacity_bytes,
        failures: done.failures,
    }
}

/// A threshold of a request.
fn percent(value: u32, which: &str) -> std::result::Result<u8, Status> {
    u8::try_from(value).ok().filter(|p| *p <= 100).ok_or_else(|| {
        Status::invalid_argument(format!("the {which} threshold of {value} % is not within 0 to 100"))
    })
}

#[tonic::async_trait]
impl Rpc for ImageStoreService {
    type PullStream = Updates<host::ImagePullUpdate>;

    async fn pull(&self, request: Request<host::ImagePullRequest>) -> Answer<Self::PullStream> {
        let request = request.into_inner();
        let auths = credentials(&request.image, request.logins, &request.docker_configs).map_err(status)?;
        let images = self.images.clone();
        let (progress, seen) = watch::channel(PullProgress::default());
        Ok(followed(None, seen, async move {
            let record = images.pull_telling(&request.image, &auths, &progress).await.map_err(pull_status)?;
            Ok(done(record, false))
        }))
    }

    type EnsureStream = Updates<host::ImagePullUpdate>;

    async fn ensure(&self, request: Request<host::ImageEnsureRequest>) -> Answer<Self::EnsureStream> {
        let request = request.into_inner();
        let policy: PullPolicy = request.pull_policy.parse().map_err(status)?;
        let secrets = keyring(&request.docker_configs).map_err(status)?;
        let found = self.images.find_for(&request.image, policy, &secrets).await.map_err(status)?;
        if let Some(record) = found {
            return Ok(Response::new(stream::iter([Ok(done(record, true))]).boxed()));
        }
        let images = self.images.clone();
        let (progress, seen) = watch::channel(PullProgress::default());
        // The first word says that a pull has begun.
        Ok(followed(Some(begun()), seen, async move {
            let record = images.pull_for(&request.image, &secrets, &progress).await.map_err(pull_status)?;
            Ok(done(record, false))
        }))
    }

    async fn list(&self, _: Request<host::ImageListRequest>) -> Answer<host::ImageListResponse> {
        let images = self.images.list_all().await.map_err(status)?;
        Ok(Response::new(host::ImageListResponse { images: images.into_iter().map(shown).collect() }))
    }

    async fn inspect(
        &self,
        request: Request<host::ImageInspectRequest>,
    ) -> Answer<host::ImageInspectResponse> {
        let image = request.into_inner().image;
        let found = self.images.inspect(&image).await.map_err(status)?;
        let found = found.ok_or_else(|| status(Error::Missing(image)))?;
        let json = serde_json::to_vec(&found).map_err(|e| Status::internal(e.to_string()))?;
        Ok(Response::new(host::ImageInspectResponse { json }))
    }

    async fn tag(&self, request: Request<host::ImageTagRequest>) -> Answer<host::ImageTagResponse> {
        let request = request.into_inner();
        let record = self.images.tag(&request.image, &request.tag).await.map_err(status)?;
        Ok(Response::new(host::ImageTagResponse { id: record.id.to_string() }))
    }

    async fn remove(&self, request: Request<host::ImageRemoveRequest>) -> Answer<host::ImageRemoveResponse> {
        let image = request.into_inner().image;
        let answer = match self.images.remove_unused(&image).await.map_err(status)? {
            Removed::Nothing => return Err(status(Error::Missing(image))),
            Removed::Name(name) => host::ImageRemoveResponse { name, id: String::new() },
            Removed::Image(record) => {
                host::ImageRemoveResponse { name: String::new(), id: record.id.to_string() }
            }
        };
        Ok(Response::new(answer))
    }

    async fn pin(&self, request: Request<host::ImagePinRequest>) -> Answer<host::ImagePinResponse> {
        let request = request.into_inner();
        let record = self.images.set_pinned(&request.image, request.pinned).await.map_err(status)?;
        Ok(Response::new(host::ImagePinResponse { id: record.id.to_string() }))
    }

    async fn mount(&self, request: Request<host::ImageMountRequest>) -> Answer<host::ImageMountResponse> {
        let request = request.into_inner();
        let record = self.images.mount(&request.image, Path::new(&request.path)).await.map_err(status)?;
        Ok(Response::new(host::ImageMountResponse { id: record.id.to_string() }))
    }

    async fn unmount(
        &self,
        request: Request<host::ImageUnmountRequest>,
    ) -> Answer<host::ImageUnmountResponse> {
        self.images.unmount(Path::new(&request.into_inner().path)).await.map_err(status)?;
        Ok(Response::new(host::ImageUnmountResponse {}))
    }

    async fn collect_garbage(
        &self,
        request: Request<host::ImageGarbageRequest>,
    ) -> Answer<host::ImageGarbageResponse> {
        let request = request.into_inner();
        let min_age = Duration::from_secs(request.min_age_seconds);
        let done = if request.everything_unused {
            self.images.prune(min_age).await
        } else {
            let (high, low) = (percent(request.high_percent, "high")?, percent(request.low_percent, "low")?);
            if low > high {
                return Err(Status::invalid_argument(format!(
                    "the low threshold of {low} % is above the high one of {high} %"
                )));
            }
            let max_age = (request.max_age_seconds > 0).then(|| Duration::from_secs(request.max_age_seconds));
            let policy = GarbagePolicy { high_percent: high, low_percent: low, min_age, max_age };
            self.images.collect_garbage(&policy).await
        };
        Ok(Response::new(collected(done.map_err(status)?)))
    }

    async fn push(&self, request: Request<host::ImagePushRequest>) -> Answer<host::ImagePushResponse> {
        let request = request.into_inner();
        let target = if request.target.is_empty() { &request.image } else { &request.target };
        let auths = credentials(target, request.logins, &request.docker_configs).map_err(status)?;
        let compression: Compression = request.compression.parse().map_err(status)?;
        let pushed = self.images.push(&request.image, Some(target), &auths, compression).await;
        let digest = pushed.map_err(status)?.to_string();
        Ok(Response::new(host::ImagePushResponse { digest }))
    }

    type ExportStream = Updates<host::ImageChunk>;

    async fn export(&self, request: Request<host::ImageExportRequest>) -> Answer<Self::ExportStream> {
        let stream = self.images.export(&request.into_inner().images).await.map_err(status)?;
        let chunk = |piece: std::io::Result<bytes::Bytes>| match piece {
            Ok(data) => Ok(host::ImageChunk { data: data.into() }),
            Err(error) => Err(Status::data_loss(format!("the export broke off: {error}"))),
        };
        Ok(Response::new(stream.map(chunk).boxed()))
    }

    async fn import(
        &self,
        request: Request<Streaming<host::ImageImportRequest>>,
    ) -> Answer<host::ImageImportResponse> {
        let mut parts = request.into_inner();
        let first = parts.message().await?.and_then(|m| m.part);
        let Some(host::image_import_request::Part::Options(options)) = first else {
            return Err(Status::invalid_argument("the first message of an import has its options"));
        };
        let (feed, source) = feed();
        let name = Some(options.name.clone()).filter(|n| !n.is_empty());
        let images = self.images.clone();
        let work = async move {
            if options.rootfs {
                let made = images.import_rootfs(source, rootfs_options(options)).await;
                made.map(|record| Imported { images: vec![record], skipped: Vec::new() })
            } else {
                images.import(source, name.as_deref()).await
            }
        };
        let (done, fed) = tokio::join!(work, pass_on(parts, feed));
        // What the import says comes first: it may have stopped reading.
        let done = done.map_err(|e| fed.err().unwrap_or_else(|| status(e)))?;
        let images = done.images.into_iter().map(plain).collect();
        Ok(Response::new(host::ImageImportResponse { images, skipped: done.skipped }))
    }

    type VerifyStream = Updates<host::ImageVerifyReport>;

    async fn verify(&self, request: Request<host::ImageVerifyRequest>) -> Answer<Self::VerifyStream> {
        let request = request.into_inner();
        let work = self.images.verify(&request.images, request.repair).map_err(status)?;
        let reports = stream::unfold(Some(work), |work| async move {
            let mut work = work?;
            match work.next().await {
                Ok(Some(report)) => Some((Ok(verified(report)), Some(work))),
                Ok(None) => None,
                Err(error) => Some((Err(status(error)), None)),
            }
        });
        Ok(Response::new(reports.boxed()))
    }
}

/// Gives an import its bytes; the client's going away is an archive that is cut off.
async fn pass_on(
    mut parts: Streaming<host::ImageImportRequest>,
    feed: Feed,
) -> std::result::Result<(), Status> {
    while let Some(message) = parts.message().await? {
        match message.part {
            Some(host::image_import_request::Part::Data(data)) => {
                if !feed.send(data.into()).await {
                    return Ok(());
                }
            }
            _ => {
                return Err(Status::invalid_argument(
                    "after the options of an import comes nothing but data",
                ));
            }
        }
    }
    feed.end().await;
    Ok(())
}

fn rootfs_options(options: host::ImageImportOptions) -> RootfsOptions {
    RootfsOptions {
        name: Some(options.name).filter(|n| !n.is_empty()),
        cmd: options.cmd,
        entrypoint: options.entrypoint,
        env: options.env,
        workdir: options.workdir,
        user: options.user,
        labels: options.labels.into_iter().collect(),
        architecture: options.architecture,
        file_name: options.file_name,
    }
}

fn verified(report: VerifyReport) -> host::ImageVerifyReport {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    host::ImageVerifyReport {
        image: report.image.repo_tags.first().cloned().unwrap_or_else(|| report.image.id.to_string()),
        id: report.image.id.to_string(),
        layers: count(report.image.layers.len()),
        verified: count(report.verified),
        lost: count(report.lost),
        faults: report.faults,
        removed: report.removed,
    }
}
