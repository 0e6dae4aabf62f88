//! Logins: who is sent which secret, and when.

use super::{
    pulls::{large, user},
    raw::{Raw, answer},
    *,
};
use crate::{Credentials, Error, Reference, credentials::NodeCredentials, registry::Registry as Client};

#[tokio::test(flavor = "multi_thread")]
async fn the_challenge_of_a_host_that_is_redirected_to_gets_no_secret() {
    let image = large(1);
    let refresh = Credentials { identity_token: "refresh".into(), ..Credentials::default() };
    for credentials in [user("me", "secret"), refresh] {
        for challenge in ["Bearer realm=\"http://{host}/token\"", "Basic realm=\"a\""] {
            let elsewhere = Raw::start(&image, move |r| {
                let challenge = challenge.replace("{host}", r.header("host").unwrap());
                let header = format!("www-authenticate: {challenge}\r\n");
                Some(if r.path.starts_with("/token") {
                    answer("200 OK", "", br#"{"token":"t"}"#)
                } else {
                    answer("401 Unauthorized", &header, b"")
                })
            })
            .await;
            let (layer, to) = (image.digest(0), elsewhere.address.clone());
            let raw = Raw::start(&image, move |r| {
                let location = format!("location: http://{to}{}\r\n", r.path);
                r.path.contains(&layer).then(|| answer("307 Temporary Redirect", &location, b""))
            })
            .await;
            let place = Place::new().await;
            let error = place.store.pull(&raw.name(), std::slice::from_ref(&credentials)).await.unwrap_err();
            let said = error.to_string();
            assert!(matches!(&error, Error::Denied { .. }) && said.contains(&elsewhere.address), "{said}");
            let sent: Vec<_> = [elsewhere.requests(""), raw.requests("")].concat();
            assert!(sent.iter().all(|r| r.header("authorization").is_none()), "{sent:?}");
            assert!(elsewhere.requests("/token").is_empty());
        }
    }
}

/// Asks for a manifest so many times in one session, with some credentials of the pull and a helper that gives the
/// password; how often it came, and how often the helper was asked.
async fn asked(own: &[Credentials], password: &str, times: usize) -> (usize, usize) {
    let registry = Registry::start().await;
    registry.push("app:v1", &large(1));
    registry.login("me", "secret");
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let script =
        format!(r#"echo asked >>{}; printf '{{"Username":"me","Secret":"{password}"}}'"#, log.display());
    let config = Config { retry_pause: Duration::from_millis(10), ..Config::default() };
    let node = NodeCredentials::of_helper(dir.path(), &script);
    let client = Client::new(&config).unwrap().with_node(node);
    let reference = Reference::parse(&registry.name("app:v1")).unwrap();
    let session = client.session(&reference, own).await.unwrap();
    let mut came = 0;
    for _ in 0..times {
        match session.manifest("v1", None, 1 << 20).await {
            Ok(_) => came += 1,
            Err(error) => assert!(matches!(error, Error::Denied { .. }), "{error}"),
        }
    }
    let asked = std::fs::read_to_string(&log).unwrap_or_default();
    (came, asked.lines().count())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_credential_helper_is_asked_once_and_after_the_pulls_own_credentials() {
    assert_eq!(asked(&[user("me", "secret")], "secret", 2).await, (2, 0), "the pull has what it needs");
    assert_eq!(asked(&[user("me", "wrong")], "secret", 2).await, (2, 1));
    assert_eq!(asked(&[user("me", "wrong")], "stale", 3).await, (0, 1), "it would say the same");
}
