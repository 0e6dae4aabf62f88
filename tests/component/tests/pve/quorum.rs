//! A cluster that loses its quorum: its file system is read-only for all, as pmxcfs is, not only for those who look first.

use std::{fs, io::ErrorKind};

use moxlet_pve_sim::{Config, Simulator};
use moxlet_sandbox::{Engine, Error, SandboxState};
use serde_json::json;

use crate::world::{Calls, FIRST, Place, simulated::control, spec, words};

#[tokio::test]
async fn a_write_that_the_file_system_refuses_is_told_as_lost_quorum_and_nothing_is_half_made() {
    let dir = tempfile::Builder::new().prefix("moxlet-pve-").tempdir().unwrap();
    let place = Place::new(dir.path());
    let sim = Simulator::start(Config { cfs_mount: true, ..place.sim_config(0) }).await.unwrap();
    place.add_foreigners();
    let before = place.snapshot();
    let engine = place.engine(&sim.hosts()[0].url, FIRST + 99, &Calls::default());
    let running = spec("web");
    engine.create(&running).await.unwrap();
    engine.start(&running.id).await.unwrap();
    let with_one = place.snapshot();

    control(&sim, "PUT", "/quorum", &json!({"quorate": false})).await;
    let written = fs::write(place.conf(FIRST), "hostname: mine\n").unwrap_err();
    assert_eq!(written.kind(), ErrorKind::ReadOnlyFilesystem);
    let late = spec("late");
    let error = engine.create(&late).await.unwrap_err();
    assert!(matches!(error, Error::NoQuorum { .. }) && error.is_temporary(), "{}", words(&error));
    let error = engine.delete(&late.id).await;
    assert!(error.is_ok(), "what was not written to the cluster is gone at once: {error:?}");
    for refused in [engine.describe(&running.id, &["main".into()]).await, engine.delete(&running.id).await] {
        let refused = refused.unwrap_err();
        assert!(refused.is_temporary() && words(&refused).contains("quorum"), "{}", words(&refused));
    }
    let seen = engine.look().await.unwrap();
    let lost = seen.iter().find(|o| o.sandbox.as_ref() == Some(&running.id)).unwrap();
    assert!(lost.reason == "ClusterLost" && lost.message.contains("no quorum"), "{seen:?}");
    assert!(matches!(engine.state(&running.id).await.unwrap(), Some(SandboxState::Running { .. })));
    for (path, bytes) in with_one.iter().filter(|(path, _)| !path.starts_with(place.engine_dir())) {
        assert_eq!(fs::read(path).ok().as_ref(), Some(bytes), "{}", path.display());
    }

    control(&sim, "PUT", "/quorum", &json!({"quorate": true})).await;
    assert!(!fs::read_to_string(place.conf(FIRST)).unwrap().contains("main"));
    engine.describe(&running.id, &["main".into()]).await.unwrap();
    // A write that failed is not taken for somebody else's notes.
    assert!(fs::read_to_string(place.conf(FIRST)).unwrap().contains("containers%3A `main`"));
    let seen = engine.look().await.unwrap();
    assert!(seen.len() == 1 && seen[0].reason == "ClusterBack", "{seen:?}");
    engine.delete(&running.id).await.unwrap();
    assert_eq!(place.snapshot(), before);
    drop(engine);
    sim.stop().await;
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&*dir.path().to_string_lossy()), "the mount goes with the simulator");
}
