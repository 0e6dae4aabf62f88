//! `moxlet inspect`: all that is known of pods, containers and images, as JSON with CRI's names of fields.

use std::{collections::HashMap, process::ExitCode};

use anyhow::{Result, bail};
use clap::Args;
use moxlet_cri::{
    host,
    v1::{self, ContainerState, PodSandboxState},
};
use serde_json::{Value, json};

use super::{
    connect::Agent,
    list, model,
    model::{Pod, container_name},
    run,
    table::{print, time},
};
use crate::socket::SocketArgs;

/// What `moxlet inspect` takes.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    socket: SocketArgs,
    /// Pods, containers (POD/CONTAINER is NAMESPACE/POD/CONTAINER, or the id) or images, by name or id
    #[arg(required = true, value_name = "POD|CONTAINER|IMAGE")]
    names: Vec<String>,
    /// The namespace of pods, where several have one of that name
    #[arg(long, short, value_name = "NAMESPACE")]
    namespace: Option<String>,
}

/// Shows them, in one array.
///
/// # Errors
/// Something is neither, or the agent cannot be reached.
pub(crate) fn inspect(args: &InspectArgs) -> Result<ExitCode> {
    run(async {
        let mut agent = Agent::connect(&args.socket).await?;
        let pods = model::pods(&mut agent).await?;
        let mut all = Vec::new();
        for name in &args.names {
            all.push(one(&mut agent, &pods, name, args.namespace.as_deref()).await?);
        }
        print(&format!("{:#}\n", Value::Array(all)))?;
        Ok(ExitCode::SUCCESS)
    })
}

async fn one(agent: &mut Agent, pods: &[Pod], name: &str, namespace: Option<&str>) -> Result<Value> {
    let not_a_pod = match model::find(pods, name, namespace) {
        Ok(found) => return Ok(pod(found)),
        Err(error) => error,
    };
    if let Some(found) = find_container(pods, name) {
        return container_with_info(agent, found).await;
    }
    let request = host::ImageInspectRequest { image: name.to_owned() };
    match agent.images.inspect(request).await {
        Ok(answer) => Ok(serde_json::from_slice(&answer.into_inner().json)?),
        Err(e) if matches!(e.code(), tonic::Code::NotFound | tonic::Code::InvalidArgument) => {
            bail!("{name:?} is neither a pod nor a container nor an image of this host: {not_a_pod}")
        }
        Err(e) => Err(agent.failed(&e)),
    }
}

/// A container by its id or the beginning of that, or as NAMESPACE/POD/CONTAINER.
fn find_container<'a>(pods: &'a [Pod], name: &str) -> Option<&'a v1::ContainerStatus> {
    if let Some((pod, container)) = name.rsplit_once('/')
        && let Ok(pod) = model::find(pods, pod, None)
    {
        return pod.newest().find(|c| container_name(c) == container);
    }
    let mut all = pods.iter().flat_map(|p| p.containers.iter().flatten());
    all.find(|c| name.len() >= 3 && c.id.starts_with(name))
}

async fn container_with_info(agent: &mut Agent, found: &v1::ContainerStatus) -> Result<Value> {
    let request = v1::ContainerStatusRequest { container_id: found.id.clone(), verbose: true };
    let answer = agent.runtime.container_status(request).await.map_err(|e| agent.failed(&e))?.into_inner();
    let mut value = container(&answer.status.unwrap_or_default());
    if let Some(fields) = value.as_object_mut() {
        fields.insert("info".to_owned(), info(&answer.info));
    }
    Ok(value)
}

/// A pod with its sandbox and all attempts of its containers.
pub(super) fn pod(pod: &Pod) -> Value {
    let sandbox = &pod.sandbox;
    let network = sandbox.network.clone().unwrap_or_default();
    let ips = std::iter::once(network.ip).chain(network.additional_ips.into_iter().map(|ip| ip.ip));
    let state = match sandbox.state() {
        PodSandboxState::SandboxReady => "SANDBOX_READY",
        PodSandboxState::SandboxNotready => "SANDBOX_NOTREADY",
    };
    let mut value = json!({
        "kind": "Pod",
        "namespace": pod.namespace,
        "name": pod.name,
        "uid": pod.uid,
        "sandboxId": sandbox.id,
        "attempt": sandbox.metadata.as_ref().map_or(0, |m| m.attempt),
        "state": state,
        "createdAt": time(sandbox.created_at),
        "ips": ips.filter(|ip| !ip.is_empty()).collect::<Vec<_>>(),
        "labels": sandbox.labels,
        "annotations": sandbox.annotations,
        "containers": pod.containers.iter().flatten().map(container).collect::<Value>(),
        "info": info(&pod.info),
    });
    if let (Some(fields), Value::Object(summary)) = (value.as_object_mut(), list::summary(pod)) {
        fields.extend(summary);
    }
    value
}

/// A container.
fn container(container: &v1::ContainerStatus) -> Value {
    let state = match container.state() {
        ContainerState::ContainerCreated => "CONTAINER_CREATED",
        ContainerState::ContainerRunning => "CONTAINER_RUNNING",
        ContainerState::ContainerExited => "CONTAINER_EXITED",
        ContainerState::ContainerUnknown => "CONTAINER_UNKNOWN",
    };
    let mounts: Value = container
        .mounts
        .iter()
        .map(|m| json!({"containerPath": m.container_path, "hostPath": m.host_path, "readonly": m.readonly}))
        .collect();
    json!({
        "kind": "Container",
        "id": container.id,
        "name": container_name(container),
        "attempt": model::attempt(container),
        "state": state,
        "createdAt": time(container.created_at),
        "startedAt": time(container.started_at),
        "finishedAt": time(container.finished_at),
        "exitCode": container.exit_code,
        "reason": container.reason,
        "message": container.message,
        "image": container.image.as_ref().map(|i| &i.image),
        "imageRef": container.image_ref,
        "logPath": container.log_path,
        "labels": container.labels,
        "annotations": container.annotations,
        "mounts": mounts,
    })
}

/// CRI's verbose info: each value is a JSON text, or just a text.
fn info(info: &HashMap<String, String>) -> Value {
    let parsed = |text: &String| serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.clone()));
    info.iter().map(|(key, text)| (key.clone(), parsed(text))).collect::<serde_json::Map<_, _>>().into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{super::model::tests, *};

    #[test]
    fn a_pod_shows_cris_fields() {
        let running = tests::container("main", 1, ContainerState::ContainerRunning);
        let mut one = tests::pod("default", "web", vec![running]);
        one.info.insert("info".to_owned(), "{\"ct\": 7}".to_owned());
        one.sandbox.created_at = 1_000_000_000_000_000_000;
        let value = pod(&one);
        assert_eq!(value["state"], "SANDBOX_READY");
        assert_eq!(value["createdAt"], "2001-09-09T01:46:40Z");
        assert_eq!(value["containers"][0]["state"], "CONTAINER_RUNNING");
        assert_eq!(value["info"]["info"]["ct"], 7);
        assert_eq!(value["restarts"], 1);
    }

    #[test]
    fn a_container_is_found_by_pod_and_name_or_by_id() {
        let main = tests::container("main", 0, ContainerState::ContainerRunning);
        let pods = [tests::pod("default", "web", vec![main])];
        for name in ["default/web/main", "web/main", "main-0", "main"] {
            assert_eq!(find_container(&pods, name).unwrap().id, "main-0", "{name}");
        }
        assert!(find_container(&pods, "web/other").is_none() && find_container(&pods, "ma").is_none());
    }
}
