//! Several servers, retries, places.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use axum::Json;

use super::*;
use crate::{Error, Limits};

const OK: &str = r#"{"data":null}"#;

fn task_answer() -> String {
    json!({ "data": UPID }).to_string()
}

#[tokio::test]
async fn a_write_goes_to_the_next_server_when_nobody_listens_at_the_first() {
    let server = Server::start(&[(200, &task_answer())]).await;
    let client = builder(&[&nobody().await, &server.url]).build().unwrap();
    let node = node();
    assert_eq!(client.ct(&node, vmid()).start().await.unwrap(), upid());
    assert_eq!(server.asked().len(), 1);
    // The first is passed over from now on: this call has no other try.
    client.ct(&node, vmid()).start().await.unwrap();
    assert_eq!(server.asked().len(), 2);
}

#[tokio::test]
async fn a_write_that_may_have_arrived_is_never_sent_again() {
    for bytes in [&b""[..], b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"data\"", b"garbage\r\n\r\n"] {
        let (url, task) = raw(bytes).await;
        let second = Server::start(&[(200, &task_answer())]).await;
        let client = builder(&[&url, &second.url]).build().unwrap();
        let result = client.ct(&node(), vmid()).start().await;
        let error = result.expect_err(&String::from_utf8_lossy(bytes));
        assert!(error.may_have_happened(), "{error:?}");
        assert!(error.to_string().contains("may have taken effect"), "{error}");
        assert!(second.asked().is_empty(), "{bytes:?}");
        task.abort();
    }
    for status in [502, 503, 504, 595, 596, 599] {
        let server = Server::start(&[(status, ""), (200, &task_answer())]).await;
        let error = server.client().ct(&node(), vmid()).start().await.unwrap_err();
        assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
        assert_eq!(server.asked().len(), 1, "{status}");
    }
}

#[tokio::test]
async fn a_read_is_tried_again_and_elsewhere() {
    let (url, task) = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"data\"").await;
    let second = Server::start(&[(596, ""), (200, OK)]).await;
    let client = builder(&[&url, &second.url]).build().unwrap();
    client.pools().await.unwrap();
    let lines: Vec<String> = second.asked().into_iter().map(|a| a.line).collect();
    assert!(!lines.is_empty() && lines.iter().all(|l| l == "GET /api2/json/pools"), "{lines:?}");
    task.abort();
}

#[tokio::test]
async fn a_node_that_the_server_cannot_reach_is_named() {
    let server = Server::start(&[(595, "")]).await;
    let error = server.client().cts(&node()).await.unwrap_err();
    assert!(error.to_string().contains(&format!("node a through {}", server.url)), "{error}");
}

#[tokio::test]
async fn all_servers_get_their_chance_before_a_call_fails() {
    let dead = [nobody().await, nobody().await, nobody().await, nobody().await];
    let server = Server::start(&[(200, OK)]).await;
    let urls = [dead[0].as_str(), &dead[1], &dead[2], &dead[3], &server.url];
    builder(&urls).build().unwrap().pools().await.unwrap();
    let error = builder(&urls[..4]).build().unwrap().pools().await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { sent: false, .. }), "{error:?}");
    assert!(error.to_string().contains("Connection refused"), "{error}");
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let client = builder(&[&url]).answer_timeout(Duration::from_millis(50)).build().unwrap();
    let error = client.ct(&node(), vmid()).start().await.unwrap_err();
    assert!(error.may_have_happened(), "{error:?}");
    assert!(error.to_string().contains("timed out"), "{error}");
}

#[tokio::test]
async fn no_more_calls_than_there_are_places_are_at_a_node() {
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let most_seen = Arc::clone(&most);
    let app = Router::new().fallback(async move || {
        most_seen.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(10)).await;
        now.fetch_sub(1, Ordering::SeqCst);
        Json(json!({ "data": UPID }))
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        axum::serve(listener, app).await.unwrap();
    });
    let client = builder(&[&url]).limits(Limits { writes: 3, reads: 1 }).build().unwrap();
    let calls: Vec<_> = (0..30)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.ct(&node(), vmid()).start().await })
        })
        .collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert_eq!(most.load(Ordering::SeqCst), 3);
    server.abort();
}
