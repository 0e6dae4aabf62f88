//! What is done to a pod's CT on its host reads as an event of the pod: a node of its own at the real API server, with an agent
//! that has nothing but notices.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex},
    time::{SystemTime, UNIX_EPOCH},
};

use futures::{Stream, StreamExt};
use moxlet_cri::host::{self, host_service_server::HostService, host_service_server::HostServiceServer};
use moxlet_tests_e2e::{Cluster, Kubectl, Namespace, busybox, eventually};
use serde_json::{Value, json};
use tokio::{net::UnixListener, sync::broadcast};
use tokio_stream::wrappers::{BroadcastStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

type Answer<T> = Result<Response<T>, Status>;
type Notices = Pin<Box<dyn Stream<Item = Result<host::Notice, Status>> + Send>>;

/// What an agent has seen, and who listens.
#[derive(Clone)]
struct Agent {
    seen: Arc<Mutex<Vec<host::Notice>>>,
    next: broadcast::Sender<host::Notice>,
}

impl Agent {
    fn new() -> Self {
        Self { seen: Arc::default(), next: broadcast::Sender::new(16) }
    }

    fn see(&self, pod: &Value, reason: &str, message: &str, warning: bool) {
        let text = |path: &str| pod.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        let notice = host::Notice {
            pod_namespace: text("/metadata/namespace"),
            pod_name: text("/metadata/name"),
            pod_uid: text("/metadata/uid"),
            reason: reason.into(),
            message: message.into(),
            warning,
            at_ns: i64::try_from(now).unwrap(),
            ..host::Notice::default()
        };
        let mut seen = self.seen.lock().unwrap();
        seen.push(notice.clone());
        let _ = self.next.send(notice);
    }

    /// Serves until the token is cancelled.
    async fn serve(self, socket: std::path::PathBuf, stop: CancellationToken) {
        let _ = std::fs::remove_file(&socket);
        let incoming = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
        tonic::transport::Server::builder()
            .add_service(HostServiceServer::new(self))
            .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
            .await
            .unwrap();
    }
}

#[tonic::async_trait]
impl HostService for Agent {
    type StreamLogsStream = tokio_stream::Empty<Result<host::LogChunk, Status>>;
    type StreamNoticesStream = Notices;

    async fn info(&self, _: Request<host::InfoRequest>) -> Answer<host::InfoResponse> {
        let (cpus, memory_bytes) = (1, 1 << 30);
        let addresses = vec!["127.0.0.1".to_owned()];
        Ok(Response::new(host::InfoResponse { cpus, memory_bytes, addresses, ..Default::default() }))
    }

    async fn apply_volume(&self, _: Request<host::ApplyVolumeRequest>) -> Answer<host::ApplyVolumeResponse> {
        Err(Status::unavailable("it has notices alone"))
    }

    async fn remove_pod_volumes(
        &self,
        _: Request<host::RemovePodVolumesRequest>,
    ) -> Answer<host::RemovePodVolumesResponse> {
        Ok(Response::new(Default::default()))
    }

    async fn list_pods(&self, _: Request<host::ListPodsRequest>) -> Answer<host::ListPodsResponse> {
        Ok(Response::new(Default::default()))
    }

    async fn stream_logs(&self, _: Request<host::StreamLogsRequest>) -> Answer<Self::StreamLogsStream> {
        Err(Status::unavailable("it has notices alone"))
    }

    async fn termination_message(
        &self,
        _: Request<host::TerminationMessageRequest>,
    ) -> Answer<host::TerminationMessageResponse> {
        Ok(Response::new(Default::default()))
    }

    async fn stream_notices(
        &self,
        request: Request<host::StreamNoticesRequest>,
    ) -> Answer<Self::StreamNoticesStream> {
        let since = request.into_inner().since_ns;
        let seen = self.seen.lock().unwrap();
        let late: Vec<_> = seen.iter().filter(|n| n.at_ns > since).cloned().map(Ok).collect();
        let next = BroadcastStream::new(self.next.subscribe()).filter_map(async |n| n.ok().map(Ok));
        Ok(Response::new(Box::pin(futures::stream::iter(late).chain(next))))
    }
}

/// The node in this process, until the token is cancelled.
fn node(name: &str, dir: &Path, stop: CancellationToken) -> tokio::task::JoinHandle<moxlet_node::Result<()>> {
    let config = moxlet_node::Config {
        node_name: name.to_owned(),
        agent_endpoint: format!("unix://{}/agent.sock", dir.display()).parse().unwrap(),
        kubeconfig: Some(Cluster::get().kubeconfig.clone()),
        // The administrator's stands in for an identity of its own.
        allow_any_identity: true,
        client_ca_file: Some(Cluster::get().dir.join("control-plane/ca.crt")),
        state_dir: dir.join("node"),
        listen: ([127, 0, 0, 1], 0).into(),
        ..moxlet_node::Config::default()
    };
    tokio::spawn(moxlet_node::run(config, stop))
}

/// The events of a pod that have this reason: type, message, count, host.
fn events(ns: &Namespace, pod: &Value, reason: &str) -> Vec<(String, String, u64, String)> {
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    let fields = format!("involvedObject.uid={uid},reason={reason}");
    let found =
        Kubectl::new(Some(&ns.name), &["get", "events", "--field-selector", &fields, "-o", "json"]).json();
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let items = found["items"].as_array().unwrap().iter();
    items
        .map(|e| {
            (text(&e["type"]), text(&e["message"]), e["count"].as_u64().unwrap(), text(&e["source"]["host"]))
        })
        .collect()
}

fn until_events(ns: &Namespace, pod: &Value, reason: &str, expected: &[(&str, &str, u64)], host: &str) {
    eventually(&format!("events {reason}"), || {
        let found = events(ns, pod, reason);
        let same = found.len() == expected.len()
            && found.iter().zip(expected).all(|(f, e)| (&*f.0, &*f.1, f.2, &*f.3) == (e.0, e.1, e.2, host));
        if same { Ok(()) } else { Err(format!("{found:?}")) }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn notices_read_as_events_of_the_pod_once_each_also_over_restarts() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let dir = tempfile::tempdir().unwrap();
    let name = format!("notices-{}", std::process::id());
    let (agent, socket) = (Agent::new(), dir.path().join("agent.sock"));
    let mut serving = CancellationToken::new();
    let mut server = tokio::spawn(agent.clone().serve(socket.clone(), serving.clone()));
    let mut running = CancellationToken::new();
    let mut own = node(&name, dir.path(), running.clone());

    let ns = tokio::task::block_in_place(|| Namespace::new("notices"));
    // For the node by name, so that no scheduler has to find it; it stays Pending.
    let manifest = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web"}, "spec": {"nodeName": name,
        "terminationGracePeriodSeconds": 0, "tolerations": [{"operator": "Exists"}], "containers": [busybox("sleep 1")]}});
    let create =
        Kubectl::new(Some(&ns.name), &["create", "-f", "-", "-o", "json"]).stdin(manifest.to_string());
    let pod = tokio::task::block_in_place(|| create.json());

    let edited = "CT 1000000 was edited on the host: memory 65 to 300; it stays so until the pod is replaced";
    let locked = "CT 1000000 is locked (backup)";
    agent.see(&pod, "CTEdited", edited, true);
    agent.see(&pod, "CTLocked", locked, false);
    tokio::task::block_in_place(|| {
        until_events(&ns, &pod, "CTEdited", &[("Warning", edited, 1)], &name);
        until_events(&ns, &pod, "CTLocked", &[("Normal", locked, 1)], &name);
    });

    // The agent goes and comes again; what it saw meanwhile is told, and the same thing again is counted.
    serving.cancel();
    server.abort();
    let _ = server.await;
    agent.see(&pod, "CTLocked", locked, false);
    serving = CancellationToken::new();
    server = tokio::spawn(agent.clone().serve(socket, serving.clone()));
    tokio::task::block_in_place(|| until_events(&ns, &pod, "CTLocked", &[("Normal", locked, 2)], &name));

    // The node goes and comes again, and is told all of it once more.
    running.cancel();
    own.await.unwrap().unwrap();
    running = CancellationToken::new();
    own = node(&name, dir.path(), running.clone());
    agent.see(&pod, "CTUnlocked", "CT 1000000 is not locked (backup) any more", false);
    tokio::task::block_in_place(|| {
        let unlocked = ("Normal", "CT 1000000 is not locked (backup) any more", 1);
        until_events(&ns, &pod, "CTUnlocked", &[unlocked], &name);
        until_events(&ns, &pod, "CTEdited", &[("Warning", edited, 1)], &name);
        until_events(&ns, &pod, "CTLocked", &[("Normal", locked, 2)], &name);
        ns.kubectl(&["delete", "pod", "web", "--force", "--grace-period=0"]).ok();
        Kubectl::new(None, &["delete", "node", &name]).run().ok();
    });
    running.cancel();
    own.await.unwrap().unwrap();
    serving.cancel();
    server.abort();
    let _ = server.await;
}
