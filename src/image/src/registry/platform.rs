//! Platforms by the names that tools give them, and the host's own: read as containerd's package `platforms` normalises them.

use serde::Deserialize;

/// What an index or a config says an image is for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    pub(super) architecture: String,
    #[serde(default)]
    pub(super) os: String,
    #[serde(default)]
    pub(super) variant: String,
}

impl Platform {
    /// With Go's names, in lower case. An OS that is not said is the host's. Beside what containerd knows, the names of
    /// the kernel (`armv7l`) and those with the variant in them (`arm64/v8`) are read: some builders write these.
    pub(super) fn normalized(&self) -> Self {
        let mut os = self.os.to_ascii_lowercase();
        if os.is_empty() {
            "linux".clone_into(&mut os);
        }
        let (said, variant) = (self.architecture.to_ascii_lowercase(), self.variant.to_ascii_lowercase());
        let (said, variant) = match said.split_once('/') {
            Some((architecture, within)) if variant.is_empty() => (architecture, within),
            _ => (said.as_str(), variant.as_str()),
        };
        let (architecture, variant) = normalized(said, variant);
        Self { architecture: architecture.to_owned(), os, variant }
    }

    /// Whether it is Linux on an architecture, whatever its variant. It has to be normalised.
    pub(super) fn is_linux_on(&self, architecture: &str) -> bool {
        self.os == "linux" && self.architecture == architecture
    }

    /// The number of its variant. What says none is the one that its architecture means without. It has to be normalised.
    pub(super) fn variant_number(&self) -> Option<u8> {
        match (self.architecture.as_str(), self.variant.as_str()) {
            ("arm64", "") => Some(8),
            ("amd64", "") => Some(1),
            (_, said) => said.strip_prefix('v').unwrap_or(said).parse().ok(),
        }
    }
}

/// Architecture and variant as Go and containerd call them.
fn normalized<'a>(architecture: &'a str, variant: &str) -> (&'a str, String) {
    let (architecture, variant) = match (architecture, variant) {
        ("i386", _) => ("386", ""),
        ("x86_64" | "x86-64" | "amd64", "v1") => ("amd64", ""),
        ("x86_64" | "x86-64" | "amd64", variant) => ("amd64", variant),
        ("aarch64" | "arm64", "8" | "v8" | "v8.0") => ("arm64", ""),
        ("aarch64" | "arm64", "9" | "9.0" | "v9.0") => ("arm64", "v9"),
        ("aarch64" | "arm64", variant) => ("arm64", variant),
        ("armhf" | "armv7l", _) | ("arm", "" | "7") => ("arm", "v7"),
        ("armel" | "armv6l", _) | ("arm", "6") => ("arm", "v6"),
        ("arm", "5") => ("arm", "v5"),
        ("arm", "8") => ("arm", "v8"),
        other => other,
    };
    (architecture, variant.to_owned())
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

/// The newest variant of its architecture that a host can run, of those that Go numbers; none where there is one only.
pub(super) fn host_variant() -> Option<u8> {
    match std::env::consts::ARCH {
        // What Rust calls arm is hard-float, v7 on all that run a kernel of these days.
        "arm" => Some(7),
        "aarch64" => Some(8),
        "x86_64" => Some(1),
        _ => None,
    }
}

/// What a config says that its image is for (`os/architecture`), where that is not this host.
pub(crate) fn foreign(os: &str, architecture: &str) -> Option<String> {
    let said = Platform { architecture: architecture.to_owned(), os: os.to_owned(), variant: String::new() };
    (!said.normalized().is_linux_on(host_architecture())).then(|| format!("{os}/{architecture}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn names_are_those_of_containerd() {
        for (said, want) in [
            ("linux/i386", "linux/386/"),
            ("linux/x86_64", "linux/amd64/"),
            ("Linux/x86-64/v2", "linux/amd64/v2"),
            ("linux/amd64/v1", "linux/amd64/"),
            ("linux/aarch64", "linux/arm64/"),
            ("linux/arm64/8", "linux/arm64/"),
            ("linux/arm64/V8", "linux/arm64/"),
            ("linux/arm64/9", "linux/arm64/v9"),
            ("linux/armhf", "linux/arm/v7"),
            ("linux/armel", "linux/arm/v6"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/arm/5", "linux/arm/v5"),
            ("linux/armv7l", "linux/arm/v7"),
            ("/s390x", "linux/s390x/"),
            ("windows/amd64", "windows/amd64/"),
            ("unknown/unknown", "unknown/unknown/"),
        ] {
            let mut parts = said.splitn(3, '/').map(str::to_owned);
            let mut part = || parts.next().unwrap_or_default();
            let (os, architecture, variant) = (part(), part(), part());
            let named = Platform { architecture, os, variant }.normalized();
            assert_eq!(format!("{}/{}/{}", named.os, named.architecture, named.variant), want, "{said}");
            assert_eq!(named.normalized(), named, "{said}");
        }
        let within = Platform { architecture: "arm64/v8".into(), os: "linux".into(), variant: String::new() };
        assert_eq!(within.normalized().architecture, "arm64");
        assert_eq!(within.normalized().variant_number(), Some(8));
    }

    #[test]
    fn what_is_not_for_this_host_is_named_as_it_is() {
        let host = host_architecture();
        for (os, architecture) in [("linux", host), ("Linux", std::env::consts::ARCH), ("", host)] {
            assert_eq!(foreign(os, architecture), None);
        }
        assert_eq!(foreign("windows", host), Some(format!("windows/{host}")));
        assert_eq!(foreign("linux", "Other"), Some("linux/Other".into()));
    }
}
