//! Answers that are errors, and answers that are none.

use serde_json::json;

use super::*;
use crate::{CallName, Error, api::ct::Delete, config::LxcConfig};

fn body(message: &str) -> String {
    json!({ "data": null, "message": format!("{message}\n") }).to_string()
}

#[tokio::test]
async fn a_missing_ct_is_gone_though_the_status_is_500() {
    let text = body("Configuration file 'nodes/a/lxc/101.conf' does not exist");
    let server = Server::start(&[(500, &text)]).await;
    let error = server.client().ct(&node(), vmid()).status().await.unwrap_err();
    assert!(error.is_gone(), "{error:?}");
    assert!(error.to_string().starts_with("GET /nodes/a/lxc/101/status/current: gone"), "{error}");
    assert_eq!(server.asked().len(), 1, "an answer is no reason to ask again");
}

#[tokio::test]
async fn invalid_parameters_are_named() {
    let text = json!({"data": null, "message": "Parameter verification failed.\n", "errors": {"memory": "value must have a minimum value of 16\n"}});
    let server = Server::start(&[(400, &text.to_string())]).await;
    let change = crate::api::ct::ConfigChange {
        set: LxcConfig { memory: Some(1), ..LxcConfig::default() },
        ..Default::default()
    };
    let error = server.client().ct(&node(), vmid()).set_config(&change).await.unwrap_err();
    let Error::InvalidParameters { parameters, .. } = &error else { panic!("{error:?}") };
    assert_eq!(parameters, &[("memory".to_owned(), "value must have a minimum value of 16".to_owned())]);
    assert!(error.to_string().contains("memory: value must"), "{error}");
}

#[tokio::test]
async fn a_wrong_token_has_an_empty_body_and_the_reason_in_the_status_line() {
    let (url, task) =
        raw(b"HTTP/1.1 401 invalid token value!\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
    let error = builder(&[&url]).build().unwrap().version().await.unwrap_err();
    let Error::WrongToken { token, reason, .. } = &error else { panic!("{error:?}") };
    assert_eq!((token.as_str(), reason.as_str()), ("u@pve!tk", "invalid token value!"));
    task.abort();
}

#[tokio::test]
async fn a_message_in_the_status_line_alone_is_read() {
    let (url, task) = raw(b"HTTP/1.1 500 CT is locked (backup)\r\nContent-Length: 13\r\nConnection: close\r\n\r\n{\"data\":null}").await;
    let client = builder(&[&url]).build().unwrap();
    let error = client.ct(&node(), vmid()).delete(Delete::default()).await.unwrap_err();
    assert_eq!(error.lock(), Some("backup"));
    task.abort();
}

#[tokio::test]
async fn what_is_no_answer_of_the_api_is_shown_with_its_beginning() {
    let long = format!("<html>{}", "x".repeat(5000));
    for (status, text) in [
        (200, "<html>Welcome to the proxy</html>"),
        (200, ""),
        (200, "[]"),
        (200, r#"{"other":1}"#),
        (200, r#"{"data":{"version":"#),
        (200, r#"{"data":["9.2"]}"#),
        (200, r#"{"data":{"version":"none","release":"9.2"}}"#),
        (404, "<html>no such page</html>"),
        (500, long.as_str()),
        (403, "<html>forbidden by the proxy</html>"),
        (302, ""),
    ] {
        let server = Server::start(&[(status, text)]).await;
        let error = server.client().version().await.unwrap_err();
        match &error {
            Error::Unexpected { call, got, .. } => {
                assert_eq!(call, &CallName { method: "GET", path: "/version".into() });
                assert!(got.chars().count() <= 200);
            }
            Error::Server { status: 302, .. } => assert_eq!(status, 302),
            other => panic!("{status} {text:?}: {other:?}"),
        }
        assert_eq!(server.asked().len(), 1);
    }
}

#[tokio::test]
async fn a_page_of_a_proxy_that_cannot_reach_the_server_says_unreachable() {
    let server = Server::start(&[(502, "<html>Bad Gateway</html>")]).await;
    let error = server.client().version().await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert_eq!(server.asked().len(), 3, "a GET is tried three times");
}

#[tokio::test]
async fn an_answer_that_is_too_long_is_not_read_to_its_end() {
    let text = format!(r#"{{"data":"{}"}}"#, "x".repeat(100_000));
    let server = Server::start(&[(200, &text)]).await;
    let client = builder(&[&server.url]).max_answer(10_000).build().unwrap();
    let error = client.version().await.unwrap_err();
    assert!(error.to_string().contains("longer than 10000 bytes"), "{error}");
}

#[tokio::test]
async fn a_list_that_is_too_long_is_refused() {
    let text = format!(r#"{{"data":[{}{{}}]}}"#, "{},".repeat(50_000));
    let server = Server::start(&[(200, &text)]).await;
    let error = server.client().pools().await.unwrap_err();
    assert!(error.to_string().contains("50001 entries"), "{error}");
}

#[tokio::test]
async fn null_is_an_empty_list() {
    let server = Server::with(json!(null)).await;
    let client = server.client();
    assert!(client.ct(&node(), vmid()).interfaces().await.unwrap().is_empty());
    assert!(client.resources(None).await.unwrap().is_empty());
    assert!(client.ct(&node(), vmid()).firewall_rules().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_request_that_the_server_would_not_take_is_not_sent() {
    let server = Server::with(json!(null)).await;
    let client = server.client();
    let node = node();
    let ct = client.ct(&node, vmid());
    let set = LxcConfig { description: Some("x".repeat(600_000)), ..LxcConfig::default() };
    let error = ct.set_config(&crate::api::ct::ConfigChange { set, ..Default::default() }).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error:?}");
    let set = LxcConfig { lxc: vec![("lxc.include".into(), "/x".into())], ..LxcConfig::default() };
    let error = ct.set_config(&crate::api::ct::ConfigChange { set, ..Default::default() }).await.unwrap_err();
    assert!(error.to_string().contains("no raw"), "{error}");
    assert!(server.asked().is_empty());
}

#[tokio::test]
async fn an_old_version_is_refused_and_a_newer_one_is_not() {
    for (version, good) in
        [("9.0.10", false), ("8.4.1", false), ("9.1.0", true), ("9.2.11", true), ("10.0.1", true)]
    {
        let server = Server::with(json!({"version": version, "release": "x", "repoid": "y"})).await;
        let result = server.client().check_version().await;
        assert_eq!(result.is_ok(), good, "{version}: {result:?}");
        if let Err(error) = result {
            assert!(error.to_string().contains("9.1.0 or later is needed"), "{error}");
        }
    }
}

#[tokio::test]
async fn no_error_and_no_debug_output_shows_the_secret() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    for (status, text) in [(401, ""), (403, ""), (500, "<html>"), (200, "x"), (599, ""), (400, "{}")] {
        let server = Server::start(&[(status, text)]).await;
        let log = Arc::clone(&log);
        let observer = move |o: &crate::Observed<'_>| log.lock().unwrap().push(format!("{o:?}"));
        let client = builder(&[&server.url]).observer(observer).build().unwrap();
        let error = client.ct(&node(), vmid()).start().await.unwrap_err();
        seen.lock().unwrap().push(format!("{client:?} {error} {error:?}"));
        assert_eq!(
            server.asked()[0].header("authorization"),
            Some(format!("PVEAPIToken=u@pve!tk={SECRET}").as_str())
        );
    }
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 12);
    assert!(seen.iter().all(|text| !text.contains(SECRET)), "{seen:?}");
}
