//! `CreateContainer`: all of a container that is made before its start: record, root, mounts, OCI spec.
//!
//! What the host mounts below the pod's directory appears in the running CT (the directory is a shared mount there), so
//! everything of a container is put there: its root at `ctr/<id>/rootfs`, each mount at `mnt/<id>/<n>`.

use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use moxlet_cri::{annotations, v1};
use moxlet_errors::chain;
use moxlet_ids::ContainerId;
use moxlet_image::{ImageConfig, ImageHold, ImageRecord};
use moxlet_init_proto::CreateRequest;
use moxlet_sandbox::{POD_DIR_IN_CT, cgroup::ContainerCgroups};
use moxlet_storage::RootOptions;
use tracing::warn;

use super::{
    Containers,
    mounts::{self, Making},
};
use crate::{
    beneath,
    clock::now_ns,
    error::{Error, Result},
    ledger::{ContainerRecord, MountRecord, SandboxPhase},
    limits, signals,
    spec::{self, SpecInput},
    state::{Container, Prepared, Sandbox},
    tasks::blocking,
};

impl Containers {
    /// `CreateContainer`.
    pub(crate) async fn create(self: &Arc<Self>, request: v1::CreateContainerRequest) -> Result<ContainerId> {
        let sandbox = self.state.sandbox(&request.pod_sandbox_id)?;
        let config = request.config.ok_or_else(|| Error::Invalid("the container has no config".into()))?;
        let of_pod = request.sandbox_config.unwrap_or_default();
        let own = self.clone();
        self.tasks
        .whole(async move {
            let _guard = sandbox.change.lock().await;
            if sandbox.phase() != SandboxPhase::Ready {
                return Err(Error::State(format!("sandbox {} is not ready", sandbox.id)));
            }
            let (record, hold) = own.record(&sandbox, &config).await?;
            let container = Container::new(record);
            own.state.change_container(&container, |_| {}).await?;
            own.state.insert_container(container.clone());
            match own.make(&sandbox, &container, &config, &of_pod, hold.record()).await {
                Ok(()) => {
                    own.events.send(container.id.as_str(), &sandbox, v1::ContainerEventType::ContainerCreatedEvent);
                    Ok(container.id.clone())
                }
                Err(error) => {
                    if let Err(second) = own.remove_parts(&sandbox, &container).await {
                        warn!(container = %container.id, error = chain(&second), "a failed container is not wholly removed; the next start tries again");
                    }
                    Err(error)
                }
            }
        })
        .await
    }

    /// The record of a new container and its image, which is held until the container's root stands on it.
    ///
    /// # Errors
    /// The image is not here, or the name with this attempt is taken.
    async fn record(
        &self,
        sandbox: &Sandbox,
        config: &v1::ContainerConfig,
    ) -> Result<(ContainerRecord, ImageHold)> {
        let meta =
            config.metadata.clone().ok_or_else(|| Error::Invalid("the container has no metadata".into()))?;
        let wanted = config.image.clone().unwrap_or_default();
        let hold = self.images.hold(&wanted.image).await?;
        let hold = hold.ok_or_else(|| Error::NotFound(format!("image {:?}", wanted.image)))?;
        let image = hold.record();
        let of_sandbox = self.state.containers_of(&sandbox.id);
        if let Some(other) =
            of_sandbox.iter().map(|c| c.record()).find(|c| c.name == meta.name && c.attempt == meta.attempt)
        {
            return Err(Error::State(format!(
                "container {} has name {:?} and attempt {} already",
                other.id, meta.name, meta.attempt
            )));
        }
        let mut record =
            ContainerRecord::new(ContainerId::random(), sandbox.id.clone(), image.id.clone(), now_ns());
        record.name = meta.name;
        record.attempt = meta.attempt;
        record.user_image = if wanted.user_specified_image.is_empty() {
            wanted.image.clone()
        } else {
            wanted.user_specified_image
        };
        record.image = wanted.image;
        record.image_ref = image.repo_digests.first().cloned().unwrap_or_else(|| image.id.to_string());
        record.labels = config.labels.clone().into_iter().collect();
        record.annotations = config.annotations.clone().into_iter().collect();
        record.tty = config.tty;
        record.stdin = config.stdin;
        record.stop_signal = signals::of_container(config, &image.config)?;
        let resources = config.linux.as_ref().and_then(|l| l.resources.as_ref());
        if let Some(resources) = resources {
            record.memory_limit = limits::of_container(resources).memory_bytes;
            record.resources = limits::of_new(resources, self.cgroups.is_v1())?;
        }
        if let (Some(dir), false) = (sandbox.record().log_directory, config.log_path.is_empty()) {
            let path = beneath::relative(&config.log_path).map_err(|_| {
                Error::Invalid(format!("log_path {:?} is no plain relative path", config.log_path))
            })?;
            record.log_file = Some(dir.join(path));
        }
        record.mounts = config
            .mounts
            .iter()
            .map(|m| MountRecord {
                host_path: m.host_path.clone(),
                container_path: m.container_path.clone(),
                read_only: m.readonly,
            })
            .collect();
        Ok((record, hold))
    }

    /// Makes root, mounts and spec; the container can be started then.
    ///
    /// # Errors
    /// Whatever cannot be made; the caller removes the rest.
    async fn make(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        container: &Arc<Container>,
        config: &v1::ContainerConfig,
        of_pod: &v1::PodSandboxConfig,
        image: &ImageRecord,
    ) -> Result<()> {
        let (id, map) = (&container.id, self.settings.map);
        let shared = self.dirs.pod(&sandbox.id);
        let rootfs = shared.join("ctr").join(id.as_str()).join("rootfs");
        let options = RootOptions { map, quota_bytes: self.settings.root_quota };
        self.driver.create_root(id, &image.layers, options).await?;
        let dir = shared.clone();
        let name = id.clone();
        blocking(move || make_dirs(&dir, &name)).await?;
        self.driver.mount_root(id, &rootfs).await?;

        let prepared = {
            let (own, sandbox, id) = (self.clone(), sandbox.clone(), id.clone());
            let (config, of_pod, image, record) =
                (config.clone(), of_pod.clone(), image.config.clone(), container.record());
            blocking(move || {
                let making =
                    Making { own: &own, sandbox: &sandbox, id: &id, shared: &shared, rootfs: &rootfs };
                prepared(&making, &config, &of_pod, &image, &record)
            })
            .await?
        };
        let user = serde_json::from_value(prepared.request.spec["process"]["user"].clone()).ok();
        container.set_prepared(prepared);
        self.state
            .change_container(container, |r| {
                r.created = true;
                r.user = user;
            })
            .await
    }
}

fn make_dirs(shared: &Path, id: &ContainerId) -> Result<()> {
    for path in [shared.join("ctr").join(id.as_str()), shared.join("mnt").join(id.as_str())] {
        match fs::DirBuilder::new().mode(0o711).create(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::io(format!("cannot make {}", path.display()), e));
            }
            _ => {}
        }
    }
    Ok(())
}

fn prepared(
    making: &Making<'_>,
    config: &v1::ContainerConfig,
    of_pod: &v1::PodSandboxConfig,
    image: &ImageConfig,
    record: &ContainerRecord,
) -> Result<Prepared> {
    let Making { own, sandbox, id, rootfs, .. } = making;
    let map = own.settings.map;
    let mounts = mounts::all(making, config, image)?;
    let hostname = sandbox.record().hostname;
    let rootfs_ct = format!("{POD_DIR_IN_CT}/ctr/{id}/rootfs");
    let spec = spec::build(&SpecInput {
        container_id: id,
        config,
        sandbox: of_pod,
        image,
        rootfs_host: rootfs,
        rootfs_ct: &rootfs_ct,
        mounts: &mounts,
        cgroup_path: Some(&ContainerCgroups::path_in_ct(id)),
        cgroup_v1: own.cgroups.is_v1(),
        hostname: &hostname,
        map,
    })?;
    if let Some(cwd) = spec.process().as_ref().and_then(|process| process.cwd().to_str()) {
        mounts::make_cwd(rootfs, cwd, map)?;
    }
    let log_path = match &record.log_file {
        Some(_) => {
            mounts::make_log_dir(sandbox.record().log_directory.as_deref(), &config.log_path)?;
            Some(PathBuf::from(format!("{POD_DIR_IN_CT}/logs/{}", config.log_path)))
        }
        None => None,
    };
    let resources = config.linux.as_ref().and_then(|l| l.resources.clone()).unwrap_or_default();
    let noted = config.annotations.get(annotations::OOM_SCORE_ADJ).and_then(|v| v.parse().ok());
    let asked = i32::try_from(resources.oom_score_adj).ok().filter(|adj| *adj != 0);
    Ok(Prepared {
        limits: limits::of_container(&resources),
        oom_score_adj: noted.or(asked),
        request: CreateRequest {
            id: id.to_string(),
            spec: serde_json::to_value(&spec)
                .map_err(|e| Error::Invalid(format!("the container's OCI spec: {e}")))?,
            log_path,
            log_max_bytes: own.settings.log_max_bytes,
            log_max_files: own.settings.log_max_files,
            tty: config.tty,
            stdin: config.stdin,
            stdin_once: config.stdin_once,
            stop_signal: record.stop_signal,
        },
    })
}
