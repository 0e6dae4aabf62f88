//! kill -9 of the engine's process and of the simulator at any moment of a CT's life: afterwards it runs exactly once or is
//! gone, nothing is left over, and what is somebody else's is as it was.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use moxlet_sandbox::{Engine, SandboxState};
use moxlet_tests_component::wait;

use crate::world::{Calls, FIRST, Place, spec};

const CHILD: &str = "MOXLET_PVE_CHILD";
const DIR: &str = "MOXLET_PVE_DIR";
const ROUNDS: u32 = 50;
/// Steps that are seen of a CT's life.
const STEPS: u32 = 16;

/// This program again as the simulator or as an engine at work; both go on until they are killed.
fn again(role: &str, dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "crash::a_process_to_be_killed", "--nocapture"])
        .env(CHILD, role)
        .env(DIR, dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn a_process_to_be_killed() {
    let Ok(role) = std::env::var(CHILD) else { return };
    let place = Place::new(Path::new(&std::env::var(DIR).unwrap()));
    if role == "sim" {
        let sim = place.simulate(20).await;
        let url = place.dir.join("url.new");
        fs::write(&url, &sim.hosts()[0].url).unwrap();
        fs::rename(&url, place.dir.join("url")).unwrap();
        std::future::pending::<()>().await;
    }
    let url = fs::read_to_string(place.dir.join("url")).unwrap();
    let engine = place.engine(&url, FIRST + 99, &Calls::default());
    for n in 0.. {
        let pod = spec(&format!("p{n}"));
        // Whatever fails is taken up by whoever comes after.
        let _ = engine.create(&pod).await;
        let _ = engine.start(&pod.id).await;
        if n % 2 == 0 {
            let _ = engine.stop(&pod.id, Duration::ZERO).await;
        }
        let _ = engine.delete(&pod.id).await;
    }
}

async fn simulator(dir: &Path) -> Child {
    let _ = fs::remove_file(dir.join("url"));
    let child = again("sim", dir);
    wait::until("the simulator", async || fs::read_to_string(dir.join("url")).map_err(|e| e.to_string()))
        .await;
    child
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_any_moment_leaves_a_ct_once_or_not_at_all() {
    if std::env::var_os(CHILD).is_some() {
        return;
    }
    let dir = tempfile::Builder::new().prefix("moxlet-pve-kill-").tempdir().unwrap();
    let place = Place::new(dir.path());
    let mut sim = simulator(dir.path()).await;
    place.add_foreigners();
    let engine_once = || {
        let url = fs::read_to_string(dir.path().join("url")).unwrap();
        place.engine(&url, FIRST + 99, &Calls::default())
    };
    drop(engine_once());
    let before = place.snapshot();
    let (mut half_made, mut running) = (0, 0);
    for round in 0..ROUNDS {
        let child = again("engine", dir.path());
        // After so many steps of a CT's life as are seen on disk, however long each takes here.
        let (since, mut last, mut steps) = (Instant::now(), before.clone(), round % STEPS);
        while since.elapsed() < Duration::from_secs(20) {
            let now = place.snapshot();
            if now != last {
                last = now;
                if steps == 0 {
                    break;
                }
                steps -= 1;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if round % 3 == 2 {
            kill(sim);
            tokio::time::sleep(Duration::from_millis(50)).await;
            kill(child);
            sim = simulator(dir.path()).await;
        } else {
            kill(child);
        }
        let engine = engine_once();
        let all = engine.list().await.unwrap();
        // While the simulator is away an engine makes CTs that it can neither start nor remove.
        let numbers: BTreeSet<_> = all.iter().map(|info| engine.vmid(&info.id)).collect();
        assert_eq!(numbers.len(), all.len(), "{all:?}");
        for info in all {
            match info.state {
                SandboxState::Running { .. } => running += 1,
                SandboxState::Stopped => half_made += 1,
            }
            // A task that was begun may still be at it.
            wait::until("the removal", async || engine.delete(&info.id).await.map_err(|e| format!("{e:?}")))
                .await;
        }
        // A start that was asked for just before may come after all; then there is no configuration for it.
        let now = wait::until("nothing but what was there before", async || {
            let now = place.snapshot();
            let more: Vec<_> =
                now.keys().filter(|p| !before.contains_key(*p)).map(|p| p.display().to_string()).collect();
            if more.is_empty() { Ok(now) } else { Err(more.join(", ")) }
        })
        .await;
        assert_eq!(now, before, "round {round}");
    }
    kill(sim);
    println!("{ROUNDS} kills: {half_made} stopped or half made, {running} running");
    assert!(half_made > 0 && running > 0, "the kills met too few moments");
}
