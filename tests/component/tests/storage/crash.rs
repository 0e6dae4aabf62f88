//! A program that is killed at any moment: what it had reported is there, nothing else is.
//!
//! The test runs itself as the program that is killed.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use moxlet_ids::{ChainId, ContainerId, Digest};
use moxlet_storage::{Driver, IdStyle, Usage};
use moxlet_tests_component::store::zfs;

use crate::{
    bed::{Bed, Store, entries, map, on_overlay, on_zfs, open_at},
    content::as_root_of,
};

/// What the program is to work on; set, this is the program.
const WORK: &str = "MOXLET_TEST_STORAGE_WORK";
/// What it says while it makes a stack of layers with a root, or removes one; its start is the first.
const LINES: u32 = 8;
/// The test that is run as the program.
const PROGRAM: &str = "crash::whatever_was_reported_survives_a_kill_at_any_moment_on_overlayfs";

/// Fifty kills on OverlayFS.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_was_reported_survives_a_kill_at_any_moment_on_overlayfs() {
    if let Ok(work) = std::env::var(WORK) {
        return worker(&work).await;
    }
    on_overlay(async |store| killed(store, if store.bed == Bed::Overlay { 30 } else { 20 }).await).await;
}

/// And fifty on ZFS; what shifting ids on disk adds to the steps of a root is the making of one copy.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_was_reported_survives_a_kill_at_any_moment_on_zfs() {
    on_zfs(async |store| {
        if store.bed == Bed::Zfs(IdStyle::Idmapped) {
            killed(store, 30).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_was_reported_survives_a_kill_at_any_moment_on_zfs_with_shifted_ids() {
    on_zfs(async |store| {
        if store.bed == Bed::Zfs(IdStyle::Shifted) {
            killed(store, 20).await;
        }
    })
    .await;
}

/// Kills the program time and again. What there is then is what was reported, and nothing else.
async fn killed(store: &mut Store, kills: u32) {
    let mut said = Said::default();
    let mut chance = Chance(0x5eed);
    for kill in 0..kills {
        store.driver.close().await.unwrap();
        let mut child = Program::start(store, kill);
        child.kill_after(&mut chance, &mut said);
        store.reopen().await;
        check(store, &mut said, kill).await;
    }
    assert!(said.count > u64::from(kills) / 2, "only {} steps were seen in all", said.count);
    for id in store.driver.roots().await.unwrap() {
        has_its_layers(store, &id).await;
        store.driver.remove_root(&id).await.unwrap();
    }
}

/// Numbers that are the same in every run.
struct Chance(u64);

impl Chance {
    /// From 0 to 1.
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as f64 / f64::from(u32::MAX >> 1)
    }
}

/// What was reported, and what was under way when the program ended.
#[derive(Default)]
struct Said {
    layers: BTreeSet<ChainId>,
    roots: BTreeSet<ContainerId>,
    /// Roots that were looked into.
    seen: BTreeSet<ContainerId>,
    /// Begun and not reported done: there or not.
    open: Option<(bool, String)>,
    count: u64,
}

impl Said {
    fn take(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        let [when, what, name] = words[..] else { return };
        let is_layer = what.ends_with("layer");
        if when == "begin" {
            self.open = Some((is_layer, name.to_owned()));
            return;
        }
        // The harness of the tests says something, too.
        if when != "done" {
            return;
        }
        self.open = None;
        self.count += 1;
        match what {
            "layer" => drop(self.layers.insert(name.parse().unwrap())),
            "no-layer" => drop(self.layers.remove(&name.parse().unwrap())),
            "root" => drop(self.roots.insert(name.parse().unwrap())),
            "no-root" => drop(self.roots.remove(&name.parse().unwrap())),
            other => panic!("{other}"),
        }
    }
}

struct Program(Child);

impl Program {
    /// Each second one begins with the removal of what those before have left.
    fn start(store: &Store, kill: u32) -> Self {
        let dataset = if store.bed.is_zfs() { store.dataset() } else { "-".to_owned() };
        let first = if kill.is_multiple_of(2) { "makes" } else { "removes" };
        let work = format!("{}|{dataset}|{}|{first}", store.bed.name(), store.inside().display());
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", PROGRAM, "--nocapture"])
            .env(WORK, work)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// Kills it after some of what it says, and then some of the time that the last step before took: so the moments spread
    /// over all that it does, however slow the machine is. The first step is its start.
    fn kill_after(&mut self, chance: &mut Chance, said: &mut Said) {
        let mut lines = BufReader::new(self.0.stdout.take().unwrap()).lines();
        let wanted = (chance.next() * f64::from(LINES)) as u32;
        let (mut seen, mut at, mut step) = (0, Instant::now(), Duration::from_millis(20));
        while seen < wanted {
            let line = lines.next().expect("the program goes on until it is killed").unwrap();
            if line == "ready" || line.starts_with("begin ") || line.starts_with("done ") {
                said.take(&line);
                (step, at, seen) = (at.elapsed(), Instant::now(), seen + 1);
            }
        }
        std::thread::sleep(step.mul_f64(chance.next()));
        self.0.kill().unwrap();
        self.0.wait().unwrap();
        for line in lines.map_while(Result::ok) {
            said.take(&line);
        }
    }
}

async fn check(store: &Store, said: &mut Said, kill: u32) {
    let layers: BTreeSet<ChainId> = store.driver.layers().await.unwrap().into_iter().collect();
    let roots: BTreeSet<ContainerId> = store.driver.roots().await.unwrap().into_iter().collect();
    let (of_layer, of_root) = match said.open.take() {
        Some((true, name)) => (Some(name.parse::<ChainId>().unwrap()), None),
        Some((false, name)) => (None, Some(name.parse::<ContainerId>().unwrap())),
        None => (None, None),
    };
    let differ = |a: &BTreeSet<ChainId>, b: &BTreeSet<ChainId>| -> Vec<ChainId> {
        a.symmetric_difference(b).filter(|c| Some(*c) != of_layer.as_ref()).cloned().collect()
    };
    assert_eq!(differ(&layers, &said.layers), [], "kill {kill}");
    let other: Vec<_> =
        roots.symmetric_difference(&said.roots).filter(|id| Some(*id) != of_root.as_ref()).collect();
    assert!(other.is_empty(), "kill {kill}: {other:?}");
    (said.layers, said.roots) = (layers, roots);
    no_mount_point_is_left(store, kill);
    on_disk(store, said, kill);
    for id in said.roots.difference(&said.seen) {
        has_its_layers(store, id).await;
    }
    said.seen.clone_from(&said.roots);
}

async fn has_its_layers(store: &Store, id: &ContainerId) {
    let target = store.path("target");
    store.driver.unmount_root(id, &target).await.unwrap();
    store.driver.mount_root(id, &target).await.unwrap();
    let there = entries(&target);
    let layers = there.iter().filter(|n| n.starts_with("layer-")).count();
    assert_eq!(layers, store.driver.root_layers(id).await.unwrap().len());
    store.driver.unmount_root(id, &target).await.unwrap();
}

fn no_mount_point_is_left(store: &Store, kill: u32) {
    if store.bed.is_zfs() {
        for name in ["drafts", "views"] {
            let left = entries(&store.inside().join(name));
            assert!(left.is_empty(), "kill {kill}: {name}: {left:?}");
        }
    }
}

/// Not only does the driver not see what is left: there is nothing.
fn on_disk(store: &Store, said: &Said, kill: u32) {
    let (layers, roots, unfinished) = if store.bed.is_zfs() {
        let all = zfs(&["list", "-H", "-o", "name", "-r", &store.dataset()]);
        let below =
            |part: &str| all.lines().filter(|l| l.contains(part)).map(str::to_owned).collect::<Vec<_>>();
        (below("/layers/").len(), below("/roots/").len(), below("/drafts/"))
    } else {
        let count = |name: &str| entries(&store.inside().join(name)).len();
        (count("layers"), count("roots"), store.unfinished())
    };
    assert_eq!(unfinished, Vec::<String>::new(), "kill {kill}");
    assert_eq!((layers, roots), (said.layers.len(), said.roots.len()), "kill {kill}");
}

/// The program: makes and removes layers and roots for ever and says each step before and after.
async fn worker(work: &str) {
    let parts: Vec<&str> = work.split('|').collect();
    let [bed, dataset, dir, first] = parts[..] else { panic!("{work}") };
    let bed = [Bed::Overlay, Bed::OverlayOnTmpfs, Bed::Zfs(IdStyle::Idmapped), Bed::Zfs(IdStyle::Shifted)]
        .into_iter()
        .find(|b| b.name() == bed)
        .unwrap();
    let dir = PathBuf::from(dir);
    let say = |line: String| {
        let mut out = std::io::stdout();
        writeln!(out, "{line}").and_then(|()| out.flush()).unwrap();
    };
    let (driver, _) = open_at(bed, dataset, &dir).await;
    say("ready".to_owned());
    let target = dir.parent().unwrap().join("target");
    if first == "removes" {
        remove_all(&*driver, &target, &say).await;
    }
    for round in 0_u64.. {
        make(&*driver, &target, &say, round).await;
        remove_all(&*driver, &target, &say).await;
    }
}

/// A stack of two layers with a root that is written to.
async fn make(driver: &dyn Driver, target: &Path, say: &impl Fn(String), round: u64) {
    let mut stack: Vec<ChainId> = Vec::new();
    for name in ["bottom", "top"] {
        let seed = Digest::of(format!("{name} {round} {}", std::process::id()).as_bytes());
        let chain = stack.last().map_or_else(|| ChainId::base(&seed), |below| below.push(&seed));
        say(format!("begin layer {chain}"));
        let draft = driver.begin_layer(stack.last()).await.unwrap();
        fill(draft.path(), stack.len());
        driver.commit_layer(draft, &chain, Usage::default()).await.unwrap();
        say(format!("done layer {chain}"));
        stack.push(chain);
    }
    let id = ContainerId::random();
    say(format!("begin root {id}"));
    driver.create_root(&id, &stack, map().into()).await.unwrap();
    say(format!("done root {id}"));
    driver.mount_root(&id, target).await.unwrap();
    as_root_of(map(), || fs::write(target.join("written"), "x").unwrap());
    driver.unmount_root(&id, target).await.unwrap();
}

async fn remove_all(driver: &dyn Driver, target: &Path, say: &impl Fn(String)) {
    for id in driver.roots().await.unwrap() {
        driver.unmount_root(&id, target).await.unwrap();
        say(format!("begin no-root {id}"));
        driver.remove_root(&id).await.unwrap();
        say(format!("done no-root {id}"));
    }
    for chain in driver.layers().await.unwrap() {
        say(format!("begin no-layer {chain}"));
        driver.remove_layer(&chain).await.unwrap();
        say(format!("done no-layer {chain}"));
    }
}

fn fill(dir: &Path, layer: usize) {
    fs::write(dir.join(format!("layer-{layer}")), "x").unwrap();
    fs::create_dir(dir.join(format!("dir-{layer}"))).unwrap();
    fs::write(dir.join(format!("dir-{layer}/file")), vec![1; 100_000]).unwrap();
}
