//! What a pod sees as its name and its resolver: hostname, `/etc/hosts`, DNS configuration.

use k8s_openapi::api::core::v1::Pod;
use moxlet_cri::v1::DnsConfig;

use crate::config::Config;
use crate::model::names;

/// The longest host name of Linux.
const MAX_HOSTNAME: usize = 63;
const MAX_FQDN: usize = 64;

/// A pod's host name, and its domain where it has a subdomain.
pub(crate) fn hostname(pod: &Pod, cluster_domain: &str) -> Result<(String, String), String> {
    let spec = pod.spec.as_ref();
    if let Some(name) = spec.and_then(|s| s.hostname_override.as_deref()).filter(|n| !n.is_empty()) {
        return Ok((name.to_owned(), String::new()));
    }
    let own = spec.and_then(|s| s.hostname.as_deref()).filter(|n| !n.is_empty()).unwrap_or(names::name(pod));
    let cut: String = own.chars().take(MAX_HOSTNAME).collect();
    let host = cut.trim_end_matches(['-', '.']).to_owned();
    let domain = match spec.and_then(|s| s.subdomain.as_deref()).filter(|n| !n.is_empty()) {
        Some(sub) => format!("{sub}.{}.svc.{cluster_domain}", names::namespace(pod)),
        None => String::new(),
    };
    Ok((host, domain))
}

/// What `hostname` says in the pod: the fully qualified name where the pod asks for it.
pub(crate) fn shown_hostname(pod: &Pod, cluster_domain: &str) -> Result<String, String> {
    let (host, domain) = hostname(pod, cluster_domain)?;
    if pod.spec.as_ref().and_then(|s| s.set_hostname_as_fqdn) != Some(true) || domain.is_empty() {
        return Ok(host);
    }
    let full = format!("{host}.{domain}");
    if full.len() > MAX_FQDN {
        return Err(format!(
            "failed to construct FQDN from pod hostname and cluster domain, FQDN {full} is too long ({MAX_FQDN} characters is the max, {} characters requested)",
            full.len()
        ));
    }
    Ok(full)
}

/// The pod's `/etc/hosts`.
pub(crate) fn hosts_file(pod: &Pod, ips: &[String], cluster_domain: &str) -> String {
    let mut text = String::from(
        "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    if let Ok((host, domain)) = hostname(pod, cluster_domain) {
        for ip in ips {
            if domain.is_empty() {
                text.push_str(&format!("{ip}\t{host}\n"));
            } else {
                text.push_str(&format!("{ip}\t{host}.{domain}\t{host}\n"));
            }
        }
    }
    let aliases: Vec<_> = pod.spec.iter().flat_map(|s| s.host_aliases.iter().flatten()).collect();
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for alias in aliases {
            text.push_str(&format!(
                "{}\t{}\n",
                alias.ip,
                alias.hostnames.as_deref().unwrap_or_default().join("\t")
            ));
        }
    }
    text
}

/// Reads a resolv.conf.
fn parse(text: &str) -> DnsConfig {
    let mut dns = DnsConfig::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => dns.servers.extend(words.next().map(str::to_owned)),
            Some("search") => {
                dns.searches =
                    words.map(|w| w.trim_end_matches('.').to_owned()).filter(|w| !w.is_empty()).collect();
            }
            Some("options") => dns.options = words.map(str::to_owned).collect(),
            _ => {}
        }
    }
    dns
}

/// The resolver of a pod by its dnsPolicy; `host` is the text of the host's resolv.conf.
pub(crate) fn dns(pod: &Pod, config: &Config, host: &str) -> DnsConfig {
    let spec = pod.spec.as_ref();
    let policy = spec.and_then(|s| s.dns_policy.as_deref()).unwrap_or("ClusterFirst");
    let mut dns = match policy {
        "None" => DnsConfig::default(),
        "Default" => parse(host),
        _ if config.cluster_dns.is_empty() => parse(host),
        _ => {
            let base = &config.cluster_domain;
            let mut searches =
                vec![format!("{}.svc.{base}", names::namespace(pod)), format!("svc.{base}"), base.clone()];
            for s in parse(host).searches {
                if !searches.contains(&s) {
                    searches.push(s);
                }
            }
            DnsConfig {
                servers: config.cluster_dns.iter().map(ToString::to_string).collect(),
                searches,
                options: vec!["ndots:5".into()],
            }
        }
    };
    if let Some(own) = spec.and_then(|s| s.dns_config.as_ref()) {
        merge(&mut dns.servers, own.nameservers.iter().flatten());
        merge(&mut dns.searches, own.searches.iter().flatten());
        for option in own.options.iter().flatten() {
            let Some(name) = &option.name else { continue };
            let text = match option.value.as_deref() {
                Some(value) if !value.is_empty() => format!("{name}:{value}"),
                _ => name.clone(),
            };
            dns.options.retain(|o| o.split(':').next() != Some(name));
            dns.options.push(text);
        }
    }
    dns.servers.truncate(3);
    dns.searches.truncate(32);
    dns
}

fn merge<'a>(into: &mut Vec<String>, more: impl Iterator<Item = &'a String>) {
    for text in more {
        if !into.contains(text) {
            into.push(text.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn pod(spec: &serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({"metadata": {"name": "p", "namespace": "n"}, "spec": spec}))
            .unwrap()
    }

    #[test]
    fn names_are_cut_as_a_kubelet_does() {
        let long = format!("{}-{}", "a".repeat(62), "b".repeat(20));
        let mut p = pod(&serde_json::json!({"containers": []}));
        p.metadata.name = Some(long);
        assert_eq!(hostname(&p, "cluster.local").unwrap().0, "a".repeat(62));
        let p = pod(
            &serde_json::json!({"containers": [], "hostname": "h", "subdomain": "s", "setHostnameAsFQDN": true}),
        );
        assert_eq!(shown_hostname(&p, "cluster.local").unwrap(), "h.s.n.svc.cluster.local");
    }

    #[test]
    fn hosts_with_aliases() {
        let p = pod(
            &serde_json::json!({"containers": [], "hostAliases": [{"ip": "1.2.3.4", "hostnames": ["a", "b"]}]}),
        );
        let text = hosts_file(&p, &["10.0.0.2".into()], "cluster.local");
        assert!(text.contains("\n10.0.0.2\tp\n") && text.ends_with("\n1.2.3.4\ta\tb\n"), "{text}");
    }

    #[test]
    fn resolvers_by_policy() {
        let host = "search example.org\nnameserver 9.9.9.9\noptions rotate\n";
        let config = Config { cluster_dns: vec!["10.96.0.10".parse().unwrap()], ..Config::default() };
        let first = dns(&pod(&serde_json::json!({"containers": []})), &config, host);
        assert_eq!(first.servers, ["10.96.0.10"]);
        assert_eq!(
            first.searches,
            ["n.svc.cluster.local", "svc.cluster.local", "cluster.local", "example.org"]
        );
        assert_eq!(
            dns(&pod(&serde_json::json!({"containers": [], "dnsPolicy": "Default"})), &config, host).servers,
            ["9.9.9.9"]
        );
        let none = pod(&serde_json::json!({"containers": [], "dnsPolicy": "None", "dnsConfig": {
            "nameservers": ["1.1.1.1"], "options": [{"name": "ndots", "value": "2"}]}}));
        let none = dns(&none, &config, host);
        assert_eq!((none.servers, none.options), (vec!["1.1.1.1".to_owned()], vec!["ndots:2".to_owned()]));
    }
}
