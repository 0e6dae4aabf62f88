//! The agent behind its link: CRI's two services and `moxlet.host.v1`, one method a call, errors with the call's name.
//! Each call is counted, but streams that last: in `calls!` the second name of one is that of its metrics, the kubelet's where it has one.
//!
//! [`Runtime`] is what pod workers see of it, so that tests put a fake in its place.

use std::time::Duration;

use async_trait::async_trait;
use futures::{StreamExt, stream::BoxStream};
use hyper_util::rt::TokioIo;
use moxlet_cri::{
    host::{self, host_service_client::HostServiceClient, image_store_client::ImageStoreClient},
    link::{self, Connector, Protocol},
    v1::{self, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient},
};
use tonic::transport::{Channel, Endpoint, Uri};

use crate::{
    error::{Error, Result},
    metrics::{RuntimeOperation, runtime_operation},
};

/// The largest answer that is read from the agent.
const MAX_ANSWER: usize = 32 << 20;
/// How long a call may take that does not wait for a network or a process.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);

/// How long making a sandbox may take, which waits for its turn on a busy host: twice the usual, as of the kubelet
/// (`runtimeRequestTimeout`).
const SANDBOX_TIMEOUT: Duration = Duration::from_secs(240);

/// How long a garbage collection may take: layers of many files go file by file.
const GARBAGE_TIMEOUT: Duration = Duration::from_secs(1800);

/// How often an agent on another machine is asked whether it is there, and how long its answer may take.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// A channel to the agent; it connects when first used and again when lost.
#[derive(Clone)]
pub(crate) struct Agent {
    channel: Channel,
}

/// Wraps a message in a request that is given up after a while.
fn timed<T>(message: T, timeout: Duration) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(timeout);
    request
}

macro_rules! calls {
    ($($(#[$doc:meta])* $client:ident.$name:ident($request:ty) -> $response:ty, $call:literal as $operation:literal $(within $patience:ident)?;)*) => {
        /// What a node asks of an agent.
        #[async_trait]
        pub(crate) trait Runtime: Send + Sync {
            $($(#[$doc])*
            async fn $name(&self, request: $request) -> Result<$response>;)*
            /// Stops a container; the agent waits for `seconds` before it kills.
            async fn stop_container(&self, id: &str, seconds: i64) -> Result<()>;
            /// Has an image there for a pod, however long it takes; tells how it gets on.
            async fn ensure_image(
                &self,
                request: host::ImageEnsureRequest,
            ) -> Result<BoxStream<'static, Result<host::ImagePullUpdate>>>;
            /// Removes images for their age or for want of space.
            async fn collect_garbage(&self, request: host::ImageGarbageRequest) -> Result<host::ImageGarbageResponse>;
            /// The stream of container events.
            async fn container_events(&self) -> Result<BoxStream<'static, Result<v1::ContainerEventResponse>>>;
            /// What the agent has seen done to CTs on its host since then (nanoseconds since 1970), and goes on seeing.
            async fn notices(&self, since_ns: i64) -> Result<BoxStream<'static, Result<host::Notice>>>;
            /// The end of a container's log, at most `limit` bytes.
            async fn log_tail(&self, id: &str, lines: u64, limit: usize) -> Result<Vec<u8>>;
        }

        #[async_trait]
        impl Runtime for Agent {
            $(async fn $name(&self, request: $request) -> Result<$response> {
                runtime_operation($operation, async {
                    // Its own patience, or the usual.
                    let patience = [$($patience,)? CALL_TIMEOUT][0];
                    let answer = self.$client().$name(timed(request, patience)).await;
                    Ok(answer.map_err(Error::agent($call))?.into_inner())
                }).await
            })*

            async fn stop_container(&self, id: &str, seconds: i64) -> Result<()> {
                let request = v1::StopContainerRequest { container_id: id.to_owned(), timeout: seconds };
                let patience = CALL_TIMEOUT + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
                runtime_operation("stop_container", async {
                    self.runtime().stop_container(timed(request, patience)).await.map_err(Error::agent("StopContainer"))?;
                    Ok(())
                }).await
            }

            async fn ensure_image(
                &self,
                request: host::ImageEnsureRequest,
            ) -> Result<BoxStream<'static, Result<host::ImagePullUpdate>>> {
                let mut operation = RuntimeOperation::begin("ensure_image");
                let answer = self.store().ensure(request).await.map_err(Error::agent("Ensure"));
                operation.came(answer.is_err());
                let updates = answer?.into_inner().map(|u| u.map_err(Error::agent("Ensure")));
                // It has ended when the stream has.
                Ok(updates.inspect(move |update| operation.came(update.is_err())).boxed())
            }

            async fn collect_garbage(&self, request: host::ImageGarbageRequest) -> Result<host::ImageGarbageResponse> {
                runtime_operation("collect_garbage", async {
                    let answer = self.store().collect_garbage(timed(request, GARBAGE_TIMEOUT)).await;
                    Ok(answer.map_err(Error::agent("CollectGarbage"))?.into_inner())
                }).await
            }

            async fn container_events(&self) -> Result<BoxStream<'static, Result<v1::ContainerEventResponse>>> {
                let answer = self.runtime().get_container_events(v1::GetEventsRequest {}).await;
                let stream = answer.map_err(Error::agent("GetContainerEvents"))?.into_inner();
                Ok(stream.map(|e| e.map_err(Error::agent("GetContainerEvents"))).boxed())
            }

            async fn notices(&self, since_ns: i64) -> Result<BoxStream<'static, Result<host::Notice>>> {
                let answer = self.host().stream_notices(host::StreamNoticesRequest { since_ns }).await;
                let stream = answer.map_err(Error::agent("StreamNotices"))?.into_inner();
                Ok(stream.map(|n| n.map_err(Error::agent("StreamNotices"))).boxed())
            }

            async fn log_tail(&self, id: &str, lines: u64, limit: usize) -> Result<Vec<u8>> {
                let request = host::StreamLogsRequest {
                    container_id: id.to_owned(),
                    tail_lines: Some(lines),
                    ..host::StreamLogsRequest::default()
                };
                let answer = self.host().stream_logs(timed(request, CALL_TIMEOUT)).await;
                let mut stream = answer.map_err(Error::agent("StreamLogs"))?.into_inner();
                let mut tail = Vec::new();
                while let Some(chunk) = stream.message().await.map_err(Error::agent("StreamLogs"))? {
                    tail.extend_from_slice(&chunk.data);
                    if tail.len() > limit {
                        tail.drain(..tail.len() - limit);
                    }
                }
                Ok(tail)
            }
        }

        #[cfg(test)]
        #[async_trait]
        impl Runtime for fake::FakeRuntime {
            $(async fn $name(&self, request: $request) -> Result<$response> {
                self.answer($call, &format!("{request:?}"))
            })*

            async fn stop_container(&self, id: &str, _: i64) -> Result<()> {
                self.answer("StopContainer", id)
            }

            async fn ensure_image(
                &self,
                request: host::ImageEnsureRequest,
            ) -> Result<BoxStream<'static, Result<host::ImagePullUpdate>>> {
                self.answer::<()>("Ensure", &format!("{request:?}"))?;
                Ok(futures::stream::empty().boxed())
            }

            async fn collect_garbage(&self, request: host::ImageGarbageRequest) -> Result<host::ImageGarbageResponse> {
                self.answer("CollectGarbage", &format!("{request:?}"))
            }

            async fn container_events(&self) -> Result<BoxStream<'static, Result<v1::ContainerEventResponse>>> {
                Ok(futures::stream::empty().boxed())
            }

            async fn notices(&self, _: i64) -> Result<BoxStream<'static, Result<host::Notice>>> {
                Ok(futures::stream::empty().boxed())
            }

            async fn log_tail(&self, id: &str, _: u64, _: usize) -> Result<Vec<u8>> {
                self.answer("StreamLogs", id)
            }
        }
    };
}

#[cfg(test)]
pub(crate) mod fake {
    //! An agent for tests: it remembers what it was asked, and answers nothing in particular unless it is told what.
    #![allow(clippy::unwrap_used)]

    use std::{any::Any, sync::Mutex};

    use crate::error::{Error, Result};

    /// An answer to a call: its message, or the agent's error.
    pub(crate) type Answer = std::result::Result<Box<dyn Any + Send>, tonic::Status>;
    type Answers = Box<dyn Fn(&str, &str) -> Option<Answer> + Send + Sync>;

    pub(crate) struct FakeRuntime {
        asked: Mutex<Vec<String>>,
        answers: Answers,
    }

    /// An answer with this message.
    pub(crate) fn with<T: Send + 'static>(message: T) -> Option<Answer> {
        Some(Ok(Box::new(message)))
    }

    impl FakeRuntime {
        /// It answers so to the call of this name with this request (as `Debug` shows it).
        pub(crate) fn new(answers: impl Fn(&str, &str) -> Option<Answer> + Send + Sync + 'static) -> Self {
            Self { asked: Mutex::default(), answers: Box::new(answers) }
        }

        pub(super) fn answer<T: Default + 'static>(&self, call: &'static str, request: &str) -> Result<T> {
            self.asked.lock().unwrap().push(format!("{call} {request}"));
            match (self.answers)(call, request) {
                Some(Ok(message)) => Ok(*message.downcast().unwrap()),
                Some(Err(status)) => Err(Error::agent(call)(status)),
                None => Ok(T::default()),
            }
        }

        /// The calls of these names, in their order.
        pub(crate) fn calls(&self, names: &[&str]) -> Vec<String> {
            let asked = self.asked.lock().unwrap();
            let name = |call: &String| call.split(' ').next().unwrap_or_default().to_owned();
            asked.iter().map(name).filter(|call| names.contains(&call.as_str())).collect()
        }
    }
}

impl Agent {
    /// The agent that a connector leads to.
    pub(crate) fn new(connector: Connector) -> Self {
        let endpoint = match connector.endpoint() {
            link::Endpoint::Unix(_) => Endpoint::from_static("http://agent.invalid"),
            // A host that is gone without a word would hold each call until its end, and a stream for ever.
            link::Endpoint::Tls { .. } => Endpoint::from_static("http://agent.invalid")
                .http2_keep_alive_interval(KEEP_ALIVE)
                .keep_alive_timeout(KEEP_ALIVE)
                .keep_alive_while_idle(true),
        };
        let channel = endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let connector = connector.clone();
            async move {
                let connection = connector.connect(Protocol::Grpc).await.map_err(std::io::Error::from)?;
                Ok::<_, std::io::Error>(TokioIo::new(connection))
            }
        }));
        Self { channel }
    }

    /// The channel itself, for the kubelet API.
    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    fn store(&self) -> ImageStoreClient<Channel> {
        ImageStoreClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    fn host(&self) -> HostServiceClient<Channel> {
        HostServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }
}

calls! {
    /// Whether runtime and network are ready.
    runtime.status(v1::StatusRequest) -> v1::StatusResponse, "Status" as "status";
    /// Tells the agent the node's pod CIDR.
    runtime.update_runtime_config(v1::UpdateRuntimeConfigRequest) -> v1::UpdateRuntimeConfigResponse, "UpdateRuntimeConfig" as "update_runtime_config";
    /// Sandboxes by label.
    runtime.list_pod_sandbox(v1::ListPodSandboxRequest) -> v1::ListPodSandboxResponse, "ListPodSandbox" as "list_podsandbox";
    /// One sandbox, with its addresses.
    runtime.pod_sandbox_status(v1::PodSandboxStatusRequest) -> v1::PodSandboxStatusResponse, "PodSandboxStatus" as "podsandbox_status";
    /// Makes and starts a sandbox.
    runtime.run_pod_sandbox(v1::RunPodSandboxRequest) -> v1::RunPodSandboxResponse, "RunPodSandbox" as "run_podsandbox" within SANDBOX_TIMEOUT;
    /// Stops a sandbox with all that is in it.
    runtime.stop_pod_sandbox(v1::StopPodSandboxRequest) -> v1::StopPodSandboxResponse, "StopPodSandbox" as "stop_podsandbox";
    /// Removes a sandbox with all that is in it.
    runtime.remove_pod_sandbox(v1::RemovePodSandboxRequest) -> v1::RemovePodSandboxResponse, "RemovePodSandbox" as "remove_podsandbox";
    /// Containers by label.
    runtime.list_containers(v1::ListContainersRequest) -> v1::ListContainersResponse, "ListContainers" as "list_containers";
    /// One container.
    runtime.container_status(v1::ContainerStatusRequest) -> v1::ContainerStatusResponse, "ContainerStatus" as "container_status";
    /// Makes a container.
    runtime.create_container(v1::CreateContainerRequest) -> v1::CreateContainerResponse, "CreateContainer" as "create_container";
    /// Starts a container.
    runtime.start_container(v1::StartContainerRequest) -> v1::StartContainerResponse, "StartContainer" as "start_container";
    /// Removes a container and its log.
    runtime.remove_container(v1::RemoveContainerRequest) -> v1::RemoveContainerResponse, "RemoveContainer" as "remove_container";
    /// Whether an image is there.
    images.image_status(v1::ImageStatusRequest) -> v1::ImageStatusResponse, "ImageStatus" as "image_status";
    /// Facts of the host.
    host.info(host::InfoRequest) -> host::InfoResponse, "Info" as "info";
    /// Makes a volume or brings it up to date.
    host.apply_volume(host::ApplyVolumeRequest) -> host::ApplyVolumeResponse, "ApplyVolume" as "apply_volume";
    /// Removes a pod's volumes.
    host.remove_pod_volumes(host::RemovePodVolumesRequest) -> host::RemovePodVolumesResponse, "RemovePodVolumes" as "remove_pod_volumes";
    /// Pods that left something on the host.
    host.list_pods(host::ListPodsRequest) -> host::ListPodsResponse, "ListPods" as "list_pods";
    /// What a container wrote to its termination message file.
    host.termination_message(host::TerminationMessageRequest) -> host::TerminationMessageResponse, "TerminationMessage" as "termination_message";
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{metrics, pods::registry::PodRegistry};

    #[tokio::test]
    async fn each_call_is_counted_under_the_kubelets_name() {
        metrics::install();
        let dir = tempfile::tempdir().unwrap();
        let nobody = link::Endpoint::Unix(dir.path().join("nobody.sock"));
        let agent = Agent::new(Connector::new(nobody, None).unwrap());
        agent.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap_err();
        agent.stop_container("c", 0).await.unwrap_err();
        assert!(agent.ensure_image(host::ImageEnsureRequest::default()).await.is_err());
        let text = metrics::render("n", "v1", &PodRegistry::default());
        for operation in ["list_podsandbox", "stop_container", "ensure_image"] {
            for name in ["total", "errors_total", "duration_seconds_count"] {
                let line = format!("kubelet_runtime_operations_{name}{{operation_type=\"{operation}\"}} 1");
                assert!(text.contains(&line), "{line} is not in\n{text}");
            }
        }
    }
}
