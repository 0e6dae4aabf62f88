//! One word for the state of a pod, as kubectl's column STATUS, from what CRI knows: no probes, no volumes, no deletion.

use moxlet_cri::v1::{self, ContainerState, PodSandboxState};

use super::model::{Pod, attempt};

/// What kubectl would show.
pub(super) fn status(pod: &Pod) -> String {
    let sandbox_ready = pod.sandbox.state() == PodSandboxState::SandboxReady;
    let running = |c: &v1::ContainerStatus| c.state() == ContainerState::ContainerRunning;
    let mut word = if sandbox_ready { "Running" } else { "NotReady" }.to_owned();
    if pod.containers.is_empty() && sandbox_ready {
        return "ContainerCreating".to_owned();
    }
    // kubectl goes through them from the last to the first, and the last word stays.
    let states: Vec<_> = pod.newest().collect();
    for container in states.iter().rev() {
        match container.state() {
            ContainerState::ContainerExited => word = exited(container),
            ContainerState::ContainerCreated => word = "ContainerCreating".to_owned(),
            ContainerState::ContainerUnknown => word = "Unknown".to_owned(),
            ContainerState::ContainerRunning => {}
        }
    }
    // A sidecar or an init container that is done does not make a pod Completed whose others run.
    if word == "Completed" && states.iter().any(|c| running(c)) { "Running".to_owned() } else { word }
}

fn exited(container: &v1::ContainerStatus) -> String {
    match (container.reason.as_str(), container.exit_code) {
        ("", 0) => "Completed".to_owned(),
        ("", code) => format!("ExitCode:{code}"),
        (reason, _) => reason.to_owned(),
    }
}

/// Containers that run, of all.
pub(super) fn ready(pod: &Pod) -> String {
    let running = pod.newest().filter(|c| c.state() == ContainerState::ContainerRunning).count();
    format!("{running}/{}", pod.containers.len())
}

/// Restarts of all containers.
pub(super) fn restarts(pod: &Pod) -> u32 {
    pod.newest().map(attempt).sum()
}

#[cfg(test)]
mod tests {
    use super::{
        super::model::tests::{container, pod},
        *,
    };

    #[test]
    fn a_pod_has_the_word_that_kubectl_shows() {
        use ContainerState::{
            ContainerCreated as Created, ContainerExited as Exited, ContainerRunning as Running,
        };
        let failed =
            v1::ContainerStatus { exit_code: 3, reason: "Error".to_owned(), ..container("b", 2, Exited) };
        for (containers, word, count) in [
            (vec![], "ContainerCreating", "0/0"),
            (vec![container("a", 0, Running)], "Running", "1/1"),
            (vec![container("a", 0, Exited)], "Completed", "0/1"),
            (vec![container("setup", 0, Exited), container("a", 0, Running)], "Running", "1/2"),
            (vec![container("a", 0, Running), failed.clone()], "Error", "1/2"),
            (vec![container("a", 0, Created)], "ContainerCreating", "0/1"),
        ] {
            let pod = pod("n", "p", containers);
            assert_eq!((status(&pod).as_str(), ready(&pod).as_str()), (word, count));
        }
        assert_eq!(restarts(&pod("n", "p", vec![container("a", 1, Running), failed])), 3);
    }
}
