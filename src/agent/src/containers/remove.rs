//! `RemoveContainer`: all that a container had goes, its record in the ledger last.

use std::{
    fs,
    path::{Component, Path},
    sync::Arc,
};

use moxlet_cri::v1;
use moxlet_errors::chain;
use moxlet_ids::ContainerId;
use moxlet_init_proto::ErrorClass;
use moxlet_storage::mounts;
use rustix::fs::AtFlags;
use tracing::debug;

use super::{ANSWER, Containers, KILLED};
use crate::{
    beneath,
    engine::not_held,
    error::{Error, Result},
    ledger::ContainerRecord,
    signals::KILL,
    state::{Container, Sandbox},
    tasks::blocking,
};

/// How often a killed container is asked whether it can be removed.
const REMOVE_PAUSE: std::time::Duration = std::time::Duration::from_millis(50);

impl Containers {
    /// `RemoveContainer`; one that runs is killed. Of an unknown one: nothing, as CRI asks.
    pub(crate) async fn remove(self: &Arc<Self>, id: &str) -> Result<()> {
        let Ok(container) = self.state.container(id) else { return Ok(()) };
        let sandbox = self.state.sandbox(container.sandbox.as_str())?;
        let own = self.clone();
        self.tasks
            .whole(async move {
                not_held(&*own.engine, &sandbox.id).await?;
                own.stop(container.id.as_str(), 0).await?;
                let _guard = sandbox.change.lock().await;
                own.remove_parts(&sandbox, &container).await
            })
            .await
    }

    /// Removes a container that the init runs and the ledger does not know, its log apart: whoever wanted it makes it anew.
    ///
    /// # Errors
    /// What could not be removed.
    pub(crate) async fn remove_unknown(&self, sandbox: &Arc<Sandbox>, id: &ContainerId) -> Result<()> {
        let client = sandbox.client()?;
        let killed = async {
            let _ = client.signal(id.as_str(), KILL, true).await;
            while let Err(error) = client.remove(id.as_str()).await {
                if !matches!(error.class(), Some(ErrorClass::InvalidState)) {
                    break;
                }
                tokio::time::sleep(REMOVE_PAUSE).await;
            }
            Ok(())
        };
        sandbox.answer("remove", KILLED, killed).await?;
        let shared = self.dirs.pod(&sandbox.id);
        self.driver.unmount_root(id, &shared.join("ctr").join(id.as_str()).join("rootfs")).await?;
        self.driver.remove_root(id).await?;
        let (cgroups, of, id) = (self.cgroups.clone(), sandbox.id.clone(), id.clone());
        blocking(move || {
            cgroups.remove(&of, &id)?;
            remove_files(&shared, &id)
        })
        .await
    }

    /// Removes all of a container, its line in the ledger last. The caller holds the sandbox; it may be repeated.
    pub(crate) async fn remove_parts(
        &self,
        sandbox: &Arc<Sandbox>,
        container: &Arc<Container>,
    ) -> Result<()> {
        let id = container.id.clone();
        if let Ok(client) = sandbox.client() {
            let remove = async || sandbox.answer("remove", ANSWER, client.remove(id.as_str())).await;
            match remove().await {
                Err(e) if matches!(e.class(), Some(ErrorClass::InvalidState)) => {
                    let killed = client.signal(id.as_str(), KILL, true);
                    let _ = sandbox.answer("signal", ANSWER, killed).await;
                    let _ = tokio::time::timeout(KILLED, container.ended()).await;
                    remove().await?;
                }
                Err(e) if e.class().is_none() => {
                    // The CT is on its way out; what is the host's is removed all the same.
                    debug!(container = %id, error = chain(&e), "the init does not answer");
                }
                _ => {}
            }
        }
        let shared = self.dirs.pod(&sandbox.id);
        let target = shared.join("ctr").join(id.as_str());
        self.driver.unmount_root(&id, &target.join("rootfs")).await?;
        self.images.used(&container.record().image_id).await?;
        self.driver.remove_root(&id).await?;
        let (cgroups, of, record) = (self.cgroups.clone(), sandbox.id.clone(), container.record());
        blocking(move || {
            cgroups.remove(&of, &record.id)?;
            remove_files(&shared, &record.id)?;
            remove_log(&record)
        })
        .await?;
        self.state.remove_container(container).await?;
        self.events.send(id.as_str(), sandbox, v1::ContainerEventType::ContainerDeletedEvent);
        Ok(())
    }
}

/// A container's mounts and files below the pod's directory.
fn remove_files(shared: &Path, id: &ContainerId) -> Result<()> {
    let id = id.as_str();
    let gone = |path: &Path, done: std::io::Result<()>| match done {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("cannot remove {}", path.display()), e))
        }
        _ => Ok(()),
    };
    let mounted = shared.join("mnt").join(id);
    mounts::unmount_all_below(&mounted)?;
    // Only mount points of ours are in there; the directories belong to the host.
    gone(&mounted, fs::remove_dir_all(&mounted))?;
    let target = shared.join("ctr").join(id);
    gone(&target, fs::remove_dir_all(&target))?;
    let message = shared.join("term").join(id);
    gone(&message, fs::remove_file(&message))?;
    // The CT's root writes in the directory of the records: no link of it is followed.
    if let Ok(state) = beneath::open_dir(&shared.join("state")) {
        let _ = rustix::fs::unlinkat(&state, format!("{id}.json"), AtFlags::empty());
    }
    Ok(())
}

/// Removes the log with what was rotated away of it. Its directory stays: others of the pod have their logs in it, and it goes with the
/// pod's.
fn remove_log(record: &ContainerRecord) -> Result<()> {
    let Some(file) = &record.log_file else { return Ok(()) };
    let (Some(dir), Some(name)) = (file.parent(), file.file_name().and_then(|n| n.to_str())) else {
        return Ok(());
    };
    let failed = |e: std::io::Error| Error::io(format!("cannot remove the log {}", file.display()), e);
    let Some(base) = dir.parent() else { return Ok(()) };
    let below = dir.components().next_back().filter(|c| matches!(c, Component::Normal(_)));
    let Some(below) = below.map(|c| c.as_os_str().to_owned()) else { return Ok(()) };
    let base = match beneath::open_dir(base) {
        Ok(base) => base,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(e)),
    };
    let Ok(opened) = beneath::open_dir_below(&base, Path::new(&below)) else { return Ok(()) };
    for entry in rustix::fs::Dir::read_from(&opened).map_err(|e| failed(e.into()))? {
        let entry = entry.map_err(|e| failed(e.into()))?;
        let found = entry.file_name().to_string_lossy();
        if found == name || found.strip_prefix(name).is_some_and(|rest| rest.starts_with('.')) {
            let _ = rustix::fs::unlinkat(&opened, entry.file_name(), AtFlags::empty());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::net::UnixListener;

    use moxlet_ids::SandboxId;
    use moxlet_init_proto::client::Client;
    use moxlet_sandbox::fake::FakeEngine;

    use super::*;
    use crate::{fake, ledger::SandboxRecord, state::RunState};

    #[test]
    fn the_logs_of_other_containers_stay_where_they_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let logs = dir.path().join("main");
        fs::create_dir(&logs).unwrap();
        let image = format!("sha256:{}", "0".repeat(64)).parse().unwrap();
        let mut record = ContainerRecord::new(ContainerId::random(), SandboxId::random(), image, 1);
        record.log_file = Some(logs.join("0.log"));
        for name in ["0.log", "0.log.20261130-000000.1", "1.log", "0.logs"] {
            fs::write(logs.join(name), "").unwrap();
        }
        remove_log(&record).unwrap();
        let left = || {
            let entries = fs::read_dir(&logs).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
            entries.collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(left(), ["0.logs".to_owned(), "1.log".to_owned()].into());
        fs::remove_file(logs.join("0.logs")).unwrap();
        fs::remove_file(logs.join("1.log")).unwrap();
        remove_log(&record).unwrap();
        assert!(logs.exists(), "the next container of the name writes there");
    }

    #[tokio::test]
    async fn a_container_of_a_ct_that_somebody_holds_is_neither_stopped_nor_removed() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(FakeEngine::default());
        let (rooms, _work) = fake::rooms(dir.path(), engine.clone()).await;
        let socket = dir.path().join("init.sock");
        let init = UnixListener::bind(&socket).unwrap();
        init.set_nonblocking(true).unwrap();
        let sandbox = Sandbox::new(SandboxRecord::new(SandboxId::random(), "uid-1".parse().unwrap(), 1));
        sandbox.set_client(Some(Client::new(&socket)));
        rooms.state.insert_sandbox(sandbox.clone());
        let image = format!("sha256:{}", "0".repeat(64)).parse().unwrap();
        let record = ContainerRecord::new(ContainerId::random(), sandbox.id.clone(), image, 1);
        let container = Container::new(record);
        rooms.state.insert_container(container.clone());
        engine.hold(&sandbox.id, Some("backup"));
        let id = container.id.as_str();
        for state in [RunState::Created, RunState::Running { started_at_ns: 1 }] {
            container.state.send_replace(state);
            let error = rooms.containers.remove(id).await.unwrap_err();
            assert!(matches!(&error, Error::Held { by, .. } if by == "backup"), "{error}");
        }
        let error = rooms.containers.stop(id, 30).await.unwrap_err();
        assert!(error.to_string().contains("backup"), "{error}");
        assert_eq!(init.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "no signal was sent");
        assert!(rooms.state.container(id).is_ok());
        container.state.send_replace(RunState::Created);
        engine.hold(&sandbox.id, None);
        sandbox.set_client(None);
        rooms.containers.remove(id).await.unwrap();
        assert!(rooms.state.container(id).is_err());
    }
}
