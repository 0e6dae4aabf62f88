//! The upload side: blobs and manifests into a registry.
//!
//! A blob goes in one stream, as every registry takes it. Where it breaks off it is sent from its beginning: the caller
//! gives a way to open it, not an open stream.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt, future::BoxFuture, stream::BoxStream};
use moxlet_ids::Digest;
use reqwest::{
    Body, Method, Response, StatusCode, Url,
    header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION},
};
use sha2::{Digest as _, Sha256};

use super::{
    ATTEMPTS, Endpoint, Purpose, Session,
    request::{Call, Refusal},
};
use crate::{Error, Result, error::chain};

/// How long a registry may take to put a blob away that has come whole, in times of the wait for an answer: it may read
/// all of it again.
const COMMIT: u32 = 20;

/// The bytes of a blob.
pub(crate) type ByteStream = BoxStream<'static, std::io::Result<Bytes>>;
/// Opens a blob from its beginning; called again for each attempt.
pub(crate) type Open<'a> = &'a (dyn Fn() -> BoxFuture<'static, Result<ByteStream>> + Send + Sync);

/// How an attempt to upload has failed.
enum Failed {
    /// It may go better next time.
    Again(String),
    Fatal(Error),
}

impl Session<'_> {
    /// Whether the registry has a blob in this repository.
    ///
    /// # Errors
    /// [`Error::Push`].
    pub(crate) async fn exists(&self, digest: &Digest) -> Result<bool> {
        let endpoint = self.target()?;
        let url = endpoint.url(&format!("blobs/{digest}")).map_err(|e| self.not_pushed(&e))?;
        match self.authorized(endpoint, &Call::new(Method::HEAD, url)).await {
            Ok(_) => Ok(true),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(self.pushing(error)),
        }
    }

    /// Takes a blob over from another repository of the same registry, without a byte being sent; `false` where the
    /// registry does not want to, or the blob is not there.
    ///
    /// # Errors
    /// [`Error::Push`].
    pub(crate) async fn mount(&self, digest: &Digest, from: &str) -> Result<bool> {
        let endpoint = self.target()?;
        let mut url = endpoint.url("blobs/uploads/").map_err(|e| self.not_pushed(&e))?;
        url.query_pairs_mut().append_pair("mount", digest.as_str()).append_pair("from", from);
        match self.authorized(endpoint, &Call::new(Method::POST, url)).await {
            Ok(response) if response.status() == StatusCode::CREATED => Ok(true),
            Ok(response) => {
                // It has begun an upload instead, which nobody will end; that it is told is a courtesy.
                if let Ok(location) = self.location(endpoint, &response) {
                    let _ = self.authorized(endpoint, &Call::new(Method::DELETE, location)).await;
                }
                Ok(false)
            }
            // Not every user may read the other one.
            Err(Error::NotFound { .. } | Error::Denied { .. }) => Ok(false),
            Err(error) => Err(self.pushing(error)),
        }
    }

    /// Uploads a blob that is known. `part` names it in errors.
    ///
    /// # Errors
    /// [`Error::Push`], or what `open` fails with.
    pub(crate) async fn upload(&self, digest: &Digest, size: u64, part: &str, open: Open<'_>) -> Result<()> {
        let mut failures = 0;
        loop {
            match self.upload_once(digest, size, open).await {
                Ok(()) => return Ok(()),
                Err(failed) => self.again(part, failed, &mut failures).await?,
            }
        }
    }

    /// Uploads a blob whose digest is known only when it has been read; its digest and size.
    ///
    /// # Errors
    /// As [`Self::upload`].
    pub(crate) async fn upload_unknown(&self, part: &str, open: Open<'_>) -> Result<(Digest, u64)> {
        let mut failures = 0;
        loop {
            match self.upload_unknown_once(open).await {
                Ok(done) => return Ok(done),
                Err(failed) => self.again(part, failed, &mut failures).await?,
            }
        }
    }

    async fn upload_once(
        &self,
        digest: &Digest,
        size: u64,
        open: Open<'_>,
    ) -> std::result::Result<(), Failed> {
        let endpoint = self.target().map_err(Failed::Fatal)?;
        let mut url = self.begin(endpoint).await?;
        url.query_pairs_mut().append_pair("digest", digest.as_str());
        let stream = open().await.map_err(Failed::Fatal)?;
        self.stream(endpoint, Method::PUT, url, Some(size), stream).await.map(drop)
    }

    async fn upload_unknown_once(&self, open: Open<'_>) -> std::result::Result<(Digest, u64), Failed> {
        let endpoint = self.target().map_err(Failed::Fatal)?;
        let url = self.begin(endpoint).await?;
        let sum = Arc::new(Mutex::new((Sha256::new(), 0_u64)));
        let counted = Arc::clone(&sum);
        let stream = open().await.map_err(Failed::Fatal)?.inspect(move |piece| {
            if let Ok(piece) = piece {
                let mut sum = counted.lock().unwrap_or_else(PoisonError::into_inner);
                sum.0.update(piece);
                sum.1 += piece.len() as u64;
            }
        });
        let response = self.stream(endpoint, Method::PATCH, url, None, stream.boxed()).await?;
        let mut url = self.location(endpoint, &response).map_err(Failed::Again)?;
        let (hex, size) = {
            let sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
            (hex::encode(sum.0.clone().finalize()), sum.1)
        };
        let digest = format!("sha256:{hex}").parse::<Digest>();
        let digest = digest.map_err(|e| Failed::Fatal(self.not_pushed(&e.to_string())))?;
        url.query_pairs_mut().append_pair("digest", digest.as_str());
        self.commit(endpoint, url).await?;
        Ok((digest, size))
    }

    /// Ends an upload whose bytes are all there. The login may have expired while they were sent, and is then renewed: the
    /// bytes would be sent anew for nothing, since the next time takes as long.
    async fn commit(&self, endpoint: &Endpoint, url: Url) -> std::result::Result<(), Failed> {
        let mut call = Call::new(Method::PUT, url).header(CONTENT_LENGTH, HeaderValue::from(0));
        call = call.header(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        // An upload that has ended although we did not hear of it is none any more: it begins anew.
        call.once = true;
        call.patience = COMMIT;
        match self.try_authorized(endpoint, &call).await {
            Ok(_) => Ok(()),
            Err(Refusal::Other(Error::Unreachable { reason, .. })) => Err(Failed::Again(reason)),
            Err(Refusal::Other(error)) => Err(Failed::Fatal(error)),
            Err(Refusal::Rejected(reason)) => Err(Failed::Fatal(self.not_pushed(&reason))),
            Err(Refusal::Unauthorized(_, reason)) => Err(Failed::Fatal(self.denied(reason))),
        }
    }

    /// Puts a manifest under a tag or its digest; its digest.
    ///
    /// # Errors
    /// [`Error::Push`], also where the registry keeps something else than was sent.
    pub(crate) async fn put_manifest(&self, wanted: &str, media_type: &str, bytes: &[u8]) -> Result<Digest> {
        let endpoint = self.target()?;
        let url = endpoint.url(&format!("manifests/{wanted}")).map_err(|e| self.not_pushed(&e))?;
        let kind = HeaderValue::try_from(media_type).map_err(|e| self.not_pushed(&e.to_string()))?;
        let mut call = Call::new(Method::PUT, url).header(CONTENT_TYPE, kind);
        call.body = bytes.to_vec();
        let response = self.authorized(endpoint, &call).await.map_err(|e| self.pushing(e))?;
        let digest = Digest::of(bytes);
        let kept = response.headers().get("docker-content-digest").and_then(|v| v.to_str().ok());
        match kept {
            Some(kept) if kept != digest.as_str() => {
                let kept: String = kept.chars().take(100).collect();
                Err(self.not_pushed(&format!("the registry keeps the manifest as {kept:?}, not {digest}")))
            }
            _ => Ok(digest),
        }
    }

    /// The host that uploads go to.
    fn target(&self) -> Result<&Endpoint> {
        self.endpoints(Purpose::Push).map_err(|e| self.pushing(e))?.first().copied().ok_or(Error::Stopped)
    }

    fn not_pushed(&self, reason: &str) -> Error {
        Error::Push { reference: self.name(), reason: reason.to_owned(), denied: false }
    }

    /// An error of a request, which speaks of a pull, as one of a push.
    fn pushing(&self, error: Error) -> Error {
        let denied = matches!(error, Error::Denied { .. });
        match error {
            Error::Denied { reason, .. }
            | Error::Unreachable { reason, .. }
            | Error::NotFound { reason, .. }
            | Error::BadImage { reason, .. } => Error::Push { reference: self.name(), reason, denied },
            other => other,
        }
    }

    /// Waits before the next attempt, if there is to be one.
    async fn again(&self, part: &str, failed: Failed, failures: &mut u32) -> Result<()> {
        let reason = match failed {
            Failed::Fatal(error) => return Err(self.pushing(error)),
            Failed::Again(reason) => reason,
        };
        *failures += 1;
        if *failures >= ATTEMPTS {
            return Err(self.not_pushed(&format!("{part}: {reason}")));
        }
        tracing::debug!(image = %self.reference, part, reason, "an upload broke off and begins anew");
        tokio::time::sleep(self.pause(*failures - 1)).await;
        Ok(())
    }

    /// Begins an upload; where its bytes go.
    async fn begin(&self, endpoint: &Endpoint) -> std::result::Result<Url, Failed> {
        let url = endpoint.url("blobs/uploads/").map_err(|e| Failed::Fatal(self.not_pushed(&e)))?;
        let response =
            self.authorized(endpoint, &Call::new(Method::POST, url)).await.map_err(Failed::Fatal)?;
        self.location(endpoint, &response).map_err(|e| Failed::Fatal(self.not_pushed(&e)))
    }

    /// Where the registry wants to be spoken to next about an upload.
    fn location(&self, endpoint: &Endpoint, response: &Response) -> std::result::Result<Url, String> {
        let location = response.headers().get(LOCATION).and_then(|l| l.to_str().ok());
        let url = location.and_then(|l| response.url().join(l).ok());
        let url = url.ok_or("the registry does not say where the upload goes")?;
        if !self.registry.may_go(&endpoint.base, &url) {
            return Err("the registry wants the upload at an address without TLS".to_owned());
        }
        Ok(url)
    }

    /// Sends a stream, which cannot be done twice; the login is that of the request before, which has just been let in.
    async fn stream(
        &self,
        endpoint: &Endpoint,
        method: Method,
        url: Url,
        size: Option<u64>,
        stream: ByteStream,
    ) -> std::result::Result<Response, Failed> {
        let mut headers = HeaderMap::new();
        if url.origin() == endpoint.base.origin() {
            headers.clone_from(&endpoint.headers);
            if let Some(login) = endpoint.login.header().await {
                headers.insert(AUTHORIZATION, login);
            }
        }
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        if let Some(size) = size {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(size));
        }
        let progress = Arc::new(Progress::default());
        let body = Body::wrap_stream(Watched { stream, progress: Arc::clone(&progress) });
        let request = endpoint.clients.of(&url).request(method, url).headers(headers).body(body).send();
        let stall = self.registry.timing.stall;
        let response = tokio::select! {
            response = request => response.map_err(|e| Failed::Again(chain(&e.without_url())))?,
            () = progress.stalled(stall) => return Err(Failed::Again(self.registry.timing.silence())),
        };
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let reason = self.describe(response).await;
        Err(match status {
            // A token may have expired on the way.
            StatusCode::UNAUTHORIZED | StatusCode::TOO_MANY_REQUESTS => Failed::Again(reason),
            s if s.is_server_error() => Failed::Again(reason),
            StatusCode::FORBIDDEN => Failed::Fatal(self.denied(reason)),
            _ => Failed::Fatal(self.not_pushed(&reason)),
        })
    }
}

/// How far a stream has been taken.
#[derive(Default)]
struct Progress {
    pieces: AtomicU64,
    /// We have not made the next piece yet.
    ours: AtomicBool,
    ended: AtomicBool,
}

impl Progress {
    /// Waits until the other side has taken nothing for too long.
    async fn stalled(&self, stall: Duration) {
        let mut silent = 0;
        loop {
            let before = self.pieces.load(Ordering::Relaxed);
            tokio::time::sleep(stall).await;
            if self.pieces.load(Ordering::Relaxed) != before || self.ours.load(Ordering::Relaxed) {
                silent = 0;
                continue;
            }
            silent += 1;
            if silent >= if self.ended.load(Ordering::Relaxed) { COMMIT } else { 1 } {
                return;
            }
        }
    }
}

struct Watched {
    stream: ByteStream,
    progress: Arc<Progress>,
}

impl Stream for Watched {
    type Item = std::io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = self.stream.poll_next_unpin(cx);
        self.progress.ours.store(next.is_pending(), Ordering::Relaxed);
        match &next {
            Poll::Ready(Some(_)) => {
                self.progress.pieces.fetch_add(1, Ordering::Relaxed);
            }
            Poll::Ready(None) => self.progress.ended.store(true, Ordering::Relaxed),
            Poll::Pending => {}
        }
        next
    }
}
