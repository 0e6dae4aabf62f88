//! Restoring a CT from a backup (PVE::API2::LXC, PVE::LXC::Create): volumes of its own, and of the archive's config what the
//! caller may have.
//!
//! What decides whose such a CT looks: raw `lxc.*` lines come along for root@pam alone; for everybody else the log names them and
//! they are left out. A bind mount point makes a restore fail, unless root@pam asks for it or `rootfs` is given, which leaves all
//! mount points out.

use std::{path::PathBuf, sync::Arc};

use super::{
    Call, create, destroy,
    refusals::{Changes, check_changes},
    text,
};
use crate::{
    access::{Caller, Rights},
    answer::{Answered, Refusal},
    api::backup::named,
    guest::{
        CtConf, Volume, VolumeKind,
        backup::{FIREWALL, Named, read, read_conf},
        mount_points, parse_pairs,
    },
    sim::Sim,
    tasks::TaskLog,
};

struct Restore {
    node: String,
    vmid: u32,
    caller: Caller,
    /// The archive as it was named, and where it is.
    volid: String,
    named: Named,
    file: PathBuf,
    /// Where volumes go whose place is not given.
    storage: String,
    given: Changes,
    description: Option<String>,
    unprivileged: Option<bool>,
    unique: bool,
    /// A CT of this number is there and is overwritten.
    overwrites: bool,
    /// The caller may not change the firewall's rules.
    skip_firewall: bool,
    pool: Option<String>,
    start: bool,
}

/// The storage of an archive, what its name says, and its file.
pub(in crate::api) fn archive_of(call: &Call, node: &str, volid: &str) -> Answered<(String, Named, PathBuf)> {
    let Some((storage, volume)) = volid.split_once(':') else {
        return Err(Refusal::died("Only root can pass arbitrary filesystem paths."));
    };
    let wrong = || Refusal::died(format!("unable to use volume {volid} - content type needs to be 'backup'"));
    let found = named(volume).ok_or_else(wrong)?;
    let file = volume.strip_prefix("backup/").unwrap_or(volume);
    let known = call.sim.storage(node, storage)?;
    Ok((storage.to_owned(), found, call.sim.backend.dump_dir(node, &known)?.join(file)))
}

pub(super) async fn restore(call: &Call) -> Answered {
    let mut work = asked(call)?;
    check_target(call, &work).await?;
    work.skip_firewall = check_caller(call, &work)?;
    let (storage, ..) = archive_of(call, &work.node, &work.volid)?;
    let may_all = call.has_any(&format!("/storage/{storage}"), &["Datastore.Allocate"])?;
    if !may_all && work.named.vmid != work.vmid {
        call.check(&format!("/storage/{storage}"), &["Datastore.AllocateSpace"])?;
        call.check(&format!("/vms/{}", work.named.vmid), &["VM.Backup"])?;
    }
    let root = create::root_storage(work.given.get("rootfs").and_then(Option::as_deref), &work.storage);
    call.check(&format!("/storage/{root}"), &["Datastore.AllocateSpace"])?;
    create::check_holds_roots(&call.sim, &work.node, &root)?;
    let (sim, node, vmid) = (Arc::clone(&call.sim), work.node.clone(), work.vmid);
    if work.overwrites {
        let failed = |why| Refusal::died(format!("unable to restore CT {vmid} - {why}"));
        super::set_lock(&sim, &node, vmid, "create").await.map_err(failed)?;
    } else {
        create::reserve(&sim, &node, vmid)?;
    }
    call.fork(&node, "vzrestore", &vmid.to_string(), |log| async move { run(&sim, work, &log).await })
}

fn asked(call: &Call) -> Answered<Restore> {
    let (node, vmid) = (call.node()?.to_owned(), call.vmid()?);
    let volid = call.needed("ostemplate")?.to_owned();
    let (_, named, file) = archive_of(call, &node, &volid)?;
    let mut given = create::options(call);
    given.remove("unprivileged");
    Ok(Restore {
        overwrites: call.flag("force") && call.sim.load_conf(&node, vmid).is_ok(),
        node,
        vmid,
        caller: call.caller.clone(),
        volid,
        named,
        file,
        storage: call.text("storage").unwrap_or("local").to_owned(),
        given,
        description: call.text("description").map(|d| format!("{}\n", d.trim_end_matches('\n'))),
        unprivileged: call.integer("unprivileged").map(|n| n == 1),
        unique: call.flag("unique"),
        skip_firewall: false,
        pool: call.text("pool").map(str::to_owned),
        start: call.flag("start"),
    })
}

/// A CT that is there is overwritten only if that is asked for, and it neither runs nor is protected.
async fn check_target(call: &Call, work: &Restore) -> Answered<()> {
    let vmid = work.vmid;
    if !work.overwrites {
        return match call.sim.vmlist()?.get(&vmid) {
            Some(other) => Err(Refusal::died(format!("CT {vmid} already exists on node '{other}'"))),
            None => Ok(()),
        };
    }
    if call.sim.backend.state(&work.node, vmid).await?.is_running() {
        return Err(Refusal::died("can't overwrite running container"));
    }
    if call.sim.load_conf(&work.node, vmid)?.flag("protection") {
        return Err(Refusal::died(format!("unable to restore CT {vmid} - protection mode enabled")));
    }
    Ok(())
}

/// Who may make CTs may restore them; with VM.Backup alone a CT that is there can be restored, but not its firewall's rules.
fn check_caller(call: &Call, work: &Restore) -> Answered<bool> {
    let (vmid, pool) = (work.vmid, work.pool.as_deref());
    let mut skip_firewall = false;
    if let Err(refusal) = create::check_allocate(call, vmid, pool) {
        if !work.overwrites || !call.has_any(&format!("/vms/{vmid}"), &["VM.Backup"])? {
            return Err(refusal);
        }
        skip_firewall = true;
        let old = call.sim.load_conf(&work.node, vmid)?;
        if old.flag("unprivileged") && work.unprivileged == Some(false) {
            call.check("/", &["Sys.Modify"])?;
        }
    }
    let unprivileged = work.unprivileged == Some(true);
    check_changes(call, vmid, pool, &CtConf::default(), &work.given, unprivileged)?;
    Ok(skip_firewall)
}

/// What has been made until it failed.
#[derive(Default)]
struct Made {
    volumes: Vec<(String, String)>,
    /// From here on the CT that was there is gone.
    begun: bool,
}

async fn run(sim: &Arc<Sim>, work: Restore, log: &TaskLog) -> Result<(), String> {
    let (node, vmid) = (work.node.as_str(), work.vmid);
    let mut made = Made::default();
    let done = {
        let _held = sim.cfs.lock_ct(vmid, sim.lock_wait()).await.map_err(text)?;
        fill(sim, &work, &mut made, log).await
    };
    if let Err(why) = done {
        for (storage, volume) in made.volumes {
            if let Ok(storage) = sim.storage(node, &storage) {
                let _ = sim.backend.destroy_volume(node, &storage, &volume).await;
            }
        }
        if work.overwrites && !made.begun {
            super::remove_lock(sim, node, vmid, &["create"]).await?;
        } else {
            let _ = sim.cfs.remove(&Sim::conf_name(node, vmid));
        }
        return Err(format!("unable to restore CT {vmid} - {why}"));
    }
    create::finish(sim, node, vmid, work.pool.as_deref(), work.start, log).await
}

async fn fill(sim: &Sim, work: &Restore, made: &mut Made, log: &TaskLog) -> Result<(), String> {
    let (node, vmid) = (work.node.as_str(), work.vmid);
    let old = sim.load_conf(node, vmid).map_err(text)?;
    if sim.backend.state(node, vmid).await.map_err(|e| e.to_string())?.is_running() {
        return Err("can't overwrite running container".into());
    }
    log.line(&format!("recovering backed-up configuration from '{}'", work.volid));
    let original = CtConf::parse(&read_conf(&work.file, work.named.compression)?);
    let mut conf = begin(work, &original);
    check_original(sim, work, &original, &old, &conf)?;
    let (volumes, others) = points(work, &original)?;
    made.begun = true;
    for point in &volumes {
        let value = make_volume(sim, work, point, made).await?;
        conf.main.values.insert(point.key.clone(), value);
    }
    if old.main.values.len() > 1 {
        destroy::free_volumes(sim, node, vmid, &old, log).await?;
        let mut empty = CtConf::default();
        empty.main.values.insert("lock".into(), "create".into());
        sim.write_conf(node, vmid, &empty).map_err(text)?;
    }
    log.line(&format!("restoring '{}' now..", work.volid));
    let root = Volume::parse("rootfs", conf.get("rootfs").unwrap_or_default()).map(|v| v.kind);
    if let Some(VolumeKind::Storage { storage, volume }) = root {
        let storage = sim.storage(node, &storage).map_err(text)?;
        let unprivileged = conf.flag("unprivileged");
        let unpacked = sim.backend.unpack(node, &storage, &volume, &work.file, unprivileged, log).await;
        unpacked.map_err(|e| e.to_string())?;
    }
    log.line("merging backed-up and given configuration..");
    merge(work, &mut conf, &original, log);
    restore_firewall(sim, work, log)?;
    let defaults = [("hostname", format!("CT{vmid}")), ("memory", "512".into()), ("swap", "512".into())];
    conf.main.values.extend(others);
    for (key, value) in defaults {
        conf.main.values.entry(key.to_owned()).or_insert(value);
    }
    sim.write_conf(node, vmid, &conf).map_err(text)
}

/// What the caller gave, and what of the archive decides how volumes are made.
fn begin(work: &Restore, original: &CtConf) -> CtConf {
    let mut conf = CtConf::default();
    let is_point = |key: &str| key == "rootfs" || is_numbered(key, "mp");
    let given = work.given.iter().filter(|(key, _)| !is_point(key) && !is_numbered(key, "unused"));
    conf.main.values = given.filter_map(|(k, v)| Some((k.clone(), v.clone()?))).collect();
    for (key, net) in &mut conf.main.values {
        if is_numbered(key, "net") {
            create::complete_net(net);
        }
    }
    conf.main.description.clone_from(work.description.as_ref().unwrap_or(&original.main.description));
    if work.caller.is_root() {
        conf.main.raw.clone_from(&original.main.raw);
    }
    if work.unprivileged.unwrap_or_else(|| original.flag("unprivileged")) {
        conf.main.values.insert("unprivileged".into(), "1".into());
    }
    if original.flag("template") {
        conf.main.values.insert("template".into(), "1".into());
    }
    conf
}

/// What the caller needs for what stands in the archive.
fn check_original(
    sim: &Sim,
    work: &Restore,
    original: &CtConf,
    old: &CtConf,
    conf: &CtConf,
) -> Result<(), String> {
    if work.caller.is_root() {
        return Ok(());
    }
    let users = sim.users().map_err(|e| e.to_string())?;
    let rights = Rights::of(&users, &work.caller);
    for (key, net) in &original.main.values {
        if is_numbered(key, "net")
            && !work.given.contains_key(key)
            && let Some(bridge) = parse_pairs(net, "name").get("bridge")
        {
            let path = format!("/sdn/zones/localnetwork/{bridge}");
            rights.check_any(&path, &["SDN.Use"]).map_err(text)?;
        }
    }
    let was = work.overwrites && !old.flag("unprivileged");
    if !was && !conf.flag("unprivileged") {
        rights.check("/", &["Sys.Modify"]).map_err(text)?;
    }
    Ok(())
}

/// A number of this kind of key, such as `net0`.
fn is_numbered(key: &str, stem: &str) -> bool {
    key.strip_prefix(stem).is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

type Others = Vec<(String, String)>;

/// The volumes to be made, and mount points that are no volumes: those given, else those of the archive.
fn points(work: &Restore, original: &CtConf) -> Result<(Vec<Volume>, Others), String> {
    let mut of = CtConf::default();
    of.main.values = work.given.iter().filter_map(|(k, v)| Some((k.clone(), v.clone()?))).collect();
    let given = mount_points(&of);
    let (mut volumes, mut others) = (Vec::new(), Vec::new());
    if !given.is_empty() {
        if given.iter().all(|p| p.key != "rootfs") {
            return Err("mount points configured, but 'rootfs' not set - aborting".into());
        }
        for point in given {
            match point.kind_name() {
                "volume" => volumes.push(point),
                _ => others.push((point.key.clone(), of.get(&point.key).unwrap_or_default().to_owned())),
            }
        }
        return Ok((volumes, others));
    }
    for mut point in mount_points(original) {
        let (key, kind) = (point.key.clone(), point.kind_name());
        if kind == "volume" {
            let size = point.size();
            let size =
                size.ok_or_else(|| format!("unable to detect disk size - please specify {key} (size)"))?;
            let gib = size as f64 / f64::from(1 << 30);
            point.kind = VolumeKind::Storage { storage: work.storage.clone(), volume: gib.to_string() };
            volumes.push(point);
        } else if key == "rootfs" {
            return Err(format!(
                "restoring rootfs to {kind} mount is only possible by specifying -rootfs manually!"
            ));
        } else if !work.caller.is_root() {
            return Err(format!("restoring '{key}' to {kind} mount is only possible for root"));
        } else {
            others.push((key.clone(), original.get(&key).unwrap_or_default().to_owned()));
        }
    }
    if volumes.iter().all(|p| p.key != "rootfs") {
        return Err("rootfs configuration could not be recovered, please check and specify manually!".into());
    }
    Ok((volumes, others))
}

/// Makes a volume if one is asked for by its size alone; its value in the config.
async fn make_volume(sim: &Sim, work: &Restore, point: &Volume, made: &mut Made) -> Result<String, String> {
    let VolumeKind::Storage { storage, volume } = &point.kind else { return Ok(String::new()) };
    let options = point.options.iter().filter(|(k, _)| *k != "size");
    let options: String = options.map(|(k, v)| format!(",{k}={v}")).collect();
    let Some(size) = create::new_size(volume) else {
        return Ok(format!("{storage}:{volume}{options}"));
    };
    let known = sim.storage(&work.node, storage).map_err(text)?;
    let volume = create::new_volume(sim, &work.node, &known, work.vmid, size).await?;
    made.volumes.push((storage.clone(), volume.clone()));
    Ok(format!("{storage}:{volume}{options},size={}", create::written(size)))
}

/// PVE::LXC::Create::sanitize_and_merge_config: what was given wins, and what nobody but root@pam may set is left out.
fn merge(work: &Restore, conf: &mut CtConf, original: &CtConf, log: &TaskLog) {
    let restricted = !work.caller.is_root();
    for (key, value) in &original.main.values {
        let own = matches!(key.as_str(), "rootfs" | "unprivileged" | "parent" | "template" | "lock");
        if own || is_numbered(key, "mp") || is_numbered(key, "unused") {
            continue;
        }
        let privileged = !conf.flag("unprivileged") && original.flag("unprivileged");
        if restricted && key == "features" && privileged {
            log.warn("changing from unprivileged to privileged, skipping features");
            continue;
        }
        if work.unique && is_numbered(key, "net") {
            let parts = value.split(',').filter(|p| !p.starts_with("hwaddr="));
            let mut net = parts.collect::<Vec<_>>().join(",");
            create::complete_net(&mut net);
            conf.main.values.insert(key.clone(), net);
            continue;
        }
        conf.main.values.entry(key.clone()).or_insert_with(|| value.clone());
    }
    if restricted && !original.main.raw.is_empty() {
        log.warn("skipping custom lxc options, restore manually as root:");
        log.line("--------------------------------");
        for (key, value) in &original.main.raw {
            log.line(&format!("{key}: {value}"));
        }
        log.line("--------------------------------");
    }
}

fn restore_firewall(sim: &Sim, work: &Restore, log: &TaskLog) -> Result<(), String> {
    let rules = read(&work.file, work.named.compression, FIREWALL)?.unwrap_or_default();
    if rules.is_empty() {
        return Ok(());
    }
    if work.skip_firewall {
        log.line("ignoring firewall config from backup archive's 'etc/vzdump/pct.fw', lacking API permission to modify firewall.");
        return Ok(());
    }
    sim.cfs.write(&format!("firewall/{}.fw", work.vmid), &rules).map_err(text)
}
