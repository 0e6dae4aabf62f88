//! How a pod gets its network: by CNI on the started CT's namespace, or by its engine, which writes interfaces into the CT's
//! configuration. Then the addresses are this host's to give, and one is free again only when its CT is gone.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use moxlet_errors::chain;
use moxlet_ids::SandboxId;
use moxlet_network::{Cni, Slice, SliceConfig};
use moxlet_sandbox::{Engine, Nic, NicAddress};
use tracing::warn;

use crate::{
    config::{AddressSource, PveSettings},
    error::{Error, Result},
    ledger::SandboxRecord,
    tasks::{Tasks, blocking},
};

/// The annotation of a pod that puts it on further bridges: a list, parted by commas, of entries of `extra_bridges`.
pub(crate) const BRIDGES: &str = "moxlet.dev/bridges";
/// How often it is looked whether bridge and masquerading still stand.
const RESTORE_INTERVAL: Duration = Duration::from_secs(30);
/// The most interfaces that a pod gets.
const MAX_NICS: usize = 8;

/// Which of the two it is.
pub(crate) enum Network {
    /// CNI.
    Cni(Box<Cni>),
    /// The engine.
    Engine(Box<EngineNetwork>),
}

/// What the engine attaches pods to.
pub(crate) struct EngineNetwork {
    settings: PveSettings,
    /// The host's addresses for pods; none: they come by DHCP.
    slice: Option<Arc<Slice>>,
}

impl EngineNetwork {
    /// Opens the host's slice.
    pub(crate) fn open(settings: PveSettings, dir: &Path) -> Result<Self> {
        let slice = match &settings.addresses {
            AddressSource::Dhcp => None,
            AddressSource::Range { first, last, prefix, gateway } => {
                let config = SliceConfig { first: *first, last: *last, prefix: *prefix, gateway: *gateway };
                Some(Arc::new(Slice::open(dir, config)?))
            }
        };
        Ok(Self { settings, slice })
    }

    fn address(
        &self,
        ip: IpAddr,
    ) -> (Option<NicAddress<std::net::Ipv4Addr>>, Option<NicAddress<std::net::Ipv6Addr>>) {
        let AddressSource::Range { prefix, gateway, .. } = &self.settings.addresses else {
            return (None, None);
        };
        match (ip, gateway) {
            (IpAddr::V4(address), gateway) => {
                let gateway = gateway.and_then(|g| if let IpAddr::V4(g) = g { Some(g) } else { None });
                (Some(NicAddress::Static { address, prefix: *prefix, gateway }), None)
            }
            (IpAddr::V6(address), gateway) => {
                let gateway = gateway.and_then(|g| if let IpAddr::V6(g) = g { Some(g) } else { None });
                (None, Some(NicAddress::Static { address, prefix: *prefix, gateway }))
            }
        }
    }

    async fn nics(&self, record: &SandboxRecord) -> Result<Vec<Nic>> {
        let settings = &self.settings;
        let extra = extra_bridges(
            record.annotations.get(BRIDGES).map_or("", String::as_str),
            &settings.extra_bridges,
        )?;
        let (ipv4, ipv6) = match &self.slice {
            None => (Some(NicAddress::Dhcp), None),
            Some(slice) => {
                let (slice, id) = (slice.clone(), record.id.clone());
                self.address(blocking(move || Ok(slice.allot(&id)?)).await?)
            }
        };
        let first = Nic {
            name: "eth0".to_owned(),
            bridge: settings.bridge.clone(),
            mac: None,
            ipv4,
            ipv6,
            mtu: settings.mtu,
            vlan: settings.vlan,
            firewall: settings.firewall,
        };
        let further = extra.into_iter().enumerate().map(|(n, (bridge, vlan))| Nic {
            name: format!("eth{}", n + 1),
            bridge,
            mac: None,
            ipv4: None,
            ipv6: None,
            mtu: None,
            vlan,
            firewall: settings.firewall,
        });
        Ok(std::iter::once(first).chain(further).collect())
    }
}

/// The bridges of the annotation, each of which must be allowed as it stands there.
fn extra_bridges(wanted: &str, allowed: &[String]) -> Result<Vec<(String, Option<u16>)>> {
    let entries: Vec<&str> = wanted.split(',').map(str::trim).filter(|e| !e.is_empty()).collect();
    if entries.len() >= MAX_NICS {
        return Err(Error::Refused(format!("annotation {BRIDGES} with more than {} entries", MAX_NICS - 1)));
    }
    entries
        .into_iter()
        .map(|entry| {
            if !allowed.iter().any(|a| a == entry) {
                return Err(Error::Refused(format!(
                    "{entry:?} in annotation {BRIDGES} (this host allows: {})",
                    if allowed.is_empty() { "none".to_owned() } else { allowed.join(", ") }
                )));
            }
            parse_bridge(entry)
        })
        .collect()
}

/// `BRIDGE` or `BRIDGE/VLAN`.
pub(crate) fn parse_bridge(entry: &str) -> Result<(String, Option<u16>)> {
    let (bridge, vlan) = match entry.split_once('/') {
        None => (entry, None),
        Some((bridge, vlan)) => {
            let vlan = vlan.parse().ok().filter(|v| (1..=4094).contains(v));
            (
                bridge,
                Some(
                    vlan.ok_or_else(|| Error::Invalid(format!("bridge {entry:?} has no VLAN of 1 to 4094")))?,
                ),
            )
        }
    };
    if bridge.is_empty() || bridge.len() > 15 {
        return Err(Error::Invalid(format!("bridge {entry:?} has no name of 1 to 15 characters")));
    }
    Ok((bridge.to_owned(), vlan))
}

impl Network {
    /// The interfaces that the engine is to attach; none where CNI does.
    pub(crate) async fn nics(&self, record: &SandboxRecord) -> Result<Vec<Nic>> {
        match self {
            Self::Cni(_) => Ok(Vec::new()),
            Self::Engine(network) => network.nics(record).await,
        }
    }

    /// Attaches a started CT, or looks how its engine has; the addresses, the primary one first.
    pub(crate) async fn attach(
        &self,
        engine: &dyn Engine,
        record: &SandboxRecord,
        pid: u32,
    ) -> Result<Vec<IpAddr>> {
        match self {
            Self::Cni(cni) => {
                let netns = PathBuf::from(format!("/proc/{pid}/ns/net"));
                Ok(cni.add(&record.id, &netns, &record.namespace, &record.name).await?.ips)
            }
            Self::Engine(_) => Ok(engine.addresses(&record.id).await?.unwrap_or_default()),
        }
    }

    /// The CT does not run any more: what hangs on its network namespace goes. Idempotent.
    pub(crate) async fn detach(&self, id: &SandboxId) -> Result<()> {
        match self {
            Self::Cni(cni) => Ok(cni.del(id, None).await?),
            // It has its address for as long as its configuration says so.
            Self::Engine(_) => Ok(()),
        }
    }

    /// The CT is gone: all that it had goes. Idempotent.
    pub(crate) async fn release(&self, id: &SandboxId) -> Result<()> {
        match self {
            Self::Cni(cni) => Ok(cni.del(id, None).await?),
            Self::Engine(network) => match network.slice.clone() {
                None => Ok(()),
                Some(slice) => {
                    let id = id.clone();
                    blocking(move || Ok(slice.release(&id)?)).await
                }
            },
        }
    }

    /// Who has something of it.
    pub(crate) async fn attached(&self) -> Result<Vec<SandboxId>> {
        match self {
            Self::Cni(cni) => Ok(cni.attached().await?.into_iter().collect()),
            Self::Engine(network) => Ok(network.slice.as_ref().map(|s| s.owners()).unwrap_or_default()),
        }
    }

    /// Whether pods can be attached.
    pub(crate) async fn ready(&self) -> Result<()> {
        match self {
            Self::Cni(cni) => Ok(cni.ready().await?),
            Self::Engine(_) => Ok(()),
        }
    }

    /// The cluster's word on the range of this node's pods. The engine's addresses are those of its configuration.
    pub(crate) async fn set_pod_cidr(&self, cidr: &str) -> Result<()> {
        match self {
            Self::Cni(cni) => Ok(cni.set_pod_cidr(cidr).await?),
            Self::Engine(_) => Ok(()),
        }
    }
}

/// Has what others take from the pods' network on this host put back until the agent ends.
pub(crate) fn restore_in_background(network: &Arc<Network>, tasks: &Tasks) {
    let (network, stop) = (network.clone(), tasks.stop.clone());
    tasks.spawn(async move {
        let Network::Cni(cni) = &*network else { return };
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RESTORE_INTERVAL) => {}
            }
            match cni.restore().await {
                Ok(false) => {}
                Ok(true) => {
                    warn!("the masquerading of the pods' traffic was missing on the host and is set again");
                }
                Err(error) => {
                    warn!(error = chain(&error), "the pods' network on the host is not as it should be");
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_bridges_that_the_host_allows_are_given_as_they_are_allowed() {
        let allowed = ["vmbr1".to_owned(), "vmbr2/100".to_owned()];
        assert_eq!(extra_bridges("", &allowed).unwrap(), []);
        let both = extra_bridges("vmbr1, vmbr2/100", &allowed).unwrap();
        assert_eq!(both, [("vmbr1".to_owned(), None), ("vmbr2".to_owned(), Some(100))]);
        for bad in ["vmbr2", "vmbr1/5", "vmbr0"] {
            let error = extra_bridges(bad, &allowed).unwrap_err().to_string();
            assert!(error.contains(bad) && error.contains(BRIDGES), "{error}");
        }
        assert!(parse_bridge("vmbr1/0").is_err() && parse_bridge("/5").is_err());
    }
}
