//! `/metrics/cadvisor`: what pods and containers use, under the names and labels that cAdvisor has in a kubelet. Dashboards and the
//! usual Prometheus rules read these.
//!
//! A pod as a whole has `container=""`; `name` is the CRI id. A figure that the agent does not measure is left out.

use super::{
    resource::{ContainerUsage, Interface, Labels, PodUsage, Snapshot, Usage, family},
    text::{Kind, Text},
};

/// One pod or container with its labels.
struct Row<'a> {
    labels: Labels,
    usage: &'a Usage,
}

fn of_container(c: &ContainerUsage) -> Labels {
    vec![
        ("container", c.name.clone()),
        ("id", format!("/kubepods/{}", c.id)),
        ("image", c.image.clone()),
        ("name", c.id.clone()),
        ("namespace", c.namespace.clone()),
        ("pod", c.pod.clone()),
    ]
}

fn of_pod(p: &PodUsage) -> Labels {
    vec![
        ("container", String::new()),
        ("id", format!("/kubepods/pod{}", p.uid)),
        ("image", String::new()),
        ("name", p.id.clone()),
        ("namespace", p.namespace.clone()),
        ("pod", p.name.clone()),
    ]
}

fn with(mut labels: Labels, label: &'static str, value: &str) -> Labels {
    labels.push((label, value.to_owned()));
    labels
}

fn millis(ns: i64) -> Option<i64> {
    Some(ns / 1_000_000)
}

/// The text of `/metrics/cadvisor`.
pub(crate) fn encode(shot: &Snapshot) -> String {
    let mut text = Text::default();
    let rows: Vec<Row<'_>> = shot
        .containers
        .iter()
        .map(|c| Row { labels: of_container(c), usage: &c.usage })
        .chain(shot.pods.iter().map(|p| Row { labels: of_pod(p), usage: &p.usage }))
        .collect();
    usage(&mut text, &rows);
    layers(&mut text, shot);
    network(&mut text, shot);
    let processes = shot.pods.iter().filter_map(|p| Some((of_pod(p), p.processes? as f64, None)));
    family(
        &mut text,
        "container_threads",
        Kind::Gauge,
        "Number of threads running inside the container",
        processes,
    );
    let starts = shot.containers.iter().filter_map(|c| Some((of_container(c), c.started?, None)));
    let help = "Start time of the container since unix epoch in seconds.";
    family(&mut text, "container_start_time_seconds", Kind::Gauge, help, starts);
    let failed = f64::from(u8::from(shot.error));
    let help = "1 if there was an error while getting container metrics, 0 otherwise";
    let error = std::iter::once((Vec::new(), failed, None));
    family(&mut text, "container_scrape_error", Kind::Gauge, help, error);
    text.finish()
}

fn usage(text: &mut Text, rows: &[Row<'_>]) {
    let cpu = rows.iter().filter_map(|r| {
        let (ns, at) = r.usage.cpu?;
        Some((with(r.labels.clone(), "cpu", "total"), ns as f64 / 1e9, millis(at)))
    });
    let help = "Cumulative cpu time consumed in seconds.";
    family(text, "container_cpu_usage_seconds_total", Kind::Counter, help, cpu);
    type Figure = fn(&Usage) -> Option<u64>;
    let figures: [(&str, &str, Figure); 3] = [
        ("container_memory_working_set_bytes", "Current working set in bytes.", |u| u.memory.map(|(b, _)| b)),
        (
            "container_memory_usage_bytes",
            "Current memory usage in bytes, including all memory regardless of when it was accessed",
            |u| u.memory_all,
        ),
        ("container_memory_rss", "Size of RSS in bytes.", |u| u.memory_rss),
    ];
    for (name, help, figure) in figures {
        let samples = rows.iter().filter_map(|r| {
            let at = r.usage.memory.and_then(|(_, at)| millis(at));
            Some((r.labels.clone(), figure(r.usage)? as f64, at))
        });
        family(text, name, Kind::Gauge, help, samples);
    }
}

/// Writable layers of containers.
fn layers(text: &mut Text, shot: &Snapshot) {
    let device = |c| with(of_container(c), "device", "rootfs");
    let bytes = shot.containers.iter().filter_map(|c| Some((device(c), c.layer?.0 as f64, None)));
    let help = "Number of bytes that are consumed by the container on this filesystem.";
    family(text, "container_fs_usage_bytes", Kind::Gauge, help, bytes);
}

/// Interfaces of pods.
fn network(text: &mut Text, shot: &Snapshot) {
    type Figure = fn(&Interface) -> Option<u64>;
    let figures: [(&str, &str, Figure); 4] = [
        ("container_network_receive_bytes_total", "Cumulative count of bytes received", |i| i.received_bytes),
        (
            "container_network_receive_errors_total",
            "Cumulative count of errors encountered while receiving",
            |i| i.received_errors,
        ),
        ("container_network_transmit_bytes_total", "Cumulative count of bytes transmitted", |i| i.sent_bytes),
        (
            "container_network_transmit_errors_total",
            "Cumulative count of errors encountered while transmitting",
            |i| i.sent_errors,
        ),
    ];
    for (name, help, figure) in figures {
        let samples = shot.pods.iter().flat_map(|p| {
            p.interfaces
                .iter()
                .filter_map(move |i| Some((with(of_pod(p), "interface", &i.name), figure(i)? as f64, None)))
        });
        family(text, name, Kind::Counter, help, samples);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::resource::tests::shot;

    #[test]
    fn names_and_labels_are_cadvisors() {
        let text = encode(&shot());
        let (container, pod) = (
            r#"container="c",id="/kubepods/container",image="busybox:1",name="container",namespace="d",pod="p""#,
            r#"container="",id="/kubepods/podu",image="",name="sandbox",namespace="d",pod="p""#,
        );
        for line in [
            format!("container_cpu_usage_seconds_total{{{container},cpu=\"total\"}} 1.25 1700000000123"),
            format!("container_cpu_usage_seconds_total{{{pod},cpu=\"total\"}} 2.5 1700000000123"),
            format!("container_memory_working_set_bytes{{{container}}} 5 1700000000456"),
            format!("container_memory_usage_bytes{{{pod}}} 8 1700000000456"),
            format!("container_fs_usage_bytes{{{container},device=\"rootfs\"}} 4096"),
            format!("container_network_receive_bytes_total{{{pod},interface=\"eth0\"}} 11"),
            format!("container_threads{{{pod}}} 3"),
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("container_memory_rss"), "what is not measured is left out");
        assert!(!text.contains("transmit"), "{text}");
    }
}
