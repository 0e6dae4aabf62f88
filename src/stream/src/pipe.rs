//! The ends of one stream of a connection that carries several: what SPDY and WebSocket have in common.
//!
//! Queues are bounded: a writer waits for the connection, and a connection whose reader does not keep up is not read further.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{mpsc, oneshot},
};
use tokio_util::sync::PollSender;

use crate::spdy::Headers;

/// The most bytes of one frame that we send.
const MAX_DATA: usize = 64 << 10;
/// Messages that wait for the connection: at most some 2 MiB.
const OUT_QUEUE: usize = 32;
/// Small frames that may overtake data: resets and pongs.
const CONTROL_QUEUE: usize = 1024;
/// Messages that wait for one stream's reader.
const IN_QUEUE: usize = 32;

/// What is to be sent, in order.
pub(crate) enum Out {
    Data {
        channel: u32,
        bytes: Bytes,
    },
    Fin {
        channel: u32,
    },
    Open {
        channel: u32,
        headers: Headers,
    },
    Accept {
        channel: u32,
    },
    /// Everything before is sent, the connection is ended, then the answer comes.
    Close(oneshot::Sender<()>),
}

/// What may overtake data.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Control {
    Reset { channel: u32 },
    Pong { id: u32 },
}

/// The way to a connection's sending task.
#[derive(Clone)]
pub(crate) struct Outlet {
    pub(crate) data: mpsc::Sender<Out>,
    pub(crate) control: mpsc::Sender<Control>,
}

/// The sending task's side.
pub(crate) struct Inlet {
    pub(crate) data: mpsc::Receiver<Out>,
    pub(crate) control: mpsc::Receiver<Control>,
}

/// What the sending task has to do next.
pub(crate) enum Next {
    Data(Out),
    Control(Control),
    /// Nothing waits: flush, then ask again.
    Idle,
    End,
}

pub(crate) fn outlet() -> (Outlet, Inlet) {
    let (data, data_rx) = mpsc::channel(OUT_QUEUE);
    let (control, control_rx) = mpsc::channel(CONTROL_QUEUE);
    (Outlet { data, control }, Inlet { data: data_rx, control: control_rx })
}

impl Inlet {
    /// What waits already.
    pub(crate) fn try_next(&mut self) -> Next {
        if let Ok(control) = self.control.try_recv() {
            return Next::Control(control);
        }
        match self.data.try_recv() {
            Ok(out) => Next::Data(out),
            Err(mpsc::error::TryRecvError::Empty) => Next::Idle,
            Err(mpsc::error::TryRecvError::Disconnected) => Next::End,
        }
    }

    /// Waits for the next.
    pub(crate) async fn next(&mut self) -> Next {
        tokio::select! {
            biased;
            Some(control) = self.control.recv() => Next::Control(control),
            out = self.data.recv() => out.map_or(Next::End, Next::Data),
        }
    }
}

impl Outlet {
    /// Sends what waits, then ends the connection.
    pub(crate) async fn close(&self) {
        let (done, wait) = oneshot::channel();
        if self.data.send(Out::Close(done)).await.is_ok() {
            let _ = wait.await;
        }
    }
}

/// The receiving task's end of a stream.
pub(crate) struct Feed {
    sender: mpsc::Sender<Bytes>,
    finished: Arc<AtomicBool>,
}

impl Feed {
    pub(crate) fn sender(&self) -> mpsc::Sender<Bytes> {
        self.sender.clone()
    }

    /// The other side has said that no more comes.
    pub(crate) fn finish(self) {
        self.finished.store(true, Ordering::Release);
    }
}

/// What the other side sends on one stream. Ends with an error when the connection ends first.
pub struct StreamReader {
    receiver: mpsc::Receiver<Bytes>,
    current: Bytes,
    finished: Arc<AtomicBool>,
}

/// A stream's two receiving ends.
pub(crate) fn feed() -> (Feed, StreamReader) {
    let (sender, receiver) = mpsc::channel(IN_QUEUE);
    let finished = Arc::new(AtomicBool::new(false));
    (Feed { sender, finished: finished.clone() }, StreamReader { receiver, current: Bytes::new(), finished })
}

impl AsyncRead for StreamReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.current.is_empty() {
            match ready!(self.receiver.poll_recv(cx)) {
                Some(bytes) => self.current = bytes,
                None if self.finished.load(Ordering::Acquire) => return Poll::Ready(Ok(())),
                None => {
                    let text = "the other side went away before it ended the stream";
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, text)));
                }
            }
        }
        let count = self.current.len().min(buf.remaining());
        buf.put_slice(self.current.get(..count).unwrap_or_default());
        self.current.advance(count);
        Poll::Ready(Ok(()))
    }
}

/// What is sent on one stream. `shutdown` ends it; dropped without, it is reset, which tells the other side that data may be
/// missing.
pub struct StreamWriter {
    channel: u32,
    sender: PollSender<Out>,
    control: mpsc::Sender<Control>,
    finished: bool,
}

impl StreamWriter {
    pub(crate) fn new(channel: u32, outlet: &Outlet) -> Self {
        let sender = PollSender::new(outlet.data.clone());
        Self { channel, sender, control: outlet.control.clone(), finished: false }
    }

    fn closed() -> io::Error {
        io::Error::new(io::ErrorKind::BrokenPipe, "the streaming connection was closed")
    }
}

impl AsyncWrite for StreamWriter {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.finished {
            return Poll::Ready(Err(Self::closed()));
        }
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(self.sender.poll_reserve(cx)).map_err(|_| Self::closed())?;
        let part = buf.get(..buf.len().min(MAX_DATA)).unwrap_or(buf);
        let item = Out::Data { channel: self.channel, bytes: Bytes::copy_from_slice(part) };
        self.sender.send_item(item).map_err(|_| Self::closed())?;
        Poll::Ready(Ok(part.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The sending task flushes whenever nothing waits.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.finished {
            return Poll::Ready(Ok(()));
        }
        ready!(self.sender.poll_reserve(cx)).map_err(|_| Self::closed())?;
        let channel = self.channel;
        self.sender.send_item(Out::Fin { channel }).map_err(|_| Self::closed())?;
        self.finished = true;
        Poll::Ready(Ok(()))
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        if !self.finished {
            let _ = self.control.try_send(Control::Reset { channel: self.channel });
        }
    }
}

/// Both directions of one stream.
pub struct Duplex {
    reader: StreamReader,
    writer: StreamWriter,
}

impl Duplex {
    pub(crate) fn new(reader: StreamReader, writer: StreamWriter) -> Self {
        Self { reader, writer }
    }

    /// The two directions, to be used by two tasks.
    #[must_use]
    pub fn into_parts(self) -> (StreamReader, StreamWriter) {
        (self.reader, self.writer)
    }
}

impl AsyncRead for Duplex {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(cx, buf)
    }
}

impl AsyncWrite for Duplex {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(cx)
    }
}
