//! What a container is asked to be: a pod's container and what is known at its start become CRI's configuration.

use k8s_openapi::api::core::v1::{Container, Pod};
use moxlet_cri::{annotations, paths, v1};

use super::sandbox_config;
use crate::model::{names, resources};
use crate::{
    env,
    error::{Error, Result},
    volumes::Volumes,
};

/// What is known when a container is made.
pub(crate) struct Given<'a> {
    /// Its variables.
    pub(crate) variables: Vec<(String, String)>,
    /// The image as the agent names it.
    pub(crate) image_ref: String,
    /// The image's user, as a number or a name.
    pub(crate) image_user: (Option<i64>, String),
    /// The pod's volumes.
    pub(crate) volumes: &'a Volumes,
    /// Where `/etc/hosts` lies on the host.
    pub(crate) hosts_path: String,
    /// How many were before it.
    pub(crate) attempt: u32,
    /// Memory of the host.
    pub(crate) memory_capacity: u64,
}

fn int(value: Option<i64>) -> Option<v1::Int64Value> {
    value.map(|value| v1::Int64Value { value })
}

/// Whether the pod wants no root, and then whether this container would be root.
fn check_non_root(pod: &Pod, container: &Container, image: &(Option<i64>, String)) -> Result<bool> {
    let own = container.security_context.as_ref();
    let of_pod = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let non_root = own.and_then(|s| s.run_as_non_root).or(of_pod.and_then(|s| s.run_as_non_root));
    if non_root != Some(true) {
        return Ok(false);
    }
    let user = own.and_then(|s| s.run_as_user).or(of_pod.and_then(|s| s.run_as_user));
    let place = format!("(pod: \"{}\", container: {})", names::full(pod), container.name);
    match (user, image) {
        (Some(0), _) => {
            Err(Error::ContainerConfig(format!("container's runAsUser breaks non-root policy {place}")))
        }
        (Some(_), _) => Ok(true),
        (None, (Some(0), _)) => Err(Error::ContainerConfig(format!(
            "container has runAsNonRoot and image will run as root {place}"
        ))),
        (None, (None, name)) if !name.is_empty() => Err(Error::ContainerConfig(format!(
            "container has runAsNonRoot and image has non-numeric user ({name}), cannot verify user is non-root {place}"
        ))),
        _ => Ok(true),
    }
}

fn security(
    pod: &Pod,
    container: &Container,
    image_user: &(Option<i64>, String),
) -> v1::LinuxContainerSecurityContext {
    let of_pod = pod.spec.as_ref().and_then(|s| s.security_context.clone()).unwrap_or_default();
    let own = container.security_context.clone().unwrap_or_default();
    let profile = own.seccomp_profile.or(of_pod.seccomp_profile);
    let unconfined = profile.is_some_and(|p| p.type_ == "Unconfined");
    let kind = if unconfined {
        v1::security_profile::ProfileType::Unconfined
    } else {
        v1::security_profile::ProfileType::RuntimeDefault
    };
    let mut groups = of_pod.supplemental_groups.unwrap_or_default();
    groups.extend(of_pod.fs_group.filter(|g| !groups.contains(g)));
    let (user, group) = (own.run_as_user.or(of_pod.run_as_user), own.run_as_group.or(of_pod.run_as_group));
    // A group needs a user beside it: the image's where none is asked for, as the kubelet has it.
    let (user, user_name) = match (user, image_user) {
        (None, (Some(uid), _)) if group.is_some() => (Some(*uid), String::new()),
        (None, (None, name)) if group.is_some() && !name.is_empty() => (None, name.clone()),
        (None, (None, _)) if group.is_some() => (Some(0), String::new()),
        (user, _) => (user, String::new()),
    };
    let caps = own.capabilities.unwrap_or_default();
    let strict = of_pod.supplemental_groups_policy.as_deref() == Some("Strict");
    v1::LinuxContainerSecurityContext {
        capabilities: Some(v1::Capability {
            add_capabilities: caps.add.unwrap_or_default(),
            drop_capabilities: caps.drop.unwrap_or_default(),
            ..v1::Capability::default()
        }),
        namespace_options: Some(sandbox_config::namespaces()),
        run_as_user: int(user),
        run_as_username: user_name,
        run_as_group: int(group),
        readonly_rootfs: own.read_only_root_filesystem == Some(true),
        supplemental_groups: groups,
        supplemental_groups_policy: i32::from(strict),
        no_new_privs: own.allow_privilege_escalation == Some(false),
        masked_paths: paths::MASKED.map(str::to_owned).to_vec(),
        readonly_paths: paths::READ_ONLY.map(str::to_owned).to_vec(),
        seccomp: Some(v1::SecurityProfile { profile_type: kind as i32, localhost_ref: String::new() }),
        ..v1::LinuxContainerSecurityContext::default()
    }
}

/// Whether the kubelet writes what is in a volume: no container may then.
fn is_written_here(pod: &Pod, name: &str) -> bool {
    let volume = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten()).find(|v| v.name == name);
    volume.is_some_and(|v| {
        v.config_map.is_some() || v.secret.is_some() || v.downward_api.is_some() || v.projected.is_some()
    })
}

/// A container's mounts of the pod's volumes; `host_path` says where a volume lies on the host.
fn mounts<'a>(
    pod: &Pod,
    container: &Container,
    host_path: impl Fn(&str) -> Option<&'a str>,
) -> Result<Vec<v1::Mount>> {
    let mut mounts = Vec::new();
    for mount in container.volume_mounts.iter().flatten() {
        let host_path = host_path(&mount.name).ok_or_else(|| {
            Error::ContainerConfig(format!(
                "cannot find volume \"{}\" to mount into container \"{}\"",
                mount.name, container.name
            ))
        })?;
        let absolute = if mount.mount_path.starts_with('/') {
            mount.mount_path.clone()
        } else {
            format!("/{}", mount.mount_path)
        };
        mounts.push(v1::Mount {
            container_path: absolute,
            host_path: host_path.to_owned(),
            readonly: mount.read_only == Some(true) || is_written_here(pod, &mount.name),
            ..v1::Mount::default()
        });
    }
    Ok(mounts)
}

/// A container's configuration.
///
/// # Errors
/// What the kubelet calls `CreateContainerConfigError`.
pub(crate) fn config(pod: &Pod, container: &Container, given: Given<'_>) -> Result<v1::ContainerConfig> {
    let security = security(pod, container, &given.image_user);
    let mut notes = names::container_annotations(pod, container, given.attempt);
    notes.insert(annotations::TERMINATION_MESSAGE_PATH.to_owned(), names::message_path(container).to_owned());
    notes.insert(
        annotations::OOM_SCORE_ADJ.to_owned(),
        resources::oom_score_adj(pod, container, given.memory_capacity).to_string(),
    );
    if check_non_root(pod, container, &given.image_user)? {
        notes.insert(annotations::RUN_AS_NON_ROOT.to_owned(), "true".to_owned());
    }
    let mut mounts = mounts(pod, container, |name| given.volumes.host_path(name))?;
    let own_hosts = mounts.iter().any(|m| m.container_path == "/etc/hosts");
    if !own_hosts {
        mounts.push(v1::Mount {
            container_path: "/etc/hosts".into(),
            host_path: given.hosts_path,
            ..v1::Mount::default()
        });
    }
    Ok(v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: container.name.clone(), attempt: given.attempt }),
        image: Some(v1::ImageSpec {
            image: given.image_ref,
            user_specified_image: container.image.clone().unwrap_or_default(),
            ..v1::ImageSpec::default()
        }),
        command: env::arguments(container.command.as_ref(), &given.variables),
        args: env::arguments(container.args.as_ref(), &given.variables),
        working_dir: container.working_dir.clone().unwrap_or_default(),
        envs: given
            .variables
            .into_iter()
            .map(|(key, value)| v1::KeyValue { key, value: value.into() })
            .collect(),
        mounts,
        labels: names::container_labels(pod, container),
        annotations: notes,
        log_path: names::log_file(&container.name, given.attempt),
        stdin: container.stdin == Some(true),
        stdin_once: container.stdin_once == Some(true),
        tty: container.tty == Some(true),
        linux: Some(v1::LinuxContainerConfig {
            resources: Some(resources::container_resources(container)),
            security_context: Some(security),
        }),
        ..v1::ContainerConfig::default()
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use serde_json::{Value, json};

    use super::*;

    fn pod(spec: &Value) -> (Pod, Container) {
        let pod: Pod = serde_json::from_value(json!({"spec": spec})).unwrap();
        let container = pod.spec.as_ref().unwrap().containers[0].clone();
        (pod, container)
    }

    #[test]
    fn what_the_node_writes_is_mounted_read_only() {
        let mount = |name: &str| json!({"name": name, "mountPath": format!("/{name}"), "readOnly": false});
        let (pod, container) = pod(&json!({
            "volumes": [
                {"name": "map", "configMap": {"name": "x"}},
                {"name": "secret", "secret": {"secretName": "x"}},
                {"name": "downward", "downwardAPI": {}},
                {"name": "projected", "projected": {"sources": []}},
                {"name": "own", "emptyDir": {}},
                {"name": "asked", "emptyDir": {}},
            ],
            "containers": [{"name": "c", "volumeMounts": [
                mount("map"), mount("secret"), mount("downward"), mount("projected"), mount("own"),
                {"name": "asked", "mountPath": "asked", "readOnly": true},
            ]}],
        }));
        let made = mounts(&pod, &container, |_| Some("/somewhere")).unwrap();
        let writable: Vec<_> =
            made.iter().filter(|m| !m.readonly).map(|m| m.container_path.as_str()).collect();
        assert_eq!((made.len(), writable), (6, vec!["/own"]));
        assert_eq!(made[5].container_path, "/asked");
        let error = mounts(&pod, &container, |_| None).unwrap_err().to_string();
        assert!(error.contains("cannot find volume \"map\""), "{error}");
    }

    #[test]
    fn a_group_goes_with_the_images_user_where_no_user_is_asked_for() {
        let (pod, container) =
            pod(&json!({"securityContext": {"runAsGroup": 3000}, "containers": [{"name": "c"}]}));
        for (image, want) in [
            ((Some(1000), ""), (Some(1000), "")),
            ((None, "nginx"), (None, "nginx")),
            ((None, ""), (Some(0), "")),
        ] {
            let got = security(&pod, &container, &(image.0, image.1.to_owned()));
            assert_eq!((got.run_as_user.map(|v| v.value), got.run_as_username.as_str()), want);
            assert_eq!(got.run_as_group.map(|v| v.value), Some(3000));
        }
        let plain = security(&Pod::default(), &Container::default(), &(Some(1000), String::new()));
        assert!(plain.run_as_user.is_none(), "the agent takes the image's user and group");
    }
}
