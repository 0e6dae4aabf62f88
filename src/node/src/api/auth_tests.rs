//! Tests of the gate with a reviewer that counts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

#[derive(Default)]
struct Fake {
    tokens: AtomicUsize,
    accesses: AtomicUsize,
}

impl Reviewer for Fake {
    fn token(&self, token: String) -> BoxFuture<'_, Result<Option<User>>> {
        self.tokens.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            let known = matches!(token.as_str(), "prometheus" | "pods-only" | "nobody");
            Ok(known.then(|| User { name: token, ..User::default() }))
        })
    }

    fn access(&self, access: Access) -> BoxFuture<'_, Result<bool>> {
        self.accesses.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            Ok(match access.user.name.as_str() {
                "prometheus" => access.subresource == "metrics" && access.verb == "get",
                "pods-only" => access.subresource == "pods",
                "admin" => true,
                _ => false,
            })
        })
    }
}

fn with(token: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(AUTHORIZATION, format!("Bearer {token}").parse().unwrap());
    headers
}

async fn ask(gate: &Gate, headers: &HeaderMap, path: &str) -> Result<User, Refusal> {
    gate.admit(None, &Method::GET, path, headers).await
}

#[tokio::test]
async fn anonymous_is_401_and_unauthorised_403() {
    let gate = Gate::new(Some(Arc::new(Fake::default())));
    let refusal = ask(&gate, &HeaderMap::new(), "/metrics").await.unwrap_err();
    assert_eq!((refusal.status.as_u16(), refusal.text.as_str()), (401, "Unauthorized"));
    assert_eq!(ask(&gate, &with("stolen"), "/metrics").await.unwrap_err().status, 401);
    let refusal = ask(&gate, &with("prometheus"), "/pods").await.unwrap_err();
    assert_eq!(refusal.status, 403);
    assert_eq!(
        refusal.text,
        "Forbidden (user=prometheus, verb=get, resource=nodes, subresource(s)=[pods proxy])"
    );
    assert_eq!(ask(&gate, &with("prometheus"), "/metrics/resource").await.unwrap().name, "prometheus");
    assert_eq!(ask(&gate, &with("pods-only"), "/pods").await.unwrap().name, "pods-only");
}

#[tokio::test]
async fn answers_are_remembered() {
    let fake = Arc::new(Fake::default());
    let gate = Gate::new(Some(fake.clone()));
    for _ in 0..5 {
        ask(&gate, &with("prometheus"), "/metrics").await.unwrap();
        ask(&gate, &with("nobody"), "/metrics").await.unwrap_err();
        ask(&gate, &with("stolen"), "/metrics").await.unwrap_err();
    }
    assert_eq!((fake.tokens.load(Ordering::SeqCst), fake.accesses.load(Ordering::SeqCst)), (3, 2));
}

#[tokio::test]
async fn a_certificate_goes_before_a_token() {
    let fake = Arc::new(Fake::default());
    let gate = Gate::new(Some(fake.clone()));
    let admin = User { name: "admin".into(), ..User::default() };
    gate.admit(Some(&admin), &Method::POST, "/exec/a/b/c", &with("stolen")).await.unwrap();
    assert_eq!(fake.tokens.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn standalone_knows_certificates_only() {
    let gate = Gate::new(None);
    assert_eq!(ask(&gate, &with("prometheus"), "/metrics").await.unwrap_err().status, 401);
    let admin = User { name: "admin".into(), ..User::default() };
    gate.admit(Some(&admin), &Method::GET, "/pods", &HeaderMap::new()).await.unwrap();
}

#[test]
fn paths_and_verbs_are_mapped_as_the_kubelet_does() {
    for (method, path, verb, subresources) in [
        (Method::GET, "/stats/summary", "get", "stats"),
        (Method::GET, "/stats", "get", "stats"),
        (Method::GET, "/metrics", "get", "metrics"),
        (Method::GET, "/metrics/resource", "get", "metrics"),
        (Method::GET, "/metricsx", "get", "proxy"),
        (Method::GET, "/logs/x", "get", "log"),
        (Method::POST, "/checkpoint/a/b/c", "create", "checkpoint"),
        (Method::GET, "/statusz", "get", "statusz"),
        (Method::GET, "/flagz", "get", "configz"),
        (Method::GET, "/configz", "get", "configz proxy"),
        (Method::GET, "/pods", "get", "pods proxy"),
        (Method::GET, "/runningpods/", "get", "pods proxy"),
        (Method::GET, "/healthz/ping", "get", "healthz proxy"),
        (Method::GET, "/containerLogs/a/b/c", "get", "proxy"),
        (Method::POST, "/exec/a/b/c", "create", "proxy"),
        (Method::GET, "/exec/a/b/c", "get", "proxy"),
        (Method::PUT, "/x", "update", "proxy"),
        (Method::PATCH, "/x", "patch", "proxy"),
        (Method::DELETE, "/x", "delete", "proxy"),
        (Method::HEAD, "/", "", "proxy"),
    ] {
        let got = attributes(&method, path);
        assert_eq!((got.verb, got.subresources.join(" ").as_str()), (verb, subresources), "{method} {path}");
    }
}

#[test]
fn the_cache_is_bounded_and_forgets() {
    let cache = Cache::new();
    let now = Instant::now();
    for i in 0..CACHE_SIZE * 2 {
        cache.put(i, i, now, Duration::from_secs(60));
    }
    assert_eq!(cache.entries.lock().unwrap().len(), CACHE_SIZE);
    let last = CACHE_SIZE * 2 - 1;
    assert_eq!(cache.get(&last, now), Some(last));
    assert_eq!(cache.get(&last, now + Duration::from_secs(60)), None);
}

#[test]
fn only_a_sane_bearer_token_counts() {
    assert_eq!(bearer(&with("abc")), Some("abc"));
    assert_eq!(bearer(&with("")), None);
    assert_eq!(bearer(&with(&"x".repeat(MAX_TOKEN + 1))), None);
    let mut basic = HeaderMap::new();
    basic.insert(AUTHORIZATION, "Basic abc".parse().unwrap());
    assert_eq!(bearer(&basic), None);
}
