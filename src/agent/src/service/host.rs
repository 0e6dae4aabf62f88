//! `moxlet.host.v1`: what a node asks that CRI has no word for.

use std::{collections::BTreeSet, fs, io::Read, path::Path};

use futures::StreamExt;
use moxlet_cri::host::{self, host_service_server::HostService};
use moxlet_ids::PodUid;
use tokio_stream::wrappers::BroadcastStream;
use tonic::{Request, Response, Status};

use super::{Parts, Service};
use crate::{
    beneath,
    error::{Error, Result},
    facts, logs,
    tasks::blocking,
};

type Answer<T> = std::result::Result<Response<T>, Status>;

/// Bytes of a termination message that are kept, as in the kubelet.
const MAX_MESSAGE: u64 = 4096;

/// The pods that have a log directory, which are named `<namespace>_<name>_<uid>` as the kubelet does it.
fn pods_with_logs(dir: &Path) -> BTreeSet<PodUid> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.rsplit('_').next()?.parse().ok()).collect()
}

/// Removes a pod's log directory. What containers wrote in it is not followed.
fn remove_logs(dir: &Path, uid: &PodUid) -> Result<()> {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if name.to_str().and_then(|n| n.rsplit('_').next()) == Some(uid.as_str()) {
            moxlet_storage::remove_tree(&entry.path(), dir)?;
        }
    }
    Ok(())
}

#[tonic::async_trait]
impl HostService for Service {
    async fn info(&self, _: Request<host::InfoRequest>) -> Answer<host::InfoResponse> {
        let config = self.rooms.config.clone();
        let facts =
            blocking(move || Ok(facts::read(&config.root_dir, config.resolv_conf.as_deref()))).await?;
        Ok(Response::new(host::InfoResponse {
            pod_logs_dir: self.rooms.dirs.logs.display().to_string(),
            stream_endpoint: self.streaming.endpoint(),
            sandbox_overhead_memory_bytes: self.rooms.config.sandbox_overhead_memory_bytes,
            memory_reserved_bytes: self.rooms.config.reserved_memory(facts.memory_bytes),
            ..facts
        }))
    }

    async fn apply_volume(
        &self,
        request: Request<host::ApplyVolumeRequest>,
    ) -> Answer<host::ApplyVolumeResponse> {
        let (volumes, request) = (self.rooms.volumes.clone(), request.into_inner());
        let path = blocking(move || volumes.apply(&request)).await?;
        Ok(Response::new(host::ApplyVolumeResponse { host_path: path.display().to_string() }))
    }

    async fn remove_pod_volumes(
        &self,
        request: Request<host::RemovePodVolumesRequest>,
    ) -> Answer<host::RemovePodVolumesResponse> {
        let uid: PodUid = request.into_inner().pod_uid.parse().map_err(Error::from)?;
        if let Some(sandbox) = self.rooms.state.sandboxes().iter().find(|s| s.record().uid == uid) {
            return Err(Error::State(format!("pod {uid} still has sandbox {}", sandbox.id)).into());
        }
        let (volumes, logs) = (self.rooms.volumes.clone(), self.rooms.dirs.logs.clone());
        blocking(move || {
            volumes.remove_pod(&uid)?;
            remove_logs(&logs, &uid)
        })
        .await?;
        Ok(Response::new(host::RemovePodVolumesResponse {}))
    }

    async fn list_pods(&self, _: Request<host::ListPodsRequest>) -> Answer<host::ListPodsResponse> {
        let (volumes, logs) = (self.rooms.volumes.clone(), self.rooms.dirs.logs.clone());
        let pods = blocking(move || {
            let mut pods = volumes.pods()?;
            pods.extend(pods_with_logs(&logs));
            Ok(pods)
        })
        .await?;
        Ok(Response::new(host::ListPodsResponse { pod_uids: pods.iter().map(ToString::to_string).collect() }))
    }

    type StreamLogsStream = Parts<host::LogChunk>;

    async fn stream_logs(&self, request: Request<host::StreamLogsRequest>) -> Answer<Self::StreamLogsStream> {
        let chunks = logs::stream(
            self.rooms.state.clone(),
            &self.rooms.tasks,
            &self.rooms.dirs.logs,
            request.into_inner(),
        )?;
        Ok(Response::new(Box::pin(chunks)))
    }

    type StreamNoticesStream = Parts<host::Notice>;

    async fn stream_notices(
        &self,
        request: Request<host::StreamNoticesRequest>,
    ) -> Answer<Self::StreamNoticesStream> {
        let (late, next) = self.rooms.notices.since(request.into_inner().since_ns);
        // A reader that is too slow loses some: they are for people, the states are in the pods' statuses.
        let next = BroadcastStream::new(next).filter_map(|notice| std::future::ready(notice.ok()));
        let all = futures::stream::iter(late)
            .chain(next)
            .take_until(self.rooms.tasks.stop.clone().cancelled_owned());
        Ok(Response::new(Box::pin(all.map(Ok))))
    }

    async fn termination_message(
        &self,
        request: Request<host::TerminationMessageRequest>,
    ) -> Answer<host::TerminationMessageResponse> {
        let container = self.rooms.state.container(&request.into_inner().container_id)?;
        let dir = self.rooms.dirs.pod(&container.sandbox).join("term");
        let id = container.id.clone();
        let data = blocking(move || {
            let Ok(dir) = beneath::open_dir(&dir) else { return Ok(Vec::new()) };
            let Ok(file) = beneath::open_file(&dir, Path::new(id.as_str())) else { return Ok(Vec::new()) };
            let mut data = Vec::new();
            file.take(MAX_MESSAGE)
                .read_to_end(&mut data)
                .map_err(|e| Error::io(format!("cannot read the termination message of {id}"), e))?;
            Ok(data)
        })
        .await?;
        Ok(Response::new(host::TerminationMessageResponse { data }))
    }
}
