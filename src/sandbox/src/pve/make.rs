//! How a CT is made: record, mark, file (exclusively, locked `create`), root volume, file without the lock. A crash after any
//! step leaves what [`super::remove`] finds by the record.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::{Arc, PoisonError},
    time::Instant,
};

use moxlet_ids::Vmid;
use moxlet_pve::config::LxcConfig;

use super::{
    Inner, ROOT_BYTES, Standing, blocking,
    config::{self, Surroundings},
    record::{Phase, Record},
    vmid,
};
use crate::{Error, NicAddress, Result, SandboxSpec};

/// How many numbers are tried before the race for them is given up.
const TRIES: usize = 64;

/// The addresses that are to stand in a CT's configuration.
fn addresses(spec: &SandboxSpec) -> Vec<IpAddr> {
    let mut all = Vec::new();
    for nic in &spec.nics {
        if let Some(NicAddress::Static { address, .. }) = &nic.ipv4 {
            all.push((*address).into());
        }
        if let Some(NicAddress::Static { address, .. }) = &nic.ipv6 {
            all.push((*address).into());
        }
    }
    all
}

impl Inner {
    pub(super) async fn make(self: &Arc<Self>, spec: &SandboxSpec) -> Result<()> {
        if self.record(&spec.id).await?.is_some() {
            return Err(Error::Exists(spec.id.to_string()));
        }
        // Whatever cannot be written is refused before anything is made.
        self.rendered(spec, self.config.range.first())?;
        let mut avoid = BTreeSet::new();
        for _ in 0..TRIES {
            let record = self.claim(spec, &mut avoid).await?;
            let made = self.volumes.create(&record.volume(), ROOT_BYTES, &spec.id, spec.map).await;
            match made {
                Ok(()) => return self.complete(record).await,
                Err(Error::VolumeTaken(dataset)) => {
                    tracing::warn!(vmid = %record.vmid, dataset, "a dataset of somebody else has the number of a new CT; it gets another");
                    avoid.insert(record.vmid);
                    self.unclaim(record).await?;
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::Host(format!("of {TRIES} free VMIDs each was taken by somebody else at the same time")))
    }

    fn rendered(&self, spec: &SandboxSpec, vmid: Vmid) -> Result<(LxcConfig, String)> {
        let record =
            Record::new(spec.id.clone(), spec.pod_uid.clone(), vmid, self.config.node.clone(), spec.map);
        let config = config::render(
            spec,
            &Surroundings {
                node: &self.config.node,
                storage: &self.config.storage,
                volume: &record.volume(),
                root_bytes: ROOT_BYTES,
                include: &record.mark().path(&self.layout.includes),
                guard: &self.layout.guard,
                memory_bytes: self.config.memory_bytes,
                cores: self.config.cores,
                protection: self.config.protection,
            },
        )?;
        Ok((config, config::include_text(spec, vmid)?))
    }

    /// Takes a number: its record, its mark, its file.
    async fn claim(self: &Arc<Self>, spec: &SandboxSpec, avoid: &mut BTreeSet<Vmid>) -> Result<Record> {
        let _one = self.claiming.lock().await;
        let (inner, spec, mut tried) = (Arc::clone(self), spec.clone(), avoid.clone());
        let (record, tried) = blocking(move || {
            inner.folder.check()?;
            inner.check_addresses(&spec)?;
            for _ in 0..TRIES {
                let mut taken = vmid::in_use(inner.folder.dir())?;
                taken.extend(inner.records.all()?.into_iter().map(|r| r.vmid));
                taken.extend(tried.iter().copied());
                let vmid = inner.free(taken)?;
                match inner.claim_one(&spec, vmid) {
                    Ok(Some(record)) => return Ok((record, tried)),
                    Ok(None) | Err(Error::Foreign { .. }) => tried.insert(vmid),
                    Err(error) => return Err(error),
                };
            }
            Err(Error::Host(format!(
                "of {TRIES} free VMIDs each was taken by somebody else at the same time"
            )))
        })
        .await?;
        *avoid = tried;
        Ok(record)
    }

    /// The lowest number that is free and can be started now; where all that are free were started too often of late, the lowest
    /// of these.
    fn free(&self, taken: BTreeSet<Vmid>) -> Result<Vmid> {
        let resting = self.starts().too_many(Instant::now());
        match self.lowest(&taken | &resting) {
            Err(Error::NoVmid { .. }) if !resting.is_empty() => self.lowest(taken),
            found => found,
        }
    }

    /// The lowest number that is neither taken nor in a rule of the cluster's, which is warned of once.
    fn lowest(&self, mut taken: BTreeSet<Vmid>) -> Result<Vmid> {
        let rules = vmid::in_rules(self.folder.dir())?;
        loop {
            let vmid = self.config.range.lowest_free(&taken)?;
            let Some(place) = rules.get(&vmid) else { return Ok(vmid) };
            let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
            if told.rules.insert(vmid) {
                tracing::warn!(%vmid, place, "no guest has this VMID and the cluster still has something for it, which would hold for a pod: \
                    no pod gets it until that is removed");
            }
            taken.insert(vmid);
        }
    }

    /// Fails if a CT of this host has an address by its configuration that a pod is to get: somebody has edited a pod's, or has
    /// restored one. The next try is with another.
    fn check_addresses(&self, spec: &SandboxSpec) -> Result<()> {
        let wanted = addresses(spec);
        if wanted.is_empty() {
            return Ok(());
        }
        for vmid in self.folder.own_cts()? {
            // One that cannot be read is nobody's reason to make no pods.
            let Ok(Some(content)) = self.folder.read(vmid) else { continue };
            if let Some(address) = wanted.iter().find(|address| content.has_address(**address)) {
                return Err(Error::AddressTaken { address: *address, vmid });
            }
        }
        Ok(())
    }

    /// Takes this number; none if somebody else has it by now.
    fn claim_one(&self, spec: &SandboxSpec, vmid: Vmid) -> Result<Option<Record>> {
        let (mut config, include) = self.rendered(spec, vmid)?;
        let mut record =
            Record::new(spec.id.clone(), spec.pod_uid.clone(), vmid, self.config.node.clone(), spec.map);
        record.namespace.clone_from(&spec.pod_namespace);
        record.name.clone_from(&spec.pod_name);
        record.attempt = spec.attempt;
        record.ips = addresses(spec);
        record.dhcp = spec.nics.first().is_some_and(|nic| matches!(nic.ipv4, Some(NicAddress::Dhcp)));
        record.notes = config.description.clone().unwrap_or_default();
        config.lock = Some("create".to_owned());
        let path = self.folder.path(vmid);
        record.known = config.to_file().map_err(|source| Error::Config { path, source })?;
        self.records.put(&record)?;
        self.numbers.put(&record.id, vmid);
        let mark = record.mark();
        mark.write(&self.layout.includes, &include)?;
        let held = self.folder.lock(vmid)?;
        if self.folder.create(&held, &config)? {
            return Ok(Some(record));
        }
        mark.remove(&self.layout.includes)?;
        Ok(None)
    }

    /// Gives a number back that cannot be used.
    async fn unclaim(self: &Arc<Self>, record: Record) -> Result<()> {
        let inner = Arc::clone(self);
        blocking(move || {
            let held = inner.folder.lock(record.vmid)?;
            if matches!(inner.standing(&record)?, Standing::Ours(_) | Standing::Torn) {
                inner.folder.remove(&held)?;
            }
            record.mark().remove(&inner.layout.includes)
        })
        .await
    }

    /// Takes the lock `create` away: the CT is complete.
    async fn complete(self: &Arc<Self>, mut record: Record) -> Result<()> {
        let inner = Arc::clone(self);
        blocking(move || {
            let held = inner.folder.lock(record.vmid)?;
            let Standing::Ours(mut content) = inner.standing(&record)? else {
                let reason = "its file was changed while it was being made".to_owned();
                return Err(Error::Foreign { vmid: record.vmid, reason });
            };
            content.config.lock = None;
            inner.folder.replace(&held, &content)?;
            drop(held);
            let path = inner.folder.path(record.vmid);
            record.known = content.config.to_file().map_err(|source| Error::Config { path, source })?;
            record.phase = Phase::Made;
            inner.records.put(&record)
        })
        .await
    }
}
