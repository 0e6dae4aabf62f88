//! The client's side over SPDY: what tests and tools need to run a command or forward a port through a connection that was
//! upgraded already.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{
    error::Result,
    pipe::{Duplex, StreamReader, StreamWriter},
    remote_command::Offer,
    spdy::{Headers, Role, Session},
};

/// A connection to a streaming server.
pub struct Client(Session);

/// A command's streams at its client's side.
pub struct Command {
    /// To the command.
    pub stdin: Option<StreamWriter>,
    /// From the command.
    pub stdout: Option<StreamReader>,
    /// From the command.
    pub stderr: Option<StreamReader>,
    /// Sizes of the terminal, as JSON.
    pub resize: Option<StreamWriter>,
    error: StreamReader,
}

impl Command {
    /// Waits for the end: the status as the server wrote it, at most 64 KiB.
    ///
    /// # Errors
    /// The connection was lost.
    pub async fn status(&mut self) -> Result<String> {
        let mut bytes = Vec::new();
        (&mut self.error).take(64 << 10).read_to_end(&mut bytes).await?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

fn headers(pairs: &[(&str, &str)]) -> Headers {
    pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect()
}

impl Client {
    /// A client on an upgraded connection.
    ///
    /// # Errors
    /// zlib could not be set up.
    pub fn new<T>(io: T) -> Result<Self>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        Ok(Self(Session::new(io, Role::Client)?))
    }

    /// Opens the streams of a command.
    ///
    /// # Errors
    /// The server refused one or went away.
    pub async fn command(&mut self, offer: Offer) -> Result<Command> {
        let (error, mut writer) = self.0.open(headers(&[("streamType", "error")])).await?;
        writer.shutdown().await?;
        let mut command = Command { stdin: None, stdout: None, stderr: None, resize: None, error };
        if offer.stdin {
            command.stdin = Some(self.0.open(headers(&[("streamType", "stdin")])).await?.1);
        }
        if offer.stdout {
            command.stdout = Some(self.readable("stdout").await?);
        }
        if offer.stderr && !offer.tty {
            command.stderr = Some(self.readable("stderr").await?);
        }
        if offer.tty {
            command.resize = Some(self.0.open(headers(&[("streamType", "resize")])).await?.1);
        }
        Ok(command)
    }

    async fn readable(&mut self, kind: &str) -> Result<StreamReader> {
        let (reader, mut writer) = self.0.open(headers(&[("streamType", kind)])).await?;
        writer.shutdown().await?;
        Ok(reader)
    }

    /// Opens a connection to a port: its data, and what the server says when it fails.
    ///
    /// # Errors
    /// The server refused it or went away.
    pub async fn forward(&mut self, port: u16, request_id: u32) -> Result<(Duplex, StreamReader)> {
        let (port, id) = (port.to_string(), request_id.to_string());
        let pair = |kind| headers(&[("streamType", kind), ("port", &port), ("requestID", &id)]);
        let (error, mut writer) = self.0.open(pair("error")).await?;
        writer.shutdown().await?;
        let (reader, writer) = self.0.open(pair("data")).await?;
        Ok((Duplex::new(reader, writer), error))
    }

    /// Ends the connection.
    pub async fn close(self) {
        self.0.close().await;
    }
}
