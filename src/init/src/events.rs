//! Who wants to know what happens.

use std::{os::unix::net::UnixStream, sync::Mutex, time::Duration};

use moxlet_init_proto::{Event, Response, frame};

use crate::{
    error::{Context, Error, Result},
    sys::lock,
};

/// More than one agent is not expected; an agent that restarts leaves a dead one behind until the next event.
const MAX_SUBSCRIBERS: usize = 32;

/// The subscribers.
#[derive(Debug, Default)]
pub(crate) struct Bus(Mutex<Vec<UnixStream>>);

impl Bus {
    /// Confirms, and sends all later events.
    pub(crate) fn subscribe(&self, stream: UnixStream) -> Result<()> {
        stream.set_write_timeout(Some(Duration::from_secs(1))).context("event stream")?;
        let mut all = lock(&self.0);
        if all.len() >= MAX_SUBSCRIBERS {
            return Err(Error::Invalid(format!("more than {MAX_SUBSCRIBERS} event streams")));
        }
        frame::write(&stream, &Response::Done, &[])?;
        all.push(stream);
        Ok(())
    }

    /// Tells all; who does not listen for a second is dropped and will list anew.
    pub(crate) fn publish(&self, event: &Event) {
        let response = Response::Event { event: event.clone() };
        lock(&self.0).retain(|stream| frame::write(stream, &response, &[]).is_ok());
    }
}
