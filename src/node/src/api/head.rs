//! The head of a connection's first request, read before the HTTP server sees it: a command that `exec` is given stands in the
//! query, and the server's library takes no target of 64 KiB or more, where a kubelet takes a head of 1 MiB.
//!
//! A query that is too long for it is taken out and kept beside the connection. Exec is the first request of its connection: an
//! API server dials anew for each.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{Buf, Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

/// The largest request line, in bytes: as much as a head may have in Go's servers.
const MAX_LINE: usize = 1 << 20;
/// A request line up to this length is left to the server, in bytes.
const SHORT: usize = 32 << 10;

/// The query of the first request of a connection, where it was taken out of its target. The first request takes it.
#[derive(Clone, Debug, Default)]
pub(super) struct LongQuery(Arc<Mutex<Option<String>>>);

impl LongQuery {
    /// The query; none for all requests but the first.
    pub(super) fn take(&self) -> Option<String> {
        self.0.lock().take()
    }
}

/// A query that a request was given in place of that in its target.
#[derive(Clone, Debug)]
pub(super) struct Query(pub(super) Arc<str>);

/// Reads until the request line is known to be short, or whole. Answers what the server is to read first, and the query that was
/// taken out.
///
/// # Errors
/// The connection's; a line that is too long, or that is none.
pub(super) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<(Bytes, LongQuery)> {
    let mut buffer = BytesMut::with_capacity(8 << 10);
    let mut looked_at = 0;
    let end = loop {
        if let Some(at) = buffer.iter().skip(looked_at).position(|b| *b == b'\n') {
            break looked_at + at;
        }
        looked_at = buffer.len();
        if buffer.len() > MAX_LINE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the request line has more than 1 MiB"));
        }
        if stream.read_buf(&mut buffer).await? == 0 {
            return Ok((buffer.freeze(), LongQuery::default()));
        }
    };
    if end <= SHORT {
        return Ok((buffer.freeze(), LongQuery::default()));
    }
    let rest = buffer.split_off(end);
    let line = std::str::from_utf8(&buffer)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the request line is no text"))?;
    // Method, target and version; a target without a query is left to the server, which refuses it.
    let Some((before, after)) = line.split_once('?') else {
        buffer.unsplit(rest);
        return Ok((buffer.freeze(), LongQuery::default()));
    };
    let (query, version) = after.rsplit_once(' ').unwrap_or((after, ""));
    let mut head = BytesMut::with_capacity(before.len() + version.len() + rest.len() + 1);
    head.extend_from_slice(before.as_bytes());
    head.extend_from_slice(b" ");
    head.extend_from_slice(version.as_bytes());
    head.extend_from_slice(&rest);
    Ok((head.freeze(), LongQuery(Arc::new(Mutex::new(Some(query.to_owned()))))))
}

/// A connection of which something was read already: that comes first.
#[derive(Debug)]
pub(super) struct Rewound<S> {
    head: Bytes,
    stream: S,
}

impl<S> Rewound<S> {
    /// The connection with these bytes before what is left of it.
    pub(super) fn new(head: Bytes, stream: S) -> Self {
        Self { head, stream }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Rewound<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.head.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, into);
        }
        let n = self.head.len().min(into.remaining());
        into.put_slice(&self.head[..n]);
        self.head.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rewound<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    async fn all(text: &str) -> (String, Option<String>) {
        let mut stream = text.as_bytes();
        let (head, query) = read(&mut stream).await.unwrap();
        let mut whole = String::new();
        Rewound::new(head, stream).read_to_string(&mut whole).await.unwrap();
        (whole, query.take())
    }

    #[tokio::test]
    async fn a_usual_request_comes_through_as_it_is() {
        for text in [
            "POST /exec/a/b/c?command=x HTTP/1.1\r\nhost: n\r\n\r\nbody",
            "GET / HTTP/1.1\r\n\r\n",
            "half",
            "",
        ] {
            assert_eq!(all(text).await, (text.to_owned(), None));
        }
    }

    #[tokio::test]
    async fn a_query_that_no_target_holds_is_taken_out_once() {
        let query = format!("command={}&stdout=1", "x".repeat(900_000));
        let text = format!("POST /exec/a/b/c?{query} HTTP/1.1\r\nhost: n\r\n\r\nbody");
        let mut stream = text.as_bytes();
        let (head, taken) = read(&mut stream).await.unwrap();
        assert_eq!(taken.take().as_deref(), Some(query.as_str()));
        assert_eq!(taken.take(), None, "a later request of the connection has its own");
        let mut whole = String::new();
        Rewound::new(head, stream).read_to_string(&mut whole).await.unwrap();
        assert_eq!(whole, "POST /exec/a/b/c HTTP/1.1\r\nhost: n\r\n\r\nbody");
    }

    #[tokio::test]
    async fn a_line_without_an_end_is_refused() {
        let text = "x".repeat(MAX_LINE + (64 << 10));
        assert!(read(&mut text.as_bytes()).await.is_err());
        let (whole, taken) = all(&format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(SHORT))).await;
        assert!(
            taken.is_none() && whole.ends_with("\r\n\r\n"),
            "without a query it is the server's to refuse"
        );
    }
}
