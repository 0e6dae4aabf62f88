//! Start, stop, shutdown, reboot, suspend, resume. What is refused at once and what fails only in the task is as in
//! PVE::API2::LXC::Status.

use std::sync::Arc;

use super::{Call, check_lock, is_running, text};
use crate::{
    answer::{Answered, Refusal},
    api::ha,
    backend::{Ct, Mount, MountSource, RunState, Stop},
    config::Storage,
    guest::{CtConf, VolumeKind, mount_points},
    sim::Sim,
    tasks::TaskLog,
};

/// `skiplock` is root@pam's alone.
fn check_skiplock(call: &Call) -> Answered<bool> {
    let asked = call.flag("skiplock");
    if asked && !call.caller.is_root() {
        return Err(Refusal::parameter("skiplock", "Only root may use this option."));
    }
    Ok(asked)
}

pub(super) async fn start(call: &Call) -> Answered {
    let (node, vmid) = (call.node()?.to_owned(), call.vmid()?);
    let skiplock = check_skiplock(call)?;
    call.sim.load_conf(&node, vmid)?;
    if is_running(call).await? {
        return Err(Refusal::died(format!("CT {vmid} already running")));
    }
    call.sim.cfs.check_quorum()?;
    if ha::is_managed(&call.sim, vmid)? {
        return ha_request(call, "hastart", "started");
    }
    let sim = Arc::clone(&call.sim);
    call.fork(&node.clone(), "vzstart", &vmid.to_string(), |log| async move {
        let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await.map_err(text)?;
        start_locked(&sim, &node, vmid, skiplock, &log).await
    })
}

/// PVE::LXC::vm_start, with the CT's lock held.
pub(super) async fn start_locked(
    sim: &Sim,
    node: &str,
    vmid: u32,
    skiplock: bool,
    log: &TaskLog,
) -> Result<(), String> {
    let mut conf = sim.load_conf(node, vmid).map_err(text)?;
    if !skiplock {
        check_lock(&conf)?;
    }
    if conf.flag("template") {
        return Err("you can't start a CT if it's a template".into());
    }
    if sim.backend.state(node, vmid).await.map_err(|e| e.to_string())?.is_running() {
        return Err(format!("CT {vmid} already running"));
    }
    if conf.apply_pending() {
        sim.write_conf(node, vmid, &conf).map_err(text)?;
    }
    let mounts = activate_volumes(sim, node, &conf)?;
    sim.backend.start(Ct { node, vmid, conf: &conf }, &mounts, log).await.map_err(|e| e.to_string())
}

/// The storages of a CT's volumes can be reached; what is to be mounted where, the root first.
fn activate_volumes(sim: &Sim, node: &str, conf: &CtConf) -> Result<Vec<Mount>, String> {
    let mut mounts = Vec::new();
    for point in mount_points(conf) {
        let source = match &point.kind {
            VolumeKind::Storage { storage, volume } => {
                let known = sim.storage(node, storage).map_err(text)?;
                subvolume(&known, volume)
                    .ok_or_else(|| format!("storage '{storage}' does not support subvolumes"))?
            }
            VolumeKind::Bind(dir) | VolumeKind::Device(dir) => MountSource::Dir(dir.clone()),
        };
        let option = |name: &str| point.options.get(name).map(String::as_str);
        mounts.push(Mount {
            source,
            target: if point.key == "rootfs" { String::new() } else { option("mp").unwrap_or("").to_owned() },
            read_only: option("ro") == Some("1"),
            passthrough: option("idmap") == Some("passthrough"),
        });
    }
    Ok(mounts)
}

/// A volume and its place, as `PVE::Storage::ZFSPoolPlugin::path` has it: by storage.cfg alone.
fn subvolume(storage: &Storage, volume: &str) -> Option<MountSource> {
    let pool = storage.pool.as_ref()?;
    let place = storage.mountpoint.as_ref().map_or_else(|| format!("/{pool}"), |p| p.display().to_string());
    Some(MountSource::Subvolume { dataset: format!("{pool}/{volume}"), path: format!("{place}/{volume}") })
}

/// On an HA-managed CT the task ends when the request is queued.
fn ha_request(call: &Call, kind: &str, state: &'static str) -> Answered {
    let (node, vmid) = (call.node()?.to_owned(), call.vmid()?);
    let sim = Arc::clone(&call.sim);
    let caller = call.caller.clone();
    call.fork(&node.clone(), kind, &vmid.to_string(), |log| async move {
        log.line(&format!(
            "Requesting HA {} for CT {vmid}",
            if state == "started" { "start" } else { "stop" }
        ));
        ha::request_state(&sim, &node, vmid, state, &caller).await.map_err(text)
    })
}

pub(super) async fn stop(call: &Call) -> Answered {
    let (node, vmid) = (call.node()?.to_owned(), call.vmid()?);
    let skiplock = check_skiplock(call)?;
    call.sim.load_conf(&node, vmid)?;
    if !is_running(call).await? {
        return Err(Refusal::died(format!("CT {vmid} not running")));
    }
    if ha::is_managed(&call.sim, vmid)? {
        return ha_request(call, "hastop", "stopped");
    }
    if call.flag("overrule-shutdown") {
        for task in call.sim.tasks.list(&node) {
            if task.end.is_none() && task.upid.kind == "vzshutdown" && task.upid.id == vmid.to_string() {
                call.sim.tasks.cancel(&task.upid.text);
            }
        }
    }
    let sim = Arc::clone(&call.sim);
    call.fork(&node.clone(), "vzstop", &vmid.to_string(), |log| async move {
        stop_with_lock(&sim, &node, vmid, skiplock, Stop::Kill, &log).await
    })
}

async fn stop_with_lock(
    sim: &Sim,
    node: &str,
    vmid: u32,
    skiplock: bool,
    how: Stop,
    log: &TaskLog,
) -> Result<(), String> {
    let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await.map_err(text)?;
    let conf = sim.load_conf(node, vmid).map_err(text)?;
    if !skiplock {
        check_lock(&conf)?;
    }
    sim.backend.stop(node, vmid, how, log).await.map_err(|e| e.to_string())?;
    apply_pending(sim, node, vmid)
}

/// What waits for a stop is put in force.
fn apply_pending(sim: &Sim, node: &str, vmid: u32) -> Result<(), String> {
    let mut conf = sim.load_conf(node, vmid).map_err(text)?;
    if conf.apply_pending() {
        sim.write_conf(node, vmid, &conf).map_err(text)?;
    }
    Ok(())
}

pub(super) async fn shutdown(call: &Call) -> Answered {
    let (node, vmid) = (call.node()?.to_owned(), call.vmid()?);
    call.sim.load_conf(&node, vmid)?;
    if !is_running(call).await? {
        return Err(Refusal::died(format!("CT {vmid} not running")));
    }
    if ha::is_managed(&call.sim, vmid)? {
        return ha_request(call, "hashutdown", "stopped");
    }
    let seconds = call.integer("timeout").and_then(|t| u64::try_from(t).ok()).unwrap_or(60);
    let how = Stop::Shutdown { seconds, then_kill: call.flag("forceStop") };
    let sim = Arc::clone(&call.sim);
    call.fork(&node.clone(), "vzshutdown", &vmid.to_string(), |log| async move {
        stop_with_lock(&sim, &node, vmid, false, how, &log).await
    })
}

pub(super) async fn reboot(call: &Call) -> Answered {
    let (node, vmid) = (call.node()?.to_owned(), call.vmid()?);
    call.sim.load_conf(&node, vmid)?;
    if !is_running(call).await? {
        return Err(Refusal::died(format!("VM {vmid} not running")));
    }
    let seconds = call.integer("timeout").and_then(|t| u64::try_from(t).ok()).unwrap_or(60);
    let sim = Arc::clone(&call.sim);
    call.fork(&node.clone(), "vzreboot", &vmid.to_string(), |log| async move {
        let how = Stop::Shutdown { seconds, then_kill: true };
        stop_with_lock(&sim, &node, vmid, false, how, &log).await?;
        let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await.map_err(text)?;
        start_locked(&sim, &node, vmid, false, &log).await
    })
}

pub(super) async fn freeze(call: &Call, frozen: bool) -> Answered {
    let (node, vmid) = (call.node()?.to_owned(), call.vmid()?);
    call.sim.load_conf(&node, vmid)?;
    if !is_running(call).await? {
        return Err(Refusal::died(format!("CT {vmid} not running")));
    }
    let sim = Arc::clone(&call.sim);
    let kind = if frozen { "vzsuspend" } else { "vzresume" };
    call.fork(&node.clone(), kind, &vmid.to_string(), |_| async move {
        let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await.map_err(text)?;
        let conf = sim.load_conf(&node, vmid).map_err(text)?;
        if frozen {
            check_lock(&conf)?;
        }
        sim.backend.freeze(&node, vmid, frozen).await.map_err(|e| e.to_string())
    })
}

/// Stops all CTs of a host, as it does before it goes down: each gets the seconds of `startup: down=`, 180 without.
pub(in crate::api) async fn stop_all(call: &Call) -> Answered {
    let node = call.node()?.to_owned();
    let sim = Arc::clone(&call.sim);
    let force = call.integer("force-stop") != Some(0);
    let longest = call.integer("timeout").and_then(|t| u64::try_from(t).ok()).unwrap_or(180);
    call.fork(&node.clone(), "stopall", "", |log| async move {
        for (vmid, on) in sim.vmlist().map_err(|e| e.to_string())? {
            let running = sim.backend.state(&on, vmid).await.is_ok_and(RunState::is_running);
            if on != node || !running {
                continue;
            }
            let conf = sim.load_conf(&node, vmid).map_err(text)?;
            let down = conf
                .get("startup")
                .and_then(|s| s.split(',').find_map(|p| p.strip_prefix("down=")?.parse().ok()));
            let seconds = down.unwrap_or(longest);
            log.line(&format!("Stopping CT {vmid} (timeout = {seconds} seconds)"));
            let how = Stop::Shutdown { seconds, then_kill: force };
            if let Err(why) = stop_with_lock(&sim, &node, vmid, true, how, &log).await {
                log.warn(&format!("CT {vmid} not stopped: {why}"));
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_volume_is_looked_for_where_storage_cfg_says() {
        let mut storage: Storage =
            toml::from_str("name = 'z'\ntype = 'zfspool'\ncontent = ['rootdir']\npool = 'rpool/data'")
                .unwrap();
        let place = |storage: &Storage| match subvolume(storage, "subvol-100-disk-0") {
            Some(MountSource::Subvolume { dataset, path }) => (dataset, path),
            other => (format!("{other:?}"), String::new()),
        };
        let dataset = "rpool/data/subvol-100-disk-0".to_owned();
        assert_eq!(place(&storage), (dataset.clone(), "/rpool/data/subvol-100-disk-0".to_owned()));
        storage.mountpoint = Some("/mnt/cts".into());
        assert_eq!(place(&storage), (dataset, "/mnt/cts/subvol-100-disk-0".to_owned()));
        storage.pool = None;
        assert!(subvolume(&storage, "subvol-100-disk-0").is_none());
    }
}
