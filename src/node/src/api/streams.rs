//! `/exec`, `/attach` and `/portForward`: CRI is asked for a URL of the agent's streaming server, the request goes on there
//! with its upgrade headers, and from then on the two connections are one. SPDY and WebSocket end at the agent.

use std::{collections::HashMap, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{Path, Request, State},
    http::{HeaderMap, HeaderName, StatusCode, Uri, header},
    response::Response,
};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use moxlet_cri::v1::{self, runtime_service_client::RuntimeServiceClient};
use tokio::time::timeout;
use tracing::debug;

use super::{
    Api, Failure, container, head,
    query::{self, Streams},
};
use crate::{Error, error::chain, metrics::runtime_operation};

/// How long the agent may take to answer the upgrade.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes that are moved at once in each direction.
const BUFFER: usize = 128 << 10;

/// Headers of an upgrade; all else (the caller's token among it) stays here.
const FORWARDED: [&str; 8] = [
    "connection",
    "upgrade",
    "x-stream-protocol-version",
    "sec-websocket-key",
    "sec-websocket-version",
    "sec-websocket-protocol",
    "sec-websocket-extensions",
    "origin",
];

type Parts = Path<HashMap<String, String>>;

fn part<'a>(parts: &'a HashMap<String, String>, name: &str) -> &'a str {
    parts.get(name).map_or("", String::as_str)
}

/// The query of a request, wherever it was read.
fn query_of(request: &Request) -> Option<&str> {
    let long = request.extensions().get::<head::Query>();
    long.map(|q| q.0.as_ref()).or_else(|| request.uri().query())
}

impl Api {
    fn runtime(&self) -> RuntimeServiceClient<tonic::transport::Channel> {
        RuntimeServiceClient::new(self.agent.clone())
    }

    /// CRI id of the running container of a request.
    fn container_id(&self, parts: &HashMap<String, String>) -> Result<String, Failure> {
        let (pod, name) = (part(parts, "pod"), part(parts, "container"));
        let view = self.pod(part(parts, "namespace"), pod, parts.get("uid").map(String::as_str))?;
        let id = container(&view, name)?.current.clone();
        id.ok_or_else(|| Failure::not_found(format!("container not found (\"{name}\")")))
    }
}

pub(super) async fn exec(
    State(api): State<Arc<Api>>,
    Path(parts): Parts,
    request: Request,
) -> Result<Response, Failure> {
    let id = api.container_id(&parts)?;
    let wanted = Streams::parse(query_of(&request)).map_err(bad)?;
    let ask = v1::ExecRequest {
        container_id: id,
        cmd: wanted.command,
        tty: wanted.tty,
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr,
    };
    let answer = runtime_operation("exec", api.runtime().exec(ask)).await;
    let url = answer.map_err(Error::agent("Exec"))?.into_inner().url;
    forward(&api, request, &url).await
}

pub(super) async fn attach(
    State(api): State<Arc<Api>>,
    Path(parts): Parts,
    request: Request,
) -> Result<Response, Failure> {
    let id = api.container_id(&parts)?;
    let wanted = Streams::parse(query_of(&request)).map_err(bad)?;
    let ask = v1::AttachRequest {
        container_id: id,
        tty: wanted.tty,
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr,
    };
    let answer = runtime_operation("attach", api.runtime().attach(ask)).await;
    let url = answer.map_err(Error::agent("Attach"))?.into_inner().url;
    forward(&api, request, &url).await
}

pub(super) async fn port_forward(
    State(api): State<Arc<Api>>,
    Path(parts): Parts,
    request: Request,
) -> Result<Response, Failure> {
    let pod = part(&parts, "pod");
    let view = api.pod(part(&parts, "namespace"), pod, parts.get("uid").map(String::as_str))?;
    let sandbox = view.sandbox_id.clone();
    let sandbox = sandbox.ok_or_else(|| Failure::not_found(format!("pod \"{pod}\" has no sandbox yet")))?;
    let port = query::ports(query_of(&request)).map_err(|e| Failure::new(StatusCode::BAD_REQUEST, e))?;
    let ask = v1::PortForwardRequest { pod_sandbox_id: sandbox, port };
    let answer = runtime_operation("port_forward", api.runtime().port_forward(ask)).await;
    let url = answer.map_err(Error::agent("PortForward"))?.into_inner().url;
    forward(&api, request, &url).await
}

fn bad(text: &'static str) -> Failure {
    Failure::new(StatusCode::BAD_REQUEST, text)
}

fn upgrade_headers(headers: &HeaderMap) -> HeaderMap {
    let mut kept = HeaderMap::new();
    for name in FORWARDED.map(HeaderName::from_static) {
        for value in headers.get_all(&name) {
            kept.append(name.clone(), value.clone());
        }
    }
    kept
}

/// Sends the request on to the agent's streaming server and joins the two connections once both are upgraded.
async fn forward(api: &Arc<Api>, mut request: Request, url: &str) -> Result<Response, Failure> {
    let failed =
        |text: String| Failure::new(StatusCode::BAD_GATEWAY, format!("the agent's streaming server: {text}"));
    let path = url.parse::<Uri>().map_err(|e| failed(e.to_string()))?.path().to_owned();
    let onward = hyper::Request::builder()
        .method(request.method().clone())
        .uri(path)
        .header(header::HOST, "localhost")
        .body(Empty::<bytes::Bytes>::new());
    let mut onward = onward.map_err(|e| failed(e.to_string()))?;
    onward.headers_mut().extend(upgrade_headers(request.headers()));

    let stream = api.stream().await.map_err(|e| failed(chain(&e)))?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|e| failed(e.to_string()))?;
    api.tasks.spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            debug!(%error, "a connection to the agent's streaming server failed");
        }
    });
    let answer = timeout(PATIENCE, sender.send_request(onward)).await;
    let mut answer =
        answer.map_err(|_| failed("no answer in time".into()))?.map_err(|e| failed(e.to_string()))?;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        let (parts, body) = answer.into_parts();
        return Ok(Response::from_parts(parts, Body::new(body)));
    }
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *response.headers_mut() = answer.headers().clone();
    let (theirs, ours) = (hyper::upgrade::on(&mut request), hyper::upgrade::on(&mut answer));
    let stop = api.stop.clone();
    api.tasks.spawn(async move {
        let joined = async {
            let (theirs, ours) = tokio::try_join!(theirs, ours).map_err(|e| e.to_string())?;
            let (mut theirs, mut ours) = (TokioIo::new(theirs), TokioIo::new(ours));
            let copied =
                tokio::io::copy_bidirectional_with_sizes(&mut theirs, &mut ours, BUFFER, BUFFER).await;
            copied.map_err(|e| e.to_string())
        };
        tokio::select! {
            done = joined => if let Err(error) = done {
                debug!(error, "a streaming connection ended");
            },
            () = stop.cancelled() => {}
        }
    });
    Ok(response)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_headers_of_the_upgrade_go_on() {
        let mut headers = HeaderMap::new();
        headers.append("x-stream-protocol-version", "v4.channel.k8s.io".parse().unwrap());
        headers.append("x-stream-protocol-version", "v3.channel.k8s.io".parse().unwrap());
        headers.append("authorization", "Bearer secret".parse().unwrap());
        headers.append("upgrade", "SPDY/3.1".parse().unwrap());
        let kept = upgrade_headers(&headers);
        assert_eq!(kept.get_all("x-stream-protocol-version").iter().count(), 2);
        assert!(kept.contains_key("upgrade") && !kept.contains_key("authorization"));
    }
}
