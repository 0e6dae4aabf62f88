//! The node's own figures (`/metrics`) and its pods' resources (`/metrics/resource`, `/metrics/cadvisor`).
//!
//! Whoever does the work reports it here by one call; names are the kubelet's where the meaning is the kubelet's.

pub(crate) mod cadvisor;
mod process;
pub(crate) mod resource;
pub(crate) mod text;

use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

use ::metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use self::text::Text;
use crate::pods::registry::PodRegistry;

static HANDLE: OnceLock<Option<PrometheusHandle>> = OnceLock::new();

/// The kubelet's buckets of a pod's start.
const START: &[f64] = &[
    0.05, 0.1, 0.2, 0.35, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0,
];
/// Everything else, in seconds.
const TIMES: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Installs the recorder once in the process; later calls do nothing.
pub fn install() {
    HANDLE.get_or_init(|| {
        let built = PrometheusBuilder::new().set_buckets(TIMES).and_then(|b| {
            b.set_buckets_for_metric(Matcher::Suffix("pod_start_duration_seconds".into()), START)
        });
        match built.map(PrometheusBuilder::build_recorder) {
            Ok(recorder) => {
                let handle = recorder.handle();
                if ::metrics::set_global_recorder(recorder).is_err() {
                    tracing::warn!("another recorder of metrics is installed: /metrics lacks the node's own");
                    return None;
                }
                describe();
                Some(handle)
            }
            Err(error) => {
                tracing::warn!(%error, "no recorder of metrics");
                None
            }
        }
    });
}

fn describe() {
    describe_histogram!(
        "moxlet_pod_start_duration_seconds",
        "Time from a pod first seen to all its containers started"
    );
    describe_histogram!(
        "kubelet_pod_start_duration_seconds",
        "Duration in seconds from kubelet seeing a pod for the first time to the pod starting to run"
    );
    describe_histogram!(
        "kubelet_pod_worker_duration_seconds",
        "Duration in seconds to sync a single pod, by operation"
    );
    describe_counter!("moxlet_pod_sync_errors_total", "Passes over a pod that failed, by operation");
    describe_counter!(
        "kubelet_runtime_operations_total",
        "Cumulative number of runtime operations by operation type"
    );
    describe_counter!(
        "kubelet_runtime_operations_errors_total",
        "Cumulative number of runtime operation errors by operation type"
    );
    describe_histogram!(
        "kubelet_runtime_operations_duration_seconds",
        "Duration in seconds of runtime operations by operation type"
    );
    describe_gauge!("workqueue_depth", "Changes of pods that wait to be given to their workers");
    describe_counter!(
        "kubelet_http_requests_total",
        "Number of the http requests received since the server started"
    );
    describe_histogram!(
        "kubelet_http_requests_duration_seconds",
        "Duration in seconds to serve http requests"
    );
    describe_gauge!("kubelet_http_inflight_requests", "Number of the inflight http requests");
    describe_gauge!("kubelet_running_pods", "Number of pods that have a running pod sandbox");
    describe_gauge!("kubelet_running_containers", "Number of containers, by state");
    describe_gauge!("kubelet_node_name", "The node's name. The count is always 1");
    describe_gauge!(
        "kubernetes_build_info",
        "A metric with a constant '1' value labeled by the version that the node reports"
    );
    describe_gauge!("moxlet_build_info", "A metric with a constant '1' value labeled by Moxlet's version");
}

/// A pod came to run: time since the node saw it first.
pub fn pod_started(since_seen: Duration) {
    histogram!("moxlet_pod_start_duration_seconds").record(since_seen);
    histogram!("kubelet_pod_start_duration_seconds").record(since_seen);
}

/// A worker finished one pass over a pod: `sync`, or `kill` where the pod is to end.
pub fn pod_synced(operation: &'static str, took: Duration, failed: bool) {
    histogram!("kubelet_pod_worker_duration_seconds", "operation_type" => operation).record(took);
    if failed {
        counter!("moxlet_pod_sync_errors_total", "operation_type" => operation).increment(1);
    }
}

/// A call to the agent under way; it counts when this is dropped.
pub(crate) struct RuntimeOperation {
    operation: &'static str,
    begun: Instant,
    failed: bool,
}

impl RuntimeOperation {
    /// A call begins; `operation` is the kubelet's name of it (`run_podsandbox`).
    pub(crate) fn begin(operation: &'static str) -> Self {
        Self { operation, begun: Instant::now(), failed: false }
    }

    /// What came of it so far; one failure is enough.
    pub(crate) fn came(&mut self, failed: bool) {
        self.failed |= failed;
    }
}

impl Drop for RuntimeOperation {
    fn drop(&mut self) {
        let operation = self.operation;
        counter!("kubelet_runtime_operations_total", "operation_type" => operation).increment(1);
        histogram!("kubelet_runtime_operations_duration_seconds", "operation_type" => operation)
            .record(self.begun.elapsed());
        if self.failed {
            counter!("kubelet_runtime_operations_errors_total", "operation_type" => operation).increment(1);
        }
    }
}

/// Waits for a call to the agent and counts it; one that is given up counts as failed.
pub(crate) async fn runtime_operation<T, E>(
    operation: &'static str,
    call: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let mut operation = RuntimeOperation::begin(operation);
    operation.failed = true;
    let outcome = call.await;
    operation.failed = outcome.is_err();
    outcome
}

/// How many items wait in a queue.
pub fn queue_depth(queue: &'static str, depth: usize) {
    gauge!("workqueue_depth", "name" => queue).set(depth as f64);
}

/// Takes one from the requests under way, however its answer ends.
struct InFlight;

impl Drop for InFlight {
    fn drop(&mut self) {
        gauge!("kubelet_http_inflight_requests").decrement(1.0);
    }
}

/// Answers a request of the kubelet API, which is under way meanwhile: until it is answered, or its client hangs up and nobody waits
/// for the answer any more.
pub(crate) async fn in_flight<T>(answer: impl Future<Output = T>) -> T {
    gauge!("kubelet_http_inflight_requests").increment(1.0);
    let _until = InFlight;
    answer.await
}

/// A request has been answered (a stream: its answer has begun); `path` is the first part of its path.
pub(crate) fn request_done(method: &'static str, path: &'static str, code: u16, took: Duration) {
    counter!("kubelet_http_requests_total", "method" => method, "path" => path, "code" => code.to_string())
        .increment(1);
    histogram!("kubelet_http_requests_duration_seconds", "method" => method, "path" => path).record(took);
}

/// The text of `/metrics`.
pub(crate) fn render(node: &str, kubelet_version: &str, registry: &PodRegistry) -> String {
    install();
    let (mut pods, mut running, mut waiting, mut exited) = (0_u32, 0_u32, 0_u32, 0_u32);
    for view in registry.list() {
        let Some(status) = view.pod.status.as_ref() else { continue };
        let finished = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        pods += u32::from(view.sandbox_id.is_some() && !finished);
        for state in status.container_statuses.iter().flatten().filter_map(|c| c.state.as_ref()) {
            running += u32::from(state.running.is_some());
            waiting += u32::from(state.waiting.is_some());
            exited += u32::from(state.terminated.is_some());
        }
    }
    gauge!("kubelet_running_pods").set(pods);
    for (state, count) in [("running", running), ("created", waiting), ("exited", exited)] {
        gauge!("kubelet_running_containers", "container_state" => state).set(count);
    }
    gauge!("kubelet_node_name", "node" => node.to_owned()).set(1);
    gauge!("kubernetes_build_info", "git_version" => kubelet_version.to_owned(), "platform" => platform())
        .set(1);
    gauge!("moxlet_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1);
    let mut text = match HANDLE.get() {
        Some(Some(handle)) => {
            handle.run_upkeep();
            handle.render()
        }
        _ => String::new(),
    };
    let mut own = Text::default();
    process::encode(&mut own);
    text.push_str(&own.finish());
    text
}

fn platform() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "linux/amd64",
        "aarch64" => "linux/arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_whose_client_hangs_up_is_under_way_no_more() {
        use futures::FutureExt as _;

        let recorder = PrometheusBuilder::new().build_recorder();
        let shown = recorder.handle();
        let has = |line: &str| shown.render().lines().any(|l| l == line);
        ::metrics::with_local_recorder(&recorder, || {
            let mut answer = Box::pin(in_flight(std::future::pending::<()>()));
            assert!(answer.as_mut().now_or_never().is_none());
            assert!(has("kubelet_http_inflight_requests 1"), "{}", shown.render());
            drop(answer);
            assert!(has("kubelet_http_inflight_requests 0"), "{}", shown.render());
            assert_eq!(in_flight(async { 7 }).now_or_never(), Some(7));
            assert!(has("kubelet_http_inflight_requests 0"), "{}", shown.render());
        });
    }

    #[test]
    fn what_is_reported_is_shown() {
        install();
        install();
        pod_started(Duration::from_millis(150));
        let mut operation = RuntimeOperation::begin("run_podsandbox");
        operation.came(true);
        operation.came(false);
        drop(operation);
        queue_depth("pods", 2);
        let text = render("n1", "v1.36.0", &PodRegistry::default());
        for part in [
            "kubelet_pod_start_duration_seconds_bucket{le=\"0.2\"}",
            "moxlet_pod_start_duration_seconds_count",
            "kubelet_runtime_operations_errors_total{operation_type=\"run_podsandbox\"} ",
            "kubelet_runtime_operations_duration_seconds_bucket{operation_type=\"run_podsandbox\",le=\"60\"} 1",
            "workqueue_depth{name=\"pods\"} 2",
            "kubelet_running_pods 0",
            "kubelet_node_name{node=\"n1\"} 1",
            "process_resident_memory_bytes",
            "# HELP kubelet_running_pods",
            "# TYPE kubelet_pod_start_duration_seconds histogram",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
