//! The resolver's configuration that pods of a host are to have.
//!
//! A server on a loopback address is the host's own (systemd-resolved's 127.0.0.53, a local dnsmasq): in a pod that address is the
//! pod. systemd-resolved keeps the list behind its own in another file, which is where kubeadm points a kubelet at, too.

use std::{net::IpAddr, path::Path};

/// The host's own configuration.
const HOST: &str = "/etc/resolv.conf";
/// The servers behind systemd-resolved.
const BEHIND_RESOLVED: &str = "/run/systemd/resolve/resolv.conf";
/// No such file is larger, in bytes.
const MAX: u64 = 1 << 20;

/// What pods are given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolver {
    /// A text as of `resolv.conf(5)`, without servers that no pod can reach.
    pub text: String,
    /// The servers that were left out: addresses of the host's loopback.
    pub left_out: Vec<String>,
}

/// Reads the host's, or the configured file in its place.
#[must_use]
pub fn of_host(configured: Option<&Path>) -> Resolver {
    choose(configured, Path::new(HOST), Path::new(BEHIND_RESOLVED))
}

fn choose(configured: Option<&Path>, host: &Path, behind: &Path) -> Resolver {
    let read = |path: &Path| moxlet_files::read_text_bounded(path, MAX).unwrap_or_default();
    if let Some(path) = configured {
        return without_loopback(&read(path));
    }
    let own = without_loopback(&read(host));
    if own.left_out.is_empty() || has_server(&own.text) {
        return own;
    }
    let other = without_loopback(&read(behind));
    if has_server(&other.text) { Resolver { left_out: Vec::new(), ..other } } else { own }
}

/// The server of a line, if it is one that names a server.
fn server(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace();
    words.next().filter(|word| *word == "nameserver").and(words.next())
}

fn has_server(text: &str) -> bool {
    text.lines().any(|line| server(line).is_some())
}

fn is_loopback(server: &str) -> bool {
    let address = server.split('%').next().unwrap_or_default();
    address.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

fn without_loopback(text: &str) -> Resolver {
    let (mut kept, mut left_out) = (Vec::new(), Vec::new());
    for line in text.lines() {
        match server(line).filter(|server| is_loopback(server)) {
            Some(server) => left_out.push(server.to_owned()),
            None => kept.push(line),
        }
    }
    Resolver { text: kept.join("\n").trim().to_owned(), left_out }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const STUB: &str = "nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch example.test\n";

    #[test]
    fn the_servers_behind_a_stub_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let (host, behind) = (dir.path().join("host"), dir.path().join("behind"));
        std::fs::write(&host, STUB).unwrap();
        let alone = choose(None, &host, &behind);
        assert_eq!(alone.text, "options edns0 trust-ad\nsearch example.test");
        assert_eq!(alone.left_out, ["127.0.0.53"], "nobody is given it without a word");
        std::fs::write(&behind, "nameserver 192.0.2.53\nsearch example.test\n").unwrap();
        let both = choose(None, &host, &behind);
        assert_eq!(both.text, "nameserver 192.0.2.53\nsearch example.test");
        assert!(both.left_out.is_empty());
    }

    #[test]
    fn a_host_without_a_stub_and_a_configured_file_are_taken_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let (host, behind, own) =
            (dir.path().join("host"), dir.path().join("behind"), dir.path().join("own"));
        std::fs::write(&host, "nameserver 192.0.2.1\nnameserver ::1\n").unwrap();
        std::fs::write(&behind, "nameserver 192.0.2.53\n").unwrap();
        std::fs::write(&own, "nameserver 198.51.100.1\nnameserver ::ffff:127.0.0.1\n").unwrap();
        let host = choose(None, &host, &behind);
        assert_eq!(
            (host.text.as_str(), host.left_out.as_slice()),
            ("nameserver 192.0.2.1", &["::1".to_owned()][..])
        );
        let own = choose(Some(&own), Path::new("/nonexistent"), &behind);
        assert_eq!(own.text, "nameserver 198.51.100.1");
        assert_eq!(own.left_out, ["::ffff:127.0.0.1"]);
    }
}
