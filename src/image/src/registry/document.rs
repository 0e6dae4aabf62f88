//! Manifests as hosts send them: whole and within bounds, or only announced.

use moxlet_ids::{Algorithm, Digest};
use reqwest::{
    Method,
    header::{ACCEPT, HeaderValue},
};

use super::{Endpoint, Purpose, Session, manifest, request::Call};
use crate::{Error, Result};

impl Session<'_> {
    /// The body of a manifest (not longer than `max`). Where its digest is known, only a host that has this very one is
    /// heard; of a tag, what the host announces must be what it sends.
    pub(crate) async fn manifest(
        &self,
        wanted: &str,
        expected: Option<&Digest>,
        max: usize,
    ) -> Result<Vec<u8>> {
        let accept = HeaderValue::from_static(manifest::ACCEPT);
        let purpose = if expected.is_some() { Purpose::Pull } else { Purpose::Resolve };
        let mut outcome = None;
        for endpoint in self.endpoints(purpose)? {
            let url = endpoint.url(&format!("manifests/{wanted}")).map_err(|e| self.unreachable(&e))?;
            let call = Call::new(Method::GET, url).header(ACCEPT, accept.clone());
            match self.manifest_from(endpoint, &call, expected, max).await {
                Ok(body) => return Ok(body),
                Err(error) => outcome = self.next(endpoint, error, outcome),
            }
        }
        Err(outcome.unwrap_or(Error::Stopped))
    }

    /// What a tag or digest stands for as the hosts announce it, without its manifest; nothing where none does, for whatever
    /// reason.
    pub(crate) async fn announced(&self, wanted: &str) -> Option<Digest> {
        let known = self.reference.digest();
        let purpose = if known.is_some() { Purpose::Pull } else { Purpose::Resolve };
        for endpoint in self.endpoints(purpose).ok()? {
            let url = endpoint.url(&format!("manifests/{wanted}")).ok()?;
            let mut call = Call::new(Method::HEAD, url);
            call = call.header(ACCEPT, HeaderValue::from_static(manifest::ACCEPT));
            call.once = true;
            let Ok(response) = self.authorized(endpoint, &call).await else { continue };
            let header = response.headers().get("docker-content-digest").and_then(|v| v.to_str().ok());
            return known.cloned().or_else(|| header?.parse().ok());
        }
        None
    }

    async fn manifest_from(
        &self,
        endpoint: &Endpoint,
        call: &Call,
        expected: Option<&Digest>,
        max: usize,
    ) -> Result<Vec<u8>> {
        let (headers, body) = loop {
            let response = self.authorized(endpoint, call).await?;
            let headers = response.headers().clone();
            match self.body(response, max, "manifest").await {
                Ok(body) => break (headers, body),
                Err(unread) => self.retry(endpoint, call, unread).await?,
            }
        };
        let header = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
        let announced = header("docker-content-digest").and_then(|v| v.parse::<Digest>().ok());
        let encoding = header("content-encoding").unwrap_or("identity").to_owned();
        let body = match encoding.as_str() {
            "identity" => body,
            "gzip" | "x-gzip" => self.gunzip(&body, max)?,
            _ => return Err(self.bad("manifest", "the registry encodes it in a way that was not asked for")),
        };
        let expected = expected.or(announced.as_ref());
        let actual = Digest::by(expected.map_or(Algorithm::Sha256, Digest::algorithm), &body);
        match expected {
            Some(expected) if *expected != actual => Err(Error::DigestMismatch {
                reference: self.name(),
                part: "manifest".into(),
                expected: expected.to_string(),
                actual: actual.to_string(),
            }),
            _ => Ok(body),
        }
    }

    fn gunzip(&self, bytes: &[u8], max: usize) -> Result<Vec<u8>> {
        use std::io::Read;
        let mut plain = Vec::new();
        flate2::read::MultiGzDecoder::new(bytes)
            .take(max as u64 + 1)
            .read_to_end(&mut plain)
            .map_err(|e| self.bad("manifest", format!("its gzip cannot be read: {e}")))?;
        if plain.len() > max {
            return Err(self.bad("manifest", format!("it is larger than {max} bytes")));
        }
        Ok(plain)
    }
}
