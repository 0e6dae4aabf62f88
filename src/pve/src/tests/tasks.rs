//! Waiting for tasks.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    Error,
    api::task::{TaskEnd, Wait},
};

fn status(status: &str, exit: Option<&str>) -> String {
    json!({"data": {"upid": UPID, "status": status, "exitstatus": exit, "node": "a", "pid": "1", "type": "vzstart"}}).to_string()
}

fn long() -> Wait {
    Wait::within(Duration::from_secs(60))
}

#[tokio::test]
async fn a_task_that_ends_well_is_over_with_or_without_warnings() {
    let running = status("running", None);
    for (exit, end) in [("OK", TaskEnd::Ok), ("WARNINGS: 3", TaskEnd::Warnings(3))] {
        let server = Server::start(&[(200, &running), (200, &status("stopped", Some(exit)))]).await;
        assert_eq!(server.client().wait(&upid(), &long()).await.unwrap(), end);
        let line = &server.asked()[0].line;
        assert!(line.ends_with("/nodes/a/tasks/UPID%3Aa%3A0000C0DE%3A0A1B2C3D4%3A66AABBCC%3Avzstart%3A101%3Au%40pve%21tk%3A/status"), "{line}");
    }
}

#[tokio::test]
async fn a_task_that_fails_is_an_error_with_the_end_of_its_log() {
    let lines: Vec<_> = (29..=40).map(|n| json!({"n": n, "t": format!("line {n}\u{1b}[0m")})).collect();
    let first = json!({"data": [{"n": 1, "t": "line 1"}], "total": 40}).to_string();
    let tail = json!({"data": lines, "total": 40}).to_string();
    let over = status("stopped", Some("CT is locked (backup)"));
    let server = Server::start(&[(200, &over), (200, &first), (200, &tail)]).await;
    let error = server.client().wait(&upid(), &long()).await.unwrap_err();
    assert_eq!(error.lock(), Some("backup"));
    let Error::TaskFailed { log, exit, .. } = &error else { panic!("{error:?}") };
    assert_eq!((exit.as_str(), log.len()), ("CT is locked (backup)", 12));
    assert_eq!(log.last().map(String::as_str), Some("line 40[0m"), "control characters are left out");
    assert!(server.asked()[2].line.ends_with("log?start=28&limit=12"), "{:?}", server.asked()[2]);
}

#[tokio::test]
async fn a_task_whose_log_is_gone_still_fails_with_its_exit_status() {
    let over = status("stopped", Some("unable to start"));
    let server = Server::start(&[(200, &over), (500, r#"{"data":null,"message":"no such task\n"}"#)]).await;
    let error = server.client().wait(&upid(), &long()).await.unwrap_err();
    let Error::TaskFailed { log, reason: None, .. } = &error else { panic!("{error:?}") };
    assert!(log[0].contains("cannot be read"), "{log:?}");
    let server = Server::start(&[(200, &status("stopped", None)), (200, r#"{"data":null}"#)]).await;
    let error = server.client().wait(&upid(), &long()).await.unwrap_err();
    assert!(error.to_string().contains("without saying how"), "{error}");
}

#[tokio::test]
async fn a_task_that_never_ends_is_waited_for_no_longer_than_said() {
    let server = Server::start(&[(200, &status("running", None))]).await;
    let error = server.client().wait(&upid(), &Wait::within(Duration::from_millis(300))).await.unwrap_err();
    assert!(matches!(error, Error::TaskTimeout { .. }) && error.may_have_happened(), "{error:?}");
    assert!(server.asked().len() < 5, "it backs off");
}

#[tokio::test]
async fn waiting_can_be_called_off() {
    let server = Server::start(&[(200, &status("running", None))]).await;
    let cancel = CancellationToken::new();
    cancel.cancel();
    let error = server.client().wait(&upid(), &long().or_until(cancel)).await.unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{error:?}");
}

#[tokio::test]
async fn a_server_that_is_away_for_a_while_does_not_end_the_waiting() {
    let over = status("stopped", Some("OK"));
    let server = Server::start(&[(596, ""), (596, ""), (596, ""), (596, ""), (200, &over)]).await;
    assert_eq!(server.client().wait(&upid(), &long()).await.unwrap(), TaskEnd::Ok);
}

#[tokio::test]
async fn a_log_is_bounded_in_lines_and_length() {
    let lines: Vec<_> = (0..100).map(|n| json!({"n": n, "t": "x".repeat(5000)})).collect();
    let server = Server::start(&[(200, &json!({"data": lines}).to_string())]).await;
    let log = server.client().task_log_tail(&upid(), 10).await.unwrap();
    assert_eq!(log.len(), 10);
    assert!(log.iter().all(|l| l.len() == 2000));
}
