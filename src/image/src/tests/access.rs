//! Which pods may have an image that is here.

use super::*;
use crate::{Error, Keyring, PullPolicy, layer::tests::Tar};

fn secret(registry: &str, user: &str, password: &str) -> Keyring {
    let config = serde_json::json!({ "auths": { registry: { "username": user, "password": password } } });
    Keyring::from_docker_config(config.to_string().as_bytes()).unwrap()
}

async fn pull_for(place: &Place, name: &str, secrets: &Keyring) -> crate::Result<crate::ImageRecord> {
    let (progress, _) = tokio::sync::watch::channel(crate::PullProgress::default());
    let outcome = place.store.pull_for(name, secrets, &progress).await;
    assert!(outcome.is_err() || progress.borrow().layers.len() == 1);
    outcome
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_without_the_credentials_has_to_pass_the_registry() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    registry.login("u", "p");
    registry.push("a:1", &Image::new().layer(Tar::default().file("a", "a")));
    let name = registry.name("a:1");
    let host = name.split('/').next().unwrap().to_owned();
    let (good, bad, none) = (secret(&host, "u", "p"), secret(&host, "u", "wrong"), Keyring::default());
    let present = PullPolicy::IfNotPresent;
    assert!(place.store.find_for(&name, present, &good).await.unwrap().is_none());
    assert!(matches!(place.store.find_for(&name, PullPolicy::Never, &good).await, Err(Error::NeverPull(_))));
    let record = pull_for(&place, &name, &good).await.unwrap();
    let place = place.reopen().await;
    assert_eq!(place.store.find_for(&name, present, &good).await.unwrap().unwrap().id, record.id);
    for other in [&bad, &none] {
        assert!(place.store.find_for(&name, present, other).await.unwrap().is_none());
        assert!(matches!(
            place.store.find_for(&name, PullPolicy::Never, other).await,
            Err(Error::NeverPull(_))
        ));
        assert!(matches!(pull_for(&place, &name, other).await, Err(Error::Denied { .. })));
    }
    assert!(place.store.find_for(&name, PullPolicy::Always, &good).await.unwrap().is_none());
    let files = ["images/images", "images/configs", "images/manifests"];
    for dir in files {
        for entry in std::fs::read_dir(place.dir.path().join(dir)).unwrap() {
            let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
            assert!(!text.contains("\"u\"") && !text.contains("\"p\""), "a secret is on disk: {text}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_for_a_pod_that_is_cut_off_leaves_nothing_that_is_free_for_all() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    registry.login("u", "p");
    registry.push("a:1", &Image::new().layer(Tar::default().file("a", "a")));
    let name = registry.name("a:1");
    let good = secret(name.split('/').next().unwrap(), "u", "p");
    let (progress, _) = tokio::sync::watch::channel(crate::PullProgress::default());
    {
        let mut pull = std::pin::pin!(place.store.pull_for(&name, &good, &progress));
        // It is not polled any more once there is a record, unless that has come between the two looks.
        while place.store.resolve(&name).await.unwrap().is_none() && futures::poll!(&mut pull).is_pending() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let (present, none) = (PullPolicy::IfNotPresent, Keyring::default());
    let place = place.reopen().await;
    assert!(place.store.resolve(&name).await.unwrap().is_some());
    assert!(place.store.find_for(&name, present, &none).await.unwrap().is_none());
    assert!(place.store.find_for(&name, present, &good).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_by_hand_at_the_same_time_leaves_an_image_to_those_who_may_have_it() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    registry.login("u", "p");
    registry.push("a:1", &Image::new().layer(Tar::default().file("a", "a")));
    let name = registry.name("a:1");
    let good = secret(name.split('/').next().unwrap(), "u", "p");
    let login = crate::Credentials { username: "u".into(), password: "p".into(), ..Default::default() };
    let logins = [login];
    let (by_hand, for_pod) = tokio::join!(place.store.pull(&name, &logins), pull_for(&place, &name, &good));
    assert_eq!(by_hand.unwrap().id, for_pod.unwrap().id);
    let none = Keyring::default();
    assert!(place.store.find_for(&name, PullPolicy::IfNotPresent, &none).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_gets_no_image_by_the_beginning_of_its_id() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    registry.push("a:1", &Image::new().layer(Tar::default().file("a", "a")));
    let record = place.store.pull(&registry.name("a:1"), &[]).await.unwrap();
    let (present, none) = (PullPolicy::IfNotPresent, Keyring::default());
    let begin = &record.id.hex()[..8];
    assert!(place.store.resolve(begin).await.unwrap().is_some());
    assert!(place.store.find_for(begin, present, &none).await.unwrap().is_none());
    assert_eq!(place.store.find_for(record.id.as_str(), present, &none).await.unwrap(), Some(record));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_needed_no_credentials_or_was_brought_by_hand_is_free_for_all() {
    let (registry, place) = (Registry::start().await, Place::new().await);
    registry.push("a:1", &Image::new().layer(Tar::default().file("a", "a")));
    registry.push("b:1", &Image::new().layer(Tar::default().file("b", "b")));
    let (a, b) = (registry.name("a:1"), registry.name("b:1"));
    pull_for(&place, &a, &Keyring::default()).await.unwrap();
    place.store.pull(&b, &[]).await.unwrap();
    let other = secret("127.0.0.1", "x", "y");
    for name in [&a, &b] {
        assert!(place.store.find_for(name, PullPolicy::Never, &other).await.unwrap().is_some());
    }
}
