//! The HTTP side: which protocol a request asks for, and the answer that switches to it.

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode, header};
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{handshake::derive_accept_key, protocol::Role},
};

use crate::{
    error::{Error, Result},
    websocket,
};

/// An upgraded connection.
pub(crate) type Io = TokioIo<hyper::upgrade::Upgraded>;

/// SPDY's own header for the protocols inside of it.
pub(crate) const STREAM_PROTOCOL: &str = "x-stream-protocol-version";

/// What a request wants to switch to.
pub(crate) enum Wanted {
    Spdy,
    WebSocket { key: String },
}

/// Reads a request's upgrade headers.
///
/// # Errors
/// A text for the caller: what is missing.
pub(crate) fn wanted(headers: &HeaderMap) -> std::result::Result<Wanted, String> {
    let has = |name: header::HeaderName, token: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|v| v.to_str().ok())
            .any(|v| v.split(',').any(|t| t.trim().eq_ignore_ascii_case(token)))
    };
    if !has(header::CONNECTION, "upgrade") {
        return Err(
            "unable to upgrade: missing upgrade headers in request; use kubectl or another streaming client"
                .into(),
        );
    }
    if has(header::UPGRADE, "SPDY/3.1") {
        return Ok(Wanted::Spdy);
    }
    if !has(header::UPGRADE, "websocket") {
        return Err("unable to upgrade: only SPDY/3.1 and websocket are served".into());
    }
    if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|v| v.as_bytes() != b"13") {
        return Err("unable to upgrade: Sec-WebSocket-Version is not 13".into());
    }
    match headers.get(header::SEC_WEBSOCKET_KEY).and_then(|k| k.to_str().ok()) {
        Some(key) => Ok(Wanted::WebSocket { key: key.to_owned() }),
        None => Err("unable to upgrade: no Sec-WebSocket-Key".into()),
    }
}

/// All values of a list header.
pub(crate) fn offered(headers: &HeaderMap, name: &str) -> Vec<String> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .map(|p| p.trim().to_owned())
        .filter(|p| !p.is_empty())
        .take(32)
        .collect()
}

/// Switches to SPDY.
pub(crate) fn switch_spdy(protocol: &str) -> Response<Full<Bytes>> {
    switch(&[("upgrade", "SPDY/3.1"), (STREAM_PROTOCOL, protocol)])
}

/// Switches to WebSocket.
pub(crate) fn switch_websocket(key: &str, protocol: &str) -> Response<Full<Bytes>> {
    let accept = derive_accept_key(key.as_bytes());
    let mut headers = vec![("upgrade", "websocket"), ("sec-websocket-accept", accept.as_str())];
    if !protocol.is_empty() {
        headers.push(("sec-websocket-protocol", protocol));
    }
    switch(&headers)
}

fn switch(headers: &[(&str, &str)]) -> Response<Full<Bytes>> {
    let mut builder =
        Response::builder().status(StatusCode::SWITCHING_PROTOCOLS).header(header::CONNECTION, "Upgrade");
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(Full::default()).unwrap_or_else(|e| refuse(StatusCode::BAD_REQUEST, &e.to_string()))
}

/// An answer that switches nothing.
pub(crate) fn refuse(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(format!("{text}\n"))));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// No protocol in common: what Kubernetes' own servers answer.
pub(crate) fn no_protocol(offered: &[String], served: &[&str]) -> Response<Full<Bytes>> {
    let text = format!(
        "unable to upgrade: unable to negotiate protocol: client supports {offered:?}, server accepts {served:?}"
    );
    refuse(StatusCode::FORBIDDEN, &text)
}

/// Waits until the connection is ours.
pub(crate) async fn upgraded(pending: hyper::upgrade::OnUpgrade) -> Result<Io> {
    pending.await.map(TokioIo::new).map_err(|e| Error::Upgrade(e.to_string()))
}

/// A WebSocket on an upgraded connection.
pub(crate) async fn socket(io: Io) -> WebSocketStream<Io> {
    WebSocketStream::from_raw_socket(io, Role::Server, Some(websocket::config())).await
}
