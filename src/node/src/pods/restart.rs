//! Whether a container that has ended is started again.

use k8s_openapi::api::core::v1::Pod;

use super::state::{Container, Phase};

/// The pod's restartPolicy.
pub(crate) fn policy(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|s| s.restart_policy.as_deref()).filter(|p| !p.is_empty()).unwrap_or("Always")
}

/// Whether this container, the newest of its name, is to be followed by another.
pub(crate) fn wanted(pod: &Pod, newest: &Container) -> bool {
    match newest.phase {
        Phase::Running => false,
        Phase::Created | Phase::Unknown => true,
        Phase::Exited => match policy(pod) {
            "Never" => false,
            "OnFailure" => newest.exit_code != 0,
            _ => true,
        },
    }
}

/// An init container is tried again until it succeeds, unless the pod says never.
pub(crate) fn wanted_init(pod: &Pod, newest: &Container) -> bool {
    match newest.phase {
        Phase::Running => false,
        Phase::Created | Phase::Unknown => true,
        Phase::Exited => newest.exit_code != 0 && policy(pod) != "Never",
    }
}
