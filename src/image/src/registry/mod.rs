//! A small client of the OCI distribution API, with bounds on all that a registry answers.

mod auth;
pub(crate) mod manifest;

use std::{net::IpAddr, time::Duration};

use futures::lock::Mutex;
use moxlet_ids::Digest;
use reqwest::{
    Client, Response, StatusCode, Url,
    header::{ACCEPT, AUTHORIZATION, CONTENT_RANGE, HeaderMap, HeaderValue, LOCATION, RANGE, RETRY_AFTER},
};

use crate::{Config, Credentials, Error, Reference, Result, credentials::NodeCredentials, error::chain};

const CONNECT: Duration = Duration::from_secs(10);
const STALL: Duration = Duration::from_secs(60);
const MAX_REDIRECTS: usize = 5;
/// How often a request is sent before the registry counts as unreachable.
pub(crate) const ATTEMPTS: u32 = 4;
const MAX_ERROR_BODY: usize = 16 << 10;

/// The HTTP clients, shared by all pulls.
#[derive(Debug)]
pub(crate) struct Registry {
    remote: Client,
    /// For hosts on loopback, which no proxy could reach.
    local: Client,
    plain_hosts: Vec<String>,
    node: NodeCredentials,
}

/// What the pulls of one image share: where it is and how to log in there.
pub(crate) struct Session<'a> {
    registry: &'a Registry,
    pub(crate) reference: &'a Reference,
    auths: &'a [Credentials],
    base: Url,
    /// The header that worked last.
    login: Mutex<Option<HeaderValue>>,
}

impl Registry {
    pub(crate) fn new(config: &Config) -> Result<Self> {
        // A second provider is not installed; whichever came first serves.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let builder = || {
            Client::builder()
                .user_agent(concat!("moxlet/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(CONNECT)
                .read_timeout(STALL)
                .redirect(reqwest::redirect::Policy::none())
        };
        let error = |e: reqwest::Error| Error::Client(chain(&e));
        Ok(Self {
            remote: builder().build().map_err(error)?,
            local: builder().no_proxy().build().map_err(error)?,
            plain_hosts: config.plain_http_hosts.clone(),
            node: NodeCredentials::new(config.docker_config.clone()),
        })
    }

    pub(crate) fn session<'a>(
        &'a self,
        reference: &'a Reference,
        auths: &'a [Credentials],
    ) -> Result<Session<'a>> {
        let host = match reference.registry() {
            "docker.io" => "registry-1.docker.io",
            other => other,
        };
        let scheme = if self.is_plain(host) { "http" } else { "https" };
        let base = Url::parse(&format!("{scheme}://{host}/v2/{}/", reference.repository()))
            .map_err(|e| Error::InvalidName { reference: reference.to_string(), reason: e.to_string() })?;
        Ok(Session { registry: self, reference, auths, base, login: Mutex::new(None) })
    }

    /// Whether a host (with or without port) is spoken to without TLS.
    fn is_plain(&self, authority: &str) -> bool {
        let host = match authority.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => host,
            _ => authority,
        };
        is_loopback(host) || self.plain_hosts.iter().any(|h| h == authority || h == host)
    }

    fn client(&self, url: &Url) -> &Client {
        if url.host_str().is_some_and(is_loopback) { &self.local } else { &self.remote }
    }

    /// Whether a request may go to an address that a registry has named.
    fn may_go(&self, url: &Url) -> bool {
        let Some(host) = url.host_str() else { return false };
        let authority = url.port().map_or_else(|| host.to_owned(), |p| format!("{host}:{p}"));
        match url.scheme() {
            "https" => true,
            "http" => self.is_plain(&authority),
            _ => false,
        }
    }
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare == "localhost" || bare.parse::<IpAddr>().is_ok_and(|a| a.is_loopback())
}

/// What a request asks for beside the address.
#[derive(Debug, Clone, Copy)]
struct Ask {
    accept: Option<&'static str>,
    /// Where in the content it is to begin.
    from: u64,
}

/// What a request ended in that was answered with no success.
enum Refusal {
    Unauthorized(HeaderMap, String),
    Other(Error),
}

impl Session<'_> {
    pub(crate) fn name(&self) -> String {
        self.reference.to_string()
    }

    /// The body of a manifest (not longer than `max`) and its digest as the registry announces it.
    pub(crate) async fn manifest(&self, wanted: &str, max: usize) -> Result<(Vec<u8>, Option<Digest>)> {
        let response =
            self.get(&format!("manifests/{wanted}"), Ask { accept: Some(manifest::ACCEPT), from: 0 }).await?;
        let announced = response
            .headers()
            .get("docker-content-digest")
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.parse().ok());
        Ok((self.body(response, max, "manifest").await?, announced))
    }

    /// The answer to a request for a blob, whose body is still to come, and where in the blob it begins: at `from`, or
    /// at 0 where the registry cannot do that.
    pub(crate) async fn blob(&self, digest: &Digest, from: u64) -> Result<(Response, u64)> {
        let response = self.get(&format!("blobs/{digest}"), Ask { accept: None, from }).await?;
        if response.status() != StatusCode::PARTIAL_CONTENT {
            return Ok((response, 0));
        }
        let range = response.headers().get(CONTENT_RANGE).and_then(|v| v.to_str().ok());
        match range.and_then(|r| r.strip_prefix("bytes ")?.split_once('-')?.0.parse::<u64>().ok()) {
            Some(begin) if begin == from => Ok((response, from)),
            _ => Err(self.unreachable("it answers with another part of a blob than was asked for")),
        }
    }

    /// A whole body, bounded.
    pub(crate) async fn body(&self, mut response: Response, max: usize, part: &str) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        while let Some(chunk) =
            response.chunk().await.map_err(|e| self.unreachable(&chain(&e.without_url())))?
        {
            if body.len() + chunk.len() > max {
                return Err(self.bad(part, format!("it is larger than {max} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    pub(crate) fn bad(&self, part: &str, reason: impl Into<String>) -> Error {
        Error::BadImage { reference: self.name(), part: part.to_owned(), reason: reason.into() }
    }

    pub(crate) fn unreachable(&self, reason: &str) -> Error {
        Error::Unreachable {
            reference: self.name(),
            registry: self.reference.registry().to_owned(),
            reason: reason.to_owned(),
        }
    }

    fn denied(&self, reason: impl Into<String>) -> Error {
        Error::Denied { reference: self.name(), reason: reason.into() }
    }

    /// A GET below the repository; logs in where the registry asks for it.
    async fn get(&self, path: &str, ask: Ask) -> Result<Response> {
        let url = self.base.join(path).map_err(|e| self.unreachable(&e.to_string()))?;
        let login = self.login.lock().await.clone();
        let (challenge, mut reason) = match self.send(&url, ask, login.as_ref()).await {
            Ok(response) => return Ok(response),
            Err(Refusal::Unauthorized(headers, reason)) => (headers, reason),
            Err(Refusal::Other(error)) => return Err(error),
        };
        let challenges = auth::challenges(&challenge);
        let node = self.registry.node.lookup(self.reference.registry(), self.reference.repository()).await;
        let anonymous = Credentials::default();
        for credentials in self.auths.iter().chain(&node).chain([&anonymous]) {
            let header = match self.log_in(&challenges, credentials).await {
                Ok(Some(header)) => header,
                Ok(None) => continue,
                Err(Error::Denied { reason: r, .. }) => {
                    reason = r;
                    continue;
                }
                Err(error) => return Err(error),
            };
            match self.send(&url, ask, Some(&header)).await {
                Ok(response) => {
                    *self.login.lock().await = Some(header);
                    return Ok(response);
                }
                Err(Refusal::Unauthorized(_, r)) => reason = r,
                Err(Refusal::Other(error)) => return Err(error),
            }
        }
        Err(self.denied(reason))
    }

    /// Sends one request, again where the registry is in trouble, along its redirects.
    async fn send(
        &self,
        url: &Url,
        ask: Ask,
        login: Option<&HeaderValue>,
    ) -> std::result::Result<Response, Refusal> {
        let mut last = String::new();
        for attempt in 0..ATTEMPTS {
            let mut pause = Duration::from_millis(500 << attempt);
            match self.follow(url, ask, login).await.map_err(Refusal::Other)? {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) => {
                    let status = response.status();
                    let headers = response.headers().clone();
                    let reason = describe(status, response).await;
                    match status {
                        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                            return Err(Refusal::Unauthorized(headers, reason));
                        }
                        StatusCode::NOT_FOUND => {
                            let reference = self.name();
                            return Err(Refusal::Other(Error::NotFound { reference, reason }));
                        }
                        s if s.is_server_error() || s == StatusCode::TOO_MANY_REQUESTS => {
                            if let Some(seconds) =
                                headers.get(RETRY_AFTER).and_then(|v| v.to_str().ok()?.parse().ok())
                            {
                                pause = pause.max(Duration::from_secs(std::cmp::min(seconds, 30)));
                            }
                            last = reason;
                        }
                        _ => return Err(Refusal::Other(self.unreachable(&reason))),
                    }
                }
                Err(error) => {
                    last = chain(&error);
                    if error.is_connect() || error.is_builder() {
                        break;
                    }
                }
            }
            if attempt + 1 < ATTEMPTS {
                tokio::time::sleep(pause).await;
            }
        }
        Err(Refusal::Other(self.unreachable(&last)))
    }

    /// One request and its redirects. The login goes to nobody but the host that it is for.
    async fn follow(
        &self,
        url: &Url,
        ask: Ask,
        login: Option<&HeaderValue>,
    ) -> Result<std::result::Result<Response, reqwest::Error>> {
        let mut at = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.registry.client(&at).get(at.clone());
            if let Some(accept) = ask.accept {
                request = request.header(ACCEPT, accept);
            }
            if ask.from > 0 {
                request = request.header(RANGE, format!("bytes={}-", ask.from));
            }
            if let Some(login) = login
                && at.origin() == url.origin()
            {
                request = request.header(AUTHORIZATION, login.clone());
            }
            let response = match request.send().await {
                Ok(response) => response,
                Err(error) => return Ok(Err(error.without_url())),
            };
            let location = response.headers().get(LOCATION).and_then(|l| l.to_str().ok());
            let Some(location) = location.filter(|_| response.status().is_redirection()) else {
                return Ok(Ok(response));
            };
            at = at.join(location).map_err(|_| self.unreachable("it redirects to what is no address"))?;
            if !self.registry.may_go(&at) || (url.scheme() == "https" && at.scheme() != "https") {
                return Err(self.unreachable("it redirects to an address without TLS"));
            }
        }
        Err(self.unreachable(&format!("it redirects more than {MAX_REDIRECTS} times")))
    }
}

/// What a registry says about a failure, short and printable.
async fn describe(status: StatusCode, mut response: Response) -> String {
    #[derive(serde::Deserialize)]
    struct Body {
        errors: Vec<Item>,
    }
    #[derive(serde::Deserialize)]
    struct Item {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        body.extend_from_slice(&chunk);
        if body.len() > MAX_ERROR_BODY {
            break;
        }
    }
    let said = serde_json::from_slice::<Body>(&body)
        .ok()
        .and_then(|b| b.errors.into_iter().next())
        .map(|e| format!(": {}: {}", e.code, e.message))
        .unwrap_or_default();
    let said: String = said.chars().filter(|c| !c.is_control()).take(300).collect();
    format!("{status}{said}")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn plain_http_is_for_loopback_and_who_is_named() {
        let plain_http_hosts = vec!["a.b:5000".into(), "c.d".into()];
        let registry = Registry::new(&Config { plain_http_hosts, ..Config::default() }).unwrap();
        for host in
            ["localhost", "localhost:5000", "127.8.9.1:80", "[::1]", "[::1]:5000", "a.b:5000", "c.d:1"]
        {
            assert!(registry.is_plain(host), "{host}");
        }
        for host in ["a.b", "a.b:5001", "docker.io", "128.0.0.1", "[::2]:5000", "localhost.a"] {
            assert!(!registry.is_plain(host), "{host}");
        }
        assert!(!registry.may_go(&Url::parse("http://e.f/").unwrap()));
        assert!(!registry.may_go(&Url::parse("file:///etc/passwd").unwrap()));
    }
}
