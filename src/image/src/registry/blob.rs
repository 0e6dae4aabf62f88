//! A blob on its way: its pieces, and the place at the host that it takes.

use std::{sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use moxlet_ids::Digest;
use reqwest::{Method, Response};

use super::{Endpoint, Purpose, Session, Timing, request::Call, slots::Slot};
use crate::{Error, error::chain};

/// Who has sent the parts of a blob.
#[derive(Debug, Default)]
pub(crate) struct Served {
    /// The numbers of the hosts.
    pub(super) by: Vec<usize>,
    /// Whether it has turned out to be another one.
    pub(crate) lied: bool,
}

/// A blob that is coming.
#[derive(Debug)]
pub(crate) struct Blob<'a> {
    pub(super) response: Response,
    /// Where in the blob it begins.
    pub(crate) begin: u64,
    pub(super) endpoint: &'a Endpoint,
    pub(super) slot: Option<Slot>,
    pub(super) timing: Timing,
}

impl Session<'_> {
    /// Whether no host has a blob; false where it is not clear.
    pub(super) async fn lacks(&self, digest: &Digest) -> bool {
        let Ok(endpoints) = self.endpoints(Purpose::Pull) else { return false };
        for endpoint in endpoints {
            let Ok(url) = endpoint.url(&format!("blobs/{digest}")) else { return false };
            let mut call = Call::new(Method::HEAD, url);
            call.once = true;
            if !matches!(self.authorized(endpoint, &call).await, Err(Error::NotFound { .. })) {
                return false;
            }
        }
        true
    }
}

impl Blob<'_> {
    /// The next piece; none at the end.
    ///
    /// # Errors
    /// Why the download has broken off.
    pub(crate) async fn chunk(&mut self) -> std::result::Result<Option<Bytes>, String> {
        match tokio::time::timeout(self.timing.stall, self.response.chunk()).await {
            Ok(Ok(piece)) => Ok(piece),
            Ok(Err(error)) => Err(chain(&error.without_url())),
            Err(_) => Err(self.timing.silence()),
        }
    }

    /// Notes who sends it.
    pub(crate) fn note(&self, served: &mut Served) {
        if !served.by.contains(&self.endpoint.number) {
            served.by.push(self.endpoint.number);
        }
    }

    /// How long a host may be silent.
    pub(crate) fn stall(&self) -> Duration {
        self.timing.stall
    }

    /// Lets others have our place at the host while nobody takes what comes: those may be what the taker waits for.
    pub(crate) fn rest(&mut self) {
        self.slot = None;
    }

    /// Takes a place again.
    pub(crate) async fn go_on(&mut self) {
        if self.slot.is_none() {
            self.slot = Some(self.endpoint.slots.take().await);
        }
    }

    /// Remembers that the host has broken off.
    pub(crate) fn broke(&self) {
        self.endpoint.broken.fetch_add(1, Ordering::Relaxed);
    }
}
