//! This process's terminal: raw while a command has it, and its size whenever that changes.

use std::io::{IsTerminal as _, stdin};

use anyhow::{Context as _, Result};
use moxlet_stream::StreamWriter;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::{
    io::AsyncWriteExt as _,
    signal::unix::{SignalKind, signal},
};

/// A terminal whose keys all go to a command; as before once this is dropped.
pub(super) struct Raw(Termios);

impl Raw {
    /// Takes standard input, if it is a terminal.
    ///
    /// # Errors
    /// The terminal refuses.
    pub(super) fn take() -> Result<Option<Self>> {
        if !stdin().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(stdin()).context("cannot read the terminal's settings")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw).context("cannot set the terminal")?;
        Ok(Some(Self(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.0);
    }
}

/// Sends the size of the terminal, now and when it changes, until the connection is gone.
pub(super) async fn send_sizes(mut to: StreamWriter) {
    let Ok(mut changes) = signal(SignalKind::window_change()) else { return };
    loop {
        if let Ok(size) = tcgetwinsize(stdin()) {
            let line = format!("{{\"Width\":{},\"Height\":{}}}\n", size.ws_col, size.ws_row);
            if to.write_all(line.as_bytes()).await.is_err() || to.flush().await.is_err() {
                return;
            }
        }
        if changes.recv().await.is_none() {
            return;
        }
    }
}
