//! Names that move, removal, and what a restart finds.

use std::fs;

use tokio::sync::Semaphore;

use super::{registry::Fault, *};
use crate::{Error, layer::tests::Tar};

fn image(layers: &[&str]) -> Image {
    layers.iter().fold(Image::new(), |image, name| image.layer(Tar::default().file(name, name)))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_moves_leaves_its_old_image() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let (old, new) = (image(&["base", "old"]), image(&["base", "new"]));
    let digest = registry.push("a:1", &old);
    let name = registry.name("a:1");
    place.store.pull(&name, &[]).await.unwrap();
    registry.push("a:1", &new);
    place.store.pull(&name, &[]).await.unwrap();
    let place = place.reopen().await;
    assert_eq!(place.store.resolve(&name).await.unwrap().unwrap().id, new.id());
    let left = place.store.resolve(old.id().as_str()).await.unwrap().unwrap();
    assert!(left.repo_tags.is_empty());
    assert_eq!(left.repo_digests, [registry.name(&format!("a@{digest}"))]);
    place.store.remove(old.id().as_str()).await.unwrap();
    assert_eq!(place.layers().await, 2, "the shared layer and the new one");
    assert_eq!(place.store.list().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_goes_with_its_last_name_or_by_its_id() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let both = image(&["x", "y"]);
    registry.push("a:1", &both);
    registry.push("a:2", &both);
    let (one, two) = (registry.name("a:1"), registry.name("a:2"));
    place.store.pull(&one, &[]).await.unwrap();
    assert_eq!(place.store.pull(&two, &[]).await.unwrap().repo_tags, [one.clone(), two.clone()]);
    place.store.remove(&one).await.unwrap();
    place.store.remove(&one).await.unwrap();
    assert_eq!(place.store.resolve(&one).await.unwrap(), None);
    assert_eq!(place.layers().await, 2);
    place.store.remove(&two).await.unwrap();
    assert_eq!((place.layers().await, place.store.list().await.unwrap().len()), (0, 0));
    assert_eq!(fs::read_dir(place.dir.path().join("images/configs")).unwrap().count(), 0);

    place.store.pull(&one, &[]).await.unwrap();
    place.store.pull(&two, &[]).await.unwrap();
    place.store.remove(&both.id().hex()[..12]).await.unwrap();
    assert_eq!((place.layers().await, place.store.list().await.unwrap().len()), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_in_use_is_kept_and_collected_later() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    registry.push("a:1", &image(&["x"]));
    registry.push("b:1", &image(&["y"]));
    let record = place.store.pull(&registry.name("a:1"), &[]).await.unwrap();
    place.store.pull(&registry.name("b:1"), &[]).await.unwrap();
    let id = ContainerId::random();
    place.driver.create_root(&id, &record.layers, IdMap::default().into()).await.unwrap();
    place.store.remove(&registry.name("a:1")).await.unwrap();
    assert_eq!(place.layers().await, 2);
    let place = place.reopen().await;
    assert_eq!(place.layers().await, 2);
    place.driver.remove_root(&id).await.unwrap();
    place.store.remove(&registry.name("b:1")).await.unwrap();
    assert_eq!(place.layers().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_does_not_take_the_layers_of_a_pull() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let pulled = image(&["quick", "slow"]);
    registry.push("a:1", &pulled);
    registry.push("b:1", &image(&["other"]));
    place.store.pull(&registry.name("b:1"), &[]).await.unwrap();
    let gate = Arc::new(Semaphore::new(0));
    registry.fault(&pulled.digest(1), Fault::Held(Arc::clone(&gate)));
    let (store, name) = (Arc::clone(&place.store), registry.name("a:1"));
    let pull = tokio::spawn(async move { store.pull(&name, &[]).await });
    eventually(|| async { place.layers().await == 2 }).await;
    place.store.remove(&registry.name("b:1")).await.unwrap();
    assert_eq!(place.layers().await, 1, "the one that the pull has finished");
    gate.add_permits(1);
    let record = pull.await.unwrap().unwrap();
    let seen = place.read(&record.layers, &["quick", "slow"]).await;
    assert_eq!(seen, [Some("quick".into()), Some("slow".into())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_has_left_goes_when_the_store_opens() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    registry.push("a:1", &image(&["x"]));
    let record = place.store.pull(&registry.name("a:1"), &[]).await.unwrap();
    let images = place.dir.path().join("images");
    fs::write(images.join("tmp/half"), "x").unwrap();
    fs::write(images.join("configs").join("0".repeat(64)), "x").unwrap();
    let stray = ChainId::base(&moxlet_ids::Digest::of(b"stray"));
    let draft = place.driver.begin_layer(None).await.unwrap();
    place.driver.commit_layer(draft, &stray, moxlet_storage::Usage::default()).await.unwrap();
    let place = place.reopen().await;
    assert_eq!(place.store.list().await.unwrap(), [record]);
    assert_eq!(place.layers().await, 1);
    assert_eq!(fs::read_dir(images.join("tmp")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(images.join("configs")).unwrap().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_image_is_forgotten_and_can_be_pulled_again() {
    let (registry, mut place) = (Registry::start().await, Place::new().await);
    let names = ["a:1", "b:1", "c:1"].map(|n| registry.name(n));
    let mut records = Vec::new();
    for (n, name) in ["a:1", "b:1", "c:1"].iter().zip(&names) {
        registry.push(n, &image(&[n]));
        records.push(place.store.pull(name, &[]).await.unwrap());
    }
    let images = place.dir.path().join("images");
    fs::write(images.join("images").join(format!("{}.json", records[0].id.hex())), "{").unwrap();
    fs::write(images.join("configs").join(records[1].id.hex()), "{}").unwrap();
    place.driver.remove_layer(&records[2].layers[0]).await.unwrap();
    place = place.reopen().await;
    assert!(place.store.list().await.unwrap().is_empty());
    for (name, record) in names.iter().zip(&records) {
        assert_eq!(place.store.resolve(name).await.unwrap(), None);
        assert_eq!(place.store.pull(name, &[]).await.unwrap(), *record);
    }
    assert_eq!(place.layers().await, 3);
}

/// The same image twice: its layer is compressed in two ways, so that the manifests differ.
fn compressed_twice() -> [Image; 2] {
    let tar = Tar::default().file("x", "x").end();
    ["fast", "best"].map(|level| {
        let level = if level == "fast" { flate2::Compression::fast() } else { flate2::Compression::none() };
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
        std::io::Write::write_all(&mut encoder, &tar).unwrap();
        Image::new().blob(tar.clone(), encoder.finish().unwrap())
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_ends_between_manifest_and_record_leaves_the_image_whole() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let [first, second] = compressed_twice();
    assert_eq!(first.id(), second.id());
    registry.push("a:1", &first);
    let name = registry.name("a:1");
    let record = place.store.pull(&name, &[]).await.unwrap();
    let manifest = place.store.inspect(&name).await.unwrap().unwrap().manifest.unwrap().digest;
    let images = place.dir.path().join("images");
    let manifests = || fs::read_dir(images.join("manifests")).unwrap().count();
    // Its record cannot be written.
    let (path, aside) =
        (images.join("images").join(format!("{}.json", record.id.hex())), place.dir.path().join("aside"));
    fs::rename(&path, &aside).unwrap();
    fs::create_dir(&path).unwrap();
    registry.push("a:1", &second);
    place.store.pull(&name, &[]).await.unwrap_err();
    fs::remove_dir(&path).unwrap();
    fs::rename(&aside, &path).unwrap();

    let report = place.store.verify(&[], true).unwrap().next().await.unwrap().unwrap();
    assert_eq!((report.faults.as_slice(), report.removed), (&[][..], false));
    let place = place.reopen().await;
    let inspected = place.store.inspect(&name).await.unwrap().unwrap();
    assert_eq!(inspected.manifest.unwrap().digest, manifest);
    assert_eq!(manifests(), 1, "the other one goes at the next start");
    place.store.pull(&name, &[]).await.unwrap();
    let inspected = place.store.inspect(&name).await.unwrap().unwrap();
    assert_ne!(inspected.manifest.unwrap().digest, manifest);
    assert_eq!(manifests(), 1, "and the old one when the new one is recorded");
    place.store.remove(&name).await.unwrap();
    assert_eq!(manifests(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_under_the_name_that_it_first_had_is_found() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    registry.push("a:1", &image(&["x"]));
    let name = registry.name("a:1");
    let record = place.store.pull(&name, &[]).await.unwrap();
    let manifest = place.store.inspect(&name).await.unwrap().unwrap().manifest.unwrap().digest;
    let dir = place.dir.path().join("images/manifests");
    fs::rename(dir.join(manifest.hex()), dir.join(record.id.hex())).unwrap();
    assert!(place.store.inspect(&name).await.unwrap().unwrap().manifest.is_some(), "in a store that is read");
    let place = place.reopen().await;
    assert_eq!(place.store.inspect(&name).await.unwrap().unwrap().manifest.unwrap().digest, manifest);
    assert!(dir.join(manifest.hex()).exists() && !dir.join(record.id.hex()).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_without_its_tape_is_whole_again_once_every_image_that_has_it_was_removed() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    registry.push("a:1", &image(&["base", "a"]));
    registry.push("b:1", &image(&["base", "b"]));
    let (one, other) = (registry.name("a:1"), registry.name("b:1"));
    let record = place.store.pull(&one, &[]).await.unwrap();
    place.store.pull(&other, &[]).await.unwrap();
    let tape = format!("images/layers/{}.tape", record.layers[0].digest().hex());
    fs::remove_file(place.dir.path().join(tape)).unwrap();
    place.store.remove(&one).await.unwrap();
    place.store.pull(&one, &[]).await.unwrap();
    let error = place.store.export(std::slice::from_ref(&one)).await.map(drop).unwrap_err();
    assert!(matches!(error, Error::NotRestorable { .. }), "{error}");
    assert!(error.to_string().contains("remove every image that has this layer"), "{error}");
    for name in [&one, &other] {
        place.store.remove(name).await.unwrap();
    }
    place.store.pull(&one, &[]).await.unwrap();
    place.store.export(&[one]).await.map(drop).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_of_two_images_is_the_younger_ones() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let (old, new) = (image(&["old"]), image(&["new"]));
    registry.push("a:1", &old);
    let name = registry.name("a:1");
    place.store.pull(&name, &[]).await.unwrap();
    let path = place.dir.path().join("images/images").join(format!("{}.json", old.id().hex()));
    let before = fs::read(&path).unwrap();
    registry.push("a:1", &new);
    place.store.pull(&name, &[]).await.unwrap();
    // As if the machine had stopped between the two writes.
    fs::write(&path, before).unwrap();
    let place = place.reopen().await;
    assert_eq!(place.store.resolve(&name).await.unwrap().unwrap().id, new.id());
    assert!(place.store.resolve(old.id().as_str()).await.unwrap().unwrap().repo_tags.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_of_a_newer_version_stops_the_opening() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    registry.push("a:1", &image(&["x"]));
    let record = place.store.pull(&registry.name("a:1"), &[]).await.unwrap();
    let path = place.dir.path().join("images/images").join(format!("{}.json", record.id.hex()));
    fs::write(&path, r#"{"version": 99, "new": true}"#).unwrap();
    let Place { dir, config, driver, store } = place;
    drop((driver, store));
    let (driver, store) = open(dir.path(), config).await;
    assert!(matches!(store.map(|_| ()), Err(Error::TooNew { version: 99, .. })));
    assert_eq!(driver.layers().await.unwrap().len(), 1, "nothing of it is removed");
}
