//! How a CT stands that there is a record of, and whether what runs under its number is it.
//!
//! A number says nothing by itself: an administrator may have deleted a pod's CT and made or restored another of the same
//! number, which runs. So nobody is told of a process by the number alone.

use std::sync::Arc;

use moxlet_pve::config::LxcConfig;

use super::{
    Inner, VolumeOwner, blocking,
    file::Content,
    record::{Phase, Record},
};
use crate::{Error, Result};

/// How a CT stands that we have a record of.
#[derive(Debug)]
pub(super) enum Standing {
    /// It is as its record says.
    Ours(Box<Content>),
    /// Its file is one that a crash left half written.
    Torn,
    /// Proxmox VE has removed all of it but the file.
    Destroyed,
    /// It is not there.
    Gone,
    /// It is on that host.
    Moved(String),
    /// There is one of its number that is not ours.
    Foreign {
        /// Why not.
        reason: String,
        /// What it is; none if that cannot be read.
        content: Option<Box<Content>>,
    },
}

impl Standing {
    pub(super) fn error(self, record: &Record) -> Error {
        let vmid = record.vmid;
        match self {
            Self::Moved(node) => Error::Moved { vmid, node },
            Self::Foreign { reason, .. } => Error::Foreign { vmid, reason },
            Self::Gone => Error::NotFound(format!("{vmid} of sandbox {}", record.id)),
            Self::Destroyed => Error::Locked { vmid, lock: "destroyed".into() },
            Self::Torn | Self::Ours(_) => Error::Busy { vmid, what: "it is half made".into() },
        }
    }
}

impl Inner {
    /// How the CT of a record stands, from what is on disk.
    pub(super) fn standing(&self, record: &Record) -> Result<Standing> {
        let read = self.folder.read(record.vmid);
        if record.node != self.config.node {
            let reason = format!("its record is of host {}", record.node);
            return Ok(Standing::Foreign { reason, content: read.ok().flatten().map(Box::new) });
        }
        let content = match read {
            Ok(Some(content)) => content,
            Ok(None) => {
                let elsewhere =
                    self.folder.elsewhere(record.vmid, &record.mark().path(&self.layout.includes))?;
                return Ok(elsewhere.map_or(Standing::Gone, Standing::Moved));
            }
            Err(Error::Config { path, source }) => {
                if record.phase != Phase::Made && self.is_torn(record) {
                    return Ok(Standing::Torn);
                }
                let reason = format!("{} cannot be read: {source}", path.display());
                return Ok(Standing::Foreign { reason, content: None });
            }
            Err(error) => return Err(error),
        };
        let reason = match record.mark().agrees(&self.layout.includes, &content.config) {
            Ok(()) => return Ok(Standing::Ours(Box::new(content))),
            Err(reason) => reason,
        };
        if record.phase != Phase::Made && self.is_torn(record) {
            return Ok(Standing::Torn);
        }
        let bare = LxcConfig { lock: Some("destroyed".into()), ..LxcConfig::default() };
        if content.config == bare && content.sections.is_empty() {
            return Ok(Standing::Destroyed);
        }
        Ok(Standing::Foreign { reason, content: Some(Box::new(content)) })
    }

    /// Whether a CT's file is a beginning of what we were about to write when we were killed.
    fn is_torn(&self, record: &Record) -> bool {
        let path = self.folder.path(record.vmid);
        crate::process::read_bounded(&path, 1 << 20)
            .is_ok_and(|text| record.known.starts_with(&text) && text != record.known)
    }

    /// The same outside the async threads.
    async fn stands(self: &Arc<Self>, record: &Record) -> Result<Standing> {
        let (inner, record) = (Arc::clone(self), record.clone());
        blocking(move || inner.standing(&record)).await
    }

    /// The configuration of a CT that is ours.
    pub(super) async fn own(self: &Arc<Self>, record: &Record) -> Result<Content> {
        match self.stands(record).await? {
            Standing::Ours(content) => Ok(*content),
            other => Err(other.error(record)),
        }
    }

    /// PID 1 of a record's CT. One of somebody else that runs under its number is not it; one that was changed on the host so
    /// that it does not look ours any more is, for as long as our root is there.
    pub(super) async fn running(self: &Arc<Self>, record: &Record) -> Result<Option<u32>> {
        let Some(pid) = self.inits.init(&record.id) else { return Ok(None) };
        let ours = match self.stands(record).await {
            Ok(Standing::Ours(_) | Standing::Torn | Standing::Destroyed) => true,
            Ok(Standing::Foreign { content, .. }) => self.has_our_root(record, content.as_deref()).await?,
            Ok(Standing::Gone | Standing::Moved(_)) => self.has_our_root(record, None).await?,
            // What cannot be looked at now has not changed.
            Err(error) if error.is_temporary() => true,
            Err(error) => return Err(error),
        };
        Ok(ours.then_some(pid))
    }

    /// Whether a CT that is not as its record says stands on the root that we made: then it is ours and was made to look so.
    pub(super) async fn has_our_root(&self, record: &Record, content: Option<&Content>) -> Result<bool> {
        let volume = record.volume();
        if content.is_some_and(|content| !content.uses(&volume)) {
            return Ok(false);
        }
        Ok(self.volumes.owner(&volume).await? == VolumeOwner::Sandbox(record.id.clone()))
    }
}
