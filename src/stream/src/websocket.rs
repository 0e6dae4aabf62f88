//! WebSocket as Kubernetes uses it: messages whose first byte names a channel, or a tunnel for SPDY.

use std::{
    collections::BTreeMap,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::{Buf, Bytes, BytesMut};
use futures::{
    Sink, SinkExt, Stream, StreamExt,
    stream::{SplitSink, SplitStream},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    task::JoinSet,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message,
        protocol::{CloseFrame, WebSocketConfig, frame::coding::CloseCode},
    },
};

use crate::{
    error::{Error, Result},
    pipe::{Feed, Inlet, Next, Out, Outlet, StreamReader, StreamWriter, feed, outlet},
};

/// The longest message that is accepted, in bytes.
const MAX_MESSAGE: usize = 4 << 20;
/// v5: "the channel named by the next byte gets no more".
const CLOSE_CHANNEL: u8 = 255;

/// Bounds of ours for a connection.
pub(crate) fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
        .write_buffer_size(128 << 10)
        .max_write_buffer_size(8 << 20)
}

/// How messages of a subprotocol look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Coding {
    /// Text messages: the channel's digit and base64.
    pub(crate) base64: bool,
    /// Channel 255 closes another.
    pub(crate) close: bool,
}

/// A connection whose messages name channels. Dropping it ends it at once.
pub(crate) struct Channels {
    outlet: Outlet,
    readers: BTreeMap<u8, StreamReader>,
    tasks: JoinSet<()>,
}

impl Channels {
    /// Takes a connection over; `readable` are the channels on which the other side sends.
    pub(crate) fn new<T>(socket: WebSocketStream<T>, coding: Coding, readable: &[u8]) -> Self
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (outlet, inlet) = outlet();
        let (sink, stream) = socket.split();
        let (mut feeds, mut readers) = (BTreeMap::new(), BTreeMap::new());
        for channel in readable {
            let (feed, reader) = feed();
            feeds.insert(*channel, feed);
            readers.insert(*channel, reader);
        }
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            if let Err(error) = receive(stream, coding, feeds).await {
                tracing::debug!(%error, "a WebSocket connection ended");
            }
        });
        tasks.spawn(async move {
            if let Err(error) = send(sink, coding, inlet).await {
                tracing::debug!(%error, "a WebSocket connection can no longer be written");
            }
        });
        Self { outlet, readers, tasks }
    }

    /// The receiving end of a channel, once.
    pub(crate) fn reader(&mut self, channel: u8) -> Option<StreamReader> {
        self.readers.remove(&channel)
    }

    /// The sending end of a channel.
    pub(crate) fn writer(&self, channel: u8) -> StreamWriter {
        StreamWriter::new(u32::from(channel), &self.outlet)
    }

    /// An empty message, by which a client knows that the connection stands.
    pub(crate) async fn greet(&self, channel: u8) -> Result<()> {
        let hello = Out::Data { channel: u32::from(channel), bytes: Bytes::new() };
        self.outlet.data.send(hello).await.map_err(|_| Error::Closed)
    }

    /// Waits until the connection has ended.
    pub(crate) async fn ended(&mut self) {
        self.tasks.join_next().await;
    }

    /// Sends what waits and ends the connection.
    pub(crate) async fn close(mut self) {
        self.outlet.close().await;
        let wait = async { while self.tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(std::time::Duration::from_secs(5), wait).await;
    }
}

async fn receive<T>(
    mut stream: SplitStream<WebSocketStream<T>>,
    coding: Coding,
    mut feeds: BTreeMap<u8, Feed>,
) -> Result<()>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(message) = stream.next().await {
        let message = message.map_err(|e| Error::websocket(e.to_string()))?;
        let Some((channel, data)) = decode(message, coding)? else { continue };
        if coding.close && channel == CLOSE_CHANNEL {
            if let Some(feed) = data.first().and_then(|c| feeds.remove(c)) {
                feed.finish();
            }
            continue;
        }
        if data.is_empty() {
            continue;
        }
        let Some(feed) = feeds.get(&channel) else { continue };
        let _ = feed.sender().send(data).await;
    }
    Ok(())
}

/// The channel and the data of a message; `None` for one of the protocol's own.
fn decode(message: Message, coding: Coding) -> Result<Option<(u8, Bytes)>> {
    let mut bytes: Bytes = match message {
        Message::Binary(bytes) => bytes,
        Message::Text(text) => Bytes::from(text),
        _ => return Ok(None),
    };
    if bytes.is_empty() {
        return Ok(None);
    }
    let mut channel = bytes.get_u8();
    if coding.base64 {
        channel = channel.wrapping_sub(b'0');
        let plain = STANDARD.decode(&bytes).map_err(|e| Error::websocket(format!("not base64: {e}")))?;
        bytes = Bytes::from(plain);
    }
    Ok(Some((channel, bytes)))
}

async fn send<T>(
    mut sink: SplitSink<WebSocketStream<T>, Message>,
    coding: Coding,
    mut inlet: Inlet,
) -> Result<()>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let failed = |e: tungstenite::Error| Error::websocket(e.to_string());
    loop {
        let next = match inlet.try_next() {
            Next::Idle => {
                sink.flush().await.map_err(failed)?;
                inlet.next().await
            }
            next => next,
        };
        match next {
            Next::Data(Out::Data { channel, bytes }) => {
                sink.feed(encode(channel, &bytes, coding)).await.map_err(failed)?;
            }
            Next::Data(Out::Close(done)) => {
                sink.flush().await.map_err(failed)?;
                // The other side's answer is read by the receiving task.
                let _ = say_goodbye(&mut sink).await;
                let _ = done.send(());
                return Ok(());
            }
            Next::End => {
                let _ = say_goodbye(&mut sink).await;
                return Ok(());
            }
            // Only SPDY opens, accepts, resets and pongs. The end of a channel is said by clients alone: they take no
            // CLOSE from a server, for them all channels end with the connection.
            Next::Data(_) | Next::Control(_) | Next::Idle => {}
        }
    }
}

/// Sends the closing frame. Clients take a normal closure, and nothing else, for the end of all channels.
async fn say_goodbye<T>(
    sink: &mut SplitSink<WebSocketStream<T>, Message>,
) -> std::result::Result<(), tungstenite::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    sink.feed(Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }))).await?;
    sink.close().await
}

fn encode(channel: u32, bytes: &[u8], coding: Coding) -> Message {
    let channel = u8::try_from(channel).unwrap_or(CLOSE_CHANNEL);
    if coding.base64 {
        let mut text = String::with_capacity(bytes.len() * 4 / 3 + 8);
        text.push(char::from(b'0'.saturating_add(channel)));
        STANDARD.encode_string(bytes, &mut text);
        return Message::text(text);
    }
    let mut out = BytesMut::with_capacity(bytes.len() + 1);
    out.extend_from_slice(&[channel]);
    out.extend_from_slice(bytes);
    Message::Binary(out.freeze())
}

/// The bytes of a connection that is carried in binary messages: the tunnel of port forwarding.
pub(crate) struct Tunnel<T> {
    socket: WebSocketStream<T>,
    current: Bytes,
}

impl<T> Tunnel<T> {
    pub(crate) fn new(socket: WebSocketStream<T>) -> Self {
        Self { socket, current: Bytes::new() }
    }
}

fn io_error(error: tungstenite::Error) -> io::Error {
    match error {
        tungstenite::Error::Io(error) => error,
        error => io::Error::other(error),
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for Tunnel<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.current.is_empty() {
            match ready!(Pin::new(&mut self.socket).poll_next(cx)) {
                Some(Ok(Message::Binary(bytes))) => self.current = bytes,
                Some(Ok(Message::Close(_))) | None => return Poll::Ready(Ok(())),
                Some(Ok(_)) => {}
                Some(Err(tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed)) => {
                    return Poll::Ready(Ok(()));
                }
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
            }
        }
        let count = self.current.len().min(buf.remaining());
        buf.put_slice(self.current.get(..count).unwrap_or_default());
        self.current.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Tunnel<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(Pin::new(&mut self.socket).poll_ready(cx)).map_err(io_error)?;
        let message = Message::Binary(Bytes::copy_from_slice(buf));
        Pin::new(&mut self.socket).start_send(message).map_err(io_error)?;
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(io_error)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_close(cx).map_err(io_error)
    }
}
