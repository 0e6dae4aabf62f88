//! `/nodes/{node}/vzdump`: backups of a host's CTs. What is asked for is checked here; [`job`] does it.

mod cleanup;
mod job;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde_json::json;

use super::{Call, lxc, plain};
use crate::{
    answer::{Answered, Refusal},
    guest::backup::{Compression, Named, read_conf},
};

/// How a running CT's state is kept while it is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Snapshot,
    Suspend,
    Stop,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Suspend => "suspend",
            Self::Stop => "stop",
        }
    }
}

/// Where archives go.
#[derive(Debug, Clone)]
enum Target {
    Storage(String),
    Dir(String),
}

/// What is asked for.
#[derive(Debug, Clone)]
struct Options {
    node: String,
    vmids: Vec<u32>,
    /// Guests of other hosts that are asked for as well.
    elsewhere: Vec<u32>,
    /// Guests that the caller may not back up are passed over.
    all: bool,
    mode: Mode,
    target: Target,
    compression: Compression,
    excluded: Vec<&'static str>,
    quiet: bool,
    lockwait_minutes: u64,
    stopwait_minutes: u64,
    /// Lines of the log that tell what was asked for.
    ionice: i64,
    bwlimit: i64,
    command: String,
}

/// What the real one can and this one cannot do: refused rather than ignored.
const NOT_SIMULATED: &[&str] = &[
    "exclude-path",
    "fleecing",
    "job-id",
    "notes-template",
    "pbs-change-detection-mode",
    "protected",
    "script",
    "tmpdir",
];
/// What PVE leaves out of a backup unless `stdexcludes` is off.
const STANDARD_EXCLUDES: [&str; 3] = ["/tmp/?*", "/var/tmp/?*", "/var/run/?*.pid"];

pub(super) async fn dispatch(call: &Call) -> Option<Answered> {
    Some(match (call.method.as_str(), call.template.as_str()) {
        ("POST", "/nodes/{node}/vzdump") => start(call),
        ("GET", "/nodes/{node}/vzdump/extractconfig") => extract(call),
        _ => return None,
    })
}

fn start(call: &Call) -> Answered {
    if call.flag("stdout") {
        return Err(Refusal::parameter("stdout", "option is only allowed on the command line interface."));
    }
    check_caller(call)?;
    check_parameters(call)?;
    let options = options(call)?;
    let node = options.node.clone();
    if call.flag("stop") {
        call.check(&format!("/nodes/{node}"), &["Sys.Modify"])?;
        stop_running(call, &node);
    }
    if options.vmids.is_empty() && (call.flag("stop") || !options.all) {
        return Ok(json!("OK").into());
    }
    if let Target::Storage(storage) = &options.target {
        call.check(&format!("/storage/{storage}"), &["Datastore.AllocateSpace"])?;
    }
    let id = match options.vmids.as_slice() {
        [one] => one.to_string(),
        _ => String::new(),
    };
    let (sim, caller) = (Arc::clone(&call.sim), call.caller.clone());
    let upid = call.sim.tasks.fork_tidied(&node, "vzdump", &id, &call.caller, |log| {
        let job = Arc::new(job::Job::new(sim, caller, options, log));
        let interrupted = Arc::clone(&job);
        (async move { job.run().await }, async move { interrupted.interrupted().await })
    })?;
    Ok(json!(upid).into())
}

/// What only root@pam may ask for, or who may change the host.
fn check_caller(call: &Call) -> Answered<()> {
    if call.caller.is_root() {
        return Ok(());
    }
    for key in ["tmpdir", "dumpdir", "script", "job-id"] {
        if call.given.contains_key(key) {
            return Err(Refusal::parameter(key, "Only root may set this option."));
        }
    }
    if ["bwlimit", "ionice", "performance"].iter().any(|key| call.given.contains_key(*key)) {
        call.check("/", &["Sys.Modify"])?;
    }
    if call.given.contains_key("prune-backups")
        && let Target::Storage(storage) = target(call)
    {
        call.check(&format!("/storage/{storage}"), &["Datastore.Allocate"])?;
    }
    Ok(())
}

/// `PVE::VZDump::verify_vzdump_parameters`, and what is not simulated.
fn check_parameters(call: &Call) -> Answered<()> {
    let given = |key: &str| call.given.contains_key(key);
    for (key, other) in [("all", call.flag("all")), ("exclude", given("exclude")), ("pool", given("pool"))] {
        if other && given("vmid") {
            return Err(Refusal::parameter(key, "option conflicts with option 'vmid'"));
        }
    }
    if !(call.flag("all") || given("exclude") || call.flag("stop") || given("pool") || given("vmid")) {
        return Err(Refusal::parameter("vmid", "property is missing"));
    }
    if given("storage") && given("dumpdir") {
        return Err(Refusal::died("cannot use options 'storage' and 'dumpdir' at the same time"));
    }
    let prunes = call.text("prune-backups").is_some_and(|how| how != "keep-all=1");
    let lzo = matches!(call.text("compress"), Some("1" | "lzo"));
    let wanted = NOT_SIMULATED.iter().copied().find(|key| given(key));
    let wanted = wanted.or(prunes.then_some("prune-backups")).or(lzo.then_some("compress with lzo"));
    match wanted {
        Some(what) => Err(Refusal::new(501, format!("vzdump: {what} is not simulated"))),
        None => Ok(()),
    }
}

fn target(call: &Call) -> Target {
    match call.text("dumpdir") {
        Some(dir) => Target::Dir(dir.to_owned()),
        None => Target::Storage(call.text("storage").unwrap_or("local").to_owned()),
    }
}

fn options(call: &Call) -> Answered<Options> {
    let node = call.node()?.to_owned();
    let all = call.flag("all") || (call.given.contains_key("exclude") && !call.given.contains_key("pool"));
    let mut guests = included(call, all)?;
    // Those that are nowhere are asked of this host, and fail there.
    let mut vmids = guests.remove(&node).unwrap_or_default();
    vmids.extend(guests.remove("").unwrap_or_default());
    let elsewhere: BTreeSet<u32> = guests.into_values().flatten().collect();
    let minutes =
        |key: &str, default: u64| call.integer(key).and_then(|n| u64::try_from(n).ok()).unwrap_or(default);
    let standard = call.integer("stdexcludes") != Some(0);
    Ok(Options {
        vmids: vmids.into_iter().collect(),
        elsewhere: elsewhere.into_iter().collect(),
        all,
        mode: match call.text("mode") {
            Some("stop") => Mode::Stop,
            Some("suspend") => Mode::Suspend,
            _ => Mode::Snapshot,
        },
        target: target(call),
        compression: match call.text("compress") {
            Some("gzip") => Compression::Gzip,
            Some("zstd") => Compression::Zstd,
            _ => Compression::None,
        },
        excluded: if standard { STANDARD_EXCLUDES.to_vec() } else { Vec::new() },
        quiet: call.flag("quiet"),
        lockwait_minutes: minutes("lockwait", 180),
        stopwait_minutes: minutes("stopwait", 10),
        ionice: call.integer("ionice").unwrap_or(7),
        bwlimit: call.integer("bwlimit").unwrap_or(0),
        command: command(call),
        node,
    })
}

fn ids(list: &str) -> impl Iterator<Item = u32> + '_ {
    list.split([',', ';', ' ', '\0', '\t', '\n']).filter_map(|id| id.parse().ok())
}

/// `PVE::VZDump::get_included_guests`: by host; without a name those that are on none.
fn included(call: &Call, all: bool) -> Answered<BTreeMap<String, BTreeSet<u32>>> {
    let there = call.sim.vmlist()?;
    let wanted: BTreeSet<u32> = if let Some(pool) = call.text("pool") {
        let users = call.users()?;
        let missing = || Refusal::died(format!("pool '{pool}' does not exist"));
        users.pools.get(pool).ok_or_else(missing)?.vms.clone()
    } else if let Some(list) = call.text("vmid") {
        ids(list).collect()
    } else if all {
        let excluded: BTreeSet<u32> = ids(call.text("exclude").unwrap_or("")).collect();
        there.keys().copied().filter(|vmid| !excluded.contains(vmid)).collect()
    } else {
        BTreeSet::new()
    };
    let mut by_host: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
    for vmid in wanted {
        by_host.entry(there.get(&vmid).cloned().unwrap_or_default()).or_default().insert(vmid);
    }
    Ok(by_host)
}

/// The command that would do the same, as the log begins.
fn command(call: &Call) -> String {
    let mut words = vec!["vzdump".to_owned()];
    words.extend(ids(call.text("vmid").unwrap_or("")).map(|id| id.to_string()));
    for (key, value) in call.given.iter().filter(|(key, _)| *key != "vmid") {
        words.push(format!("--{key} {}", plain(value)));
    }
    words.join(" ")
}

/// `PVE::VZDump::stop_running_backups`.
fn stop_running(call: &Call, node: &str) {
    for task in call.sim.tasks.list(node) {
        if task.end.is_none() && task.upid.kind == "vzdump" {
            call.sim.tasks.cancel(&task.upid.text);
        }
    }
}

/// The config in an archive.
fn extract(call: &Call) -> Answered {
    let (node, volume) = (call.node()?, call.needed("volume")?);
    let (storage, named, file) = lxc::archive_of(call, node, volume)?;
    if !call.has_any(&format!("/storage/{storage}"), &["Datastore.Allocate"])? {
        call.check(&format!("/storage/{storage}"), &["Datastore.AllocateSpace"])?;
    }
    call.check(&format!("/vms/{}", named.vmid), &["VM.Backup"])?;
    let text = read_conf(&file, named.compression).map_err(Refusal::died)?;
    Ok(json!(text).into())
}

/// What a name of a storage's content says, of a backup.
pub(super) fn named(volume: &str) -> Option<Named> {
    Named::parse(volume.strip_prefix("backup/")?)
}
