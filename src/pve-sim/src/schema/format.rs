//! Named formats and property strings (`key=value,…`) of parameters.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::{Map, Value};

use super::check::check_value;

/// Checks a value of a named format; formats that nothing here depends on let everything through.
pub(crate) fn check(name: &str, value: &str) -> Result<(), String> {
    if let Some(of) = name.strip_suffix("-list")
        && !matches!(name, "storage-pair-list")
    {
        let parts = value.split([',', ';', ' ', '\0', '\t', '\n']).map(str::trim).filter(|p| !p.is_empty());
        for part in parts {
            check(of, part)?;
        }
        return Ok(());
    }
    if let Some(answer) = check_name(name, value) {
        return answer;
    }
    let good = match name {
        "pve-ipv4-config" if matches!(value, "dhcp" | "manual") => true,
        "pve-ipv6-config" if matches!(value, "auto" | "dhcp" | "manual") => true,
        "pve-ipv4-config" | "CIDRv4" => is_cidr(value, |a| a.parse::<Ipv4Addr>().is_ok(), 8, 32),
        "pve-ipv6-config" | "CIDRv6" => is_cidr(value, |a| a.parse::<Ipv6Addr>().is_ok(), 8, 128),
        "ipv4" => value.parse::<Ipv4Addr>().is_ok(),
        "ipv6" => value.parse::<Ipv6Addr>().is_ok(),
        "ip" => value.parse::<IpAddr>().is_ok(),
        "lxc-ip-with-ll-iface" => {
            value.split('%').next().is_some_and(|a| a.parse::<IpAddr>().is_ok()) || value == "host"
        }
        "mac-addr" => is_mac(value),
        "disk-size" => is_size(value),
        "pve-lxc-mp-string" => is_mount_path(value),
        _ => true,
    };
    good_or(good, || format!("value does not look like a valid {name}"))
}

/// The formats whose refusal Proxmox VE words in its own way; nothing for all others.
fn check_name(name: &str, value: &str) -> Option<Result<(), String>> {
    Some(match name {
        "pve-vmid" => {
            let good = value.parse::<u32>().is_ok_and(|n| n >= 100) && !value.starts_with('0');
            good_or(good, || "value does not look like a valid VM ID".into())
        }
        "pve-node" => good_or(is_dns_label(value), || "value does not look like a valid node name".into()),
        "dns-name" => {
            let good = !value.is_empty() && value.split('.').all(is_dns_label);
            good_or(good, || "value does not look like a valid DNS name".into())
        }
        "pve-storage-id" => {
            good_or(is_name(value, 2, "-_."), || format!("storage ID '{value}' contains illegal characters"))
        }
        "pve-configid" => good_or(is_name(value, 2, "-_"), || format!("invalid configuration ID '{value}'")),
        "pve-iface" => {
            good_or(is_name(value, 2, "-_.:@"), || format!("invalid network interface name '{value}'"))
        }
        "pve-userid" => {
            good_or(is_user(value), || format!("value '{value}' does not look like a valid user name"))
        }
        "pve-poolid" | "pve-groupid" | "pve-roleid" => {
            let of = name.trim_start_matches("pve-").trim_end_matches("id");
            let good =
                !value.is_empty() && value.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c));
            good_or(good, || format!("{of} name '{value}' contains invalid characters"))
        }
        "pve-tag" => good_or(is_tag(value), || format!("invalid characters in tag {value}")),
        "pve-volume-id" => {
            let good = value.split_once(':').is_some_and(|(s, v)| is_name(s, 2, "-_.") && !v.is_empty());
            good_or(good, || format!("unable to parse volume ID '{value}'\n"))
        }
        "pve-startup-order" => {
            good_or(is_startup(value), || format!("unable to parse startup options '{value}'\n"))
        }
        "pve-ha-resource-or-vm-id" => {
            let id = value.strip_prefix("ct:").or_else(|| value.strip_prefix("vm:")).unwrap_or(value);
            good_or(id.parse::<u32>().is_ok(), || {
                format!("value does not look like a valid HA resource or VM ID, got '{value}'")
            })
        }
        _ => return None,
    })
}

fn good_or(good: bool, why: impl FnOnce() -> String) -> Result<(), String> {
    if good { Ok(()) } else { Err(why()) }
}

fn is_user(value: &str) -> bool {
    value.split_once('@').is_some_and(|(user, realm)| {
        !user.is_empty() && !user.contains([':', '/', ' ']) && is_name(realm, 2, "-_.") && value.len() <= 64
    })
}

fn is_tag(value: &str) -> bool {
    let mut chars = value.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphanumeric() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || "_-+.".contains(c))
}

fn is_dns_label(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 63
        && !text.starts_with('-')
        && !text.ends_with('-')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
}

fn is_name(text: &str, least: usize, also: &str) -> bool {
    text.len() >= least
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || also.contains(c))
}

fn is_cidr(text: &str, address: impl Fn(&str) -> bool, least: u8, most: u8) -> bool {
    text.split_once('/')
        .is_some_and(|(a, bits)| address(a) && bits.parse::<u8>().is_ok_and(|b| (least..=most).contains(&b)))
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    let unicast = parts.first().and_then(|p| u8::from_str_radix(p, 16).ok()).is_some_and(|b| b & 1 == 0);
    parts.len() == 6
        && unicast
        && parts.iter().all(|p| p.len() == 2 && p.chars().all(|c| c.is_ascii_hexdigit()))
}

fn is_size(text: &str) -> bool {
    let digits = text.trim_end_matches(['K', 'M', 'G', 'T']);
    text.len() - digits.len() <= 1 && digits.parse::<f64>().is_ok_and(|n| n.is_finite() && n >= 0.0)
}

fn is_startup(text: &str) -> bool {
    text.split(',').all(|part| {
        let value = part
            .strip_prefix("order=")
            .or_else(|| part.strip_prefix("up="))
            .or_else(|| part.strip_prefix("down="))
            .unwrap_or(part);
        !value.is_empty() && value.chars().all(|c| c.is_ascii_digit())
    })
}

fn is_mount_path(text: &str) -> bool {
    !text.split('/').any(|p| p == ".." || p == ".") && !text.is_empty() && text != "/"
}

/// Parses `key=value,…` by its parts' descriptions, checks each value, and returns the pairs. The part with
/// `default_key` may come without its name; aliases come out under their own name.
pub(crate) fn property_string(
    text: &str,
    parts: &Map<String, Value>,
) -> Result<Vec<(String, String)>, String> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    let default_key =
        parts.iter().find(|(_, d)| d.get("default_key").is_some()).map(|(name, _)| name.as_str());
    for part in text.split(',').filter(|p| !p.is_empty()) {
        let (key, value) = match part.split_once('=') {
            Some((key, value)) => (key, value),
            None => match default_key {
                Some(key) => (key, part),
                None => {
                    return Err(format!(
                        "value without key, but schema does not define a default key: {part}"
                    ));
                }
            },
        };
        let Some(mut described) = parts.get(key) else {
            return Err(format!(
                "{key}: property is not defined in schema and the schema does not allow additional properties"
            ));
        };
        let mut name = key;
        if let Some(alias) = described.get("alias").and_then(Value::as_str) {
            name = alias;
            described = parts.get(alias).unwrap_or(described);
        }
        if pairs.iter().any(|(k, _)| k == name) {
            return Err(format!("duplicate key in comma-separated list property: {key}"));
        }
        check_value(&Value::from(value), described).map_err(|why| format!("{name}: {why}"))?;
        pairs.push((name.to_owned(), value.to_owned()));
    }
    for (name, described) in parts {
        let optional = described.get("optional").is_some_and(|v| v == 1) || described.get("alias").is_some();
        if !optional && !pairs.iter().any(|(k, _)| k == name) {
            return Err(format!("{name}: property is missing and it is not optional"));
        }
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn formats_take_what_the_real_ones_take() {
        assert!(check("pve-vmid", "100").is_ok());
        assert!(check("pve-vmid", "0100").is_err());
        assert!(check("dns-name", "a.b-c").is_ok());
        assert!(check("dns-name", "a_b").is_err());
        assert!(check("pve-tag-list", "moxlet;ns-default").is_ok());
        assert!(check("pve-tag-list", "a b?").is_err());
        assert!(check("mac-addr", "BC:24:11:00:00:01").is_ok());
        assert!(check("mac-addr", "01:24:11:00:00:01").is_err());
        assert!(check("pve-ipv4-config", "10.0.0.1/24").is_ok());
        assert!(check("pve-ipv4-config", "10.0.0.1").is_err());
        assert!(check("pve-startup-order", "down=40").is_ok());
    }
}
