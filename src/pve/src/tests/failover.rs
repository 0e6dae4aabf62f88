//! Several servers, retries, places.

use std::time::Duration;

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
async fn a_connection_that_the_server_is_about_to_close_is_not_used_again() {
    let (url, connections, task) = counting().await;
    let client = builder(&[&url]).build().unwrap();
    client.pools().await.unwrap();
    client.pools().await.unwrap();
    assert_eq!(connections.load(Ordering::Relaxed), 1);
    // pveproxy closes after 5 s. However long this sleep takes, it is never shorter.
    tokio::time::sleep(Duration::from_millis(4_200)).await;
    client.pools().await.unwrap();
    assert_eq!(connections.load(Ordering::Relaxed), 2);
    task.abort();
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
async fn no_more_calls_than_there_are_places_are_at_a_server_whatever_they_are_about() {
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
    for (limits, expected) in [(Limits::default(), 2), (Limits { calls: 3 }, 3)] {
        most.store(0, Ordering::SeqCst);
        let client = builder(&[&url]).limits(limits).build().unwrap();
        let mut calls = tokio::task::JoinSet::new();
        for number in 0..30 {
            let client = client.clone();
            calls.spawn(async move {
                let other: crate::NodeName = "other".parse().unwrap();
                // What comes back is a start's answer in any case.
                match number % 4 {
                    0 => drop(client.ct(&node(), vmid()).start().await.unwrap()),
                    1 => drop(client.ct(&other, vmid()).start().await.unwrap()),
                    2 => drop(client.ct(&node(), vmid()).config().await),
                    _ => drop(client.permissions(None).await),
                }
            });
        }
        calls.join_all().await;
        assert_eq!(most.load(Ordering::SeqCst), expected);
    }
    server.abort();
}
