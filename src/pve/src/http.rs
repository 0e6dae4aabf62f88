//! How a call gets to a server and back: TLS, endpoints and failover, limits, retries.

pub(crate) mod encode;
pub(crate) mod endpoint;
pub(crate) mod limits;
mod send;
pub(crate) mod tls;

pub(crate) use send::{Answer, Bounds, Http, Request, unexpected};
