//! A CT of our own: how it is made, which configuration it takes, how it is removed.

use std::{collections::BTreeMap, time::Duration};

use moxlet_pve::{
    Error, NodeName, StorageId, Vmid, VolumeId,
    api::{
        ct::{ConfigChange, Ct, Delete, NewCt},
        task::TaskFilter,
    },
    config::{Features, LxcConfig, NetInterface, Startup, Volume},
};

use super::{Outcome, Suite, Trouble, ensure, expect};

/// What a CT is made of here.
pub(super) struct Place {
    pub(super) node: NodeName,
    pub(super) storage: StorageId,
    pub(super) template: VolumeId,
    pub(super) bridge: Option<moxlet_pve::InterfaceName>,
    pub(super) vmid: Vmid,
}

impl Suite {
    pub(super) async fn containers(&self) {
        let place = match self.place().await {
            Ok(place) => place,
            Err(trouble) => return self.record("a_ct_can_be_made_here", Err(trouble)),
        };
        let ct = self.client().ct(&place.node, place.vmid);
        self.test("a_ct_that_does_not_exist_is_gone", self.missing(&ct)).await;
        self.test("a_missing_template_fails_and_leaves_nothing", self.missing_template(&place)).await;
        if !self.test("a_ct_is_made_as_it_was_asked_for", self.create(&place)).await {
            return;
        }
        self.test("a_vmid_that_is_taken_is_told", self.create_again(&place)).await;
        self.test("a_task_can_be_looked_up_later", self.tasks(&place)).await;
        self.test("a_configuration_can_be_changed_and_keys_removed", self.change(&ct)).await;
        self.test("a_change_based_on_an_old_digest_is_refused", self.stale_digest(&ct)).await;
        self.test("an_invalid_parameter_is_named", self.invalid(&ct)).await;
        self.test("a_feature_that_a_token_may_not_set_is_refused", self.forbidden_feature(&ct)).await;
        self.lifecycle(&place).await;
        self.test("a_protected_ct_is_not_removed", self.protected(&ct)).await;
        self.test("a_ct_is_removed_with_its_volumes", self.remove(&place)).await;
    }

    async fn place(&self) -> Result<Place, Trouble> {
        let node = self.node().await?;
        let storages = self.client().storages(&node, None).await?;
        let usable = |content: &str| {
            storages
                .iter()
                .filter(|s| s.active && s.holds(content))
                .filter_map(|s| s.storage.clone())
                .collect::<Vec<_>>()
        };
        let storage = match &self.setup.storage {
            Some(storage) => storage.clone(),
            None => usable("rootdir").into_iter().next().ok_or_else(|| {
                Trouble::NotTried(format!(
                    "{node} has no active storage for root file systems that the token may see"
                ))
            })?,
        };
        let template = match &self.setup.template {
            Some(template) => template.clone(),
            None => {
                let mut found = Vec::new();
                for storage in usable("vztmpl") {
                    found.extend(self.client().storage_content(&node, &storage, Some("vztmpl"), None).await?);
                }
                let smallest = found.into_iter().min_by_key(|v| v.size.unwrap_or(u64::MAX));
                smallest.map(|v| v.volid).ok_or_else(|| {
                    Trouble::NotTried(format!(
                        "{node} has no CT template that the token may see (--template names one)"
                    ))
                })?
            }
        };
        let bridges =
            self.client().interfaces(&node, moxlet_pve::api::network::InterfaceKind::AnyBridge).await?;
        let bridge = bridges.into_iter().filter(|b| b.active).find_map(|b| b.iface.parse().ok());
        let (first, last) = self.setup.vmids;
        for number in first.get()..=last.get() {
            let vmid = Vmid::new(number).map_err(|e| Trouble::Failed(e.to_string()))?;
            if self.client().is_free(vmid).await? {
                return Ok(Place { node, storage, template, bridge, vmid });
            }
        }
        Err(Trouble::NotTried(format!("no VMID from {first} to {last} is free")))
    }

    fn new_ct(&self, place: &Place, template: VolumeId) -> Result<NewCt, Trouble> {
        let wrong = |e: moxlet_pve::InvalidName| Trouble::Failed(e.to_string());
        let mut net = BTreeMap::new();
        if let Some(bridge) = &place.bridge {
            let name = "eth0".parse().map_err(wrong)?;
            let mut eth0 = NetInterface { bridge: Some(bridge.clone()), ..NetInterface::new(name) };
            eth0.hwaddr = Some("BC:24:11:4D:4F:58".parse().map_err(wrong)?);
            eth0.ip = Some("192.0.2.7/24".parse().map_err(wrong)?);
            net.insert(0, eth0);
        }
        let config = LxcConfig {
            cores: Some(1),
            description: Some(self.mark.clone()),
            features: Some(Features { nesting: Some(true), ..Features::default() }),
            hostname: Some("moxlet-suite".into()),
            memory: Some(128),
            net,
            onboot: Some(false),
            rootfs: Some(Volume::new(format!("{}:1", place.storage).parse().map_err(wrong)?)),
            startup: Some(Startup { down: Some(40), ..Startup::default() }),
            swap: Some(0),
            tags: vec!["moxlet".parse().map_err(wrong)?, "suite".parse().map_err(wrong)?],
            unprivileged: Some(true),
            ..LxcConfig::default()
        };
        Ok(NewCt { template, config, storage: None, pool: None, start: false })
    }

    async fn missing(&self, ct: &Ct<'_>) -> Outcome {
        expect(ct.status().await, "that it is gone", Error::is_gone)?;
        expect(ct.config().await, "that it is gone", Error::is_gone)?;
        // Not before the task's worker reads it does the server know.
        let result = match ct.start().await {
            Ok(task) => self.wait(&task).await.map(drop),
            Err(error) => Err(error),
        };
        expect(result, "that it is gone", Error::is_gone)
    }

    async fn missing_template(&self, place: &Place) -> Outcome {
        let (storage, _) = place.template.as_str().split_once(':').unwrap_or_default();
        let name = format!("{storage}:vztmpl/no-such-template-moxlet_1_amd64.tar.zst");
        let new = self.new_ct(place, name.parse().map_err(Error::from)?)?;
        let ct = self.client().ct(&place.node, place.vmid);
        // Before it is asked for: an answer may get lost. The mark in its notes tells ours from another's.
        self.remember(place.vmid, &place.node);
        let result = match ct.create(&new).await {
            Ok(task) => self.wait(&task).await.map(drop),
            Err(error) => Err(error),
        };
        if result.is_err() {
            self.forget(place.vmid);
        }
        expect(result, "that the template is missing", |e| {
            !e.is_gone() && e.to_string().contains("does not exist")
        })?;
        expect(ct.status().await, "that nothing is left", Error::is_gone)
    }

    async fn create(&self, place: &Place) -> Outcome {
        let new = self.new_ct(place, place.template.clone())?;
        let ct = self.client().ct(&place.node, place.vmid);
        self.remember(place.vmid, &place.node);
        let task = match ct.create(&new).await {
            Err(error @ Error::AlreadyExists { .. }) => {
                self.forget(place.vmid);
                return Err(Trouble::NotTried(format!("another took the VMID in the meantime: {error}")));
            }
            other => other?,
        };
        self.wait(&task).await?;
        let config = ct.config().await?;
        let want = &new.config;
        let same = |c: &LxcConfig| {
            (c.cores, c.memory, c.swap, c.hostname.clone(), c.unprivileged, c.startup, c.features.clone())
        };
        ensure(same(&config) == same(want), || {
            format!("{:?} was asked for, but it has {:?}", want.pairs(), config.pairs())
        })?;
        ensure(config.onboot != Some(true) && config.tags == want.tags, || {
            format!("tags or onboot: {:?}", config.pairs())
        })?;
        ensure(config.description.as_deref().is_some_and(|d| d.contains(&self.mark)), || {
            format!("notes: {:?}", config.description)
        })?;
        let net = |c: &LxcConfig| c.net.get(&0).map(|n| (n.bridge.clone(), n.hwaddr, n.ip));
        ensure(net(&config) == net(want), || format!("net0: {:?}", config.net))?;
        let volume = config.rootfs.as_ref().map(|r| r.volume.to_string()).unwrap_or_default();
        ensure(volume.starts_with(&format!("{}:", place.storage)), || format!("rootfs: {volume:?}"))?;
        ensure(config.digest.is_some() && config.unknown.is_empty(), || {
            format!("digest {:?}, unknown {:?}", config.digest, config.unknown)
        })?;
        let status = ct.status().await?;
        ensure(!status.is_running() && status.name.as_deref() == Some("moxlet-suite"), || {
            format!("{status:?}")
        })?;
        let listed = self.client().cts(&place.node).await?;
        ensure(listed.iter().any(|c| c.vmid == Some(place.vmid)), || "it is not in the list of CTs".into())?;
        ensure(!self.client().is_free(place.vmid).await?, || "its VMID counts as free".into())
    }

    async fn create_again(&self, place: &Place) -> Outcome {
        let new = self.new_ct(place, place.template.clone())?;
        let ct = self.client().ct(&place.node, place.vmid);
        let result = match ct.create(&new).await {
            Ok(task) => self.wait(&task).await.map(drop),
            Err(error) => Err(error),
        };
        expect(result, "that it exists already", |e| matches!(e, Error::AlreadyExists { .. }))
    }

    async fn tasks(&self, place: &Place) -> Outcome {
        let filter = TaskFilter { vmid: Some(place.vmid), running: true, ..TaskFilter::default() };
        let tasks = self.client().tasks(&place.node, &filter).await?;
        let Some(created) =
            tasks.iter().find(|t| t.upid.kind() == "vzcreate" && t.status.as_deref() == Some("OK"))
        else {
            return Err(Trouble::Failed(format!("the creation is not among {tasks:?}")));
        };
        let upid = &created.upid;
        ensure(upid.user() == self.client().token_id(), || format!("it belongs to {}", upid.user()))?;
        let status = self.client().task_status(upid).await?;
        ensure(status.is_over() && status.end().is_some(), || format!("{status:?}"))?;
        let log = self.client().task_log_tail(upid, 5).await?;
        ensure(log.len() <= 5, || format!("{} lines, 5 were asked for", log.len()))?;
        // It is over: calling it off changes nothing.
        self.client().cancel_task(upid).await?;
        Ok(())
    }

    async fn change(&self, ct: &Ct<'_>) -> Outcome {
        let before = ct.config().await?;
        let set = LxcConfig {
            description: Some(format!("{}\nä: 100%\n", self.mark)),
            memory: Some(192),
            cpulimit: Some(0.5),
            timezone: Some("host".into()),
            ..LxcConfig::default()
        };
        ct.set_config(&ConfigChange { set, digest: before.digest.clone(), ..ConfigChange::default() })
            .await?;
        let after = ct.config().await?;
        ensure((after.memory, after.cpulimit) == (Some(192), Some(0.5)), || format!("{:?}", after.pairs()))?;
        ensure(after.description.as_deref().is_some_and(|d| d.contains("ä: 100%")), || {
            format!("{:?}", after.description)
        })?;
        ensure(after.digest != before.digest, || "the digest is the same after a change".into())?;
        let delete = vec!["cpulimit".into(), "timezone".into()];
        ct.set_config(&ConfigChange { delete, ..ConfigChange::default() }).await?;
        let last = ct.config().await?;
        ensure(last.timezone.is_none() && last.cpulimit.is_none(), || format!("{:?}", last.pairs()))?;
        let pending = ct.pending().await?;
        ensure(pending.iter().any(|k| k.key == "memory" && k.value.as_deref() == Some("192")), || {
            format!("{pending:?}")
        })
    }

    async fn stale_digest(&self, ct: &Ct<'_>) -> Outcome {
        let set = LxcConfig { memory: Some(256), ..LxcConfig::default() };
        let change = ConfigChange { set, digest: Some("0".repeat(40)), ..ConfigChange::default() };
        expect(ct.set_config(&change).await, "that it was changed", |e| matches!(e, Error::Changed { .. }))?;
        let memory = ct.config().await?.memory;
        ensure(memory != Some(256), || "it was changed all the same".into())
    }

    async fn invalid(&self, ct: &Ct<'_>) -> Outcome {
        let mut set = LxcConfig::default();
        set.unknown.insert("hostname".into(), "not_a_name".into());
        let ct = self.setup.unchecked.ct(ct.node(), ct.vmid());
        let result = ct.set_config(&ConfigChange { set, ..ConfigChange::default() }).await;
        expect(
            result,
            "that the host name is invalid",
            |e| matches!(e, Error::InvalidParameters { parameters, .. } if parameters.iter().any(|(name, _)| name == "hostname")),
        )
    }

    async fn forbidden_feature(&self, ct: &Ct<'_>) -> Outcome {
        let features = Features {
            nesting: Some(true),
            mount: vec!["nfs".parse().map_err(Error::from)?],
            ..Features::default()
        };
        let set = LxcConfig { features: Some(features), ..LxcConfig::default() };
        let result = ct.set_config(&ConfigChange { set, ..ConfigChange::default() }).await;
        expect(result, "that the token may not", |e| matches!(e, Error::NotAllowed { .. }))
    }

    async fn protected(&self, ct: &Ct<'_>) -> Outcome {
        let set = LxcConfig { protection: Some(true), ..LxcConfig::default() };
        ct.set_config(&ConfigChange { set, ..ConfigChange::default() }).await?;
        let result = match ct.delete(Delete::default()).await {
            Ok(task) => self.wait(&task).await.map(drop),
            Err(error) => Err(error),
        };
        expect(result, "that it is protected", |e| matches!(e, Error::Protected { .. }))?;
        ct.set_config(&ConfigChange { delete: vec!["protection".into()], ..ConfigChange::default() }).await?;
        Ok(())
    }

    async fn remove(&self, place: &Place) -> Outcome {
        let ct = self.client().ct(&place.node, place.vmid);
        let delete = Delete { purge: true, ..Delete::default() };
        self.wait(&ct.delete(delete).await?).await?;
        self.forget(place.vmid);
        expect(ct.status().await, "that it is gone", Error::is_gone)?;
        // The cluster's list is up to ten seconds old, the node's is not.
        let listed = self.client().cts(&place.node).await?;
        ensure(!listed.iter().any(|c| c.vmid == Some(place.vmid)), || "it is still listed".into())?;
        let left = self.client().storage_content(&place.node, &place.storage, None, Some(place.vmid)).await?;
        ensure(left.is_empty(), || format!("volumes are left: {left:?}"))
    }

    /// How long a CT gets to end by itself.
    pub(super) fn grace() -> Option<Duration> {
        Some(Duration::from_secs(10))
    }
}
