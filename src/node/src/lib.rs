//! A kubelet for a cluster of hosts: registration, pod workers, status, kubelet API.
//!
//! | task | takes in | gives out |
//! |---|---|---|
//! | [`identity`] | kubeconfigs | the client of the API server, certificates |
//! | `register` | the agent's facts and health, the Node as it is shown | the Node, facts for everybody (watch channel), the pod CIDR for the agent |
//! | `membership` | | the Lease, every 10 s; whether this process may act for the Node (watch channel) |
//! | `objects` | the pods' ConfigMaps and Secrets, a watch each | copies for workers, updates (mpsc) |
//! | `env::services` | Services | variables of service links |
//! | `pods::source`, `static_pods::files` | the API server's pods, manifests | updates (mpsc) |
//! | `static_pods::mirror` | static pods, the API server's copies of them | those copies, where their status goes |
//! | `pods::manager` | updates, the agent's events | one worker a pod, told by a watch channel |
//! | `pods::worker` | what a pod shall be, what the agent reports | CRI calls, status, the published copy |
//! | `status` | a pod's status as it should stand, as it is shown | patches until they agree |
//! | `image_gc` | the policy | removals on the agent every 5 min, events where they do not help |
//! | `notices` | what the agent saw done to CTs | events of the pods |
//! | `events` | events (mpsc) | Event objects |
//! | [`api`] | the published copy | HTTPS on port 10250 |
//!
//! They start in this order and all end with one cancellation; pods keep running.

pub mod api;
mod cluster;
mod config;
mod cri_client;
mod env;
mod error;
mod events;
pub mod identity;
mod image_gc;
mod instance;
mod membership;
pub mod metrics;
mod model;
mod notices;
mod objects;
pub mod pods;
mod pressure;
mod register;
mod relist;
mod static_pods;
mod status;
mod support;
mod volumes;

use std::{sync::Arc, time::Duration};

use kube::Client;
use moxlet_cri::{
    host,
    link::{Connector, Endpoint},
};
use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use config::{Config, ImageGc};
pub use error::{Error, Result, chain};
pub use pressure::{PressureThresholds, Threshold};

use crate::{
    cluster::{Cluster, KubeCluster, NoCluster},
    cri_client::{Agent, Runtime},
    env::services::Services,
    events::{Kind, Recorder},
    objects::Objects,
    pods::{
        manager::Manager,
        registry::PodRegistry,
        updates::{Source, Update},
        worker::Shared,
    },
    static_pods::mirror,
};

/// Updates of pods that wait for the manager.
const UPDATES: usize = 1024;

/// Waits for the agent's first word; each reason why there is none is told once in a row.
async fn first_info(agent: &dyn Runtime, stop: &CancellationToken) -> Option<host::InfoResponse> {
    let mut pause = Duration::from_millis(50);
    let mut told = String::new();
    loop {
        let answer = tokio::select! {
            () = stop.cancelled() => return None,
            answer = agent.info(host::InfoRequest {}) => answer,
        };
        match answer {
            Ok(info) => return Some(info),
            Err(error) => {
                let error = chain(&error);
                if error != told {
                    warn!(error, "the agent does not answer yet");
                    told = error;
                }
            }
        }
        tokio::select! {
            () = stop.cancelled() => return None,
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_secs(5)),
        }
    }
}

/// The way to the agent, and its first word; none if the node is stopped before. Settles the node's address.
async fn meet_agent(
    config: &mut Config,
    stop: &CancellationToken,
) -> Result<Option<(Connector, Agent, host::InfoResponse)>> {
    let (endpoint, files) = (config.agent_endpoint.clone(), config.link_files.clone());
    let connector = tokio::task::spawn_blocking(move || Connector::new(endpoint, files)).await;
    let connector =
        connector.map_err(|e| Error::Certificate { what: "read certificates", reason: e.to_string() })??;
    let agent = Agent::new(connector.clone());
    let Some(info) = first_info(&agent, stop).await else { return Ok(None) };
    if config.node_ip.is_none() && matches!(config.agent_endpoint, Endpoint::Tls { .. }) {
        // The agent's own addresses are of its host, where nobody serves logs and exec.
        let address = tokio::select! {
            () = stop.cancelled() => return Ok(None),
            address = connector.local_address() => address,
        };
        let reason = || {
            format!(
                "the address of this machine is not known by the way to {}: set it",
                config.agent_endpoint
            )
        };
        config.node_ip = Some(address.ok_or_else(|| Error::Config { key: "node_ip", reason: reason() })?);
    }
    Ok(Some((connector, agent, info)))
}

/// Runs the node until the token is cancelled. Pods keep running.
///
/// # Errors
/// When the configuration, the identity, the agent's endpoint or the API's address cannot be used.
pub async fn run(mut config: Config, stop: CancellationToken) -> Result<()> {
    for text in &config.register_taints {
        register::taint(text)?;
    }
    metrics::install();
    let bound = api::bind(&config).await?;
    let instance = Arc::new(instance::Instance::take(&config.state_dir)?);
    let Some((connector, agent, info)) = meet_agent(&mut config, &stop).await? else { return Ok(()) };
    let channel = agent.channel();
    let agent: Arc<dyn Runtime> = Arc::new(agent);
    let identity = tokio::select! {
        () = stop.cancelled() => return Ok(()),
        identity = identity::establish(&config, &stop) => identity?,
    };
    let client = identity.client();
    identity.set_serving_names(serving_names(&config, &info));

    let mut tasks = Tasks::new(&stop);
    let token = tasks.token.clone();
    let host = info.hostname.clone();
    let (info_sender, info) = watch::channel(Arc::new(info));
    let (admitted, is_admitted) = watch::channel(false);
    let (uid_sender, node_uid) = watch::channel(None);
    if let Some(client) = client.clone() {
        let (node, any_identity) = (config.node_name.clone(), config.allow_any_identity);
        let membership = membership::Membership { client, node, host, instance, any_identity, admitted };
        tasks.all.spawn(membership.run(token.clone()));
    }
    let (recorder, write_events) = Recorder::new(client.clone(), config.node_name.clone(), token.clone());
    tasks.spawn(write_events);
    let registrar = register::Registrar {
        config: config.clone(),
        agent: agent.clone(),
        client: client.clone(),
        info: info_sender,
        admitted: is_admitted.clone(),
        node_uid: uid_sender,
    };
    tasks.spawn(registrar.run(token.clone()));
    let registry = PodRegistry::default();
    watch_the_host(&config, &agent, &recorder, &registry, &mut tasks);
    let (updates, queue) = mpsc::channel(UPDATES);
    let objects = client.clone().map(|client| Objects::new(client, updates.clone()));
    let (cluster, services) = cluster_of(client.as_ref().zip(objects.clone()), &mut tasks);
    let shared = Arc::new(Shared {
        slots: Semaphore::new(config.max_parallel_syncs.max(1)),
        admission: pods::admission::Admission::default(),
        agent,
        cluster,
        services,
        registry: registry.clone(),
        events: recorder.clone(),
        info,
        config: config.clone(),
    });
    if client.is_some() {
        let node = events::node_reference(&config.node_name);
        recorder.emit(node, Kind::Normal, "Starting", "Starting moxlet.");
    }
    let mirrors = mirrors(&shared, node_uid, &updates, &mut tasks);
    let sources = sources(&config, client.zip(objects), is_admitted, &updates, mirrors, &mut tasks);
    let manager = Manager::new(shared, sources, token.clone());
    tasks.spawn(async move {
        manager.run(queue).await;
        // The senders' last owner must outlive the manager's loop.
        drop(updates);
    });
    let context = api::ApiContext { config, identity, registry, agent: channel, connector };
    tasks.all.spawn(api::serve(bound, context, token));
    tasks.joined().await
}

/// What the certificate of the kubelet API is for.
fn serving_names(config: &Config, info: &host::InfoResponse) -> identity::ServingNames {
    let ips = match config.node_ip {
        Some(ip) => vec![ip],
        None => info.addresses.iter().take(1).filter_map(|a| a.parse().ok()).collect(),
    };
    identity::ServingNames { dns: vec![config.node_name.clone()], ips }
}

/// Images are collected, and what is done to CTs on the host is told.
fn watch_the_host(
    config: &Config,
    agent: &Arc<dyn Runtime>,
    recorder: &Recorder,
    registry: &PodRegistry,
    tasks: &mut Tasks,
) {
    let (events, node, token) = (recorder.clone(), config.node_name.clone(), tasks.token.clone());
    tasks.spawn(image_gc::run(agent.clone(), events, node, config.image_gc.clone(), token.clone()));
    let teller = notices::Teller {
        agent: agent.clone(),
        registry: registry.clone(),
        events: recorder.clone(),
        node: config.node_name.clone(),
        pauses: notices::Pauses::default(),
    };
    tasks.spawn(teller.run(token));
}

/// What pods need of the API server beside themselves.
fn cluster_of(client: Option<(&Client, Objects)>, tasks: &mut Tasks) -> (Arc<dyn Cluster>, Services) {
    let Some((client, objects)) = client else { return (Arc::new(NoCluster), Services::none()) };
    let (services, watching) = Services::watch(client.clone(), tasks.token.clone());
    tasks.spawn(watching);
    (Arc::new(KubeCluster(client.clone(), objects)), services)
}

/// Starts the keeper of mirror pods.
fn mirrors(
    shared: &Arc<Shared>,
    node_uid: watch::Receiver<Option<String>>,
    updates: &mpsc::Sender<Update>,
    tasks: &mut Tasks,
) -> mpsc::Sender<mirror::Input> {
    let (mirrors, inputs) = mpsc::channel(UPDATES);
    let keeper = mirror::Mirrors {
        cluster: shared.cluster.clone(),
        node: shared.config.node_name.clone(),
        node_uid,
        events: shared.events.clone(),
        updates: updates.clone(),
    };
    let token = tasks.token.clone();
    tasks.spawn(keeper.run(inputs, token));
    mirrors
}

/// Starts what brings pods: the API server, a folder, or both.
fn sources(
    config: &Config,
    client: Option<(Client, Objects)>,
    mut admitted: watch::Receiver<bool>,
    updates: &mpsc::Sender<Update>,
    mirrors: mpsc::Sender<mirror::Input>,
    tasks: &mut Tasks,
) -> Vec<Source> {
    let (node, token) = (&config.node_name, tasks.token.clone());
    let mut sources = Vec::new();
    if let Some((client, objects)) = client {
        sources.push(Source::Api);
        let (node, updates, mirrors) = (node.clone(), updates.clone(), mirrors.clone());
        let watch = pods::source::watch(client, node, updates, mirrors, objects, token.clone());
        let stop = token.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => return,
                // An error means that the node ends.
                yes = admitted.wait_for(|yes| *yes) => if yes.is_err() { return },
            }
            watch.await;
        });
    } else {
        info!("no kubeconfig: static pods only");
    }
    if let Some(folder) = config.static_pod_dir.clone() {
        sources.push(Source::Files);
        let files = static_pods::files::watch(folder, node.clone(), updates.clone(), mirrors, token);
        tasks.spawn(files);
    } else {
        // Without a folder of manifests every mirror pod is left over.
        let _ = mirrors.try_send(mirror::Input::Static(Vec::new()));
    }
    sources
}

/// The node's tasks. All end with one token, also when one fails.
struct Tasks {
    all: JoinSet<Result<()>>,
    token: CancellationToken,
}

impl Tasks {
    fn new(stop: &CancellationToken) -> Self {
        Self { all: JoinSet::new(), token: stop.child_token() }
    }

    /// One that cannot fail.
    fn spawn(&mut self, work: impl Future<Output = ()> + Send + 'static) {
        self.all.spawn(async move {
            work.await;
            Ok(())
        });
    }

    /// Waits for all; the first error.
    async fn joined(mut self) -> Result<()> {
        let mut outcome = Ok(());
        while let Some(done) = self.all.join_next().await {
            match done {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    if outcome.is_ok() {
                        outcome = Err(error);
                    }
                    self.token.cancel();
                }
                Err(error) => {
                    warn!(%error, "a task of the node failed");
                    self.token.cancel();
                }
            }
        }
        outcome
    }
}
