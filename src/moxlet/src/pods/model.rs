//! Pods as CRI reports them: of each the newest sandbox, with its address and its containers, all attempts of them.

use std::collections::HashMap;

use anyhow::{Result, bail};
use moxlet_cri::v1::{self, ContainerState};

use super::connect::Agent;

/// A pod of this host.
#[derive(Debug, Clone, Default)]
pub(super) struct Pod {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
    /// Its newest sandbox.
    pub(super) sandbox: v1::PodSandboxStatus,
    /// What the agent tells of the sandbox beyond CRI, each value a JSON text.
    pub(super) info: HashMap<String, String>,
    /// By name, then by attempt, the newest one first; in the order in which the first of each was created.
    pub(super) containers: Vec<Vec<v1::ContainerStatus>>,
}

/// How a container is called.
pub(super) fn container_name(container: &v1::ContainerStatus) -> &str {
    container.metadata.as_ref().map_or("", |m| &m.name)
}

/// Which start of it this is.
pub(super) fn attempt(container: &v1::ContainerStatus) -> u32 {
    container.metadata.as_ref().map_or(0, |m| m.attempt)
}

impl Pod {
    /// The newest attempt of each container.
    pub(super) fn newest(&self) -> impl Iterator<Item = &v1::ContainerStatus> {
        self.containers.iter().filter_map(|attempts| attempts.first())
    }

    /// The first address, or none.
    pub(super) fn ip(&self) -> &str {
        self.sandbox.network.as_ref().map_or("", |n| &n.ip)
    }

    /// NAMESPACE/NAME.
    pub(super) fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// All attempts of one container: of that name, or of the one that is meant where nobody says: the only one, else the first that
    /// runs, else the first. `said` gets the sentence that kubectl prints of the choice.
    ///
    /// # Errors
    /// There is none of that name, or none at all.
    pub(super) fn container(
        &self,
        name: Option<&str>,
        said: impl FnOnce(&str),
    ) -> Result<&[v1::ContainerStatus]> {
        let names: Vec<_> = self.newest().map(container_name).collect();
        let position = match name {
            Some(wanted) => names.iter().position(|n| *n == wanted),
            None => {
                let running = |c: &v1::ContainerStatus| c.state() == ContainerState::ContainerRunning;
                let chosen = self.newest().position(running).unwrap_or(0);
                if names.len() > 1 {
                    let of = names.get(chosen).unwrap_or(&"");
                    said(&format!("Defaulted container {of:?} out of: {}", names.join(", ")));
                }
                Some(chosen)
            }
        };
        match position.and_then(|p| self.containers.get(p)) {
            Some(attempts) => Ok(attempts),
            None if names.is_empty() => bail!("pod {} has no container yet", self.full_name()),
            None => bail!(
                "pod {} has no container {:?}; it has: {}",
                self.full_name(),
                name.unwrap_or_default(),
                names.join(", ")
            ),
        }
    }
}

/// All pods of the host, by namespace and name.
///
/// # Errors
/// The agent does not answer.
pub(super) async fn pods(agent: &mut Agent) -> Result<Vec<Pod>> {
    let request = v1::ListPodSandboxRequest { filter: None };
    let answer = agent.runtime.list_pod_sandbox(request).await.map_err(|e| agent.failed(&e))?;
    let mut pods = Vec::new();
    for sandbox in newest(answer.into_inner().items) {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: sandbox.id.clone(), verbose: true };
        let answer = match agent.runtime.pod_sandbox_status(request).await {
            Ok(answer) => answer.into_inner(),
            // It went meanwhile.
            Err(e) if e.code() == tonic::Code::NotFound => continue,
            Err(e) => return Err(agent.failed(&e)),
        };
        let metadata = sandbox.metadata.unwrap_or_default();
        pods.push(Pod {
            namespace: metadata.namespace,
            name: metadata.name,
            uid: metadata.uid,
            sandbox: answer.status.unwrap_or_default(),
            info: answer.info,
            containers: Vec::new(),
        });
    }
    add_containers(agent, &mut pods).await?;
    pods.sort_by(|a, b| (&a.namespace, &a.name, &a.uid).cmp(&(&b.namespace, &b.name, &b.uid)));
    Ok(pods)
}

/// Of the sandboxes of each pod the newest.
fn newest(sandboxes: Vec<v1::PodSandbox>) -> Vec<v1::PodSandbox> {
    let mut by_uid: HashMap<String, v1::PodSandbox> = HashMap::new();
    let order = |s: &v1::PodSandbox| (s.metadata.as_ref().map_or(0, |m| m.attempt), s.created_at);
    for sandbox in sandboxes {
        let uid = sandbox.metadata.as_ref().map(|m| m.uid.clone()).unwrap_or_default();
        match by_uid.get(&uid) {
            Some(other) if order(other) >= order(&sandbox) => {}
            _ => drop(by_uid.insert(uid, sandbox)),
        }
    }
    by_uid.into_values().collect()
}

async fn add_containers(agent: &mut Agent, pods: &mut [Pod]) -> Result<()> {
    let request = v1::ListContainersRequest { filter: None };
    let answer = agent.runtime.list_containers(request).await.map_err(|e| agent.failed(&e))?;
    for container in answer.into_inner().containers {
        let Some(pod) = pods.iter_mut().find(|p| p.sandbox.id == container.pod_sandbox_id) else { continue };
        let request = v1::ContainerStatusRequest { container_id: container.id, verbose: false };
        match agent.runtime.container_status(request).await {
            Ok(answer) => add(&mut pod.containers, answer.into_inner().status.unwrap_or_default()),
            Err(e) if e.code() == tonic::Code::NotFound => {}
            Err(e) => return Err(agent.failed(&e)),
        }
    }
    for pod in pods {
        for attempts in &mut pod.containers {
            attempts.sort_by_key(|c| std::cmp::Reverse((attempt(c), c.created_at)));
        }
        pod.containers.sort_by_key(|attempts| attempts.last().map_or(0, |first| first.created_at));
    }
    Ok(())
}

fn add(containers: &mut Vec<Vec<v1::ContainerStatus>>, container: v1::ContainerStatus) {
    let same = containers
        .iter_mut()
        .find(|attempts| attempts.first().is_some_and(|c| container_name(c) == container_name(&container)));
    match same {
        Some(attempts) => attempts.push(container),
        None => containers.push(vec![container]),
    }
}

/// The pod that `wanted` names: NAME, NAMESPACE/NAME, its UID, or the id of its sandbox or the beginning of that.
///
/// # Errors
/// There is none, or there are several.
pub(super) fn find<'a>(pods: &'a [Pod], wanted: &str, namespace: Option<&str>) -> Result<&'a Pod> {
    let (namespace, name) = match wanted.split_once('/') {
        Some((namespace, name)) => (Some(namespace), name),
        None => (namespace, wanted),
    };
    let here = |p: &&Pod| namespace.is_none_or(|n| n == p.namespace);
    let mut found: Vec<_> = pods.iter().filter(here).filter(|p| p.name == name || p.uid == name).collect();
    if found.is_empty() && name.len() >= 3 {
        found = pods.iter().filter(here).filter(|p| p.sandbox.id.starts_with(name)).collect();
    }
    match found.as_slice() {
        [one] => Ok(one),
        [] => bail!("there is no pod {wanted:?} on this host (`moxlet pods` lists them)"),
        several => {
            let names: Vec<_> = several.iter().map(|p| format!("{} ({})", p.full_name(), p.uid)).collect();
            bail!(
                "{wanted:?} is the name of several pods: {}; say which, as NAMESPACE/NAME or by its UID",
                names.join(", ")
            )
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    pub(crate) fn container(name: &str, attempt: u32, state: ContainerState) -> v1::ContainerStatus {
        v1::ContainerStatus {
            id: format!("{name}-{attempt}"),
            metadata: Some(v1::ContainerMetadata { name: name.to_owned(), attempt }),
            state: state.into(),
            ..v1::ContainerStatus::default()
        }
    }

    pub(crate) fn pod(namespace: &str, name: &str, containers: Vec<v1::ContainerStatus>) -> Pod {
        let sandbox = v1::PodSandboxStatus { id: format!("{namespace}{name}0123"), ..Default::default() };
        Pod {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: format!("uid-of-{name}"),
            sandbox,
            containers: containers.into_iter().map(|c| vec![c]).collect(),
            ..Pod::default()
        }
    }

    #[test]
    fn a_pod_is_found_by_name_namespace_uid_and_id() {
        let pods = [pod("a", "web", vec![]), pod("b", "web", vec![]), pod("b", "db", vec![])];
        for (wanted, namespace, full) in [
            ("db", None, "b/db"),
            ("a/web", None, "a/web"),
            ("web", Some("b"), "b/web"),
            ("uid-of-db", None, "b/db"),
            ("aweb0", None, "a/web"),
        ] {
            assert_eq!(find(&pods, wanted, namespace).unwrap().full_name(), full);
        }
        let several = find(&pods, "web", None).unwrap_err().to_string();
        assert!(several.contains("a/web") && several.contains("b/web"), "{several}");
        assert!(find(&pods, "d", None).unwrap_err().to_string().contains("no pod \"d\""));
    }

    #[test]
    fn without_a_name_the_container_is_the_first_that_runs_and_that_is_said() {
        let two = pod(
            "a",
            "web",
            vec![
                container("setup", 0, ContainerState::ContainerExited),
                container("main", 0, ContainerState::ContainerRunning),
            ],
        );
        let mut said = String::new();
        let chosen = two.container(None, |text| text.clone_into(&mut said)).unwrap();
        assert_eq!(container_name(&chosen[0]), "main");
        assert_eq!(said, "Defaulted container \"main\" out of: setup, main");
        assert_eq!(container_name(&two.container(Some("setup"), |_| {}).unwrap()[0]), "setup");
        let error = two.container(Some("x"), |_| {}).unwrap_err().to_string();
        assert!(error.contains("it has: setup, main"), "{error}");
        assert!(pod("a", "b", vec![]).container(None, |_| {}).is_err());
    }

    #[test]
    fn of_a_pods_sandboxes_the_newest_counts() {
        let sandbox = |id: &str, uid: &str, attempt| v1::PodSandbox {
            id: id.to_owned(),
            metadata: Some(v1::PodSandboxMetadata { uid: uid.to_owned(), attempt, ..Default::default() }),
            ..Default::default()
        };
        let kept = newest(vec![sandbox("1", "a", 0), sandbox("2", "a", 1), sandbox("3", "b", 0)]);
        let mut ids: Vec<_> = kept.iter().map(|s| s.id.as_str()).collect();
        ids.sort_unstable();
        assert_eq!(ids, ["2", "3"]);
    }
}
