//! The server's side of port forwarding: pairs of a data and an error stream, one pair a connection.
//!
//! Protocols as in k8s.io/streaming: `portforward.k8s.io` over SPDY, the same SPDY in a WebSocket tunnel, and the older
//! WebSocket form in which the ports stand in the request and every port has two channels.

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    time::Duration,
};

use bytes::Bytes;
use futures::future::{BoxFuture, Either};
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::Instant,
};

use crate::{
    error::{Error, Result},
    pipe::{Duplex, StreamWriter},
    spdy::{Incoming, Role, Session, header},
    upgrade::{self, Io, Wanted},
    websocket::{Channels, Coding, Tunnel},
};

const PROTOCOL: &str = "portforward.k8s.io";
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
const CHANNELS: [&str; 4] =
    ["v4.channel.k8s.io", "v4.base64.channel.k8s.io", "channel.k8s.io", "base64.channel.k8s.io"];
/// How long the second stream of a pair may take.
const PAIR_WITHIN: Duration = Duration::from_secs(30);
/// The most pairs that wait for their second stream.
const MAX_HALVES: usize = 512;
/// The most ports of the older WebSocket form: two channels each, below 128.
const MAX_PORTS: usize = 60;

/// One forwarded connection.
pub struct Forward {
    /// The pod's port.
    pub port: u16,
    /// What goes to and comes from the port.
    pub data: Duplex,
    /// What went wrong, for the client's eyes; `shutdown` it when nothing did.
    pub error: StreamWriter,
}

/// A client that forwards ports. Dropping it ends all its connections.
pub struct PortForward(Inner);

enum Inner {
    Spdy { session: Session, halves: HashMap<String, Half> },
    WebSocket { ready: VecDeque<Forward>, channels: Option<Channels> },
}

struct Half {
    stream: Incoming,
    is_error: bool,
    since: Instant,
}

impl PortForward {
    fn spdy<T>(io: T) -> Result<Self>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        Ok(Self(Inner::Spdy { session: Session::new(io, Role::Server)?, halves: HashMap::new() }))
    }

    /// The next connection; `None` when the client has gone.
    ///
    /// Cancel safe.
    pub async fn next(&mut self) -> Option<Forward> {
        match &mut self.0 {
            Inner::Spdy { session, halves } => loop {
                let stream = session.accept().await?;
                match pair(halves, stream) {
                    Ok(Some(forward)) => return Some(forward),
                    Ok(None) => {}
                    Err(error) => {
                        tracing::debug!(%error, "a port-forward client is cut off");
                        return None;
                    }
                }
            },
            Inner::WebSocket { ready, channels } => {
                if let Some(forward) = ready.pop_front() {
                    return Some(forward);
                }
                // All ports were in the request: nothing more comes, until the tasks of the connection end.
                channels.as_mut()?.ended().await;
                None
            }
        }
    }
}

/// Takes a stream; both of a pair make a connection.
fn pair(halves: &mut HashMap<String, Half>, stream: Incoming) -> Result<Option<Forward>> {
    halves.retain(|_, half| half.since.elapsed() < PAIR_WITHIN);
    let is_error = match header(&stream.headers, "streamtype") {
        Some("error") => true,
        Some("data") => false,
        other => return Err(Error::spdy(format!("a stream has the unknown type {other:?}"))),
    };
    // Clients before requestID open the error stream first and the data stream next.
    let request = match header(&stream.headers, "requestid") {
        Some(id) => id.to_owned(),
        None if is_error => stream.id.to_string(),
        None => stream.id.saturating_sub(2).to_string(),
    };
    let Some(first) = halves.remove(&request) else {
        if halves.len() >= MAX_HALVES {
            return Err(Error::spdy(format!("more than {MAX_HALVES} streams without their other half")));
        }
        halves.insert(request, Half { stream, is_error, since: Instant::now() });
        return Ok(None);
    };
    if first.is_error == is_error {
        return Err(Error::spdy(format!("request {request} has two streams of the same type")));
    }
    let (error, data) = if is_error { (stream, first.stream) } else { (first.stream, stream) };
    let port = header(&data.headers, "port").and_then(|p| p.parse().ok()).filter(|p| *p != 0);
    let Some(port) = port else { return Err(Error::spdy(format!("request {request} names no port"))) };
    let (_, error) = error.into_parts();
    Ok(Some(Forward { port, data: data.into_duplex(), error }))
}

/// Answers a port-forward request. The answer must be sent by hyper before the future can complete.
pub fn port_forward<B>(
    mut request: Request<B>,
) -> (Response<Full<Bytes>>, impl Future<Output = Result<PortForward>> + Send + use<B>) {
    let refused = |response| {
        let error = Error::Upgrade("the request asks for no protocol that is served".into());
        (response, Either::Left(std::future::ready(Err(error))))
    };
    let wanted = match upgrade::wanted(request.headers()) {
        Ok(wanted) => wanted,
        Err(text) => return refused(upgrade::refuse(StatusCode::BAD_REQUEST, &text)),
    };
    let pending = hyper::upgrade::on(&mut request);
    let (response, future): (_, BoxFuture<'static, Result<PortForward>>) = match wanted {
        Wanted::Spdy => {
            let theirs = upgrade::offered(request.headers(), upgrade::STREAM_PROTOCOL);
            if !theirs.is_empty() && !theirs.iter().any(|p| p == PROTOCOL) {
                return refused(upgrade::no_protocol(&theirs, &[PROTOCOL]));
            }
            let future = async move { PortForward::spdy(upgrade::upgraded(pending).await?) };
            (upgrade::switch_spdy(PROTOCOL), Box::pin(future))
        }
        Wanted::WebSocket { key } => {
            let theirs = upgrade::offered(request.headers(), "sec-websocket-protocol");
            if theirs.iter().any(|p| p == TUNNEL) {
                let future = async move {
                    let io = upgrade::upgraded(pending).await?;
                    PortForward::spdy(Tunnel::new(upgrade::socket(io).await))
                };
                (upgrade::switch_websocket(&key, TUNNEL), Box::pin(future))
            } else {
                let protocol = theirs.iter().find_map(|o| CHANNELS.into_iter().find(|s| s == o));
                let Some(protocol) = protocol.or(theirs.is_empty().then_some("")) else {
                    return refused(upgrade::no_protocol(&theirs, &[TUNNEL, CHANNELS[0], CHANNELS[1]]));
                };
                let ports = match ports(request.uri().query().unwrap_or_default()) {
                    Ok(ports) => ports,
                    Err(text) => return refused(upgrade::refuse(StatusCode::BAD_REQUEST, &text)),
                };
                let future =
                    async move { by_channels(upgrade::upgraded(pending).await?, protocol, &ports).await };
                (upgrade::switch_websocket(&key, protocol), Box::pin(future))
            }
        }
    };
    (response, Either::Right(future))
}

/// The ports of a query: `port=80&port=443` or `ports=80,443`.
fn ports(query: &str) -> std::result::Result<Vec<u16>, String> {
    let mut ports = Vec::new();
    for (_, value) in
        query.split('&').filter_map(|p| p.split_once('=')).filter(|(k, _)| matches!(*k, "port" | "ports"))
    {
        for text in value.split([',']).flat_map(|v| v.split("%2C")).filter(|v| !v.is_empty()) {
            let port = text.parse().ok().filter(|p| *p != 0);
            ports.push(
                port.ok_or_else(|| format!("invalid port {text:?}: a number from 1 to 65535 is needed"))?,
            );
        }
    }
    match ports.len() {
        0 => Err("query parameter \"port\" is required".into()),
        n if n > MAX_PORTS => Err(format!("{n} ports are more than {MAX_PORTS}")),
        _ => Ok(ports),
    }
}

async fn by_channels(io: Io, protocol: &str, ports: &[u16]) -> Result<PortForward> {
    let coding = Coding { base64: protocol.contains("base64"), close: false };
    let readable: Vec<u8> = (0..ports.len()).filter_map(|n| u8::try_from(n * 2).ok()).collect();
    let mut channels = Channels::new(upgrade::socket(io).await, coding, &readable);
    let mut ready = VecDeque::new();
    for (port, channel) in ports.iter().zip(readable) {
        let (mut data, mut error) = (channels.writer(channel), channels.writer(channel + 1));
        data.write_all(&port.to_le_bytes()).await?;
        error.write_all(&port.to_le_bytes()).await?;
        let reader = channels.reader(channel).ok_or(Error::Closed)?;
        ready.push_back(Forward { port: *port, data: Duplex::new(reader, data), error });
    }
    Ok(PortForward(Inner::WebSocket { ready, channels: Some(channels) }))
}

/// Copies between a forwarded connection and a socket until both directions have ended; `Ok` also when one side just closed.
///
/// # Errors
/// Reading or writing failed.
pub async fn copy<S>(data: Duplex, socket: S) -> std::io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    const STEP: usize = 64 << 10;
    let (mut from_client, mut to_client) = data.into_parts();
    let (mut from_pod, mut to_pod) = tokio::io::split(socket);
    let up = async {
        let mut buffer = vec![0; STEP];
        loop {
            let count = from_client.read(&mut buffer).await?;
            if count == 0 {
                return to_pod.shutdown().await;
            }
            to_pod.write_all(buffer.get(..count).unwrap_or_default()).await?;
        }
    };
    let down = async {
        let mut buffer = vec![0; STEP];
        loop {
            let count = from_pod.read(&mut buffer).await?;
            if count == 0 {
                return to_client.shutdown().await;
            }
            to_client.write_all(buffer.get(..count).unwrap_or_default()).await?;
        }
    };
    tokio::pin!(up, down);
    // As the kubelet's: when the pod's side has ended, nothing that the client sends matters any more.
    tokio::select! {
        result = &mut down => result,
        result = &mut up => { result?; down.await }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn ports_come_from_either_form_of_the_query() {
        assert_eq!(ports("port=80&port=443").unwrap(), [80, 443]);
        assert_eq!(ports("ports=80,443").unwrap(), [80, 443]);
        assert!(ports("port=0").is_err());
        assert!(ports("port=70000").is_err());
        assert!(ports("").is_err());
    }
}
