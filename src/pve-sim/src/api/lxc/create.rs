//! Creating a CT through the API: always from an archive (`ostemplate`), never without one.

use std::sync::Arc;

use super::{
    Call, power,
    refusals::{Changes, check_changes},
    restore, text,
};
use crate::{
    answer::{Answered, Refusal},
    api::plain,
    config::Storage,
    faults::StorageFault,
    guest::{CtConf, Volume, VolumeKind, parse_pairs, size_bytes},
    sim::Sim,
    tasks::TaskLog,
};

/// Parameters that are not options of the config.
const NOT_OPTIONS: &[&str] = &[
    "node",
    "vmid",
    "ostemplate",
    "storage",
    "pool",
    "password",
    "ssh-public-keys",
    "force",
    "restore",
    "unique",
    "start",
    "bwlimit",
    "ignore-unpack-errors",
    "description",
    "ha-managed",
];
const DEFAULT_SIZE: &str = "4G";

struct Create {
    node: String,
    vmid: u32,
    archive: (String, String),
    storage: String,
    pool: Option<String>,
    start: bool,
    conf: CtConf,
}

pub(super) async fn create(call: &Call) -> Answered {
    let (node, vmid) = (call.node()?.to_owned(), call.vmid()?);
    call.sim.cfs.check_quorum()?;
    if call.flag("restore") {
        return restore::restore(call).await;
    }
    let pool = call.text("pool").map(str::to_owned);
    check_allocate(call, vmid, pool.as_deref())?;
    let unprivileged = call.flag("unprivileged");
    if !unprivileged {
        // Privileged CTs need more than their own path.
        call.check("/", &["Sys.Modify"])?;
    }
    let changes = options(call);
    check_changes(call, vmid, pool.as_deref(), &CtConf::default(), &changes, unprivileged)?;
    let storage = call.text("storage").unwrap_or("local").to_owned();
    let ostemplate = call.needed("ostemplate")?;
    let archive = ostemplate.split_once(':').map(|(s, v)| (s.to_owned(), v.to_owned())).ok_or_else(|| {
        Refusal::parameter("ostemplate", format!("unable to parse volume ID '{ostemplate}'\n"))
    })?;
    call.check(&format!("/storage/{}", archive.0), &["Datastore.Audit"])
        .or_else(|_| call.check(&format!("/storage/{}", archive.0), &["Datastore.AllocateSpace"]))?;
    let root_storage = root_storage(changes.get("rootfs").and_then(Option::as_deref), &storage);
    call.check(&format!("/storage/{root_storage}"), &["Datastore.AllocateSpace"])?;
    check_holds_roots(&call.sim, &node, &root_storage)?;
    let mut conf = CtConf::default();
    conf.main.values = changes.into_iter().filter_map(|(k, v)| Some((k, v?))).collect();
    if let Some(description) = call.text("description") {
        conf.main.description = format!("{}\n", description.trim_end_matches('\n'));
    }
    add_defaults(&mut conf, vmid);
    reserve(&call.sim, &node, vmid)?;
    let work = Create { node: node.clone(), vmid, archive, storage, pool, start: call.flag("start"), conf };
    let sim = Arc::clone(&call.sim);
    call.fork(&node, "vzcreate", &vmid.to_string(), |log| async move { run(&sim, work, &log).await })
}

/// The parameters that are options of the config.
pub(super) fn options(call: &Call) -> Changes {
    let given = call.given.iter().filter(|(name, _)| !NOT_OPTIONS.contains(&name.as_str()));
    given.map(|(name, value)| (name.clone(), Some(plain(value)))).collect()
}

pub(super) fn check_allocate(call: &Call, vmid: u32, pool: Option<&str>) -> Answered<()> {
    if let Some(pool) = pool {
        if !call.users()?.pools.contains_key(pool) {
            return Err(Refusal::died(format!("pool '{pool}' does not exist")));
        }
        if call.has_any(&format!("/pool/{pool}"), &["VM.Allocate"])? {
            return Ok(());
        }
    }
    if call.caller.is_root() || call.has_any(&format!("/vms/{vmid}"), &["VM.Allocate"])? {
        return Ok(());
    }
    Err(Refusal::forbidden(&format!("/vms/{vmid}, VM.Allocate")))
}

/// Whether a storage can hold roots of CTs.
pub(super) fn check_holds_roots(sim: &Sim, node: &str, storage: &str) -> Answered<()> {
    if sim.storage(node, storage)?.content.iter().any(|c| c == "rootdir") {
        return Ok(());
    }
    Err(Refusal::died(format!("storage '{storage}' does not support container directories")))
}

/// The config with `lock: create`, so that the VMID is taken before the task begins.
pub(super) fn reserve(sim: &Sim, node: &str, vmid: u32) -> Answered<()> {
    if let Some(other) = sim.vmlist()?.get(&vmid) {
        return Err(Refusal::died(format!("CT {vmid} already exists on node '{other}'")));
    }
    sim.cfs.create(&Sim::conf_name(node, vmid), "lock: create\n")
}

fn add_defaults(conf: &mut CtConf, vmid: u32) {
    let values = &mut conf.main.values;
    values.entry("hostname".into()).or_insert_with(|| format!("CT{vmid}"));
    values.entry("arch".into()).or_insert_with(|| "amd64".into());
    values.entry("ostype".into()).or_insert_with(|| "debian".into());
    values.entry("memory".into()).or_insert_with(|| "512".into());
    values.entry("swap".into()).or_insert_with(|| "512".into());
    for n in 0..32 {
        if let Some(net) = values.get_mut(&format!("net{n}")) {
            complete_net(net);
        }
    }
}

/// A NIC gets its type and, without an address of its own, a made-up MAC of the vendor's range.
pub(super) fn complete_net(net: &mut String) {
    let parts = parse_pairs(net, "name");
    if !parts.contains_key("hwaddr") {
        let [a, b, c, ..] = rand::random::<[u8; 4]>();
        net.push_str(&format!(",hwaddr=BC:24:11:{a:02X}:{b:02X}:{c:02X}"));
    }
    if !parts.contains_key("type") {
        net.push_str(",type=veth");
    }
}

pub(super) fn root_storage(rootfs: Option<&str>, default: &str) -> String {
    match rootfs.and_then(|value| Volume::parse("rootfs", value)).map(|v| v.kind) {
        Some(VolumeKind::Storage { storage, .. }) => storage,
        _ => default.to_owned(),
    }
}

/// `storage:8` or `storage:8,…` asks for a new volume of so many GiB.
fn root_size(rootfs: Option<&str>) -> u64 {
    let asked = rootfs.and_then(|value| Volume::parse("rootfs", value)).and_then(|v| match v.kind {
        VolumeKind::Storage { volume, .. } => new_size(&volume),
        _ => None,
    });
    asked.unwrap_or_else(|| size_bytes(DEFAULT_SIZE).unwrap_or(4 << 30))
}

/// The bytes of a volume that is named by its GiB alone.
pub(super) fn new_size(volume: &str) -> Option<u64> {
    let gib: f64 = volume.parse().ok()?;
    (gib.is_finite() && gib > 0.0).then_some((gib * f64::from(1u32 << 30)) as u64)
}

async fn run(sim: &Arc<Sim>, mut work: Create, log: &TaskLog) -> Result<(), String> {
    let (node, vmid) = (work.node.clone(), work.vmid);
    let made = {
        let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await.map_err(text)?;
        fill(sim, &mut work, log).await
    };
    if let Err(why) = made {
        // The real one removes what it made, the config at last.
        let _ = sim.cfs.remove(&Sim::conf_name(&node, vmid));
        return Err(format!("unable to create CT {vmid} - {why}"));
    }
    finish(sim, &node, vmid, work.pool.as_deref(), work.start, log).await
}

/// What comes after a CT has been made: its pool, and its start.
pub(super) async fn finish(
    sim: &Sim,
    node: &str,
    vmid: u32,
    pool: Option<&str>,
    start: bool,
    log: &TaskLog,
) -> Result<(), String> {
    if let Some(pool) = pool {
        let _held = sim.cfs.lock_cfs("user.cfg", sim.lock_wait()).await.map_err(text)?;
        let mut users = sim.users().map_err(|e| e.to_string())?;
        users.pools.entry(pool.to_owned()).or_default().vms.insert(vmid);
        sim.cfs.write("user.cfg", &users.format()).map_err(text)?;
    }
    if start {
        let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await.map_err(text)?;
        power::start_locked(sim, node, vmid, false, log).await?;
    }
    Ok(())
}

async fn fill(sim: &Sim, work: &mut Create, log: &TaskLog) -> Result<(), String> {
    let (node, vmid) = (work.node.as_str(), work.vmid);
    let (archive_storage, archive) = &work.archive;
    let from = sim.storage(node, archive_storage).map_err(text)?;
    let known = sim.backend.volumes(node, &from).await.map_err(|e| e.to_string())?;
    if !known.iter().any(|v| v.content == "vztmpl" && v.name == *archive) {
        return Err(format!("volume '{archive_storage}:{archive}' does not exist"));
    }
    let rootfs = work.conf.get("rootfs").map(str::to_owned);
    let name = root_storage(rootfs.as_deref(), &work.storage);
    let storage = sim.storage(node, &name).map_err(text)?;
    let size = root_size(rootfs.as_deref());
    let volume = new_volume(sim, node, &storage, vmid, size).await?;
    let file = archive.strip_prefix("vztmpl/").unwrap_or(archive);
    let path = from.path.clone().unwrap_or_default().join("template/cache").join(file);
    let unprivileged = work.conf.flag("unprivileged");
    let unpacked = sim.backend.unpack(node, &storage, &volume, &path, unprivileged, log).await;
    if let Err(error) = unpacked {
        let _ = sim.backend.destroy_volume(node, &storage, &volume).await;
        return Err(error.to_string());
    }
    work.conf.main.values.insert("rootfs".into(), format!("{name}:{volume},size={}", written(size)));
    sim.write_conf(node, vmid, &work.conf).map_err(text)
}

/// A CT's new volume, unless its storage is full.
pub(super) async fn new_volume(
    sim: &Sim,
    node: &str,
    storage: &Storage,
    vmid: u32,
    size: u64,
) -> Result<String, String> {
    if sim.faults.storage(node, &storage.name) == Some(StorageFault::Full) {
        let pool = storage.pool.as_deref().unwrap_or(&storage.name);
        return Err(format!("zfs error: cannot create '{pool}/subvol-{vmid}-disk-0': out of space"));
    }
    sim.backend.create_volume(node, storage, vmid, size).await.map_err(|e| e.to_string())
}

/// A size as it stands in a config.
pub(super) fn written(size: u64) -> String {
    let gib = size as f64 / f64::from(1u32 << 30);
    if gib.fract() == 0.0 { format!("{gib}G") } else { format!("{}M", size >> 20) }
}
