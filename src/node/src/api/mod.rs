//! The kubelet API: HTTPS on port 10250, as kube-apiserver, Prometheus and metrics-server call it.
//!
//! | file | what it does |
//! |---|---|
//! | `tls` | the listener: TLS with the serving certificate of the moment, callers' certificates, bounds on connections |
//! | `head` | the head of a request that is larger than the HTTP server takes: exec of long commands |
//! | `auth` | who calls and what it may do; before every route |
//! | `logs` | `/containerLogs`: relayed from the agent |
//! | `streams` | `/exec`, `/attach`, `/portForward`: upgraded connections, joined with the agent's byte for byte |
//! | `query` | what a request asks for |
//! | `configz` | the configuration as a kubelet shows it |

mod auth;
mod configz;
mod head;
mod logs;
mod query;
mod streams;
mod tls;

use std::{sync::Arc, time::Instant};

use axum::{
    Extension, Json, Router,
    extract::{MatchedPath, Request, State},
    http::{Method, StatusCode, header::CONTENT_TYPE},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use moxlet_cri::{
    host::{self, host_service_client::HostServiceClient},
    link::{Connection, Connector, Endpoint, Protocol},
};
use tokio::sync::OnceCell;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::auth::{Cluster, Gate, Reviewer, User};
use crate::{
    Config, Error, Result,
    identity::Identity,
    metrics,
    pods::registry::{ContainerView, PodRegistry, PodView},
};

/// Prometheus' text format.
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A listening socket of the API, taken early so that a taken port stops the start.
pub struct Bound {
    listener: tokio::net::TcpListener,
}

/// What the API works with.
pub struct ApiContext {
    /// The node's configuration.
    pub config: Config,
    /// Client, serving certificate, callers' CA.
    pub identity: Identity,
    /// The published copy of the pods.
    pub registry: PodRegistry,
    /// The agent, for CRI and `moxlet.host.v1`.
    pub agent: tonic::transport::Channel,
    /// The way to its streaming server, if it is on another machine.
    pub connector: Connector,
}

/// What the routes share.
pub(crate) struct Api {
    config: Config,
    registry: PodRegistry,
    agent: tonic::transport::Channel,
    /// The way to the agent's streaming server, once asked for.
    streams: OnceCell<Connector>,
    connector: Connector,
    gate: Gate,
    /// Upgraded connections.
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// Takes the address of the API.
///
/// # Errors
/// When it is taken or may not be used; the text says what to do.
pub async fn bind(config: &Config) -> Result<Bound> {
    let listener = tokio::net::TcpListener::bind(config.listen)
        .await
        .map_err(|source| Error::Listen { address: config.listen, source })?;
    Ok(Bound { listener })
}

/// Serves the API until the token is cancelled.
///
/// # Errors
/// When TLS cannot be set up.
pub async fn serve(bound: Bound, context: ApiContext, stop: CancellationToken) -> Result<()> {
    let ApiContext { config, identity, registry, agent, connector } = context;
    let acceptor = tls::acceptor(&identity)?;
    let reviewer = identity
        .client()
        .map(|client| -> Arc<dyn Reviewer> { Arc::new(Cluster { client, node: config.node_name.clone() }) });
    let api = Arc::new(Api {
        config,
        registry,
        agent,
        gate: Gate::new(reviewer),
        streams: OnceCell::new(),
        connector,
        tasks: TaskTracker::new(),
        stop: stop.clone(),
    });
    tls::serve(bound.listener, acceptor, routes(api.clone()), api.tasks.clone(), stop).await;
    api.tasks.close();
    api.tasks.wait().await;
    Ok(())
}

fn routes(api: Arc<Api>) -> Router {
    Router::new()
        .route("/healthz", get(async || "ok"))
        .route("/pods", get(pods))
        .route("/pods/", get(pods))
        .route("/configz", get(configz::configz))
        .route("/runningpods", get(running_pods))
        .route("/runningpods/", get(running_pods))
        .route("/metrics", get(own_metrics))
        .route("/metrics/resource", get(resource_metrics))
        .route("/metrics/cadvisor", get(cadvisor_metrics))
        // Prober figures; there are none while there are no probes.
        .route("/metrics/probes", get(async || ([(CONTENT_TYPE, METRICS)], "")))
        .route("/stats/summary", get(summary))
        .route("/stats/summary/", get(summary))
        .route("/containerLogs/{namespace}/{pod}/{container}", get(logs::container_logs))
        .route("/exec/{namespace}/{pod}/{container}", get(streams::exec).post(streams::exec))
        .route("/exec/{namespace}/{pod}/{uid}/{container}", get(streams::exec).post(streams::exec))
        .route("/attach/{namespace}/{pod}/{container}", get(streams::attach).post(streams::attach))
        .route("/attach/{namespace}/{pod}/{uid}/{container}", get(streams::attach).post(streams::attach))
        .route("/portForward/{namespace}/{pod}", get(streams::port_forward).post(streams::port_forward))
        .route("/portForward/{namespace}/{pod}/{uid}", get(streams::port_forward).post(streams::port_forward))
        .fallback(async || (StatusCode::NOT_FOUND, "404 page not found"))
        .layer(middleware::from_fn_with_state(api.clone(), gate))
        .with_state(api)
}

/// Lets a request through to its route, or says why not; counts it.
async fn gate(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Option<User>>,
    Extension(query): Extension<head::LongQuery>,
    mut request: Request,
    next: Next,
) -> Response {
    let begun = Instant::now();
    if let Some(query) = query.take() {
        request.extensions_mut().insert(head::Query(query.into()));
    }
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let shown = request.extensions().get::<MatchedPath>().map_or("other", |p| first_part(p.as_str()));
    let answer = async {
        match api.gate.admit(caller.as_ref(), &method, &path, request.headers()).await {
            Ok(_) => next.run(request).await,
            Err(refusal) => {
                tracing::debug!(%method, path, status = refusal.status.as_u16(), "a caller is turned away");
                (refusal.status, refusal.text).into_response()
            }
        }
    };
    let response = metrics::in_flight(answer).await;
    let method = if method == Method::GET { "GET" } else { "POST" };
    metrics::request_done(method, shown, response.status().as_u16(), begun.elapsed());
    response
}

/// The first part of a route, which is one of a few: a label of metrics must not be the caller's choice.
fn first_part(route: &str) -> &'static str {
    const PARTS: [&str; 10] = [
        "healthz",
        "configz",
        "pods",
        "runningpods",
        "metrics",
        "stats",
        "containerLogs",
        "exec",
        "attach",
        "portForward",
    ];
    let first = route.trim_start_matches('/').split('/').next().unwrap_or_default();
    PARTS.iter().find(|p| **p == first).copied().unwrap_or("other")
}

/// A failure as the kubelet answers it: a status and one line.
pub(crate) struct Failure(StatusCode, String);

impl Failure {
    fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self(status, text.into())
    }

    fn not_found(text: impl Into<String>) -> Self {
        Self(StatusCode::NOT_FOUND, text.into())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, self.1).into_response()
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self(StatusCode::INTERNAL_SERVER_ERROR, crate::error::chain(&error))
    }
}

impl Api {
    /// The pod of a request.
    fn pod(
        &self,
        namespace: &str,
        name: &str,
        uid: Option<&str>,
    ) -> std::result::Result<Arc<PodView>, Failure> {
        let view = self.registry.get(namespace, name);
        let view = view.filter(|v| uid.is_none_or(|uid| v.pod.metadata.uid.as_deref() == Some(uid)));
        view.ok_or_else(|| Failure::not_found(format!("pod does not exist: \"{namespace}/{name}\"")))
    }

    /// A connection to the agent's streaming server: on the same host it has a socket of its own, on another machine it is behind
    /// the agent's port.
    async fn stream(&self) -> Result<Connection> {
        let ask = || async {
            if let Endpoint::Tls { .. } = self.connector.endpoint() {
                return Ok(self.connector.clone());
            }
            let answer = HostServiceClient::new(self.agent.clone()).info(host::InfoRequest {}).await;
            let endpoint = answer.map_err(Error::agent("Info"))?.into_inner().stream_endpoint;
            Ok::<_, Error>(Connector::new(endpoint.parse()?, None)?)
        };
        Ok(self.streams.get_or_try_init(ask).await?.connect(Protocol::Streams).await?)
    }
}

/// A pod's container that is known by CRI.
fn container<'a>(view: &'a PodView, name: &str) -> std::result::Result<&'a ContainerView, Failure> {
    let pod = view.pod.metadata.name.as_deref().unwrap_or_default();
    let missing = || Failure::not_found(format!("container {name} not found in pod {pod}"));
    view.containers.get(name).ok_or_else(missing)
}

fn list(pods: &[Arc<PodView>]) -> Json<serde_json::Value> {
    let items: Vec<_> =
        pods.iter().map(|v| serde_json::to_value(v.pod.as_ref()).unwrap_or_default()).collect();
    Json(serde_json::json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}))
}

async fn pods(State(api): State<Arc<Api>>) -> Json<serde_json::Value> {
    list(&api.registry.list())
}

async fn running_pods(State(api): State<Arc<Api>>) -> Json<serde_json::Value> {
    let running = |v: &Arc<PodView>| {
        let statuses = v.pod.status.iter().flat_map(|s| s.container_statuses.iter().flatten());
        statuses.filter_map(|c| c.state.as_ref()).any(|s| s.running.is_some())
    };
    list(&api.registry.list().into_iter().filter(running).collect::<Vec<_>>())
}

async fn own_metrics(State(api): State<Arc<Api>>) -> impl IntoResponse {
    let text = metrics::render(&api.config.node_name, &api.config.kubelet_version, &api.registry);
    ([(CONTENT_TYPE, METRICS)], text)
}

async fn resource_metrics(State(api): State<Arc<Api>>) -> impl IntoResponse {
    let shot = metrics::resource::snapshot(&api.agent, &api.registry).await;
    ([(CONTENT_TYPE, METRICS)], metrics::resource::encode(&shot))
}

async fn cadvisor_metrics(State(api): State<Arc<Api>>) -> impl IntoResponse {
    let shot = metrics::resource::snapshot(&api.agent, &api.registry).await;
    ([(CONTENT_TYPE, METRICS)], metrics::cadvisor::encode(&shot))
}

async fn summary(State(api): State<Arc<Api>>) -> Json<serde_json::Value> {
    let shot = metrics::resource::snapshot(&api.agent, &api.registry).await;
    Json(metrics::resource::summary(&api.config.node_name, &shot))
}

#[cfg(test)]
mod tests {
    use super::first_part;

    #[test]
    fn labels_of_metrics_are_few() {
        assert_eq!(first_part("/containerLogs/{namespace}/{pod}/{container}"), "containerLogs");
        assert_eq!(first_part("/metrics/resource"), "metrics");
        assert_eq!(first_part("/x/y"), "other");
    }
}
