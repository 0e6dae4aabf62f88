//! `/nodes/{node}/lxc`: the CTs of a host.

mod config;
mod create;
mod destroy;
mod list;
mod migrate;
mod power;
mod refusals;
mod snapshot;

pub(super) use list::vmstatus;
pub(super) use power::stop_all;
use serde_json::{Value, json};

use super::Call;
use crate::{
    answer::{Answered, Refusal},
    guest::CtConf,
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
pub(super) async fn start_by_manager(
    sim: &crate::sim::Sim,
    node: &str,
    vmid: u32,
    log: &crate::tasks::TaskLog,
) -> Result<(), String> {
    if sim.backend.state(node, vmid).await.map_err(|e| e.to_string())?.is_running() {
        return Ok(());
    }
    power::start_locked(sim, node, vmid, false, log).await
}
