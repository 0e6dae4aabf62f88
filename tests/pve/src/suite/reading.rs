//! What can be asked without changing anything.

use moxlet_pve::{
    Error, NodeName,
    api::{
        cluster::{Member, ResourceKind},
        network::InterfaceKind,
        task::TaskFilter,
    },
};

use super::{Outcome, Suite, Trouble, ensure, expect};

impl Suite {
    pub(super) async fn reading(&self) {
        self.test("the_version_is_one_that_we_can_work_with", self.version()).await;
        self.test("a_wrong_secret_is_told_from_a_missing_privilege", self.wrong_secret()).await;
        self.test("nodes_are_listed_and_have_a_status", self.nodes()).await;
        self.test("the_cluster_has_members_and_quorum", self.members()).await;
        self.test("resources_are_listed_by_kind", self.resources()).await;
        self.test("the_next_vmid_is_free", self.next_id()).await;
        self.test("options_tasks_and_log_of_the_cluster_can_be_read", self.records()).await;
        self.test("ha_can_be_read", self.ha()).await;
        self.test("storages_and_their_content_can_be_read", self.storages()).await;
        self.test("networks_can_be_read", self.networks()).await;
        self.test("pools_can_be_read", self.pools()).await;
        self.test("the_token_knows_its_own_privileges", self.permissions()).await;
        self.test("an_unknown_node_does_not_make_its_guests_gone", self.unknown_node()).await;
        self.test("many_reads_at_once_all_succeed", self.many()).await;
    }

    /// The node to work on: the one named, or the first that is there.
    pub(super) async fn node(&self) -> Result<NodeName, Trouble> {
        if let Some(node) = &self.setup.node {
            return Ok(node.clone());
        }
        let nodes = self.client().nodes().await?;
        let online = nodes.into_iter().find(moxlet_pve::api::node::NodeEntry::is_online);
        online.map(|n| n.node).ok_or_else(|| Trouble::Failed("no node is online".into()))
    }

    async fn version(&self) -> Outcome {
        self.client().check_version().await?;
        Ok(())
    }

    async fn wrong_secret(&self) -> Outcome {
        let result = self.setup.stranger.version().await;
        expect(result, "that the token is wrong", |e| matches!(e, Error::WrongToken { .. }))
    }

    async fn nodes(&self) -> Outcome {
        let node = self.node().await?;
        let nodes = self.client().nodes().await?;
        ensure(nodes.iter().any(|n| n.node == node && n.is_online()), || {
            format!("{node} is not online: {nodes:?}")
        })?;
        let status = self.client().node_status(&node).await?;
        ensure(status.memory.total > 0 && status.cpuinfo.cpus > 0, || format!("no figures: {status:?}"))
    }

    async fn members(&self) -> Outcome {
        let members = self.client().cluster_status().await?;
        let nodes = members.iter().filter(|m| matches!(m, Member::Node { .. })).count();
        ensure(nodes > 0, || format!("no node among the members: {members:?}"))?;
        let split = members.iter().any(|m| matches!(m, Member::Cluster { quorate: false, .. }));
        ensure(!split, || "the cluster has no quorum".into())
    }

    async fn resources(&self) -> Outcome {
        let all = self.client().resources(None).await?;
        ensure(all.iter().any(|r| r.kind == "node"), || "no node among the resources".into())?;
        for (kind, names) in [
            (ResourceKind::Guests, &["lxc", "qemu"][..]),
            (ResourceKind::Nodes, &["node"]),
            (ResourceKind::Storages, &["storage"]),
            (ResourceKind::Sdn, &["sdn", "network"]),
        ] {
            let some = self.client().resources(Some(kind)).await?;
            let stray = some.iter().find(|r| !names.contains(&r.kind.as_str()));
            ensure(stray.is_none(), || format!("{stray:?} among {kind:?}"))?;
        }
        Ok(())
    }

    async fn next_id(&self) -> Outcome {
        let id = self.client().next_id().await?;
        ensure(self.client().is_free(id).await?, || format!("{id} is not free"))
    }

    async fn records(&self) -> Outcome {
        let (lower, upper) = self.client().options().await?.next_id_range();
        ensure(lower < upper, || format!("the range of VMIDs is {lower} to {upper}"))?;
        self.client().cluster_tasks().await?;
        self.client().cluster_log(10).await?;
        let filter = TaskFilter { running: true, limit: Some(5), ..TaskFilter::default() };
        let tasks = self.client().tasks(&self.node().await?, &filter).await?;
        ensure(tasks.len() <= 5, || format!("{} tasks, 5 were asked for", tasks.len()))
    }

    async fn ha(&self) -> Outcome {
        self.client().ha_status().await?;
        self.client().ha_resources().await?;
        self.client().ha_rules().await?;
        Ok(())
    }

    async fn storages(&self) -> Outcome {
        let node = self.node().await?;
        let all = self.client().storages(&node, None).await?;
        let seen = all.iter().find(|s| s.active && s.storage.is_some());
        let Some(storage) = seen.and_then(|s| s.storage.as_ref()) else {
            return Err(Trouble::NotTried("no active storage may be seen".into()));
        };
        let status = self.client().storage_status(&node, storage).await?;
        ensure(status.active, || format!("{storage} is active in the list and not by itself: {status:?}"))?;
        self.client().storage_content(&node, storage, None, None).await?;
        Ok(())
    }

    async fn networks(&self) -> Outcome {
        let node = self.node().await?;
        for kind in [InterfaceKind::LocalBridges, InterfaceKind::AnyBridge, InterfaceKind::All] {
            self.client().interfaces(&node, kind).await?;
        }
        Ok(())
    }

    async fn pools(&self) -> Outcome {
        for pool in self.client().pools().await?.into_iter().take(3) {
            let one = self.client().pool(&pool.poolid).await?;
            ensure(one.is_some(), || format!("{} is listed and not found", pool.poolid))?;
        }
        Ok(())
    }

    async fn permissions(&self) -> Outcome {
        let mine = self.client().permissions(None).await?;
        ensure(!mine.paths.is_empty(), || "the token has no privilege at all".into())
    }

    async fn unknown_node(&self) -> Outcome {
        let nowhere: NodeName = "no-such-node-moxlet".parse().map_err(Error::from)?;
        match self.client().ct(&nowhere, self.setup.vmids.0).status().await {
            Err(error) if !error.is_gone() => Ok(()),
            other => Err(Trouble::Failed(format!("a guest of an unknown node counts as gone: {other:?}"))),
        }
    }

    async fn many(&self) -> Outcome {
        let calls = (0..30).map(|_| {
            let client = self.client().clone();
            tokio::spawn(async move { client.resources(None).await })
        });
        for call in calls.collect::<Vec<_>>() {
            call.await.map_err(|e| Trouble::Failed(e.to_string()))??;
        }
        Ok(())
    }
}
