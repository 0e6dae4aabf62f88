//! Imports, exports and verification; the round trip through an archive gives the same image.

use std::{collections::BTreeMap, fs, io::Write};

use futures::StreamExt;
use serde_json::json;
use tar::EntryType;

use super::*;
use crate::{Error, ImageRecord, Origin, RootfsOptions, feed, layer::tests::Tar};

fn rootfs() -> Vec<u8> {
    Tar::default()
        .dir("etc/")
        .file("etc/issue", "hello")
        .symlink("etc/link", "issue")
        .link("etc/hard", "etc/issue")
        .end()
}

async fn give(bytes: Vec<u8>, feed: crate::Feed) {
    for piece in bytes.chunks(1000) {
        if !feed.send(bytes::Bytes::copy_from_slice(piece)).await {
            return;
        }
    }
    feed.end().await;
}

async fn make(place: &Place, bytes: Vec<u8>, options: RootfsOptions) -> crate::Result<ImageRecord> {
    let (feed, source) = feed();
    tokio::join!(place.store.import_rootfs(source, options), give(bytes, feed)).0
}

async fn load(place: &Place, bytes: Vec<u8>, name: Option<&str>) -> crate::Result<Vec<ImageRecord>> {
    let (feed, source) = feed();
    let imported = tokio::join!(place.store.import(source, name), give(bytes, feed)).0?;
    assert!(imported.skipped.is_empty(), "{imported:?}");
    Ok(imported.images)
}

async fn load_some(place: &Place, bytes: Vec<u8>) -> crate::Result<crate::Imported> {
    let (feed, source) = feed();
    tokio::join!(place.store.import(source, None), give(bytes, feed)).0
}

async fn exported(place: &Place, images: &[&str]) -> Vec<u8> {
    let names: Vec<String> = images.iter().map(|i| (*i).to_owned()).collect();
    let mut stream = place.store.export(&names).await.unwrap();
    let mut all = Vec::new();
    while let Some(piece) = stream.next().await {
        all.extend_from_slice(&piece.unwrap());
    }
    all
}

fn named(name: &str) -> RootfsOptions {
    RootfsOptions { name: Some(name.into()), cmd: vec!["/bin/sh".into()], ..RootfsOptions::default() }
}

/// The members of an archive.
fn members(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in tar::Archive::new(archive).entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut content = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut content).unwrap();
        all.insert(entry.path().unwrap().display().to_string(), content);
    }
    all
}

fn archive(members: &BTreeMap<String, Vec<u8>>) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, content) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, content.as_slice()).unwrap();
    }
    tar.into_inner().unwrap()
}

/// What is half done lies in these; nothing may be left in them.
fn leftovers(place: &Place) -> Vec<String> {
    let all = ["images/tmp", "driver/tmp"]
        .into_iter()
        .flat_map(|d| fs::read_dir(place.dir.path().join(d)).unwrap());
    all.map(|e| e.unwrap().path().display().to_string()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_file_system_becomes_an_image_however_it_is_compressed() {
    let place = Place::new().await;
    let tar = rootfs();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(&tar).unwrap();
    let zstd = zstd::encode_all(tar.as_slice(), 1).unwrap();
    let mut ids = Vec::new();
    for bytes in [tar, gzip.finish().unwrap(), xz.finish().unwrap(), zstd] {
        ids.push(make(&place, bytes, named("mine:1")).await.unwrap().id);
    }
    ids.dedup();
    assert_eq!(ids.len(), 1, "the same files are the same image");
    let record = place.store.resolve("mine:1").await.unwrap().unwrap();
    assert_eq!(
        place.read(&record.layers, &["etc/hard", "etc/link"]).await,
        [Some("hello".into()), Some("hello".into())]
    );
    let place = place.reopen().await;
    let inspected = place.store.inspect("mine:1").await.unwrap().unwrap();
    assert_eq!(inspected.origin, Origin::Imported);
    let config: serde_json::Value = serde_json::from_str(inspected.config.get()).unwrap();
    assert_eq!(config["config"]["Cmd"][0], "/bin/sh");
    assert!(inspected.layers[0].restorable);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_root_file_system_is_refused_and_leaves_nothing() {
    let place = Place::new().await;
    let (cut, source) = feed();
    let import = place.store.import_rootfs(source, named("mine:1"));
    let give = async {
        cut.send(rootfs()[..700].to_vec().into()).await;
        drop(cut);
    };
    assert!(matches!(tokio::join!(import, give).0, Err(Error::BadArchive { .. })));
    let climbing = Tar::default().symlink("out", "/").file("out/../../x", "x").end();
    assert!(make(&place, climbing, named("mine:1")).await.is_err());
    let wrong = RootfsOptions { architecture: "s390x".into(), ..named("mine:1") };
    assert!(matches!(make(&place, rootfs(), wrong).await, Err(Error::BadArchive { .. })));
    let wrong = RootfsOptions { env: vec!["=x".into()], ..named("mine:1") };
    assert!(matches!(make(&place, rootfs(), wrong).await, Err(Error::BadArchive { .. })));
    place.no_drafts().await;
    assert_eq!((place.layers().await, leftovers(&place)), (0, Vec::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exported_image_is_the_same_after_its_import() {
    let (one, two) = (Place::new().await, Place::new().await);
    let record = make(&one, rootfs(), named("mine:1")).await.unwrap();
    one.store.tag("mine:1", "r.example:5000/other:2").await.unwrap();
    let bytes = exported(&one, &["mine:1"]).await;
    assert_eq!(bytes, exported(&one, &["mine:1"]).await, "an export is the same each time");
    let members_of = members(&bytes);
    let docker: serde_json::Value = serde_json::from_slice(&members_of["manifest.json"]).unwrap();
    assert_eq!(docker[0]["RepoTags"], serde_json::json!(["docker.io/library/mine:1"]));
    assert!(members_of.contains_key(docker[0]["Layers"][0].as_str().unwrap()));

    let loaded = load(&two, bytes, None).await.unwrap();
    assert_eq!(loaded.iter().map(|r| (&r.id, &r.layers)).collect::<Vec<_>>(), [(&record.id, &record.layers)]);
    assert_eq!(loaded[0].repo_tags, ["docker.io/library/mine:1"]);
    // By its id it goes out with all its names, and a compressed archive is read as well.
    let all = exported(&one, &[record.id.as_str()]).await;
    let renamed = load(&two, zstd::encode_all(all.as_slice(), 1).unwrap(), None).await.unwrap();
    assert!(renamed[0].repo_tags.contains(&"r.example:5000/other:2".to_owned()), "{renamed:?}");
    // As `docker save` writes it.
    let mut plain = members_of;
    plain.remove("index.json");
    plain.remove("oci-layout");
    let three = Place::new().await;
    let loaded = load(&three, archive(&plain), Some("new/name")).await.unwrap();
    assert_eq!(
        (&loaded[0].id, &loaded[0].repo_tags),
        (&record.id, &vec!["docker.io/new/name:latest".to_owned()])
    );
    assert!(leftovers(&three).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_lies_is_refused_and_leaves_nothing() {
    let (one, two) = (Place::new().await, Place::new().await);
    make(&one, rootfs(), named("mine:1")).await.unwrap();
    let honest = members(&exported(&one, &["mine:1"]).await);
    let blobs: Vec<String> = honest.keys().filter(|k| k.starts_with("blobs/")).cloned().collect();
    assert_eq!(blobs.len(), 3, "manifest, config, layer");
    for blob in &blobs {
        let mut lie = honest.clone();
        let content = lie.get_mut(blob).unwrap();
        let last = content.len() / 2;
        content[last] ^= 1;
        let error = load(&two, archive(&lie), None).await.unwrap_err();
        assert!(matches!(error, Error::BadArchive { .. }), "{blob}: {error}");
        let mut lack = honest.clone();
        lack.remove(blob);
        assert!(load(&two, archive(&lack), None).await.is_err(), "{blob} is missing");
    }
    for (name, text) in [("index.json", "{"), ("index.json", r#"{"manifests":[]}"#), ("other", "x")] {
        let only = BTreeMap::from([(name.to_owned(), text.as_bytes().to_vec())]);
        assert!(
            matches!(load(&two, archive(&only), None).await, Err(Error::BadArchive { .. })),
            "{name} {text}"
        );
    }
    two.no_drafts().await;
    assert_eq!((two.layers().await, leftovers(&two)), (0, Vec::new()));
    assert!(two.store.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_archive_has_beside_images_for_this_host_is_left_out_and_told() {
    let (one, two) = (Place::new().await, Place::new().await);
    let record = make(&one, rootfs(), named("mine:1")).await.unwrap();
    let mut all = members(&exported(&one, &["mine:1"]).await);
    let mut index: serde_json::Value = serde_json::from_slice(&all["index.json"]).unwrap();
    let ours = index["manifests"][0].take();
    let absent = moxlet_ids::Digest::of(b"absent");
    let artefact = |kind: &str| {
        json!({
            "schemaVersion": 2, "config": { "mediaType": kind, "digest": absent, "size": 2 }, "layers": [],
        })
    };
    let foreign = json!({ "schemaVersion": 2, "manifests": [{
        "digest": absent, "size": 2, "platform": { "os": "linux", "architecture": "s390x" },
    }] });
    let no_config = json!({
        "schemaVersion": 2, "config": { "digest": absent, "size": 2 }, "layers": [],
    });
    let mut named = vec![json!({ "digest": absent, "size": 2 })];
    for other in
        [artefact("application/vnd.cncf.helm.config.v1+json"), artefact("a/signature"), foreign, no_config]
    {
        let bytes = other.to_string().into_bytes();
        let digest = moxlet_ids::Digest::of(&bytes);
        named.push(json!({ "digest": digest, "size": bytes.len() }));
        all.insert(format!("blobs/sha256/{}", digest.hex()), bytes);
    }
    all.insert("index.json".into(), json!({ "manifests": named }).to_string().into_bytes());
    let error = load_some(&two, archive(&all)).await.unwrap_err().to_string();
    assert!(error.contains("is missing") && error.contains("4 more"), "{error}");
    named.insert(2, ours);
    all.insert("index.json".into(), json!({ "manifests": named }).to_string().into_bytes());
    let imported = load_some(&two, archive(&all)).await.unwrap();
    assert_eq!(imported.images.iter().map(|r| &r.id).collect::<Vec<_>>(), [&record.id]);
    for (skipped, why) in
        imported.skipped.iter().zip(["missing", "Helm chart", "a/signature", "platform", "missing"])
    {
        assert!(skipped.starts_with("sha256:") && skipped.contains(why), "{skipped}");
    }
    assert_eq!(imported.skipped.len(), 5);
    assert!(leftovers(&two).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_with_endless_names_is_not_read_into_memory() {
    let place = Place::new().await;
    let gzip = |bytes: &[u8]| {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(bytes).unwrap();
        gzip.finish().unwrap()
    };
    for kind in [EntryType::GNULongName, EntryType::GNULongLink, EntryType::XHeader, EntryType::XGlobalHeader]
    {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        for size in [50 << 30, 3 << 20] {
            header.set_size(size);
            header.set_cksum();
            let mut bytes = header.as_bytes().to_vec();
            bytes.resize(bytes.len() + (3 << 20), b'a');
            let bytes = gzip(&[bytes, Tar::default().file("index.json", "{}").end()].concat());
            assert!(bytes.len() < 100_000);
            let error = load(&place, bytes, None).await.unwrap_err();
            assert!(
                matches!(&error, Error::BadArchive { reason, .. } if reason.contains("more than 1048576 bytes")),
                "{kind:?}: {error}"
            );
        }
    }
    assert!(leftovers(&place).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_that_is_given_up_leaves_nothing() {
    let place = Place::new().await;
    let chain = ChainId::base(&moxlet_ids::Digest::of(&rootfs()));
    // Somebody is about to make the same layer.
    let turn = place.store.store.turn(&chain);
    let theirs = turn.lock().await;
    let store = Arc::clone(&place.store);
    let import = tokio::spawn(async move {
        let (feed, source) = feed();
        tokio::join!(store.import_rootfs(source, named("mine:1")), give(rootfs(), feed)).0
    });
    eventually(|| std::future::ready(Arc::strong_count(&turn) == 2)).await;
    assert!(!leftovers(&place).is_empty());
    import.abort();
    assert!(import.await.unwrap_err().is_cancelled());
    place.no_drafts().await;
    assert!(leftovers(&place).is_empty(), "{:?}", leftovers(&place));
    drop(theirs);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_file_is_found_and_the_image_removed_unless_it_is_used() {
    let place = Place::new().await;
    let record = make(&place, rootfs(), named("mine:1")).await.unwrap();
    let verify = async |repair| place.store.verify(&[], repair).unwrap().next().await.unwrap().unwrap();
    let whole = verify(true).await;
    assert_eq!((whole.verified, whole.faults.len(), whole.removed), (1, 0, false));
    let file = place.dir.path().join("driver/layers").join(record.layers[0].digest().hex()).join("etc/issue");
    fs::write(&file, "hellO").unwrap();
    let damaged = verify(false).await;
    assert!(damaged.faults[0].starts_with("layer 1: "), "{damaged:?}");
    assert!(matches!(place.store.export(&["mine:1".to_owned()]).await, Err(Error::Damaged { .. })));
    let id = ContainerId::random();
    place.driver.create_root(&id, &record.layers, IdMap::default().into()).await.unwrap();
    assert!(!verify(true).await.removed);
    place.driver.remove_root(&id).await.unwrap();
    fs::remove_file(&file).unwrap();
    let missing = verify(true).await;
    assert!(missing.removed && missing.faults[0].contains("etc/issue"), "{missing:?}");
    assert_eq!((place.layers().await, place.store.list().await.unwrap().len()), (0, 0));
    make(&place, rootfs(), named("mine:1")).await.unwrap();
    assert!(verify(false).await.faults.is_empty());
    assert!(place.store.verify(&["nothing".to_owned()], false).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_whose_tapes_are_lost_is_not_called_whole() {
    let place = Place::new().await;
    let record = make(&place, rootfs(), named("mine:1")).await.unwrap();
    let tape =
        place.dir.path().join("images/layers").join(format!("{}.tape", record.layers[0].digest().hex()));
    fs::remove_file(&tape).unwrap();
    let verify = async |place: &Place| place.store.verify(&[], true).unwrap().next().await.unwrap().unwrap();
    let report = verify(&place).await;
    assert_eq!((report.verified, report.lost, report.faults.len(), report.removed), (0, 1, 0, false));
    // As the first versions wrote it, which kept none.
    let path = place.dir.path().join("images/images").join(format!("{}.json", record.id.hex()));
    let mut text: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    text["origin"] = "unknown".into();
    fs::write(&path, text.to_string()).unwrap();
    let report = verify(&place.reopen().await).await;
    assert_eq!((report.verified, report.lost, report.faults.len()), (0, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn tapes_go_with_their_layers() {
    let place = Place::new().await;
    make(&place, rootfs(), named("mine:1")).await.unwrap();
    let tapes = place.dir.path().join("images/layers");
    assert_eq!(fs::read_dir(&tapes).unwrap().count(), 1);
    fs::write(tapes.join(format!("{}.tape", "0".repeat(64))), "stray").unwrap();
    let place = place.reopen().await;
    assert_eq!(fs::read_dir(&tapes).unwrap().count(), 1);
    place.store.remove("mine:1").await.unwrap();
    assert_eq!(fs::read_dir(&tapes).unwrap().count(), 0);
}
