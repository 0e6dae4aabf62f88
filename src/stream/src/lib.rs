//! Remote command and port forwarding as Kubernetes speaks them: SPDY/3.1 and WebSocket. Pure protocol: who may run what,
//! and what runs, is said elsewhere.
//!
//! Every connection has one task that reads and one that writes; both belong to the object that the connection gave, and end
//! with it. All queues are bounded.

pub mod client;
mod error;
mod pipe;
mod port_forward;
mod remote_command;
mod spdy;
mod upgrade;
mod websocket;

pub use error::{Error, Result};
pub use pipe::{Duplex, StreamReader, StreamWriter};
pub use port_forward::{Forward, PortForward, copy, port_forward};
pub use remote_command::{Offer, Outcome, RemoteCommand, StatusWriter, TerminalSize, remote_command};
