//! What is kept in memory of an image's config: what a container needs, and what tells its layers.
//!
//! A config of 8 MiB can hold millions of entries of a history, each many times as large in memory as in the file. So
//! nothing is read here that nobody uses, and of what is read there is only so much. Who needs the config as it came
//! (a push, an export, a verification, an inspection) reads its bytes.

use std::fmt;

use moxlet_ids::{Algorithm, Digest};
use serde::{
    Deserialize, Deserializer,
    de::{self, SeqAccess, Visitor},
};

/// Layers of an image.
const MAX_LAYERS: usize = 128;
/// Variables of the environment, and words of a command.
const MAX_WORDS: usize = 4096;
/// Bytes of all texts: less than the kernel takes as arguments and environment of a program.
const MAX_TEXT: usize = 1 << 20;

/// What an image's config says, as far as it is used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Document")]
pub struct ImageConfig {
    /// Go's name of its architecture.
    pub architecture: String,
    /// Its operating system.
    pub os: String,
    /// When it was made.
    pub created: Option<String>,
    /// The digests of its layers' archives, the bottom one first.
    pub diff_ids: Vec<Digest>,
    /// `User`; empty for none, as all texts below.
    pub user: String,
    /// `Env`: `NAME=value`.
    pub env: Vec<String>,
    /// `Entrypoint`.
    pub entrypoint: Vec<String>,
    /// `Cmd`.
    pub cmd: Vec<String>,
    /// `WorkingDir`.
    pub working_dir: String,
    /// The keys of `Volumes`: directories that are writable whatever the root is.
    pub volumes: Vec<String>,
    /// `StopSignal`.
    pub stop_signal: String,
}

/// The config as it is written (image-spec, `config.md`). Programs write `null` for what is empty.
#[derive(Deserialize)]
struct Document {
    architecture: String,
    os: String,
    created: Option<String>,
    rootfs: RootFs,
    config: Option<Run>,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(deserialize_with = "layers")]
    diff_ids: Vec<Digest>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Run {
    user: Option<String>,
    #[serde(default, deserialize_with = "env")]
    env: Vec<String>,
    #[serde(default, deserialize_with = "entrypoint")]
    entrypoint: Vec<String>,
    #[serde(default, deserialize_with = "cmd")]
    cmd: Vec<String>,
    working_dir: Option<String>,
    volumes: Option<std::collections::BTreeMap<String, serde::de::IgnoredAny>>,
    stop_signal: Option<String>,
}

impl ImageConfig {
    /// Reads a config; the error says why it cannot be used.
    pub(crate) fn read(blob: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(blob).map_err(|e| format!("it cannot be read: {e}"))
    }
}

/// The DiffIDs, from which chain IDs are made: those are by sha256, here as with every other engine.
fn by_sha256(diff_ids: Vec<Digest>) -> Result<Vec<Digest>, String> {
    match diff_ids.iter().find(|d| d.algorithm() != Algorithm::Sha256) {
        Some(other) => Err(format!("its DiffID {other} is not by sha256")),
        None => Ok(diff_ids),
    }
}

impl TryFrom<Document> for ImageConfig {
    type Error = String;

    fn try_from(document: Document) -> Result<Self, String> {
        let run = document.config.unwrap_or_default();
        let config = Self {
            architecture: document.architecture,
            os: document.os,
            created: document.created,
            diff_ids: by_sha256(document.rootfs.diff_ids)?,
            user: run.user.unwrap_or_default(),
            env: run.env,
            entrypoint: run.entrypoint,
            cmd: run.cmd,
            working_dir: run.working_dir.unwrap_or_default(),
            volumes: run.volumes.unwrap_or_default().into_keys().collect(),
            stop_signal: run.stop_signal.unwrap_or_default(),
        };
        let lists = config
            .env
            .iter()
            .chain(&config.entrypoint)
            .chain(&config.cmd)
            .chain(&config.volumes)
            .map(String::len);
        let single =
            [&config.architecture, &config.os, &config.user, &config.working_dir, &config.stop_signal];
        let single = single.into_iter().chain(&config.created).map(String::len);
        if lists.chain(single).sum::<usize>() > MAX_TEXT {
            return Err(format!(
                "its environment, commands and other texts are longer than {MAX_TEXT} bytes"
            ));
        }
        Ok(config)
    }
}

/// A list that is refused as soon as it is too long.
struct Bounded<T> {
    name: &'static str,
    most: usize,
    items: Vec<T>,
}

impl<T> Bounded<T> {
    fn new(name: &'static str, most: usize) -> Self {
        Self { name, most, items: Vec::new() }
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Bounded<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: a list of texts", self.name)
    }

    fn visit_none<E>(self) -> Result<Vec<T>, E> {
        Ok(self.items)
    }

    fn visit_unit<E>(self) -> Result<Vec<T>, E> {
        Ok(self.items)
    }

    fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<Vec<T>, D::Error> {
        from.deserialize_seq(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut from: A) -> Result<Vec<T>, A::Error> {
        while let Some(item) = from.next_element()? {
            if self.items.len() >= self.most {
                let (name, most) = (self.name, self.most);
                return Err(de::Error::custom(format_args!("{name} has more than {most} entries")));
            }
            self.items.push(item);
        }
        Ok(self.items)
    }
}

fn layers<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Digest>, D::Error> {
    from.deserialize_option(Bounded::new("diff_ids", MAX_LAYERS))
}

fn env<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    from.deserialize_option(Bounded::new("Env", MAX_WORDS))
}

fn entrypoint<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    from.deserialize_option(Bounded::new("Entrypoint", MAX_WORDS))
}

fn cmd<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    from.deserialize_option(Bounded::new("Cmd", MAX_WORDS))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use serde_json::{Value, json};

    use super::*;

    fn read(config: &Value) -> Result<ImageConfig, String> {
        ImageConfig::read(config.to_string().as_bytes())
    }

    fn of(config: &Value) -> Value {
        json!({ "architecture": "amd64", "os": "linux", "rootfs": { "diff_ids": [] }, "config": config })
    }

    #[test]
    fn what_a_container_needs_is_read_and_what_is_null_is_empty() {
        let full = read(&json!({
            "architecture": "arm64", "os": "linux", "created": "2026-01-02T03:04:05Z", "variant": "v8",
            "rootfs": { "type": "layers", "diff_ids": [Digest::of(b"x")] },
            "config": {
                "User": "1000:5", "Env": ["A=b"], "Entrypoint": ["/a"], "Cmd": ["b", ""], "WorkingDir": "/w",
                "Volumes": { "/data": {} },
                "StopSignal": "QUIT", "Labels": { "a": "b" }, "ExposedPorts": { "80/tcp": {} },
            },
            "history": [{ "created_by": "x" }, { "empty_layer": true }],
        }));
        let expected = ImageConfig {
            architecture: "arm64".into(),
            os: "linux".into(),
            created: Some("2026-01-02T03:04:05Z".into()),
            diff_ids: vec![Digest::of(b"x")],
            user: "1000:5".into(),
            env: vec!["A=b".into()],
            entrypoint: vec!["/a".into()],
            cmd: vec!["b".into(), String::new()],
            working_dir: "/w".into(),
            volumes: vec!["/data".into()],
            stop_signal: "QUIT".into(),
        };
        assert_eq!(full.unwrap(), expected);
        let empty =
            ImageConfig { architecture: "amd64".into(), os: "linux".into(), ..ImageConfig::default() };
        for config in [
            Value::Null,
            json!({}),
            json!({ "User": null, "Env": null, "Entrypoint": null, "Cmd": null, "StopSignal": null }),
        ] {
            assert_eq!(read(&of(&config)).unwrap(), empty);
        }
        for wrong in [json!({}), json!([]), of(&json!(7)), of(&json!({ "Env": "A=b" }))] {
            assert!(read(&wrong).unwrap_err().contains("cannot be read"), "{wrong}");
        }
    }

    #[test]
    fn a_list_or_text_beyond_all_reason_is_refused_by_its_name() {
        for name in ["Env", "Entrypoint", "Cmd"] {
            assert!(read(&of(&json!({ name: vec![""; MAX_WORDS] }))).is_ok());
            let error = read(&of(&json!({ name: vec![""; MAX_WORDS + 1] }))).unwrap_err();
            assert!(error.contains(&format!("{name} has more than 4096 entries")), "{error}");
        }
        let mut many = of(&Value::Null);
        many["rootfs"]["diff_ids"] = json!(vec![Digest::of(b"x"); MAX_LAYERS + 1]);
        assert!(read(&many).unwrap_err().contains("diff_ids has more than 128 entries"));
        for config in [json!({ "User": "x".repeat(MAX_TEXT) }), json!({ "Cmd": ["x".repeat(MAX_TEXT)] })] {
            assert!(read(&of(&config)).unwrap_err().contains("longer than 1048576 bytes"));
        }
    }
}
