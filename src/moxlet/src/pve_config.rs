//! The section `[pve]` of the configuration file.

use std::{net::IpAddr, path::PathBuf};

use anyhow::{Context, Result, bail};
use moxlet_agent::{AddressSource, PveSettings};
use serde::Deserialize;

/// The section's keys, as written.
#[derive(Debug, Deserialize, Clone)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Pve {
    pub(crate) endpoints: Vec<String>,
    pub(crate) token_file: PathBuf,
    pub(crate) ca_file: Option<PathBuf>,
    pub(crate) fingerprint: Option<String>,
    pub(crate) fingerprints: Vec<String>,
    pub(crate) node: Option<String>,
    pub(crate) storage: String,
    pub(crate) bridge: String,
    pub(crate) extra_bridges: Vec<String>,
    pub(crate) vmid_min: u32,
    pub(crate) vmid_max: u32,
    pub(crate) dhcp: bool,
    pub(crate) address_first: Option<IpAddr>,
    pub(crate) address_last: Option<IpAddr>,
    pub(crate) address_prefix: Option<u8>,
    pub(crate) gateway: Option<IpAddr>,
    pub(crate) mtu: Option<u16>,
    pub(crate) vlan: Option<u16>,
    pub(crate) firewall: bool,
    pub(crate) protection: bool,
    pub(crate) pool: Option<String>,
    pub(crate) config_dir: PathBuf,
    pub(crate) lock_dir: PathBuf,
}

impl Default for Pve {
    fn default() -> Self {
        Self {
            endpoints: vec!["https://localhost:8006".to_owned()],
            token_file: PathBuf::from("/etc/moxlet/pve-token"),
            ca_file: Some(PathBuf::from("/etc/pve/pve-root-ca.pem")),
            fingerprint: None,
            fingerprints: Vec::new(),
            node: None,
            storage: "local-zfs".to_owned(),
            bridge: "vmbr0".to_owned(),
            extra_bridges: Vec::new(),
            vmid_min: 1_000_000,
            vmid_max: 1_009_999,
            dhcp: false,
            address_first: None,
            address_last: None,
            address_prefix: None,
            gateway: None,
            mtu: None,
            vlan: None,
            firewall: false,
            protection: false,
            pool: None,
            config_dir: PathBuf::from("/etc/pve"),
            lock_dir: PathBuf::from("/run/lock/lxc"),
        }
    }
}

impl Pve {
    /// What the agent takes.
    ///
    /// # Errors
    /// Keys contradict one another, or one is missing that has no default.
    pub(crate) fn settings(&self) -> Result<PveSettings> {
        if self.endpoints.is_empty() {
            bail!("pve.endpoints names no server");
        }
        if !self.token_file.exists() {
            bail!(
                "pve.token_file: {} does not exist: make a token (pveum user token add USER@REALM moxlet --privsep 1) and write \
                 USER@REALM!moxlet=SECRET into it, mode 0600",
                self.token_file.display()
            );
        }
        if let Some(mtu) = self.mtu.filter(|m| *m < 576) {
            bail!("pve.mtu: {mtu} is below 576");
        }
        if let Some(vlan) = self.vlan.filter(|v| !(1..=4094).contains(v)) {
            bail!("pve.vlan: {vlan} is none: 1 to 4094");
        }
        Ok(PveSettings {
            endpoints: self.endpoints.clone(),
            token_file: self.token_file.clone(),
            ca_file: self.ca_file.clone(),
            fingerprints: self.fingerprints()?,
            node: self.node.clone(),
            storage: self.storage.clone(),
            bridge: self.bridge.clone(),
            extra_bridges: self.extra_bridges.clone(),
            vmid_min: self.vmid_min,
            vmid_max: self.vmid_max,
            addresses: self.addresses()?,
            mtu: self.mtu,
            vlan: self.vlan,
            firewall: self.firewall,
            protection: self.protection,
            pool: self.pool.clone(),
            config_dir: self.config_dir.clone(),
            lock_dir: self.lock_dir.clone(),
        })
    }

    /// The fingerprint of each server, or none.
    fn fingerprints(&self) -> Result<Vec<String>> {
        let servers = self.endpoints.len();
        match (&self.fingerprint, self.fingerprints.len()) {
            (Some(_), 1..) => bail!("pve.fingerprint and pve.fingerprints exclude one another"),
            (Some(one), 0) if servers == 1 => Ok(vec![one.clone()]),
            // Each host of a cluster has a certificate of its own.
            (Some(_), 0) => bail!(
                "pve.fingerprint is of one certificate, and there are {servers} endpoints: leave it out for ca_file = \
                 \"/etc/pve/pve-root-ca.pem\", or give pve.fingerprints, one for each"
            ),
            (None, given) if given == 0 || given == servers => Ok(self.fingerprints.clone()),
            (None, given) => {
                bail!("pve.fingerprints: {given} for {servers} endpoints; one for each, in their order")
            }
        }
    }

    fn addresses(&self) -> Result<AddressSource> {
        let some =
            self.address_first.is_some() || self.address_last.is_some() || self.address_prefix.is_some();
        match (self.dhcp, some) {
            (true, true) => bail!("pve.dhcp and a range of addresses exclude one another"),
            (true, false) if self.gateway.is_some() => {
                bail!("pve.gateway: with pve.dhcp the DHCP server says which")
            }
            (true, false) => Ok(AddressSource::Dhcp),
            (false, _) => {
                let need = |key: &str| {
                    format!(
                        "pve.{key} is missing: this host's slice of the pods' subnet (or set pve.dhcp = true)"
                    )
                };
                Ok(AddressSource::Range {
                    first: self.address_first.with_context(|| need("address_first"))?,
                    last: self.address_last.with_context(|| need("address_last"))?,
                    prefix: self.address_prefix.with_context(|| need("address_prefix"))?,
                    gateway: self.gateway,
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn settings(text: &str) -> Result<PveSettings> {
        let with_token = format!("token_file = \"/etc/hostname\"\n{text}");
        toml::from_str::<Pve>(&with_token).unwrap().settings()
    }

    #[test]
    fn addresses_come_from_a_range_or_by_dhcp_and_never_from_both() {
        assert_eq!(settings("dhcp = true").unwrap().addresses, AddressSource::Dhcp);
        let range = "address_first = \"10.0.0.5\"\naddress_last = \"10.0.0.9\"\naddress_prefix = 24\n";
        assert!(matches!(settings(range).unwrap().addresses, AddressSource::Range { prefix: 24, .. }));
        for (bad, word) in [
            ("", "address_first"),
            ("address_first = \"10.0.0.5\"", "address_last"),
            (&format!("dhcp = true\n{range}"), "exclude"),
            ("dhcp = true\ngateway = \"10.0.0.1\"", "gateway"),
            ("dhcp = true\nvlan = 4095", "vlan"),
            ("dhcp = true\nmtu = 100", "mtu"),
            ("dhcp = true\nendpoints = []", "endpoints"),
        ] {
            let error = settings(bad).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn several_servers_have_a_fingerprint_each_or_none_has() {
        let two = "dhcp = true\nendpoints = [\"https://a\", \"https://b\"]\n";
        assert!(settings(two).unwrap().fingerprints.is_empty());
        assert_eq!(settings("dhcp = true\nfingerprint = \"AA\"").unwrap().fingerprints, ["AA"]);
        let each = format!("{two}fingerprints = [\"AA\", \"BB\"]");
        assert_eq!(settings(&each).unwrap().fingerprints, ["AA", "BB"]);
        for (bad, word) in [
            ("fingerprint = \"AA\"", "ca_file"),
            ("fingerprints = [\"AA\"]", "1 for 2"),
            ("fingerprint = \"AA\"\nfingerprints = [\"AA\", \"BB\"]", "exclude"),
        ] {
            let error = settings(&format!("{two}{bad}")).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_missing_token_says_how_to_make_one() {
        let error =
            Pve { token_file: "/nonexistent/t".into(), ..Pve::default() }.settings().unwrap_err().to_string();
        assert!(error.contains("/nonexistent/t") && error.contains("pveum user token add"), "{error}");
    }

    const BOTH: &str = include_str!("../../../manifests/systemd/moxlet.service");
    const AGENT: &str = include_str!("../../../manifests/systemd/moxlet-agent.service");
    const NODE: &str = include_str!("../../../manifests/systemd/moxlet-node.service");

    fn directives(unit: &str) -> impl Iterator<Item = &str> {
        unit.lines().filter(|l| !l.starts_with('#'))
    }

    fn command(unit: &str) -> crate::cli::Command {
        let line = directives(unit).find_map(|l| l.strip_prefix("ExecStart=")).unwrap();
        crate::cli::Cli::read(line.split(' ')).unwrap().command
    }

    #[test]
    fn units_with_pods_stop_before_the_hosts_guests_and_have_no_mounts_of_their_own() {
        for unit in [BOTH, AGENT] {
            let after = directives(unit).find_map(|l| l.strip_prefix("After=")).unwrap();
            assert!(after.split(' ').any(|u| u == "pve-guests.service"), "{after}");
            for word in ["Private", "Protect", "Paths=", "RootDirectory", "DynamicUser"] {
                assert!(directives(unit).all(|l| !l.contains(word)), "{word}");
            }
            assert!(directives(unit).any(|l| l == "KillMode=process"), "pods outlive the agent");
        }
    }

    #[test]
    fn units_run_what_they_are_called_after_and_outlive_the_clusters_file_system() {
        use crate::cli::Command;

        assert!(matches!(command(BOTH), Command::Up(_)), "an agent alone makes no Node");
        assert!(matches!(command(AGENT), Command::Agent(_)));
        assert!(matches!(command(NODE), Command::Node(_)));
        for unit in [BOTH, AGENT, NODE] {
            for bond in ["Requires=", "Requisite=", "BindsTo=", "PartOf="] {
                assert!(
                    directives(unit).all(|l| !l.starts_with(bond)),
                    "a stop of what it names would stop Moxlet: {bond}"
                );
            }
            let (head, _) = unit.split_once("[Service]").unwrap();
            assert!(head.lines().any(|l| l == "StartLimitIntervalSec=0"), "a host's /etc/pve may come late");
            assert!(directives(unit).any(|l| l == "Restart=on-failure"));
        }
    }

    #[test]
    fn an_unknown_key_is_refused() {
        assert!(toml::from_str::<Pve>("storages = \"x\"").unwrap_err().to_string().contains("storages"));
    }

    #[test]
    fn the_references_list_every_key() {
        let source = include_str!("pve_config.rs");
        let (_, body) = source.split_once("pub(crate) struct Pve {").unwrap();
        let (body, _) = body.split_once("\n}\n").unwrap();
        let configuration = include_str!("../../../docs/configuration.md");
        let proxmox = include_str!("../../../docs/proxmox.md");
        let (_, example) = proxmox.split_once("[pve]\n").unwrap();
        for line in body.lines().filter_map(|l| l.trim().strip_prefix("pub(crate) ")) {
            let key = line.split(':').next().unwrap();
            assert!(
                configuration.contains(&format!("| `pve.{key}` |")),
                "docs/configuration.md does not list pve.{key}"
            );
            let named = example.lines().any(|l| l.trim_start_matches("# ").starts_with(&format!("{key} = ")));
            assert!(named, "the example in docs/proxmox.md has no {key}");
        }
    }
}
