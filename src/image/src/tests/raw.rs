//! A registry that answers byte by byte what a test wants: for what no proper HTTP server would send.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use moxlet_ids::Digest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::registry::Image;

/// A request.
#[derive(Debug, Clone)]
pub(super) struct Request {
    /// How many of the same path came before.
    pub(super) nth: usize,
    pub(super) path: String,
    headers: HashMap<String, String>,
}

impl Request {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// Where the wanted part begins.
    pub(super) fn from(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// What is done for an answer; then the connection is closed.
#[derive(Debug, Clone)]
pub(super) enum Step {
    Send(Vec<u8>),
    /// The same again and again, at this pace.
    Repeat(Vec<u8>, Duration),
    Wait(Duration),
    Hang,
}

/// An answer as it should be.
pub(super) fn answer(status: &str, headers: &str, body: &[u8]) -> Vec<Step> {
    let head =
        format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n", body.len());
    vec![Step::Send([head.as_bytes(), body].concat())]
}

/// The server.
pub(super) struct Raw {
    pub(super) address: String,
    log: Arc<Mutex<Vec<Request>>>,
}

impl Raw {
    /// Serves `app:v1`; requests for which `special` has an answer get that.
    pub(super) async fn start(
        image: &Image,
        special: impl Fn(&Request) -> Option<Vec<Step>> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (config, layer) = image.blobs();
        let contents = Arc::new([image.manifest(), config, layer]);
        let (special, requests) = (Arc::new(special), Arc::clone(&log));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (special, requests, contents) =
                    (Arc::clone(&special), Arc::clone(&requests), Arc::clone(&contents));
                tokio::spawn(async move {
                    serve(stream, &requests, |r| special(r).unwrap_or_else(|| usual(r, &*contents))).await
                });
            }
        });
        Self { address, log }
    }

    pub(super) fn name(&self) -> String {
        format!("{}/app:v1", self.address)
    }

    /// The requests whose path contains a text.
    pub(super) fn requests(&self, part: &str) -> Vec<Request> {
        self.log.lock().unwrap().iter().filter(|r| r.path.contains(part)).cloned().collect()
    }
}

async fn serve(
    mut stream: TcpStream,
    log: &Mutex<Vec<Request>>,
    answer: impl Fn(&Request) -> Vec<Step>,
) -> Option<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let path = lines.next()?.split(' ').nth(1)?.to_owned();
    let headers =
        lines.filter_map(|l| l.split_once(": ")).map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned()));
    let request = {
        let mut log = log.lock().unwrap();
        let nth = log.iter().filter(|r| r.path == path).count();
        log.push(Request { nth, path, headers: headers.collect() });
        log.last()?.clone()
    };
    for step in answer(&request) {
        match step {
            Step::Send(bytes) => stream.write_all(&bytes).await.ok()?,
            Step::Repeat(bytes, pace) => loop {
                stream.write_all(&bytes).await.ok()?;
                tokio::time::sleep(pace).await;
            },
            Step::Wait(time) => tokio::time::sleep(time).await,
            Step::Hang => std::future::pending().await,
        }
    }
    stream.shutdown().await.ok()
}

/// Manifest and blobs, with ranges.
pub(super) fn usual(request: &Request, contents: &[Vec<u8>]) -> Vec<Step> {
    let wanted = request.path.rsplit('/').next().unwrap();
    let found = contents.iter().find(|c| wanted == "v1" || Digest::of(c).as_str() == wanted);
    match (found, request.from()) {
        (None, _) => answer("404 Not Found", "", b""),
        (Some(bytes), None) => answer("200 OK", "", bytes),
        (Some(bytes), Some(from)) => {
            let range = format!("content-range: bytes {from}-{}/{}\r\n", bytes.len() - 1, bytes.len());
            answer("206 Partial Content", &range, &bytes[from..])
        }
    }
}
