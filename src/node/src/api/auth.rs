//! Who calls and what it may do: client certificates and TokenReview, then SubjectAccessReview, as a kubelet asks.
//!
//! Answers are remembered in bounded tables: tokens 2 minutes, what is allowed 5 minutes, what is not 30 seconds.
//! A token is remembered by its hash only.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use http::{HeaderMap, Method, StatusCode, header::AUTHORIZATION};
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec},
    authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
};
use kube::{Api, api::PostParams};
use sha2::{Digest, Sha256};

use crate::Result;

const TOKEN_TTL: Duration = Duration::from_secs(120);
const ALLOW_TTL: Duration = Duration::from_secs(300);
const DENY_TTL: Duration = Duration::from_secs(30);
/// How many answers of each kind are remembered.
const CACHE_SIZE: usize = 1024;
/// The longest token that is asked about.
const MAX_TOKEN: usize = 16 << 10;
/// How long the API server may take.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(10);

/// A caller.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: Option<String>,
    pub(crate) groups: Vec<String>,
    pub(crate) extra: Vec<(String, Vec<String>)>,
}

/// Who the client certificate says the caller is; TLS has verified it.
pub(crate) fn user_from_certificate(der: &[u8]) -> Option<User> {
    use x509_parser::prelude::{FromDer, X509Certificate};
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let mut groups: Vec<String> =
        subject.iter_organization().filter_map(|o| o.as_str().ok()).map(str::to_owned).collect();
    groups.push("system:authenticated".into());
    (!name.is_empty()).then_some(User { name, groups, ..User::default() })
}

/// What is to be done, in the words of the authoriser.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) verb: &'static str,
    /// Any one of them suffices.
    pub(crate) subresources: Vec<&'static str>,
}

fn is_below(path: &str, base: &str) -> bool {
    path.strip_prefix(base).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// What a request needs, as kubelet 1.36 maps it.
pub(crate) fn attributes(method: &Method, path: &str) -> Attributes {
    let verb = match *method {
        Method::POST => "create",
        Method::GET => "get",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "",
    };
    let below = |base| is_below(path, base);
    let mut subresources = Vec::with_capacity(2);
    if below("/pods") || below("/runningpods") {
        subresources.push("pods");
    } else if below("/healthz") {
        subresources.push("healthz");
    } else if below("/configz") {
        subresources.push("configz");
    }
    subresources.push(if below("/stats") {
        "stats"
    } else if below("/metrics") {
        "metrics"
    } else if below("/logs") {
        "log"
    } else if below("/checkpoint") {
        "checkpoint"
    } else if below("/statusz") {
        "statusz"
    } else if below("/flagz") {
        "configz"
    } else {
        "proxy"
    });
    Attributes { verb, subresources }
}

/// One question to the authoriser.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Access {
    pub(crate) user: User,
    pub(crate) verb: &'static str,
    pub(crate) subresource: &'static str,
}

/// The API server's answers, or a test's.
pub(crate) trait Reviewer: Send + Sync {
    /// Whose token it is; none if it is nobody's.
    fn token(&self, token: String) -> BoxFuture<'_, Result<Option<User>>>;
    /// Whether that is allowed.
    fn access(&self, access: Access) -> BoxFuture<'_, Result<bool>>;
}

/// The real API server.
pub(crate) struct Cluster {
    pub(crate) client: kube::Client,
    pub(crate) node: String,
}

impl Reviewer for Cluster {
    fn token(&self, token: String) -> BoxFuture<'_, Result<Option<User>>> {
        Box::pin(async move {
            let review =
                TokenReview { spec: TokenReviewSpec { token, audiences: None }, ..TokenReview::default() };
            let api: Api<TokenReview> = Api::all(self.client.clone());
            let answer = api.create(&PostParams::default(), &review).await;
            let status =
                answer.map_err(crate::Error::api("review a caller's token"))?.status.unwrap_or_default();
            Ok(status.user.filter(|_| status.authenticated == Some(true)).map(|user| User {
                name: user.username.unwrap_or_default(),
                uid: user.uid,
                groups: user.groups.unwrap_or_default(),
                extra: user.extra.unwrap_or_default().into_iter().collect(),
            }))
        })
    }

    fn access(&self, access: Access) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async move {
            let review = SubjectAccessReview {
                spec: SubjectAccessReviewSpec {
                    user: Some(access.user.name),
                    uid: access.user.uid,
                    groups: Some(access.user.groups),
                    extra: Some(access.user.extra.into_iter().collect()),
                    resource_attributes: Some(ResourceAttributes {
                        verb: Some(access.verb.to_owned()),
                        version: Some("v1".to_owned()),
                        resource: Some("nodes".to_owned()),
                        subresource: Some(access.subresource.to_owned()),
                        name: Some(self.node.clone()),
                        ..ResourceAttributes::default()
                    }),
                    ..SubjectAccessReviewSpec::default()
                },
                ..SubjectAccessReview::default()
            };
            let api: Api<SubjectAccessReview> = Api::all(self.client.clone());
            let answer = api.create(&PostParams::default(), &review).await;
            Ok(answer
                .map_err(crate::Error::api("review a caller's access"))?
                .status
                .is_some_and(|s| s.allowed))
        })
    }
}

/// A bounded table of answers, each with its own end.
struct Cache<K, V> {
    entries: Mutex<HashMap<K, (V, Instant)>>,
}

impl<K: Hash + Eq + Clone, V: Clone> Cache<K, V> {
    fn new() -> Self {
        Self { entries: Mutex::new(HashMap::new()) }
    }

    fn get(&self, key: &K, now: Instant) -> Option<V> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.get(key).filter(|(_, end)| now < *end).map(|(value, _)| value.clone())
    }

    fn put(&self, key: K, value: V, now: Instant, ttl: Duration) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= CACHE_SIZE {
            entries.retain(|_, (_, end)| now < *end);
        }
        if entries.len() >= CACHE_SIZE {
            let soonest = entries.iter().min_by_key(|(_, (_, end))| *end).map(|(key, _)| key.clone());
            soonest.map(|key| entries.remove(&key));
        }
        entries.insert(key, (value, now + ttl));
    }
}

/// Why a caller is turned away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) text: String,
}

/// The gate before every route.
pub(crate) struct Gate {
    reviewer: Option<Arc<dyn Reviewer>>,
    tokens: Cache<[u8; 32], Option<User>>,
    accesses: Cache<Access, bool>,
}

impl Gate {
    /// Without a reviewer (standalone) every verified client certificate of a node's administrator may do all:
    /// the CA was named for just that; tokens open nothing.
    pub(crate) fn new(reviewer: Option<Arc<dyn Reviewer>>) -> Self {
        Self { reviewer, tokens: Cache::new(), accesses: Cache::new() }
    }

    /// Lets a request through or says why not.
    pub(crate) async fn admit(
        &self,
        certificate: Option<&User>,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<User, Refusal> {
        let user = match certificate {
            Some(user) => user.clone(),
            None => self.authenticate(headers).await?,
        };
        self.authorize(&user, &attributes(method, path)).await?;
        Ok(user)
    }

    async fn authenticate(&self, headers: &HeaderMap) -> Result<User, Refusal> {
        let unauthorized = || Refusal { status: StatusCode::UNAUTHORIZED, text: "Unauthorized".into() };
        let (Some(token), Some(reviewer)) = (bearer(headers), &self.reviewer) else {
            return Err(unauthorized());
        };
        let key: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        if let Some(known) = self.tokens.get(&key, Instant::now()) {
            return known.ok_or_else(unauthorized);
        }
        match tokio::time::timeout(REVIEW_TIMEOUT, reviewer.token(token.to_owned())).await {
            Ok(Ok(user)) => {
                let ttl = if user.is_some() { TOKEN_TTL } else { DENY_TTL };
                self.tokens.put(key, user.clone(), Instant::now(), ttl);
                user.ok_or_else(unauthorized)
            }
            Ok(Err(error)) => {
                tracing::warn!(error = crate::chain(&error), "a caller's token could not be reviewed");
                Err(unauthorized())
            }
            Err(_) => {
                tracing::warn!("a caller's token could not be reviewed in time");
                Err(unauthorized())
            }
        }
    }

    async fn authorize(&self, user: &User, attributes: &Attributes) -> Result<(), Refusal> {
        let Some(reviewer) = &self.reviewer else { return Ok(()) };
        for subresource in &attributes.subresources {
            let access = Access { user: user.clone(), verb: attributes.verb, subresource };
            let allowed = match self.accesses.get(&access, Instant::now()) {
                Some(known) => known,
                None => {
                    let answer = tokio::time::timeout(REVIEW_TIMEOUT, reviewer.access(access.clone())).await;
                    let allowed = match answer {
                        Ok(Ok(allowed)) => allowed,
                        Ok(Err(error)) => return Err(unsure(user, attributes, &crate::chain(&error))),
                        Err(_) => return Err(unsure(user, attributes, "the API server does not answer")),
                    };
                    let ttl = if allowed { ALLOW_TTL } else { DENY_TTL };
                    self.accesses.put(access, allowed, Instant::now(), ttl);
                    allowed
                }
            };
            if allowed {
                return Ok(());
            }
        }
        let text = format!("Forbidden ({})", described(user, attributes));
        Err(Refusal { status: StatusCode::FORBIDDEN, text })
    }
}

fn described(user: &User, attributes: &Attributes) -> String {
    let Attributes { verb, subresources } = attributes;
    format!("user={}, verb={verb}, resource=nodes, subresource(s)=[{}]", user.name, subresources.join(" "))
}

fn unsure(user: &User, attributes: &Attributes, reason: &str) -> Refusal {
    tracing::warn!(user = user.name, reason, "a caller's access could not be reviewed");
    let text = format!("Authorization error ({})", described(user, attributes));
    Refusal { status: StatusCode::INTERNAL_SERVER_ERROR, text }
}

/// The bearer token, if it has a sane length.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.trim().split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() && token.len() <= MAX_TOKEN).then_some(token)
}

#[cfg(test)]
#[path = "auth_tests.rs"]
mod tests;
