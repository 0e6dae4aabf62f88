//! Pulls: what comes, what is refused, and what registries do wrong.

use moxlet_ids::{Algorithm, Digest};
use serde_json::json;
use tokio::sync::Semaphore;

use super::{registry::Fault, *};
use crate::{Credentials, Error, layer::tests::Tar};

fn base() -> Tar {
    Tar::default()
        .file("etc/a", "base")
        .file("etc/b", "base")
        .file("gone", "base")
        .dir("old")
        .file("old/x", "base")
}

pub(super) fn two_layers() -> Image {
    let top =
        Tar::default().file("etc/a", "top").file(".wh.gone", "").dir("old").file("old/.wh..wh..opq", "");
    Image::new().layer(base()).layer(top)
}

/// Bytes that no compression shortens, so that a blob comes in many pieces.
pub(super) fn noise(seed: u64, length: usize) -> String {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        char::from(b' ' + u8::try_from(state >> 58).unwrap())
    };
    (0..length).map(|_| next()).collect()
}

pub(super) fn large(seed: u64) -> Image {
    Image::new().layer(Tar::default().file("large", &noise(seed, 600_000)))
}

pub(super) fn user(name: &str, password: &str) -> Credentials {
    Credentials { username: name.into(), password: password.into(), ..Credentials::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn digests_by_sha512_are_followed_and_verified() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let image = two_layers();
    let digest = registry.push_by(Algorithm::Sha512, "app:v1", &image);
    assert!(digest.as_str().starts_with("sha512:"));
    for name in [registry.name("app:v1"), registry.name(&format!("app@{digest}"))] {
        let record = place.store.pull(&name, &[]).await.unwrap();
        assert_eq!(record.id, image.id(), "an id is by sha256");
        assert_eq!(place.read(&record.layers, &["etc/a"]).await, [Some("top".into())]);
    }
    let damaged = large(3);
    registry.push_by(Algorithm::Sha512, "bad:v1", &damaged);
    registry.fault(&Digest::by(Algorithm::Sha512, &damaged.blobs().1).to_string(), Fault::Damaged);
    let error = place.store.pull(&registry.name("bad:v1"), &[]).await.unwrap_err();
    assert!(
        matches!(&error, Error::DigestMismatch { expected, .. } if expected.starts_with("sha512:")),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pulled_and_a_container_sees_its_layers() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let image = two_layers();
    let digest = registry.push("app:v1", &image);
    let name = registry.name("app:v1");
    let record = place.store.pull(&name, &[]).await.unwrap();
    assert_eq!(record.id, image.id());
    assert_eq!(record.repo_tags, [&*name]);
    assert_eq!(record.repo_digests, [registry.name(&format!("app@{digest}"))]);
    assert_eq!(record.size_bytes, image.size());
    assert_eq!(record.config.cmd, ["/bin/sh"]);
    let seen = place.read(&record.layers, &["etc/a", "etc/b", "gone", "old/x"]).await;
    assert_eq!(seen, [Some("top".into()), Some("base".into()), None, None]);

    let place = place.reopen().await;
    assert_eq!(place.store.list().await.unwrap(), std::slice::from_ref(&record));
    let digest_name = record.repo_digests[0].clone();
    for text in [name.as_str(), record.id.as_str(), record.id.hex(), &record.id.hex()[..7], &digest_name] {
        assert_eq!(place.store.resolve(text).await.unwrap().as_ref(), Some(&record), "{text}");
    }
    assert_eq!(place.store.resolve("app:v1").await.unwrap(), None, "that would be Docker Hub's");
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_are_here_do_not_come_again() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let first = two_layers();
    let second = Image::new().layer(base()).layer(Tar::default().file("other", ""));
    registry.push("app:v1", &first);
    registry.push("app:v2", &second);
    let (one, two) = (registry.name("app:v1"), registry.name("app:v2"));
    let (a, b) = tokio::join!(place.store.pull(&one, &[]), place.store.pull(&two, &[]));
    assert_eq!(a.unwrap().layers[0], b.unwrap().layers[0]);
    place.store.pull(&one, &[]).await.unwrap();
    assert_eq!(registry.requests(&first.digest(0)).len(), 1, "two images at once share a layer");
    assert_eq!(registry.requests(&first.digest(1)).len(), 1);
    assert_eq!(registry.requests(&first.id().to_string()).len(), 1, "nor does the config");
    assert_eq!(registry.requests("manifests/v1").len(), 2, "but the tag is looked up");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_here_costs_no_manifest() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let (old, new) = (large(1), large(2));
    let digest = registry.push("app:v1", &old);
    registry.login("me", "secret");
    let (name, login) = (registry.name("app:v1"), [user("me", "secret")]);
    let pull = async |image: &Image, name: &str| {
        let (progress, pull) = place.store.pull_with_progress(name, &login).unwrap();
        assert_eq!(pull.await.unwrap().id, image.id());
        let all = registry.requests("manifests/");
        let heads = registry.requests("HEAD ").len();
        registry.forget_requests();
        let states: Vec<_> = progress.borrow().layers.iter().map(|l| l.state).collect();
        (all.into_iter().filter(|(_, login)| *login).count(), heads, states)
    };
    let (present, done) = (vec![crate::LayerState::Present], vec![crate::LayerState::Done]);
    // The first request of a session is without a login.
    assert_eq!(pull(&old, &name).await, (2, 0, done.clone()), "index and manifest");
    assert_eq!(pull(&old, &name).await, (1, 2, present.clone()));
    assert_eq!(pull(&old, &registry.name(&format!("app@{digest}"))).await, (1, 2, present.clone()));
    registry.push("app:v1", &new);
    assert_eq!(pull(&new, &name).await, (3, 2, done));
    registry.push("app:v1", &old);
    assert_eq!(pull(&old, &name).await, (1, 2, present), "the tag goes back");
    let tags = place.store.resolve(new.id().as_str()).await.unwrap().unwrap().repo_tags;
    assert!(tags.is_empty(), "{tags:?}");
    let error = place.store.pull(&name, &[]).await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_are_tried_in_turn() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    registry.push("app:v1", &two_layers());
    registry.login("me", "secret");
    let name = registry.name("app:v1");
    for auths in [&[][..], &[user("me", "wrong-password")]] {
        let error = place.store.pull(&name, auths).await.unwrap_err();
        assert!(matches!(error, Error::Denied { .. }), "{error}");
        assert!(!error.to_string().contains("wrong-password"));
    }
    place.store.pull(&name, &[user("you", "wrong"), user("me", "secret")]).await.unwrap();
    let error = place.store.pull(&name, &[]).await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "what is here is not for everybody: {error}");
    let token = Credentials { registry_token: "good".into(), ..Credentials::default() };
    place.store.pull(&name, &[token]).await.unwrap();
    let refresh = |token: &str| Credentials { identity_token: token.into(), ..Credentials::default() };
    place.store.pull(&name, &[refresh("of me")]).await.unwrap();
    place.store.pull(&name, &[refresh("of you"), user("me", "secret")]).await.unwrap();
    let error = place.store.pull(&name, &[refresh("of you")]).await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hosts_credentials_come_after_those_of_the_pull() {
    let registry = Registry::start().await;
    registry.push("app:v1", &two_layers());
    registry.login("me", "secret");
    let name = registry.name("app:v1");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.json");
    let place = Place::with(|config| config.docker_config = Some(file.clone())).await;
    let error = place.store.pull(&name, &[]).await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error}");
    let host = name.split('/').next().unwrap();
    let entry = json!({ "auths": { host: { "username": "me", "password": "secret" } } });
    std::fs::write(&file, entry.to_string()).unwrap();
    place.store.pull(&name, &[]).await.unwrap();
    place.store.pull(&name, &[user("me", "wrong")]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_is_followed_without_the_login() {
    let (registry, elsewhere, place) = (Registry::start().await, Registry::start().await, Place::new().await);
    let image = two_layers();
    registry.push("app:v1", &image);
    elsewhere.push("app:v1", &image);
    registry.login("me", "secret");
    let blob = image.digest(0);
    registry.fault(&blob, Fault::Redirect(elsewhere.url(&format!("v2/app/blobs/{blob}"))));
    place.store.pull(&registry.name("app:v1"), &[user("me", "secret")]).await.unwrap();
    assert_eq!(elsewhere.requests(&blob), [(None, false)]);
    assert!(registry.requests(&blob).iter().all(|(_, login)| *login));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_match_its_digest_leaves_nothing_behind() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let image = two_layers();
    registry.push("layer:v1", &image);
    registry.fault(&image.digest(1), Fault::Damaged);
    let other = Tar::default().file("other", "").end();
    registry.push("diff:v1", &Image::new().blob(base().end(), other));
    let config = large(1);
    registry.push("config:v1", &config);
    registry.fault(config.id().as_str(), Fault::Damaged);
    for (name, part) in [("layer:v1", "layer 2"), ("diff:v1", "layer 1"), ("config:v1", "config")] {
        let error = place.store.pull(&registry.name(name), &[]).await.unwrap_err();
        assert!(matches!(&error, Error::DigestMismatch { part: p, .. } if p.starts_with(part)), "{error}");
        place.no_drafts().await;
        assert_eq!(place.layers().await, 0, "{name}");
    }
    let other = format!("app@{}", moxlet_ids::Digest::of(b"other"));
    let error = place.store.pull(&registry.name(&other), &[]).await.unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    assert!(place.store.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_cannot_be_right_are_refused() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let none: [&str; 0] = [];
    let cases = [
        ("a:1", two_layers().with("os", json!("windows")), "windows"),
        ("a:2", two_layers().with("architecture", json!("s390x")), "s390x"),
        ("a:3", two_layers().with("rootfs", json!({ "type": "layers", "diff_ids": none })), "0 layers"),
        ("a:4", two_layers().with("rootfs", json!({ "type": "layers", "diff_ids": ["x", "y"] })), "digest"),
        ("a:5", two_layers().with("rootfs", json!(7)), "cannot be read"),
        ("a:6", Image::new().layer(Tar::default().file("../x", "")), "`..`"),
        (
            "a:8",
            two_layers().with("config", json!({ "Env": vec![""; 5000] })),
            "Env has more than 4096 entries",
        ),
        ("a:7", Image::new().layer(base()).layer(Tar::default().link("l", "etc/z")), "etc/z"),
    ];
    for (name, image, reason) in cases {
        registry.push(name, &image);
        let error = place.store.pull(&registry.name(name), &[]).await.unwrap_err();
        assert!(matches!(&error, Error::BadImage { reason: r, .. } if r.contains(reason)), "{name}: {error}");
    }
    for (name, kind) in [("a:none", "not found"), ("A", "lowercase")] {
        let error = place.store.pull(&registry.name(name), &[]).await.unwrap_err();
        assert!(error.to_string().contains(kind), "{error}");
    }
    place.no_drafts().await;
    assert_eq!(place.layers().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_config_there_is_one_in_memory_without_its_history_and_its_bytes_stay_on_disk() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let image = two_layers().with("history", json!(vec![json!({}); 100_000]));
    registry.push("a:1", &image);
    let name = registry.name("a:1");
    let pulled = place.store.pull(&name, &[]).await.unwrap();
    // Nothing else is known of it than what is known of one without.
    let plain = two_layers();
    registry.push("b:1", &plain);
    assert_eq!(place.store.pull(&registry.name("b:1"), &[]).await.unwrap().config, pulled.config);
    let place = place.reopen().await;
    let resolved = place.store.resolve(&name).await.unwrap().unwrap();
    let listed = place.store.list().await.unwrap().into_iter().find(|r| r.id == pulled.id).unwrap();
    let held = place.store.hold(&name).await.unwrap().unwrap();
    for other in [&listed.config, &held.record().config] {
        assert!(Arc::ptr_eq(other, &resolved.config), "a list of images is no second copy of their configs");
    }
    let inspected = place.store.inspect(&name).await.unwrap().unwrap();
    assert_eq!(moxlet_ids::Digest::of(inspected.config.get().as_bytes()), pulled.id, "as it came");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_a_store_has_and_that_is_beyond_reason_does_not_come_into_memory() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    registry.push("a:1", &two_layers());
    let record = place.store.pull(&registry.name("a:1"), &[]).await.unwrap();
    let images = place.dir.path().join("images");
    let config = json!({
        "architecture": "amd64", "os": "linux", "rootfs": { "diff_ids": record.config.diff_ids },
        "config": { "Env": vec![""; 5000] },
    });
    let config = config.to_string().into_bytes();
    let id = moxlet_ids::Digest::of(&config);
    let read =
        std::fs::read_to_string(images.join("images").join(format!("{}.json", record.id.hex()))).unwrap();
    let written = read.replace(record.id.as_str(), id.as_str());
    std::fs::write(images.join("images").join(format!("{}.json", id.hex())), written).unwrap();
    std::fs::write(images.join("configs").join(id.hex()), config).unwrap();
    let place = place.reopen().await;
    assert_eq!(place.store.list().await.unwrap(), [record]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_calls_the_platform_as_the_kernel_does_is_pulled() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let image = two_layers().with("architecture", json!(std::env::consts::ARCH)).with("os", json!("Linux"));
    registry.push("app:v1", &image);
    assert_eq!(place.store.pull(&registry.name("app:v1"), &[]).await.unwrap().id, image.id());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_goes_on_where_it_broke_off() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let (ranges, plain, busy) = (large(1), large(2), large(3));
    for (name, image, fault) in [
        ("a:1", &ranges, Fault::Breaks(1)),
        ("a:2", &plain, Fault::BreaksWithoutRanges(1)),
        ("a:3", &busy, Fault::Busy(1)),
    ] {
        registry.push(name, image);
        registry.fault(&image.digest(0), fault);
        let record = place.store.pull(&registry.name(name), &[]).await.unwrap();
        assert_eq!(record.id, image.id());
    }
    let asked = registry.requests(&ranges.digest(0));
    assert_eq!(asked.len(), 2);
    assert!(asked[0].0.is_none() && asked[1].0.as_ref().is_some_and(|r| r != "bytes=0-"), "{asked:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_never_delivers_is_given_up() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let image = large(1);
    registry.push("a:1", &image);
    registry.fault(&image.digest(0), Fault::BreaksWithoutRanges(u32::MAX));
    let error = place.store.pull(&registry.name("a:1"), &[]).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    place.no_drafts().await;
    assert_eq!(place.layers().await, 0);
    assert_eq!(registry.requests(&image.digest(0)).len(), crate::registry::ATTEMPTS as usize);
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_at_the_same_time_become_one_that_outlives_each_of_them() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let image = large(1);
    registry.push("a:1", &image);
    let gate = Arc::new(Semaphore::new(0));
    registry.fault(&image.digest(0), Fault::Held(Arc::clone(&gate)));
    let name = registry.name("a:1");
    // Whoever pulls has joined when the call returns, however busy the machine is.
    let pull = || tokio::spawn(place.store.pull_with_progress(&name, &[]).unwrap().1);
    let first = pull();
    eventually(|| std::future::ready(registry.requests(&image.digest(0)).len() == 1)).await;
    let others: Vec<_> = (0..5).map(|_| pull()).collect();
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    gate.add_permits(1);
    for other in others {
        assert_eq!(other.await.unwrap().unwrap().id, image.id());
    }
    assert_eq!(registry.requests(&image.digest(0)).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_nobody_waits_for_ends_and_leaves_nothing() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let image = large(1);
    registry.push("a:1", &image);
    let gate = Arc::new(Semaphore::new(0));
    registry.fault(&image.digest(0), Fault::Held(Arc::clone(&gate)));
    let name = registry.name("a:1");
    {
        let pull = place.store.pull(&name, &[]);
        tokio::pin!(pull);
        let begun = eventually(|| std::future::ready(!registry.requests(&image.digest(0)).is_empty()));
        tokio::select! {
            outcome = &mut pull => panic!("{outcome:?}"),
            () = begun => {}
        }
    }
    place.no_drafts().await;
    assert_eq!(place.layers().await, 0);
    gate.add_permits(1);
    assert_eq!(place.store.pull(&name, &[]).await.unwrap().id, image.id());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_pulled_by_digest_has_no_tag() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    let digest = registry.push("a:1", &two_layers());
    let full = registry.name(&format!("a@{digest}"));
    for name in [full.clone(), registry.name(&format!("a:any@{digest}"))] {
        let record = place.store.pull(&name, &[]).await.unwrap();
        assert!(record.repo_tags.is_empty());
        assert_eq!(record.repo_digests, [&*full]);
    }
}
