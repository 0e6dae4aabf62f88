//! `/containerLogs`: which container is meant, and its log from the agent as it comes.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Path, RawQuery, State},
    http::{StatusCode, header::CONTENT_TYPE},
    response::Response,
};
use bytes::Bytes;
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ContainerStatus;
use moxlet_cri::host::{self, host_service_client::HostServiceClient};

use super::{
    Api, Failure, container,
    query::{BadOptions, LogOptions},
};
use crate::{Error, pods::registry::PodView};

/// Why a container has no log yet, in the kubelet's words.
fn not_yet(view: &PodView, name: &str) -> Failure {
    let pod = view.pod.metadata.name.as_deref().unwrap_or_default();
    let status = view.pod.status.clone().unwrap_or_default();
    let all = status
        .container_statuses
        .into_iter()
        .flatten()
        .chain(status.init_container_statuses.into_iter().flatten());
    let waiting = |s: ContainerStatus| s.state.and_then(|s| s.waiting).and_then(|w| w.reason);
    let reason =
        all.filter(|s| s.name == name).find_map(waiting).unwrap_or_else(|| "ContainerCreating".to_owned());
    let text = format!("container \"{name}\" in pod \"{pod}\" is waiting to start: {reason}");
    Failure::new(StatusCode::BAD_REQUEST, text)
}

pub(super) async fn container_logs(
    State(api): State<Arc<Api>>,
    Path((namespace, pod, name)): Path<(String, String, String)>,
    RawQuery(query): RawQuery,
) -> Result<Response, Failure> {
    let options = LogOptions::parse(query.as_deref(), Timestamp::now()).map_err(|e| match e {
        BadOptions::Undecodable => Failure::new(StatusCode::BAD_REQUEST, "Unable to decode query."),
        BadOptions::Invalid => Failure::new(StatusCode::UNPROCESSABLE_ENTITY, "Invalid log options."),
    })?;
    let view = api.pod(&namespace, &pod, None)?;
    let known = match container(&view, &name) {
        Ok(known) => known,
        // In the spec but not made yet.
        Err(missing) => {
            let spec = view.pod.spec.clone().unwrap_or_default();
            let mut named = spec.containers.iter().chain(spec.init_containers.iter().flatten());
            return Err(if named.any(|c| c.name == name) { not_yet(&view, &name) } else { missing });
        }
    };
    let (id, path) = match options.previous {
        true => (known.previous.clone(), known.previous_log_path.clone()),
        false => (known.current.clone(), known.log_path.clone()),
    };
    if id.is_none() && path.is_none() {
        return Err(if options.previous {
            let text = format!("previous terminated container \"{name}\" in pod \"{pod}\" not found");
            Failure::new(StatusCode::BAD_REQUEST, text)
        } else {
            not_yet(&view, &name)
        });
    }
    let request = host::StreamLogsRequest {
        log_path: if id.is_some() { String::new() } else { path.unwrap_or_default() },
        container_id: id.unwrap_or_default(),
        follow: options.follow,
        tail_lines: options.tail_lines,
        since_nanos: options.since_nanos,
        timestamps: options.timestamps,
        limit_bytes: options.limit_bytes,
        stream: options.stream.map(str::to_owned),
    };
    let answer = HostServiceClient::new(api.agent.clone()).stream_logs(request).await;
    let chunks = answer.map_err(Error::agent("StreamLogs"))?.into_inner();
    let stop = api.stop.clone();
    let body = chunks
        .map(|chunk| chunk.map(|c| Bytes::from(c.data)).map_err(std::io::Error::other))
        .take_until(async move { stop.cancelled().await });
    Response::builder()
        .header(CONTENT_TYPE, "text/plain")
        .body(Body::from_stream(body))
        .map_err(|e| Failure::new(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))
}
