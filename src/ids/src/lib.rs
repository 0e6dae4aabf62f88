//! The newtypes that every room may know, nothing else: who a pod, sandbox, container, image or host is.
//!
//! Every constructor checks its input, since ids come over gRPC and become file names and CT names.

mod vmid;

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
pub use vmid::Vmid;

/// Why a string is no id.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[error("{kind} {value:?} is not valid: {reason}")]
pub struct InvalidId {
    /// Which kind of id was wanted.
    pub kind: &'static str,
    /// The offending text, cut to 80 characters.
    pub value: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

fn check(kind: &'static str, value: &str, max: usize, ok: impl Fn(char) -> bool) -> Result<(), InvalidId> {
    let reason = if value.is_empty() {
        "it is empty"
    } else if value.len() > max {
        "it is too long"
    } else if value.starts_with(['.', '-']) {
        "it starts with a dot or a dash"
    } else if !value.chars().all(ok) {
        "it has a character that is not allowed"
    } else {
        return Ok(());
    };
    Err(InvalidId { kind, value: value.chars().take(80).collect(), reason })
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $max:literal, $ok:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The id as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(s: &str) -> Result<Self, InvalidId> {
                check($kind, s, $max, $ok)?;
                Ok(Self(s.to_owned()))
            }
        }
        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(s: String) -> Result<Self, InvalidId> {
                s.parse()
            }
        }
        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

fn word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

fn lower_hex(c: char) -> bool {
    c.is_ascii_digit() || ('a'..='f').contains(&c)
}

id!(/** A pod's `metadata.uid`; a static pod's is a hash. */ PodUid, "pod UID", 128, word);
id!(/** A sandbox (one CT); 32 lower-case hexadecimal digits, since LXC refuses names over 64. */ SandboxId, "sandbox id", 64, lower_hex);
id!(/** A container of a pod; 32 lower-case hexadecimal digits. */ ContainerId, "container id", 64, lower_hex);
id!(/** A PVE host's name. */ HostName, "host name", 63, word);

impl SandboxId {
    /// A new random id.
    #[must_use]
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().simple().to_string())
    }
}

impl ContainerId {
    /// A new random id.
    #[must_use]
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().simple().to_string())
    }
}

/// `sha256:` and 64 lower-case hexadecimal digits: a blob's digest (OCI image spec, descriptor).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// The digest as text, `sha256:…`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The 64 digits without the algorithm.
    #[must_use]
    pub fn hex(&self) -> &str {
        self.0.trim_start_matches("sha256:")
    }

    /// The digest of some bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(format!("sha256:{}", hex::encode(sha2::Sha256::digest(bytes))))
    }
}

impl FromStr for Digest {
    type Err = InvalidId;
    fn from_str(s: &str) -> Result<Self, InvalidId> {
        match s.strip_prefix("sha256:") {
            Some(h) if h.len() == 64 && h.chars().all(lower_hex) => Ok(Self(s.to_owned())),
            _ => Err(InvalidId {
                kind: "digest",
                value: s.chars().take(80).collect(),
                reason: "it is not sha256: and 64 hexadecimal digits",
            }),
        }
    }
}

impl TryFrom<String> for Digest {
    type Error = InvalidId;
    fn try_from(s: String) -> Result<Self, InvalidId> {
        s.parse()
    }
}

impl From<Digest> for String {
    fn from(d: Digest) -> String {
        d.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The chain ID of a stack of layers (OCI image spec, config.md, "Layer ChainID").
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct ChainId(Digest);

impl ChainId {
    /// The chain ID of the bottom layer: its DiffID.
    #[must_use]
    pub fn base(diff_id: &Digest) -> Self {
        Self(diff_id.clone())
    }

    /// The chain ID of a layer on top of this chain.
    #[must_use]
    pub fn push(&self, diff_id: &Digest) -> Self {
        Self(Digest::of(format!("{} {diff_id}", self.0).as_bytes()))
    }

    /// The chain ID as a digest.
    #[must_use]
    pub fn digest(&self) -> &Digest {
        &self.0
    }
}

impl FromStr for ChainId {
    type Err = InvalidId;
    fn from_str(s: &str) -> Result<Self, InvalidId> {
        Ok(Self(s.parse()?))
    }
}

impl fmt::Display for ChainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_could_climb_out_of_a_directory_is_refused() {
        for bad in ["", "..", ".", "../x", "a/b", "a\0b", "-x"] {
            assert!(bad.parse::<PodUid>().is_err(), "{bad:?}");
        }
        assert!("a".repeat(129).parse::<PodUid>().is_err());
        assert!("550e8400-e29b-41d4-a716-446655440000".parse::<PodUid>().is_ok());
    }

    #[test]
    fn a_digest_is_sha256_in_lower_case() {
        assert!(Digest::of(b"").as_str().starts_with("sha256:e3b0c442"));
        assert!("sha256:ABC".parse::<Digest>().is_err());
        assert!("md5:00".parse::<Digest>().is_err());
    }

    #[test]
    fn random_ids_fit_lxc() {
        assert_eq!(SandboxId::random().as_str().len(), 32);
    }
}
