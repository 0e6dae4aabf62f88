//! The admin port: plain HTTP and JSON on loopback. Faults, conditions, and the count of all calls.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Json, Router,
    extract::{Path, State},
    http::StatusCode,
    routing::{get, post, put},
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::sync::Mutex;

use crate::{
    api,
    faults::{BackupStep, CallRule, FaultSet, StorageFault, TaskRule},
    pmxcfs::Held,
    sim::Sim,
    tls::Validity,
};

/// What the port works on.
#[derive(Debug, Clone)]
pub(crate) struct Admin {
    pub(crate) sim: Arc<Sim>,
    /// Where each host's API is.
    pub(crate) urls: BTreeMap<String, String>,
    /// Locks that are held on request.
    pub(crate) held: Arc<Mutex<BTreeMap<String, Held>>>,
}

type Answer = Result<Json<Value>, (StatusCode, String)>;

pub(crate) fn router(admin: Admin) -> Router {
    Router::new()
        .route("/", get(state))
        .route("/faults", get(faults).put(replace_faults).delete(clear_faults))
        .route("/faults/calls", post(add_call))
        .route("/faults/tasks", post(add_task))
        .route("/hosts/{name}", put(set_host))
        .route("/quorum", put(set_quorum))
        .route("/storages/{name}", put(set_storage))
        .route("/version", put(set_version))
        .route("/backups", put(hold_backups))
        .route("/pvesh", post(pvesh))
        .route("/certificates/{name}", put(renew))
        .route("/locks/{file}", put(set_lock))
        .route("/counts", get(counts).delete(reset_counts))
        .route("/tell", post(tell))
        .with_state(admin)
}

fn done() -> Answer {
    Ok(Json(json!({})))
}

fn bad(why: impl Into<String>) -> (StatusCode, String) {
    (StatusCode::BAD_REQUEST, why.into())
}

fn failed(why: &dyn std::fmt::Display) -> (StatusCode, String) {
    (StatusCode::INTERNAL_SERVER_ERROR, why.to_string())
}

fn to_json(value: &impl serde::Serialize) -> Answer {
    serde_json::to_value(value).map(Json).map_err(|e| failed(&e))
}

async fn state(State(admin): State<Admin>) -> Answer {
    let hosts: Vec<Value> = admin
        .sim
        .config
        .hosts
        .iter()
        .map(|h| {
            json!({
                "name": h.name, "url": admin.urls.get(&h.name), "fingerprint": admin.sim.fingerprint(&h.name),
                "offline": admin.sim.faults.is_offline(&h.name),
            })
        })
        .collect();
    Ok(Json(json!({ "hosts": hosts, "quorate": admin.sim.cfs.is_quorate() })))
}

async fn faults(State(admin): State<Admin>) -> Answer {
    to_json(&admin.sim.faults.current())
}

async fn replace_faults(State(admin): State<Admin>, Json(set): Json<FaultSet>) -> Answer {
    admin.sim.faults.replace(set).map_err(bad)?;
    done()
}

async fn clear_faults(State(admin): State<Admin>) -> Answer {
    admin.sim.faults.replace(FaultSet::default()).map_err(bad)?;
    admin.sim.set_quorate(true).map_err(|e| failed(&e))?;
    admin.held.lock().await.clear();
    done()
}

async fn add_call(State(admin): State<Admin>, Json(rule): Json<CallRule>) -> Answer {
    admin.sim.faults.add_call(rule).map_err(bad)?;
    done()
}

async fn add_task(State(admin): State<Admin>, Json(rule): Json<TaskRule>) -> Answer {
    admin.sim.faults.add_task(rule);
    done()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HostState {
    offline: bool,
}

async fn set_host(
    State(admin): State<Admin>,
    Path(name): Path<String>,
    Json(state): Json<HostState>,
) -> Answer {
    if admin.sim.config.host(&name).is_none() {
        return Err(bad(format!("no host {name}")));
    }
    admin.sim.faults.change(|c| {
        if state.offline {
            c.offline.insert(name)
        } else {
            c.offline.remove(&name)
        };
    });
    done()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Quorum {
    quorate: bool,
}

async fn set_quorum(State(admin): State<Admin>, Json(quorum): Json<Quorum>) -> Answer {
    admin.sim.set_quorate(quorum.quorate).map_err(|e| failed(&e))?;
    done()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StorageState {
    /// Absent or null: nothing is wrong.
    fault: Option<StorageFault>,
    /// Absent: on all hosts.
    node: Option<String>,
}

async fn set_storage(
    State(admin): State<Admin>,
    Path(name): Path<String>,
    Json(state): Json<StorageState>,
) -> Answer {
    let key = state.node.map_or_else(|| name.clone(), |node| format!("{node}/{name}"));
    admin.sim.faults.change(|c| {
        match state.fault {
            Some(fault) => c.storages.insert(key, fault),
            None => c.storages.remove(&key),
        };
    });
    done()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VersionState {
    version: Option<String>,
}

async fn set_version(State(admin): State<Admin>, Json(state): Json<VersionState>) -> Answer {
    admin.sim.faults.change(|c| c.version = state.version);
    done()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Backups {
    /// Absent or null: they go on.
    hold: Option<BackupStep>,
}

async fn hold_backups(State(admin): State<Admin>, Json(backups): Json<Backups>) -> Answer {
    admin.sim.faults.change(|c| c.backups = backups.hold);
    done()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pvesh {
    /// The host that it is called on.
    host: String,
    method: String,
    path: String,
    #[serde(default)]
    parameters: Map<String, Value>,
}

/// A call of root@pam on a host, which no token may do: as `pvesh` there. Its data, or what the refusal says.
async fn pvesh(State(admin): State<Admin>, Json(asked): Json<Pvesh>) -> Answer {
    let Pvesh { host, method, path, parameters } = asked;
    match api::call_as_root(&admin.sim, &host, &method, &path, parameters).await {
        Ok(data) => Ok(Json(json!({ "data": data.data }))),
        Err(refusal) => Err((StatusCode::CONFLICT, refusal.body().to_string())),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Certificate {
    #[serde(default)]
    expired: bool,
}

async fn renew(
    State(admin): State<Admin>,
    Path(name): Path<String>,
    Json(certificate): Json<Certificate>,
) -> Answer {
    let validity = if certificate.expired { Validity::Expired } else { Validity::Now };
    match admin.sim.renew_certificate(&name, validity) {
        Some(Ok(fingerprint)) => Ok(Json(json!({ "fingerprint": fingerprint }))),
        Some(Err(error)) => Err((StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
        None => Err(bad(format!("host {name} has no server of its own"))),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LockState {
    held: bool,
}

/// `user.cfg` and such for a cluster-wide lock, a VMID for a CT's.
async fn set_lock(
    State(admin): State<Admin>,
    Path(file): Path<String>,
    Json(state): Json<LockState>,
) -> Answer {
    let mut held = admin.held.lock().await;
    if !state.held {
        held.remove(&file);
        return done();
    }
    let wait = admin.sim.lock_wait();
    let lock = match file.parse::<u32>() {
        Ok(vmid) => admin.sim.cfs.lock_ct(vmid, wait).await,
        Err(_) => admin.sim.cfs.lock_cfs(&file, wait).await,
    };
    held.insert(file, lock.map_err(|r| (StatusCode::CONFLICT, r.message))?);
    done()
}

async fn counts(State(admin): State<Admin>) -> Answer {
    to_json(&*admin.sim.faults.counts())
}

async fn reset_counts(State(admin): State<Admin>) -> Answer {
    *admin.sim.faults.counts() = crate::faults::Counts::default();
    done()
}

async fn tell(State(admin): State<Admin>) -> Answer {
    match api::tell_now(&admin.sim).await {
        Ok(()) => done(),
        Err(refusal) => Err((StatusCode::INTERNAL_SERVER_ERROR, refusal.message)),
    }
}
