//! The client against servers that do what real ones do on a bad day.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod calls;
mod failover;
mod faults;
mod tasks;
mod tls;

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{Request, State},
    response::Response,
};
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt, io::AsyncWriteExt, net::TcpListener, task::JoinHandle};

use crate::{Builder, Client, Endpoint, NodeName, Trust, Upid};

pub(crate) const SECRET: &str = "aaaa-very-secret";
pub(crate) const UPID: &str = "UPID:a:0000C0DE:0A1B2C3D4:66AABBCC:vzstart:101:u@pve!tk:";

pub(crate) fn node() -> NodeName {
    "a".parse().unwrap()
}

pub(crate) fn vmid() -> crate::Vmid {
    crate::Vmid::new(101).unwrap()
}

pub(crate) fn upid() -> Upid {
    UPID.parse().unwrap()
}

pub(crate) fn builder(urls: &[&str]) -> Builder {
    let start = Client::builder(format!("u@pve!tk={SECRET}").parse().unwrap());
    urls.iter().fold(start, |b, url| b.endpoint(Endpoint::new(url, Trust::System).unwrap()))
}

/// What was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) line: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Asked {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

#[derive(Default)]
struct Script {
    answers: VecDeque<(u16, String)>,
    asked: Vec<Asked>,
}

/// A server that gives the answers it was told, in their order, and the last one for ever.
pub(crate) struct Server {
    pub(crate) url: String,
    script: Arc<Mutex<Script>>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub(crate) async fn start(answers: &[(u16, &str)]) -> Self {
        let answers = answers.iter().map(|(s, b)| (*s, (*b).to_owned())).collect();
        let script = Arc::new(Mutex::new(Script { answers, asked: Vec::new() }));
        let app = Router::new().fallback(answer).with_state(Arc::clone(&script));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let task = tokio::spawn(async move {
            axum::serve(listener, app).await.unwrap();
        });
        Self { url, script, task }
    }

    /// One that answers with `data`.
    pub(crate) async fn with(data: Value) -> Self {
        Self::start(&[(200, &json!({ "data": data }).to_string())]).await
    }

    pub(crate) fn client(&self) -> Client {
        builder(&[&self.url]).build().unwrap()
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.script.lock().unwrap().asked.clone()
    }
}

async fn answer(State(script): State<Arc<Mutex<Script>>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = String::from_utf8(to_bytes(body, 1 << 20).await.unwrap().to_vec()).unwrap();
    let headers = parts.headers.iter().map(|(n, v)| (n.to_string(), v.to_str().unwrap().to_owned()));
    let line = format!("{} {}", parts.method, parts.uri);
    let mut script = script.lock().unwrap();
    script.asked.push(Asked { line, headers: headers.collect(), body });
    let (status, body) = if script.answers.len() > 1 {
        script.answers.pop_front().unwrap()
    } else {
        script.answers.front().unwrap().clone()
    };
    Response::builder().status(status).body(Body::from(body)).unwrap()
}

/// A server that writes these bytes to whoever asks, and closes.
pub(crate) async fn raw(bytes: &'static [u8]) -> (String, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let task = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = [0; 4096];
            let _ = stream.read(&mut buffer).await;
            let _ = stream.write_all(bytes).await;
        }
    });
    (url, task)
}

/// A server that answers every request with `{"data":null}`, keeps its connections, and counts them.
pub(crate) async fn counting() -> (String, Arc<AtomicUsize>, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let connections = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&connections);
    let task = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            count.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                while stream.read(&mut buffer).await.is_ok_and(|n| n > 0) {
                    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{\"data\":null}";
                    let _ = stream.write_all(answer).await;
                }
            });
        }
    });
    (url, connections, task)
}

/// An address where nobody listens.
pub(crate) async fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}
