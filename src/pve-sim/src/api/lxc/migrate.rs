//! Migration: stop and start only, refused before the CT is touched when a bind mount is not shared.

use std::sync::Arc;

use serde_json::json;

use super::{Call, check_lock, is_running, power, text};
use crate::{
    answer::{Answered, Refusal},
    backend::Stop,
    guest::{CtConf, Volume, VolumeKind, mount_points},
    sim::Sim,
    tasks::TaskLog,
};

pub(super) async fn precondition(call: &Call) -> Answered {
    let (node, vmid) = (call.node()?, call.vmid()?);
    call.sim.load_conf(node, vmid)?;
    let nodes: Vec<&str> =
        call.sim.config.hosts.iter().map(|h| h.name.as_str()).filter(|n| *n != node).collect();
    let running = i32::from(is_running(call).await?);
    Ok(json!({ "running": running, "allowed-nodes": nodes, "not-allowed-nodes": {}, "dependent-ha-resources": [] }).into())
}

pub(super) async fn migrate(call: &Call) -> Answered {
    let (node, vmid) = (call.node()?.to_owned(), call.vmid()?);
    let target = call.needed("target")?.to_owned();
    if target == node {
        return Err(Refusal::parameter("target", "target is local node."));
    }
    call.sim.cfs.check_quorum()?;
    if call.sim.config.host(&target).is_none() {
        return Err(Refusal::parameter("target", format!("no such cluster node '{target}'")));
    }
    if call.sim.faults.is_offline(&target) {
        return Err(Refusal::died(format!("node '{target}' is offline")));
    }
    call.sim.load_conf(&node, vmid)?;
    let running = is_running(call).await?;
    if running && !call.flag("online") && !call.flag("restart") {
        return Err(Refusal::died("can't migrate running container without --online or --restart"));
    }
    let seconds = call.integer("timeout").and_then(|t| u64::try_from(t).ok()).unwrap_or(180);
    let restart = call.flag("restart");
    let sim = Arc::clone(&call.sim);
    call.fork(&node.clone(), "vzmigrate", &vmid.to_string(), |log| async move {
        let outcome = run(&sim, &node, &target, vmid, restart, seconds, &log).await;
        if outcome.is_err() {
            log.line("ERROR: migration aborted (duration 00:00:00)");
        }
        outcome
    })
}

/// Refuses what cannot be moved, before anything is stopped: PVE::LXC::Migrate::prepare.
fn prepare(conf: &CtConf) -> Result<Vec<Volume>, String> {
    check_lock(conf)?;
    let points = mount_points(conf);
    for point in &points {
        if point.kind_name() != "volume" && !point.is_shared() {
            return Err(format!("cannot migrate local {} mount point '{}'", point.kind_name(), point.key));
        }
    }
    Ok(points)
}

async fn run(
    sim: &Sim,
    node: &str,
    target: &str,
    vmid: u32,
    restart: bool,
    seconds: u64,
    log: &TaskLog,
) -> Result<(), String> {
    let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await.map_err(text)?;
    let conf = sim.load_conf(node, vmid).map_err(text)?;
    let points = prepare(&conf)?;
    let was_running = sim.backend.state(node, vmid).await.map_err(|e| e.to_string())?.is_running();
    if was_running {
        if !restart {
            return Err("lxc live migration is currently not implemented".into());
        }
        log.line(&format!("shutdown CT {vmid}"));
        let how = Stop::Shutdown { seconds, then_kill: true };
        sim.backend.stop(node, vmid, how, log).await.map_err(|e| e.to_string())?;
    }
    log.line(&format!("starting migration of CT {vmid} to node '{target}'"));
    for point in points {
        let VolumeKind::Storage { storage, volume } = &point.kind else { continue };
        let from = sim.storage(node, storage).map_err(text)?;
        let to = sim.storage(target, storage).map_err(text)?;
        if !from.shared {
            log.line(&format!("found local volume '{storage}:{volume}' (in current VM config)"));
            move_volume(sim, (node, &from), (target, &to), volume, vmid, point.size().unwrap_or(4 << 30))
                .await?;
        }
    }
    sim.backend.forget(node, vmid).await.map_err(|e| e.to_string())?;
    sim.cfs.rename(&Sim::conf_name(node, vmid), &Sim::conf_name(target, vmid)).map_err(text)?;
    if was_running {
        log.line(&format!("start container on target node '{target}'"));
        power::start_locked(sim, target, vmid, false, log).await?;
    }
    log.line("migration finished successfully (duration 00:00:00)");
    Ok(())
}

/// Hosts of one machine share its pool: there the volume is on the target already.
async fn move_volume(
    sim: &Sim,
    from: (&str, &crate::config::Storage),
    to: (&str, &crate::config::Storage),
    volume: &str,
    vmid: u32,
    size: u64,
) -> Result<(), String> {
    let there = sim.backend.volumes(to.0, to.1).await.map_err(|e| e.to_string())?;
    if there.iter().any(|v| v.name == volume) {
        return Ok(());
    }
    sim.backend.create_volume(to.0, to.1, vmid, size).await.map_err(|e| e.to_string())?;
    sim.backend.destroy_volume(from.0, from.1, volume).await.map_err(|e| e.to_string())
}
