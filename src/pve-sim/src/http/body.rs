//! A body that may break off.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::body::{Frame, SizeHint};

/// An answer's body: whole, or one that ends in the middle of what its length announces.
#[derive(Debug)]
pub(crate) struct Body {
    bytes: Option<Bytes>,
    /// What Content-Length says.
    announced: u64,
    /// Runs between the first half and the break, so that the half is sent.
    pause: Option<Pin<Box<tokio::time::Sleep>>>,
}

const PAUSE: std::time::Duration = std::time::Duration::from_millis(50);

/// The body ended early.
#[derive(Debug, thiserror::Error)]
#[error("the answer breaks off")]
pub(crate) struct BreaksOff;

impl Body {
    pub(crate) fn whole(bytes: Bytes) -> Self {
        let announced = bytes.len() as u64;
        Self { bytes: Some(bytes), announced, pause: None }
    }

    /// The first half of the bytes, with the length of all.
    pub(crate) fn half(mut bytes: Bytes) -> Self {
        let announced = bytes.len() as u64;
        bytes.truncate(bytes.len() / 2);
        Self { bytes: Some(bytes), announced, pause: None }
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = BreaksOff;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BreaksOff>>> {
        match self.bytes.take() {
            Some(bytes) if !bytes.is_empty() => {
                self.announced -= bytes.len() as u64;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            _ if self.announced > 0 => {
                let pause = self.pause.get_or_insert_with(|| Box::pin(tokio::time::sleep(PAUSE)));
                std::future::Future::poll(pause.as_mut(), context).map(|()| Some(Err(BreaksOff)))
            }
            _ => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.announced == 0 && self.bytes.as_ref().is_none_or(Bytes::is_empty)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.announced)
    }
}
