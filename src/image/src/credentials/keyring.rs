//! Which credentials fit an image: the kubelet's rules (`k8s.io/kubernetes/pkg/credentialprovider/keyring.go`).
//!
//! A key is a host with an optional port and path. Host labels may hold `*`, each for (part of) one label; ports are
//! equal or both absent; the key's path begins the image's, as text. More particular keys come first, since keys are
//! gone through in reverse order. Only where none fits do those of `index.docker.io` serve for images of Docker Hub.

use std::{cmp::Reverse, collections::BTreeMap};

use super::{
    Credentials,
    docker_config::{self, DockerConfig},
};
use crate::{Error, Reference, Result};

const DOCKER_HUB: &str = "index.docker.io";
/// How many credentials are tried for one image; each may be a request to a token service.
const MAX_MATCHES: usize = 32;

/// Credentials by registry and path.
#[derive(Clone, Default)]
pub struct Keyring {
    keys: BTreeMap<Reverse<String>, Vec<Credentials>>,
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keyring").field("keys", &self.keys.len()).finish_non_exhaustive()
    }
}

impl Keyring {
    /// Reads Docker's `config.json`, the `.dockerconfigjson` of a pull secret, or a `.dockercfg`; at most 1 MiB.
    ///
    /// # Errors
    /// [`Error::BadCredentials`], which quotes no secret. One entry that cannot be read spoils the file, as with the
    /// kubelet.
    pub fn from_docker_config(bytes: &[u8]) -> Result<Self> {
        docker_config::parse(bytes).map(|config| Self::of(&config)).map_err(Error::BadCredentials)
    }

    pub(super) fn of(config: &DockerConfig) -> Self {
        let mut keyring = Self::default();
        for (key, credentials) in &config.auths {
            // A file that leaves its secrets to a helper names its registries with empty entries.
            if credentials.is_empty() {
                continue;
            }
            if let Some(key) = normalized(key) {
                keyring.keys.entry(Reverse(key)).or_default().push(credentials.clone());
            } else {
                tracing::warn!(key, "credentials of what is no registry are left out");
            }
        }
        keyring
    }

    /// Adds what another one has; of the same key, ours come first. The pull secrets of a pod make one keyring.
    pub fn add(&mut self, other: Self) {
        for (key, credentials) in other.keys {
            self.keys.entry(key).or_default().extend(credentials);
        }
    }

    /// The credentials for an image in the order in which they are to be tried, at most 32.
    #[must_use]
    pub fn lookup(&self, reference: &Reference) -> Vec<Credentials> {
        self.lookup_name(&reference.name())
    }

    /// As [`Self::lookup`], for `registry/repository`.
    pub(super) fn lookup_name(&self, name: &str) -> Vec<Credentials> {
        let fitting = self.keys.iter().filter(|(key, _)| matches(&key.0, name));
        let mut found: Vec<&Credentials> = fitting.flat_map(|(_, credentials)| credentials).collect();
        if found.is_empty()
            && is_docker_hub(name)
            && let Some(credentials) = self.keys.get(&Reverse(DOCKER_HUB.to_owned()))
        {
            found.extend(credentials);
        }
        let mut distinct: Vec<Credentials> = Vec::new();
        for credentials in found {
            if distinct.len() < MAX_MATCHES && !distinct.contains(credentials) {
                distinct.push(credentials.clone());
            }
        }
        distinct
    }
}

/// Host, port and path of an entry's key: without scheme, user, query, fragment, and without the `/v1/` or `/v2/` that
/// Docker writes.
fn normalized(key: &str) -> Option<String> {
    let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    if host.is_empty() || host.bytes().any(|b| b.is_ascii_control() || b.is_ascii_whitespace()) {
        return None;
    }
    let (_, port) = split_port(host);
    if !port.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let path = if path.starts_with("/v1/") || path.starts_with("/v2/") { path.get(3..)? } else { path };
    Some(if path == "/" { host.to_owned() } else { format!("{host}{path}") })
}

fn split_port(authority: &str) -> (&str, &str) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port),
        _ => (authority, ""),
    }
}

fn matches(key: &str, name: &str) -> bool {
    let split = |text: &'_ str| text.find('/').unwrap_or(text.len());
    let ((key_host, key_path), (host, path)) = (key.split_at(split(key)), name.split_at(split(name)));
    let ((key_host, key_port), (host, port)) = (split_port(key_host), split_port(host));
    key_port == port
        && path.starts_with(key_path)
        && key_host.split('.').count() == host.split('.').count()
        && key_host.split('.').zip(host.split('.')).all(|(glob, label)| fits(glob, label))
}

/// Whether a label fits a pattern, in which `*` is any text.
fn fits(glob: &str, label: &str) -> bool {
    let mut parts = glob.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = label.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = rest.get(at + part.len()..).unwrap_or_default();
    }
    rest.ends_with(last)
}

/// Whether a name without further ado is Docker Hub's.
fn is_docker_hub(name: &str) -> bool {
    match name.split_once('/') {
        None => !name.is_empty(),
        Some(("", _)) => false,
        Some((first, _)) => first == "docker.io" || first == DOCKER_HUB || !first.contains(['.', ':']),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use serde_json::json;

    use super::*;

    fn keyring(keys: &[&str]) -> Keyring {
        let auths: serde_json::Map<_, _> =
            keys.iter().map(|k| ((*k).to_owned(), json!({ "username": k, "password": "p" }))).collect();
        Keyring::from_docker_config(&serde_json::to_vec(&json!({ "auths": auths })).unwrap()).unwrap()
    }

    /// The keys that fit, in order.
    fn found(keys: &[&str], name: &str) -> Vec<String> {
        keyring(keys).lookup_name(name).into_iter().map(|c| c.username).collect()
    }

    #[test]
    fn hosts_match_label_by_label() {
        for (key, name, want) in [
            ("*.kubernetes.io", "prefix.kubernetes.io", true),
            ("prefix.*.io", "prefix.kubernetes.io", true),
            ("prefix.kubernetes.*", "prefix.kubernetes.io", true),
            ("*-good.kubernetes.io", "prefix-good.kubernetes.io", true),
            ("*.kubernetes.io/blah", "prefix.kubernetes.io/blah", true),
            ("prefix.*.io/foo", "prefix.kubernetes.io/foo/bar", true),
            ("*.kubernetes.io:1111/blah", "prefix.kubernetes.io:1111/blah", true),
            ("prefix.*.io:1111/foo", "prefix.kubernetes.io:1111/foo/bar", true),
            ("*.kubernetes.io", "kubernetes.io", false),
            ("*.*.kubernetes.io", "prefix.kubernetes.io", false),
            ("*.*.kubernetes.io", "kubernetes.io", false),
            ("kubernetes.io", "kubernetes.com", false),
            ("k*.io", "quay.io", false),
            ("*.kubernetes.io:1234/blah", "prefix.kubernetes.io:1111/blah", false),
            ("prefix.*.io/foo", "prefix.kubernetes.io:1111/foo/bar", false),
            ("a*b*c.io", "a-b-b-c.io", true),
            ("a*b*c.io", "a-c-b.io", false),
            ("ab*ba.io", "aba.io", false),
            ("[::1]:5000", "[::1]:5000/a", true),
            ("r.example/a", "r.example/ab", true),
        ] {
            assert_eq!(matches(key, name), want, "{key} {name}");
        }
    }

    #[test]
    fn keys_are_found_however_they_are_written() {
        for (key, name) in [
            ("https://hello.kubernetes.io", "hello.kubernetes.io"),
            ("https://*.docker.io", "prefix.docker.io"),
            ("https://prefix.*.io", "prefix.docker.io"),
            ("https://prefix.docker.*", "prefix.docker.io"),
            ("https://*.docker.io/path", "prefix.docker.io/path"),
            ("https://prefix.*.io/path", "prefix.docker.io/path/subpath"),
            ("https://prefix.docker.*/path", "prefix.docker.io/path"),
            ("https://*.docker.io:8888", "prefix.docker.io:8888"),
            ("https://prefix.*.io:8888", "prefix.docker.io:8888"),
            ("https://prefix.docker.*:8888", "prefix.docker.io:8888"),
            ("https://*.docker.io/path:1111", "prefix.docker.io/path:1111"),
            ("https://*.docker.io/v1/", "prefix.docker.io/path:1111"),
            ("https://*.docker.io/v2/", "prefix.docker.io/path:1111"),
            ("https://prefix.docker.*/path:1111", "prefix.docker.io/path:1111"),
            ("prefix.docker.io:1111", "prefix.docker.io:1111/path"),
            ("*.docker.io:1111", "prefix.docker.io:1111/path"),
        ] {
            assert_eq!(found(&[key], &format!("{name}/foo/bar")), [key], "{name}");
        }
    }

    #[test]
    fn what_does_not_fit_is_not_found() {
        for (key, name) in [
            ("https://hello.kubernetes.io", "world.mesos.org/foo/bar"),
            ("https://*.docker.com", "prefix.docker.io"),
            ("https://suffix.*.io", "prefix.docker.io"),
            ("https://prefix.docker.c*", "prefix.docker.io"),
            ("https://prefix.*.io/path:1111", "prefix.docker.io/path/subpath:1111"),
            ("suffix.*.io", "prefix.docker.io"),
            ("https://index.docker.io/v1/", "world.mesos.org/foo/bar"),
            ("https://index.docker.io/v1", "docker.io/library/a"),
            ("r.example:x", "r.example:x/a"),
        ] {
            assert!(found(&[key], &format!("{name}/foo/bar")).is_empty(), "{key} {name}");
        }
    }

    #[test]
    fn docker_hubs_key_serves_where_no_other_fits() {
        let hub = "https://index.docker.io/v1/";
        for name in
            ["google/docker-registry", "jenkins", "docker.io/library/a", "index.docker.io/v1//google/x"]
        {
            assert_eq!(found(&[hub], name), [hub], "{name}");
        }
        assert_eq!(found(&[hub, "docker.io/a"], "docker.io/a/b"), ["docker.io/a"]);
        let reference = Reference::parse("busybox").unwrap();
        assert_eq!(keyring(&[hub]).lookup(&reference).len(), 1);
        for (name, want) in [
            ("foo/bar", true),
            ("docker.io/foo/bar", true),
            ("index.docker.io/foo/bar", true),
            ("foo", true),
            ("", false),
            ("/foo", false),
            ("registry.tld/foo/bar", false),
            ("registry:5000/foo/bar", false),
            ("myhostdocker.io/foo/bar", false),
        ] {
            assert_eq!(is_docker_hub(name), want, "{name}");
        }
    }

    #[test]
    fn the_more_particular_come_first() {
        let keys = ["quay.io", "quay.io/coreos/etcd", "*.io", "quay.io/coreos"];
        assert_eq!(
            found(&keys, "quay.io/coreos/etcd"),
            ["quay.io/coreos/etcd", "quay.io/coreos", "quay.io", "*.io"]
        );
    }

    #[test]
    fn keyrings_are_put_together_and_bounded() {
        let mut all = keyring(&["https://a.b"]);
        all.add(keyring(&["a.b", "a.b/c"]));
        all.add(keyring(&["a.b"]));
        let users: Vec<_> = all.lookup_name("a.b/c/d").into_iter().map(|c| c.username).collect();
        assert_eq!(users, ["a.b/c", "https://a.b", "a.b"]);
        let many: Vec<String> = (1..60).map(|n| format!("a.b/{}", "c".repeat(n))).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(found(&many, &format!("a.b/{}", "c".repeat(99))).len(), MAX_MATCHES);
        assert!(!format!("{:?}", keyring(&["a.b"])).contains("password"));
    }
}
