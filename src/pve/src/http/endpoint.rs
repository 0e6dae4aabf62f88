//! The servers that may be asked. Any node of a cluster answers for all of it, so they stand in for each other.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use reqwest::{Client, Url};

use super::{
    limits::{Gate, Limits},
    tls::{self, Refused, Trust},
};
use crate::{
    Error, Result,
    error::{CallName, chain},
};

/// How long a server that could not be reached is passed over while there are others.
const REST: Duration = Duration::from_secs(15);

/// How long a connection is kept for the next call. pveproxy closes one that was idle for 5 s (`PVE::APIServer::AnyEvent`), and
/// a change that meets the close may have arrived, so that it is not sent again: a connection must be given up before.
const IDLE: Duration = Duration::from_secs(4);

/// Where a server is and how it proves who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    url: Url,
    trust: Trust,
}

impl Endpoint {
    /// A server by its URL, such as `https://pve1.example.org:8006`; without a port it is 8006. It must be `https`, but
    /// on loopback, since the token goes along.
    ///
    /// # Errors
    /// [`Error::Setup`]: the URL is none, or has more than scheme, host and port.
    pub fn new(url: &str, trust: Trust) -> Result<Self> {
        let setup = |why: &str| {
            Error::Setup(format!("the endpoint {:?} {why}", url.chars().take(200).collect::<String>()))
        };
        let mut parsed = Url::parse(url.trim()).map_err(|e| setup(&format!("is no URL: {e}")))?;
        let host = parsed.host_str().map(str::to_owned).ok_or_else(|| setup("names no host"))?;
        if !parsed.username().is_empty()
            || parsed.password().is_some()
            || parsed.query().is_some()
            || parsed.fragment().is_some()
        {
            return Err(setup("has more than a scheme, a host and a port"));
        }
        if !matches!(parsed.path(), "" | "/") {
            return Err(setup("has a path"));
        }
        match parsed.scheme() {
            "https" => {
                // 443 is dropped by the parser as the scheme's default: whoever wants it has a proxy there and says so.
                if parsed.port().is_none() && !url.trim().trim_end_matches('/').ends_with(":443") {
                    parsed.set_port(Some(8006)).map_err(|()| setup("cannot have a port"))?;
                }
            }
            "http" if is_loopback(&host) => {}
            _ => return Err(setup("is not https")),
        }
        Ok(Self { url: parsed, trust })
    }
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|a| a.is_loopback())
}

/// An endpoint with its connections.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) url: Url,
    /// Without a slash at its end, for texts.
    pub(crate) name: String,
    pub(crate) client: Client,
    /// The places that calls have at it.
    pub(crate) gate: Gate,
    trust: Trust,
    refused: Arc<Refused>,
    /// Until when it is passed over.
    resting: Mutex<Option<Instant>>,
}

impl Server {
    fn new(endpoint: &Endpoint, connect: Duration, limits: Limits) -> Result<Self> {
        let refused = Arc::new(Refused::default());
        let mut builder = Client::builder()
            .user_agent(concat!("moxlet-pve/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(connect)
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(8)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy();
        if let Some(config) = tls::config(&endpoint.trust, &refused)? {
            builder = builder.tls_backend_preconfigured(config);
        }
        let client = builder.build().map_err(|e| Error::Setup(chain(&e)))?;
        Ok(Self {
            url: endpoint.url.clone(),
            name: endpoint.url.as_str().trim_end_matches('/').to_owned(),
            client,
            gate: Gate::new(limits),
            trust: endpoint.trust.clone(),
            refused,
            resting: Mutex::default(),
        })
    }

    /// The error that a request ended in.
    pub(crate) fn error(&self, call: &CallName, error: &reqwest::Error) -> Error {
        let reason = chain(error);
        if error.is_connect()
            && let Some((seen, reason)) = self.refused.take()
        {
            let expected = match self.trust {
                Trust::Fingerprint(expected) => Some(expected),
                _ => None,
            };
            return Error::Certificate { endpoint: self.name.clone(), reason, seen: Some(seen), expected };
        }
        if error.is_connect() && reason.contains("certificate") {
            return Error::Certificate { endpoint: self.name.clone(), reason, seen: None, expected: None };
        }
        // What cannot connect has sent nothing.
        Error::Unreachable {
            call: call.clone(),
            endpoint: self.name.clone(),
            reason,
            sent: !error.is_connect(),
        }
    }
}

/// All servers, and which of them is asked first.
#[derive(Debug)]
pub(crate) struct Servers {
    servers: Vec<Server>,
    current: AtomicUsize,
}

impl Servers {
    pub(crate) fn new(endpoints: &[Endpoint], connect: Duration, limits: Limits) -> Result<Self> {
        if endpoints.is_empty() {
            return Err(Error::Setup("no endpoint is given".to_owned()));
        }
        let servers = endpoints.iter().map(|e| Server::new(e, connect, limits)).collect::<Result<_>>()?;
        Ok(Self { servers, current: AtomicUsize::new(0) })
    }

    pub(crate) fn len(&self) -> usize {
        self.servers.len()
    }

    /// The server to ask: the one that worked last, or the next that does not rest; if all do, the one that worked last.
    pub(crate) fn pick(&self) -> Option<(usize, &Server)> {
        let current = self.current.load(Ordering::Relaxed);
        let now = Instant::now();
        let order = (0..self.servers.len()).map(|i| (current + i) % self.servers.len().max(1));
        let awake = order.clone().find(|i| self.servers.get(*i).is_some_and(|s| !s.rests(now)));
        let index = awake.or_else(|| order.clone().next())?;
        self.servers.get(index).map(|s| (index, s))
    }

    /// This one could not be reached: it rests, and the next is asked.
    pub(crate) fn failed(&self, index: usize) {
        if let Some(server) = self.servers.get(index) {
            *server.resting.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + REST);
        }
        self.next(index);
    }

    /// The next is asked.
    pub(crate) fn next(&self, index: usize) {
        self.current.store((index + 1) % self.servers.len().max(1), Ordering::Relaxed);
    }

    /// This one answered.
    pub(crate) fn worked(&self, index: usize) {
        if let Some(server) = self.servers.get(index) {
            *server.resting.lock().unwrap_or_else(PoisonError::into_inner) = None;
            self.current.store(index, Ordering::Relaxed);
        }
    }
}

impl Server {
    fn rests(&self, now: Instant) -> bool {
        self.resting.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn an_endpoint_is_https_on_port_8006_unless_it_says_so() {
        let url = |s: &str| Endpoint::new(s, Trust::System).map(|e| e.url.to_string());
        assert_eq!(url("https://pve1").unwrap(), "https://pve1:8006/");
        assert_eq!(url("https://pve1:443/").unwrap(), "https://pve1/");
        assert_eq!(url("https://[fd00::1]:9006").unwrap(), "https://[fd00::1]:9006/");
        assert_eq!(url("http://127.0.0.1:80").unwrap(), "http://127.0.0.1/");
        for bad in [
            "",
            "pve1",
            "http://pve1",
            "https://u:p@pve1",
            "https://pve1/api2",
            "https://pve1?x=1",
            "ftp://pve1",
        ] {
            assert!(url(bad).is_err(), "{bad:?}");
        }
    }
}
