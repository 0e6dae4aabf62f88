//! A pod's worker before an agent that answers as it is told.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::{Arc, Mutex};

use k8s_openapi::api::core::v1::Pod;
use moxlet_cri::v1;
use serde_json::json;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    registry::PodRegistry,
    worker::{Desired, Shared, Worker},
};
use crate::{
    Config,
    cluster::NoCluster,
    cri_client::fake::{FakeRuntime, with},
    env::services::Services,
    events::{Note, Recorder},
    status::Target,
};

/// A pod with one container; one that is deleted where there is a time for it.
fn pod(deleted: Option<&str>) -> Pod {
    let metadata =
        json!({"name": "web", "namespace": "default", "uid": "uid-1", "deletionTimestamp": deleted});
    let container = json!({"name": "main", "image": "busybox"});
    serde_json::from_value(json!({"metadata": metadata, "spec": {"containers": [container]}})).unwrap()
}

/// Lets a worker work until an event of this reason; its message.
async fn until_said(agent: &Arc<FakeRuntime>, pod: Pod, reason: &str) -> String {
    let (events, mut said): (_, mpsc::Receiver<Note>) = Recorder::queued();
    let (_, info) = watch::channel(Arc::default());
    let shared = Arc::new(Shared {
        config: Config::default(),
        agent: agent.clone(),
        cluster: Arc::new(NoCluster),
        services: Services::none(),
        registry: PodRegistry::default(),
        events,
        info,
        slots: Semaphore::new(1),
    });
    let target = Target { namespace: "default".into(), name: "web".into(), uid: "uid-1".into() };
    let desired = Desired { pod: Arc::new(pod), gone: false, grace: None, target };
    let (_desired, receiver) = watch::channel(desired);
    let stop = CancellationToken::new();
    let worker = tokio::spawn(Worker::new(shared, receiver, Arc::new(Notify::new())).run(stop.clone()));
    let message = loop {
        let note = said.recv().await.unwrap();
        if note.reason == reason {
            break note.message;
        }
    };
    stop.cancel();
    worker.await.unwrap();
    message
}

#[tokio::test]
async fn what_is_left_of_a_failed_start_is_removed_before_the_next_one() {
    let left = Mutex::new(true);
    let agent = Arc::new(FakeRuntime::new(move |call, _| {
        let item = || v1::PodSandbox { id: "old".into(), ..Default::default() };
        let state = v1::PodSandboxState::SandboxNotready as i32;
        match call {
            "ListPodSandbox" if *left.lock().unwrap() => {
                with(v1::ListPodSandboxResponse { items: vec![item()] })
            }
            "PodSandboxStatus" => {
                let status = v1::PodSandboxStatus { id: "old".into(), state, ..Default::default() };
                with(v1::PodSandboxStatusResponse { status: Some(status), ..Default::default() })
            }
            "RemovePodSandbox" => {
                *left.lock().unwrap() = false;
                None
            }
            // As when the last address is the old one's.
            "RunPodSandbox" if *left.lock().unwrap() => Some(Err(tonic::Status::unknown("no address"))),
            "RunPodSandbox" => Some(Err(tonic::Status::unknown("for another reason"))),
            _ => None,
        }
    }));
    let message = until_said(&agent, pod(None), "FailedCreatePodSandBox").await;
    assert!(message.contains("for another reason"), "{message}");
    assert_eq!(
        agent.calls(&["StopPodSandbox", "RemovePodSandbox", "RunPodSandbox"]),
        ["StopPodSandbox", "RemovePodSandbox", "RunPodSandbox"]
    );
}

#[tokio::test]
async fn a_pod_that_cannot_end_says_who_holds_it_and_nothing_of_it_is_removed() {
    let agent = Arc::new(FakeRuntime::new(|call, _| {
        let item = || v1::Container { id: "c".into(), pod_sandbox_id: "s".into(), ..Default::default() };
        let state = v1::ContainerState::ContainerRunning as i32;
        match call {
            "ListContainers" => with(v1::ListContainersResponse { containers: vec![item()] }),
            "ContainerStatus" => {
                let metadata = v1::ContainerMetadata { name: "main".into(), attempt: 0 };
                let status = v1::ContainerStatus { metadata: Some(metadata), state, ..Default::default() };
                with(v1::ContainerStatusResponse { status: Some(status), ..Default::default() })
            }
            "StopContainer" => Some(Err(tonic::Status::unavailable("sandbox s is held (backup)"))),
            _ => None,
        }
    }));
    let message = until_said(&agent, pod(Some("2026-01-01T00:00:00Z")), "FailedKillPod").await;
    assert!(message.contains("held (backup)"), "{message}");
    assert_eq!(agent.calls(&["StopPodSandbox", "RemovePodSandbox"]), Vec::<String>::new());
}
