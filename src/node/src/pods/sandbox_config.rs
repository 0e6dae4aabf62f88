//! What a pod's sandbox is asked to be.

use k8s_openapi::api::core::v1::Pod;
use moxlet_cri::v1;

use crate::model::{names, resources};
use crate::{
    config::Config,
    error::{Error, Result},
    volumes::hosts,
};

/// The configuration of a pod's sandbox.
///
/// # Errors
/// When its host name cannot be made.
pub(crate) fn config(
    pod: &Pod,
    attempt: u32,
    config: &Config,
    logs_dir: &str,
    overhead_memory: u64,
    resolv: &str,
) -> Result<v1::PodSandboxConfig> {
    let spec = pod.spec.clone().unwrap_or_default();
    let ports = spec.containers.iter().flat_map(|c| c.ports.iter().flatten()).map(|p| v1::PortMapping {
        protocol: match p.protocol.as_deref() {
            Some("UDP") => v1::Protocol::Udp as i32,
            Some("SCTP") => v1::Protocol::Sctp as i32,
            _ => v1::Protocol::Tcp as i32,
        },
        container_port: p.container_port,
        host_port: p.host_port.unwrap_or(0),
        host_ip: p.host_ip.clone().unwrap_or_default(),
    });
    let mut own = resources::pod_resources(pod);
    if config.pod_pids_limit > 0 {
        // CRI has no field for it; the file of cgroup v2 says it on v1 as well.
        own.unified.insert("pids.max".to_owned(), config.pod_pids_limit.to_string());
    }
    let overhead = (own.memory_limit_in_bytes > 0).then(|| v1::LinuxContainerResources {
        memory_limit_in_bytes: i64::try_from(overhead_memory).unwrap_or(0),
        ..v1::LinuxContainerResources::default()
    });
    let security = spec.security_context.unwrap_or_default();
    Ok(v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: names::name(pod).to_owned(),
            uid: names::uid(pod).to_owned(),
            namespace: names::namespace(pod).to_owned(),
            attempt,
        }),
        hostname: hosts::shown_hostname(pod, &config.cluster_domain).map_err(Error::ContainerConfig)?,
        log_directory: format!("{}/{}", logs_dir.trim_end_matches('/'), names::log_directory(pod)),
        dns_config: Some(hosts::dns(pod, config, resolv)),
        port_mappings: ports.collect(),
        labels: names::sandbox_labels(pod),
        annotations: names::sandbox_annotations(pod),
        linux: Some(v1::LinuxPodSandboxConfig {
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces()),
                seccomp: Some(v1::SecurityProfile::default()),
                supplemental_groups: security.supplemental_groups.unwrap_or_default(),
                ..v1::LinuxSandboxSecurityContext::default()
            }),
            sysctls: security.sysctls.into_iter().flatten().map(|s| (s.name, s.value)).collect(),
            resources: Some(own),
            overhead,
            ..v1::LinuxPodSandboxConfig::default()
        }),
        ..v1::PodSandboxConfig::default()
    })
}

/// Namespaces of a pod: network and IPC are shared by its containers, process ids are not.
pub(crate) fn namespaces() -> v1::NamespaceOption {
    v1::NamespaceOption {
        network: v1::NamespaceMode::Pod as i32,
        pid: v1::NamespaceMode::Container as i32,
        ipc: v1::NamespaceMode::Pod as i32,
        ..v1::NamespaceOption::default()
    }
}
