//! The start of an agent: what the ledger says meets what the host has. Running CTs are taken over as they are, half-made
//! and half-removed things are removed, and what belongs to no sandbox of the ledger goes.

use std::{collections::BTreeSet, fs, sync::Arc, time::Duration};

use moxlet_ids::{ContainerId, SandboxId};
use moxlet_init_proto::{Status, client::Client};
use moxlet_sandbox::SandboxState;
use tracing::{info, warn};

use crate::{
    again, containers,
    core::{Container, Core, Sandbox, blocking},
    error::{Error, Result, chain},
    ledger::Phase,
    sandboxes, watch,
};

/// How long an init that runs may take to answer before it is taken over without its hello.
const HELLO: Duration = Duration::from_secs(5);

/// Loads the ledger and brings the host in line with it.
///
/// # Errors
/// A ledger that cannot be read: to guess would be to lose a pod. What else goes wrong is logged and tried again, removals in the
/// background, the rest at the next start.
pub(crate) async fn recover(core: &Arc<Core>) -> Result<()> {
    let ledger = core.ledger.clone();
    let (sandboxes, containers) = blocking("reading the ledger", move || ledger.load()).await?;
    for record in sandboxes {
        core.insert_sandbox(Sandbox::new(record));
    }
    for record in containers {
        if core.sandbox(record.sandbox.as_str()).is_ok() {
            core.insert_container(Container::new(record));
        } else {
            core.ledger.remove_container(&record.id)?;
        }
    }
    strays(core).await;
    let all = core.sandboxes().into_iter().map(|sandbox| async move {
        if let Err(error) = sandbox_again(core, &sandbox).await {
            if matches!(sandbox.phase(), Phase::Creating | Phase::Removing) {
                warn!(sandbox = %sandbox.id, error = chain(&error), "a sandbox is not wholly removed; it is tried again");
                return again::sandbox(core, &sandbox);
            }
            warn!(sandbox = %sandbox.id, error = chain(&error), "a sandbox is not wholly recovered; the next start tries again");
        }
    });
    futures::future::join_all(all).await;
    Ok(())
}

async fn sandbox_again(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Result<()> {
    let guard = sandbox.change.lock().await;
    if matches!(sandbox.phase(), Phase::Creating | Phase::Removing) {
        info!(sandbox = %sandbox.id, "removing a sandbox that was half made or half removed");
        if waits(core) {
            again::sandbox(core, sandbox);
            return Ok(());
        }
        return sandboxes::remove_parts(core, sandbox).await;
    }
    match core.engine.state(&sandbox.id).await? {
        Some(SandboxState::Running { .. }) if sandbox.phase() == Phase::Ready => {
            let socket = sandboxes::shared_dir(core, &sandbox.id).join("run/init.sock");
            let client = match Client::connect(&socket, HELLO).await {
                Ok(client) => client,
                Err(error) => {
                    warn!(sandbox = %sandbox.id, %error, "the init of a running CT does not answer; it is asked again");
                    Client::new(&socket)
                }
            };
            sandbox.set_client(Some(client));
        }
        state => {
            // Its CT ended while nobody looked; or a stop was cut short and is finished now.
            if matches!(state, Some(SandboxState::Running { .. })) {
                core.engine.stop(&sandbox.id, Duration::from_secs(3)).await?;
            }
            sandboxes::ended(core, sandbox).await?;
            core.network.detach(&sandbox.id).await?;
        }
    }
    for container in core.containers_of(&sandbox.id) {
        let record = container.record();
        if !record.created || !record.started {
            info!(container = %container.id, "removing a container that was not started");
            containers::remove_parts(core, sandbox, &container).await?;
        }
    }
    if let Ok(client) = sandbox.client() {
        containers_again(core, sandbox, &client).await?;
        drop(guard);
        watch::spawn(core, sandbox);
    }
    Ok(())
}

/// What the init knows of its containers, before anybody can ask: one that ran on must not look like one that never started.
async fn containers_again(core: &Arc<Core>, sandbox: &Arc<Sandbox>, client: &Client) -> Result<()> {
    let Ok(known) = sandbox.answer("list", HELLO, client.list()).await else { return Ok(()) };
    let names: BTreeSet<String> = known.iter().map(|c| c.id.clone()).collect();
    for state in known {
        match core.container(&state.id) {
            Ok(container) if state.status == Status::Created => {
                let cut = Error::State("the agent ended while the container was being started".into());
                containers::not_started(core, sandbox, &container, &cut).await?;
            }
            _ => containers::reported(core, sandbox, state).await?,
        }
    }
    for container in core.containers_of(&sandbox.id) {
        if !names.contains(container.id.as_str()) {
            containers::lost(core, sandbox, &container).await?;
        }
    }
    Ok(())
}

/// Whether nothing is removed before pods are taken over: each removal would wait in vain for an engine with a fault.
fn waits(core: &Core) -> bool {
    core.engine.fault().is_some()
}

/// Removes what no sandbox or container of the ledger owns.
async fn strays(core: &Arc<Core>) {
    let sandboxes: BTreeSet<SandboxId> = core.sandboxes().iter().map(|s| s.id.clone()).collect();
    let containers: BTreeSet<ContainerId> = core.containers().iter().map(|c| c.id.clone()).collect();
    let mut found: BTreeSet<SandboxId> = BTreeSet::new();
    match core.engine.list().await {
        Ok(all) => found.extend(all.into_iter().map(|s| s.id)),
        Err(error) => warn!(error = chain(&error), "cannot list the CTs"),
    }
    if let Ok(entries) = fs::read_dir(&core.pods_dir) {
        found.extend(entries.flatten().filter_map(|e| e.file_name().to_str()?.parse::<SandboxId>().ok()));
    }
    match core.network.attached().await {
        Ok(all) => found.extend(all),
        Err(error) => warn!(error = chain(&error), "cannot list the pods' addresses"),
    }
    for id in found.difference(&sandboxes) {
        info!(sandbox = %id, "removing what is left of a sandbox");
        if waits(core) {
            again::stray(core, id.clone());
            continue;
        }
        if let Err(error) = sandboxes::remove_stray(core, id).await {
            warn!(sandbox = %id, error = chain(&error), "not wholly removed; it is tried again");
            again::stray(core, id.clone());
        }
    }
    let roots = match core.driver.roots().await {
        Ok(roots) => roots,
        Err(error) => return warn!(error = chain(&error), "cannot list the containers' roots"),
    };
    for id in roots.into_iter().filter(|id| !containers.contains(id)) {
        info!(container = %id, "removing the root of a container that is gone");
        if let Err(error) = core.driver.remove_root(&id).await {
            warn!(container = %id, error = chain(&error), "not removed; the next start tries again");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use moxlet_sandbox::fake::{Call, FakeEngine};

    use super::*;
    use crate::{fake, ledger::SandboxRecord};

    #[tokio::test]
    async fn a_start_does_not_wait_for_an_engine_with_a_fault_to_remove_what_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(FakeEngine::default());
        let core = fake::core(dir.path(), engine.clone()).await;
        let half_made = SandboxRecord::new(SandboxId::random(), "uid-1".parse().unwrap(), 1);
        core.ledger.put_sandbox(&half_made).unwrap();
        let stray = SandboxId::random();
        fs::create_dir_all(core.pods_dir.join(stray.as_str())).unwrap();
        engine.break_down("the server is away");
        engine.refuse(Call::Delete, 2);
        recover(&core).await.unwrap();
        assert!(core.knows(&half_made.id) && core.pods_dir.join(stray.as_str()).exists());
        // Both are tried again for as long as it takes.
        core.tasks.close();
        core.tasks.wait().await;
        assert!(!core.knows(&half_made.id) && !core.pods_dir.join(stray.as_str()).exists());
        assert!(core.ledger.load().unwrap().0.is_empty());
    }
}
