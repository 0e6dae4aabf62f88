//! A kubelet for a cluster of hosts: registration, pod workers, status, kubelet API.
//!
//! | task | takes in | gives out |
//! |---|---|---|
//! | [`identity`] | kubeconfigs | the client of the API server, certificates |
//! | `register` | the agent's facts and health | the Node, facts for everybody (watch channel), the pod CIDR for the agent |
//! | `lease` | | the Lease, every 10 s |
//! | `env::services` | Services | variables of service links |
//! | `pods::source`, `static_pods` | the API server's pods, manifests | updates (mpsc) |
//! | `pods::manager` | updates, the agent's events | one worker a pod, told by a watch channel |
//! | `pods::worker` | what a pod shall be, what the agent reports | CRI calls, status, the published copy |
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
mod lease;
pub mod metrics;
mod notices;
pub mod pods;
mod pressure;
mod register;
mod static_pods;
mod support;
mod volumes;

use std::{sync::Arc, time::Duration};

use moxlet_cri::host;
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
    pods::{
        manager::{Manager, Source},
        registry::PodRegistry,
        worker::Shared,
    },
};

/// Updates of pods that wait for the manager.
const UPDATES: usize = 1024;

/// Waits for the agent's first word.
async fn first_info(agent: &dyn Runtime, stop: &CancellationToken) -> Option<host::InfoResponse> {
    let mut pause = Duration::from_millis(50);
    loop {
        tokio::select! {
            () = stop.cancelled() => return None,
            answer = agent.info(host::InfoRequest {}) => match answer {
                Ok(info) => return Some(info),
                Err(error) => warn!(error = %chain(&error), "the agent does not answer yet"),
            },
        }
        tokio::select! {
            () = stop.cancelled() => return None,
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_secs(5)),
        }
    }
}

/// Runs the node until the token is cancelled. Pods keep running.
///
/// # Errors
/// When the configuration, the identity, the agent's endpoint or the API's address cannot be used.
pub async fn run(config: Config, stop: CancellationToken) -> Result<()> {
    for text in &config.register_taints {
        register::taint(text)?;
    }
    metrics::install();
    let bound = api::bind(&config).await?;
    let agent = Agent::new(&config.agent_endpoint)?;
    let channel = agent.channel();
    let agent: Arc<dyn Runtime> = Arc::new(agent);
    let Some(info) = first_info(agent.as_ref(), &stop).await else { return Ok(()) };
    let identity = tokio::select! {
        () = stop.cancelled() => return Ok(()),
        identity = identity::establish(&config, &stop) => identity?,
    };
    let client = identity.client();
    let ips = match config.node_ip {
        Some(ip) => vec![ip],
        None => info.addresses.iter().take(1).filter_map(|a| a.parse().ok()).collect(),
    };
    identity.set_serving_names(identity::ServingNames { dns: vec![config.node_name.clone()], ips });

    // Everything below ends with this token, also when one task fails.
    let token = stop.child_token();
    let mut tasks: JoinSet<Result<()>> = JoinSet::new();
    let (info_sender, info) = watch::channel(Arc::new(info));
    let (recorder, write_events) = Recorder::new(client.clone(), config.node_name.clone(), token.clone());
    tasks.spawn(async move {
        write_events.await;
        Ok(())
    });
    let registrar = register::Registrar {
        config: config.clone(),
        agent: agent.clone(),
        client: client.clone(),
        info: info_sender,
    };
    let child = token.clone();
    tasks.spawn(async move {
        registrar.run(child).await;
        Ok(())
    });
    let collecting = image_gc::run(
        agent.clone(),
        recorder.clone(),
        config.node_name.clone(),
        config.image_gc.clone(),
        token.clone(),
    );
    tasks.spawn(async move {
        collecting.await;
        Ok(())
    });
    let cluster: Arc<dyn Cluster> = match &client {
        Some(client) => Arc::new(KubeCluster(client.clone())),
        None => Arc::new(NoCluster),
    };
    let services = match &client {
        Some(client) => {
            let (services, watching) = Services::watch(client.clone(), token.clone());
            tasks.spawn(async move {
                watching.await;
                Ok(())
            });
            services
        }
        None => Services::none(),
    };
    let registry = PodRegistry::default();
    let telling = notices::Teller {
        agent: agent.clone(),
        registry: registry.clone(),
        events: recorder.clone(),
        node: config.node_name.clone(),
        pauses: notices::Pauses::default(),
    }
    .run(token.clone());
    tasks.spawn(async move {
        telling.await;
        Ok(())
    });
    let shared = Arc::new(Shared {
        slots: Semaphore::new(config.max_parallel_syncs.max(1)),
        agent,
        cluster,
        services,
        registry: registry.clone(),
        events: recorder.clone(),
        info,
        config: config.clone(),
    });
    let (updates, queue) = mpsc::channel(UPDATES);
    let mut sources = Vec::new();
    if let Some(client) = &client {
        sources.push(Source::Api);
        let (client, node) = (client.clone(), config.node_name.clone());
        let (sender, child) = (updates.clone(), token.clone());
        let leases = lease::run(client.clone(), node.clone(), token.clone());
        tasks.spawn(async move {
            leases.await;
            Ok(())
        });
        tasks.spawn(async move {
            pods::source::watch(client, node, sender, child).await;
            Ok(())
        });
        recorder.say(events::node_reference(&config.node_name), Kind::Normal, "Starting", "Starting moxlet.");
    } else {
        info!("no kubeconfig: static pods only");
    }
    if let Some(folder) = config.static_pod_dir.clone() {
        sources.push(Source::Files);
        let (node, sender, child) = (config.node_name.clone(), updates.clone(), token.clone());
        tasks.spawn(async move {
            static_pods::watch(folder, node, sender, child).await;
            Ok(())
        });
    }
    let manager = Manager::new(shared, sources, token.clone());
    tasks.spawn(async move {
        manager.run(queue).await;
        // The senders' last owner must outlive the manager's loop.
        drop(updates);
        Ok(())
    });
    let context = api::ApiContext { config, identity, registry, agent: channel };
    tasks.spawn(api::serve(bound, context, token.clone()));

    let mut outcome = Ok(());
    while let Some(done) = tasks.join_next().await {
        match done {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                if outcome.is_ok() {
                    outcome = Err(error);
                }
                token.cancel();
            }
            Err(error) => {
                warn!(%error, "a task of the node failed");
                token.cancel();
            }
        }
    }
    outcome
}
