//! `/nodes/{node}/lxc`: the CTs of a host.

mod config;
mod create;
mod destroy;
mod list;
mod migrate;
mod power;
mod refusals;
mod restore;
mod snapshot;

pub(super) use list::vmstatus;
pub(super) use power::stop_all;
pub(super) use restore::archive_of;
use serde_json::{Value, json};
pub(super) use snapshot::{BACKUP, remove as remove_snapshot, take as take_snapshot};

use super::Call;
use crate::{
    answer::{Answered, Refusal},
    guest::CtConf,
    sim::Sim,
    tasks::TaskLog,
};

pub(super) async fn dispatch(call: &Call) -> Option<Answered> {
    let below = call.template.strip_prefix("/nodes/{node}/lxc")?;
    Some(match (call.method.as_str(), below) {
        ("GET", "") => list::list(call).await,
        ("POST", "") => create::create(call).await,
        ("GET", "/{vmid}") => Ok(index(call)),
        ("DELETE", "/{vmid}") => destroy::destroy(call).await,
        ("GET", "/{vmid}/config") => config::read(call),
        ("PUT", "/{vmid}/config") => config::update(call).await,
        ("GET", "/{vmid}/pending") => config::pending(call),
        ("GET", "/{vmid}/status/current") => list::current(call).await,
        ("POST", "/{vmid}/status/start") => power::start(call).await,
        ("POST", "/{vmid}/status/stop") => power::stop(call).await,
        ("POST", "/{vmid}/status/shutdown") => power::shutdown(call).await,
        ("POST", "/{vmid}/status/reboot") => power::reboot(call).await,
        ("POST", "/{vmid}/status/suspend") => power::freeze(call, true).await,
        ("POST", "/{vmid}/status/resume") => power::freeze(call, false).await,
        ("GET", "/{vmid}/interfaces") => list::interfaces(call).await,
        ("GET", "/{vmid}/feature") => snapshot::feature(call),
        ("GET", "/{vmid}/snapshot") => snapshot::list(call).await,
        ("POST", "/{vmid}/snapshot") => snapshot::create(call).await,
        ("DELETE", "/{vmid}/snapshot/{snapname}") => snapshot::delete(call).await,
        ("POST", "/{vmid}/clone") => snapshot::clone(call).await,
        ("POST", "/{vmid}/template") => snapshot::template(call).await,
        ("POST", "/{vmid}/migrate") => migrate::migrate(call).await,
        ("GET", "/{vmid}/migrate") => migrate::precondition(call).await,
        ("PUT", "/{vmid}/resize") => config::resize(call).await,
        _ => return None,
    })
}

fn index(call: &Call) -> crate::answer::Data {
    let names = call.sim.schema.children("/nodes/{node}/lxc/{vmid}");
    json!(names.into_iter().map(|name| json!({ "subdir": name })).collect::<Vec<Value>>()).into()
}

/// PVE::AbstractConfig::check_lock.
fn check_lock(conf: &CtConf) -> Result<(), String> {
    match conf.lock() {
        Some(lock) => Err(format!("CT is locked ({lock})")),
        None => Ok(()),
    }
}

/// Whether a CT runs; one whose back end cannot say does not.
async fn is_running(call: &Call) -> Answered<bool> {
    Ok(call.sim.backend.state(call.node()?, call.vmid()?).await?.is_running())
}

/// A refusal's text, as the task that it ends writes it.
fn text(refusal: Refusal) -> String {
    refusal.message
}

/// A start by the HA manager, with the CT's lock held; one that runs already is as wanted.
pub(super) async fn start_by_manager(sim: &Sim, node: &str, vmid: u32, log: &TaskLog) -> Result<(), String> {
    if sim.backend.state(node, vmid).await.map_err(|e| e.to_string())?.is_running() {
        return Ok(());
    }
    power::start_locked(sim, node, vmid, false, log).await
}

/// PVE::AbstractConfig::set_lock.
pub(super) async fn set_lock(sim: &Sim, node: &str, vmid: u32, lock: &str) -> Result<(), String> {
    let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await.map_err(text)?;
    let mut conf = sim.load_conf(node, vmid).map_err(text)?;
    check_lock(&conf)?;
    conf.main.values.insert("lock".into(), lock.into());
    sim.write_conf(node, vmid, &conf).map_err(text)
}

/// PVE::AbstractConfig::remove_lock, of one of these.
pub(super) async fn remove_lock(sim: &Sim, node: &str, vmid: u32, locks: &[&str]) -> Result<(), String> {
    let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await.map_err(text)?;
    let mut conf = sim.load_conf(node, vmid).map_err(text)?;
    let wanted = locks.first().copied().unwrap_or_default();
    match conf.lock() {
        Some(lock) if locks.contains(&lock) => {}
        Some(lock) => return Err(format!("found lock '{lock}' trying to remove '{wanted}' lock")),
        None => return Err(format!("no lock found trying to remove '{wanted}'  lock")),
    }
    conf.main.values.remove("lock");
    sim.write_conf(node, vmid, &conf).map_err(text)
}

/// A start that nobody asked the API for, as a backup does it: without the CT's lock.
pub(super) async fn start_unlocked(sim: &Sim, node: &str, vmid: u32, log: &TaskLog) -> Result<(), String> {
    power::start_locked(sim, node, vmid, false, log).await
}
