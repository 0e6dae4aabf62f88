//! What pods and containers use, from one snapshot: `/metrics/resource` and `/stats/summary`.
//!
//! Names, labels and times are the kubelet's: metrics-server reads exactly these.

use std::collections::HashMap;

use moxlet_cri::{
    host::{self, host_service_client::HostServiceClient},
    v1::{self, runtime_service_client::RuntimeServiceClient},
};
use tonic::transport::Channel;

use super::text::{Kind, Text};
use crate::pods::registry::PodRegistry;

/// The largest answer that is read from the agent.
const MAX_ANSWER: usize = 32 << 20;

/// CPU and memory of something at a time.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Usage {
    /// Nanoseconds of CPU since its start, and when they were read (UNIX nanoseconds).
    pub(crate) cpu: Option<(u64, i64)>,
    /// Bytes of working set, and when they were read.
    pub(crate) memory: Option<(u64, i64)>,
    /// All bytes of memory, page cache included.
    pub(crate) memory_all: Option<u64>,
    /// Bytes of anonymous memory.
    pub(crate) memory_rss: Option<u64>,
}

/// What a network interface carried since it was made.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Interface {
    pub(crate) name: String,
    pub(crate) received_bytes: Option<u64>,
    pub(crate) received_errors: Option<u64>,
    pub(crate) sent_bytes: Option<u64>,
    pub(crate) sent_errors: Option<u64>,
}

/// One container's use.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ContainerUsage {
    pub(crate) namespace: String,
    pub(crate) pod: String,
    pub(crate) name: String,
    /// CRI id.
    pub(crate) id: String,
    /// Image as run.
    pub(crate) image: String,
    /// UNIX seconds.
    pub(crate) started: Option<f64>,
    pub(crate) usage: Usage,
    /// Bytes and inodes of its writable layer, where they are measured.
    pub(crate) layer: Option<(u64, Option<u64>)>,
}

/// One pod's use.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PodUsage {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    /// CRI id of its sandbox.
    pub(crate) id: String,
    pub(crate) usage: Usage,
    /// Its processes and threads.
    pub(crate) processes: Option<u64>,
    pub(crate) interfaces: Vec<Interface>,
}

/// All of it at one time.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Snapshot {
    /// Whether something could not be read.
    pub(crate) error: bool,
    pub(crate) node: Usage,
    pub(crate) pods: Vec<PodUsage>,
    pub(crate) containers: Vec<ContainerUsage>,
}

fn usage(cpu: Option<&v1::CpuUsage>, memory: Option<&v1::MemoryUsage>) -> Usage {
    Usage {
        cpu: cpu.and_then(|c| Some((c.usage_core_nano_seconds.as_ref()?.value, c.timestamp))),
        memory: memory.and_then(|m| Some((m.working_set_bytes.as_ref()?.value, m.timestamp))),
        memory_all: memory.and_then(|m| Some(m.usage_bytes.as_ref()?.value)),
        memory_rss: memory.and_then(|m| Some(m.rss_bytes.as_ref()?.value)),
    }
}

/// Reads everything from the agent, the calls side by side.
pub(crate) async fn snapshot(agent: &Channel, registry: &PodRegistry) -> Snapshot {
    let runtime = RuntimeServiceClient::new(agent.clone()).max_decoding_message_size(MAX_ANSWER);
    let (mut for_pods, mut for_containers) = (runtime.clone(), runtime);
    let mut hosts = HostServiceClient::new(agent.clone());
    let (pods, containers, info) = futures::join!(
        for_pods.list_pod_sandbox_stats(v1::ListPodSandboxStatsRequest::default()),
        for_containers.list_container_stats(v1::ListContainerStatsRequest::default()),
        hosts.info(host::InfoRequest {}),
    );
    let mut shot =
        Snapshot { error: pods.is_err() || containers.is_err() || info.is_err(), ..Snapshot::default() };
    for status in [pods.as_ref().err(), containers.as_ref().err(), info.as_ref().err()].into_iter().flatten()
    {
        tracing::debug!(%status, "the agent could not tell what its pods use");
    }
    if let Ok(info) = info {
        let info = info.into_inner();
        let now = i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX);
        shot.node.cpu = Some((info.cpu_usage_core_nano_seconds, now));
        shot.node.memory = Some((info.memory_working_set_bytes, now));
    }
    for stats in pods.map(|r| r.into_inner().stats).unwrap_or_default() {
        let (Some(attributes), Some(linux)) = (stats.attributes, stats.linux) else { continue };
        let Some(meta) = attributes.metadata else { continue };
        let network = linux.network.unwrap_or_default();
        shot.pods.push(PodUsage {
            namespace: meta.namespace,
            name: meta.name,
            uid: meta.uid,
            id: attributes.id,
            usage: usage(linux.cpu.as_ref(), linux.memory.as_ref()),
            processes: linux.process.and_then(|p| Some(p.process_count?.value)),
            interfaces: network
                .default_interface
                .into_iter()
                .chain(network.interfaces)
                .map(interface)
                .collect(),
        });
    }
    let known = running(registry);
    for stats in containers.map(|r| r.into_inner().stats).unwrap_or_default() {
        let id = stats.attributes.map(|a| a.id).unwrap_or_default();
        let Some(known) = known.get(&id) else { continue };
        let layer =
            stats.writable_layer.and_then(|w| Some((w.used_bytes?.value, w.inodes_used.map(|n| n.value))));
        shot.containers.push(ContainerUsage {
            usage: usage(stats.cpu.as_ref(), stats.memory.as_ref()),
            layer,
            id,
            ..known.clone()
        });
    }
    shot.pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    shot.containers.sort_by(|a, b| (&a.namespace, &a.pod, &a.name).cmp(&(&b.namespace, &b.pod, &b.name)));
    shot
}

fn interface(usage: v1::NetworkInterfaceUsage) -> Interface {
    let number = |n: Option<v1::UInt64Value>| n.map(|n| n.value);
    Interface {
        name: usage.name,
        received_bytes: number(usage.rx_bytes),
        received_errors: number(usage.rx_errors),
        sent_bytes: number(usage.tx_bytes),
        sent_errors: number(usage.tx_errors),
    }
}

/// Newest containers of all pods by CRI id, without what they use.
fn running(registry: &PodRegistry) -> HashMap<String, ContainerUsage> {
    let mut known = HashMap::new();
    for view in registry.list() {
        let statuses = view.pod.status.iter();
        let statuses: HashMap<_, _> = statuses
            .flat_map(|s| s.container_statuses.iter().chain(&s.init_container_statuses).flatten())
            .map(|s| (s.name.as_str(), s))
            .collect();
        let meta = &view.pod.metadata;
        for (name, container) in &view.containers {
            let Some(id) = &container.current else { continue };
            let status = statuses.get(name.as_str());
            let started = status
                .and_then(|s| s.state.as_ref()?.running.as_ref()?.started_at.as_ref())
                .map(|at| at.0.as_nanosecond() as f64 / 1e9);
            let one = ContainerUsage {
                namespace: meta.namespace.clone().unwrap_or_default(),
                pod: meta.name.clone().unwrap_or_default(),
                name: name.clone(),
                id: String::new(),
                image: status.map(|s| s.image.clone()).unwrap_or_default(),
                started,
                usage: Usage::default(),
                layer: None,
            };
            known.insert(id.clone(), one);
        }
    }
    known
}

/// The text of `/metrics/resource`.
pub(crate) fn encode(shot: &Snapshot) -> String {
    let mut text = Text::default();
    let container = |c: &ContainerUsage| {
        vec![("container", c.name.clone()), ("namespace", c.namespace.clone()), ("pod", c.pod.clone())]
    };
    let pod = |p: &PodUsage| vec![("namespace", p.namespace.clone()), ("pod", p.name.clone())];
    let containers = || shot.containers.iter().map(|c| (container(c), &c.usage));
    let pods = || shot.pods.iter().map(|p| (pod(p), &p.usage));
    cpu(&mut text, "container_cpu_usage_seconds_total", "container", containers());
    memory(&mut text, "container_memory_working_set_bytes", "container", containers());
    let name = "container_start_time_seconds";
    let starts = shot.containers.iter().filter_map(|c| Some((container(c), c.started?, None)));
    family(
        &mut text,
        name,
        Kind::Gauge,
        "[STABLE] Start time of the container since unix epoch in seconds",
        starts,
    );
    cpu(&mut text, "node_cpu_usage_seconds_total", "node", std::iter::once((Vec::new(), &shot.node)));
    memory(&mut text, "node_memory_working_set_bytes", "node", std::iter::once((Vec::new(), &shot.node)));
    cpu(&mut text, "pod_cpu_usage_seconds_total", "pod", pods());
    memory(&mut text, "pod_memory_working_set_bytes", "pod", pods());
    let help = "[STABLE] 1 if there was an error while getting container metrics, 0 otherwise";
    let failed = f64::from(u8::from(shot.error));
    family(
        &mut text,
        "resource_scrape_error",
        Kind::Gauge,
        help,
        std::iter::once((Vec::new(), failed, None)),
    );
    text.finish()
}

pub(super) type Labels = Vec<(&'static str, String)>;

/// A family with its samples; none without any.
pub(super) fn family(
    text: &mut Text,
    name: &str,
    kind: Kind,
    help: &str,
    samples: impl Iterator<Item = (Labels, f64, Option<i64>)>,
) {
    let mut samples = samples.peekable();
    if samples.peek().is_some() {
        text.family(name, kind, help);
    }
    for (labels, value, at) in samples {
        let labels: Vec<(&str, &str)> = labels.iter().map(|(k, v)| (*k, v.as_str())).collect();
        text.sample(name, &labels, value, at);
    }
}

fn cpu<'a>(text: &mut Text, name: &str, of: &str, all: impl Iterator<Item = (Labels, &'a Usage)>) {
    let help = format!("[STABLE] Cumulative cpu time consumed by the {of} in core-seconds");
    let samples =
        all.filter_map(|(labels, u)| u.cpu.map(|(ns, at)| (labels, ns as f64 / 1e9, Some(at / 1_000_000))));
    family(text, name, Kind::Counter, &help, samples);
}

fn memory<'a>(text: &mut Text, name: &str, of: &str, all: impl Iterator<Item = (Labels, &'a Usage)>) {
    let help = format!("[STABLE] Current working set of the {of} in bytes");
    let samples = all
        .filter_map(|(labels, u)| u.memory.map(|(bytes, at)| (labels, bytes as f64, Some(at / 1_000_000))));
    family(text, name, Kind::Gauge, &help, samples);
}

/// The body of `/stats/summary`: the part of it that is measured.
pub(crate) fn summary(node: &str, shot: &Snapshot) -> serde_json::Value {
    let part = |u: &Usage| {
        let time = |ns: i64| {
            jiff::Timestamp::from_nanosecond(ns.into())
                .unwrap_or_default()
                .strftime("%Y-%m-%dT%H:%M:%SZ")
                .to_string()
        };
        let mut part = serde_json::Map::new();
        if let Some((ns, at)) = u.cpu {
            part.insert("cpu".into(), serde_json::json!({"time": time(at), "usageCoreNanoSeconds": ns}));
        }
        if let Some((bytes, at)) = u.memory {
            part.insert("memory".into(), serde_json::json!({"time": time(at), "workingSetBytes": bytes}));
        }
        part
    };
    let started = |c: &ContainerUsage| {
        let at = c.started.and_then(|s| jiff::Timestamp::from_second(s as i64).ok())?;
        Some(at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
    };
    let pods: Vec<_> = shot
        .pods
        .iter()
        .map(|pod| {
            let containers: Vec<_> = shot
                .containers
                .iter()
                .filter(|c| c.namespace == pod.namespace && c.pod == pod.name)
                .map(|c| {
                    let mut one = part(&c.usage);
                    one.insert("name".into(), c.name.clone().into());
                    one.insert("startTime".into(), started(c).into());
                    one
                })
                .collect();
            let mut one = part(&pod.usage);
            one.insert(
                "podRef".into(),
                serde_json::json!({"name": pod.name, "namespace": pod.namespace, "uid": pod.uid}),
            );
            one.insert("containers".into(), containers.into());
            one
        })
        .collect();
    let mut whole = part(&shot.node);
    whole.insert("nodeName".into(), node.into());
    serde_json::json!({"node": whole, "pods": pods})
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    pub(crate) fn shot() -> Snapshot {
        let usage = |ns, bytes| Usage {
            cpu: Some((ns, 1_700_000_000_123_000_000)),
            memory: Some((bytes, 1_700_000_000_456_000_000)),
            memory_all: Some(bytes + 1),
            memory_rss: None,
        };
        Snapshot {
            error: false,
            node: usage(9_000_000_000, 4096),
            pods: vec![PodUsage {
                namespace: "d".into(),
                name: "p".into(),
                uid: "u".into(),
                id: "sandbox".into(),
                usage: usage(2_500_000_000, 7),
                processes: Some(3),
                interfaces: vec![Interface {
                    name: "eth0".into(),
                    received_bytes: Some(11),
                    ..Interface::default()
                }],
            }],
            containers: vec![ContainerUsage {
                namespace: "d".into(),
                pod: "p".into(),
                name: "c".into(),
                id: "container".into(),
                image: "busybox:1".into(),
                started: Some(1_699_999_999.25),
                usage: usage(1_250_000_000, 5),
                layer: Some((4096, Some(2))),
            }],
        }
    }

    #[test]
    fn the_text_is_the_kubelets() {
        let text = encode(&shot());
        for line in [
            "# TYPE container_cpu_usage_seconds_total counter",
            "container_cpu_usage_seconds_total{container=\"c\",namespace=\"d\",pod=\"p\"} 1.25 1700000000123",
            "container_memory_working_set_bytes{container=\"c\",namespace=\"d\",pod=\"p\"} 5 1700000000456",
            "container_start_time_seconds{container=\"c\",namespace=\"d\",pod=\"p\"} 1699999999.25",
            "node_cpu_usage_seconds_total 9 1700000000123",
            "node_memory_working_set_bytes 4096 1700000000456",
            "pod_cpu_usage_seconds_total{namespace=\"d\",pod=\"p\"} 2.5 1700000000123",
            "pod_memory_working_set_bytes{namespace=\"d\",pod=\"p\"} 7 1700000000456",
            "resource_scrape_error 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn nothing_measured_is_nothing_said_but_the_error() {
        let text = encode(&Snapshot { error: true, ..Snapshot::default() });
        assert_eq!(text.lines().count(), 3);
        assert!(text.ends_with("resource_scrape_error 1\n"));
    }

    #[test]
    fn the_summary_names_the_pod() {
        let body = summary("n", &shot());
        assert_eq!(body["node"]["nodeName"], "n");
        assert_eq!(body["pods"][0]["podRef"]["uid"], "u");
        assert_eq!(body["pods"][0]["containers"][0]["cpu"]["usageCoreNanoSeconds"], 1_250_000_000_u64);
        assert_eq!(body["pods"][0]["containers"][0]["cpu"]["time"], "2023-11-14T22:13:20Z");
    }
}
