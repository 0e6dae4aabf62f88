//! A pod's worker before an agent that answers as it is told.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::{Arc, Mutex};

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use moxlet_cri::v1;
use serde_json::json;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    admission::Admission,
    registry::PodRegistry,
    state::PodState,
    status,
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

/// A worker at work.
struct Work {
    events: mpsc::Receiver<Note>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    _desired: watch::Sender<Desired>,
}

impl Work {
    fn start(agent: &Arc<FakeRuntime>, pod: Pod) -> Self {
        let (recorder, events): (_, mpsc::Receiver<Note>) = Recorder::queued();
        let host = moxlet_cri::host::InfoResponse { cpus: 2, memory_bytes: 1 << 30, ..Default::default() };
        let (_, info) = watch::channel(Arc::new(host));
        let shared = Arc::new(Shared {
            config: Config::default(),
            agent: agent.clone(),
            cluster: Arc::new(NoCluster),
            services: Services::none(),
            registry: PodRegistry::default(),
            events: recorder,
            info,
            slots: Semaphore::new(1),
            admission: Admission::default(),
        });
        let target = Target { namespace: "default".into(), name: "web".into(), uid: "uid-1".into() };
        let desired = Desired { pod: Arc::new(pod), gone: false, grace: None, target };
        let (desired, receiver) = watch::channel(desired);
        let stop = CancellationToken::new();
        let task = tokio::spawn(Worker::new(shared, receiver, Arc::new(Notify::new())).run(stop.clone()));
        Self { events, stop, task, _desired: desired }
    }

    async fn end(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

/// Lets a worker work until an event of this reason; its message.
async fn until_event(agent: &Arc<FakeRuntime>, pod: Pod, reason: &str) -> String {
    let mut work = Work::start(agent, pod);
    let message = loop {
        let note = work.events.recv().await.unwrap();
        if note.reason == reason {
            break note.message;
        }
    };
    work.end().await;
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
    let message = until_event(&agent, pod(None), "FailedCreatePodSandBox").await;
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
            "ListPodSandbox" => {
                let item = v1::PodSandbox { id: "s".into(), ..Default::default() };
                with(v1::ListPodSandboxResponse { items: vec![item] })
            }
            "PodSandboxStatus" => {
                let status = v1::PodSandboxStatus { id: "s".into(), ..Default::default() };
                with(v1::PodSandboxStatusResponse { status: Some(status), ..Default::default() })
            }
            "StopContainer" | "StopPodSandbox" => {
                Some(Err(tonic::Status::unavailable("sandbox s is held (backup)")))
            }
            _ => None,
        }
    }));
    let message = until_event(&agent, pod(Some("2026-01-01T00:00:00Z")), "FailedKillPod").await;
    assert!(message.contains("held (backup)"), "{message}");
    assert_eq!(agent.calls(&["StopPodSandbox", "RemovePodSandbox"]), ["StopPodSandbox"]);
}

#[tokio::test]
async fn a_container_that_cannot_be_stopped_keeps_no_sandbox_from_being_stopped_and_removed() {
    let removed = Arc::new(Notify::new());
    let done = removed.clone();
    let agent = Arc::new(FakeRuntime::new(move |call, _| {
        let item = || v1::Container { id: "c".into(), pod_sandbox_id: "s".into(), ..Default::default() };
        let state = v1::ContainerState::ContainerRunning as i32;
        match call {
            "ListContainers" => with(v1::ListContainersResponse { containers: vec![item()] }),
            "ContainerStatus" => {
                let metadata = v1::ContainerMetadata { name: "main".into(), attempt: 0 };
                let status = v1::ContainerStatus { metadata: Some(metadata), state, ..Default::default() };
                with(v1::ContainerStatusResponse { status: Some(status), ..Default::default() })
            }
            "ListPodSandbox" => {
                let item = v1::PodSandbox { id: "s".into(), ..Default::default() };
                with(v1::ListPodSandboxResponse { items: vec![item] })
            }
            "PodSandboxStatus" => {
                let status = v1::PodSandboxStatus { id: "s".into(), ..Default::default() };
                with(v1::PodSandboxStatusResponse { status: Some(status), ..Default::default() })
            }
            // As where its init hangs.
            "StopContainer" => Some(Err(tonic::Status::deadline_exceeded("the init does not answer"))),
            "RemovePodSandbox" => {
                done.notify_one();
                None
            }
            _ => None,
        }
    }));
    let worker = Work::start(&agent, pod(Some("2026-01-01T00:00:00Z")));
    tokio::time::timeout(std::time::Duration::from_secs(10), removed.notified()).await.unwrap();
    worker.end().await;
    assert_eq!(
        agent.calls(&["StopContainer", "StopPodSandbox", "RemovePodSandbox"]),
        ["StopContainer", "StopPodSandbox", "RemovePodSandbox"]
    );
}

#[tokio::test]
async fn a_pod_whose_volumes_are_missing_has_no_sandbox() {
    let agent = Arc::new(FakeRuntime::new(|_, _| None));
    let mut web = pod(None);
    let volume = json!([{"name": "s", "secret": {"secretName": "missing"}}]);
    web.spec.as_mut().unwrap().volumes = serde_json::from_value(volume).unwrap();
    let message = until_event(&agent, web, "FailedMount").await;
    assert!(message.contains("missing"), "{message}");
    assert_eq!(agent.calls(&["RunPodSandbox"]), Vec::<String>::new());
}

#[test]
fn a_container_of_kubectl_debug_waits_with_the_reason_and_nothing_else_changes() {
    let mut web = pod(None);
    let before = status::build(&web, &PodState::default(), &PodStatus::default(), &status::Inputs::default());
    let debug = json!([{"name": "debugger", "image": "busybox", "targetContainerName": "main"}]);
    web.spec.as_mut().unwrap().ephemeral_containers = serde_json::from_value(debug).unwrap();
    assert!(crate::support::refusals(&web).is_empty(), "the pod's next start is refused");
    let mut after = status::build(&web, &PodState::default(), &before, &status::Inputs::default());
    let debug = after.ephemeral_container_statuses.take().unwrap();
    let waiting = debug[0].state.as_ref().unwrap().waiting.as_ref().unwrap();
    assert!(waiting.message.as_ref().unwrap().contains("ephemeralContainers"));
    assert_eq!(after, before);
}

#[tokio::test]
async fn a_pod_that_a_kubelet_would_reject_fails_with_its_reason_and_nothing_of_it_is_made() {
    let os = json!({"os": {"name": "windows"}});
    let sysctl = json!({"securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}});
    let requests = json!({"containers": [{"name": "main", "image": "busybox", "resources": {"requests": {"cpu": "3"}}}]});
    for (more, reason) in [(os, "PodOSNotSupported"), (sysctl, "SysctlForbidden"), (requests, "OutOfcpu")] {
        let agent = Arc::new(FakeRuntime::new(|_, _| None));
        let mut web = serde_json::to_value(pod(None)).unwrap();
        web["spec"].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        until_event(&agent, serde_json::from_value(web).unwrap(), reason).await;
        assert_eq!(agent.calls(&["RunPodSandbox", "ApplyVolume"]), Vec::<String>::new());
    }
}

#[test]
fn a_resize_that_is_not_done_is_pending_and_the_status_says_what_the_container_has() {
    let state = PodState {
        containers: vec![super::state::Container {
            id: "c".into(),
            name: "main".into(),
            attempt: 0,
            sandbox: "s".into(),
            phase: super::state::Phase::Running,
            created_at: 1,
            started_at: 1,
            finished_at: 0,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            image: "busybox".into(),
            image_ref: String::new(),
        }],
        ..PodState::default()
    };
    let limit = |memory: &str| -> Pod {
        let mut web = serde_json::to_value(pod(None)).unwrap();
        web["spec"]["containers"][0]["resources"] = json!({"limits": {"memory": memory}});
        serde_json::from_value(web).unwrap()
    };
    let (inputs, pending) = (status::Inputs::default(), |s: &PodStatus| {
        let found = s.conditions.iter().flatten().find(|c| c.type_ == crate::status::RESIZE_PENDING);
        found.map(|c| (c.status.clone(), c.reason.clone().unwrap_or_default()))
    });
    let before = status::build(&limit("32Mi"), &state, &PodStatus::default(), &inputs);
    assert_eq!(pending(&before), None);
    let after = status::build(&limit("64Mi"), &state, &before, &inputs);
    assert_eq!(pending(&after), Some(("True".to_owned(), "Infeasible".to_owned())));
    let has = |s: &PodStatus| s.container_statuses.as_ref().unwrap()[0].resources.clone();
    assert_eq!(has(&after), has(&before));
}

#[test]
fn a_pod_that_is_refused_keeps_the_field_in_a_condition() {
    let waiting = ("UnsupportedField".to_owned(), "not supported by this node: spec.hostNetwork".to_owned());
    let inputs =
        status::Inputs { waiting: [("main".to_owned(), waiting)].into(), ..status::Inputs::default() };
    let built = status::build(&pod(None), &PodState::default(), &PodStatus::default(), &inputs);
    let found = built.conditions.unwrap().into_iter().find(|c| c.type_ == crate::status::SUPPORTED).unwrap();
    assert_eq!((found.status.as_str(), found.reason.as_deref()), ("False", Some("UnsupportedField")));
    assert!(found.message.unwrap().contains("spec.hostNetwork; docs/support.md"));
}
