//! Refuse, never ignore: the fields of a pod that this node cannot honour, by name. A field at its default is never refused.
//!
//! docs/support.md lists every field; a test keeps the two together.

use k8s_openapi::api::core::v1::{
    Container, Pod, PodSecurityContext, SeccompProfile, SecurityContext, Volume,
};

/// Sysctls that are safe in a pod of its own network and IPC namespaces.
const SAFE_SYSCTLS: [&str; 10] = [
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

/// The fields of a pod that keep it from being run here; none where it can be run.
pub(crate) fn refusals(pod: &Pod) -> Vec<String> {
    let mut out = Refusals::default();
    let Some(spec) = &pod.spec else { return out.0 };
    out.when(spec.host_network == Some(true), "spec.hostNetwork");
    out.when(spec.host_pid == Some(true), "spec.hostPID");
    out.when(spec.host_ipc == Some(true), "spec.hostIPC");
    out.when(spec.host_users == Some(false), "spec.hostUsers");
    out.when(spec.share_process_namespace == Some(true), "spec.shareProcessNamespace");
    out.when(some(spec.ephemeral_containers.as_ref()), "spec.ephemeralContainers");
    out.when(some(spec.resource_claims.as_ref()), "spec.resourceClaims");
    out.when(text(spec.runtime_class_name.as_ref()), "spec.runtimeClassName");
    out.when(spec.os.as_ref().is_some_and(|o| o.name != "linux"), "spec.os.name");
    out.when(
        spec.resources.as_ref().is_some_and(|r| r.limits.is_some() || r.requests.is_some()),
        "spec.resources",
    );
    if let Some(security) = &spec.security_context {
        pod_security(&mut out, security);
    }
    for volume in spec.volumes.iter().flatten() {
        out.when(!supported_volume(volume), format!("spec.volumes[{}].{}", volume.name, volume_kind(volume)));
        for part in volume.projected.iter().flat_map(|p| p.sources.iter().flatten()) {
            out.when(
                part.cluster_trust_bundle.is_some(),
                format!("spec.volumes[{}].projected.clusterTrustBundle", volume.name),
            );
            out.when(
                part.pod_certificate.is_some(),
                format!("spec.volumes[{}].projected.podCertificate", volume.name),
            );
        }
        let medium = volume.empty_dir.as_ref().and_then(|d| d.medium.as_deref()).unwrap_or_default();
        out.when(!matches!(medium, "" | "Memory"), format!("spec.volumes[{}].emptyDir.medium", volume.name));
    }
    for c in spec.init_containers.iter().flatten() {
        let place = format!("spec.initContainers[{}]", c.name);
        out.when(text(c.restart_policy.as_ref()), format!("{place}.restartPolicy"));
        container(&mut out, c, &place);
    }
    for c in &spec.containers {
        let place = format!("spec.containers[{}]", c.name);
        out.when(
            c.restart_policy.as_ref().is_some_and(|p| Some(p) != spec.restart_policy.as_ref()),
            format!("{place}.restartPolicy"),
        );
        container(&mut out, c, &place);
    }
    out.0
}

fn pod_security(out: &mut Refusals, s: &PodSecurityContext) {
    let at = "spec.securityContext";
    out.when(s.windows_options.is_some(), format!("{at}.windowsOptions"));
    out.when(s.se_linux_options.is_some(), format!("{at}.seLinuxOptions"));
    out.when(
        s.app_armor_profile.as_ref().is_some_and(|p| p.type_ == "Localhost"),
        format!("{at}.appArmorProfile"),
    );
    out.when(localhost(s.seccomp_profile.as_ref()), format!("{at}.seccompProfile"));
    for sysctl in s.sysctls.iter().flatten() {
        out.when(!SAFE_SYSCTLS.contains(&sysctl.name.as_str()), format!("{at}.sysctls[{}]", sysctl.name));
    }
}

fn localhost(profile: Option<&SeccompProfile>) -> bool {
    profile.is_some_and(|p| !matches!(p.type_.as_str(), "RuntimeDefault" | "Unconfined"))
}

fn security(out: &mut Refusals, s: &SecurityContext, at: &str) {
    out.when(s.privileged == Some(true), format!("{at}.privileged"));
    out.when(
        s.proc_mount.as_deref().is_some_and(|p| !matches!(p, "" | "Default")),
        format!("{at}.procMount"),
    );
    out.when(s.windows_options.is_some(), format!("{at}.windowsOptions"));
    out.when(s.se_linux_options.is_some(), format!("{at}.seLinuxOptions"));
    out.when(
        s.app_armor_profile.as_ref().is_some_and(|p| p.type_ == "Localhost"),
        format!("{at}.appArmorProfile"),
    );
    out.when(localhost(s.seccomp_profile.as_ref()), format!("{at}.seccompProfile"));
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
    for port in c.ports.iter().flatten() {
        out.when(port.host_port.is_some_and(|p| p != 0), format!("{at}.ports.hostPort"));
    }
    for mount in c.volume_mounts.iter().flatten() {
        let at = format!("{at}.volumeMounts[{}]", mount.mount_path);
        out.when(text(mount.sub_path.as_ref()), format!("{at}.subPath"));
        out.when(text(mount.sub_path_expr.as_ref()), format!("{at}.subPathExpr"));
        out.when(
            mount.mount_propagation.as_deref().is_some_and(|p| !matches!(p, "" | "None")),
            format!("{at}.mountPropagation"),
        );
        out.when(mount.recursive_read_only.as_deref() == Some("Enabled"), format!("{at}.recursiveReadOnly"));
    }
    for variable in c.env.iter().flatten() {
        let from_file = variable.value_from.as_ref().is_some_and(|f| f.file_key_ref.is_some());
        out.when(from_file, format!("{at}.env[{}].valueFrom.fileKeyRef", variable.name));
    }
    if let Some(r) = &c.resources {
        out.when(some(r.claims.as_ref()), format!("{at}.resources.claims"));
        for name in r.limits.iter().chain(&r.requests).flat_map(|m| m.keys()) {
            let known = matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage");
            out.when(!known, format!("{at}.resources[{name}]"));
        }
    }
    if let Some(s) = &c.security_context {
        security(out, s, &format!("{at}.securityContext"));
    }
}

fn supported_volume(v: &Volume) -> bool {
    v.empty_dir.is_some()
        || v.config_map.is_some()
        || v.secret.is_some()
        || v.downward_api.is_some()
        || v.projected.is_some()
}

/// The kind of a volume, by its field's name.
fn volume_kind(v: &Volume) -> String {
    let value = serde_json::to_value(v).unwrap_or_default();
    let kind = value.as_object().into_iter().flatten().map(|(k, _)| k.clone()).find(|k| k != "name");
    kind.unwrap_or_else(|| "emptyDir".into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use serde_json::{Value, json};

    use super::*;

    fn refused(spec: Value, container: Value) -> Vec<String> {
        let mut spec = spec;
        let mut own = json!({"name": "c", "image": "i"});
        own.as_object_mut().unwrap().extend(container.as_object().unwrap().clone());
        spec["containers"] = json!([own]);
        refusals(&serde_json::from_value(json!({"spec": spec})).unwrap())
    }

    #[test]
    fn defaults_of_the_api_are_never_refused() {
        let spec = json!({
            "hostNetwork": false, "hostPID": false, "hostIPC": false, "hostUsers": true, "shareProcessNamespace": false,
            "os": {"name": "linux"}, "restartPolicy": "Always", "securityContext": {}, "enableServiceLinks": true,
            "volumes": [{"name": "v", "emptyDir": {}}]
        });
        let container = json!({
            "lifecycle": {}, "resources": {}, "securityContext": {"privileged": false, "procMount": "Default"},
            "ports": [{"containerPort": 80, "hostPort": 0}],
            "volumeMounts": [{"name": "v", "mountPath": "/v", "mountPropagation": "None", "subPath": ""}]
        });
        assert_eq!(refused(spec, container), Vec::<String>::new());
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
                "spec.containers[c].resources[hugepages-2Mi]",
            ),
        ] {
            assert_eq!(refused(spec, container), [want]);
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
