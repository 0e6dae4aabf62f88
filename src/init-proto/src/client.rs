//! The agent's side. Cheap to clone; every request is a connection of its own.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::{FileType, OFlags};
use tokio::{
    io::Interest,
    net::{TcpStream, UnixStream},
    time::{Instant, sleep, timeout_at},
};

use crate::{
    ContainerState, CreateRequest, Error, Event, ExecRequest, MAX_CONTAINERS, Request, Response, Result,
    StreamSet, VERSION,
    asyncfd::AsyncFile,
    bounded, frame,
    record::{checked, open_untrusted},
};

/// How long an ordinary answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// The streams of an exec or attach.
#[derive(Debug, Default)]
pub struct Streams {
    /// Its input; dropping it is the end of the input.
    pub stdin: Option<AsyncFile>,
    /// Its output.
    pub stdout: Option<AsyncFile>,
    /// Its error output.
    pub stderr: Option<AsyncFile>,
    /// The master of its terminal: an exec with `tty` has this one only.
    pub terminal: Option<AsyncFile>,
}

impl Streams {
    fn new(set: StreamSet, fds: Vec<OwnedFd>) -> Result<Self> {
        if fds.len() != set.count() {
            return Err(Error::Malformed(format!("{} streams announced, {} came", set.count(), fds.len())));
        }
        let mut fds = fds.into_iter();
        let mut take = |wanted: bool| match wanted {
            true => fds.next().map(AsyncFile::new).transpose(),
            false => Ok(None),
        };
        Ok(Self {
            stdin: take(set.stdin)?,
            stdout: take(set.stdout)?,
            stderr: take(set.stderr)?,
            terminal: take(set.terminal)?,
        })
    }
}

/// A command that runs in a container.
#[derive(Debug)]
pub struct Exec {
    /// For [`Client::wait_exec`].
    pub exec_id: String,
    /// Its streams.
    pub streams: Streams,
}

/// A way to one CT's init.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
    version: u32,
}

impl Client {
    /// Waits until the init listens at `path` (`<shared dir>/run/init.sock`) and says hello.
    ///
    /// The last two components may be the CT's: a link there is refused.
    ///
    /// # Errors
    /// [`Error::Unreachable`] after `timeout`, or an answer that makes no sense.
    pub async fn connect(path: &Path, timeout: Duration) -> Result<Self> {
        let end = Instant::now() + timeout;
        let mut client = Self { path: path.to_owned(), version: 0 };
        let mut pause = Duration::from_millis(1);
        loop {
            match client.ask(&Request::Hello, "hello", Some(end.max(Instant::now()) - Instant::now())).await {
                Ok((Response::Hello { version }, _)) => {
                    client.version = version;
                    return Ok(client);
                }
                Ok((other, _)) => return Err(unexpected(&other)),
                Err(Error::Unreachable { path, source }) if Instant::now() + pause >= end => {
                    return Err(Error::Unreachable { path, source });
                }
                Err(Error::Unreachable { source, .. }) if source.raw_os_error() == Some(libc_eloop()) => {
                    return Err(Error::Unreachable { path: path.to_owned(), source });
                }
                Err(Error::Unreachable { .. }) => {
                    sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_millis(20));
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// A client for a socket that is known to be listened at; nothing is sent.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), version: 0 }
    }

    /// The init's version, from its hello.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Makes a container.
    ///
    /// # Errors
    /// As every request: [`Error::Remote`] with what the init says, or a failed connection.
    pub async fn create(&self, request: CreateRequest) -> Result<ContainerState> {
        container(self.ask(&Request::Create(Box::new(request)), "create", Some(PATIENCE)).await?.0)
    }

    /// Executes a container's command.
    ///
    /// # Errors
    /// [`crate::ErrorClass::StartError`] for a missing command and the like.
    pub async fn start(&self, id: &str) -> Result<ContainerState> {
        container(self.ask(&Request::Start { id: id.into() }, "start", Some(PATIENCE)).await?.0)
    }

    /// Sends a signal to a container's first process, or to all.
    ///
    /// # Errors
    /// [`crate::ErrorClass::InvalidState`] when it does not run.
    pub async fn signal(&self, id: &str, signal: i32, all: bool) -> Result<()> {
        self.done(Request::Signal { id: id.into(), signal, all }, "signal").await
    }

    /// Runs a command in a container.
    ///
    /// # Errors
    /// [`crate::ErrorClass::StartError`] for a missing command and the like.
    pub async fn exec(&self, request: ExecRequest) -> Result<Exec> {
        match self.ask(&Request::Exec(Box::new(request)), "exec", Some(PATIENCE)).await? {
            (Response::Execed { exec_id, streams }, fds) if exec_id.len() <= 64 => {
                Ok(Exec { exec_id, streams: Streams::new(streams, fds)? })
            }
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Waits for the end of an exec, however long that takes: the exit code, 128 + n after signal n.
    ///
    /// # Errors
    /// [`crate::ErrorClass::NotFound`] for an exec that was waited for before.
    pub async fn wait_exec(&self, exec_id: &str) -> Result<i32> {
        match self.ask(&Request::WaitExec { exec_id: exec_id.into() }, "wait", None).await?.0 {
            Response::ExecExited { code } => Ok(code & 0xff),
            other => Err(unexpected(&other)),
        }
    }

    /// Sends a signal to a command and to what it started in its process group.
    ///
    /// # Errors
    /// [`crate::ErrorClass::NotFound`] when it has ended, [`crate::ErrorClass::Unsupported`] by an init that is too old.
    pub async fn signal_exec(&self, exec_id: &str, signal: i32) -> Result<()> {
        self.done(Request::SignalExec { exec_id: exec_id.into(), signal }, "signal").await
    }

    /// Sets the size of a container's or an exec's terminal.
    ///
    /// # Errors
    /// [`crate::ErrorClass::InvalidState`] when it has none.
    pub async fn resize_tty(&self, id: &str, exec_id: Option<&str>, width: u16, height: u16) -> Result<()> {
        let exec_id = exec_id.map(str::to_owned);
        self.done(Request::ResizeTty { id: id.into(), exec_id, width, height }, "resize").await
    }

    /// Copies of a container's output from now on, and its input.
    ///
    /// # Errors
    /// [`crate::ErrorClass::InvalidState`] when it does not run.
    pub async fn attach(&self, id: &str, stdin: bool, stdout: bool, stderr: bool) -> Result<Streams> {
        match self
            .ask(&Request::Attach { id: id.into(), stdin, stdout, stderr }, "attach", Some(PATIENCE))
            .await?
        {
            (Response::Attached { streams }, fds) => Streams::new(streams, fds),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// All containers.
    ///
    /// # Errors
    /// As every request.
    pub async fn list(&self) -> Result<Vec<ContainerState>> {
        match self.ask(&Request::List, "list", Some(PATIENCE)).await?.0 {
            Response::Containers { containers } if containers.len() <= MAX_CONTAINERS => {
                containers.into_iter().map(checked).collect()
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Forgets a container that does not run.
    ///
    /// # Errors
    /// [`crate::ErrorClass::InvalidState`] while it runs, [`crate::ErrorClass::NotFound`] when there is none.
    pub async fn remove(&self, id: &str) -> Result<()> {
        self.done(Request::Remove { id: id.into() }, "remove").await
    }

    /// Has the log file opened anew.
    ///
    /// # Errors
    /// As every request.
    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        self.done(Request::ReopenLog { id: id.into() }, "reopen log").await
    }

    /// A connection to 127.0.0.1 or ::1 in the pod.
    ///
    /// # Errors
    /// [`Error::Remote`] with the system's words when nobody listens there.
    pub async fn connect_port(&self, port: u16) -> Result<TcpStream> {
        match self.ask(&Request::Connect { port }, "connect", Some(PATIENCE)).await? {
            (Response::Done, fds) => {
                let [fd] =
                    <[OwnedFd; 1]>::try_from(fds).map_err(|_| Error::Malformed("not one socket".into()))?;
                let stream = std::net::TcpStream::from(fd);
                // Fails on anything that is no connected internet socket.
                stream.peer_addr()?;
                stream.set_nonblocking(true)?;
                Ok(TcpStream::from_std(stream)?)
            }
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// What happens from now on. List after subscribing, and nothing is missed.
    ///
    /// # Errors
    /// As every request.
    pub async fn events(&self) -> Result<Events> {
        let mut connection = Connection::open(&self.path).await?;
        connection.send(&Request::Events).await?;
        match connection.receive().await? {
            Some((Response::Done, _)) => Ok(Events { connection }),
            Some((other, _)) => Err(unexpected(&other)),
            None => Err(Error::Closed),
        }
    }

    /// Stops all containers and the init with them; returns when all have stopped.
    ///
    /// # Errors
    /// As every request.
    pub async fn shutdown(&self, grace: Duration) -> Result<()> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        match self
            .ask(&Request::Shutdown { grace_ms }, "shutdown", Some(grace.saturating_add(PATIENCE)))
            .await?
            .0
        {
            Response::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    async fn done(&self, request: Request, name: &'static str) -> Result<()> {
        match self.ask(&request, name, Some(PATIENCE)).await?.0 {
            Response::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    async fn ask(
        &self,
        request: &Request,
        name: &'static str,
        limit: Option<Duration>,
    ) -> Result<(Response, Vec<OwnedFd>)> {
        let talk = async {
            let mut connection = Connection::open(&self.path).await?;
            connection.send(request).await?;
            connection.receive().await?.ok_or(Error::Closed)
        };
        let answer = match limit {
            None => talk.await?,
            Some(limit) => timeout_at(Instant::now() + limit.min(Duration::from_secs(86_400)), talk)
                .await
                .map_err(|_| Error::Timeout { seconds: limit.as_secs(), request: name })??,
        };
        match answer {
            (Response::Error { class, message }, _) => {
                Err(Error::Remote { class, message: bounded(&message) })
            }
            other => Ok(other),
        }
    }
}

/// `ELOOP`: a link where none may be.
fn libc_eloop() -> i32 {
    rustix::io::Errno::LOOP.raw_os_error()
}

fn container(response: Response) -> Result<ContainerState> {
    match response {
        Response::Container { container } => checked(container),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(response: &Response) -> Error {
    match response {
        Response::Error { class, message } => Error::Remote { class: *class, message: bounded(message) },
        _ => Error::Malformed("it does not answer the request".into()),
    }
}

/// A stream of events; see [`Client::events`].
#[derive(Debug)]
pub struct Events {
    connection: Connection,
}

impl Events {
    /// The next event; `None` when the init is gone. Safe to cancel.
    ///
    /// # Errors
    /// A message that makes no sense, or a failed connection.
    pub async fn next(&mut self) -> Result<Option<Event>> {
        match self.connection.receive().await? {
            None => Ok(None),
            Some((Response::Event { event }, _)) => Ok(Some(match event {
                Event::Started { container } => Event::Started { container: checked(container)? },
                Event::Exited { container } => Event::Exited { container: checked(container)? },
                Event::Unknown => Event::Unknown,
            })),
            Some((other, _)) => Err(unexpected(&other)),
        }
    }
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    decoder: frame::Decoder,
}

impl Connection {
    async fn open(path: &Path) -> Result<Self> {
        let failed = |source: io::Error| Error::Unreachable { path: path.to_owned(), source };
        let node = open_untrusted(path, OFlags::PATH).map_err(|e| failed(e.into()))?;
        let kind = rustix::fs::fstat(&node).map_err(|e| failed(e.into()))?;
        if FileType::from_raw_mode(kind.st_mode) != FileType::Socket {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is not a socket")));
        }
        let stream =
            UnixStream::connect(format!("/proc/self/fd/{}", node.as_raw_fd())).await.map_err(failed)?;
        Ok(Self { stream, decoder: frame::Decoder::default() })
    }

    async fn send(&mut self, request: &Request) -> Result<()> {
        // The caller's request is borrowed: no copy of a large spec.
        #[derive(serde::Serialize)]
        struct Outgoing<'a> {
            version: u32,
            request: &'a Request,
        }
        let bytes = frame::encode(&Outgoing { version: VERSION, request })?;
        tokio::io::AsyncWriteExt::write_all(&mut self.stream, &bytes).await.map_err(Error::Io)
    }

    async fn receive(&mut self) -> Result<Option<(Response, Vec<OwnedFd>)>> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(message) = self.decoder.next()? {
                return Ok(Some(message));
            }
            self.stream.readable().await?;
            match self.stream.try_io(Interest::READABLE, || frame::receive(self.stream.as_fd(), &mut buffer))
            {
                Ok((0, _)) => return if self.decoder.is_empty() { Ok(None) } else { Err(Error::Closed) },
                Ok((length, fds)) => self.decoder.push(&buffer[..length], fds)?,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(e) => return Err(e.into()),
            }
        }
    }
}
