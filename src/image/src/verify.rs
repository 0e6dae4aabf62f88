//! Whether images are what they were: each layer's archive is made again from what lies on disk and its digest compared
//! with the config's, whose digest is the image's id; owners, modes, times and the like are held against the layer's tape.

use std::{collections::HashMap, sync::Arc};

use moxlet_ids::{ChainId, Digest};

use crate::{
    Error, ImageRecord, ImageStore, Origin, Result, layer,
    store::{Store, blocking},
};

/// Faults that are told of one layer.
const MAX_FAULTS: usize = 20;

/// What a verification has found.
#[derive(Debug, Clone)]
pub struct VerifyReport {
    /// The image.
    pub image: ImageRecord,
    /// How many of its layers could be compared.
    pub verified: usize,
    /// How many of the others should have a tape, and have lost it. Of the rest, the version that they came with kept none.
    pub lost: usize,
    /// What is wrong, by layer.
    pub faults: Vec<String>,
    /// Whether it was removed for that.
    pub removed: bool,
}

/// A verification that is under way: layers that images share are looked at once.
pub struct Verification {
    store: Arc<Store>,
    repair: bool,
    /// Faults by layer; none for a layer without a tape.
    known: HashMap<ChainId, Option<Vec<String>>>,
    left: std::vec::IntoIter<ImageRecord>,
}

impl ImageStore {
    /// Begins to verify images; all of them if none is named. With `repair`, damaged images that nobody uses are removed, so
    /// that the next pull brings them anew.
    ///
    /// # Errors
    /// [`Error::Missing`]; as [`Self::resolve`].
    pub fn verify(&self, references: &[String], repair: bool) -> Result<Verification> {
        let images = if references.is_empty() {
            self.store.list()
        } else {
            let find = |r: &String| self.store.resolve(r)?.ok_or_else(|| Error::Missing(r.clone()));
            references.iter().map(find).collect::<Result<_>>()?
        };
        Ok(Verification {
            store: self.store.clone(),
            repair,
            known: HashMap::new(),
            left: images.into_iter(),
        })
    }
}

impl Verification {
    /// Verifies the next image; nothing when all are done.
    ///
    /// # Errors
    /// Something cannot be read for another reason than damage.
    pub async fn next(&mut self) -> Result<Option<VerifyReport>> {
        let Some(image) = self.left.next() else { return Ok(None) };
        // Its layers stay while they are read.
        let Some(hold) = self.store.hold(image.id.as_str()).await? else {
            return Box::pin(self.next()).await;
        };
        let (mut faults, mut verified, mut lost) = (self.documents(&image).await?, 0, 0);
        let details = self.store.look_up(image.id.as_str())?.map(|(_, details)| details).unwrap_or_default();
        // Who noted either kept tapes.
        let has_tapes = details.manifest.is_some() || details.origin != Origin::Unknown;
        for (n, chain) in image.layers.iter().enumerate() {
            let diff_id = image.config.diff_ids.get(n).map(ToString::to_string).unwrap_or_default();
            let found = match self.known.get(chain) {
                Some(found) => found.clone(),
                None => {
                    let found = compare(&self.store, &image, chain, &diff_id).await?;
                    self.known.insert(chain.clone(), found.clone());
                    found
                }
            };
            match found {
                Some(found) => {
                    verified += 1;
                    faults.extend(found.into_iter().map(|f| format!("layer {}: {f}", n + 1)));
                }
                None => lost += usize::from(has_tapes),
            }
        }
        drop(hold);
        let mut removed = false;
        if self.repair && !faults.is_empty() {
            match self.store.remove_unused(image.id.as_str()).await {
                Ok(_) => removed = true,
                Err(Error::InUse { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Some(VerifyReport { image, verified, lost, faults, removed }))
    }

    /// Config and manifest.
    async fn documents(&self, image: &ImageRecord) -> Result<Vec<String>> {
        let (store, id) = (self.store.clone(), image.id.clone());
        blocking(move || {
            let mut faults = Vec::new();
            match store.records.config_blob(&id) {
                Ok(blob) if Digest::of(&blob) == id => {}
                Ok(_) => faults.push("its config has another digest".to_owned()),
                Err(error) => faults.push(format!("its config: {error}")),
            }
            let note = store.look_up(id.as_str())?.and_then(|(_, details)| details.manifest);
            if let Some(note) = note
                && store.records.manifest_blob(&id, &note)?.is_none()
            {
                faults.push("its manifest has another digest or is missing".to_owned());
            }
            Ok(faults)
        })
        .await
    }
}

/// What is wrong with a layer, its files' attributes included; nothing where it cannot be told.
async fn compare(
    store: &Store,
    image: &ImageRecord,
    chain: &ChainId,
    diff_id: &str,
) -> Result<Option<Vec<String>>> {
    let tape = store.records.tape_path(chain);
    if !tape.exists() {
        return Ok(None);
    }
    let view = match store.driver.open_layer(chain).await {
        Ok(view) => view,
        Err(moxlet_storage::Error::LayerNotFound(_)) => return Ok(Some(vec!["it is missing".to_owned()])),
        Err(error) => return Err(error.into()),
    };
    let (style, bottom) = (store.driver.whiteouts(), image.layers.first() == Some(chain));
    let expected = diff_id.to_owned();
    blocking(move || {
        let faults = match layer::check(view.path(), &tape, style, bottom) {
            Ok(check) => {
                let mut faults = check.differences;
                faults.truncate(MAX_FAULTS);
                if faults.is_empty() && check.diff_id.as_str() != expected {
                    faults.push(format!("its content has digest {}, expected {expected}", check.diff_id));
                }
                faults
            }
            Err(error) => vec![format!("it cannot be compared: {error}")],
        };
        Ok(Some(faults))
    })
    .await
}
