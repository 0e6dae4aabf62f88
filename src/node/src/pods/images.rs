//! Image references, pull policies and pull secrets.

use k8s_openapi::api::core::v1::{Container, Pod, Secret};
use moxlet_cri::v1::AuthConfig;

use super::names;
use crate::cluster::Cluster;

/// When an image is pulled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    /// At every start.
    Always,
    /// Where it is missing.
    IfNotPresent,
    /// Never.
    Never,
}

/// A container's pull policy, with the API's default: Always for `latest`.
pub(crate) fn policy(container: &Container) -> Policy {
    match container.image_pull_policy.as_deref() {
        Some("Always") => Policy::Always,
        Some("Never") => Policy::Never,
        Some("IfNotPresent") => Policy::IfNotPresent,
        _ => {
            let image = container.image.as_deref().unwrap_or_default();
            let (name, digest) = image.split_once('@').map_or((image, false), |(n, _)| (n, true));
            match name.rsplit('/').next().and_then(|last| last.split_once(':')) {
                Some((_, tag)) if tag != "latest" => Policy::IfNotPresent,
                _ if digest => Policy::IfNotPresent,
                _ => Policy::Always,
            }
        }
    }
}

/// Why a reference is no image's name, if it is none.
pub(crate) fn invalid(image: &str) -> Option<&'static str> {
    let (rest, digest) = match image.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (image, None),
    };
    if let Some(digest) = digest {
        let hex = digest.split_once(':').map_or("", |(_, hex)| hex);
        if hex.len() < 32 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Some("invalid reference format");
        }
    }
    let slash = rest.rfind('/').map_or(0, |i| i + 1);
    let (path, tag) = match rest[slash..].find(':') {
        Some(colon) => (&rest[..slash + colon], Some(&rest[slash + colon + 1..])),
        None => (rest, None),
    };
    let tag_ok = tag.is_none_or(|t| {
        !t.is_empty()
            && t.len() <= 128
            && !t.starts_with(['.', '-'])
            && t.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    });
    if !tag_ok || path.is_empty() || path.len() > 255 {
        return Some("invalid reference format");
    }
    let mut parts: Vec<&str> = path.split('/').collect();
    if parts.len() > 1 && (parts[0].contains(['.', ':', '[']) || parts[0] == "localhost") {
        let host = parts.remove(0);
        if !host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:[]".contains(&b)) {
            return Some("invalid reference format");
        }
    }
    for part in parts {
        if part.bytes().any(|b| b.is_ascii_uppercase()) {
            return Some("invalid reference format: repository name must be lowercase");
        }
        let ok = part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
            && part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.ends_with(|c: char| c.is_ascii_alphanumeric());
        if !ok {
            return Some("invalid reference format");
        }
    }
    None
}

/// The registry host and the repository of an image.
fn split(image: &str) -> (&str, &str) {
    match image.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest),
        _ => ("docker.io", image),
    }
}

fn same_registry(key: &str, image: &str) -> bool {
    let key = key.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
    let (key_host, key_path) = key.split_once('/').unwrap_or((key, ""));
    let key_path = if matches!(key_path, "v1" | "v2" | "v1/" | "v2/") { "" } else { key_path };
    let (host, path) = split(image);
    let docker = |h: &str| matches!(h, "docker.io" | "index.docker.io" | "registry-1.docker.io");
    let host_ok = key_host == host
        || docker(key_host) && docker(host)
        || key_host.strip_prefix("*.").is_some_and(|tail| {
            host.split_once('.').is_some_and(|(first, rest)| !first.is_empty() && rest == tail)
        });
    host_ok
        && (key_path.is_empty()
            || path == key_path
            || path.starts_with(&format!("{key_path}/"))
            || path.starts_with(&format!("{key_path}:")))
}

fn text<'a>(entry: &'a serde_json::Value, key: &str) -> &'a str {
    entry.get(key).and_then(serde_json::Value::as_str).unwrap_or_default()
}

/// What a pull secret holds for an image.
fn credentials(secret: &Secret, image: &str) -> Vec<AuthConfig> {
    let data = secret.data.iter().flatten();
    let mut out = Vec::new();
    for (key, bytes) in data {
        let Ok(parsed) = serde_json::from_slice::<serde_json::Value>(&bytes.0) else { continue };
        let auths = match key.as_str() {
            ".dockerconfigjson" => parsed.get("auths").cloned().unwrap_or_default(),
            ".dockercfg" => parsed,
            _ => continue,
        };
        let mut matching: Vec<_> =
            auths.as_object().into_iter().flatten().filter(|(host, _)| same_registry(host, image)).collect();
        // The longest key is the most particular one.
        matching.sort_by_key(|(host, _)| std::cmp::Reverse(host.len()));
        for (host, entry) in matching {
            out.push(AuthConfig {
                username: text(entry, "username").to_owned(),
                password: text(entry, "password").to_owned(),
                auth: text(entry, "auth").to_owned(),
                server_address: host.clone(),
                identity_token: text(entry, "identitytoken").to_owned(),
                registry_token: text(entry, "registrytoken").to_owned(),
            });
        }
    }
    out
}

/// Credentials of the pod's pull secrets for an image; a secret that cannot be had is named in the second list.
pub(crate) async fn pull_secrets(
    cluster: &dyn Cluster,
    pod: &Pod,
    image: &str,
) -> (Vec<AuthConfig>, Vec<String>) {
    let wanted = pod.spec.iter().flat_map(|s| s.image_pull_secrets.iter().flatten()).map(|r| r.name.clone());
    let fetched = futures::future::join_all(wanted.map(|name| async move {
        let answer = cluster.secret(names::namespace(pod), &name).await;
        (name, answer)
    }))
    .await;
    let (mut auths, mut missing) = (Vec::new(), Vec::new());
    for (name, answer) in fetched {
        match answer {
            Ok(secret) => auths.extend(credentials(&secret, image)),
            Err(_) => missing.push(name),
        }
    }
    (auths, missing)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn names_of_images() {
        for good in [
            "busybox",
            "busybox:1.36",
            "127.0.0.1:5000/a/b:latest",
            "localhost/x",
            "a.b/c_d-e@sha256:0123456789abcdef0123456789abcdef",
        ] {
            assert_eq!(invalid(good), None, "{good}");
        }
        for bad in ["", "Busy", "a:", "a b", "a//b", "-a", "a@sha256:xyz", ":tag", "a/../b"] {
            assert!(invalid(bad).is_some(), "{bad}");
        }
    }

    #[test]
    fn policies_by_tag() {
        let of = |image: &str| policy(&Container { image: Some(image.into()), ..Container::default() });
        assert_eq!(of("a"), Policy::Always);
        assert_eq!(of("h:5000/a"), Policy::Always);
        assert_eq!(of("a:latest"), Policy::Always);
        assert_eq!(of("a:1"), Policy::IfNotPresent);
        assert_eq!(of("a@sha256:00"), Policy::IfNotPresent);
    }

    #[test]
    fn secrets_match_by_registry_and_path() {
        for (key, image, want) in [
            ("https://index.docker.io/v1/", "busybox", true),
            ("r.example:5000", "r.example:5000/a:1", true),
            ("r.example:5000/a", "r.example:5000/ab", false),
            ("*.example", "r.example/a", true),
            ("*.example", "r.s.example/a", false),
        ] {
            assert_eq!(same_registry(key, image), want, "{key} {image}");
        }
    }
}
