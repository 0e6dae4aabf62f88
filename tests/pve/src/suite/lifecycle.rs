//! A CT of our own: running, stopped, with snapshots and firewall, on another node.

use moxlet_pve::{
    Error,
    api::{
        ct::{Ct, Migrate},
        firewall::{FirewallOptions, FirewallRule},
    },
};

use super::{Outcome, Suite, Trouble, ct::Place, ensure, expect};

impl Suite {
    pub(super) async fn lifecycle(&self, place: &Place) {
        let ct = self.client().ct(&place.node, place.vmid);
        self.test("the_interfaces_of_a_stopped_ct_are_none", self.no_interfaces(&ct)).await;
        if self.test("a_ct_starts", self.start(&ct)).await {
            self.test("a_running_ct_is_not_started_again", self.start_again(&ct)).await;
            self.test("a_running_ct_has_interfaces", self.interfaces(&ct)).await;
            self.test("a_running_ct_is_not_removed", self.remove_running(&ct)).await;
            self.test("a_ct_reboots", self.reboot(&ct)).await;
            self.test("a_ct_shuts_down", self.shut_down(&ct)).await;
            self.test("a_stopped_ct_is_not_stopped_again", self.stop_again(&ct)).await;
            self.test("a_ct_is_stopped_at_once", self.stop(&ct)).await;
        }
        let why =
            "it is done with CRIU, which servers rarely have, and leaves a CT that may not thaw".to_owned();
        self.record("a_ct_is_frozen_and_thawed", Err(Trouble::NotTried(why)));
        let why =
            "only root@pam, or a backup under way, sets a lock; the client's own tests cover its errors"
                .to_owned();
        self.record("a_locked_ct_is_told", Err(Trouble::NotTried(why)));
        self.test("snapshots_are_taken_listed_and_removed", self.snapshots(&ct)).await;
        self.test("firewall_options_and_rules_are_set_and_removed", self.firewall(&ct)).await;
        self.test("a_pool_is_made_and_removed", self.pool()).await;
        self.test("a_ct_migrates_and_comes_back", self.migrate(place)).await;
    }

    async fn no_interfaces(&self, ct: &Ct<'_>) -> Outcome {
        let interfaces = ct.interfaces().await?;
        ensure(interfaces.is_empty(), || format!("{interfaces:?}"))
    }

    async fn start(&self, ct: &Ct<'_>) -> Outcome {
        self.wait(&ct.start().await?).await?;
        let status = ct.status().await?;
        ensure(status.is_running(), || format!("{status:?}"))
    }

    async fn start_again(&self, ct: &Ct<'_>) -> Outcome {
        let result = match ct.start().await {
            Ok(task) => self.wait(&task).await.map(drop),
            Err(error) => Err(error),
        };
        expect(result, "that it is running", |e| matches!(e, Error::AlreadyRunning { .. }))
    }

    async fn interfaces(&self, ct: &Ct<'_>) -> Outcome {
        let interfaces = ct.interfaces().await?;
        ensure(interfaces.iter().any(|i| i.name == "lo"), || format!("{interfaces:?}"))
    }

    async fn remove_running(&self, ct: &Ct<'_>) -> Outcome {
        let result = match ct.delete(moxlet_pve::api::ct::Delete::default()).await {
            Ok(task) => self.wait(&task).await.map(drop),
            Err(error) => Err(error),
        };
        ensure(result.is_err(), || "it was removed while it ran".into())?;
        let status = ct.status().await?;
        ensure(status.is_running(), || format!("{status:?}"))
    }

    async fn reboot(&self, ct: &Ct<'_>) -> Outcome {
        self.wait(&ct.reboot(Self::grace()).await?).await?;
        // A CT reboots by ending and being started by its monitor: for a moment it is stopped.
        for _ in 0..50 {
            if ct.status().await?.is_running() {
                return Ok(());
            }
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
        Err(Trouble::Failed("it does not run again".into()))
    }

    async fn shut_down(&self, ct: &Ct<'_>) -> Outcome {
        self.wait(&ct.shutdown(Self::grace(), true).await?).await?;
        let status = ct.status().await?;
        ensure(!status.is_running(), || format!("{status:?}"))
    }

    async fn stop_again(&self, ct: &Ct<'_>) -> Outcome {
        let result = match ct.stop(false).await {
            Ok(task) => self.wait(&task).await.map(drop),
            Err(error) => Err(error),
        };
        expect(result, "that it is not running", |e| matches!(e, Error::NotRunning { .. }))
    }

    async fn stop(&self, ct: &Ct<'_>) -> Outcome {
        self.wait(&ct.start().await?).await?;
        self.wait(&ct.stop(true).await?).await?;
        let status = ct.status().await?;
        ensure(!status.is_running(), || format!("{status:?}"))
    }

    async fn snapshots(&self, ct: &Ct<'_>) -> Outcome {
        let name = "moxlet1".parse().map_err(Error::from)?;
        match ct.create_snapshot(&name, Some("of a test")).await {
            Ok(task) => self.wait(&task).await.map(drop)?,
            Err(Error::Server { message, .. }) if message.contains("snapshot feature is not available") => {
                return Err(Trouble::NotTried(format!("the storage has no snapshots: {message}")));
            }
            Err(error) => return Err(error.into()),
        }
        let all = ct.snapshots().await?;
        ensure(all.iter().any(|s| s.name == "moxlet1" && s.description.contains("of a test")), || {
            format!("{all:?}")
        })?;
        let again = match ct.create_snapshot(&name, None).await {
            Ok(task) => self.wait(&task).await.map(drop),
            Err(error) => Err(error),
        };
        expect(again, "that the name is taken", |e| matches!(e, Error::AlreadyExists { .. }))?;
        self.wait(&ct.delete_snapshot(&name).await?).await?;
        let all = ct.snapshots().await?;
        ensure(all.is_empty(), || format!("{all:?}"))
    }

    async fn firewall(&self, ct: &Ct<'_>) -> Outcome {
        let options = FirewallOptions {
            dhcp: Some(false),
            policy_in: Some("DROP".into()),
            ..FirewallOptions::default()
        };
        ct.set_firewall_options(&options).await?;
        let set = ct.firewall_options().await?;
        ensure((set.dhcp, set.policy_in.as_deref()) == (Some(false), Some("DROP")), || format!("{set:?}"))?;
        let rule = FirewallRule {
            kind: "in".into(),
            action: "ACCEPT".into(),
            enable: Some(true),
            proto: Some("tcp".into()),
            dport: Some("8080".into()),
            source: Some("192.0.2.0/24".into()),
            comment: Some("moxlet suite".into()),
            ..FirewallRule::default()
        };
        ct.add_firewall_rule(&rule).await?;
        let rules = ct.firewall_rules().await?;
        let found = rules.iter().find(|r| r.comment.as_deref().map(str::trim) == Some("moxlet suite"));
        let Some(pos) = found.filter(|r| r.dport.as_deref() == Some("8080")).and_then(|r| r.pos) else {
            return Err(Trouble::Failed(format!("the rule is not among {rules:?}")));
        };
        ct.delete_firewall_rule(pos).await?;
        let rules = ct.firewall_rules().await?;
        ensure(rules.is_empty(), || format!("{rules:?}"))
    }

    async fn pool(&self) -> Outcome {
        let pool = Self::pool_name()?;
        self.client().create_pool(&pool, Some(&self.mark)).await?;
        let made = self.client().pool(&pool).await?;
        let again = self.client().create_pool(&pool, None).await;
        self.client().delete_pool(&pool).await?;
        ensure(made.is_some_and(|p| p.comment.as_deref() == Some(self.mark.as_str())), || {
            "it is not as it was made".into()
        })?;
        expect(again, "that it exists already", |e| matches!(e, Error::AlreadyExists { .. }))?;
        let left = self.client().pools().await?;
        ensure(!left.iter().any(|p| p.poolid == pool), || "it is still there".into())
    }

    async fn migrate(&self, place: &Place) -> Outcome {
        let nodes = self.client().nodes().await?;
        let Some(other) = nodes.into_iter().find(|n| n.is_online() && n.node != place.node) else {
            return Err(Trouble::NotTried("there is one node alone".into()));
        };
        let there = self.client().storages(&other.node, Some("rootdir")).await?;
        if !there.iter().any(|s| s.active && s.storage.as_ref() == Some(&place.storage)) {
            return Err(Trouble::NotTried(format!("{} has no storage {}", other.node, place.storage)));
        }
        for (from, to) in [(&place.node, &other.node), (&other.node, &place.node)] {
            let options = Migrate { target: to.clone(), restart: false, timeout: None, target_storage: None };
            let task = self.client().ct(from, place.vmid).migrate(&options).await?;
            self.wait(&task).await?;
            self.remember(place.vmid, to);
            expect(
                self.client().ct(from, place.vmid).status().await,
                "that it is gone here",
                Error::is_gone,
            )?;
            self.client().ct(to, place.vmid).status().await?;
        }
        Ok(())
    }
}
