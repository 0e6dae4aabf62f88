//! A pod as the agent reports it: sandboxes and containers, newest first. Nothing of it is remembered elsewhere.

use moxlet_cri::v1;

use crate::model::names;
use crate::{
    cri_client::Runtime,
    error::{Error, Result},
};

/// State of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Made, never started.
    Created,
    /// Its process runs.
    Running,
    /// Its process has ended.
    Exited,
    /// The agent cannot tell.
    Unknown,
}

/// One container, of any attempt.
#[derive(Clone, Debug)]
pub(crate) struct Container {
    /// CRI id.
    pub(crate) id: String,
    /// Its name in the pod.
    pub(crate) name: String,
    /// How many were before it.
    pub(crate) attempt: u32,
    /// CRI id of its sandbox.
    pub(crate) sandbox: String,
    /// Its state.
    pub(crate) phase: Phase,
    /// UNIX times in nanoseconds; 0: not yet.
    pub(crate) created_at: i64,
    /// When it was started.
    pub(crate) started_at: i64,
    /// When it ended.
    pub(crate) finished_at: i64,
    /// Its exit code.
    pub(crate) exit_code: i32,
    /// Why it ended: Completed, Error, OOMKilled, StartError.
    pub(crate) reason: String,
    /// More about that.
    pub(crate) message: String,
    /// The image as asked for.
    pub(crate) image: String,
    /// The image as run.
    pub(crate) image_ref: String,
}

/// One sandbox, of any attempt.
#[derive(Clone, Debug)]
pub(crate) struct Sandbox {
    /// CRI id.
    pub(crate) id: String,
    /// How many were before it.
    pub(crate) attempt: u32,
    /// Whether it runs.
    pub(crate) ready: bool,
    /// UNIX time in nanoseconds.
    pub(crate) created_at: i64,
    /// Its addresses.
    pub(crate) ips: Vec<String>,
}

/// All of a pod that is on the agent.
#[derive(Clone, Debug, Default)]
pub(crate) struct PodState {
    /// Newest first.
    pub(crate) sandboxes: Vec<Sandbox>,
    /// Newest first.
    pub(crate) containers: Vec<Container>,
}

impl PodState {
    /// The newest sandbox.
    pub(crate) fn sandbox(&self) -> Option<&Sandbox> {
        self.sandboxes.first()
    }

    /// All containers of that name, newest first.
    pub(crate) fn history<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Container> {
        self.containers.iter().filter(move |c| c.name == name)
    }

    /// The newest container of that name.
    pub(crate) fn newest(&self, name: &str) -> Option<&Container> {
        self.containers.iter().find(|c| c.name == name)
    }

    /// Brings sandboxes and containers into their order.
    pub(crate) fn sort(&mut self) {
        self.sandboxes.sort_by_key(|s| std::cmp::Reverse((s.attempt, s.created_at)));
        self.containers.sort_by_key(|c| std::cmp::Reverse((c.attempt, c.created_at)));
    }

    /// Asks the agent.
    pub(crate) async fn read(agent: &dyn Runtime, uid: &str) -> Result<Self> {
        let sandboxes = agent.list_pod_sandbox(v1::ListPodSandboxRequest {
            filter: Some(v1::PodSandboxFilter { label_selector: names::selector(uid), ..Default::default() }),
        });
        let containers = agent.list_containers(v1::ListContainersRequest {
            filter: Some(v1::ContainerFilter { label_selector: names::selector(uid), ..Default::default() }),
        });
        let (sandboxes, containers) = futures::try_join!(sandboxes, containers)?;
        let sandboxes = futures::future::try_join_all(sandboxes.items.into_iter().map(|s| sandbox(agent, s)));
        let containers =
            futures::future::try_join_all(containers.containers.into_iter().map(|c| container(agent, c)));
        let (sandboxes, containers) = futures::try_join!(sandboxes, containers)?;
        let mut state = Self {
            sandboxes: sandboxes.into_iter().flatten().collect(),
            containers: containers.into_iter().flatten().collect(),
        };
        state.sort();
        Ok(state)
    }
}

/// Something that went away between list and look is no error.
fn found<T>(answer: Result<T>) -> Result<Option<T>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(e) if e.code() == Some(tonic::Code::NotFound) => Ok(None),
        Err(e) => Err(e),
    }
}

async fn sandbox(agent: &dyn Runtime, listed: v1::PodSandbox) -> Result<Option<Sandbox>> {
    let request = v1::PodSandboxStatusRequest { pod_sandbox_id: listed.id.clone(), verbose: false };
    let Some(answer) = found(agent.pod_sandbox_status(request).await)? else { return Ok(None) };
    let status =
        answer.status.ok_or(Error::AgentAnswer { call: "PodSandboxStatus", what: "the sandbox's status" })?;
    Ok(Some(Sandbox {
        attempt: status.metadata.as_ref().map_or(0, |m| m.attempt),
        ready: status.state == v1::PodSandboxState::SandboxReady as i32,
        created_at: status.created_at,
        ips: status
            .network
            .into_iter()
            .flat_map(|n| std::iter::once(n.ip).chain(n.additional_ips.into_iter().map(|i| i.ip)))
            .filter(|ip| !ip.is_empty())
            .collect(),
        id: listed.id,
    }))
}

async fn container(agent: &dyn Runtime, listed: v1::Container) -> Result<Option<Container>> {
    let request = v1::ContainerStatusRequest { container_id: listed.id.clone(), verbose: false };
    let Some(answer) = found(agent.container_status(request).await)? else { return Ok(None) };
    let status = answer
        .status
        .ok_or(Error::AgentAnswer { call: "ContainerStatus", what: "the container's status" })?;
    let metadata = status.metadata.unwrap_or_default();
    Ok(Some(Container {
        id: listed.id,
        name: metadata.name,
        attempt: metadata.attempt,
        sandbox: listed.pod_sandbox_id,
        phase: match v1::ContainerState::try_from(status.state) {
            Ok(v1::ContainerState::ContainerCreated) => Phase::Created,
            Ok(v1::ContainerState::ContainerRunning) => Phase::Running,
            Ok(v1::ContainerState::ContainerExited) => Phase::Exited,
            _ => Phase::Unknown,
        },
        created_at: status.created_at,
        started_at: status.started_at,
        finished_at: status.finished_at,
        exit_code: status.exit_code,
        reason: status.reason,
        message: status.message,
        image: status
            .image
            .map(|i| if i.user_specified_image.is_empty() { i.image } else { i.user_specified_image })
            .unwrap_or_default(),
        image_ref: status.image_ref,
    }))
}
