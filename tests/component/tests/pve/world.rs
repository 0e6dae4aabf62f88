//! A simulated cluster of two hosts, guests of somebody else on it, and an engine on the first host.

use std::{collections::BTreeMap, fs, path::PathBuf};

use moxlet_ids::SandboxId;
use moxlet_pve::{Client, NodeName};
use moxlet_pve_sim::Simulator;
use moxlet_sandbox::{Engine, pve::PveEngine};
pub(crate) use moxlet_tests_component::simulated::{self, Calls, FIRST, Place, SECRET, spec};
use serde_json::{Value, json};

pub(crate) struct World {
    pub(crate) place: Place,
    pub(crate) sim: Simulator,
    pub(crate) engine: PveEngine,
    pub(crate) calls: Calls,
    /// Somebody else at the API.
    pub(crate) admin: Client,
    pub(crate) node: NodeName,
    before: BTreeMap<PathBuf, Vec<u8>>,
    _dir: tempfile::TempDir,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(FIRST + 99, 0).await
    }

    pub(crate) async fn with(last: u32, task_ms: u64) -> Self {
        let dir = tempfile::Builder::new().prefix("moxlet-pve-").tempdir().unwrap();
        let place = Place::new(dir.path());
        let sim = place.simulate(task_ms).await;
        place.add_foreigners();
        let calls = Calls::default();
        let url = &sim.hosts()[0].url;
        let engine = place.engine(url, last, &calls);
        let admin = place.client(url, &Calls::default());
        let before = place.snapshot();
        Self { place, engine, calls, admin, before, node: "pve1".parse().unwrap(), sim, _dir: dir }
    }

    /// Nothing but what was there before is there, to the last bit.
    pub(crate) fn assert_as_before(&self) {
        let now = self.place.snapshot();
        let show = |all: &BTreeMap<PathBuf, Vec<u8>>| {
            all.keys().map(|p| p.display().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(show(&now), show(&self.before));
        assert_eq!(now, self.before);
    }

    /// What was there before is there, to the last bit; there may be more.
    pub(crate) fn assert_foreigners_untouched(&self) {
        let now = self.place.snapshot();
        for (path, bytes) in &self.before {
            assert_eq!(now.get(path), Some(bytes), "{}", path.display());
        }
    }

    pub(crate) fn vmid(&self, id: &SandboxId) -> u32 {
        self.engine.vmid(id).unwrap().get()
    }

    pub(crate) fn conf(&self, id: &SandboxId) -> String {
        fs::read_to_string(self.place.conf(self.vmid(id))).unwrap()
    }

    /// A call of the admin port.
    pub(crate) async fn control(&self, method: &str, path: &str, body: Value) {
        simulated::control(&self.sim, method, path, &body).await;
    }

    pub(crate) async fn fault(&self, kind: &str, rule: Value) {
        self.control("POST", &format!("/faults/{kind}"), rule).await;
    }

    pub(crate) async fn no_faults(&self) {
        self.control("DELETE", "/faults", json!({})).await;
    }

    /// A pod's CT, running.
    pub(crate) async fn running(&self, name: &str) -> SandboxId {
        let spec = spec(name);
        self.engine.create(&spec).await.unwrap();
        self.engine.start(&spec.id).await.unwrap();
        self.engine.look().await.unwrap();
        spec.id
    }

    /// The reasons of what is seen.
    pub(crate) async fn seen(&self) -> Vec<&'static str> {
        self.engine.look().await.unwrap().into_iter().map(|o| o.reason).collect()
    }
}

/// An error with its causes, as the agent answers it to the node, which makes an event of it.
pub(crate) fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
