//! Refuse, never ignore: the fields of a pod that this node cannot honour, by name. A field at its default is never refused.
//!
//! docs/support.md lists every field; the tests in `docs` keep the two together.

#[cfg(test)]
mod docs;

use k8s_openapi::api::core::v1::{
    AppArmorProfile, Container, Pod, PodSecurityContext, ResourceRequirements, SeccompProfile,
    SecurityContext, Volume,
};

use crate::model::resources;
use crate::pods::admission::Rejection;

/// Ids that a CT has: 0 to one less. Files and processes of an id beyond them cannot be.
const IDS: i64 = 65_536;
/// The longest name that Linux takes for a host.
const MAX_HOSTNAME: usize = 63;
/// Capabilities that act on the host as a whole: no CT has them. The agent has the same list.
const HOST_ONLY: [&str; 5] = ["SYS_MODULE", "SYS_RAWIO", "SYS_TIME", "MAC_OVERRIDE", "MAC_ADMIN"];
/// Sources of a volume that this node makes.
const VOLUMES: [&str; 5] = ["emptyDir", "configMap", "secret", "downwardAPI", "projected"];

/// Sysctls that are safe in a pod of its own network and IPC namespaces.
const SAFE_SYSCTLS: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
];

#[derive(Default)]
struct Refusals(Vec<String>);

impl Refusals {
    fn when(&mut self, refused: bool, field: impl Into<String>) {
        if refused {
            self.0.push(field.into());
        }
    }
}

fn some<T>(list: Option<&Vec<T>>) -> bool {
    list.is_some_and(|l| !l.is_empty())
}

fn text(value: Option<&String>) -> bool {
    value.is_some_and(|v| !v.is_empty())
}

/// Whether something is set in it.
fn filled<T: Default + PartialEq>(value: Option<&T>) -> bool {
    value.is_some_and(|v| *v != T::default())
}

/// Whether a value is set and none of these.
fn other_than(value: Option<&String>, known: &[&str]) -> bool {
    value.is_some_and(|v| !v.is_empty() && !known.contains(&v.as_str()))
}

fn beyond(id: Option<i64>) -> bool {
    id.is_some_and(|id| !(0..IDS).contains(&id))
}

/// Why a pod is failed and not only kept waiting, as a kubelet does: `status.reason` and `status.message`.
pub(crate) fn rejection(pod: &Pod) -> Option<Rejection> {
    let spec = pod.spec.as_ref()?;
    if spec.os.as_ref().is_some_and(|os| os.name != "linux") {
        let message = "Failed to admit pod as the OS field doesn't match node OS".to_owned();
        return Some(Rejection { reason: "PodOSNotSupported", message });
    }
    let sysctls = spec.security_context.iter().flat_map(|s| s.sysctls.iter().flatten());
    let forbidden = sysctls.map(|s| &s.name).find(|name| !SAFE_SYSCTLS.contains(&name.as_str()))?;
    let message = format!("forbidden sysctl: {forbidden:?} not allowlisted");
    Some(Rejection { reason: "SysctlForbidden", message })
}

/// What of a pod is not honoured though the pod itself runs: a container of `kubectl debug` is added to a running pod, which it must
/// not harm. Its status says so.
pub(crate) fn left_out(pod: &Pod) -> Option<&'static str> {
    let spec = pod.spec.as_ref()?;
    some(spec.ephemeral_containers.as_ref()).then_some("spec.ephemeralContainers")
}

/// The fields of a pod that keep it from being run here; none where it can be run.
pub(crate) fn refusals(pod: &Pod) -> Vec<String> {
    let mut out = Refusals::default();
    let Some(spec) = &pod.spec else { return out.0 };
    out.when(spec.host_network == Some(true), "spec.hostNetwork");
    out.when(spec.host_pid == Some(true), "spec.hostPID");
    out.when(spec.host_ipc == Some(true), "spec.hostIPC");
    out.when(spec.host_users == Some(false), "spec.hostUsers");
    out.when(spec.share_process_namespace == Some(true), "spec.shareProcessNamespace");
    out.when(some(spec.resource_claims.as_ref()), "spec.resourceClaims");
    out.when(text(spec.runtime_class_name.as_ref()), "spec.runtimeClassName");
    out.when(spec.os.as_ref().is_some_and(|o| o.name != "linux"), "spec.os.name");
    out.when(
        spec.hostname_override.as_ref().is_some_and(|n| n.len() > MAX_HOSTNAME),
        "spec.hostnameOverride",
    );
    let of_pod = spec
        .resources
        .iter()
        .any(|r| some(r.claims.as_ref()) || r.limits.iter().chain(&r.requests).any(|map| !map.is_empty()));
    out.when(of_pod, "spec.resources");
    if let Some(security) = &spec.security_context {
        pod_security(&mut out, security);
    }
    for v in spec.volumes.iter().flatten() {
        volume(&mut out, v);
    }
    for c in spec.init_containers.iter().flatten() {
        let place = format!("spec.initContainers[{}]", c.name);
        out.when(text(c.restart_policy.as_ref()), format!("{place}.restartPolicy"));
        container(&mut out, c, &place);
    }
    let policy = spec.restart_policy.as_deref().filter(|p| !p.is_empty()).unwrap_or("Always");
    for c in &spec.containers {
        let place = format!("spec.containers[{}]", c.name);
        out.when(other_than(c.restart_policy.as_ref(), &[policy]), format!("{place}.restartPolicy"));
        container(&mut out, c, &place);
    }
    out.0
}

fn volume(out: &mut Refusals, v: &Volume) {
    let at = format!("spec.volumes[{}]", v.name);
    let value = serde_json::to_value(v).unwrap_or_default();
    let sources: Vec<_> =
        value.as_object().into_iter().flatten().map(|(k, _)| k).filter(|k| *k != "name").collect();
    out.when(sources.is_empty(), format!("{at} without a source"));
    for source in sources {
        out.when(!VOLUMES.contains(&source.as_str()), format!("{at}.{source}"));
    }
    for part in v.projected.iter().flat_map(|p| p.sources.iter().flatten()) {
        let at = format!("{at}.projected.sources");
        out.when(part.cluster_trust_bundle.is_some(), format!("{at}.clusterTrustBundle"));
        out.when(part.pod_certificate.is_some(), format!("{at}.podCertificate"));
    }
    if let Some(dir) = &v.empty_dir {
        out.when(other_than(dir.medium.as_ref(), &["Memory"]), format!("{at}.emptyDir.medium"));
        // A tmpfs has a size; a directory on disk has none that could be kept.
        let limited = dir.size_limit.as_ref().and_then(|q| resources::milli(&q.0)).is_some_and(|m| m > 0);
        out.when(limited && dir.medium.as_deref() != Some("Memory"), format!("{at}.emptyDir.sizeLimit"));
    }
}

fn pod_security(out: &mut Refusals, s: &PodSecurityContext) {
    let at = "spec.securityContext";
    out.when(beyond(s.run_as_user), format!("{at}.runAsUser"));
    out.when(beyond(s.run_as_group), format!("{at}.runAsGroup"));
    out.when(beyond(s.fs_group), format!("{at}.fsGroup"));
    let groups = s.supplemental_groups.iter().flatten().any(|g| beyond(Some(*g)));
    out.when(groups, format!("{at}.supplementalGroups"));
    out.when(filled(s.windows_options.as_ref()), format!("{at}.windowsOptions"));
    out.when(filled(s.se_linux_options.as_ref()), format!("{at}.seLinuxOptions"));
    out.when(app_armor(s.app_armor_profile.as_ref()), format!("{at}.appArmorProfile"));
    out.when(seccomp(s.seccomp_profile.as_ref()), format!("{at}.seccompProfile"));
    for sysctl in s.sysctls.iter().flatten() {
        out.when(!SAFE_SYSCTLS.contains(&sysctl.name.as_str()), format!("{at}.sysctls[{}]", sysctl.name));
    }
}

/// A profile of the host cannot be had, and that of the CT cannot be taken off.
fn app_armor(profile: Option<&AppArmorProfile>) -> bool {
    profile.is_some_and(|p| p.type_ != "RuntimeDefault")
}

fn seccomp(profile: Option<&SeccompProfile>) -> bool {
    profile.is_some_and(|p| !matches!(p.type_.as_str(), "RuntimeDefault" | "Unconfined"))
}

fn security(out: &mut Refusals, s: &SecurityContext, at: &str) {
    out.when(s.privileged == Some(true), format!("{at}.privileged"));
    out.when(other_than(s.proc_mount.as_ref(), &["Default"]), format!("{at}.procMount"));
    out.when(beyond(s.run_as_user), format!("{at}.runAsUser"));
    out.when(beyond(s.run_as_group), format!("{at}.runAsGroup"));
    out.when(filled(s.windows_options.as_ref()), format!("{at}.windowsOptions"));
    out.when(filled(s.se_linux_options.as_ref()), format!("{at}.seLinuxOptions"));
    out.when(app_armor(s.app_armor_profile.as_ref()), format!("{at}.appArmorProfile"));
    out.when(seccomp(s.seccomp_profile.as_ref()), format!("{at}.seccompProfile"));
    for name in s.capabilities.iter().flat_map(|c| c.add.iter().flatten()) {
        let upper = name.to_ascii_uppercase();
        let plain = upper.strip_prefix("CAP_").unwrap_or(&upper);
        out.when(HOST_ONLY.contains(&plain), format!("{at}.capabilities.add[{name}]"));
    }
}

fn container(out: &mut Refusals, c: &Container, at: &str) {
    out.when(c.liveness_probe.is_some(), format!("{at}.livenessProbe"));
    out.when(c.readiness_probe.is_some(), format!("{at}.readinessProbe"));
    out.when(c.startup_probe.is_some(), format!("{at}.startupProbe"));
    if let Some(lifecycle) = &c.lifecycle {
        out.when(lifecycle.post_start.is_some(), format!("{at}.lifecycle.postStart"));
        out.when(lifecycle.pre_stop.is_some(), format!("{at}.lifecycle.preStop"));
        out.when(text(lifecycle.stop_signal.as_ref()), format!("{at}.lifecycle.stopSignal"));
    }
    out.when(some(c.volume_devices.as_ref()), format!("{at}.volumeDevices"));
    out.when(some(c.restart_policy_rules.as_ref()), format!("{at}.restartPolicyRules"));
    for rule in c.resize_policy.iter().flatten() {
        let refused = rule.restart_policy != "NotRequired";
        out.when(refused, format!("{at}.resizePolicy[{}].restartPolicy", rule.resource_name));
    }
    for port in c.ports.iter().flatten() {
        // Without a port of the host its address says nothing.
        let on_host = port.host_port.is_some_and(|p| p != 0);
        out.when(on_host, format!("{at}.ports.hostPort"));
        out.when(on_host && text(port.host_ip.as_ref()), format!("{at}.ports.hostIP"));
    }
    for mount in c.volume_mounts.iter().flatten() {
        let at = format!("{at}.volumeMounts[{}]", mount.mount_path);
        out.when(text(mount.sub_path.as_ref()), format!("{at}.subPath"));
        out.when(text(mount.sub_path_expr.as_ref()), format!("{at}.subPathExpr"));
        out.when(other_than(mount.mount_propagation.as_ref(), &["None"]), format!("{at}.mountPropagation"));
        // IfPossible is met by a mount that is not: the API says so.
        out.when(
            other_than(mount.recursive_read_only.as_ref(), &["Disabled", "IfPossible"]),
            format!("{at}.recursiveReadOnly"),
        );
    }
    for variable in c.env.iter().flatten() {
        let from_file = variable.value_from.as_ref().is_some_and(|f| f.file_key_ref.is_some());
        out.when(from_file, format!("{at}.env[{}].valueFrom.fileKeyRef", variable.name));
    }
    if let Some(r) = &c.resources {
        container_resources(out, r, &format!("{at}.resources"));
    }
    if let Some(s) = &c.security_context {
        security(out, s, &format!("{at}.securityContext"));
    }
}

fn container_resources(out: &mut Refusals, r: &ResourceRequirements, at: &str) {
    out.when(some(r.claims.as_ref()), format!("{at}.claims"));
    // What a container writes to disk can be asked for (the scheduler counts it), but not limited.
    for (list, map, known) in [
        ("limits", &r.limits, &["cpu", "memory"][..]),
        ("requests", &r.requests, &["cpu", "memory", "ephemeral-storage"][..]),
    ] {
        for (name, quantity) in map.iter().flatten() {
            let nothing = resources::milli(&quantity.0) == Some(0);
            out.when(!nothing && !known.contains(&name.as_str()), format!("{at}.{list}[{name}]"));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use serde_json::{Value, json};

    use super::*;

    fn refused(mut spec: Value, container: &Value) -> Vec<String> {
        let mut own = json!({"name": "c", "image": "i"});
        own.as_object_mut().unwrap().extend(container.as_object().unwrap().clone());
        spec["containers"] = json!([own]);
        refusals(&serde_json::from_value(json!({"spec": spec})).unwrap())
    }

    #[test]
    fn defaults_of_the_api_are_never_refused() {
        let spec = json!({
            "hostNetwork": false, "hostPID": false, "hostIPC": false, "hostUsers": true, "shareProcessNamespace": false,
            "os": {"name": "linux"}, "restartPolicy": "Always", "enableServiceLinks": true, "resources": {"limits": {}},
            "securityContext": {"seLinuxOptions": {}, "windowsOptions": {}, "runAsUser": 65535, "supplementalGroups": [0]},
            "volumes": [{"name": "v", "emptyDir": {"medium": "", "sizeLimit": "0"}}]
        });
        let container = json!({
            "lifecycle": {}, "resources": {"limits": {"hugepages-2Mi": "0"}}, "restartPolicy": "Always",
            "securityContext": {"privileged": false, "procMount": "Default", "capabilities": {"add": ["SYS_ADMIN"]}},
            "ports": [{"containerPort": 80, "hostPort": 0, "hostIP": "10.0.0.1"}],
            "resizePolicy": [{"resourceName": "cpu", "restartPolicy": "NotRequired"}],
            "volumeMounts": [{"name": "v", "mountPath": "/v", "mountPropagation": "None", "subPath": "",
                "recursiveReadOnly": "Disabled"}]
        });
        assert_eq!(refused(spec, &container), Vec::<String>::new());
    }

    #[test]
    fn each_field_is_refused_by_its_name() {
        for (spec, container, want) in [
            (json!({"hostNetwork": true}), json!({}), "spec.hostNetwork"),
            (json!({"hostPID": true}), json!({}), "spec.hostPID"),
            (json!({"hostIPC": true}), json!({}), "spec.hostIPC"),
            (json!({"hostUsers": false}), json!({}), "spec.hostUsers"),
            (json!({"shareProcessNamespace": true}), json!({}), "spec.shareProcessNamespace"),
            (json!({"runtimeClassName": "x"}), json!({}), "spec.runtimeClassName"),
            (json!({"os": {"name": "windows"}}), json!({}), "spec.os.name"),
            (
                json!({"securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}}),
                json!({}),
                "spec.securityContext.sysctls[kernel.msgmax]",
            ),
            (
                json!({"volumes": [{"name": "h", "hostPath": {"path": "/"}}]}),
                json!({}),
                "spec.volumes[h].hostPath",
            ),
            (
                json!({"volumes": [{"name": "h", "persistentVolumeClaim": {"claimName": "x"}}]}),
                json!({}),
                "spec.volumes[h].persistentVolumeClaim",
            ),
            (
                json!({}),
                json!({"livenessProbe": {"tcpSocket": {"port": 1}}}),
                "spec.containers[c].livenessProbe",
            ),
            (
                json!({}),
                json!({"lifecycle": {"preStop": {"sleep": {"seconds": 1}}}}),
                "spec.containers[c].lifecycle.preStop",
            ),
            (
                json!({}),
                json!({"securityContext": {"privileged": true}}),
                "spec.containers[c].securityContext.privileged",
            ),
            (
                json!({}),
                json!({"ports": [{"containerPort": 1, "hostPort": 1}]}),
                "spec.containers[c].ports.hostPort",
            ),
            (
                json!({}),
                json!({"volumeMounts": [{"name": "v", "mountPath": "/v", "subPath": "s"}]}),
                "spec.containers[c].volumeMounts[/v].subPath",
            ),
            (
                json!({}),
                json!({"resources": {"limits": {"hugepages-2Mi": "2Mi"}}}),
                "spec.containers[c].resources.limits[hugepages-2Mi]",
            ),
            (
                json!({}),
                json!({"resources": {"limits": {"ephemeral-storage": "1Gi"}, "requests": {"ephemeral-storage": "1Gi"}}}),
                "spec.containers[c].resources.limits[ephemeral-storage]",
            ),
            (
                json!({}),
                json!({"securityContext": {"capabilities": {"add": ["NET_ADMIN", "cap_sys_time"]}}}),
                "spec.containers[c].securityContext.capabilities.add[cap_sys_time]",
            ),
            (
                json!({}),
                json!({"securityContext": {"runAsUser": 65536}}),
                "spec.containers[c].securityContext.runAsUser",
            ),
            (
                json!({"securityContext": {"supplementalGroups": [1, 70000]}}),
                json!({}),
                "spec.securityContext.supplementalGroups",
            ),
            (
                json!({"securityContext": {"appArmorProfile": {"type": "Unconfined"}}}),
                json!({}),
                "spec.securityContext.appArmorProfile",
            ),
            (
                json!({"volumes": [{"name": "e", "emptyDir": {"sizeLimit": "1Gi"}}]}),
                json!({}),
                "spec.volumes[e].emptyDir.sizeLimit",
            ),
            (
                json!({}),
                json!({"resizePolicy": [{"resourceName": "cpu", "restartPolicy": "RestartContainer"}]}),
                "spec.containers[c].resizePolicy[cpu].restartPolicy",
            ),
            (json!({"hostnameOverride": "h".repeat(64)}), json!({}), "spec.hostnameOverride"),
        ] {
            assert_eq!(refused(spec, &container), [want]);
        }
    }

    #[test]
    fn sidecars_are_refused() {
        let pod = serde_json::from_value(
            json!({"spec": {"containers": [], "initContainers": [{"name": "s", "restartPolicy": "Always"}]}}),
        )
        .unwrap();
        assert_eq!(refusals(&pod), ["spec.initContainers[s].restartPolicy"]);
    }
}
