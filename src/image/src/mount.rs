//! Images mounted for somebody to look at: all layers merged, read-only, ids as they are in the image.

use std::path::{Path, PathBuf};

use moxlet_storage::mounts;

use crate::{Error, ImageRecord, ImageStore, Result, error::Attempt, store::View};

impl ImageStore {
    /// Mounts an image at a directory, which is made if missing. Its layers stay while the mount is there, whatever
    /// becomes of the image's names. The same image at the same place again changes nothing.
    ///
    /// # Errors
    /// [`Error::Missing`]; [`Error::MountPoint`] where something else is mounted there; the driver's.
    pub async fn mount(&self, reference: &str, target: &Path) -> Result<ImageRecord> {
        let hold = self.store.hold(reference).await?.ok_or_else(|| Error::Missing(reference.to_owned()))?;
        let image = hold.record().clone();
        let (store, wanted) = (self.store.clone(), target.to_owned());
        let mut view = View::new(image.id.clone(), image.layers.clone(), target.to_owned());
        let (mut view, there) = self
            .store
            .writing(move || {
                view.target = place(&wanted)?;
                let known = store.records.views()?.into_iter().find(|v| v.target == view.target);
                if known.is_some_and(|k| k.image == view.image) {
                    return Ok((view, true));
                }
                if mounts::is_mounted(&view.target)? {
                    let reason = "something else is mounted there";
                    return Err(Error::MountPoint { path: view.target, reason });
                }
                store.records.write_view(&view)?;
                Ok((view, false))
            })
            .await?;
        if there {
            return Ok(image);
        }
        let mounted = self.store.driver.mount_layers(&image.layers, &view.target).await;
        let store = self.store.clone();
        self.store
            .writing(move || {
                if let Err(error) = mounted {
                    store.records.remove_view(&view.target)?;
                    return Err(error.into());
                }
                view.mounted()?;
                store.records.write_view(&view)?;
                store.touch(&view.image);
                Ok(())
            })
            .await?;
        drop(hold);
        Ok(image)
    }

    /// Takes such a mount away; layers that were only kept for it go.
    ///
    /// # Errors
    /// [`Error::MountPoint`] where no image of this store is mounted there.
    pub async fn unmount(&self, target: &Path) -> Result<()> {
        let (store, target) = (self.store.clone(), target.to_owned());
        self.store
            .writing(move || {
                let target = place(&target)?;
                if !store.records.views()?.iter().any(|v| v.target == target) {
                    return Err(Error::MountPoint {
                        path: target,
                        reason: "no image of this store is mounted there",
                    });
                }
                mounts::unmount(&target)?;
                store.records.remove_view(&target)
            })
            .await?;
        self.store.collect().await.map(drop)
    }

    /// Where images are mounted.
    ///
    /// # Errors
    /// A record cannot be read.
    pub async fn mounts(&self) -> Result<Vec<PathBuf>> {
        let store = self.store.clone();
        self.store.writing(move || Ok(store.records.views()?.into_iter().map(|v| v.target).collect())).await
    }
}

/// A mount point as the kernel names it. Only its parent is looked at, which must be there.
fn place(target: &Path) -> Result<PathBuf> {
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(Error::MountPoint {
            path: target.to_owned(),
            reason: "it is no directory below another one",
        });
    };
    if !target.is_absolute() {
        return Err(Error::MountPoint { path: target.to_owned(), reason: "the path is not absolute" });
    }
    Ok(parent.canonicalize().attempt("find", parent)?.join(name))
}
