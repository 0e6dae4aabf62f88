//! Quantities, QoS classes, and what requests and limits become in a cgroup: the kubelet's formulas.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{Container, Pod, ResourceRequirements},
    apimachinery::pkg::api::resource::Quantity,
};
use moxlet_cri::v1::LinuxContainerResources;

const CPU_PERIOD: i64 = 100_000;
const MIN_QUOTA: i64 = 1_000;
const MIN_SHARES: i64 = 2;
const MAX_SHARES: i64 = 262_144;

/// A quantity in thousandths, rounded up; nothing where it is no quantity.
pub(crate) fn milli(quantity: &str) -> Option<i128> {
    let text = quantity.trim();
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty())
        || whole.len() > 24
        || fraction.len() > 12
        || fraction.contains('.')
    {
        return None;
    }
    // value = digits × numerator / denominator, in thousandths.
    let digits: i128 = format!("0{whole}{fraction}").parse().ok()?;
    let mut denominator = 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let mut numerator: i128 = 1000;
    match suffix {
        "" => {}
        "n" => denominator *= 1_000_000_000,
        "u" => denominator *= 1_000_000,
        "m" => denominator *= 1000,
        "k" => numerator *= 1000,
        "M" => numerator *= 1_000_000,
        "G" => numerator *= 1_000_000_000,
        "T" => numerator *= 1_000_000_000_000,
        "P" => numerator *= 1_000_000_000_000_000,
        "E" => numerator *= 1_000_000_000_000_000_000,
        "Ki" => numerator <<= 10,
        "Mi" => numerator <<= 20,
        "Gi" => numerator <<= 30,
        "Ti" => numerator <<= 40,
        "Pi" => numerator <<= 50,
        "Ei" => numerator <<= 60,
        exponent => {
            let e: i32 = exponent.strip_prefix(['e', 'E'])?.parse().ok()?;
            let power = 10_i128.checked_pow(e.unsigned_abs().min(18))?;
            if e >= 0 { numerator *= power } else { denominator = denominator.checked_mul(power)? }
        }
    }
    let product = digits.checked_mul(numerator)?;
    let value = product.div_euclid(denominator) + i128::from(product.rem_euclid(denominator) != 0);
    Some(if negative { -value } else { value })
}

/// A quantity in whole units, rounded up.
pub(crate) fn units(quantity: &str) -> Option<i64> {
    let m = milli(quantity)?;
    i64::try_from(m.div_euclid(1000) + i128::from(m.rem_euclid(1000) != 0)).ok()
}

fn entry<'a>(map: Option<&'a BTreeMap<String, Quantity>>, key: &str) -> Option<&'a str> {
    map.and_then(|m| m.get(key)).map(|q| q.0.as_str())
}

/// A limit, or nothing where none is set (0 counts as none).
pub(crate) fn limit<'a>(r: Option<&'a ResourceRequirements>, key: &str) -> Option<&'a str> {
    entry(r.and_then(|r| r.limits.as_ref()), key).filter(|q| milli(q).is_some_and(|m| m > 0))
}

/// A request; the limit stands in for it, as the API server defaults it.
pub(crate) fn request<'a>(r: Option<&'a ResourceRequirements>, key: &str) -> Option<&'a str> {
    entry(r.and_then(|r| r.requests.as_ref()), key)
        .or_else(|| limit(r, key))
        .filter(|q| milli(q).is_some_and(|m| m > 0))
}

/// A pod's quality of service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Qos {
    /// Every container has equal requests and limits.
    Guaranteed,
    /// Some container asks for something.
    Burstable,
    /// None does.
    BestEffort,
}

impl Qos {
    /// As the API writes it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }
}

/// All containers of a pod, init containers first.
pub(crate) fn all_containers(pod: &Pod) -> impl Iterator<Item = &Container> {
    pod.spec.iter().flat_map(|s| s.init_containers.iter().flatten().chain(&s.containers))
}

/// The class of a pod.
pub(crate) fn qos(pod: &Pod) -> Qos {
    let mut any = false;
    let mut guaranteed = true;
    for container in all_containers(pod) {
        let r = container.resources.as_ref();
        for key in ["cpu", "memory"] {
            let (want, most) = (request(r, key), limit(r, key));
            any |= want.is_some() || most.is_some();
            guaranteed &= most.is_some() && want.and_then(milli) == most.and_then(milli);
        }
    }
    match (any, guaranteed) {
        (false, _) => Qos::BestEffort,
        (true, true) => Qos::Guaranteed,
        (true, false) => Qos::Burstable,
    }
}

/// The `oom_score_adj` of a container.
pub(crate) fn oom_score_adj(pod: &Pod, container: &Container, memory_capacity: u64) -> i64 {
    if pod.spec.as_ref().and_then(|s| s.priority).is_some_and(|p| p >= 2_000_000_000 + 1000) {
        return -997;
    }
    match qos(pod) {
        Qos::Guaranteed => -997,
        Qos::BestEffort => 1000,
        Qos::Burstable => {
            let want = request(container.resources.as_ref(), "memory").and_then(units).unwrap_or(0);
            let capacity = i64::try_from(memory_capacity).unwrap_or(i64::MAX).max(1);
            let adj = 1000 - i64::try_from(1000 * i128::from(want) / i128::from(capacity)).unwrap_or(1000);
            if adj < 3 { 3 } else { adj.min(999) }
        }
    }
}

/// CPU shares of so many thousandths of a CPU.
pub(crate) fn shares(milli_cpu: i128) -> i64 {
    if milli_cpu == 0 {
        return MIN_SHARES;
    }
    i64::try_from(milli_cpu * 1024 / 1000).unwrap_or(MAX_SHARES).clamp(MIN_SHARES, MAX_SHARES)
}

/// CPU quota in a period of 100 ms.
pub(crate) fn quota(milli_cpu: i128) -> i64 {
    i64::try_from(milli_cpu * i128::from(CPU_PERIOD) / 1000).unwrap_or(i64::MAX).max(MIN_QUOTA)
}

/// A container's limits.
pub(crate) fn container_resources(container: &Container) -> LinuxContainerResources {
    let r = container.resources.as_ref();
    let mut out = LinuxContainerResources {
        cpu_shares: shares(request(r, "cpu").and_then(milli).unwrap_or(0)),
        memory_limit_in_bytes: limit(r, "memory").and_then(units).unwrap_or(0),
        ..LinuxContainerResources::default()
    };
    if let Some(cpu) = limit(r, "cpu").and_then(milli) {
        out.cpu_period = CPU_PERIOD;
        out.cpu_quota = quota(cpu);
    }
    out
}

/// The pod's limits: for each resource the larger of the sum over its containers and any init container, but
/// only where every one has a limit.
pub(crate) fn pod_resources(pod: &Pod) -> LinuxContainerResources {
    let spec = pod.spec.clone().unwrap_or_default();
    let inits = spec.init_containers.unwrap_or_default();
    let total = |key: &str, of: &dyn Fn(&Container) -> Option<i128>| -> Option<i128> {
        let sum: Option<i128> = spec.containers.iter().map(of).sum();
        let most: Option<i128> = inits.iter().map(of).try_fold(0, |a, b| Some(a.max(b?)));
        let overhead = entry(spec.overhead.as_ref(), key).and_then(milli).unwrap_or(0);
        Some(sum?.max(most?) + overhead)
    };
    let want = total("cpu", &|c| Some(request(c.resources.as_ref(), "cpu").and_then(milli).unwrap_or(0)));
    let cpu = total("cpu", &|c| limit(c.resources.as_ref(), "cpu").and_then(milli));
    let memory = total("memory", &|c| limit(c.resources.as_ref(), "memory").and_then(milli));
    let mut out = LinuxContainerResources {
        cpu_shares: shares(want.unwrap_or(0)),
        ..LinuxContainerResources::default()
    };
    if let Some(cpu) = cpu {
        out.cpu_period = CPU_PERIOD;
        out.cpu_quota = quota(cpu);
    }
    if let Some(memory) = memory {
        out.memory_limit_in_bytes = i64::try_from(memory / 1000).unwrap_or(i64::MAX);
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn pod(containers: &serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({"spec": {"containers": containers}})).unwrap()
    }

    #[test]
    fn quantities() {
        for (text, want) in [
            ("1", 1000),
            ("100m", 100),
            ("0.5", 500),
            ("1.5Gi", 1_610_612_736_000),
            ("128Mi", 134_217_728_000),
            ("1e3", 1_000_000),
            ("2k", 2_000_000),
            ("1u", 1),
            ("-1", -1000),
            (".5", 500),
        ] {
            assert_eq!(milli(text), Some(want), "{text}");
        }
        for text in ["", "x", "1.2.3", "1Qi", "99999999999999999999999999"] {
            assert_eq!(milli(text), None, "{text}");
        }
        assert_eq!(units("100m"), Some(1));
    }

    #[test]
    fn classes_and_oom_scores() {
        let best = pod(&serde_json::json!([{"name": "a"}]));
        assert_eq!(
            (qos(&best), oom_score_adj(&best, &best.spec.as_ref().unwrap().containers[0], 1 << 34)),
            (Qos::BestEffort, 1000)
        );
        let same = serde_json::json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1000m", "memory": "1Gi"}});
        let guaranteed = pod(&serde_json::json!([{"name": "a", "resources": same}]));
        assert_eq!(
            (
                qos(&guaranteed),
                oom_score_adj(&guaranteed, &guaranteed.spec.as_ref().unwrap().containers[0], 1 << 34)
            ),
            (Qos::Guaranteed, -997)
        );
        let burst = pod(
            &serde_json::json!([{"name": "a", "resources": {"requests": {"memory": "4Gi"}}}, {"name": "b"}]),
        );
        let spec = burst.spec.as_ref().unwrap();
        assert_eq!(qos(&burst), Qos::Burstable);
        assert_eq!(oom_score_adj(&burst, &spec.containers[0], 1 << 34), 750);
        assert_eq!(oom_score_adj(&burst, &spec.containers[1], 1 << 34), 999);
        assert_eq!(oom_score_adj(&burst, &spec.containers[0], 1 << 32), 3);
    }

    #[test]
    fn a_pod_is_limited_only_where_every_container_is() {
        let one = serde_json::json!({"limits": {"cpu": "250m", "memory": "64Mi"}});
        let both = pod_resources(&pod(
            &serde_json::json!([{"name": "a", "resources": one}, {"name": "b", "resources": one}]),
        ));
        assert_eq!((both.cpu_quota, both.cpu_shares, both.memory_limit_in_bytes), (50_000, 512, 128 << 20));
        let half = pod_resources(&pod(&serde_json::json!([{"name": "a", "resources": one}, {"name": "b"}])));
        assert_eq!((half.cpu_quota, half.memory_limit_in_bytes), (0, 0));
    }
}
