//! A small client of the OCI distribution API, with bounds on all that a registry answers.
//!
//! A [`Session`] is what the requests for one image share: the hosts that serve it, in the order in which they are tried
//! (mirrors, then the registry), each with its login. A host that fails is followed by the next one; what the last one
//! says is what the caller hears.

mod auth;
mod blob;
mod document;
mod hosts;
pub(crate) mod manifest;
pub(crate) mod platform;
mod request;
mod slots;
mod tls;
pub(crate) mod upload;

use std::{
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use moxlet_ids::Digest;
use reqwest::{
    Method, StatusCode, Url,
    header::{CONTENT_RANGE, HeaderMap, HeaderValue, RANGE},
};

use crate::{Config, Credentials, Error, Reference, Result, credentials::NodeCredentials};
use blob::Blob;
pub(crate) use blob::Served;
pub use hosts::check_registry_config;
use hosts::{Capabilities, Hosts};
pub(crate) use request::ATTEMPTS;
use request::Call;
use slots::Slots;

const CONNECT: Duration = Duration::from_secs(10);
/// How often a host may fail before another one is asked first.
const MIRROR_PATIENCE: u32 = 2;

/// How long is waited.
#[derive(Debug, Clone, Copy)]
struct Timing {
    /// For the head of an answer, and for each piece of its body.
    stall: Duration,
    /// Before a second attempt; each further one waits twice as long.
    pause: Duration,
}

impl Timing {
    fn silence(&self) -> String {
        format!("it said nothing for {:?}", self.stall)
    }
}

/// What all pulls share.
#[derive(Debug)]
pub(crate) struct Registry {
    plain_hosts: Vec<String>,
    config_dir: Option<PathBuf>,
    node: NodeCredentials,
    clients: tls::Cache,
    slots: Slots,
    timing: Timing,
}

/// One host that serves an image.
#[derive(Debug)]
struct Endpoint {
    /// The address of the repository in its API, with a slash at the end.
    base: Url,
    /// The registry for which it stands, where it is another.
    namespace: Option<String>,
    can: Capabilities,
    headers: HeaderMap,
    clients: Arc<tls::Clients>,
    slots: slots::Host,
    /// Whether it is the registry, for which the credentials of a pull are.
    is_registry: bool,
    /// Whether there is none after it.
    last: bool,
    /// Which one it is of those of its session.
    number: usize,
    /// Whether it has sent other bytes than a digest stands for.
    lies: AtomicBool,
    login: auth::Login,
    /// How often it has failed, or a download from it has broken off.
    broken: AtomicU32,
    /// Whether it has answered a request for a part of a blob with nonsense.
    no_ranges: AtomicBool,
}

/// What the requests for one image share: where it is and how to log in there.
#[derive(Debug)]
pub(crate) struct Session<'a> {
    registry: &'a Registry,
    pub(crate) reference: &'a Reference,
    auths: &'a [Credentials],
    endpoints: Vec<Endpoint>,
}

/// What a request is about, for the choice of its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// What a tag stands for.
    Resolve,
    /// Contents by digest.
    Pull,
    Push,
}

impl Registry {
    pub(crate) fn new(config: &Config) -> Result<Self> {
        Ok(Self {
            plain_hosts: config.plain_http_hosts.clone(),
            config_dir: config.registry_config_dir.clone(),
            node: NodeCredentials::new(config.docker_config.clone()),
            clients: tls::Cache::default(),
            slots: Slots::new(config.max_parallel_per_host),
            timing: Timing { stall: config.stall_timeout, pause: config.retry_pause },
        })
    }

    /// One that has the credentials of a node of its own.
    #[cfg(test)]
    pub(crate) fn with_node(self, node: NodeCredentials) -> Self {
        Self { node, ..self }
    }

    /// Finds out where an image is served from.
    ///
    /// # Errors
    /// [`Error::Settings`]: what the settings of its registry say cannot be used.
    pub(crate) async fn session<'a>(
        &'a self,
        reference: &'a Reference,
        auths: &'a [Credentials],
    ) -> Result<Session<'a>> {
        let registry = reference.registry();
        let found = match &self.config_dir {
            Some(dir) => {
                let (dir, registry) = (dir.clone(), registry.to_owned());
                let read = tokio::task::spawn_blocking(move || hosts::load(&dir, &registry));
                read.await.map_err(|_| Error::Stopped)??
            }
            None => None,
        };
        let Hosts { mut hosts, for_all } = found.unwrap_or_default();
        if hosts.is_empty() {
            hosts.push(hosts::Host::default());
        }
        let count = hosts.len();
        let mut endpoints = Vec::with_capacity(count);
        for (n, host) in hosts.iter().enumerate() {
            let last = n + 1 == count;
            let endpoint = self.endpoint(reference, host, last, last && !for_all)?;
            endpoints.push(Endpoint { number: n, ..endpoint });
        }
        Ok(Session { registry: self, reference, auths, endpoints })
    }

    fn endpoint(
        &self,
        reference: &Reference,
        host: &hosts::Host,
        last: bool,
        stands_for_registry: bool,
    ) -> Result<Endpoint> {
        let own = match reference.registry() {
            "docker.io" => "registry-1.docker.io",
            other => other,
        };
        let invalid = |reason: String| Error::InvalidName { reference: reference.to_string(), reason };
        let api = match &host.api {
            Some(api) => api.clone(),
            None => {
                // Who says something about TLS wants it.
                let scheme = if !host.tls && self.is_plain(own) { "http" } else { "https" };
                Url::parse(&format!("{scheme}://{own}/v2/")).map_err(|e| invalid(e.to_string()))?
            }
        };
        let base = api.join(&format!("{}/", reference.repository())).map_err(|e| invalid(e.to_string()))?;
        let is_own = authority(&base) == own || host.api.is_none();
        Ok(Endpoint {
            slots: self.slots.host(&base.origin().ascii_serialization()),
            namespace: (!is_own).then(|| reference.registry().to_owned()),
            can: host.can,
            headers: host.headers.clone(),
            clients: self.clients.clients(host, CONNECT)?,
            is_registry: is_own || stands_for_registry,
            last,
            number: 0,
            lies: AtomicBool::new(false),
            login: auth::Login::default(),
            broken: AtomicU32::new(0),
            no_ranges: AtomicBool::new(false),
            base,
        })
    }

    /// Whether a host (with or without port) is spoken to without TLS.
    fn is_plain(&self, authority: &str) -> bool {
        let host = match authority.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => host,
            _ => authority,
        };
        is_loopback(host) || self.plain_hosts.iter().any(|h| h == authority || h == host)
    }

    /// Whether a request may go to an address that a host has named: with TLS, or without where the host itself has none
    /// and the other is the same or may be spoken to like that.
    fn may_go(&self, from: &Url, to: &Url) -> bool {
        match to.scheme() {
            "https" => to.host_str().is_some(),
            "http" => {
                from.scheme() == "http" && (from.host_str() == to.host_str() || self.is_plain(&authority(to)))
            }
            _ => false,
        }
    }

    /// The pause after an attempt, of which the first is 0; not the same for all who wait.
    pub(crate) fn pause(&self, attempt: u32) -> Duration {
        let full = self.timing.pause.saturating_mul(2_u32.saturating_pow(attempt.min(10)));
        full.mul_f64(rand::random_range(0.75..1.25))
    }
}

/// `host` or `host:port` of an address.
fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare == "localhost" || bare.parse::<IpAddr>().is_ok_and(|a| a.is_loopback())
}

impl Endpoint {
    fn name(&self) -> String {
        authority(&self.base)
    }

    /// How often something is tried with it: where there is another host, that one comes first.
    fn attempts(&self) -> u32 {
        if self.last { ATTEMPTS } else { 1 }
    }

    /// An address below the repository.
    fn url(&self, path: &str) -> std::result::Result<Url, String> {
        let mut url = self.base.join(path).map_err(|e| e.to_string())?;
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        Ok(url)
    }
}

impl Session<'_> {
    pub(crate) fn name(&self) -> String {
        self.reference.to_string()
    }

    /// A blob from `from` on, or from its beginning where a host cannot do that.
    pub(crate) async fn blob(&self, digest: &Digest, from: u64) -> Result<Blob<'_>> {
        let mut endpoints = self.endpoints(Purpose::Pull)?;
        endpoints.retain(|e| !e.lies.load(Ordering::Relaxed));
        endpoints.sort_by_key(|e| e.broken.load(Ordering::Relaxed) / MIRROR_PATIENCE);
        let mut outcome = None;
        for endpoint in endpoints {
            match self.blob_from(endpoint, digest, from).await {
                Ok(blob) => return Ok(blob),
                Err(error) => outcome = self.next(endpoint, error, outcome),
            }
        }
        Err(outcome.unwrap_or(Error::Stopped))
    }

    async fn blob_from<'s>(&'s self, endpoint: &'s Endpoint, digest: &Digest, from: u64) -> Result<Blob<'s>> {
        let slot = endpoint.slots.take().await;
        let url = endpoint.url(&format!("blobs/{digest}")).map_err(|e| self.unreachable(&e))?;
        let mut call = Call::new(Method::GET, url);
        let from = if endpoint.no_ranges.load(Ordering::Relaxed) { 0 } else { from };
        if from > 0
            && let Ok(range) = HeaderValue::try_from(format!("bytes={from}-"))
        {
            call = call.header(RANGE, range);
        }
        let mut response = self.authorized(endpoint, &call).await?;
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            // It may have the whole.
            endpoint.no_ranges.store(true, Ordering::Relaxed);
            call.headers.remove(RANGE);
            response = self.authorized(endpoint, &call).await?;
        }
        let begin = if response.status() == StatusCode::PARTIAL_CONTENT {
            let range = response.headers().get(CONTENT_RANGE).and_then(|v| v.to_str().ok());
            let begin = range.and_then(|r| r.strip_prefix("bytes ")?.split_once('-')?.0.parse::<u64>().ok());
            if begin != Some(from) {
                endpoint.no_ranges.store(true, Ordering::Relaxed);
                return Err(self.unreachable("it answers with another part of a blob than was asked for"));
            }
            from
        } else {
            0
        };
        Ok(Blob { response, begin, endpoint, slot: Some(slot), timing: self.registry.timing })
    }

    /// Asks hosts that have sent other bytes than a digest stands for no more; false where nobody would be left to ask.
    pub(crate) fn distrust(&self, served: &Served) -> bool {
        let suspect = |e: &&Endpoint| served.by.contains(&e.number);
        let trusted = |e: &&Endpoint| e.can.pull && !e.lies.load(Ordering::Relaxed);
        // The registry itself has the last word.
        let liars: Vec<_> = self.endpoints.iter().filter(suspect).filter(|e| !e.last && trusted(e)).collect();
        let others = self.endpoints.iter().filter(trusted).count() - liars.len();
        if !served.lied || liars.is_empty() || others == 0 {
            return false;
        }
        for endpoint in liars {
            endpoint.lies.store(true, Ordering::Relaxed);
            tracing::warn!(
                image = %self.reference, host = endpoint.name(),
                "a mirror has sent something else than was asked for; it is passed over"
            );
        }
        true
    }

    /// The hosts for a purpose.
    fn endpoints(&self, purpose: Purpose) -> Result<Vec<&Endpoint>> {
        let may = |e: &&Endpoint| match purpose {
            Purpose::Resolve => e.can.resolve,
            Purpose::Pull => e.can.pull,
            Purpose::Push => e.can.push,
        };
        let endpoints: Vec<_> = self.endpoints.iter().filter(may).collect();
        if endpoints.is_empty() {
            let what = match purpose {
                Purpose::Resolve => "resolve",
                Purpose::Pull => "pull",
                Purpose::Push => "push",
            };
            return Err(self.unreachable(&format!("hosts.toml names no host with the capability {what:?}")));
        }
        Ok(endpoints)
    }

    /// What is told when a host has failed and `before` is what was to be told until then: the registry's own word.
    fn next(&self, endpoint: &Endpoint, error: Error, before: Option<Error>) -> Option<Error> {
        if !matches!(error, Error::NotFound { .. }) {
            endpoint.broken.fetch_add(1, Ordering::Relaxed);
        }
        if !endpoint.last {
            tracing::info!(image = %self.reference, host = endpoint.name(), %error, "a mirror has failed; the next host is asked");
        }
        if endpoint.is_registry || before.is_none() || !matches!(error, Error::NotFound { .. }) {
            Some(error)
        } else {
            before
        }
    }

    pub(crate) fn bad(&self, part: &str, reason: impl Into<String>) -> Error {
        Error::BadImage { reference: self.name(), part: part.to_owned(), reason: reason.into() }
    }

    /// A part of the image has another digest than it is said to have.
    pub(crate) fn mismatch(&self, part: &str, expected: String, actual: String) -> Error {
        Error::DigestMismatch { reference: self.name(), part: part.to_owned(), expected, actual }
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

    /// How long is waited after an attempt.
    pub(crate) fn pause(&self, attempt: u32) -> Duration {
        self.registry.pause(attempt)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    fn registry() -> Registry {
        let plain_http_hosts = vec!["a.b:5000".into(), "c.d".into()];
        Registry::new(&Config { plain_http_hosts, ..Config::default() }).unwrap()
    }

    #[test]
    fn plain_http_is_for_loopback_and_who_is_named() {
        let registry = registry();
        for host in
            ["localhost", "localhost:5000", "127.8.9.1:80", "[::1]", "[::1]:5000", "a.b:5000", "c.d:1"]
        {
            assert!(registry.is_plain(host), "{host}");
        }
        for host in ["a.b", "a.b:5001", "docker.io", "128.0.0.1", "[::2]:5000", "localhost.a"] {
            assert!(!registry.is_plain(host), "{host}");
        }
    }

    #[test]
    fn a_registry_with_tls_sends_nobody_where_there_is_none() {
        let registry = registry();
        let url = |text: &str| Url::parse(text).unwrap();
        for (from, to, want) in [
            ("https://x.y/", "https://e.f/", true),
            ("http://c.d/", "https://e.f/", true),
            ("https://x.y/", "http://x.y/", false),
            ("https://x.y/", "http://127.0.0.1/", false),
            ("https://c.d/", "http://c.d/", false),
            ("http://x.y/", "http://x.y:81/", true),
            ("http://x.y/", "http://c.d/", true),
            ("http://x.y/", "http://e.f/", false),
            ("http://x.y/", "file:///etc/passwd", false),
        ] {
            assert_eq!(registry.may_go(&url(from), &url(to)), want, "{from} {to}");
        }
    }

    #[tokio::test]
    async fn an_image_of_docker_hub_is_at_its_registry() {
        let (registry, reference) = (registry(), Reference::parse("busybox").unwrap());
        let session = registry.session(&reference, &[]).await.unwrap();
        let endpoint = &session.endpoints[0];
        assert_eq!(endpoint.base.as_str(), "https://registry-1.docker.io/v2/library/busybox/");
        assert!(endpoint.is_registry && endpoint.last && endpoint.namespace.is_none());
    }

    #[test]
    fn pauses_grow_and_are_bounded() {
        let registry = registry();
        for attempt in 0..40 {
            let pause = registry.pause(attempt);
            assert!(pause >= registry.timing.pause.mul_f64(0.75) && pause < Duration::from_secs(700));
        }
        assert!(registry.pause(3) > registry.pause(0));
    }
}
