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

/// The algorithm of a digest: those that the OCI image specification registers (descriptor.md, "Registered Algorithms").
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Algorithm {
    /// 64 digits; what nearly everybody uses.
    Sha256,
    /// 128 digits.
    Sha512,
}

impl Algorithm {
    const ALL: [Self; 2] = [Self::Sha256, Self::Sha512];

    /// Its name, as before the colon of a digest.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// Hexadecimal digits of a digest.
    const fn digits(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }
}

/// The digest of bytes that come piece by piece.
#[derive(Clone, Debug)]
pub struct Hasher(Sum);

#[derive(Clone, Debug)]
enum Sum {
    Sha256(sha2::Sha256),
    Sha512(Box<sha2::Sha512>),
}

impl Hasher {
    /// Of no bytes yet.
    #[must_use]
    pub fn new(algorithm: Algorithm) -> Self {
        use sha2::Digest as _;
        Self(match algorithm {
            Algorithm::Sha256 => Sum::Sha256(sha2::Sha256::new()),
            Algorithm::Sha512 => Sum::Sha512(Box::new(sha2::Sha512::new())),
        })
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        use sha2::Digest as _;
        match &mut self.0 {
            Sum::Sha256(sum) => sum.update(bytes),
            Sum::Sha512(sum) => sum.update(bytes),
        }
    }

    /// The digest of all bytes.
    #[must_use]
    pub fn finish(self) -> Digest {
        use sha2::Digest as _;
        let (algorithm, hex) = match self.0 {
            Sum::Sha256(sum) => (Algorithm::Sha256, hex::encode(sum.finalize())),
            Sum::Sha512(sum) => (Algorithm::Sha512, hex::encode(sum.finalize())),
        };
        Digest(format!("{}:{hex}", algorithm.name()))
    }
}

/// `sha256:` or `sha512:` and lower-case hexadecimal digits: a blob's digest (OCI image spec, descriptor).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// The digest as text, `sha256:…`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The digits without the algorithm.
    #[must_use]
    pub fn hex(&self) -> &str {
        self.0.split_once(':').map_or("", |(_, digits)| digits)
    }

    /// The algorithm.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        if self.0.starts_with("sha512:") { Algorithm::Sha512 } else { Algorithm::Sha256 }
    }

    /// The SHA-256 digest of some bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self::by(Algorithm::Sha256, bytes)
    }

    /// The digest of some bytes by an algorithm, for comparison with one that was given.
    #[must_use]
    pub fn by(algorithm: Algorithm, bytes: &[u8]) -> Self {
        let mut sum = Hasher::new(algorithm);
        sum.update(bytes);
        sum.finish()
    }
}

impl FromStr for Digest {
    type Err = InvalidId;
    fn from_str(s: &str) -> Result<Self, InvalidId> {
        let known = |(name, digits): (&str, &str)| {
            let algorithm = Algorithm::ALL.into_iter().find(|a| a.name() == name)?;
            (digits.len() == algorithm.digits() && digits.chars().all(lower_hex)).then_some(())
        };
        match s.split_once(':').and_then(known) {
            Some(()) => Ok(Self(s.to_owned())),
            None => Err(InvalidId {
                kind: "digest",
                value: s.chars().take(80).collect(),
                reason: "it is not sha256: and 64 or sha512: and 128 lower-case hexadecimal digits",
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
    /// The chain ID of the bottom layer: its DiffID, which is by sha256.
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
        let digest: Digest = s.parse()?;
        match digest.algorithm() {
            Algorithm::Sha256 => Ok(Self(digest)),
            Algorithm::Sha512 => Err(InvalidId {
                kind: "chain ID",
                value: s.chars().take(80).collect(),
                reason: "it is not by sha256",
            }),
        }
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
    fn a_digest_is_sha256_or_sha512_in_lower_case() {
        assert!(Digest::of(b"").as_str().starts_with("sha256:e3b0c442"));
        assert!("sha256:ABC".parse::<Digest>().is_err());
        let long = Digest::by(Algorithm::Sha512, b"");
        assert!(long.as_str().starts_with("sha512:cf83e1357eefb8bd"));
        assert_eq!((long.algorithm(), long.hex().len()), (Algorithm::Sha512, 128));
        assert_eq!(long.as_str().parse(), Ok(long.clone()));
        assert!(format!("sha256:{}", long.hex()).parse::<Digest>().is_err());
        assert!("sha512:abc".parse::<Digest>().is_err() && "md5:abc".parse::<Digest>().is_err());
        assert!(long.as_str().parse::<ChainId>().is_err());
        assert!("md5:00".parse::<Digest>().is_err());
    }

    #[test]
    fn random_ids_fit_lxc() {
        assert_eq!(SandboxId::random().as_str().len(), 32);
    }
}
