//! What stands on an image: containers' roots, mounts, holds.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    path::PathBuf,
    sync::Arc,
};

use moxlet_ids::{ChainId, ContainerId, Digest};

use super::Store;
use crate::{ImageRecord, Result};

/// Somebody who uses an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum User {
    /// A container whose root stands on its layers.
    Container(ContainerId),
    /// A mount of it.
    Mount(PathBuf),
    /// A container that is being made.
    Starting,
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Container(id) => write!(f, "container {id}"),
            Self::Mount(path) => write!(f, "its mount at {}", path.display()),
            Self::Starting => f.write_str("a container that is being made"),
        }
    }
}

/// Who uses which stack of layers.
pub(crate) struct Users {
    by_layers: HashMap<Vec<ChainId>, Vec<User>>,
    /// The images that were held before anything else was looked at: a container that was being made may have got its
    /// root meanwhile.
    held: HashSet<Digest>,
}

impl Store {
    /// Looks who uses what. Two images that differ in their configs alone count as used together: a root knows only
    /// the layers that it stands on.
    pub(crate) async fn users(self: &Arc<Self>) -> Result<Users> {
        let held = self.held();
        let mut by_layers: HashMap<Vec<ChainId>, Vec<User>> = HashMap::new();
        for id in self.driver.roots().await? {
            match self.driver.root_layers(&id).await {
                Ok(layers) => by_layers.entry(layers).or_default().push(User::Container(id)),
                // Removed meanwhile.
                Err(moxlet_storage::Error::RootNotFound(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let store = Arc::clone(self);
        for view in self.writing(move || store.records.views()).await? {
            by_layers.entry(view.layers).or_default().push(User::Mount(view.target));
        }
        Ok(Users { by_layers, held })
    }
}

impl Users {
    /// Who uses an image.
    pub(crate) fn of(&self, image: &ImageRecord) -> Vec<User> {
        let mut users = self.by_layers.get(&image.layers).cloned().unwrap_or_default();
        if self.held.contains(&image.id) {
            users.push(User::Starting);
        }
        users
    }
}
