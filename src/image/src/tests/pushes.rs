//! Pushes into a real registry.

use super::{uploads::Real, *};
use crate::{Compression, Error, RootfsOptions, feed, layer::tests::Tar};

async fn made(place: &Place) -> crate::ImageRecord {
    let (feed, source) = feed();
    let options = RootfsOptions { name: Some("mine:1".into()), ..RootfsOptions::default() };
    let give = async {
        let big = "0123456789".repeat(100_000);
        feed.send(Tar::default().file("etc/issue", "hello").file("big", &big).end().into()).await;
        feed.end().await;
    };
    tokio::join!(place.store.import_rootfs(source, options), give).0.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_a_root_file_system_is_pushed_and_pulled_as_the_same() {
    let (real, one, two) = (Real::start().await, Place::new().await, Place::new().await);
    let record = made(&one).await;
    let (gzip, zstd) = (real.reference("a/app:gzip").to_string(), real.reference("b/app:zstd").to_string());
    let first = one.store.push("mine:1", Some(&gzip), &[], Compression::Gzip).await.unwrap();
    assert_eq!(one.store.push("mine:1", Some(&gzip), &[], Compression::Gzip).await.unwrap(), first);
    let pulled = two.store.pull(&gzip, &[]).await.unwrap();
    assert_eq!((&pulled.id, &pulled.layers), (&record.id, &record.layers));
    two.store.remove(&gzip).await.unwrap();
    let other = Place::new().await;
    let anew = made(&other).await;
    other.store.push("mine:1", Some(&zstd), &[], Compression::Zstd).await.unwrap();
    assert_eq!(two.store.pull(&zstd, &[]).await.unwrap().id, anew.id);
    let inspected = two.store.inspect(&zstd).await.unwrap().unwrap();
    assert!(inspected.layers[0].blob.as_ref().unwrap().media_type.ends_with("+zstd"));
    assert_eq!(two.read(&pulled.layers, &["etc/issue"]).await, [Some("hello".into())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pulled_image_keeps_its_digest_within_its_registry() {
    let (real, one, two) = (Real::start().await, Place::new().await, Place::new().await);
    made(&one).await;
    let source = real.reference("a/app:1").to_string();
    let digest = one.store.push("mine:1", Some(&source), &[], Compression::Gzip).await.unwrap();
    two.store.pull(&source, &[]).await.unwrap();
    let target = real.reference("team/copy:1").to_string();
    two.store.tag(&source, &target).await.unwrap();
    assert_eq!(two.store.push(&target, None, &[], Compression::Zstd).await.unwrap(), digest);
    let named = format!("{}@{digest}", real.reference("team/copy:1").name());
    assert!(two.store.resolve(&target).await.unwrap().unwrap().repo_digests.contains(&named));
    assert!(matches!(
        two.store.push("nothing:1", None, &[], Compression::Gzip).await,
        Err(Error::Missing(_))
    ));
    let nowhere = two.store.push(&target, Some("127.0.0.1:1/x:1"), &[], Compression::Gzip).await;
    assert!(matches!(nowhere, Err(Error::Push { .. })), "{nowhere:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_asked_for_by_its_id_is_pushed_to_a_target_only() {
    let (real, one) = (Real::start().await, Place::new().await);
    let record = made(&one).await;
    let id = record.id.as_str();
    for text in [id, record.id.hex(), &record.id.hex()[..12], &id[..20]] {
        for target in [None, Some(text)] {
            let outcome = one.store.push(text, target, &[], Compression::Gzip).await;
            let error = outcome.unwrap_err();
            assert!(matches!(&error, Error::Push { reason, .. } if reason.contains("target")), "{error}");
        }
        let target = real.reference("a/app:1").to_string();
        one.store.push(text, Some(&target), &[], Compression::Gzip).await.unwrap();
    }
    // Whatever looks like the beginning of an id and is a name goes where the name says.
    let name = real.reference("a/b:1").to_string();
    one.store.tag("mine:1", &name).await.unwrap();
    one.store.push(&name, Some(&name), &[], Compression::Gzip).await.unwrap();
}
