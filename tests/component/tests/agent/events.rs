//! The stream of container events.

use std::time::Duration;

use moxlet_cri::v1::{self, ContainerEventType as Kind};
use moxlet_tests_component::host::{Host, container};

#[tokio::test(flavor = "multi_thread")]
async fn events_tell_each_step_of_a_sandbox_and_its_container() {
    let host = Host::start().await;
    let mut stream = host.runtime().get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    let mut other = host.runtime().get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    let mut next = async || {
        let event = tokio::time::timeout(Duration::from_secs(20), stream.message()).await.unwrap();
        event.unwrap().unwrap()
    };
    let pod = host.pod("events").await;
    let event = next().await;
    assert_eq!((event.container_event_type(), &event.container_id), (Kind::ContainerStartedEvent, &pod.id));
    let id = host.create(&pod, container("main", "sleep 0.2; exit 5")).await.unwrap();
    let event = next().await;
    assert_eq!((event.container_event_type(), &event.container_id), (Kind::ContainerCreatedEvent, &id));
    host.start_container(&id).await.unwrap();
    assert_eq!(next().await.container_event_type(), Kind::ContainerStartedEvent);
    let event = next().await;
    assert_eq!((event.container_event_type(), &event.container_id), (Kind::ContainerStoppedEvent, &id));
    let status = &event.containers_statuses[0];
    assert_eq!((status.state(), status.exit_code), (v1::ContainerState::ContainerExited, 5));
    assert_eq!(event.pod_sandbox_status.unwrap().id, pod.id);
    host.remove_container(&id).await.unwrap();
    let event = next().await;
    assert_eq!((event.container_event_type(), &event.container_id), (Kind::ContainerDeletedEvent, &id));
    host.stop_pod(&pod.id).await.unwrap();
    assert_eq!(next().await.container_event_type(), Kind::ContainerStoppedEvent);
    host.remove_pod(&pod.id).await.unwrap();
    let event = next().await;
    assert_eq!((event.container_event_type(), &event.container_id), (Kind::ContainerDeletedEvent, &pod.id));
    for kind in ["Started", "Created"] {
        let event = other.message().await.unwrap().unwrap();
        assert!(format!("{:?}", event.container_event_type()).contains(kind), "every listener hears all");
    }
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_end_when_the_agent_does() {
    let mut host = Host::start().await;
    let pod = host.pod("streams").await;
    let id = host.run(&pod, container("main", "while :; do sleep 1; done")).await;
    let mut events = host.runtime().get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    let asked = moxlet_cri::host::StreamLogsRequest { container_id: id, follow: true, ..Default::default() };
    let mut log = host.service().stream_logs(asked).await.unwrap().into_inner();
    tokio::time::timeout(Duration::from_secs(10), host.stop_agent()).await.unwrap();
    let ended = async { (events.message().await, log.message().await) };
    let (events, log) = tokio::time::timeout(Duration::from_secs(10), ended).await.unwrap();
    assert!(!matches!(events, Ok(Some(_))) && !matches!(log, Ok(Some(_))));
    host.start_agent().await;
    host.end().await;
}
