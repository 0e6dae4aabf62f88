//! SPDY/3.1 as kube-apiserver and kubectl speak it: streams with headers, data, half-close and reset over one connection.
//!
//! Flow control windows are left alone on both sides, as Kubernetes' own implementation does: a peer that waited for window
//! updates would wait for ever, and none does.

mod dictionary;
mod frame;
mod headers;
mod session;

pub(crate) use headers::{Headers, header};
pub(crate) use session::{Incoming, Role, Session};
