//! How a CT goes: by a task of Proxmox VE if it may have run, else by removing what was made of it, so that what was made
//! while the API is away goes as well. Each step can be repeated, and what is somebody else's stays.

use std::{net::IpAddr, sync::Arc, time::Duration};

use moxlet_ids::SandboxId;
use moxlet_pve::{api::ct::Delete, config::LxcConfig};

use super::{
    Inner, Standing, api, blocking,
    file::Content,
    record::{Phase, Record},
};
use crate::{Error, Result};

/// How often what is found is dealt with before it is given up: each time something of it is gone.
const ROUNDS: u32 = 4;
/// How long a removal by Proxmox VE may take.
const LIMIT: Duration = Duration::from_secs(300);

/// What is to be done with what is there.
enum Next {
    /// Nothing is there (any more) that is ours.
    Done,
    /// Its file was removed; look again.
    Again,
    /// Proxmox VE has to remove it.
    Api,
    /// A CT of its number is not ours, for this reason; none if what it is cannot be read.
    NotOurs(String, Option<Box<Content>>),
}

impl Inner {
    pub(super) async fn remove(self: &Arc<Self>, id: &SandboxId) -> Result<()> {
        let Some(mut record) = self.record(id).await? else { return Ok(()) };
        let complete = record.phase == Phase::Made;
        for _ in 0..ROUNDS {
            match self.next(&record, complete).await? {
                // Somebody removed the file under a running CT: Proxmox VE does not know it any more.
                Next::Done if self.running(&record).await?.is_some() => {
                    let what = format!(
                        "its file was removed and it runs: end it with `lxc-stop -n {}`",
                        record.vmid
                    );
                    return Err(Error::Busy { vmid: record.vmid, what });
                }
                Next::Done => return self.forget(record).await,
                Next::Again => {}
                Next::Api => {
                    if record.phase != Phase::Removing {
                        record = self.note(id, |r| r.phase = Phase::Removing).await?;
                    }
                    self.by_api(&record).await?;
                }
                Next::NotOurs(reason, content) => {
                    if let Some(reason) = self.keeps(&record, reason, content.as_deref()).await? {
                        return Err(Error::Foreign { vmid: record.vmid, reason });
                    }
                    return self.forget(record).await;
                }
            }
        }
        Err(Error::Busy { vmid: record.vmid, what: "it is still there after it was removed".into() })
    }

    /// Why a pod has to wait for a CT of its number that is not ours. Else ours was removed and its number used again.
    async fn keeps(
        &self,
        record: &Record,
        reason: String,
        content: Option<&Content>,
    ) -> Result<Option<String>> {
        // It was made to look so.
        if self.has_our_root(record, content).await? {
            return Ok(Some(reason));
        }
        // What cannot be read may have the address.
        let Some(content) = content else { return Ok(Some(reason)) };
        let has = |address: &&IpAddr| content.has_address(**address);
        Ok(record.ips.iter().find(has).map(|address| {
            format!(
                "{reason}, and it has the pod's address {address}: delete it, or give it another address, and the pod goes"
            )
        }))
    }

    /// Looks what is there and removes a file that is all that is left of it.
    async fn next(self: &Arc<Self>, record: &Record, complete: bool) -> Result<Next> {
        let (inner, record) = (Arc::clone(self), record.clone());
        blocking(move || {
            let held = inner.folder.lock(record.vmid)?;
            inner.folder.sweep(&held);
            match inner.standing(&record)? {
                Standing::Gone => Ok(Next::Done),
                // It was never ours: another was quicker with this number.
                Standing::Foreign { reason, .. } if record.phase == Phase::Making => {
                    tracing::info!(vmid = %record.vmid, reason, "a CT has the number that a half-made one was to get; it stays");
                    Ok(Next::Done)
                }
                Standing::Foreign { reason, content } => Ok(Next::NotOurs(reason, content)),
                Standing::Torn | Standing::Destroyed => {
                    inner.folder.remove(&held)?;
                    Ok(Next::Again)
                }
                Standing::Ours(mut content) => match content.config.lock.as_deref() {
                    // Not complete, so it never ran.
                    Some("create") if !complete => {
                        inner.folder.remove(&held)?;
                        Ok(Next::Again)
                    }
                    Some(lock) => Err(Error::Locked { vmid: record.vmid, lock: lock.to_owned() }),
                    None if inner.inits.is_frozen(&record.id) => {
                        Err(Error::Locked { vmid: record.vmid, lock: "frozen".into() })
                    }
                    // The API is not needed for it, nor waited for while it is away.
                    None if inner.never_ran(&record, &content) => {
                        inner.folder.remove(&held)?;
                        Ok(Next::Again)
                    }
                    None => {
                        // Without it Proxmox VE would stop the CT, free its volumes, and fail at its file.
                        inner.folder.check_quorum(&inner.folder.path(record.vmid))?;
                        if content.config.protection == Some(true) {
                            content.config.protection = None;
                            inner.folder.replace(&held, &content)?;
                        }
                        Ok(Next::Api)
                    }
                },
                other => Err(other.error(&record)),
            }
        })
        .await
    }

    /// Whether a CT is as we made it and Proxmox VE knows no more of it than its file: then it goes with its file. What somebody
    /// added to it, Proxmox VE has to remove.
    fn never_ran(&self, record: &Record, content: &Content) -> bool {
        let made = LxcConfig::from_file(&record.known).map(|file| LxcConfig { lock: None, ..file.config });
        !record.needs_api
            && self.inits.init(&record.id).is_none()
            && content.sections.is_empty()
            && made.is_ok_and(|made| made == content.config)
            && !self.folder.is_under_ha(record.vmid)
            && !self.folder.has_firewall(record.vmid)
    }

    async fn by_api(self: &Arc<Self>, record: &Record) -> Result<()> {
        let vmid = record.vmid;
        let _few = self.deletes.acquire().await.map_err(|_| Error::Host("the engine has ended".into()))?;
        let options = Delete { force: true, purge: true, destroy_unreferenced_disks: false };
        let removing = async {
            match self.client.ct(&self.config.node, vmid).delete(options).await {
                Ok(task) => self.follow("remove", vmid, &task).await,
                Err(error) => Err(api("remove", vmid)(error)),
            }
        };
        let done = tokio::time::timeout(LIMIT, removing).await;
        match done {
            // What is gone may be something else than the CT, and what failed may have got as far as `lock: destroyed`, which is
            // looked at next: its file says.
            Ok(Err(error @ Error::Pve { .. })) => {
                let (inner, record) = (Arc::clone(self), record.clone());
                match blocking(move || inner.standing(&record)).await? {
                    Standing::Destroyed | Standing::Gone => Ok(()),
                    _ => Err(error),
                }
            }
            Ok(other) => other,
            Err(_) => Err(Error::Busy {
                vmid,
                what: format!("its removal takes longer than {} s", LIMIT.as_secs()),
            }),
        }
    }

    /// Removes what is ours beside the CT, its record last.
    async fn forget(self: &Arc<Self>, record: Record) -> Result<()> {
        self.volumes.destroy(&record.volume(), &record.id).await?;
        let inner = Arc::clone(self);
        blocking(move || {
            record.mark().remove(&inner.layout.includes)?;
            inner.records.remove(&record.id)?;
            inner.numbers.remove(&record.id);
            Ok(())
        })
        .await
    }
}
