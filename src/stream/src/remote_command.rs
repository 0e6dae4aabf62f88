//! The server's side of exec and attach: stdin, stdout, stderr, resizes and a status, over SPDY or WebSocket.
//!
//! Protocols as in k8s.io/apimachinery's `remotecommand`: v1 to v4 over SPDY, "", channel, base64.channel, v4 and v5 over
//! WebSocket.

use std::{future::Future, time::Duration};

use bytes::Bytes;
use futures::future::{BoxFuture, Either};
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
    task::JoinHandle,
};

use crate::{
    error::{Error, Result},
    pipe::{StreamReader, StreamWriter},
    spdy::{Role, Session, header},
    upgrade::{self, Io, Wanted},
    websocket::{Channels, Coding},
};

/// How long a client may take to open its streams; as the kubelet's `--streaming-connection-creation-timeout`.
const STREAMS_WITHIN: Duration = Duration::from_secs(30);
/// The longest resize message, in bytes.
const MAX_RESIZE: usize = 1024;
const SPDY_PROTOCOLS: [&str; 4] =
    ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];
const WEBSOCKET_PROTOCOLS: [&str; 5] = [
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
];

/// Which streams a command has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offer {
    /// Its input.
    pub stdin: bool,
    /// Its output.
    pub stdout: bool,
    /// Its error output; a terminal has none.
    pub stderr: bool,
    /// A terminal, which can be resized.
    pub tty: bool,
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct TerminalSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// The streams of a command, as its client sees them.
pub struct RemoteCommand {
    /// What the client sends; ends with an error when the client goes away.
    pub stdin: Option<StreamReader>,
    /// To the client.
    pub stdout: Option<StreamWriter>,
    /// To the client.
    pub stderr: Option<StreamWriter>,
    /// Sizes of the client's terminal; ends when the client goes away.
    pub resize: mpsc::Receiver<TerminalSize>,
    /// How it ended.
    pub status: StatusWriter,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// With exit code 0.
    Success,
    /// With another exit code.
    ExitCode(i32),
    /// It could not be run, or contact to it was lost.
    Error(String),
}

enum Connection {
    Spdy(Session),
    WebSocket(Channels),
}

/// Says how a command ended, and ends the connection. Dropped without, the connection is cut.
pub struct StatusWriter {
    stream: StreamWriter,
    /// Our half of the stream of stdin; it ends with the command.
    unused: Option<StreamWriter>,
    /// v4 and later: a `v1.Status` in JSON.
    structured: bool,
    connection: Connection,
    resizes: JoinHandle<()>,
}

impl StatusWriter {
    /// Sends the outcome after all that was written to stdout and stderr before, and ends the connection.
    ///
    /// # Errors
    /// The client went away.
    pub async fn finish(mut self, outcome: Outcome) -> Result<()> {
        let text = if self.structured { structured(&outcome) } else { plain(&outcome) };
        let said = async {
            if let Some(mut unused) = self.unused.take() {
                unused.shutdown().await?;
            }
            self.stream.write_all(text.as_bytes()).await?;
            self.stream.shutdown().await
        }
        .await;
        match self.connection {
            Connection::Spdy(session) => session.close().await,
            Connection::WebSocket(channels) => channels.close().await,
        }
        self.resizes.abort();
        Ok(said?)
    }
}

/// A `v1.Status` as k8s.io/apimachinery's `remotecommand` reads it.
fn structured(outcome: &Outcome) -> String {
    let status = match outcome {
        Outcome::Success => serde_json::json!({"metadata": {}, "status": "Success"}),
        Outcome::ExitCode(code) => serde_json::json!({
            "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
        }),
        Outcome::Error(message) => serde_json::json!({
            "metadata": {}, "status": "Failure", "reason": "InternalError", "code": 500,
            "message": format!("Internal error occurred: {message}"),
            "details": {"causes": [{"message": message}]},
        }),
    };
    status.to_string()
}

/// What clients before v4 get: nothing, or a line of text.
fn plain(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Success => String::new(),
        Outcome::ExitCode(code) => format!("command terminated with non-zero exit code: exit status {code}"),
        Outcome::Error(message) => message.clone(),
    }
}

/// Answers an exec or attach request. The answer must be sent by hyper before the future can complete; the future ends with
/// the command's streams once all are there.
pub fn remote_command<B>(
    mut request: Request<B>,
    offer: Offer,
) -> (Response<Full<Bytes>>, impl Future<Output = Result<RemoteCommand>> + Send + use<B>) {
    let refused = |response| {
        let error = Error::Upgrade("the request asks for no protocol that is served".into());
        (response, Either::Left(std::future::ready(Err(error))))
    };
    let wanted = match upgrade::wanted(request.headers()) {
        Ok(wanted) => wanted,
        Err(text) => return refused(upgrade::refuse(StatusCode::BAD_REQUEST, &text)),
    };
    if !(offer.stdin || offer.stdout || offer.stderr) {
        let text = "you must specify at least 1 of stdin, stdout, stderr";
        return refused(upgrade::refuse(StatusCode::BAD_REQUEST, text));
    }
    let pending = hyper::upgrade::on(&mut request);
    let (response, future): (_, BoxFuture<'static, Result<RemoteCommand>>) = match wanted {
        Wanted::Spdy => {
            let theirs = upgrade::offered(request.headers(), upgrade::STREAM_PROTOCOL);
            let Some(protocol) = spdy_protocol(&theirs) else {
                return refused(upgrade::no_protocol(&theirs, &SPDY_PROTOCOLS));
            };
            let future = async move { over_spdy(upgrade::upgraded(pending).await?, offer, protocol).await };
            (upgrade::switch_spdy(protocol), Box::pin(future))
        }
        Wanted::WebSocket { key } => {
            let theirs = upgrade::offered(request.headers(), "sec-websocket-protocol");
            let Some(protocol) = websocket_protocol(&theirs) else {
                return refused(upgrade::no_protocol(&theirs, &WEBSOCKET_PROTOCOLS));
            };
            let future =
                async move { over_websocket(upgrade::upgraded(pending).await?, offer, protocol).await };
            (upgrade::switch_websocket(&key, protocol), Box::pin(future))
        }
    };
    (response, Either::Right(future))
}

/// The first of the client's protocols that is served; a client that names none speaks the first version.
fn spdy_protocol(offered: &[String]) -> Option<&'static str> {
    if offered.is_empty() {
        return Some("channel.k8s.io");
    }
    offered.iter().find_map(|o| SPDY_PROTOCOLS.into_iter().find(|s| s == o))
}

fn websocket_protocol(offered: &[String]) -> Option<&'static str> {
    if offered.is_empty() {
        return Some("");
    }
    offered.iter().find_map(|o| WEBSOCKET_PROTOCOLS.into_iter().find(|s| s == o))
}

#[derive(Default)]
struct Collected {
    error: Option<StreamWriter>,
    stdin: Option<StreamReader>,
    stdout: Option<StreamWriter>,
    stderr: Option<StreamWriter>,
    resize: Option<StreamReader>,
    /// Our half of the stream of stdin.
    unused: Option<StreamWriter>,
}

impl Collected {
    fn missing(&self, offer: Offer, resizes: bool) -> String {
        let wanted = [
            ("error", true, self.error.is_some()),
            ("stdin", offer.stdin, self.stdin.is_some()),
            ("stdout", offer.stdout, self.stdout.is_some()),
            ("stderr", offer.stderr && !offer.tty, self.stderr.is_some()),
            ("resize", offer.tty && resizes, self.resize.is_some()),
        ];
        let names: Vec<&str> =
            wanted.iter().filter(|(_, want, there)| *want && !*there).map(|(n, ..)| *n).collect();
        names.join(", ")
    }
}

async fn over_spdy(io: Io, offer: Offer, protocol: &'static str) -> Result<RemoteCommand> {
    let mut session = Session::new(io, Role::Server)?;
    let resizes = matches!(protocol, "v4.channel.k8s.io" | "v3.channel.k8s.io");
    let mut got = Collected::default();
    let collect = async {
        while !got.missing(offer, resizes).is_empty() {
            let stream = session.accept().await.ok_or(Error::Closed)?;
            let kind = header(&stream.headers, "streamtype").unwrap_or_default().to_owned();
            let (reader, mut writer) = stream.into_parts();
            match kind.as_str() {
                "error" => got.error = Some(writer),
                "stdout" => got.stdout = Some(writer),
                "stderr" => got.stderr = Some(writer),
                "stdin" => {
                    // Nothing is ever sent on it, but its end would tell the client that no more input is wanted.
                    got.unused = Some(writer);
                    got.stdin = Some(reader);
                }
                "resize" => {
                    writer.shutdown().await?;
                    got.resize = Some(reader);
                }
                _ => return Err(Error::spdy(format!("a stream has the unknown type {kind:?}"))),
            }
        }
        Ok(())
    };
    match tokio::time::timeout(STREAMS_WITHIN, collect).await {
        Ok(done) => done?,
        Err(_) => {
            let missing = got.missing(offer, resizes);
            return Err(Error::StreamsMissing { seconds: STREAMS_WITHIN.as_secs(), missing });
        }
    }
    let structured = protocol == "v4.channel.k8s.io";
    command(got, Connection::Spdy(session), structured)
}

async fn over_websocket(io: Io, offer: Offer, protocol: &'static str) -> Result<RemoteCommand> {
    let coding = Coding { base64: protocol.contains("base64"), close: protocol == "v5.channel.k8s.io" };
    let readable: &[u8] = if offer.stdin { &[0, 4] } else { &[4] };
    let mut channels = Channels::new(upgrade::socket(io).await, coding, readable);
    let got = Collected {
        error: Some(channels.writer(3)),
        stdin: channels.reader(0),
        stdout: offer.stdout.then(|| channels.writer(1)),
        stderr: (offer.stderr && !offer.tty).then(|| channels.writer(2)),
        resize: channels.reader(4),
        unused: None,
    };
    channels
        .greet(if got.stdout.is_some() {
            1
        } else if got.stderr.is_some() {
            2
        } else {
            3
        })
        .await?;
    let structured = protocol.starts_with("v4") || protocol.starts_with("v5");
    command(got, Connection::WebSocket(channels), structured)
}

fn command(got: Collected, connection: Connection, structured: bool) -> Result<RemoteCommand> {
    let (sizes, resize) = mpsc::channel(8);
    let resizes = tokio::spawn(read_sizes(got.resize, sizes));
    let stream = got.error.ok_or(Error::Closed)?;
    let status = StatusWriter { stream, unused: got.unused, structured, connection, resizes };
    Ok(RemoteCommand { stdin: got.stdin, stdout: got.stdout, stderr: got.stderr, resize, status })
}

/// Reads sizes, one JSON object after another.
async fn read_sizes(reader: Option<StreamReader>, sizes: mpsc::Sender<TerminalSize>) {
    let Some(mut reader) = reader else { return };
    let mut text = Vec::new();
    let mut part = [0; MAX_RESIZE];
    while let Ok(count) = reader.read(&mut part).await {
        if count == 0 {
            return;
        }
        text.extend_from_slice(part.get(..count).unwrap_or_default());
        let mut values = serde_json::Deserializer::from_slice(&text).into_iter::<TerminalSize>();
        let mut used = 0;
        while let Some(Ok(size)) = values.next() {
            used = values.byte_offset();
            if sizes.send(size).await.is_err() {
                return;
            }
        }
        text.drain(..used);
        if text.len() > MAX_RESIZE {
            tracing::debug!("a client sends resizes that are none");
            return;
        }
    }
}
