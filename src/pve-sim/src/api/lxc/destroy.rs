//! Destroying a CT, in the order of PVE::API2::LXC: volumes, `lock: destroyed`, access rules under the cluster-wide lock
//! of user.cfg, and the config at last. A lock that is not got leaves the config with `lock: destroyed`.

use std::sync::Arc;

use super::{Call, check_lock, is_running, text};
use crate::{
    answer::{Answered, Refusal},
    api::{firewall, ha},
    backend::Stop,
    guest::{CtConf, VolumeKind, mount_points},
    sim::Sim,
    tasks::TaskLog,
};

struct Destroy {
    node: String,
    vmid: u32,
    force: bool,
    purge: bool,
    unreferenced: bool,
}

pub(super) async fn destroy(call: &Call) -> Answered {
    let work = Destroy {
        node: call.node()?.to_owned(),
        vmid: call.vmid()?,
        force: call.flag("force"),
        purge: call.flag("purge"),
        unreferenced: call.flag("destroy-unreferenced-disks"),
    };
    let sim = Arc::clone(&call.sim);
    let conf = sim.load_conf(&work.node, work.vmid)?;
    early_checks(&sim, &work, &conf).map_err(Refusal::died)?;
    if !work.force && is_running(call).await? {
        return Err(Refusal::died(still_running(work.vmid)));
    }
    let (node, id) = (work.node.clone(), work.vmid.to_string());
    call.fork(&node, "vzdestroy", &id, |log| async move { run(&sim, &work, &log).await })
}

fn still_running(vmid: u32) -> String {
    format!("unable to destroy CT {vmid} - container is running")
}

fn early_checks(sim: &Sim, work: &Destroy, conf: &CtConf) -> Result<bool, String> {
    let vmid = work.vmid;
    if conf.flag("protection") {
        return Err(format!("can't remove CT {vmid} - protection mode enabled"));
    }
    check_lock(conf)?;
    let managed = ha::is_managed(sim, vmid).map_err(text)?;
    if managed && !work.purge {
        return Err(format!(
            "unable to remove CT {vmid} - used in HA resources and purge parameter not set."
        ));
    }
    Ok(managed)
}

async fn run(sim: &Sim, work: &Destroy, log: &TaskLog) -> Result<(), String> {
    let (node, vmid) = (work.node.as_str(), work.vmid);
    let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await.map_err(text)?;
    let mut conf = sim.load_conf(node, vmid).map_err(text)?;
    let managed = early_checks(sim, work, &conf)?;
    if sim.backend.state(node, vmid).await.map_err(|e| e.to_string())?.is_running() {
        if !work.force {
            return Err(still_running(vmid));
        }
        log.line(&format!("forced to stop CT {vmid} before destroying!"));
        sim.backend.stop(node, vmid, Stop::Kill, log).await.map_err(|e| e.to_string())?;
    }
    free_volumes(sim, node, vmid, &conf, log).await?;
    if work.unreferenced {
        free_unreferenced(sim, node, vmid, log).await?;
    }
    sim.backend.forget(node, vmid).await.map_err(|e| e.to_string())?;
    // The config now says nothing but that it is to go: PVE::LXC::destroy_lxc_container.
    conf = CtConf::default();
    conf.main.values.insert("lock".into(), "destroyed".into());
    sim.write_conf(node, vmid, &conf).map_err(text)?;
    {
        let _held = sim.cfs.lock_cfs("user.cfg", sim.lock_wait()).await.map_err(text)?;
        let mut users = sim.users().map_err(|e| e.to_string())?;
        users.remove_vm_access(vmid);
        sim.cfs.write("user.cfg", &users.format()).map_err(text)?;
    }
    firewall::remove(sim, vmid).map_err(text)?;
    if work.purge {
        log.line(&format!("purging CT {vmid} from related configurations.."));
        if managed {
            ha::remove_guest(sim, vmid).await.map_err(text)?;
            log.line(&format!("NOTE: removed CT {vmid} from HA resource configuration."));
        }
    }
    sim.cfs.remove(&Sim::conf_name(node, vmid)).map_err(text)?;
    sim.told().remove(&vmid);
    Ok(())
}

/// `zfs destroy -r` of every volume whose name says that it is this CT's.
pub(super) async fn free_volumes(
    sim: &Sim,
    node: &str,
    vmid: u32,
    conf: &CtConf,
    log: &TaskLog,
) -> Result<(), String> {
    let mut points = mount_points(conf);
    for n in 0..256 {
        let key = format!("unused{n}");
        points.extend(conf.get(&key).and_then(|v| crate::guest::Volume::parse(&key, v)));
    }
    for point in points {
        let VolumeKind::Storage { storage, volume } = &point.kind else { continue };
        let owner = volume.split('-').nth(1).and_then(|v| v.parse::<u32>().ok());
        if owner != Some(vmid) {
            log.line(&format!("volume '{storage}:{volume}' is not owned by CT {vmid}"));
            continue;
        }
        let known = sim.storage(node, storage).map_err(text)?;
        sim.backend.destroy_volume(node, &known, volume).await.map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// The same of volumes that the config does not name.
async fn free_unreferenced(sim: &Sim, node: &str, vmid: u32, log: &TaskLog) -> Result<(), String> {
    for storage in sim.storages().map_err(|e| e.to_string())? {
        let Ok(storage) = sim.storage(node, &storage.name) else { continue };
        let found = sim.backend.volumes(node, &storage).await.map_err(|e| e.to_string())?;
        for volume in found.into_iter().filter(|v| v.vmid == Some(vmid)) {
            log.line(&format!("destroying unreferenced volume {}:{}", storage.name, volume.name));
            sim.backend.destroy_volume(node, &storage, &volume.name).await.map_err(|e| e.to_string())?;
        }
    }
    Ok(())
}
