//! Commands and forwarded ports between our server, upgraded by hyper, and clients over SPDY and WebSocket.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::similar_names)]

use std::{convert::Infallible, future::Future};

use futures::{SinkExt, StreamExt};
use http::Request;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use moxlet_stream::{
    Offer, Outcome, PortForward, RemoteCommand, Result, TerminalSize, client::Client, copy, port_forward,
    remote_command,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    sync::mpsc,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, protocol::Role},
};

const ALL: Offer = Offer { stdin: true, stdout: true, stderr: true, tty: false };

/// Serves one request; gives the client's end after its upgrade, and the answer's head.
async fn serve<T, F>(
    head: &str,
    answer: impl Fn(Request<Incoming>) -> (http::Response<http_body_util::Full<bytes::Bytes>>, F)
    + Send
    + Sync
    + 'static,
) -> (DuplexStream, String, mpsc::Receiver<Result<T>>)
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let (mut client, server) = tokio::io::duplex(64 << 10);
    let (results, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let service = hyper::service::service_fn(move |request| {
            let (response, future) = answer(request);
            let results = results.clone();
            tokio::spawn(async move { results.send(future.await).await });
            async move { Ok::<_, Infallible>(response) }
        });
        let _ = hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(server), service)
            .with_upgrades()
            .await;
    });
    client.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(client.read_u8().await.unwrap());
    }
    (client, String::from_utf8(answer).unwrap(), receiver)
}

fn spdy(protocols: &[&str]) -> String {
    let mut head = "POST / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n".to_owned();
    for protocol in protocols {
        head.push_str(&format!("X-Stream-Protocol-Version: {protocol}\r\n"));
    }
    head + "\r\n"
}

fn websocket(protocol: &str, query: &str) -> String {
    let protocol =
        if protocol.is_empty() { String::new() } else { format!("Sec-WebSocket-Protocol: {protocol}\r\n") };
    format!(
        "GET /{query} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{protocol}\r\n"
    )
}

async fn over_spdy(
    offer: Offer,
    protocols: &[&str],
) -> (Client, String, moxlet_stream::client::Command, RemoteCommand) {
    let (io, answer, mut command) = serve(&spdy(protocols), move |r| remote_command(r, offer)).await;
    let mut client = Client::new(io).unwrap();
    let theirs = client.command(offer).await.unwrap();
    let ours = command.recv().await.unwrap().unwrap();
    (client, answer, theirs, ours)
}

#[tokio::test]
async fn the_best_common_version_is_chosen() {
    let (_c, answer, ..) = over_spdy(ALL, &["v3.channel.k8s.io", "v2.channel.k8s.io"]).await;
    assert!(answer.to_ascii_lowercase().contains("x-stream-protocol-version: v3.channel.k8s.io"), "{answer}");
    let (_io, answer, _) = serve(&spdy(&["v9.channel.k8s.io"]), |r| remote_command(r, ALL)).await;
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    let (_io, answer, _) = serve("GET / HTTP/1.1\r\nHost: x\r\n\r\n", |r| remote_command(r, ALL)).await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
}

#[tokio::test]
async fn exit_codes_reach_clients_of_every_version() {
    for (protocol, expected) in
        [("v4.channel.k8s.io", r#""message":"42""#), ("v2.channel.k8s.io", "exit status 42")]
    {
        let (_client, _, mut theirs, ours) = over_spdy(ALL, &[protocol]).await;
        let finish = tokio::spawn(ours.status.finish(Outcome::ExitCode(42)));
        let status = theirs.status().await.unwrap();
        assert!(status.contains(expected), "{status}");
        drop(_client);
        finish.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_hundred_megabytes_pass_both_ways_and_stdin_ends_by_half_close() {
    const SIZE: usize = 100 << 20;
    let (client, _, mut theirs, ours) = over_spdy(ALL, &["v4.channel.k8s.io"]).await;
    let server = tokio::spawn(async move {
        let (mut stdin, mut stdout) = (ours.stdin.unwrap(), ours.stdout.unwrap());
        let copied = tokio::io::copy(&mut stdin, &mut stdout).await.unwrap();
        stdout.shutdown().await.unwrap();
        ours.status.finish(Outcome::Success).await.unwrap();
        copied
    });
    let mut stdin = theirs.stdin.take().unwrap();
    let feeder = tokio::spawn(async move {
        let chunk: Vec<u8> = (0..1_usize << 20).map(|n| u8::try_from(n * 31 % 251).unwrap()).collect();
        for _ in 0..SIZE / chunk.len() {
            stdin.write_all(&chunk).await.unwrap();
        }
        stdin.shutdown().await.unwrap();
    });
    let mut stdout = theirs.stdout.take().unwrap();
    let (mut seen, mut buffer) = (0_usize, vec![0; 64 << 10]);
    loop {
        let count = stdout.read(&mut buffer).await.unwrap();
        if count == 0 {
            break;
        }
        for (n, byte) in buffer[..count].iter().enumerate() {
            assert_eq!(usize::from(*byte), (seen + n) % (1 << 20) * 31 % 251);
        }
        seen += count;
    }
    assert_eq!(seen, SIZE);
    feeder.await.unwrap();
    assert!(theirs.status().await.unwrap().contains("Success"));
    drop(client);
    assert_eq!(server.await.unwrap(), SIZE as u64);
}

#[tokio::test]
async fn resizes_arrive_in_order() {
    let offer = Offer { stdin: true, stdout: true, stderr: false, tty: true };
    let (_client, _, mut theirs, mut ours) = over_spdy(offer, &["v4.channel.k8s.io"]).await;
    let resize = theirs.resize.as_mut().unwrap();
    resize.write_all(b"{\"Width\":80,\"Height\":24}\n{\"Width\":100,").await.unwrap();
    resize.write_all(b"\"Height\":50}\n").await.unwrap();
    assert_eq!(ours.resize.recv().await, Some(TerminalSize { width: 80, height: 24 }));
    assert_eq!(ours.resize.recv().await, Some(TerminalSize { width: 100, height: 50 }));
}

#[tokio::test]
async fn a_client_that_goes_away_is_noticed_on_every_stream() {
    let (client, _, theirs, ours) = over_spdy(ALL, &["v4.channel.k8s.io"]).await;
    drop(theirs);
    drop(client);
    let mut stdout = ours.stdout.unwrap();
    let mut stdin = ours.stdin.unwrap();
    let _ = stdin.read_u8().await.unwrap_err();
    let chunk = vec![0; 1 << 20];
    while stdout.write_all(&chunk).await.is_ok() {}
}

fn message(channel: u8, data: &[u8]) -> Message {
    Message::binary([&[channel], data].concat())
}

#[tokio::test]
async fn websocket_v5_carries_data_half_close_and_status() {
    let (io, answer, mut command) =
        serve(&websocket("v5.channel.k8s.io", ""), |r| remote_command(r, ALL)).await;
    assert!(answer.to_ascii_lowercase().contains("sec-websocket-protocol: v5.channel.k8s.io"), "{answer}");
    assert!(answer.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{answer}");
    let mut socket = WebSocketStream::from_raw_socket(io, Role::Client, None).await;
    let ours = command.recv().await.unwrap().unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), message(1, b""));
    socket.send(message(0, b"hello")).await.unwrap();
    socket.send(message(255, &[0])).await.unwrap();
    let mut text = String::new();
    ours.stdin.unwrap().read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "hello");
    let mut stdout = ours.stdout.unwrap();
    stdout.write_all(b"out").await.unwrap();
    let finish = tokio::spawn(ours.status.finish(Outcome::ExitCode(3)));
    assert_eq!(socket.next().await.unwrap().unwrap(), message(1, b"out"));
    let status = socket.next().await.unwrap().unwrap().into_data();
    assert_eq!(status[0], 3);
    assert!(String::from_utf8_lossy(&status).contains("NonZeroExitCode"));
    while let Some(Ok(_)) = socket.next().await {}
    finish.await.unwrap().unwrap();
}

#[tokio::test]
async fn websocket_in_base64_carries_text() {
    let (io, _, mut command) =
        serve(&websocket("base64.channel.k8s.io", ""), |r| remote_command(r, ALL)).await;
    let mut socket = WebSocketStream::from_raw_socket(io, Role::Client, None).await;
    let ours = command.recv().await.unwrap().unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("1"));
    socket.send(Message::text("0aGk=")).await.unwrap();
    let mut two = [0; 2];
    ours.stdin.unwrap().read_exact(&mut two).await.unwrap();
    assert_eq!(&two, b"hi");
    ours.stdout.unwrap().write_all(b"hi").await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("1aGk="));
}

/// Answers every forwarded connection with an echo.
async fn echo(mut forwards: PortForward) {
    while let Some(mut forward) = forwards.next().await {
        tokio::spawn(async move {
            let (near, far) = tokio::io::duplex(1 << 16);
            tokio::spawn(async move {
                let (mut read, mut write) = tokio::io::split(far);
                tokio::io::copy(&mut read, &mut write).await.unwrap();
                write.shutdown().await.unwrap();
            });
            copy(forward.data, near).await.unwrap();
            forward.error.shutdown().await.unwrap();
        });
    }
}

#[tokio::test]
async fn fifty_forwarded_connections_share_one_session() {
    let (io, _, mut forwards) = serve(&spdy(&["portforward.k8s.io"]), port_forward).await;
    let mut client = Client::new(io).unwrap();
    tokio::spawn(echo(forwards.recv().await.unwrap().unwrap()));
    let mut tasks = Vec::new();
    for n in 0..50_u8 {
        let (data, mut error) = client.forward(80, u32::from(n)).await.unwrap();
        tasks.push(tokio::spawn(async move {
            let (mut read, mut write) = data.into_parts();
            let sent = vec![n; 200_000];
            let copy = sent.clone();
            let writer = tokio::spawn(async move {
                write.write_all(&copy).await.unwrap();
                write.shutdown().await.unwrap();
            });
            let mut got = Vec::new();
            read.read_to_end(&mut got).await.unwrap();
            assert!(got == sent);
            writer.await.unwrap();
            let mut text = String::new();
            error.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "");
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn websocket_ports_are_named_before_their_data() {
    let (io, _, mut forwards) = serve(&websocket("v4.channel.k8s.io", "?ports=80"), port_forward).await;
    let mut socket = WebSocketStream::from_raw_socket(io, Role::Client, None).await;
    let mut forwards = forwards.recv().await.unwrap().unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), message(0, &[80, 0]));
    assert_eq!(socket.next().await.unwrap().unwrap(), message(1, &[80, 0]));
    let mut forward = forwards.next().await.unwrap();
    assert_eq!(forward.port, 80);
    socket.send(message(0, b"x")).await.unwrap();
    assert_eq!(forward.data.read_u8().await.unwrap(), b'x');
}
