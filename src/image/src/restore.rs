//! Layers back as archives, byte by byte as they came: what a push, an export and a verification are made of.

use std::io::{self, Read, Write};

use bytes::Bytes;
use futures::{StreamExt, stream};
use moxlet_ids::{Algorithm, ChainId, Digest, Hasher};
use moxlet_storage::LayerView;
use tokio::sync::mpsc;

use crate::{
    Error, Result,
    layer::tape::{Rebuilt, Tape},
    registry::upload::ByteStream,
    store::{Store, blocking},
};

/// Bytes of a piece.
const PIECE: usize = 256 << 10;
/// Pieces that wait for their reader.
const WAITING: usize = 4;

/// How a layer is compressed for a registry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Compression {
    /// As every registry and engine takes it.
    #[default]
    Gzip,
    /// Smaller and faster; old engines cannot read it.
    Zstd,
}

impl Compression {
    /// The media type of a layer.
    pub(crate) fn media_type(self) -> &'static str {
        match self {
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

impl std::str::FromStr for Compression {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "" | "gzip" => Ok(Self::Gzip),
            "zstd" => Ok(Self::Zstd),
            other => Err(Error::Compression(other.chars().take(40).collect())),
        }
    }
}

/// A layer's archive, to be read; its content stays while this is held. Reading blocks.
pub(crate) struct Archive {
    rebuilt: Rebuilt,
    _view: LayerView,
}

impl Archive {
    /// Reads all of it; the digest and length of the archive.
    pub(crate) fn digest(&mut self) -> io::Result<(Digest, u64)> {
        let (mut hash, mut size) = (Hasher::new(Algorithm::Sha256), 0_u64);
        let mut buffer = vec![0; PIECE];
        loop {
            match self.read(&mut buffer)? {
                0 => break,
                n => {
                    hash.update(&buffer[..n]);
                    size += n as u64;
                }
            }
        }
        Ok((hash.finish(), size))
    }
}

impl Read for Archive {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.rebuilt.read(into)
    }
}

impl Store {
    /// Opens the archive of a layer that is here.
    ///
    /// # Errors
    /// [`Error::NotRestorable`] where it has no tape.
    pub(crate) async fn archive(&self, image: &str, layer: &ChainId) -> Result<Archive> {
        let tape = self.records.tape_path(layer);
        if !tape.exists() {
            return Err(Error::NotRestorable { image: image.to_owned(), layer: layer.clone() });
        }
        let view = self.driver.open_layer(layer).await?;
        let damaged =
            Error::Damaged { image: image.to_owned(), reason: format!("the tape of layer {layer}") };
        blocking(move || {
            let opened = Tape::open(&tape).and_then(|t| t.over(view.path()));
            let rebuilt = opened.map_err(|error| {
                tracing::warn!(tape = %tape.display(), %error, "a layer's archive cannot be made again");
                damaged
            })?;
            Ok(Archive { rebuilt, _view: view })
        })
        .await
    }
}

/// Sends what is written to it, in pieces.
struct Sink {
    out: mpsc::Sender<io::Result<Bytes>>,
    piece: Vec<u8>,
}

impl Sink {
    fn send(&mut self) -> io::Result<()> {
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE));
        let gone = |_| io::Error::new(io::ErrorKind::BrokenPipe, "nobody reads on");
        self.out.blocking_send(Ok(piece.into())).map_err(gone)
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.piece.extend_from_slice(bytes);
        if self.piece.len() >= PIECE {
            self.send()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() { Ok(()) } else { self.send() }
    }
}

/// Runs something that writes on a thread of its own, and gives what it writes as a stream. Who drops the stream stops the
/// writer; the writer's error ends it.
pub(crate) fn written(work: impl FnOnce(&mut dyn Write) -> io::Result<()> + Send + 'static) -> ByteStream {
    let (out, pieces) = mpsc::channel(WAITING);
    tokio::task::spawn_blocking(move || {
        let mut sink = Sink { out, piece: Vec::with_capacity(PIECE) };
        if let Err(error) = work(&mut sink).and_then(|()| sink.flush()) {
            let _ = sink.out.blocking_send(Err(error));
        }
    });
    let next =
        |mut pieces: mpsc::Receiver<_>| async move { pieces.recv().await.map(|piece| (piece, pieces)) };
    stream::unfold(pieces, next).boxed()
}

/// A layer's archive as a registry gets it.
pub(crate) fn compressed(mut archive: Archive, how: Compression) -> ByteStream {
    written(move |out| match how {
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(out, flate2::Compression::default());
            io::copy(&mut archive, &mut encoder)?;
            encoder.finish().map(drop)
        }
        Compression::Zstd => {
            let mut encoder = zstd::stream::write::Encoder::new(out, 0)?;
            io::copy(&mut archive, &mut encoder)?;
            encoder.finish().map(drop)
        }
    })
}
