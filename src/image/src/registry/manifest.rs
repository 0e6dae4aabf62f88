//! Manifests and indexes of OCI and of Docker's schema 2; the choice of the host's platform.

use moxlet_ids::Digest;
use serde::Deserialize;

use super::Session;
use crate::{LayerBlob, Result, store::RawManifest};

/// What we can read.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1";
const MAX_MANIFEST: usize = 4 << 20;
const MAX_LAYERS: usize = 128;
/// An index may name another one, not a row of them.
const MAX_DEPTH: usize = 3;

/// A reference to a blob.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

impl From<Descriptor> for LayerBlob {
    fn from(blob: Descriptor) -> Self {
        Self { digest: blob.digest, size: blob.size, media_type: blob.media_type }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct IndexEntry {
    digest: String,
    #[serde(default)]
    size: u64,
    platform: Option<Platform>,
}

#[derive(Debug, Deserialize)]
struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    variant: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default)]
    schema_version: u32,
    manifests: Option<Vec<IndexEntry>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

/// What an image is made of.
#[derive(Debug)]
pub(crate) struct Manifest {
    /// What the name stands for: the digest of the index, where there is one.
    pub(crate) top: Digest,
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
    /// What it was read from.
    pub(crate) raw: RawManifest,
}

/// Go's name of the host's architecture.
pub(crate) fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

/// Fetches the manifest of the host's platform.
pub(crate) async fn fetch(session: &Session<'_>) -> Result<Manifest> {
    let mut wanted = session.reference.wanted().to_owned();
    let mut expected = session.reference.digest().cloned();
    let mut top = None;
    for _ in 0..MAX_DEPTH {
        let body = session.manifest(&wanted, expected.as_ref(), MAX_MANIFEST).await?;
        let actual = Digest::of(&body);
        let top = top.get_or_insert(actual).clone();
        match read(&body).map_err(|reason| session.bad("manifest", reason))? {
            Found::Image(config, layers) => {
                let media_type = media_type(&body, &config);
                let raw = RawManifest { media_type, bytes: body };
                return Ok(Manifest { top, config, layers, raw });
            }
            Found::Next(digest) => {
                wanted = digest.to_string();
                expected = Some(digest);
            }
        }
    }
    Err(session.bad("manifest", "indexes are nested too deep"))
}

/// The media type of a manifest: what it says itself, else what its config's type belongs to. An OCI manifest need not
/// say it (image-spec 1.1, manifest.md).
pub(crate) fn media_type(body: &[u8], config: &Descriptor) -> String {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Said {
        #[serde(default)]
        media_type: String,
    }
    let said = serde_json::from_slice::<Said>(body).map(|s| s.media_type).unwrap_or_default();
    match said.as_str() {
        "" if config.media_type.starts_with("application/vnd.docker.") => {
            "application/vnd.docker.distribution.manifest.v2+json".to_owned()
        }
        "" => "application/vnd.oci.image.manifest.v1+json".to_owned(),
        _ => said,
    }
}

enum Found {
    Image(Descriptor, Vec<Descriptor>),
    Next(Digest),
}

fn read(body: &[u8]) -> std::result::Result<Found, String> {
    let document: Document = serde_json::from_slice(body).map_err(|e| format!("it cannot be read: {e}"))?;
    if document.schema_version != 2 {
        return Err("it is not of schema version 2: push the image again with a newer tool".into());
    }
    match (document.manifests, document.config, document.layers) {
        (Some(entries), None, None) => choose(&entries, host_architecture()).map(Found::Next),
        (None, Some(config), Some(layers)) => {
            if layers.len() > MAX_LAYERS {
                return Err(format!("it has {} layers, more than {MAX_LAYERS}", layers.len()));
            }
            let known = [
                "",
                "application/vnd.oci.image.config.v1+json",
                "application/vnd.docker.container.image.v1+json",
            ];
            if !known.contains(&config.media_type.as_str()) {
                return Err(format!(
                    "it is not a container image: its config is of type {:?}",
                    config.media_type
                ));
            }
            for layer in &layers {
                let kind = layer.media_type.as_str();
                if kind.ends_with("+encrypted") || !(kind.is_empty() || kind.contains("tar")) {
                    return Err(format!("a layer has the unsupported media type {kind:?}"));
                }
            }
            Ok(Found::Image(config, layers))
        }
        _ => Err("it is neither an image manifest nor an index".into()),
    }
}

fn choose(entries: &[IndexEntry], architecture: &str) -> std::result::Result<Digest, String> {
    let rank = |entry: &&IndexEntry| match &entry.platform {
        Some(p) if p.os == "linux" && p.architecture == architecture => {
            match (architecture, p.variant.as_str()) {
                (_, "") | ("arm64", "v8") | ("amd64", "v1") => Some(0),
                ("amd64", _) => None,
                _ => Some(1),
            }
        }
        Some(_) => None,
        None => Some(2),
    };
    let best = entries.iter().filter_map(|e| Some((rank(&e)?, e))).min_by_key(|(rank, _)| *rank);
    let Some((_, entry)) = best else {
        return Err(format!("no match for platform in manifest: not found (linux/{architecture})"));
    };
    if entry.size > MAX_MANIFEST as u64 {
        return Err("the index names a manifest that is too large".into());
    }
    entry.digest.parse().map_err(|e| format!("{e}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    fn digest(c: char) -> String {
        format!("sha256:{}", String::from(c).repeat(64))
    }

    #[test]
    fn the_hosts_platform_is_chosen() {
        let entry = |c, arch: &str, variant: &str| IndexEntry {
            digest: digest(c),
            size: 1,
            platform: Some(Platform {
                architecture: arch.into(),
                os: "linux".into(),
                variant: variant.into(),
            }),
        };
        let all = [
            entry('a', "unknown", ""),
            entry('b', "amd64", "v3"),
            entry('c', "arm64", "v8"),
            entry('d', "amd64", ""),
        ];
        assert_eq!(choose(&all, "amd64").unwrap().as_str(), digest('d'));
        assert_eq!(choose(&all, "arm64").unwrap().as_str(), digest('c'));
        assert!(choose(&all, "riscv64").unwrap_err().contains("no match for platform"));
    }

    #[test]
    fn a_manifest_that_is_two_things_or_none_is_refused() {
        let d = digest('a');
        for text in [
            "{}".to_owned(),
            r#"{"schemaVersion":1}"#.to_owned(),
            r#"{"schemaVersion":2}"#.to_owned(),
            format!(
                r#"{{"schemaVersion":2,"manifests":[],"config":{{"digest":"{d}","size":1}},"layers":[]}}"#
            ),
            format!(r#"{{"schemaVersion":2,"config":{{"digest":"{d}","size":-1}},"layers":[]}}"#),
            r#"{"schemaVersion":2,"config":{"digest":"../x","size":1},"layers":[]}"#.to_owned(),
        ] {
            assert!(read(text.as_bytes()).is_err(), "{text}");
        }
    }
}
