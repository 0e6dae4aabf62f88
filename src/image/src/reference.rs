//! Names of images, read as Docker and containerd read them: `busybox` is `docker.io/library/busybox:latest`.

use std::fmt;

use moxlet_ids::Digest;

use crate::{Error, Result};

/// The longest text that is looked at.
const MAX_TEXT: usize = 1024;
/// The longest name, registry included (`distribution/reference`).
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// A complete name: registry, repository, and a tag or a digest or both.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Reads a name. Without a registry it is Docker Hub's, without tag and digest the tag is `latest`.
    ///
    /// # Errors
    /// [`Error::InvalidName`], with what is wrong with it.
    pub fn parse(text: &str) -> Result<Self> {
        parse(text).map_err(|reason| Error::InvalidName {
            reference: text.chars().take(MAX_TEXT).collect(),
            reason: reason.to_owned(),
        })
    }

    /// The registry, `host` or `host:port`; `docker.io` for Docker Hub.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository within the registry: `library/busybox`.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if there is one.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if there is one.
    #[must_use]
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Registry and repository: `docker.io/library/busybox`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// What an image's `repo_tags` has for it; nothing where a digest decides, as with containerd.
    #[must_use]
    pub fn repo_tag(&self) -> Option<String> {
        match (&self.tag, &self.digest) {
            (Some(tag), None) => Some(format!("{}:{tag}", self.name())),
            _ => None,
        }
    }

    /// The last part of the manifest's address: the digest, else the tag.
    #[must_use]
    pub fn wanted(&self) -> &str {
        self.digest.as_ref().map_or_else(|| self.tag.as_deref().unwrap_or("latest"), Digest::as_str)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

fn parse(text: &str) -> std::result::Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("the name is empty");
    }
    if text.len() > MAX_TEXT || !text.is_ascii() {
        return Err("invalid reference format");
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (
            rest,
            Some(
                digest
                    .parse::<Digest>()
                    .map_err(|_| "the digest is neither sha256: and 64 nor sha512: and 128 digits")?,
            ),
        ),
        None => (text, None),
    };
    // A colon after the last slash begins a tag, one before it a port.
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    if tag.is_some_and(|t| !is_tag(t)) {
        return Err("invalid tag format");
    }
    let (registry, repository) = match name.split_once('/') {
        Some((first, rest)) if is_registry(first) => (first, rest.to_owned()),
        _ => ("docker.io", name.to_owned()),
    };
    let registry = if registry == "index.docker.io" { "docker.io" } else { registry };
    if !is_host(registry) {
        return Err("invalid reference format: the registry is no host name");
    }
    if repository.split('/').any(|c| !is_component(c)) {
        return Err(if repository.bytes().any(|b| b.is_ascii_uppercase()) {
            "invalid reference format: repository name must be lowercase"
        } else {
            "invalid reference format"
        });
    }
    let repository = if registry == "docker.io" && !repository.contains('/') {
        format!("library/{repository}")
    } else {
        repository
    };
    if registry.len() + 1 + repository.len() > MAX_NAME {
        return Err("repository name must not be more than 255 characters");
    }
    if digest.is_none() && tag.is_none() && name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err("cannot be 64 hexadecimal digits, which are an image's id");
    }
    let tag = tag.or(if digest.is_none() { Some("latest") } else { None });
    Ok(Reference { registry: registry.to_owned(), repository, tag: tag.map(str::to_owned), digest })
}

/// Whether the first part of a name is a registry rather than a part of the repository.
fn is_registry(part: &str) -> bool {
    part == "localhost" || part.contains(['.', ':']) || part.bytes().any(|b| b.is_ascii_uppercase())
}

fn is_host(text: &str) -> bool {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else { return false };
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return false;
        }
        (None, port.strip_prefix(':').or(if port.is_empty() { None } else { Some("") }))
    } else {
        match text.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(text), None),
        }
    };
    let label = |l: &str| {
        !l.is_empty()
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    host.is_none_or(|h| h.split('.').all(label))
        && port.is_none_or(|p| p.bytes().all(|b| b.is_ascii_digit()) && p.parse::<u16>().is_ok_and(|p| p > 0))
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= MAX_TAG
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

/// Runs of lower-case letters and digits, parted by one dot, one or two underscores, or any number of dashes.
fn is_component(component: &str) -> bool {
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    if !bytes.first().is_some_and(|b| alnum(*b)) || !bytes.last().is_some_and(|b| alnum(*b)) {
        return false;
    }
    bytes
        .split(|b| alnum(*b))
        .all(|gap| gap.is_empty() || matches!(gap, b"." | b"_" | b"__") || gap.iter().all(|b| *b == b'-'))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_are_completed_as_docker_does() {
        for (text, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("bitnami/redis", "docker.io/bitnami/redis:latest"),
            ("localhost/a", "localhost/a:latest"),
            ("localhost:5000/a/b_c:V1", "localhost:5000/a/b_c:V1"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
            ("127.0.0.1:5000/a--b/c__d.e", "127.0.0.1:5000/a--b/c__d.e:latest"),
            ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10"),
        ] {
            assert_eq!(Reference::parse(text).unwrap().to_string(), full);
        }
        let by_digest = Reference::parse(&format!("a.b/c:v1@sha256:{HEX}")).unwrap();
        assert_eq!(by_digest.wanted(), format!("sha256:{HEX}"));
        assert_eq!((by_digest.repo_tag(), by_digest.tag()), (None, Some("v1")));
        let no_tag = Reference::parse(&format!("a.b/c@sha256:{HEX}")).unwrap();
        assert_eq!(no_tag.to_string(), format!("a.b/c@sha256:{HEX}"));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = "a".repeat(300);
        for text in [
            "",
            " ",
            "Busybox",
            "a/B",
            "a//b",
            "/a",
            "a/",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "a:",
            "a:-x",
            "a@",
            "a@sha256:12",
            "../a",
            "a.b/../c",
            "a.b:0/c",
            "a.b:99999/c",
            "a.b:x/c",
            "[::1/a",
            "[x]:1/a",
            "a b",
            "a\n",
            "ä",
            "a?b",
            "a#b",
            "http://a.b/c",
            HEX,
            &long,
            "a@md5:d41d8cd98f00b204e9800998ecf8427e",
            "-a.b/c",
            "a.b-/c",
            "u@h/a",
        ] {
            assert!(matches!(Reference::parse(text), Err(Error::InvalidName { .. })), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_name_or_refused(text in "\\PC{0,80}") {
            let _ = Reference::parse(&text);
        }

        #[test]
        fn a_full_name_is_read_back_the_same(text in "([a-zA-Z0-9.:\\[\\]-]{1,12}/)?[a-z0-9._/-]{1,20}(:[a-zA-Z0-9._-]{1,12})?") {
            if let Ok(reference) = Reference::parse(&text) {
                prop_assert_eq!(&Reference::parse(&reference.to_string()).unwrap(), &reference);
                prop_assert!(!reference.repository().split('/').any(|c| c.is_empty() || c.starts_with('.')));
            }
        }
    }
}
