//! Pulls by way of a `hosts.toml`: which host is asked for what, and with what.

use std::path::PathBuf;

use serde_json::json;

use super::{
    pulls::{two_layers, user},
    registry::Fault,
    *,
};
use crate::Error;

/// A directory of settings, with one for a registry.
struct Settings {
    dir: tempfile::TempDir,
    host: String,
}

impl Settings {
    fn new(registry: &Registry) -> Self {
        let host = registry.name("").trim_end_matches('/').to_owned();
        let settings = Self { dir: tempfile::tempdir().unwrap(), host };
        std::fs::create_dir(settings.dir.path().join(settings.host.replace(':', "_") + "_")).unwrap();
        settings
    }

    fn write(&self, text: &str) {
        let dir = self.dir.path().join(self.host.replace(':', "_") + "_");
        std::fs::write(dir.join("hosts.toml"), text).unwrap();
    }

    async fn place(&self, docker_config: Option<PathBuf>) -> Place {
        Place::with(|config| {
            config.registry_config_dir = Some(self.dir.path().to_owned());
            config.docker_config = docker_config;
        })
        .await
    }
}

fn host(registry: &Registry, rest: &str) -> String {
    format!("[host.{:?}]\n{rest}\n", registry.url("").trim_end_matches('/'))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_is_asked_first_and_told_for_whom() {
    let (registry, mirror) = (Registry::start().await, Registry::start().await);
    let image = two_layers();
    registry.push("app:v1", &image);
    mirror.push("app:v1", &image);
    let settings = Settings::new(&registry);
    settings.write(&host(&mirror, r#"capabilities = ["pull", "resolve"]"#));
    let record = settings.place(None).await.store.pull(&registry.name("app:v1"), &[]).await.unwrap();
    assert_eq!(record.repo_tags, [registry.name("app:v1")], "the name stays");
    assert!(registry.requests("").is_empty());
    let asked = mirror.requests("").len();
    assert_eq!(mirror.requests(&format!("?ns={}", settings.host.replace(':', "%3A"))).len(), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_may_not_resolve_is_not_asked_for_tags() {
    let (registry, mirror) = (Registry::start().await, Registry::start().await);
    let image = two_layers();
    registry.push("app:v1", &image);
    mirror.push("app:v1", &image);
    let settings = Settings::new(&registry);
    settings.write(&host(&mirror, r#"capabilities = ["pull"]"#));
    settings.place(None).await.store.pull(&registry.name("app:v1"), &[]).await.unwrap();
    assert_eq!(registry.requests("").len(), 1, "the tag");
    assert!(mirror.requests("manifests/v1").is_empty());
    assert_eq!(mirror.requests("blobs/").len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_that_fail_are_passed_over() {
    let registry = Registry::start().await;
    let (empty, lying, broken, busy) =
        (Registry::start().await, Registry::start().await, Registry::start().await, Registry::start().await);
    let image = two_layers();
    let digest = registry.push("app:v1", &image);
    lying.push("app:v1", &Image::new());
    lying.lie(&digest);
    for mirror in [&broken, &busy] {
        mirror.push("app:v1", &image);
        for layer in 0..2 {
            let fault = if std::ptr::eq(mirror, &raw const busy) { Fault::Busy(99) } else { Fault::Cut(99) };
            mirror.fault(&image.digest(layer), fault);
        }
    }
    let settings = Settings::new(&registry);
    let mirrors: String = [&empty, &lying, &busy, &broken].iter().map(|m| host(m, "")).collect();
    settings.write(&format!("{mirrors}[host.\"http://127.0.0.1:1\"]\n"));
    let place = settings.place(None).await;
    place.store.pull(&registry.name(&format!("app@{digest}")), &[]).await.unwrap();
    assert!(!registry.requests("blobs/").is_empty());
    assert!(busy.requests(&image.digest(0)).len() <= 2, "another host comes before another try");

    let error = place.store.pull(&registry.name("other:v1"), &[]).await.unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_sends_other_blobs_is_passed_over() {
    let (registry, mirror) = (Registry::start().await, Registry::start().await);
    let image = two_layers();
    registry.push("app:v1", &image);
    mirror.push("app:v1", &image);
    let settings = Settings::new(&registry);
    settings.write(&host(&mirror, ""));
    let name = registry.name("app:v1");
    for blob in [image.digest(0), image.id().to_string()] {
        mirror.fault(&blob, Fault::Damaged);
        let place = settings.place(None).await;
        assert_eq!(place.store.pull(&name, &[]).await.unwrap().id, image.id());
        assert_eq!((mirror.requests(&blob).len(), registry.requests(&blob).len()), (1, 1), "{blob}");
        place.no_drafts().await;
        mirror.fault(&blob, Fault::Busy(0));
        for registry in [&registry, &mirror] {
            registry.forget_requests();
        }
    }
    // Where all say the same it is the image that is damaged.
    for registry in [&registry, &mirror] {
        registry.fault(&image.digest(1), Fault::Damaged);
    }
    let place = settings.place(None).await;
    let error = place.store.pull(&name, &[]).await.unwrap_err();
    assert!(matches!(&error, Error::DigestMismatch { part, .. } if part.starts_with("layer 2")), "{error}");
    place.no_drafts().await;
    assert_eq!(place.layers().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_host_gets_its_own_credentials() {
    let (registry, mirror) = (Registry::start().await, Registry::start().await);
    let image = two_layers();
    registry.push("app:v1", &image);
    mirror.push("app:v1", &image);
    registry.login("me", "secret");
    mirror.login("mirror's", "other");
    let settings = Settings::new(&registry);
    settings.write(&host(&mirror, ""));
    let file = settings.dir.path().join("config.json");
    let place = settings.place(Some(file.clone())).await;
    let name = registry.name("app:v1");
    place.store.pull(&name, &[user("me", "secret")]).await.unwrap();
    let asked = mirror.tokens();
    assert!(!asked.is_empty() && asked.iter().all(String::is_empty), "as nobody: {asked:?}");
    assert!(registry.requests("").len() > 1);

    place.store.remove(&name).await.unwrap();
    let before = registry.requests("").len();
    let mirror_name = mirror.name("");
    let entry = json!({ "auths": { mirror_name.trim_end_matches('/'): { "auth": "bWlycm9yJ3M6b3RoZXI=" } } });
    std::fs::write(&file, entry.to_string()).unwrap();
    place.store.pull(&name, &[user("me", "secret")]).await.unwrap();
    assert_eq!(registry.requests("").len(), before, "the mirror serves it all");
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_go_to_their_host_only_and_settings_are_read_again() {
    let (registry, elsewhere) = (Registry::start().await, Registry::start().await);
    let image = two_layers();
    registry.push("app:v1", &image);
    elsewhere.push("app:v1", &image);
    let blob = image.digest(0);
    registry.fault(&blob, Fault::Redirect(elsewhere.url(&format!("v2/app/blobs/{blob}"))));
    let settings = Settings::new(&registry);
    settings.write("unknown = 1");
    let place = settings.place(None).await;
    let name = registry.name("app:v1");
    let error = place.store.pull(&name, &[]).await.unwrap_err();
    assert!(matches!(&error, Error::Settings { line: Some(1), .. }), "{error}");
    assert!(registry.requests("").is_empty());
    settings.write("[header]\nauthorization = \"of the settings\"\n");
    place.store.pull(&name, &[]).await.unwrap();
    assert!(registry.requests("").iter().all(|(_, login)| *login));
    assert_eq!(elsewhere.requests(&blob), [(None, false)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_without_any_host_for_a_purpose_says_so() {
    let registry = Registry::start().await;
    registry.push("app:v1", &two_layers());
    let settings = Settings::new(&registry);
    settings.write("capabilities = [\"pull\"]");
    let error = settings.place(None).await.store.pull(&registry.name("app:v1"), &[]).await.unwrap_err();
    assert!(error.to_string().contains("no host with the capability \"resolve\""), "{error}");
}
