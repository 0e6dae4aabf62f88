//! Manifests and indexes of OCI and of Docker's schema 2; the choice of the host's platform.

use std::collections::HashMap;

use moxlet_ids::Digest;
use serde::Deserialize;

use super::{
    Session,
    platform::{Platform, host_architecture, host_variant},
};
use crate::{LayerBlob, Result};

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
    #[serde(default)]
    annotations: Option<HashMap<String, String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default)]
    schema_version: u32,
    artifact_type: Option<String>,
    manifests: Option<Vec<IndexEntry>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

/// The manifest of an image, byte by byte as it came.
#[derive(Debug, Clone)]
pub(crate) struct RawManifest {
    pub(crate) media_type: String,
    pub(crate) bytes: Vec<u8>,
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

/// Fetches the manifest of the host's platform.
pub(crate) async fn fetch(session: &Session<'_>) -> Result<Manifest> {
    let mut wanted = session.reference.wanted().to_owned();
    let mut expected = session.reference.digest().cloned();
    let mut top = None;
    for _ in 0..MAX_DEPTH {
        let body = session.manifest(&wanted, expected.as_ref(), MAX_MANIFEST).await?;
        // By which it was fetched, if it was by one.
        let actual = expected.take().unwrap_or_else(|| Digest::of(&body));
        let top = top.get_or_insert(actual).clone();
        match read(&body).map_err(|reason| session.bad("manifest", reason))? {
            Found::Image(config, layers) => {
                check_foreign(session, &layers).await?;
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

/// What a document has turned out to be.
pub(crate) enum Found {
    Image(Descriptor, Vec<Descriptor>),
    Next(Digest),
}

/// Reads what a registry may send.
#[cfg(any(feature = "fuzzing", test))]
pub(crate) fn fuzz(body: &[u8]) {
    drop(read(body));
}

/// Reads a manifest or an index; of an index, the digest of the manifest for the host.
pub(crate) fn read(body: &[u8]) -> std::result::Result<Found, String> {
    let document: Document = serde_json::from_slice(body).map_err(|e| format!("it cannot be read: {e}"))?;
    match document.schema_version {
        2 => {}
        1 => {
            return Err("it is of Docker's schema version 1, which is no longer supported: push the image again with a \
                        newer tool"
                .into());
        }
        _ => return Err("it is not of schema version 2".into()),
    }
    match (document.manifests, document.config, document.layers) {
        (Some(entries), None, None) => choose(&entries, host_architecture(), host_variant()).map(Found::Next),
        // Go's programs write `null` for no layers.
        (None, Some(config), layers) => {
            let layers = layers.unwrap_or_default();
            if layers.len() > MAX_LAYERS {
                return Err(format!("it has {} layers, more than {MAX_LAYERS}", layers.len()));
            }
            check_kind(&config, document.artifact_type.as_deref())?;
            for layer in &layers {
                let kind = layer.media_type.as_str();
                if kind.ends_with("+encrypted") || !(kind.is_empty() || kind.contains("tar")) {
                    return Err(format!("a layer has the unsupported media type {:?}", short(kind)));
                }
            }
            Ok(Found::Image(config, layers))
        }
        _ => Err("it is neither an image manifest nor an index".into()),
    }
}

/// Layers that their makers distribute from elsewhere (`urls`): the registry has one only where it was told to. We fetch
/// from nowhere but the registry, since an image could send the host anywhere.
async fn check_foreign(session: &Session<'_>, layers: &[Descriptor]) -> Result<()> {
    for (n, layer) in layers.iter().enumerate() {
        if is_foreign(&layer.media_type) && session.lacks(&layer.digest).await {
            let reason = "it is not distributed by the registry (foreign layer)";
            return Err(session.bad(&format!("layer {} ({})", n + 1, layer.digest), reason));
        }
    }
    Ok(())
}

fn is_foreign(media_type: &str) -> bool {
    media_type.starts_with("application/vnd.docker.image.rootfs.foreign.")
        || media_type.starts_with("application/vnd.oci.image.layer.nondistributable.")
}

/// Registries hold more than images, told apart by the type of the config.
fn check_kind(config: &Descriptor, artifact: Option<&str>) -> std::result::Result<(), String> {
    let known =
        ["", "application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
    // What old registries made of Docker's; Docker takes these for images as well.
    let mistaken = ["application/octet-stream", "application/json", "text/html"];
    let kind = config.media_type.as_str();
    let artifact = artifact.filter(|a| !a.is_empty());
    if known.contains(&kind) || (artifact.is_none() && mistaken.contains(&kind)) {
        return Ok(());
    }
    Err(match kind {
        "application/vnd.cncf.helm.config.v1+json" => "it is a Helm chart, not a container image".to_owned(),
        "application/vnd.docker.plugin.v1+json" => "it is a Docker plugin, not a container image".to_owned(),
        _ => {
            let kind = artifact.unwrap_or(kind);
            format!("it is an artefact of type {:?}, not a container image", short(kind))
        }
    })
}

/// What a registry says, for an error.
fn short(text: &str) -> String {
    text.chars().take(200).collect()
}

/// The entry for a platform: the newest variant that is not too new; else one that says nothing of its platform.
fn choose(
    entries: &[IndexEntry],
    architecture: &str,
    newest: Option<u8>,
) -> std::result::Result<Digest, String> {
    let attestation = |entry: &IndexEntry| {
        let kind = entry.annotations.as_ref().and_then(|a| a.get("vnd.docker.reference.type"));
        kind.is_some_and(|k| k == "attestation-manifest")
    };
    let rank = |entry: &&IndexEntry| match entry.platform.as_ref().map(Platform::normalized) {
        _ if attestation(entry) => None,
        Some(p) if p.is_linux_on(architecture) => match (newest, p.variant_number()) {
            (Some(newest), Some(this)) => newest.checked_sub(this),
            (None, _) if p.variant.is_empty() => Some(0),
            (None, _) => Some(1),
            (Some(_), None) => None,
        },
        Some(_) => None,
        None => Some(u8::MAX),
    };
    let best = entries.iter().filter_map(|e| Some((rank(&e)?, e))).min_by_key(|(rank, _)| *rank);
    let Some((_, entry)) = best else {
        if !entries.is_empty() && entries.iter().all(attestation) {
            return Err("it has attestations only, no container image".into());
        }
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

    fn entry(c: char, arch: &str, variant: &str) -> IndexEntry {
        let platform = Platform { architecture: arch.into(), os: "linux".into(), variant: variant.into() };
        IndexEntry { digest: digest(c), size: 1, platform: Some(platform), annotations: None }
    }

    #[test]
    fn the_hosts_platform_is_chosen() {
        let all = [
            entry('a', "unknown", ""),
            entry('b', "amd64", "v3"),
            entry('c', "arm64", "v8"),
            entry('d', "amd64", ""),
            entry('e', "arm", "v6"),
            entry('f', "arm", "v7"),
            entry('0', "arm64", "v9"),
            entry('1', "s390x", ""),
        ];
        for (architecture, newest, want) in [
            ("amd64", Some(1), 'd'),
            ("arm64", Some(8), 'c'),
            ("arm64", Some(9), '0'),
            ("arm", Some(7), 'f'),
            ("arm", Some(6), 'e'),
            ("s390x", None, '1'),
        ] {
            let chosen = choose(&all, architecture, newest).unwrap();
            assert_eq!(chosen.as_str(), digest(want), "{architecture} {newest:?}");
        }
        for (architecture, newest) in [("riscv64", None), ("arm", Some(5))] {
            assert!(choose(&all, architecture, newest).unwrap_err().contains("no match for platform"));
        }
        let mut unsaid = entry('b', "", "");
        unsaid.platform = None;
        assert_eq!(choose(&[unsaid], "amd64", Some(1)).unwrap().as_str(), digest('b'));
        let newer_only = [entry('b', "amd64", "v3")];
        assert!(choose(&newer_only, "amd64", Some(1)).is_err(), "the host may not have its instructions");
    }

    #[test]
    fn a_platform_is_the_same_by_each_of_its_names() {
        let all = [
            entry('a', "aarch64", ""),
            entry('b', "X86_64", ""),
            entry('c', "armhf", ""),
            entry('d', "armel", ""),
        ];
        for (architecture, newest, want) in
            [("arm64", Some(8), 'a'), ("amd64", Some(1), 'b'), ("arm", Some(7), 'c'), ("arm", Some(6), 'd')]
        {
            let chosen = choose(&all, architecture, newest).unwrap();
            assert_eq!(chosen.as_str(), digest(want), "{architecture} {newest:?}");
        }
        let mut windows = entry('a', "amd64", "");
        windows.platform.as_mut().unwrap().os = "Windows".into();
        assert!(choose(&[windows], "amd64", Some(1)).is_err());
    }

    #[test]
    fn attestations_are_no_images() {
        let mut attestation = entry('a', "unknown", "");
        let kind = ("vnd.docker.reference.type".to_owned(), "attestation-manifest".to_owned());
        attestation.annotations = Some([kind].into());
        let mut all = vec![attestation];
        assert!(choose(&all, "amd64", Some(1)).unwrap_err().contains("attestations only"));
        all.push(entry('b', "amd64", ""));
        assert_eq!(choose(&all, "amd64", Some(1)).unwrap().as_str(), digest('b'));
    }

    #[test]
    fn what_is_no_image_is_called_what_it_is() {
        let d = digest('a');
        let of = |kind: &str, more: &str| {
            format!(
                r#"{{"schemaVersion":2,{more}"config":{{"mediaType":"{kind}","digest":"{d}","size":2}},"layers":[]}}"#
            )
        };
        for (text, said) in [
            (of("application/vnd.cncf.helm.config.v1+json", ""), "Helm chart"),
            (of("application/vnd.docker.plugin.v1+json", ""), "Docker plugin"),
            (
                of("application/vnd.oci.empty.v1+json", r#""artifactType":"application/x.sbom","#),
                "artefact of type \"application/x.sbom\"",
            ),
            (of("application/vnd.unknown.config.v1+json", ""), "application/vnd.unknown.config.v1+json"),
            (r#"{"schemaVersion":1,"name":"a","fsLayers":[]}"#.to_owned(), "schema version 1"),
        ] {
            let error = read(text.as_bytes()).err().unwrap();
            assert!(error.contains(said), "{error}");
        }
        for kind in ["application/octet-stream", "application/json"] {
            let error = read(of(kind, r#""artifactType":"application/x.sbom","#).as_bytes()).err().unwrap();
            assert!(error.contains("artefact"), "{error}");
        }
    }

    #[test]
    fn images_of_old_registries_and_without_layers_are_images() {
        let d = digest('a');
        for kind in [
            "application/vnd.oci.image.config.v1+json",
            "application/vnd.docker.container.image.v1+json",
            "application/octet-stream",
            "application/json",
            "text/html",
            "",
        ] {
            for layers in [r#","layers":[]"#, r#","layers":null"#, ""] {
                let text = format!(
                    r#"{{"schemaVersion":2,"config":{{"mediaType":"{kind}","digest":"{d}","size":2}}{layers}}}"#
                );
                let found = read(text.as_bytes());
                assert!(matches!(found, Ok(Found::Image(_, layers)) if layers.is_empty()), "{text}");
            }
        }
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
