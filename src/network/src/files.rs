//! The text of a pod's `resolv.conf` and `hosts`.

use std::{fmt::Write as _, net::IpAddr};

/// `resolv.conf`; empty lists leave their line out. Values with white space or control characters are left out.
#[must_use]
pub fn resolv_conf(servers: &[String], searches: &[String], options: &[String]) -> String {
    let ok = |s: &&String| !s.is_empty() && !s.chars().any(|c| c.is_whitespace() || c.is_control());
    let mut text = String::new();
    for server in servers.iter().filter(ok) {
        let _ = writeln!(text, "nameserver {server}");
    }
    for (word, values) in [("search", searches), ("options", options)] {
        let line: Vec<&str> = values.iter().filter(ok).map(String::as_str).collect();
        if !line.is_empty() {
            let _ = writeln!(text, "{word} {}", line.join(" "));
        }
    }
    text
}

/// `hosts` as a kubelet writes it: loopback, the pod's addresses with its names, then aliases (address, names).
#[must_use]
pub fn hosts(
    ips: &[IpAddr],
    hostname: &str,
    fqdn: Option<&str>,
    aliases: &[(IpAddr, Vec<String>)],
) -> String {
    let ok = |s: &&str| !s.is_empty() && !s.chars().any(|c| c.is_whitespace() || c.is_control() || c == '#');
    let mut text = String::from(
        "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    let names: Vec<&str> = fqdn.into_iter().chain([hostname]).filter(ok).collect();
    if !names.is_empty() {
        for ip in ips {
            let _ = writeln!(text, "{ip}\t{}", names.join("\t"));
        }
    }
    let lines: Vec<String> = aliases
        .iter()
        .filter_map(|(ip, names)| {
            let names: Vec<&str> = names.iter().map(String::as_str).filter(ok).collect();
            (!names.is_empty()).then(|| format!("{ip}\t{}\n", names.join("\t")))
        })
        .collect();
    if !lines.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        text.extend(lines);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolver_file_holds_only_clean_words() {
        let text = resolv_conf(
            &["10.96.0.10".into()],
            &["default.svc.cluster.local".into(), "a\nnameserver 6.6.6.6".into()],
            &["ndots:5".into()],
        );
        assert_eq!(text, "nameserver 10.96.0.10\nsearch default.svc.cluster.local\noptions ndots:5\n");
        assert_eq!(resolv_conf(&[], &[], &[]), "");
    }

    #[test]
    fn a_hosts_file_names_the_pod_and_its_aliases() {
        let ip = IpAddr::from([10, 0, 0, 5]);
        let alias = (IpAddr::from([1, 2, 3, 4]), vec!["foo".to_owned(), "bar\n".to_owned()]);
        let text = hosts(&[ip], "web-0", Some("web-0.web.default.svc.cluster.local"), &[alias]);
        assert!(text.starts_with("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n"));
        assert!(text.contains("10.0.0.5\tweb-0.web.default.svc.cluster.local\tweb-0\n"));
        assert!(text.ends_with("# Entries added by HostAliases.\n1.2.3.4\tfoo\n"));
        assert!(!hosts(&[ip], "x", None, &[]).contains("HostAliases"));
    }
}
