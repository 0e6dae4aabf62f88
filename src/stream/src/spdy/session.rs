//! One SPDY connection: a task that reads, a task that writes, and the streams between them.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter, ReadHalf, WriteHalf},
    sync::{mpsc, oneshot},
    task::JoinSet,
};

use super::{
    frame::{self, Control as Frame, HEADER, Head},
    headers::{Deflater, Headers, Inflater},
};
use crate::{
    error::{Error, Result},
    pipe::{Control, Duplex, Feed, Inlet, Next, Out, Outlet, StreamReader, StreamWriter, feed, outlet},
};

/// The most streams whose other side may still send.
const MAX_STREAMS: usize = 2048;
/// Streams that wait for someone to take them.
const ACCEPT_QUEUE: usize = 64;
/// Read from the connection in steps of this many bytes.
const READ_STEP: usize = 64 << 10;
/// How long, after our end, the other side's rest is read, so that closing does not destroy what it has not yet read.
const DRAIN: Duration = Duration::from_secs(5);
const CANCEL: u32 = 5;

/// Which side of the connection this is: clients open odd streams, servers even ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Client,
    Server,
}

/// A stream that the other side opened.
pub(crate) struct Incoming {
    pub(crate) id: u32,
    pub(crate) headers: Headers,
    reader: StreamReader,
    writer: StreamWriter,
}

impl Incoming {
    /// The stream's two directions.
    pub(crate) fn into_parts(self) -> (StreamReader, StreamWriter) {
        (self.reader, self.writer)
    }

    pub(crate) fn into_duplex(self) -> Duplex {
        Duplex::new(self.reader, self.writer)
    }
}

struct Entry {
    feed: Feed,
    /// Told of the other side's SYN_REPLY.
    accepted: Option<oneshot::Sender<()>>,
}

type Streams = Arc<Mutex<HashMap<u32, Entry>>>;

/// A connection. Dropping it ends it at once.
pub(crate) struct Session {
    outlet: Outlet,
    incoming: mpsc::Receiver<Incoming>,
    streams: Streams,
    next_id: u32,
    tasks: JoinSet<()>,
}

impl Session {
    pub(crate) fn new<T>(io: T, role: Role) -> Result<Self>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (outlet, inlet) = outlet();
        let (accept, incoming) = mpsc::channel(ACCEPT_QUEUE);
        let streams = Streams::default();
        let (read, write) = tokio::io::split(io);
        let reader = Reader {
            io: read,
            buffer: BytesMut::with_capacity(READ_STEP),
            inflater: Inflater::new(),
            streams: streams.clone(),
            accept,
            outlet: WeakOutlet { data: outlet.data.downgrade(), control: outlet.control.downgrade() },
            role,
            last: None,
        };
        let writer =
            Writer { io: BufWriter::with_capacity(4 * READ_STEP, write), deflater: Deflater::new()?, inlet };
        let mut tasks = JoinSet::new();
        tasks.spawn(reader.run());
        tasks.spawn(async move {
            if let Err(error) = writer.run().await {
                tracing::debug!(%error, "a streaming connection can no longer be written");
            }
        });
        let next_id = if role == Role::Client { 1 } else { 2 };
        Ok(Self { outlet, incoming, streams, next_id, tasks })
    }

    /// The next stream that the other side opened; it is accepted. `None`: the connection has ended.
    pub(crate) async fn accept(&mut self) -> Option<Incoming> {
        self.incoming.recv().await
    }

    /// Opens a stream and waits for the other side's word.
    ///
    /// # Errors
    /// [`Error::Closed`] when the other side refuses it or goes away.
    pub(crate) async fn open(&mut self, headers: Headers) -> Result<(StreamReader, StreamWriter)> {
        let id = self.next_id;
        self.next_id = id.checked_add(2).ok_or(Error::Closed)?;
        let (feed, reader) = feed();
        let (accepted, wait) = oneshot::channel();
        self.streams.lock().insert(id, Entry { feed, accepted: Some(accepted) });
        self.outlet.data.send(Out::Open { channel: id, headers }).await.map_err(|_| Error::Closed)?;
        wait.await.map_err(|_| Error::Closed)?;
        Ok((reader, StreamWriter::new(id, &self.outlet)))
    }

    /// Sends what waits, ends the connection, and reads the other side's rest for a short while.
    pub(crate) async fn close(mut self) {
        self.outlet.close().await;
        // Nobody takes new streams: the reading task must not wait for that.
        self.incoming.close();
        let _ = tokio::time::timeout(DRAIN, async { while self.tasks.join_next().await.is_some() {} }).await;
    }
}

/// The reading task must not keep the writing one alive.
struct WeakOutlet {
    data: mpsc::WeakSender<Out>,
    control: mpsc::WeakSender<Control>,
}

struct Reader<T> {
    io: ReadHalf<T>,
    buffer: BytesMut,
    inflater: Inflater,
    streams: Streams,
    accept: mpsc::Sender<Incoming>,
    outlet: WeakOutlet,
    role: Role,
    /// The stream of the last data frame: most data comes in long runs.
    last: Option<(u32, mpsc::Sender<Bytes>)>,
}

impl<T: AsyncRead> Reader<T> {
    async fn run(mut self) {
        if let Err(error) = self.read_all().await {
            tracing::debug!(%error, "a streaming connection ended");
        }
        // Dropping the feeds without their end tells every reader that the connection was lost.
        self.streams.lock().clear();
    }

    async fn read_all(&mut self) -> Result<()> {
        loop {
            while self.buffer.len() < HEADER {
                if self.fill().await? == 0 {
                    return if self.buffer.is_empty() { Ok(()) } else { Err(Error::Closed) };
                }
            }
            let mut head = [0; HEADER];
            head.copy_from_slice(&self.buffer.split_to(HEADER));
            match Head::parse(head)? {
                Head::Data { stream, fin, length } => self.data(stream, fin, length).await?,
                Head::Control { kind, flags, length } => {
                    while self.buffer.len() < length {
                        if self.fill().await? == 0 {
                            return Err(Error::Closed);
                        }
                    }
                    let payload = self.buffer.split_to(length).freeze();
                    self.control(Frame::parse(kind, flags, payload)?).await?;
                }
            }
        }
    }

    async fn fill(&mut self) -> Result<usize> {
        self.buffer.reserve(READ_STEP);
        Ok(self.io.read_buf(&mut self.buffer).await?)
    }

    async fn data(&mut self, stream: u32, fin: bool, mut length: usize) -> Result<()> {
        while length > 0 {
            if self.buffer.is_empty() && self.fill().await? == 0 {
                return Err(Error::Closed);
            }
            let chunk = self.buffer.split_to(length.min(self.buffer.len())).freeze();
            length -= chunk.len();
            if let Some(sender) = self.sender(stream) {
                // A reader that is gone no longer wants it; the other side need not know.
                let _ = sender.send(chunk).await;
            }
        }
        if fin {
            self.finish(stream);
        }
        Ok(())
    }

    fn sender(&mut self, stream: u32) -> Option<mpsc::Sender<Bytes>> {
        if let Some((id, sender)) = &self.last
            && *id == stream
        {
            return Some(sender.clone());
        }
        let sender = self.streams.lock().get(&stream).map(|e| e.feed.sender())?;
        self.last = Some((stream, sender.clone()));
        Some(sender)
    }

    fn finish(&mut self, stream: u32) {
        self.last = None;
        if let Some(entry) = self.streams.lock().remove(&stream) {
            entry.feed.finish();
        }
    }

    async fn control(&mut self, frame: Frame) -> Result<()> {
        match frame {
            Frame::SynStream { stream, fin, block } => {
                // Every block must be decompressed, wanted or not: they share a window.
                let headers = self.inflater.headers(&block)?;
                self.syn_stream(stream, fin, headers).await
            }
            Frame::SynReply { stream, fin, block } => {
                self.inflater.headers(&block)?;
                if let Some(accepted) = self.streams.lock().get_mut(&stream).and_then(|e| e.accepted.take()) {
                    let _ = accepted.send(());
                }
                if fin {
                    self.finish(stream);
                }
                Ok(())
            }
            Frame::Headers { stream, fin, block } => {
                self.inflater.headers(&block)?;
                if fin {
                    self.finish(stream);
                }
                Ok(())
            }
            Frame::Reset { stream } => {
                self.last = None;
                self.streams.lock().remove(&stream);
                Ok(())
            }
            Frame::Ping { id } => {
                // Pings of our own do not exist, so every one is the other side's.
                self.urgent(Control::Pong { id })
            }
            Frame::GoAway | Frame::Ignored => Ok(()),
        }
    }

    async fn syn_stream(&mut self, stream: u32, fin: bool, headers: Headers) -> Result<()> {
        let theirs = stream % 2 == u32::from(self.role == Role::Server);
        if stream == 0 || !theirs || self.streams.lock().contains_key(&stream) {
            return Err(Error::spdy(format!("a new stream has the number {stream}")));
        }
        let outlet = match (self.outlet.data.upgrade(), self.outlet.control.upgrade()) {
            (Some(data), Some(control)) => Outlet { data, control },
            _ => return Err(Error::Closed),
        };
        if self.streams.lock().len() >= MAX_STREAMS {
            return Err(Error::spdy(format!("more than {MAX_STREAMS} streams")));
        }
        let (feed, reader) = feed();
        if fin {
            feed.finish();
        } else {
            self.streams.lock().insert(stream, Entry { feed, accepted: None });
        }
        outlet.data.send(Out::Accept { channel: stream }).await.map_err(|_| Error::Closed)?;
        let writer = StreamWriter::new(stream, &outlet);
        // With nobody to take it, dropping it resets it.
        let _ = self.accept.send(Incoming { id: stream, headers, reader, writer }).await;
        Ok(())
    }

    fn urgent(&self, control: Control) -> Result<()> {
        let Some(sender) = self.outlet.control.upgrade() else { return Err(Error::Closed) };
        sender.try_send(control).map_err(|_| Error::spdy("pings come faster than they can be answered"))
    }
}

struct Writer<T> {
    io: BufWriter<WriteHalf<T>>,
    deflater: Deflater,
    inlet: Inlet,
}

impl<T: AsyncWrite> Writer<T> {
    async fn run(mut self) -> Result<()> {
        let mut head = BytesMut::with_capacity(1024);
        loop {
            let next = match self.inlet.try_next() {
                Next::Idle => {
                    self.io.flush().await?;
                    self.inlet.next().await
                }
                next => next,
            };
            head.clear();
            match next {
                Next::Control(Control::Pong { id }) => frame::ping(id, &mut head),
                Next::Control(Control::Reset { channel }) => frame::reset(channel, CANCEL, &mut head),
                Next::Data(Out::Data { channel, bytes }) => {
                    frame::data_head(channel, false, bytes.len(), &mut head);
                    self.io.write_all(&head).await?;
                    self.io.write_all(&bytes).await?;
                    continue;
                }
                Next::Data(Out::Fin { channel }) => frame::data_head(channel, true, 0, &mut head),
                Next::Data(Out::Open { channel, headers }) => {
                    frame::syn_stream(channel, &self.deflater.headers(&headers)?, &mut head);
                }
                Next::Data(Out::Accept { channel }) => {
                    frame::syn_reply(channel, &self.deflater.headers(&Headers::new())?, &mut head);
                }
                Next::Data(Out::Close(done)) => {
                    frame::goaway(0, &mut head);
                    self.io.write_all(&head).await?;
                    self.io.flush().await?;
                    self.io.shutdown().await?;
                    let _ = done.send(());
                    return Ok(());
                }
                Next::Idle => {}
                Next::End => {
                    self.io.flush().await?;
                    self.io.shutdown().await?;
                    return Ok(());
                }
            }
            self.io.write_all(&head).await?;
        }
    }
}
