//! Logging in at a registry: Basic, or a Bearer token from the place that the registry names.

use reqwest::{
    Method, Response, Url,
    header::{CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE},
};
use tokio::sync::Mutex;

use super::{
    Endpoint, Session, authority,
    request::{Call, Refusal},
};
use crate::{Credentials, Error, Result};

const MAX_TOKEN: usize = 64 << 10;
/// Challenges of one answer.
const MAX_CHALLENGES: usize = 8;

/// The login at one host.
#[derive(Debug, Default)]
pub(super) struct Login(Mutex<State>);

impl Login {
    /// The header that worked last.
    pub(super) async fn header(&self) -> Option<HeaderValue> {
        self.0.lock().await.header.clone()
    }
}

#[derive(Debug, Default)]
struct State {
    /// The header that worked last.
    header: Option<HeaderValue>,
    /// The credentials that it came from.
    with: Option<Credentials>,
    /// What the machine has for the host, once it was asked.
    node: Option<Vec<Credentials>>,
}

/// How a registry wants to be logged in at.
#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

/// The challenges whose scheme we know, at most a few: others get no secret. A host that offers several is logged in at by a token,
/// which is good for this repository alone, rather than by a password.
fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    let values = headers.get_all(WWW_AUTHENTICATE).iter().take(4).filter_map(|v| v.to_str().ok());
    let mut all: Vec<_> = values.flat_map(listed).collect();
    all.sort_by_key(|c| matches!(c, Challenge::Basic));
    all.truncate(MAX_CHALLENGES);
    all
}

/// The challenges of one header, which may be a list (RFC 9110, section 11.6.1).
fn listed(text: &str) -> Vec<Challenge> {
    match http_auth::parse_challenges(text) {
        Ok(list) => list.iter().filter_map(known).collect(),
        // Some registries do not quote what has to be quoted.
        Err(_) => challenge(text).into_iter().collect(),
    }
}

fn known(challenge: &http_auth::ChallengeRef<'_>) -> Option<Challenge> {
    if challenge.scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !challenge.scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let parameter = |name: &str| {
        let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.to_unescaped())
    };
    Some(Challenge::Bearer {
        realm: parameter("realm")?,
        service: parameter("service"),
        scope: parameter("scope"),
    })
}

/// A single challenge, read with patience.
fn challenge(text: &str) -> Option<Challenge> {
    let (scheme, mut rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let (mut realm, mut service, mut scope) = (None, None, None);
    while let Some((key, after)) = rest.split_once('=') {
        let value;
        if let Some(quoted) = after.strip_prefix('"') {
            (value, rest) = quoted.split_once('"')?;
            rest = rest.trim_start().strip_prefix(',').unwrap_or(rest);
        } else {
            (value, rest) = after.split_once(',').unwrap_or((after, ""));
        }
        match key.trim().to_ascii_lowercase().as_str() {
            "realm" => realm = Some(value.to_owned()),
            "service" => service = Some(value.to_owned()),
            "scope" => scope = Some(value.to_owned()),
            _ => {}
        }
    }
    Some(Challenge::Bearer { realm: realm?, service, scope })
}

#[derive(serde::Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Session<'_> {
    /// Sends a request, logged in where the host wants it. A token that has expired is replaced by a new one.
    pub(super) async fn authorized(&self, endpoint: &Endpoint, call: &Call) -> Result<Response> {
        self.try_authorized(endpoint, call).await.map_err(|refusal| match refusal {
            Refusal::Unauthorized(_, reason) => self.denied(reason),
            Refusal::Rejected(reason) => self.unreachable(&reason),
            Refusal::Other(error) => error,
        })
    }

    /// As [`Self::authorized`], for whom a request that the host does not take is another thing than a host in trouble. An
    /// address outside of the host gets no login.
    pub(super) async fn try_authorized(
        &self,
        endpoint: &Endpoint,
        call: &Call,
    ) -> std::result::Result<Response, Refusal> {
        if call.url.origin() != endpoint.base.origin() {
            return self.send(endpoint, call, None).await;
        }
        let used = endpoint.login.header().await;
        let (mut headers, mut reason) = match self.send(endpoint, call, used.as_ref()).await {
            Ok(response) => return Ok(response),
            Err(refusal) => refusal.challenge()?,
        };
        // One logs in for all who wait.
        let mut login = endpoint.login.0.lock().await;
        if login.header.is_some() && login.header != used {
            match self.send(endpoint, call, login.header.as_ref()).await {
                Ok(response) => return Ok(response),
                Err(refusal) => (headers, reason) = refusal.challenge()?,
            }
        }
        let challenges = challenges(&headers);
        let mut tried = Vec::new();
        while let Some(credentials) = self.candidate(endpoint, &mut login, &tried).await {
            tried.push(credentials.clone());
            let header = match self.log_in(endpoint, call, &challenges, &credentials).await {
                Ok(Some(header)) => header,
                Ok(None) => continue,
                Err(Error::Denied { reason: r, .. }) => {
                    reason = r;
                    continue;
                }
                Err(error) => return Err(Refusal::Other(error)),
            };
            match self.send(endpoint, call, Some(&header)).await {
                Ok(response) => {
                    (login.header, login.with) = (Some(header), Some(credentials));
                    return Ok(response);
                }
                Err(refusal) => {
                    let (_, r) = refusal.challenge()?;
                    // That nobody is let in says less than that somebody is not.
                    if !credentials.is_empty() {
                        reason = r;
                    }
                }
            }
        }
        Err(Refusal::Other(self.denied(format!("{}: {reason}", endpoint.name()))))
    }

    /// The credentials for a host that are tried after some others: those that have worked, those of the caller where they
    /// are for this host, those that the machine has, nobody's. The machine, which may have to start a helper for that and
    /// disturb its user, is asked when all others were refused.
    async fn candidate(
        &self,
        endpoint: &Endpoint,
        login: &mut State,
        tried: &[Credentials],
    ) -> Option<Credentials> {
        if let Some(worked) = login.with.take() {
            // What a helper gives may expire: once that is refused, it may have something else.
            if login.node.as_ref().is_some_and(|known| known.contains(&worked)) {
                login.node = None;
            }
            return Some(worked);
        }
        let fresh = |c: &&Credentials| !c.is_empty() && !tried.contains(c);
        let own = if endpoint.is_registry { self.auths } else { &[] };
        if let Some(own) = own.iter().find(fresh) {
            return Some(own.clone());
        }
        let node = match &mut login.node {
            Some(known) => known,
            unasked => unasked.insert(self.of_node(endpoint).await),
        };
        let node = node.iter().find(fresh).cloned();
        node.or_else(|| Some(Credentials::default()).filter(|nobody| !tried.contains(nobody)))
    }

    /// What the machine has for a host.
    async fn of_node(&self, endpoint: &Endpoint) -> Vec<Credentials> {
        let repository = self.reference.repository();
        let mut found = Vec::new();
        if endpoint.is_registry {
            found.extend(self.registry.node.lookup(self.reference.registry(), repository).await);
        }
        if endpoint.namespace.is_some() {
            let host = authority(&endpoint.base);
            let host = if host == "registry-1.docker.io" { "docker.io" } else { &host };
            found.extend(self.registry.node.lookup(host, repository).await);
        }
        found
    }

    /// The header for some credentials (empty ones are nobody's); none where these do not fit the challenges.
    async fn log_in(
        &self,
        endpoint: &Endpoint,
        call: &Call,
        challenges: &[Challenge],
        credentials: &Credentials,
    ) -> Result<Option<HeaderValue>> {
        if !credentials.registry_token.is_empty() {
            return Ok(secret(format!("Bearer {}", credentials.registry_token)));
        }
        for challenge in challenges {
            match challenge {
                Challenge::Basic => {
                    if let Some(header) = basic(credentials) {
                        return Ok(Some(header));
                    }
                }
                Challenge::Bearer { realm, service, scope } => {
                    let actions = if call.writes() { "pull,push" } else { "pull" };
                    let ours = format!("repository:{}:{actions}", self.reference.repository());
                    let scope = scope.as_deref().unwrap_or(&ours);
                    let token = self.token(endpoint, realm, service.as_deref(), scope, credentials).await?;
                    return Ok(secret(format!("Bearer {token}")));
                }
            }
        }
        Ok(None)
    }

    /// A token, by GET with Basic as Docker asks for it, or by POST with a refresh token (RFC 6749, section 6).
    async fn token(
        &self,
        endpoint: &Endpoint,
        realm: &str,
        service: Option<&str>,
        scope: &str,
        credentials: &Credentials,
    ) -> Result<String> {
        let url = Url::parse(realm).map_err(|_| self.denied("the token realm is no address"))?;
        if !self.registry.may_go(&endpoint.base, &url) {
            return Err(self.denied("the token realm is an address without TLS"));
        }
        let (call, login) = if credentials.identity_token.is_empty() {
            (asked(url, service, scope), basic(credentials))
        } else {
            (refreshed(url, service, scope, &credentials.identity_token), None)
        };
        let body = loop {
            let response = match self.send(endpoint, &call, login.as_ref()).await {
                Ok(response) => response,
                Err(Refusal::Unauthorized(_, reason)) => return Err(self.denied(reason)),
                // 400 is what RFC 6749, section 5.2, has for a refresh token that has expired. Others may be good.
                Err(Refusal::Rejected(reason) | Refusal::Other(Error::NotFound { reason, .. })) => {
                    return Err(self.denied(format!("its token service answers {reason}")));
                }
                Err(Refusal::Other(error)) => return Err(error),
            };
            match self.body(response, MAX_TOKEN, "token").await {
                Ok(body) => break body,
                Err(unread) => self.retry(endpoint, &call, unread).await?,
            }
        };
        let token: Option<Token> = serde_json::from_slice(&body).ok();
        token
            .and_then(|t| t.token.or(t.access_token))
            .filter(|t| !t.is_empty())
            .ok_or_else(|| self.denied("the token service gave no token"))
    }
}

/// The request for a token as Docker asks for it.
fn asked(mut url: Url, service: Option<&str>, scope: &str) -> Call {
    {
        let mut query = url.query_pairs_mut();
        if let Some(service) = service {
            query.append_pair("service", service);
        }
        // Several scopes are several parameters.
        for scope in scope.split(' ').filter(|s| !s.is_empty()) {
            query.append_pair("scope", scope);
        }
    }
    Call::new(Method::GET, url)
}

/// The request for a token by a refresh token.
fn refreshed(url: Url, service: Option<&str>, scope: &str, refresh_token: &str) -> Call {
    let form = [
        ("grant_type", "refresh_token"),
        ("service", service.unwrap_or_default()),
        ("client_id", "moxlet"),
        ("scope", scope),
        ("refresh_token", refresh_token),
    ];
    // A form is written as a query is.
    let mut encoder = url.clone();
    encoder.set_query(None);
    encoder.query_pairs_mut().extend_pairs(form);
    let form = HeaderValue::from_static("application/x-www-form-urlencoded");
    let mut call = Call::new(Method::POST, url).header(CONTENT_TYPE, form);
    call.body = encoder.query().unwrap_or_default().as_bytes().to_vec();
    call
}

/// The header of a user and password, if there are any.
fn basic(credentials: &Credentials) -> Option<HeaderValue> {
    if credentials.username.is_empty() && credentials.password.is_empty() {
        return None;
    }
    let pair = format!("{}:{}", credentials.username, credentials.password);
    secret(format!("Basic {}", base64(pair.as_bytes())))
}

fn secret(text: String) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn base64(bytes: &[u8]) -> String {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn several_challenges_come_in_one_header_or_in_several() {
        let bearer = Challenge::Bearer {
            realm: "https://a.b/token".into(),
            service: Some("r".into()),
            scope: Some("repository:a/b:pull,push".into()),
        };
        let token = r#"Bearer realm="https://a.b/token",service="r",scope="repository:a/b:pull,push""#;
        let list = |texts: &[&str]| {
            let mut headers = HeaderMap::new();
            for text in texts {
                headers.append(WWW_AUTHENTICATE, HeaderValue::from_str(text).unwrap());
            }
            challenges(&headers)
        };
        for texts in [
            &[&*format!("Basic realm=\"x\", {token}")][..],
            &[&*format!("{token}, Basic realm=\"x\"")],
            &["Basic realm=\"x\"", token],
        ] {
            let found = list(texts);
            assert!(
                matches!(found.as_slice(), [first, Challenge::Basic] if *first == bearer),
                "{texts:?}: {found:?}"
            );
        }
        assert_eq!(list(&["Negotiate, Basic realm=\"x\""]), [Challenge::Basic]);
        assert_eq!(list(&["Digest realm=\"x\", nonce=\"y\", NTLM"]), []);
        assert_eq!(list(&["Bearer realm=https://a.b/token,service=r"]).len(), 1, "without quotes");
    }

    #[test]
    fn challenges_are_read() {
        let text = r#"Bearer realm="https://a.b/token",service="r",scope="repository:a/b:pull,push""#;
        let bearer = Challenge::Bearer {
            realm: "https://a.b/token".into(),
            service: Some("r".into()),
            scope: Some("repository:a/b:pull,push".into()),
        };
        assert_eq!(challenge(text), Some(bearer));
        assert_eq!(challenge("basic realm=x"), Some(Challenge::Basic));
        for text in ["", "Bearer", "Bearer realm", "Bearer realm=\"x", "Digest realm=x", "Bearer service=a"] {
            assert_eq!(challenge(text), None, "{text}");
        }
    }
}
