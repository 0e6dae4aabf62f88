//! One request to one host: sent again where the host is in trouble, followed along its redirects, read within bounds.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use reqwest::{
    Method, Response, StatusCode, Url,
    header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, RANGE, RETRY_AFTER, USER_AGENT},
};

use super::{Endpoint, Session, authority};
use crate::{Error, Result, error::chain};

const MAX_REDIRECTS: usize = 5;
/// How often a request is sent before the registry counts as unreachable.
pub(crate) const ATTEMPTS: u32 = 4;
/// A registry that asks for a longer pause is not waited for; whoever wants the image comes again.
const MAX_PAUSE: Duration = Duration::from_secs(30);
const MAX_ERROR_BODY: usize = 16 << 10;
/// How long all of a body may take that is read into memory, in times of the wait for one piece.
const BODY_PATIENCE: u32 = 2;

/// A request that can be sent again.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
    /// Whether it is given up after one attempt.
    pub(super) once: bool,
    /// How long the head of the answer may take, in times of the usual wait.
    pub(super) patience: u32,
    /// How often it has failed, be it before the head of an answer or in its body: both count together.
    failures: AtomicU32,
}

impl Call {
    pub(super) fn new(method: Method, url: Url) -> Self {
        Self {
            method,
            url,
            headers: HeaderMap::new(),
            body: Vec::new(),
            once: false,
            patience: 1,
            failures: AtomicU32::new(0),
        }
    }

    pub(super) fn header(mut self, name: reqwest::header::HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }

    pub(super) fn writes(&self) -> bool {
        !self.reads()
    }

    /// Counts a failure: the pause before the next try, if there is one left.
    fn failed(&self, session: &Session<'_>, endpoint: &Endpoint) -> Option<Duration> {
        let before = self.failures.fetch_add(1, Ordering::Relaxed);
        let tries = if self.once { 1 } else { endpoint.attempts() };
        (before + 1 < tries).then(|| session.registry.pause(before))
    }

    /// Redirects of a request that changes something are not followed.
    fn reads(&self) -> bool {
        self.method == Method::GET || self.method == Method::HEAD
    }
}

/// What a request ended in that was answered with no success.
pub(super) enum Refusal {
    /// The host that was asked wants a login, or another one. One that it has redirected to is no host for which we have
    /// a login: what that one wants is [`Self::Other`].
    Unauthorized(HeaderMap, String),
    /// The host does not take the request as it is.
    Rejected(String),
    Other(Error),
}

impl Refusal {
    /// What a refusal means for a request whose login may be changed: the challenge.
    pub(super) fn challenge(self) -> std::result::Result<(HeaderMap, String), Self> {
        match self {
            Self::Unauthorized(headers, reason) => Ok((headers, reason)),
            other => Err(other),
        }
    }
}

/// Why a body was not read to its end.
pub(super) enum Unread {
    /// It broke off; another attempt may get all of it.
    Broken(String),
    /// Nobody wants it.
    Refused(Error),
}

impl Session<'_> {
    /// Sends a request, again where the host is in trouble, along its redirects.
    pub(super) async fn send(
        &self,
        endpoint: &Endpoint,
        call: &Call,
        login: Option<&HeaderValue>,
    ) -> std::result::Result<Response, Refusal> {
        let last = loop {
            let (last, wanted) = match self.follow(endpoint, call, login).await.map_err(Refusal::Other)? {
                Ok(response) if response.status().is_success() => return Ok(response),
                // Whoever asks for a part knows what to do.
                Ok(response)
                    if response.status() == StatusCode::RANGE_NOT_SATISFIABLE
                        && call.headers.contains_key(RANGE) =>
                {
                    return Ok(response);
                }
                Ok(response) => self.trouble(call, response).await?,
                Err((true, reason)) => break reason,
                Err((false, reason)) => (reason, Duration::ZERO),
            };
            if wanted > MAX_PAUSE {
                break format!("{last} (it wants no request for {} s)", wanted.as_secs());
            }
            match call.failed(self, endpoint) {
                Some(pause) => tokio::time::sleep(pause.max(wanted)).await,
                None => break last,
            }
        };
        Err(Refusal::Other(self.unreachable(&format!("{}: {last}", endpoint.name()))))
    }

    /// Why a request may be sent again that was answered with no success, and the pause that the host wants.
    async fn trouble(
        &self,
        call: &Call,
        response: Response,
    ) -> std::result::Result<(String, Duration), Refusal> {
        let (status, headers, by) = (response.status(), response.headers().clone(), response.url().clone());
        let reason = self.describe(response).await;
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err(self.not_let_in(call, &by, headers, reason))
            }
            StatusCode::NOT_FOUND => Err(Refusal::Other(Error::NotFound { reference: self.name(), reason })),
            s if s.is_server_error() || s == StatusCode::TOO_MANY_REQUESTS => {
                Ok((reason, retry_after(&headers).unwrap_or_default()))
            }
            s if s.is_client_error() => Err(Refusal::Rejected(reason)),
            _ => Err(Refusal::Other(self.unreachable(&reason))),
        }
    }

    /// What it means that `by` lets us not in. Its challenge names a place that gets a secret, so nobody's counts but that
    /// of the host for which the secret is.
    fn not_let_in(&self, call: &Call, by: &Url, headers: HeaderMap, reason: String) -> Refusal {
        if by.origin() == call.url.origin() {
            return Refusal::Unauthorized(headers, reason);
        }
        let (from, to) = (authority(&call.url), authority(by));
        Refusal::Other(self.denied(format!("{to}, to which {from} redirects, answers {reason}")))
    }

    /// One request and its redirects. Login and headers of a host go to nobody but that host. The inner error says whether
    /// it is of no use to try again.
    async fn follow(
        &self,
        endpoint: &Endpoint,
        call: &Call,
        login: Option<&HeaderValue>,
    ) -> Result<std::result::Result<Response, (bool, String)>> {
        let mut at = call.url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let response = match self.once(endpoint, call, &at, login).await {
                Ok(response) => response,
                Err(error) => return Ok(Err(error)),
            };
            let location = response.headers().get(LOCATION).and_then(|l| l.to_str().ok());
            let Some(location) = location.filter(|_| call.reads() && response.status().is_redirection())
            else {
                return Ok(Ok(response));
            };
            at = at.join(location).map_err(|_| self.unreachable("it redirects to what is no address"))?;
            if !self.registry.may_go(&endpoint.base, &at) {
                return Err(self.unreachable("it redirects to an address without TLS"));
            }
        }
        Err(self.unreachable(&format!("it redirects more than {MAX_REDIRECTS} times")))
    }

    async fn once(
        &self,
        endpoint: &Endpoint,
        call: &Call,
        at: &Url,
        login: Option<&HeaderValue>,
    ) -> std::result::Result<Response, (bool, String)> {
        let mut headers = HeaderMap::new();
        if at.origin() == call.url.origin() {
            if at.origin() == endpoint.base.origin() {
                headers.clone_from(&endpoint.headers);
            }
            headers.extend(call.headers.clone());
            if let Some(login) = login {
                headers.insert(AUTHORIZATION, login.clone());
            }
        } else {
            for name in [ACCEPT, RANGE, USER_AGENT] {
                if let Some(value) = call.headers.get(&name) {
                    headers.insert(name, value.clone());
                }
            }
        }
        let request = endpoint.clients.of(at).request(call.method.clone(), at.clone()).headers(headers);
        let request = if call.body.is_empty() { request } else { request.body(call.body.clone()) };
        let patience = self.registry.timing.stall.saturating_mul(call.patience);
        match tokio::time::timeout(patience, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => {
                let fatal = error.is_builder() || (error.is_connect() && !is_passing(&error));
                Err((fatal, chain(&error.without_url())))
            }
            Err(_) => Err((false, self.registry.timing.silence())),
        }
    }

    /// Waits before a document that broke off is asked for again.
    ///
    /// # Errors
    /// It was the last attempt, or is of no use to try again.
    pub(super) async fn retry(&self, endpoint: &Endpoint, call: &Call, unread: Unread) -> Result<()> {
        let reason = match unread {
            Unread::Refused(error) => return Err(error),
            Unread::Broken(reason) => reason,
        };
        let Some(pause) = call.failed(self, endpoint) else {
            return Err(self.unreachable(&format!("{}: {reason}", endpoint.name())));
        };
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// A whole body, bounded.
    pub(super) async fn body(
        &self,
        mut response: Response,
        max: usize,
        part: &str,
    ) -> std::result::Result<Vec<u8>, Unread> {
        let read = async {
            let mut body = Vec::new();
            while let Some(chunk) =
                response.chunk().await.map_err(|e| Unread::Broken(chain(&e.without_url())))?
            {
                if body.len() + chunk.len() > max {
                    let reason = format!("it is larger than {max} bytes");
                    return Err(Unread::Refused(self.bad(part, reason)));
                }
                body.extend_from_slice(&chunk);
            }
            Ok(body)
        };
        let patience = self.registry.timing.stall.saturating_mul(BODY_PATIENCE);
        tokio::time::timeout(patience, read).await.unwrap_or_else(|_| {
            Err(Unread::Refused(self.unreachable(&format!("{part}: it comes too slowly"))))
        })
    }

    /// What a registry says about a failure, short and printable.
    pub(super) async fn describe(&self, mut response: Response) -> String {
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
        let status = response.status();
        let mut body = Vec::new();
        let read = async {
            while let Ok(Some(chunk)) = response.chunk().await {
                body.extend_from_slice(&chunk);
                if body.len() > MAX_ERROR_BODY {
                    break;
                }
            }
        };
        // What came by then is what it says.
        let _ = tokio::time::timeout(self.registry.timing.stall, read).await;
        let said = serde_json::from_slice::<Body>(&body)
            .ok()
            .and_then(|b| b.errors.into_iter().next())
            .map(|e| format!(": {}: {}", e.code, e.message))
            .unwrap_or_default();
        let said: String = said.chars().filter(|c| !c.is_control()).take(300).collect();
        format!("{status}{said}")
    }
}

/// Whether a failure to connect is one that passes: nobody listens just now, as while a registry is started anew.
fn is_passing(error: &reqwest::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, UnexpectedEof};
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<std::io::Error>()
            && matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | UnexpectedEof)
        {
            return true;
        }
        cause = error.source();
    }
    false
}

/// The pause that a registry asks for; only in seconds, since its clock need not be ours.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}
