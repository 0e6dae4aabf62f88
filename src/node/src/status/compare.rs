//! Whether a status that is shown is the one that was accepted: in what a node writes, and in nothing else.

use std::time::Duration;

use k8s_openapi::api::core::v1::{PodCondition, PodStatus};

use super::{CONDITIONS, Shown};

/// For how long a copy that is older than the last answer is taken for one that was still on its way.
pub(super) const IN_FLIGHT: Duration = Duration::from_secs(10);

/// A status without what others write.
fn own(status: &PodStatus) -> PodStatus {
    let mut conditions: Vec<PodCondition> = status
        .conditions
        .iter()
        .flatten()
        .filter(|c| CONDITIONS.contains(&c.type_.as_str()))
        .map(|c| PodCondition { last_probe_time: None, ..c.clone() })
        .collect();
    conditions.sort_by(|a, b| a.type_.cmp(&b.type_));
    PodStatus {
        phase: status.phase.clone(),
        reason: status.reason.clone(),
        message: status.message.clone(),
        conditions: Some(conditions),
        container_statuses: status.container_statuses.clone(),
        init_container_statuses: status.init_container_statuses.clone(),
        ephemeral_container_statuses: status.ephemeral_container_statuses.clone(),
        host_ip: status.host_ip.clone(),
        host_ips: status.host_ips.clone(),
        pod_ip: status.pod_ip.clone(),
        pod_ips: status.pod_ips.clone(),
        qos_class: status.qos_class.clone(),
        start_time: status.start_time.clone(),
        observed_generation: status.observed_generation,
        ..PodStatus::default()
    }
}

/// Whether two statuses agree in what a node writes.
pub(super) fn agree(a: &PodStatus, b: &PodStatus) -> bool {
    own(a) == own(b)
}

/// What is to be done about a copy that is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing: it is as it was accepted.
    Same,
    /// Somebody wrote something else: patch.
    Differs,
    /// It may be older than what was accepted: look again after so long.
    Wait(Duration),
}

/// Judges a copy by the API server's answer to the last patch, which came `age` ago.
pub(super) fn judge(shown: &Shown, answer: &Shown, age: Duration) -> Verdict {
    if agree(&shown.status, &answer.status) {
        return Verdict::Same;
    }
    let older = matches!((shown.version, answer.version), (Some(s), Some(a)) if s < a);
    match IN_FLIGHT.checked_sub(age).filter(|left| !left.is_zero()) {
        Some(left) if older => Verdict::Wait(left),
        _ => Verdict::Differs,
    }
}
