//! `moxlet up` is stopped, killed and upgraded, CTs are killed, the Node object is deleted: running pods never notice.
//!
//! These stories disturb the one cluster, so they take turns; cargo runs this program by itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use moxlet_tests_e2e::{
    Cluster, Kubectl, LONG, Namespace, busybox, container, eventually, eventually_within,
};
use serde_json::{Value, json};

static TURN: Mutex<()> = Mutex::new(());
const IDLE: &str = "trap 'exit 0' TERM; while true; do sleep 1 & wait $!; done";

fn turn() -> MutexGuard<'static, ()> {
    let guard = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    Cluster::get().script("node-start");
    guard
}

/// What must not change while a pod runs on: its container, when that started, and how its first process is known to the kernel.
fn identity(ns: &Namespace, pod: &str) -> (Value, Value, u64, String) {
    let status = ns.get(pod)["status"]["containerStatuses"][0].clone();
    let ticks = ns.exec(pod, "cut -d' ' -f22 /proc/1/stat").ok();
    (
        status["containerID"].clone(),
        status["state"]["running"]["startedAt"].clone(),
        status["restartCount"].as_u64().unwrap(),
        ticks,
    )
}

fn no_leaks() {
    eventually_within(LONG, "no leaked CT, mount, interface or address", || {
        let leaks = Cluster::get().script("leaks");
        if leaks.trim().is_empty() { Ok(()) } else { Err(leaks) }
    });
}

#[test]
fn an_upgrade_touches_no_running_pod() {
    let _turn = turn();
    let ns = Namespace::new("upgrade");
    ns.running("stays", IDLE);
    let before = identity(&ns, "stays");
    Cluster::get().script("node-stop");
    Cluster::get().script("node-start");
    ns.wait_ready("stays");
    assert_eq!(identity(&ns, "stays"), before);
    Cluster::get().script("node-kill");
    Cluster::get().script("node-start");
    ns.wait_ready("stays");
    assert_eq!(identity(&ns, "stays"), before);
    assert_eq!(ns.exec("stays", "echo alive").ok(), "alive\n");
}

/// Sends a signal to `moxlet up`.
fn signal(name: &str) {
    let pid = std::fs::read_to_string(Cluster::get().dir.join("run/moxlet.pid")).unwrap();
    let pid = pid.split_whitespace().next().unwrap();
    assert!(Command::new("kill").args([name, pid]).status().unwrap().success());
}

#[test]
fn a_node_that_was_silent_is_ready_again_without_waiting_for_a_heartbeat() {
    let _turn = turn();
    let ready = || {
        let node = Kubectl::new(None, &["get", "node", &Cluster::get().node, "-o", "json"]).json();
        let conditions = node["status"]["conditions"].as_array().unwrap().clone();
        conditions.iter().find(|c| c["type"] == "Ready").unwrap()["status"].as_str().unwrap().to_owned()
    };
    signal("-STOP");
    let unknown =
        std::panic::catch_unwind(|| {
            eventually_within(Duration::from_secs(150), "the controller to call the node NotReady", || {
                match ready() {
                    status if status != "True" => Ok(()),
                    status => Err(status),
                }
            });
        });
    signal("-CONT");
    unknown.unwrap();
    // The heartbeat would come after up to 5 minutes.
    eventually("the node to be Ready", || match ready() {
        status if status == "True" => Ok(()),
        status => Err(status),
    });
}

#[test]
fn static_pods_have_mirrors_and_a_broken_manifest_holds_up_no_other() {
    let _turn = turn();
    let cluster = Cluster::get();
    let (dir, config) = (tempfile::tempdir().unwrap(), cluster.dir.join("settings"));
    let before = std::fs::read_to_string(&config).unwrap();
    let manifest = |name: &str| {
        let spec = json!({"terminationGracePeriodSeconds": 1, "containers": [{"name": "c", "image": cluster.image("busybox"),
            "command": ["sleep", "3600"]}]});
        json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": name}, "spec": spec}).to_string()
    };
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let mirror = |name: &str| {
        let name = format!("{name}-{}", cluster.node);
        let found = Kubectl::new(Some("default"), &["get", "pod", &name, "-o", "json", "--ignore-not-found"])
            .run()
            .ok();
        serde_json::from_str::<Value>(&found).unwrap_or_default()
    };
    let running = |name: &str| {
        eventually_within(LONG, "a mirror that is Running", || {
            let pod = mirror(name);
            if pod["status"]["phase"] == "Running" { Ok(pod) } else { Err(pod.to_string()) }
        })
    };
    let gone = |name: &str| {
        eventually_within(LONG, "no mirror", || {
            if mirror(name).is_null() { Ok(()) } else { Err(name.to_owned()) }
        });
    };
    // The configuration is written anew from these at each start.
    let folder = format!("EXTRA_CONFIG='static_pod_dir = {:?}'", dir.path());
    std::fs::write(&config, format!("{before}\n{folder}\n")).unwrap();
    cluster.script("node-stop");
    cluster.script("node-start");
    let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        write("stays.json", &manifest("stays"));
        write("goes.json", &manifest("goes"));
        let first = running("stays");
        assert_eq!(first["metadata"]["ownerReferences"][0]["kind"], "Node");
        running("goes");
        write("broken.json", "{\"kind\": \"Pod\", ");
        std::fs::remove_file(dir.path().join("goes.json")).unwrap();
        gone("goes");
        assert_eq!(running("stays")["metadata"]["uid"], first["metadata"]["uid"]);
        // Taken out and put back while it ends: the folder is looked at every 2 s.
        write("goes.json", &manifest("goes"));
        running("goes");
        std::fs::remove_file(dir.path().join("goes.json")).unwrap();
        std::thread::sleep(Duration::from_millis(2500));
        write("goes.json", &manifest("goes"));
        std::thread::sleep(Duration::from_secs(4));
        running("goes");
    }));
    for name in ["stays.json", "goes.json", "broken.json"] {
        let _ = std::fs::remove_file(dir.path().join(name));
    }
    gone("stays");
    gone("goes");
    std::fs::write(&config, before).unwrap();
    cluster.script("node-stop");
    cluster.script("node-start");
    told.unwrap();
    no_leaks();
}

#[test]
fn a_pod_that_ended_while_moxlet_was_away_has_its_exit_code() {
    let _turn = turn();
    let ns = Namespace::new("missed");
    ns.pod_with("ends", json!({"restartPolicy": "Never", "containers": [busybox("sleep 4; exit 9")]}));
    ns.wait_phase("ends", "Running");
    Cluster::get().script("node-kill");
    std::thread::sleep(Duration::from_secs(5));
    Cluster::get().script("node-start");
    ns.wait_phase("ends", "Failed");
    assert_eq!(ns.get("ends")["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"], 9);
}

#[test]
fn pods_deleted_while_moxlet_was_away_are_removed() {
    let _turn = turn();
    let ns = Namespace::new("away");
    ns.running("graceful", IDLE);
    ns.running("forced", IDLE);
    Cluster::get().script("node-stop");
    ns.kubectl(&["delete", "pod", "graceful", "--wait=false"]).ok();
    ns.kubectl(&["delete", "pod", "forced", "--force", "--grace-period=0"]).ok();
    Cluster::get().script("node-start");
    ns.wait_gone("graceful");
    drop(ns);
    no_leaks();
}

#[test]
fn a_killed_ct_is_replaced_with_init_containers_run_again() {
    let _turn = turn();
    let ns = Namespace::new("killed");
    let mounts = json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]});
    ns.pod_with(
        "phoenix",
        json!({
        "volumes": [{"name": "data", "emptyDir": {}}],
        "initContainers": [container("init", "echo again >> /data/log", mounts.clone())],
        "containers": [container("main", IDLE, mounts)]}),
    );
    ns.wait_ready("phoenix");
    // The CT's PID 1, seen from the host: the init of the only CT of this namespace's pod.
    let address = ns.get("phoenix")["status"]["podIP"].as_str().unwrap().to_owned();
    let pids = Command::new("sh").args(["-c", &format!(
        "for p in $(pgrep -x moxlet-init; pgrep -f '^/sbin/moxlet-init'); do nsenter -t $p -n ip -o -4 addr 2>/dev/null | grep -q '{address}/' && echo $p; done")]).output().unwrap();
    let pid = String::from_utf8_lossy(&pids.stdout)
        .lines()
        .filter_map(|l| l.parse::<i32>().ok())
        .min()
        .expect("the CT's PID 1");
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    ns.until("phoenix", "init containers ran again and it is Ready", LONG, |pod| {
        let ready = pod["status"]["conditions"]
            .as_array()?
            .iter()
            .any(|c| c["type"] == "Ready" && c["status"] == "True");
        let again = ns.exec("phoenix", "cat /data/log").text() == "again\nagain\n";
        (ready && again).then_some(())
    });
    ns.wait_event("phoenix", "SandboxChanged", "");
}

#[test]
fn a_deleted_node_is_registered_again() {
    let _turn = turn();
    let node = Cluster::get().node.as_str();
    let uid = || {
        Kubectl::new(None, &["get", "node", node, "-o", "jsonpath={.metadata.uid}", "--ignore-not-found"])
            .run()
            .ok()
    };
    let before = uid();
    Kubectl::new(None, &["delete", "node", node]).run().ok();
    eventually("a new Node object", || {
        let now = uid();
        if now.is_empty() || now == before { Err(now) } else { Ok(()) }
    });
    Kubectl::new(None, &["wait", "--for=condition=Ready", &format!("node/{node}"), "--timeout=60s"])
        .run()
        .ok();
}

#[test]
fn the_serving_certificate_is_kept_over_restarts() {
    let _turn = turn();
    let requests = || {
        let all = Kubectl::new(None, &["get", "csr", "-o", "json"]).json();
        all["items"].as_array().unwrap().len()
    };
    let before = requests();
    Cluster::get().script("node-stop");
    Cluster::get().script("node-start");
    eventually("the API with the cluster's certificate", || {
        match Cluster::get().node_api("/healthz", None).0 {
            0 => Err("no answer that the cluster's CA vouches for".to_owned()),
            _ => Ok(()),
        }
    });
    assert_eq!(requests(), before, "a new certificate was asked for");
}

#[test]
fn twenty_kills_at_random_points_leave_nothing_behind() {
    let _turn = turn();
    let ns = Namespace::new("kills");
    ns.running("witness", IDLE);
    let before = identity(&ns, "witness");
    // The points are spread over the second and a half in which pods come and go; a time as seed would not be repeatable.
    for round in 0..20_u64 {
        let (old, new) = (format!("p{}", round.saturating_sub(1)), format!("p{round}"));
        ns.pod(&new, busybox(IDLE));
        if round > 0 {
            ns.kubectl(&["delete", "pod", &old, "--wait=false"]).ok();
        }
        std::thread::sleep(Duration::from_millis((round * 617) % 1500));
        Cluster::get().script("node-kill");
        Cluster::get().script("node-start");
    }
    ns.wait_ready("p19");
    ns.wait_ready("witness");
    assert_eq!(identity(&ns, "witness"), before, "a running pod was restarted");
    for round in 0..19 {
        ns.wait_gone(&format!("p{round}"));
    }
    drop(ns);
    no_leaks();
}
