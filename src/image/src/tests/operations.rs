//! What is done with images that are here: holding, tagging, pinning, removing, mounting, collecting.

use std::{fs, time::Duration};

use super::*;
use crate::{Error, GarbagePolicy, Origin, Removed, User, layer::tests::Tar};

fn image(layers: &[&str]) -> Image {
    layers.iter().fold(Image::new(), |image, name| image.layer(Tar::default().file(name, name)))
}

/// A store with images of these names, each of one layer.
async fn with_images(names: &[&str]) -> (Registry, Place, Vec<String>) {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let mut full = Vec::new();
    for name in names {
        registry.push(name, &image(&[name]));
        full.push(registry.name(name));
        place.store.pull(&registry.name(name), &[]).await.unwrap();
    }
    (registry, place, full)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_opener_is_refused_by_name() {
    let place = Place::new().await;
    let (_, second) = open(place.dir.path(), place.config.clone()).await;
    let error = second.map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Locked { .. }));
    assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_of_the_first_version_is_read_and_completed_by_a_pull() {
    let (_registry, place, names) = with_images(&["a:1"]).await;
    let record = place.store.resolve(&names[0]).await.unwrap().unwrap();
    let path = place.dir.path().join("images/images").join(format!("{}.json", record.id.hex()));
    let old = serde_json::json!({
        "version": 1, "serial": 7, "id": record.id.as_str(), "repo_tags": record.repo_tags,
        "repo_digests": record.repo_digests, "size_bytes": record.size_bytes,
        "layers": record.layers.iter().map(ToString::to_string).collect::<Vec<_>>(),
    });
    fs::write(&path, old.to_string()).unwrap();
    let place = place.reopen().await;
    let inspected = place.store.inspect(&names[0]).await.unwrap().unwrap();
    assert_eq!((inspected.origin, inspected.manifest.is_some()), (Origin::Unknown, false));
    assert!(inspected.layers[0].blob.is_none());
    place.store.pull(&names[0], &[]).await.unwrap();
    let place = place.reopen().await;
    let inspected = place.store.inspect(&names[0]).await.unwrap().unwrap();
    assert_eq!(inspected.origin, Origin::Pulled);
    assert!(inspected.manifest.is_some() && inspected.layers[0].blob.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_image_keeps_its_layers_after_it_is_removed() {
    let (_registry, place, names) = with_images(&["a:1", "b:1"]).await;
    let hold = place.store.hold(&names[0]).await.unwrap().unwrap();
    assert!(matches!(place.store.remove_unused(&names[0]).await, Err(Error::InUse { .. })));
    assert_eq!(place.store.prune(Duration::ZERO).await.unwrap().removed.len(), 1, "the other one");
    place.store.remove(&names[0]).await.unwrap();
    assert_eq!(place.layers().await, 1);
    let seen = place.read(&hold.record().layers, &["a:1"]).await;
    assert_eq!(seen, [Some("a:1".into())]);
    drop(hold);
    place.store.prune(Duration::ZERO).await.unwrap();
    let place = place.reopen().await;
    assert_eq!(place.layers().await, 0);
    assert!(place.store.hold(&names[0]).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_is_given_and_goes_from_whoever_had_it() {
    let (_registry, place, names) = with_images(&["a:1", "b:1"]).await;
    place.store.tag(&names[0], "mine").await.unwrap();
    let second = place.store.tag(&names[1], "mine:latest").await.unwrap();
    let place = place.reopen().await;
    let found = place.store.resolve("mine").await.unwrap().unwrap();
    assert_eq!(found, second);
    assert_eq!(found.repo_tags, [names[1].clone(), "docker.io/library/mine:latest".into()]);
    let first = place.store.resolve(&names[0]).await.unwrap().unwrap();
    assert_eq!(first.repo_tags, [names[0].clone()]);
    assert!(matches!(place.store.tag("nothing:1", "x").await, Err(Error::Missing(_))));
    let by_digest = format!("x@{}", found.id);
    assert!(matches!(place.store.tag(&names[0], &by_digest).await, Err(Error::InvalidName { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_in_use_loses_names_but_not_the_last_one() {
    let (_registry, place, names) = with_images(&["a:1"]).await;
    place.store.tag(&names[0], "mine").await.unwrap();
    let record = place.store.resolve("mine").await.unwrap().unwrap();
    let id = ContainerId::random();
    place.driver.create_root(&id, &record.layers, IdMap::default().into()).await.unwrap();
    let mine = "docker.io/library/mine:latest".to_owned();
    assert_eq!(place.store.remove_unused("mine").await.unwrap(), Removed::Name(mine));
    let error = place.store.remove_unused(&names[0]).await.unwrap_err();
    assert!(matches!(&error, Error::InUse { by, .. } if *by == [User::Container(id.clone())]), "{error}");
    assert!(error.to_string().contains(id.as_str()), "{error}");
    assert!(matches!(place.store.remove_unused(record.id.as_str()).await, Err(Error::InUse { .. })));
    assert_eq!(place.store.inspect(&names[0]).await.unwrap().unwrap().in_use_by, [format!("container {id}")]);
    place.driver.remove_root(&id).await.unwrap();
    assert!(matches!(place.store.remove_unused(&names[0]).await.unwrap(), Removed::Image(_)));
    assert_eq!(place.store.remove_unused(&names[0]).await.unwrap(), Removed::Nothing);
    assert_eq!(place.layers().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_goes_with_the_tag_that_it_was_made_by() {
    let (registry, place, names) = with_images(&["a:1", "b:1"]).await;
    let (a, b) = (&names[0], &names[1]);
    let old = place.store.set_pinned(a, true).await.unwrap();
    let by_id = place.store.resolve(b).await.unwrap().unwrap().id;
    assert!(old.pinned && place.store.set_pinned(by_id.as_str(), true).await.unwrap().pinned);
    for name in ["a:1", "b:1"] {
        registry.push(name, &image(&[&format!("new {name}")]));
        place.store.pull(&registry.name(name), &[]).await.unwrap();
    }
    let place = place.reopen().await;
    let pinned = async |text: &str| place.store.resolve(text).await.unwrap().unwrap().pinned;
    assert!(pinned(a).await && !pinned(old.id.as_str()).await, "the pin has moved");
    assert!(!pinned(b).await && pinned(by_id.as_str()).await, "the pin has stayed");
    // A pin by two tags goes with the last one.
    place.store.tag(a, "mine").await.unwrap();
    place.store.set_pinned("mine", true).await.unwrap();
    place.store.remove(a).await.unwrap();
    assert!(pinned("mine").await);
    place.store.set_pinned("mine", false).await.unwrap();
    assert!(!pinned("mine").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_has_come_into_use_since_it_was_chosen_stays() {
    let (_registry, place, names) = with_images(&["a:1"]).await;
    let hold = place.store.hold(&names[0]).await.unwrap().unwrap();
    let record = hold.record().clone();
    // A container gets its root, and lets go of the image, while it is looked for users.
    let users = place.store.store.users().await.unwrap();
    let id = ContainerId::random();
    place.driver.create_root(&id, &record.layers, IdMap::default().into()).await.unwrap();
    drop(hold);
    assert_eq!(users.of(&record), [User::Starting]);
    // It was a candidate before there was the root.
    assert_eq!(place.store.store.remove_idle(&record.id).await.unwrap(), None);
    assert!(place.store.resolve(&names[0]).await.unwrap().is_some());
    place.driver.remove_root(&id).await.unwrap();
    assert!(place.store.store.remove_idle(&record.id).await.unwrap().is_some_and(|freed| freed > 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_collection_spares_what_is_pinned_in_use_or_young() {
    let (_registry, place, names) = with_images(&["pinned:1", "used:1", "idle:1"]).await;
    place.store.set_pinned(&names[0], true).await.unwrap();
    let used = place.store.resolve(&names[1]).await.unwrap().unwrap();
    let id = ContainerId::random();
    place.driver.create_root(&id, &used.layers, IdMap::default().into()).await.unwrap();
    let place = place.reopen().await;
    let always = GarbagePolicy { high_percent: 0, low_percent: 0, ..GarbagePolicy::default() };
    let young = place.store.collect_garbage(&always).await.unwrap();
    assert!(young.removed.is_empty() && young.fell_short(), "{young:?}");
    let policy = GarbagePolicy { min_age: Duration::ZERO, ..always };
    let done = place.store.collect_garbage(&policy).await.unwrap();
    let gone: Vec<_> = done.removed.iter().map(|r| r.repo_tags.clone()).collect();
    assert_eq!(gone, [vec![names[2].clone()]]);
    assert!(done.fell_short() && done.failures.is_empty());
    let left: Vec<_> =
        place.store.list().await.unwrap().into_iter().map(|r| (r.repo_tags, r.pinned)).collect();
    assert_eq!(left.len(), 2);
    assert!(left.contains(&(vec![names[0].clone()], true)));
    place.driver.remove_root(&id).await.unwrap();
    place.store.set_pinned(&names[0], false).await.unwrap();
    assert_eq!(place.store.prune(Duration::ZERO).await.unwrap().removed.len(), 2);
    assert_eq!(place.layers().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_unused_for_too_long_goes_with_space_to_spare() {
    let (_registry, place, names) = with_images(&["old:1", "new:1"]).await;
    let old = place.store.resolve(&names[0]).await.unwrap().unwrap();
    // As if the clock had gone on: the times of both the record and the last use.
    let images = place.dir.path().join("images");
    let path = images.join("images").join(format!("{}.json", old.id.hex()));
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    record["added_at"] = "2001-01-01T00:00:00Z".into();
    fs::write(&path, record.to_string()).unwrap();
    let used = fs::File::options().append(true).open(images.join("configs").join(old.id.hex())).unwrap();
    used.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
    let place = place.reopen().await;
    let policy = GarbagePolicy {
        high_percent: 100,
        max_age: Some(Duration::from_secs(3600)),
        ..GarbagePolicy::default()
    };
    let done = place.store.collect_garbage(&policy).await.unwrap();
    assert_eq!(done.removed.iter().map(|r| &r.id).collect::<Vec<_>>(), [&old.id]);
    assert_eq!(done.wanted_bytes, 0);
    assert!(place.store.resolve(&names[1]).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_pulled_again_is_not_young_again() {
    let (registry, place, names) = with_images(&["old:1"]).await;
    let old = place.store.resolve(&names[0]).await.unwrap().unwrap();
    let path = place.dir.path().join("images/images").join(format!("{}.json", old.id.hex()));
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    record["added_at"] = "2001-01-01T00:00:00Z".into();
    fs::write(&path, record.to_string()).unwrap();
    let place = place.reopen().await;
    // By the name that is known, and by a new one, for which all of it is looked at.
    registry.push("old:2", &image(&["old:1"]));
    for name in ["old:1", "old:2"] {
        place.store.pull(&registry.name(name), &[]).await.unwrap();
    }
    assert_eq!(place.store.prune(Duration::from_secs(3600)).await.unwrap().removed.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mounted_image_is_read_only_and_keeps_its_layers() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    registry.push("a:1", &image(&["low", "high"]));
    let name = registry.name("a:1");
    place.store.pull(&name, &[]).await.unwrap();
    let target = place.dir.path().canonicalize().unwrap().join("seen");
    place.store.mount(&name, &target).await.unwrap();
    place.store.mount(&name, &target).await.unwrap();
    let seen = (fs::read_to_string(target.join("low")).ok(), fs::write(target.join("high"), "x").is_err());
    let refused = place.store.remove_unused(&name).await;
    place.store.remove(&name).await.unwrap();
    let kept = place.layers().await;
    let place = place.reopen().await;
    let (kept_after, mounts) = (place.layers().await, place.store.mounts().await.unwrap());
    place.store.unmount(&target).await.unwrap();
    assert_eq!(seen, (Some("low".into()), true));
    assert!(matches!(refused, Err(Error::InUse { by, .. }) if by == [User::Mount(target.clone())]));
    assert_eq!((kept, kept_after, mounts), (2, 2, vec![target.clone()]));
    assert_eq!(place.layers().await, 0);
    assert!(matches!(place.store.unmount(&target).await, Err(Error::MountPoint { .. })));
    assert!(matches!(place.store.mount(&name, &target).await, Err(Error::Missing(_))));
}
