//! Labels and annotations by which a pod is found again on the agent, as a kubelet sets them; names of its log files.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::core::v1::{Container, Pod};
use moxlet_cri::annotations;

/// Label: the pod's name.
pub(crate) const POD_NAME: &str = "io.kubernetes.pod.name";
/// Label: the pod's namespace.
pub(crate) const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
/// Label: the pod's UID.
pub(crate) const POD_UID: &str = "io.kubernetes.pod.uid";
/// Label: the container's name.
pub(crate) const CONTAINER_NAME: &str = "io.kubernetes.container.name";
const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
const HASH: &str = "io.kubernetes.container.hash";
const MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
const MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
const GRACE_PERIOD: &str = "io.kubernetes.pod.terminationGracePeriod";

/// Where a pod comes from.
pub(crate) const SOURCE: &str = "kubernetes.io/config.source";
/// On the API server's copy of a static pod.
pub(crate) const MIRROR: &str = "kubernetes.io/config.mirror";

/// A pod's namespace.
pub(crate) fn namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or("default")
}

/// A pod's name.
pub(crate) fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

/// A pod's UID.
pub(crate) fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

/// `NAME_NAMESPACE(UID)`, as the kubelet's messages say it.
pub(crate) fn full(pod: &Pod) -> String {
    format!("{}_{}({})", name(pod), namespace(pod), uid(pod))
}

/// Whether a pod comes from a file.
pub(crate) fn is_static(pod: &Pod) -> bool {
    pod.metadata.annotations.as_ref().and_then(|a| a.get(SOURCE)).is_some_and(|s| s == "file")
}

/// The longest name of a file, in bytes (`NAME_MAX`).
const FILE_NAME_MAX: usize = 255;

/// A pod's log directory below `pod_logs_dir`, as a kubelet names it: `NAMESPACE_NAME_UID`. Where that is too long for a file system
/// the name is cut: the UID tells pods apart.
pub(crate) fn log_directory(pod: &Pod) -> String {
    let (namespace, name, uid) = (namespace(pod), name(pod), uid(pod));
    let room = FILE_NAME_MAX.saturating_sub(namespace.len() + uid.len() + 2);
    let end = (0..=room.min(name.len())).rev().find(|at| name.is_char_boundary(*at)).unwrap_or(0);
    format!("{namespace}_{}_{uid}", &name[..end])
}

/// A container's log below its pod's log directory.
pub(crate) fn log_file(container: &str, attempt: u32) -> String {
    format!("{container}/{attempt}.log")
}

/// Labels of a pod's sandbox.
pub(crate) fn sandbox_labels(pod: &Pod) -> HashMap<String, String> {
    let mut labels: HashMap<_, _> = pod.metadata.labels.clone().unwrap_or_default().into_iter().collect();
    labels.extend(pod_labels(pod));
    labels
}

fn pod_labels(pod: &Pod) -> HashMap<String, String> {
    HashMap::from([
        (POD_NAME.to_owned(), name(pod).to_owned()),
        (POD_NAMESPACE.to_owned(), namespace(pod).to_owned()),
        (POD_UID.to_owned(), uid(pod).to_owned()),
    ])
}

/// Annotations of a pod's sandbox.
pub(crate) fn sandbox_annotations(pod: &Pod) -> HashMap<String, String> {
    let mut notes: HashMap<_, _> = pod.metadata.annotations.clone().unwrap_or_default().into_iter().collect();
    if let Some(grace) = pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds) {
        let seconds = u32::try_from(grace.max(0)).unwrap_or(u32::MAX);
        notes.insert(annotations::GRACE_PERIOD.to_owned(), seconds.to_string());
    }
    notes
}

/// Labels of a container.
pub(crate) fn container_labels(pod: &Pod, container: &Container) -> HashMap<String, String> {
    let mut labels = pod_labels(pod);
    labels.insert(CONTAINER_NAME.to_owned(), container.name.clone());
    labels
}

/// Annotations of a container.
pub(crate) fn container_annotations(
    pod: &Pod,
    container: &Container,
    attempt: u32,
) -> HashMap<String, String> {
    let mut notes = HashMap::from([
        (RESTART_COUNT.to_owned(), attempt.to_string()),
        (HASH.to_owned(), hash(container)),
        (MESSAGE_PATH.to_owned(), message_path(container).to_owned()),
        (
            MESSAGE_POLICY.to_owned(),
            container.termination_message_policy.clone().unwrap_or_else(|| "File".to_owned()),
        ),
    ]);
    if let Some(grace) = pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds) {
        notes.insert(GRACE_PERIOD.to_owned(), grace.to_string());
    }
    notes
}

/// Where in the container its termination message is.
pub(crate) fn message_path(container: &Container) -> &str {
    container.termination_message_path.as_deref().filter(|p| !p.is_empty()).unwrap_or("/dev/termination-log")
}

/// What of a container's spec makes it another container when it changes: name and image, as in the kubelet.
fn hash(container: &Container) -> String {
    let image = container.image.as_deref().unwrap_or_default();
    moxlet_ids::Digest::of(format!("{}\n{image}", container.name).as_bytes()).hex()[..8].to_owned()
}

/// The label selector that finds all of a pod.
pub(crate) fn selector(uid: &str) -> HashMap<String, String> {
    HashMap::from([(POD_UID.to_owned(), uid.to_owned())])
}

/// A map's value, or nothing.
pub(crate) fn get<'a>(map: Option<&'a BTreeMap<String, String>>, key: &str) -> Option<&'a str> {
    map.and_then(|m| m.get(key)).map(String::as_str)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_longest_name_that_the_api_takes_has_a_log_directory() {
        let pod = |name: &str| -> Pod {
            let metadata =
                serde_json::json!({"name": name, "namespace": "n".repeat(63), "uid": "u".repeat(36)});
            serde_json::from_value(serde_json::json!({"metadata": metadata})).unwrap()
        };
        let long = log_directory(&pod(&"a".repeat(253)));
        assert_eq!(long.len(), FILE_NAME_MAX);
        assert!(long.ends_with(&format!("a_{}", "u".repeat(36))));
        assert_eq!(log_directory(&pod("web")), format!("{}_web_{}", "n".repeat(63), "u".repeat(36)));
    }

    #[test]
    fn a_sandbox_is_told_its_pods_grace_whatever_the_pods_own_annotation_says() {
        let grace = |seconds: serde_json::Value| {
            let pod: Pod = serde_json::from_value(serde_json::json!({
                "metadata": {"annotations": {annotations::GRACE_PERIOD: "7", "a": "b"}},
                "spec": {"containers": [], "terminationGracePeriodSeconds": seconds}}))
            .unwrap();
            let notes = sandbox_annotations(&pod);
            assert_eq!(notes.get("a").unwrap(), "b");
            notes.get(annotations::GRACE_PERIOD).cloned().unwrap()
        };
        assert_eq!(grace(600.into()), "600");
        assert_eq!(grace((-1).into()), "0");
    }
}
