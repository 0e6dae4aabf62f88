//! Records of another store, taken over with all that is known of their images.
//!
//! What this store has stays: a tag that is another image's here is not taken from it. Done a second time nothing changes.

use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
    sync::Arc,
};

use jiff::Timestamp;
use moxlet_ids::ChainId;

use super::{
    DirLock, Store, blocking,
    change::next_serial,
    details::{Access, Stored},
    lock,
    records::{Damaged, Records},
};
use crate::{ImageRecord, Result};

/// The records of the other store. They are only read.
pub(crate) struct SourceRecords {
    records: Arc<Records>,
    /// The images, the oldest one first.
    images: Vec<Stored>,
    pub(crate) damaged: Damaged,
}

/// What became of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Adopted {
    /// Whether it was here.
    pub(crate) known: bool,
    /// Whether its record had to be written.
    pub(crate) written: bool,
    /// Its tags that are another image's here.
    pub(crate) tags_left: Vec<String>,
    /// Whether those who had shown that they may have it have to show it again, since the stores' salts differ.
    pub(crate) access_left: bool,
}

impl SourceRecords {
    /// Reads the records of a store whose finished layers are these.
    pub(crate) async fn read(dir: PathBuf, lock: DirLock, layers: HashSet<ChainId>) -> Result<Self> {
        blocking(move || {
            let records = Records::look(dir, lock);
            let (images, damaged) = records.read_all(&layers)?;
            Ok(Self { records: Arc::new(records), images, damaged })
        })
        .await
    }

    /// The images, the oldest one first.
    pub(crate) fn images(&self) -> Vec<ImageRecord> {
        self.images.iter().map(|s| s.record.clone()).collect()
    }
}

impl Store {
    /// Takes over the salt of the other store, if this one has none. Whether both have the same then.
    pub(crate) async fn adopt_salt(self: &Arc<Self>, from: &SourceRecords) -> Result<bool> {
        let (store, from) = (Arc::clone(self), Arc::clone(&from.records));
        self.writing(move || store.records.adopt_salt(&from)).await
    }

    /// Takes over the tapes of layers, which have to be pinned or here.
    pub(crate) async fn adopt_tapes(
        self: &Arc<Self>,
        from: &SourceRecords,
        layers: Vec<ChainId>,
    ) -> Result<()> {
        let (store, from) = (Arc::clone(self), Arc::clone(&from.records));
        self.writing(move || layers.iter().try_for_each(|l| store.records.adopt_tape(&from, l))).await
    }

    /// Takes over an image whose layers are all here; `same_salt` says whether digests of credentials mean the same in both.
    pub(crate) async fn adopt(
        self: &Arc<Self>,
        from: &SourceRecords,
        image: &ImageRecord,
        same_salt: bool,
    ) -> Result<Option<Adopted>> {
        let Some(stored) = from.images.iter().find(|s| s.record.id == image.id).cloned() else {
            return Ok(None);
        };
        let (store, from) = (Arc::clone(self), Arc::clone(&from.records));
        self.writing(move || store.adopt_now(&from, stored, same_salt).map(Some)).await
    }

    fn adopt_now(&self, from: &Records, mut theirs: Stored, same_salt: bool) -> Result<Adopted> {
        let _writer = lock(&self.writer);
        let id = theirs.record.id.clone();
        let (known, taken, serial) = {
            let images = lock(&self.images);
            let others = images.values().filter(|s| s.record.id != id);
            let taken: HashSet<String> = others.flat_map(|s| s.record.repo_tags.clone()).collect();
            (images.get(&id).cloned(), taken, next_serial(&images))
        };
        let tags_left = theirs.record.repo_tags.iter().filter(|t| taken.contains(*t)).cloned().collect();
        theirs.lose_tags(|t| taken.contains(t));
        let access_left = !same_salt && forget_proofs(&mut theirs.details.access);
        let used = from.last_used(&id);
        let merged = match &known {
            Some(ours) => merge(ours.clone(), theirs),
            None => Stored { serial, ..theirs },
        };
        let same = |ours: &Stored| (&ours.record, &ours.details) == (&merged.record, &merged.details);
        let written = !known.as_ref().is_some_and(same);
        if written {
            if known.is_none() {
                self.records.write_config(&id, &from.config_blob(&id)?)?;
            }
            self.adopt_manifest(from, &merged)?;
            self.put(merged)?;
        }
        self.adopt_use(&id, known.is_some(), used)?;
        Ok(Adopted { known: known.is_some(), written, tags_left, access_left })
    }

    /// The manifest that a record names, unless it is here.
    fn adopt_manifest(&self, from: &Records, image: &Stored) -> Result<()> {
        let (id, Some(note)) = (&image.record.id, &image.details.manifest) else { return Ok(()) };
        if self.records.manifest_blob(id, note)?.is_some() {
            return Ok(());
        }
        match from.manifest_blob(id, note)? {
            Some(bytes) => self.records.write_manifest(&bytes),
            None => Ok(()),
        }
    }

    /// The later one of both last uses; that of a config which has just been written is none.
    fn adopt_use(&self, id: &moxlet_ids::Digest, known: bool, used: Option<Timestamp>) -> Result<()> {
        match used {
            Some(used) if !known || self.records.last_used(id).is_none_or(|ours| ours < used) => {
                self.records.set_last_used(id, used)
            }
            _ => Ok(()),
        }
    }
}

/// What both stores know of an image. Where only one can be right, this store is.
fn merge(mut ours: Stored, theirs: Stored) -> Stored {
    let names = [
        (&mut ours.record.repo_tags, theirs.record.repo_tags),
        (&mut ours.record.repo_digests, theirs.record.repo_digests),
    ];
    for (ours, theirs) in names {
        for name in theirs {
            if !ours.contains(&name) {
                ours.push(name);
            }
        }
    }
    match (theirs.record.pinned, theirs.details.pinned_tags.is_empty()) {
        (true, true) => {
            ours.record.pinned = true;
            ours.details.pinned_tags.clear();
        }
        (true, false) => ours.pin_by(theirs.details.pinned_tags),
        (false, _) => {}
    }
    if ours.details.blobs.is_empty() {
        ours.details.blobs = theirs.details.blobs;
    }
    if ours.details.manifest.is_none() {
        ours.details.manifest = theirs.details.manifest;
    }
    for (repository, access) in theirs.details.access {
        ours.details.access.entry(repository).or_default().add(&access);
    }
    for (chain, blob) in theirs.details.pushed {
        ours.details.pushed.entry(chain).or_insert(blob);
    }
    ours
}

/// Forgets credentials, but not that some were needed; whether there were any.
fn forget_proofs(access: &mut BTreeMap<String, Access>) -> bool {
    let mut any = false;
    for one in access.values_mut() {
        any |= !one.credentials.is_empty();
        one.credentials.clear();
    }
    any
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use std::path::Path;

    use moxlet_ids::Digest;
    use moxlet_storage::OverlayDriver;

    use super::{super::Details, *};
    use crate::Config;

    const CONFIG: &str =
        r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"author":"NAME"}"#;

    async fn store(dir: &Path) -> Arc<Store> {
        let driver = Arc::new(OverlayDriver::open(&dir.join("driver")).await.unwrap());
        let config = Config { dir: dir.join("images"), ..Config::default() };
        let lock = DirLock::take(&config.dir).unwrap();
        Store::open(config, driver, lock).await.unwrap()
    }

    /// An image without layers.
    fn put(store: &Store, name: &str, tags: &[&str], serial: u64, access: Option<&str>) -> Digest {
        let blob = CONFIG.replace("NAME", name).into_bytes();
        let id = Digest::of(&blob);
        let mut details = Details::default();
        if let Some(proof) = access {
            let known = Access { anyone: false, credentials: [proof.to_owned()].into() };
            details.access.insert("r.example/a".into(), known);
        }
        let record = ImageRecord {
            id: id.clone(),
            repo_tags: tags.iter().map(|t| (*t).to_owned()).collect(),
            repo_digests: Vec::new(),
            size_bytes: 1,
            layers: Vec::new(),
            pinned: name == "one",
            config: Arc::new(crate::ImageConfig::read(&blob).unwrap()),
        };
        store.records.write_config(&id, &blob).unwrap();
        store.put(Stored { record, serial, details }).unwrap();
        store.records.set_last_used(&id, "2026-01-02T03:04:05Z".parse().unwrap()).unwrap();
        id
    }

    async fn source(dir: &Path) -> SourceRecords {
        let lock = DirLock::take(&dir.join("images")).unwrap();
        SourceRecords::read(dir.join("images"), lock, HashSet::new()).await.unwrap()
    }

    async fn adopt_all(to: &Arc<Store>, from: &SourceRecords) -> Vec<Adopted> {
        let same_salt = to.adopt_salt(from).await.unwrap();
        let mut all = Vec::new();
        for image in from.images() {
            all.push(to.adopt(from, &image, same_salt).await.unwrap().unwrap());
        }
        all
    }

    #[tokio::test]
    async fn all_that_is_known_of_an_image_comes_along_and_a_second_time_nothing_changes() {
        let (from_dir, to_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let from = store(from_dir.path()).await;
        let (two, one) = (
            put(&from, "two", &["r.example/a:2"], 2, None),
            put(&from, "one", &["r.example/a:1"], 1, Some("p")),
        );
        let salt = from.records.salt().unwrap();
        drop(from);
        let from = source(from_dir.path()).await;
        let to = store(to_dir.path()).await;
        let first = adopt_all(&to, &from).await;
        assert!(first.iter().all(|a| !a.known && a.written && a.tags_left.is_empty() && !a.access_left));
        let (record, details) = to.look_up("r.example/a:1").unwrap().unwrap();
        assert_eq!((record.id, record.pinned), (one.clone(), true));
        assert!(details.access["r.example/a"].credentials.contains("p"));
        assert_eq!(to.records.salt().unwrap(), salt);
        assert_eq!(to.last_used(&two).unwrap(), "2026-01-02T03:04:05Z".parse().unwrap());
        let serial = |id| lock(&to.images)[id].serial;
        assert!(serial(&one) < serial(&two), "their order stays");
        drop(to);
        // The records are whole: an opening finds nothing to complain of.
        let to = store(to_dir.path()).await;
        assert_eq!(to.list().len(), 2);
        assert!(adopt_all(&to, &from).await.iter().all(|a| a.known && !a.written));
    }

    #[tokio::test]
    async fn what_the_other_store_has_stays_and_credentials_under_another_salt_prove_nothing() {
        let (from_dir, to_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let from = store(from_dir.path()).await;
        let one = put(&from, "one", &["r.example/a:1", "r.example/a:2"], 1, Some("p"));
        from.records.salt().unwrap();
        drop(from);
        let from = source(from_dir.path()).await;
        let to = store(to_dir.path()).await;
        let other = put(&to, "other", &["r.example/a:1"], 7, None);
        to.records.salt().unwrap();
        let adopted = adopt_all(&to, &from).await.remove(0);
        assert_eq!(
            (adopted.tags_left.as_slice(), adopted.access_left),
            (&["r.example/a:1".to_owned()][..], true)
        );
        assert_eq!(to.resolve("r.example/a:1").unwrap().unwrap().id, other);
        let (record, details) = to.look_up("r.example/a:2").unwrap().unwrap();
        assert_eq!(record.id, one);
        let access = &details.access["r.example/a"];
        assert!(!access.anyone && access.credentials.is_empty(), "nobody gets it unasked");
    }

    #[tokio::test]
    async fn a_damaged_record_is_left_out_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let from = store(dir.path()).await;
        put(&from, "one", &["r.example/a:1"], 1, None);
        drop(from);
        let path = dir.path().join("images/images").join(format!("{}.json", Digest::of(b"x").hex()));
        std::fs::write(&path, "{").unwrap();
        let from = source(dir.path()).await;
        assert_eq!((from.images().len(), from.damaged.len()), (1, 1));
        assert!(path.exists());
    }
}
