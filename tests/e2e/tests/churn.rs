//! Pods that come and go in random orders while the node is killed: in the end the API, the agent and the host agree on what
//! there is, and the node is no larger than before.
//!
//! 60 pods and 3 kills each time; 1,000 and 20 where `MOXLET_TEST_LONG` is set (`scripts/test --long`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeSet, fs, time::Duration};

use moxlet_cri::v1::{self, runtime_service_client::RuntimeServiceClient};
use moxlet_tests_e2e::{Cluster, LONG, Namespace, busybox, eventually_within};
use serde_json::json;

/// So many pods are there at once at most.
const ALIVE: usize = 24;
/// What an allocator keeps and a run of other length needs; a node that kept what it knew of each pod would grow by more.
const GROWTH_KB: u64 = 24 * 1024;

/// How a run is drawn: repeatable, and another for each seed (xorshift).
struct Draw(u64);

impl Draw {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % bound as u64).unwrap()
    }
}

fn long() -> bool {
    std::env::var("MOXLET_TEST_LONG").is_ok_and(|text| !text.is_empty())
}

/// What pods do: run until they are ended, ignore their end, or end by themselves.
fn script(draw: &mut Draw) -> &'static str {
    [
        "trap 'exit 0' TERM; while true; do sleep 1 & wait $!; done",
        "trap '' TERM; while true; do sleep 1; done",
        "sleep 3",
        "exit 3",
    ][draw.below(4)]
}

/// Deletes a pod as people do: with its grace, at once, or by force.
fn delete(ns: &Namespace, draw: &mut Draw, name: &str) {
    let how: &[&str] = match draw.below(3) {
        0 => &["--wait=false"],
        1 => &["--now", "--wait=false"],
        _ => &["--force", "--grace-period=0"],
    };
    ns.kubectl(&[&["delete", "pod", name, "--ignore-not-found"], how].concat()).ok();
}

/// Resident memory of `moxlet up`, in kB.
fn resident() -> u64 {
    let pids = fs::read_to_string(Cluster::get().dir.join("run/moxlet.pid")).unwrap();
    let pid = pids.split_whitespace().next().unwrap().to_owned();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Names of the pods that the API has.
fn in_api(ns: &Namespace) -> BTreeSet<String> {
    ns.kubectl(&["get", "pods", "-o", "jsonpath={.items[*].metadata.name}"])
        .ok()
        .split_whitespace()
        .map(str::to_owned)
        .collect()
}

/// Names of this namespace's pods that the agent has a sandbox of, in whatever state.
fn in_agent(ns: &Namespace) -> BTreeSet<String> {
    let socket = format!("unix://{}", Cluster::get().root_dir().join("run/agent.sock").display());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let sandboxes = runtime.block_on(async {
        let channel = tonic::transport::Endpoint::from_shared(socket).unwrap().connect().await.unwrap();
        let mut client = RuntimeServiceClient::new(channel);
        client.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap().into_inner().items
    });
    let of = |s: v1::PodSandbox| s.metadata.filter(|m| m.namespace == ns.name).map(|m| m.name);
    sandboxes.into_iter().filter_map(of).collect()
}

/// How many CTs the host runs below the node's directory, by liblxc's monitors.
fn on_host() -> usize {
    let root = Cluster::get().root_dir();
    let marker = format!("[lxc monitor] {}/", root.display());
    let is_ours = |entry: &fs::DirEntry| {
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command).starts_with(&marker)
    };
    fs::read_dir("/proc").unwrap().flatten().filter(is_ours).count()
}

/// A part of the run: pods are created and deleted in an order that is drawn, and the node is killed `kills` times between.
fn churn(ns: &Namespace, draw: &mut Draw, names: std::ops::Range<usize>, kills: usize) {
    let every = names.len() / (kills + 1) + 1;
    let mut alive: Vec<String> = Vec::new();
    for (done, number) in names.enumerate() {
        let name = format!("p{number}");
        ns.pod_with(&name, json!({"restartPolicy": "Never", "containers": [busybox(script(draw))]}));
        alive.push(name);
        if alive.len() > ALIVE || draw.below(3) == 0 {
            let index = draw.below(alive.len());
            delete(ns, draw, &alive.swap_remove(index));
        }
        if done % every == every - 1 {
            // In the middle of what is being made and ended.
            std::thread::sleep(Duration::from_millis(draw.below(1500) as u64));
            Cluster::get().script("node-kill");
            Cluster::get().script("node-start");
        }
    }
    while !alive.is_empty() {
        let index = draw.below(alive.len());
        delete(ns, draw, &alive.swap_remove(index));
    }
}

#[test]
fn after_pods_came_and_went_in_random_orders_over_kills_all_views_agree() {
    Cluster::get().script("node-start");
    let (pods, kills) = if long() { (1000, 20) } else { (60, 3) };
    let ns = Namespace::new("churn");
    let before = on_host();
    let mut draw = Draw(0x9e37_79b9_7f4a_7c15);
    churn(&ns, &mut draw, 0..pods, kills);
    eventually_within(LONG * 2, "API, agent and host to have none of the pods", || {
        let (api, agent, host) = (in_api(&ns), in_agent(&ns), on_host());
        if api.is_empty() && agent.is_empty() && host == before {
            return Ok(());
        }
        Err(format!("API {api:?}, agent {agent:?}, {host} CTs of {before} before"))
    });
    // A fresh process has no more to forget: what one keeps of pods that are gone shows without a kill between.
    churn(&ns, &mut draw, pods..pods + ALIVE, 0);
    let settled = resident_at_rest(&ns);
    churn(&ns, &mut draw, pods + ALIVE..pods + ALIVE + pods / 2, 0);
    let after = resident_at_rest(&ns);
    assert!(
        after <= settled + GROWTH_KB,
        "moxlet up grew from {settled} kB to {after} kB over {} pods",
        pods / 2
    );
    drop(ns);
    eventually_within(LONG, "no leaked CT, mount, interface or address", || {
        let leaks = Cluster::get().script("leaks");
        if leaks.trim().is_empty() { Ok(()) } else { Err(leaks) }
    });
}

/// Resident memory once all pods are gone.
fn resident_at_rest(ns: &Namespace) -> u64 {
    eventually_within(LONG * 2, "all pods to be gone", || {
        let (api, agent) = (in_api(ns), in_agent(ns));
        if api.is_empty() && agent.is_empty() { Ok(()) } else { Err(format!("API {api:?}, agent {agent:?}")) }
    });
    resident()
}
