//! CRI's RuntimeService.

use std::{collections::HashMap, sync::Arc};

use futures::StreamExt;
use moxlet_cri::v1::{self, runtime_service_server::RuntimeService};
use moxlet_errors::chain;
use tokio_stream::wrappers::{BroadcastStream, errors::BroadcastStreamRecvError};
use tonic::{Request, Response, Status};

use super::{Parts, Service, conditions::conditions, in_chunks, info, selected};
use crate::{
    clock::now_ns,
    config::EngineSettings,
    error::{Error, Result},
    ledger::SandboxPhase,
    limits,
    state::{Container, RunState, Sandbox},
    stats, status, streaming,
    tasks::blocking,
};

type Answer<T> = std::result::Result<Response<T>, Status>;

impl Service {
    fn pods(&self, filter: Option<v1::PodSandboxFilter>) -> Vec<Arc<Sandbox>> {
        let filter = filter.unwrap_or_default();
        let wanted = |sandbox: &Arc<Sandbox>| {
            let record = sandbox.record();
            let ready = record.phase == SandboxPhase::Ready;
            (filter.id.is_empty() || record.id.as_str().starts_with(&filter.id))
                && filter.state.is_none_or(|s| (s.state() == v1::PodSandboxState::SandboxReady) == ready)
                && selected(&filter.label_selector, |key| record.labels.get(key))
        };
        self.rooms.state.sandboxes().into_iter().filter(wanted).collect()
    }

    fn found(&self, filter: Option<v1::ContainerFilter>) -> Vec<Arc<Container>> {
        let filter = filter.unwrap_or_default();
        let wanted = |container: &Arc<Container>| {
            let record = container.record();
            let state = match container.run_state() {
                RunState::Created => v1::ContainerState::ContainerCreated,
                RunState::Running { .. } => v1::ContainerState::ContainerRunning,
                RunState::Exited(_) => v1::ContainerState::ContainerExited,
            };
            (filter.id.is_empty() || record.id.as_str().starts_with(&filter.id))
                && (filter.pod_sandbox_id.is_empty()
                    || record.sandbox.as_str().starts_with(&filter.pod_sandbox_id))
                && filter.state.is_none_or(|s| s.state() == state)
                && selected(&filter.label_selector, |key| record.labels.get(key))
        };
        self.rooms.state.containers().into_iter().filter(wanted).collect()
    }

    fn pod_items(&self, filter: Option<v1::PodSandboxFilter>) -> Vec<v1::PodSandbox> {
        self.pods(filter).iter().map(|s| status::sandbox_item(s)).collect()
    }

    fn container_items(&self, filter: Option<v1::ContainerFilter>) -> Vec<v1::Container> {
        self.found(filter).iter().map(|c| status::container_item(c)).collect()
    }

    async fn container_figures(
        &self,
        filter: Option<v1::ContainerStatsFilter>,
    ) -> Result<Vec<v1::ContainerStats>> {
        let filter = filter.unwrap_or_default();
        let wanted = v1::ContainerFilter {
            id: filter.id,
            state: None,
            pod_sandbox_id: filter.pod_sandbox_id,
            label_selector: filter.label_selector,
        };
        let mut all = Vec::new();
        for container in self.found(Some(wanted)) {
            if matches!(container.run_state(), RunState::Running { .. }) {
                all.push(stats::container(&self.rooms, &container).await?);
            }
        }
        Ok(all)
    }

    async fn pod_figures(
        &self,
        filter: Option<v1::PodSandboxStatsFilter>,
    ) -> Result<Vec<v1::PodSandboxStats>> {
        let filter = filter.unwrap_or_default();
        let wanted =
            v1::PodSandboxFilter { id: filter.id, state: None, label_selector: filter.label_selector };
        let mut all = Vec::new();
        for sandbox in self.pods(Some(wanted)) {
            if sandbox.phase() == SandboxPhase::Ready {
                all.push(stats::sandbox(&self.rooms, &sandbox).await?);
            }
        }
        Ok(all)
    }
}

fn not_supported<T>(what: &str) -> Answer<T> {
    Err(Error::Refused(what.to_owned()).into())
}

#[tonic::async_trait]
impl RuntimeService for Service {
    async fn version(&self, _: Request<v1::VersionRequest>) -> Answer<v1::VersionResponse> {
        Ok(Response::new(v1::VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "moxlet".into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            runtime_api_version: "v1".into(),
        }))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<v1::RunPodSandboxRequest>,
    ) -> Answer<v1::RunPodSandboxResponse> {
        let request = request.into_inner();
        let config = request.config.ok_or_else(|| Status::invalid_argument("the sandbox has no config"))?;
        let id = self.rooms.pods.run(config, &request.runtime_handler).await?;
        Ok(Response::new(v1::RunPodSandboxResponse { pod_sandbox_id: id.to_string() }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<v1::StopPodSandboxRequest>,
    ) -> Answer<v1::StopPodSandboxResponse> {
        self.rooms.pods.stop(&request.into_inner().pod_sandbox_id).await?;
        Ok(Response::new(v1::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<v1::RemovePodSandboxRequest>,
    ) -> Answer<v1::RemovePodSandboxResponse> {
        self.rooms.pods.remove(&request.into_inner().pod_sandbox_id).await?;
        Ok(Response::new(v1::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<v1::PodSandboxStatusRequest>,
    ) -> Answer<v1::PodSandboxStatusResponse> {
        let request = request.into_inner();
        let sandbox = self.rooms.state.sandbox(&request.pod_sandbox_id)?;
        let info = if request.verbose { info::sandbox(&self.rooms, &sandbox).await? } else { HashMap::new() };
        Ok(Response::new(v1::PodSandboxStatusResponse {
            info,
            status: Some(status::sandbox(&sandbox)),
            containers_statuses: self
                .rooms
                .state
                .containers_of(&sandbox.id)
                .iter()
                .map(|c| status::container(c))
                .collect(),
            timestamp: now_ns(),
        }))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<v1::ListPodSandboxRequest>,
    ) -> Answer<v1::ListPodSandboxResponse> {
        Ok(Response::new(v1::ListPodSandboxResponse { items: self.pod_items(request.into_inner().filter) }))
    }

    type StreamPodSandboxesStream = Parts<v1::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<v1::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let items = self.pod_items(request.into_inner().filter);
        Ok(in_chunks(items, |pod_sandboxes| v1::StreamPodSandboxesResponse { pod_sandboxes }))
    }

    async fn create_container(
        &self,
        request: Request<v1::CreateContainerRequest>,
    ) -> Answer<v1::CreateContainerResponse> {
        let id = self.rooms.containers.create(request.into_inner()).await?;
        Ok(Response::new(v1::CreateContainerResponse { container_id: id.to_string() }))
    }

    async fn start_container(
        &self,
        request: Request<v1::StartContainerRequest>,
    ) -> Answer<v1::StartContainerResponse> {
        self.rooms.containers.start(&request.into_inner().container_id).await?;
        Ok(Response::new(v1::StartContainerResponse {}))
    }

    async fn stop_container(
        &self,
        request: Request<v1::StopContainerRequest>,
    ) -> Answer<v1::StopContainerResponse> {
        let request = request.into_inner();
        self.rooms.containers.stop(&request.container_id, request.timeout).await?;
        Ok(Response::new(v1::StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Answer<v1::RemoveContainerResponse> {
        self.rooms.containers.remove(&request.into_inner().container_id).await?;
        Ok(Response::new(v1::RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        request: Request<v1::ListContainersRequest>,
    ) -> Answer<v1::ListContainersResponse> {
        Ok(Response::new(v1::ListContainersResponse {
            containers: self.container_items(request.into_inner().filter),
        }))
    }

    type StreamContainersStream = Parts<v1::StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<v1::StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        let items = self.container_items(request.into_inner().filter);
        Ok(in_chunks(items, |containers| v1::StreamContainersResponse { containers }))
    }

    async fn container_status(
        &self,
        request: Request<v1::ContainerStatusRequest>,
    ) -> Answer<v1::ContainerStatusResponse> {
        let request = request.into_inner();
        let container = self.rooms.state.container(&request.container_id)?;
        let info = if request.verbose {
            let (rooms, container) = (self.rooms.clone(), container.clone());
            blocking(move || info::container(&rooms, &container)).await?
        } else {
            HashMap::new()
        };
        Ok(Response::new(v1::ContainerStatusResponse { status: Some(status::container(&container)), info }))
    }

    async fn update_container_resources(
        &self,
        request: Request<v1::UpdateContainerResourcesRequest>,
    ) -> Answer<v1::UpdateContainerResourcesResponse> {
        let request = request.into_inner();
        let asked = request.linux.unwrap_or_default();
        self.rooms.containers.update(&request.container_id, &asked).await?;
        Ok(Response::new(v1::UpdateContainerResourcesResponse {}))
    }

    async fn reopen_container_log(
        &self,
        request: Request<v1::ReopenContainerLogRequest>,
    ) -> Answer<v1::ReopenContainerLogResponse> {
        let container = self.rooms.state.container(&request.into_inner().container_id)?;
        if !matches!(container.run_state(), RunState::Running { .. }) {
            return Err(Error::State(format!("container {} is not running", container.id)).into());
        }
        let client = self.rooms.state.sandbox(container.sandbox.as_str())?.client()?;
        client.reopen_log(container.id.as_str()).await.map_err(Error::from)?;
        Ok(Response::new(v1::ReopenContainerLogResponse {}))
    }

    async fn exec_sync(&self, request: Request<v1::ExecSyncRequest>) -> Answer<v1::ExecSyncResponse> {
        Ok(Response::new(
            streaming::exec_sync(&self.rooms.state, &self.rooms.tasks, request.into_inner()).await?,
        ))
    }

    async fn exec(&self, request: Request<v1::ExecRequest>) -> Answer<v1::ExecResponse> {
        Ok(Response::new(self.streaming.exec(request.into_inner()).await?))
    }

    async fn attach(&self, request: Request<v1::AttachRequest>) -> Answer<v1::AttachResponse> {
        Ok(Response::new(self.streaming.attach(request.into_inner()).await?))
    }

    async fn port_forward(
        &self,
        request: Request<v1::PortForwardRequest>,
    ) -> Answer<v1::PortForwardResponse> {
        Ok(Response::new(self.streaming.port_forward(request.into_inner()).await?))
    }

    async fn container_stats(
        &self,
        request: Request<v1::ContainerStatsRequest>,
    ) -> Answer<v1::ContainerStatsResponse> {
        let container = self.rooms.state.container(&request.into_inner().container_id)?;
        let stats = Some(stats::container(&self.rooms, &container).await?);
        Ok(Response::new(v1::ContainerStatsResponse { stats }))
    }

    async fn list_container_stats(
        &self,
        request: Request<v1::ListContainerStatsRequest>,
    ) -> Answer<v1::ListContainerStatsResponse> {
        let stats = self.container_figures(request.into_inner().filter).await?;
        Ok(Response::new(v1::ListContainerStatsResponse { stats }))
    }

    type StreamContainerStatsStream = Parts<v1::StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<v1::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let stats = self.container_figures(request.into_inner().filter).await?;
        Ok(in_chunks(stats, |container_stats| v1::StreamContainerStatsResponse { container_stats }))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<v1::PodSandboxStatsRequest>,
    ) -> Answer<v1::PodSandboxStatsResponse> {
        let sandbox = self.rooms.state.sandbox(&request.into_inner().pod_sandbox_id)?;
        let stats = Some(stats::sandbox(&self.rooms, &sandbox).await?);
        Ok(Response::new(v1::PodSandboxStatsResponse { stats }))
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<v1::ListPodSandboxStatsRequest>,
    ) -> Answer<v1::ListPodSandboxStatsResponse> {
        let stats = self.pod_figures(request.into_inner().filter).await?;
        Ok(Response::new(v1::ListPodSandboxStatsResponse { stats }))
    }

    type StreamPodSandboxStatsStream = Parts<v1::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<v1::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let stats = self.pod_figures(request.into_inner().filter).await?;
        Ok(in_chunks(stats, |pod_sandbox_stats| v1::StreamPodSandboxStatsResponse { pod_sandbox_stats }))
    }

    async fn update_runtime_config(
        &self,
        request: Request<v1::UpdateRuntimeConfigRequest>,
    ) -> Answer<v1::UpdateRuntimeConfigResponse> {
        let network = request.into_inner().runtime_config.and_then(|c| c.network_config).unwrap_or_default();
        // Two families may be named; a range of the configuration goes before the cluster's.
        let v4 = network.pod_cidr.split(',').map(str::trim).find(|c| c.contains('.'));
        if let (Some(cidr), None) = (v4, &self.rooms.config.pod_cidr) {
            self.rooms.network.set_pod_cidr(cidr).await?;
        }
        Ok(Response::new(v1::UpdateRuntimeConfigResponse {}))
    }

    async fn status(&self, request: Request<v1::StatusRequest>) -> Answer<v1::StatusResponse> {
        let network = self.rooms.network.ready().await.err().map(|e| chain(&e));
        let on_proxmox_ve = matches!(self.rooms.config.engine, EngineSettings::Pve(_));
        let verbose = request.into_inner().verbose;
        Ok(Response::new(v1::StatusResponse {
            info: if verbose { info::runtime(&self.rooms)? } else { HashMap::new() },
            status: Some(v1::RuntimeStatus {
                conditions: conditions(&*self.rooms.engine, on_proxmox_ve, network),
            }),
            runtime_handlers: vec![v1::RuntimeHandler {
                features: Some(v1::RuntimeHandlerFeatures {
                    recursive_read_only_mounts: true,
                    ..v1::RuntimeHandlerFeatures::default()
                }),
                ..v1::RuntimeHandler::default()
            }],
            features: Some(v1::RuntimeFeatures {
                supplemental_groups_policy: true,
                ..v1::RuntimeFeatures::default()
            }),
        }))
    }

    async fn checkpoint_container(
        &self,
        _: Request<v1::CheckpointContainerRequest>,
    ) -> Answer<v1::CheckpointContainerResponse> {
        not_supported("checkpoints of containers")
    }

    type GetContainerEventsStream = Parts<v1::ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _: Request<v1::GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        let events = BroadcastStream::new(self.rooms.events.subscribe()).map(|event| {
            event.map_err(|BroadcastStreamRecvError::Lagged(lost)| {
                Status::data_loss(format!("{lost} events were not taken in time; list again"))
            })
        });
        // After a loss the listener has to begin anew.
        let mut broken = false;
        let events = events.take_while(move |event| {
            let go_on = !broken;
            broken |= event.is_err();
            futures::future::ready(go_on)
        });
        let stop = self.rooms.tasks.stop.clone();
        Ok(Response::new(Box::pin(events.take_until(async move { stop.cancelled().await }))))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<v1::ListMetricDescriptorsRequest>,
    ) -> Answer<v1::ListMetricDescriptorsResponse> {
        not_supported("metrics by CRI: the node serves them from the stats")
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<v1::ListPodSandboxMetricsRequest>,
    ) -> Answer<v1::ListPodSandboxMetricsResponse> {
        not_supported("metrics by CRI: the node serves them from the stats")
    }

    type StreamPodSandboxMetricsStream = Parts<v1::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<v1::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        not_supported("metrics by CRI: the node serves them from the stats")
    }

    async fn runtime_config(
        &self,
        _: Request<v1::RuntimeConfigRequest>,
    ) -> Answer<v1::RuntimeConfigResponse> {
        Ok(Response::new(v1::RuntimeConfigResponse {
            linux: Some(v1::LinuxRuntimeConfiguration { cgroup_driver: v1::CgroupDriver::Cgroupfs as i32 }),
        }))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<v1::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<v1::UpdatePodSandboxResourcesResponse> {
        let request = request.into_inner();
        let sandbox = self.rooms.state.sandbox(&request.pod_sandbox_id)?;
        let limits = limits::of_sandbox(request.resources.as_ref(), request.overhead.as_ref());
        let (cgroups, id) = (self.rooms.cgroups.clone(), sandbox.id.clone());
        self.rooms.engine.resize(&id, &limits).await.map_err(Error::from)?;
        blocking(move || Ok(cgroups.update(&id, None, &limits)?)).await?;
        Ok(Response::new(v1::UpdatePodSandboxResourcesResponse {}))
    }
}
