//! The HTTP side of the streaming server: listeners, one request a connection, and the knowledge that a client has gone.

use std::{
    convert::Infallible,
    ffi::OsString,
    fs, io,
    net::SocketAddr,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{DirBuilderExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{Pending, Streaming, sessions};
use moxlet_errors::chain;

use crate::error::{Error, Result};

/// Connections of one listener that speak HTTP, that is, are not upgraded yet.
const MAX_CONNECTIONS: usize = 256;
/// How long a connection may take until it is upgraded.
const HTTP_WITHIN: Duration = Duration::from_secs(20);
/// The largest head of a request in bytes.
const MAX_HEAD: usize = 64 << 10;
/// After a failed accept: usually no file descriptor is left.
const PAUSE: Duration = Duration::from_millis(50);

/// Listens at a path that root alone may use.
///
/// # Errors
/// The socket cannot be made there.
pub(crate) fn listen_unix(path: &Path) -> Result<UnixListener> {
    let bound = (|| {
        if let Some(dir) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o711).create(dir)?;
        }
        // Bound and protected under another name: whoever finds the socket finds it ready, and one that a former run left
        // is replaced.
        let draft = draft_of(path);
        match fs::remove_file(&draft) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&draft)?;
        fs::set_permissions(&draft, fs::Permissions::from_mode(0o600))?;
        fs::rename(&draft, path)?;
        Ok(listener)
    })();
    bound.map_err(|e| {
        Error::io(format!("cannot listen at {} (its path may have at most 107 bytes)", path.display()), e)
    })
}

/// Another name beside it of the same length, since that of a socket's path is bounded.
fn draft_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().as_bytes().to_vec();
    let end = if name.pop() == Some(b'~') { b'_' } else { b'~' };
    name.push(end);
    OsString::from_vec(name).into()
}

/// Listens at an address of this machine alone.
pub(super) fn listen_tcp(address: SocketAddr) -> Result<(TcpListener, SocketAddr)> {
    if !address.ip().is_loopback() {
        let text = format!("the streaming server may listen on a loopback address only, not on {address}");
        return Err(Error::Invalid(text));
    }
    let bound = (|| {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let bound = listener.local_addr()?;
        Ok::<_, io::Error>((TcpListener::from_std(listener)?, bound))
    })();
    bound.map_err(|e| Error::io(format!("cannot listen at {address}"), e))
}

/// What connections come from.
pub(super) trait Listener: Send + 'static {
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    fn accept(&self) -> impl Future<Output = io::Result<Self::Io>> + Send;
}

impl Listener for UnixListener {
    type Io = UnixStream;

    async fn accept(&self) -> io::Result<UnixStream> {
        Ok(UnixListener::accept(self).await?.0)
    }
}

impl Listener for TcpListener {
    type Io = TcpStream;

    async fn accept(&self) -> io::Result<TcpStream> {
        let stream = TcpListener::accept(self).await?.0;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// Serves a listener until the agent stops.
pub(super) async fn serve(streaming: Arc<Streaming>, listener: impl Listener) {
    let stop = streaming.tasks.stop.clone();
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok(io) => {
                let own = streaming.clone();
                streaming.tasks.spawn(async move {
                    serve_connection(own, io).await;
                    drop(slot);
                });
            }
            Err(error) => {
                warn!(%error, "the streaming server cannot accept a connection");
                sleep(PAUSE).await;
            }
        }
    }
}

/// Serves one connection until it is upgraded, ended, too slow, or the agent stops.
pub(crate) async fn serve_connection(
    streaming: Arc<Streaming>,
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) {
    let stop = streaming.tasks.stop.clone();
    tokio::select! {
        () = stop.cancelled() => {}
        _ = timeout(HTTP_WITHIN, connection(streaming, io)) => {}
    }
}

/// Speaks HTTP until the connection is upgraded or ended.
async fn connection(streaming: Arc<Streaming>, io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
    let gone = CancellationToken::new();
    let io = TokioIo::new(Watched { inner: io, gone: gone.clone() });
    let service = service_fn(move |request| {
        let response = answer(&streaming, request, gone.clone());
        async move { Ok::<_, Infallible>(response) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HTTP_WITHIN / 2)
        .max_buf_size(MAX_HEAD)
        .serve_connection(io, service)
        .with_upgrades();
    if let Err(error) = served.await {
        debug!(%error, "a connection to the streaming server failed");
    }
}

fn refuse(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    *response.status_mut() = status;
    response
}

/// Answers a request and starts what it asks for.
fn answer(
    streaming: &Streaming,
    mut request: Request<Incoming>,
    gone: CancellationToken,
) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::POST) {
        return refuse(StatusCode::METHOD_NOT_ALLOWED, "only GET and POST\n");
    }
    // Neither here nor below is the path logged: the token is a secret until it is used, and it may have been mistyped.
    let Some(pending) = streaming.tokens.take(request.uri().path()) else {
        return refuse(
            StatusCode::NOT_FOUND,
            "no such streaming request, or it has been used or has expired\n",
        );
    };
    let state = streaming.state.clone();
    let kind = pending.kind();
    match pending {
        Pending::Exec(exec) => {
            let (response, streams) = moxlet_stream::remote_command(request, sessions::exec_offer(&exec));
            start(streaming, kind, gone, sessions::exec(state, exec, streams));
            response
        }
        Pending::Attach(attach) => {
            let (response, streams) = moxlet_stream::remote_command(request, sessions::attach_offer(&attach));
            start(streaming, kind, gone, sessions::attach(state, attach, streams));
            response
        }
        Pending::PortForward(forward) => {
            // The older WebSocket form takes the ports from the query, and here they are those of the CRI request.
            if let Some(uri) = sessions::with_ports(request.uri(), &forward.port) {
                *request.uri_mut() = uri;
            }
            let (response, streams) = moxlet_stream::port_forward(request);
            start(streaming, kind, gone, sessions::port_forward(state, forward, streams));
            response
        }
    }
}

/// Runs a session until it has ended, its client has gone or the agent stops; dropping it closes all its streams.
fn start(
    streaming: &Streaming,
    kind: &'static str,
    gone: CancellationToken,
    session: impl Future<Output = Result<()>> + Send + 'static,
) {
    let stop = streaming.tasks.stop.clone();
    streaming.tasks.spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = gone.cancelled() => debug!(kind, "the client of a stream has gone"),
            ended = session => if let Err(error) = ended {
                debug!(kind, error = chain(&error), "a stream has ended");
            },
        }
    });
}

/// A connection that tells when the other side has gone: a session that has nothing to write would not notice.
struct Watched<T> {
    inner: T,
    gone: CancellationToken,
}

impl<T> Drop for Watched<T> {
    fn drop(&mut self) {
        self.gone.cancel();
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.remaining();
        let read = ready!(Pin::new(&mut self.inner).poll_read(cx, buf));
        if read.is_err() || (before > 0 && buf.remaining() == before) {
            self.gone.cancel();
        }
        Poll::Ready(read)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn a_socket_is_roots_alone_and_replaces_one_that_was_left() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        // As long as a path may be.
        let path = run.join("s".repeat(107 - run.as_os_str().len() - 1));
        for _ in 0..2 {
            drop(listen_unix(&path).unwrap());
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let listener = listen_unix(&path).unwrap();
        std::os::unix::net::UnixStream::connect(&path).unwrap();
        drop(listener);
        assert_eq!(fs::read_dir(&run).unwrap().count(), 1, "no draft stays");
        let error = listen_unix(&run.join("s".repeat(107))).unwrap_err().to_string();
        assert!(error.contains("107 bytes"), "{error}");
    }
}
