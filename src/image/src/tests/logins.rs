//! Logins: who is sent which secret, and when.

use super::{
    pulls::{large, user},
    raw::{Raw, answer},
    *,
};
use crate::{Credentials, Error};

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
