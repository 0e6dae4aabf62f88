//! Containers' roots: a record, an upper and a work directory, put in place at once.

use std::{collections::HashSet, fs, os::unix::fs::chown, path::Path};

use moxlet_ids::{ChainId, ContainerId};
use serde::{Deserialize, Serialize};

use super::{Inner, MAX_LAYERS, lock, make_dir, quota, stack};
use crate::{
    IdMap, RootOptions,
    error::{Attempt, Error, Result},
    mounts, tree,
};

/// The version of `root.json`. Files of version 1 have no quota and read as those without one do.
const ROOT_VERSION: u32 = 2;

/// What `root.json` says of a container's root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Root {
    pub(super) version: u32,
    /// The bottom one first.
    pub(super) layers: Vec<ChainId>,
    pub(super) map: IdMap,
    /// Bytes that the container may write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) quota_bytes: Option<u64>,
    /// The quota project that its files belong to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) project: Option<u32>,
}

impl Root {
    /// Whether it is what is asked for; version and project are ours to choose.
    fn is_as(&self, other: &Self) -> bool {
        (&self.layers, self.map, self.quota_bytes) == (&other.layers, other.map, other.quota_bytes)
    }
}

impl Inner {
    pub(super) fn create_root(
        &self,
        id: &ContainerId,
        layers: &[ChainId],
        options: RootOptions,
    ) -> Result<()> {
        let map = options.map;
        if !map.is_valid() {
            return Err(Error::BadIdMap { host_base: map.host_base, size: map.size });
        }
        if layers.len() > MAX_LAYERS {
            return Err(Error::TooManyLayers { layers: layers.len(), max: MAX_LAYERS });
        }
        let quota_bytes = options.quota_bytes;
        if quota_bytes.is_some() && self.quotas.is_none() {
            let filesystem = mounts::file_system_of(&self.dir)?;
            return Err(Error::NoProjectQuota { path: self.dir.clone(), filesystem });
        }
        let root = Root { version: ROOT_VERSION, layers: layers.to_vec(), map, quota_bytes, project: None };
        if let Some(there) = self.roots().get(id) {
            return if there.is_as(&root) { Ok(()) } else { Err(Error::RootExists(id.clone())) };
        }
        let project = self.choose_project(quota_bytes)?;
        let draft = tree::unique(&self.tmp(), "root");
        let made = self.make_root(&draft, id, Root { project, ..root });
        let put_in_place = matches!(made, Ok(true));
        if !put_in_place {
            tree::remove(&draft, &self.tmp())?;
        }
        if let Some(project) = project {
            if !put_in_place {
                self.free_project(project);
            }
            lock(&self.choosing).remove(&project);
        }
        made.map(drop)
    }

    /// A project that nobody else has. It gets its limit when the root's record names it.
    fn choose_project(&self, quota: Option<u64>) -> Result<Option<u32>> {
        let (Some(_), Some(quotas)) = (quota, &self.quotas) else { return Ok(None) };
        let mut choosing = lock(&self.choosing);
        let known: HashSet<u32> = self.roots().values().filter_map(|r| r.project).collect();
        let project = quotas.choose(|p| known.contains(&p) || choosing.contains(&p))?;
        choosing.insert(project);
        Ok(Some(project))
    }

    /// Takes the limit from a project whose files are gone. One that keeps it is merely not chosen again.
    pub(super) fn free_project(&self, project: u32) {
        if let Some(quotas) = &self.quotas
            && let Err(error) = quotas.limit(project, 0)
        {
            tracing::warn!(project, %error, "the limit of a quota project stays");
        }
    }

    /// Fills the draft of a root and puts it in place; false if somebody else was faster.
    fn make_root(&self, draft: &Path, id: &ContainerId, root: Root) -> Result<bool> {
        make_dir(draft, 0o700)?;
        // The record before the limit: whoever finds what a crash left takes the limit away by it.
        let path = draft.join("root.json");
        let text =
            serde_json::to_vec(&root).map_err(|source| Error::Damaged { path: path.clone(), source })?;
        fs::write(&path, text).attempt("write", path)?;
        if let (Some(project), Some(bytes), Some(quotas)) = (root.project, root.quota_bytes, &self.quotas) {
            quotas.limit(project, bytes)?;
        }
        for name in ["upper", "work"] {
            let path = draft.join(name);
            make_dir(&path, 0o755)?;
            if let Some(project) = root.project {
                quota::join(&path, project)?;
            }
            chown(&path, Some(root.map.host_base), Some(root.map.host_base))
                .attempt("change the owner of", path)?;
        }
        let mut roots = self.roots();
        match roots.get(id) {
            Some(there) if there.is_as(&root) => return Ok(false),
            Some(_) => return Err(Error::RootExists(id.clone())),
            None => {}
        }
        if let Some(missing) = root.layers.iter().find(|l| !self.layer_dir(l).is_dir()) {
            return Err(Error::LayerNotFound(missing.clone()));
        }
        let target = self.root_dir(id);
        fs::rename(draft, &target).attempt("put in place", target)?;
        roots.insert(id.clone(), root);
        Ok(true)
    }

    pub(super) fn root(&self, id: &ContainerId) -> Result<Root> {
        self.roots().get(id).cloned().ok_or_else(|| Error::RootNotFound(id.clone()))
    }

    pub(super) fn mount_root(&self, id: &ContainerId, target: &Path) -> Result<()> {
        let root = self.root(id)?;
        let Some(place) = stack::place_for(target)? else { return Ok(()) };
        let mapped = self.mapped(root.map)?;
        let dir = self.root_dir(id);
        let lower = self.lower(&mapped, &root.layers, 1)?;
        let mount = stack::merge(&lower, Some((&dir.join("upper"), &dir.join("work"))))?;
        stack::put(&mount, &place, target)
    }

    pub(super) fn remove_root(&self, id: &ContainerId) -> Result<()> {
        let (aside, root) = {
            let mut roots = self.roots();
            let aside = tree::set_aside(&self.root_dir(id), &self.tmp())?;
            (aside, roots.remove(id))
        };
        aside.map_or(Ok(()), |aside| tree::finish(&aside))?;
        if let Some(project) = root.and_then(|r| r.project) {
            self.free_project(project);
        }
        Ok(())
    }

    /// Removes something that was left in the temporary directory, with the limit of the root that it may be.
    pub(super) fn remove_leftover(&self, path: &Path) -> Result<()> {
        let projects: Vec<u32> = [path.to_owned(), path.join("0")]
            .iter()
            .filter_map(|dir| read_root(dir).ok().and_then(|root| root.project))
            .collect();
        tree::remove(path, &self.tmp())?;
        for project in projects {
            self.free_project(project);
        }
        Ok(())
    }
}

pub(super) fn read_root(dir: &Path) -> Result<Root> {
    let path = dir.join("root.json");
    let text = fs::read(&path).attempt("read", &path)?;
    let damaged = |source| Error::Damaged { path: path.clone(), source };
    let Version { version } = serde_json::from_slice(&text).map_err(damaged)?;
    if version > ROOT_VERSION {
        return Err(Error::TooNew { what: path.display().to_string(), version, known: ROOT_VERSION });
    }
    serde_json::from_slice(&text).map_err(damaged)
}

/// What of a record can be read whatever its version is.
#[derive(Deserialize)]
struct Version {
    version: u32,
}
