//! What passes between a client's streams and a process's descriptors.
//!
//! A process that has ended may have left a child that holds its output: after its end the output is read while it comes, and
//! given up once it pauses, so that a daemon started by a command does not keep the command's client.

use std::{io, time::Duration};

use moxlet_init_proto::AsyncFile;
use moxlet_stream::{Outcome, StreamReader, StreamWriter};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

/// As large as the init's pipes: one call empties one.
pub(super) const STEP: usize = 256 << 10;
/// How long the output of a process that has ended may pause.
const LINGER: Duration = Duration::from_millis(500);
/// What a process of a CT that is gone ended with: SIGKILL.
const KILLED: i32 = 137;

/// Ends when the process has ended and so much time has passed.
pub(super) async fn after(over: &CancellationToken, pause: Duration) {
    over.cancelled().await;
    tokio::time::sleep(pause).await;
}

/// Reads a process's output; 0 at its end.
pub(super) async fn read(
    from: &mut AsyncFile,
    buffer: &mut [u8],
    over: &CancellationToken,
) -> io::Result<usize> {
    tokio::select! {
        biased;
        count = from.read(buffer) => count,
        () = after(over, LINGER) => Ok(0),
    }
}

/// Copies a process's output to the client until it ends, then ends the client's stream.
///
/// # Errors
/// Only of the client's side: what goes wrong when reading is the output's end.
pub(super) async fn output(
    from: Option<AsyncFile>,
    mut to: Option<StreamWriter>,
    over: &CancellationToken,
) -> io::Result<()> {
    if let Some(mut from) = from {
        let mut buffer = vec![0; STEP];
        while let Ok(count) = read(&mut from, &mut buffer, over).await
            && count > 0
        {
            if let Some(to) = &mut to {
                to.write_all(&buffer[..count]).await?;
            }
        }
    }
    match &mut to {
        Some(to) => to.shutdown().await,
        None => Ok(()),
    }
}

/// Copies the client's input to the process; at its end the descriptor is dropped, which a pipe's reader sees as the end.
pub(super) async fn input(from: Option<StreamReader>, to: Option<AsyncFile>) {
    let (Some(mut from), Some(mut to)) = (from, to) else { return };
    let mut buffer = vec![0; STEP / 4];
    // A process that reads no more is no error, nor is a client that took its stream back.
    while let Ok(count) = from.read(&mut buffer).await
        && count > 0
        && to.write_all(&buffer[..count]).await.is_ok()
    {}
}

/// A command's exit code. An init that does not answer any more is gone, and with it every process of its CT.
pub(super) fn exit_code(waited: moxlet_init_proto::Result<i32>) -> moxlet_init_proto::Result<i32> {
    match waited {
        Err(error @ moxlet_init_proto::Error::Remote { .. }) => Err(error),
        Err(_) => Ok(KILLED),
        code => code,
    }
}

/// How a command ended, for its client.
pub(super) fn outcome(waited: moxlet_init_proto::Result<i32>) -> Outcome {
    match exit_code(waited) {
        Ok(0) => Outcome::Success,
        Ok(code) => Outcome::ExitCode(code),
        Err(error) => Outcome::Error(format!("the exit code of the command is not known: {error}")),
    }
}
