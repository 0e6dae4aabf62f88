//! Long absences: a node that is stopped until the control plane gives it up, an API server that ends, hangs or comes back with
//! yesterday's state, a host that is rebooted, an init that hangs. After each, pods are as before, Ready soon, and nothing is left.
//!
//! These stories disturb the one cluster, so they take turns; cargo runs this program by itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
    thread::sleep,
    time::Duration,
};

use moxlet_tests_e2e::{
    Cluster, Kubectl, LONG, Namespace, busybox, eventually, eventually_within, tolerations,
};
use serde_json::{Value, json};

static TURN: Mutex<()> = Mutex::new(());
const IDLE: &str = "trap 'exit 0' TERM; while true; do sleep 1 & wait $!; done";
/// How soon after contact everything is as it was. The promise is 10 s on an idle machine.
const SOON: Duration = Duration::from_secs(30);

fn turn() -> MutexGuard<'static, ()> {
    let guard = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    control_plane("up");
    Cluster::get().script("node-start");
    guard
}

/// `scripts/control-plane VERB` for the cluster under test.
fn control_plane(verb: &str) {
    let script = r#". "$0/settings"; export CLUSTER_CIDR; if [ "$2" = up ]; then port=$BASE_PORT; fi
        exec "$1/scripts/control-plane/$2" "$0/control-plane" ${port:-}"#;
    let output = Command::new("bash")
        .args(["-c", script])
        .args([&Cluster::get().dir, &Cluster::project()])
        .arg(verb)
        .output()
        .unwrap();
    assert!(output.status.success(), "control plane {verb}: {}", String::from_utf8_lossy(&output.stderr));
}

fn pid_of(daemon: &str) -> String {
    let file = Cluster::get().dir.join(daemon);
    let text = fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    text.split_whitespace().next().unwrap().to_owned()
}

fn signal(pid: &str, name: &str) {
    assert!(Command::new("kill").args([name, pid]).status().unwrap().success(), "kill {name} {pid}");
}

/// Has a process go on when the test ends, however it ends.
struct Stopped(String);

impl Stopped {
    fn new(pid: String) -> Self {
        signal(&pid, "-STOP");
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        drop(Command::new("kill").args(["-CONT", &self.0]).status());
    }
}

/// What must not change while a pod runs on: its container, when that started, how often it was started again.
fn identity(ns: &Namespace, pod: &str) -> (Value, Value, Value) {
    let status = ns.get(pod)["status"]["containerStatuses"][0].clone();
    (
        status["containerID"].clone(),
        status["state"]["running"]["startedAt"].clone(),
        status["restartCount"].clone(),
    )
}

fn condition(object: &Value, kind: &str) -> Option<String> {
    let all = object["status"]["conditions"].as_array()?;
    all.iter().find(|c| c["type"] == kind)?["status"].as_str().map(str::to_owned)
}

fn wait_node(status: &str, limit: Duration) {
    let node = &Cluster::get().node;
    eventually_within(limit, &format!("the Node to be Ready={status}"), || {
        let found = Kubectl::new(None, &["get", "node", node, "-o", "json"]).run();
        let object: Value = serde_json::from_str(&found.text()).unwrap_or_default();
        match condition(&object, "Ready") {
            Some(now) if now == status => Ok(()),
            other => Err(format!("{other:?} {}", found.stderr)),
        }
    });
}

fn wait_ready_within(ns: &Namespace, pod: &str, limit: Duration) {
    ns.until(pod, "Ready", limit, |pod| {
        (condition(pod, "Ready")? == "True" && condition(pod, "ContainersReady")? == "True").then_some(())
    });
}

fn no_leaks() {
    eventually_within(LONG, "no leaked CT, mount, interface or address", || {
        let leaks = Cluster::get().script("leaks");
        if leaks.trim().is_empty() { Ok(()) } else { Err(leaks) }
    });
}

/// The CT's PID 1 as the host numbers it: the first of those that are in the pod's network namespace.
fn init_of(ns: &Namespace, pod: &str) -> String {
    let address = ns.get(pod)["status"]["podIP"].as_str().unwrap().to_owned();
    let script = format!(
        "for p in $(pgrep -x moxlet-init; pgrep -f '^/sbin/moxlet-init'); do nsenter -t $p -n ip -o -4 addr 2>/dev/null | grep -q ' {address}/' && echo $p; done"
    );
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let pids = String::from_utf8_lossy(&output.stdout).into_owned();
    pids.lines().filter_map(|l| l.parse::<i32>().ok()).min().expect("the CT's PID 1").to_string()
}

fn deployment(ns: &Namespace, name: &str) {
    ns.apply(&json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {"replicas": 2, "selector": {"matchLabels": {"app": name}}, "template": {
            "metadata": {"labels": {"app": name}},
            "spec": {"terminationGracePeriodSeconds": 1, "tolerations": tolerations(), "containers": [busybox(IDLE)]}}}
    }));
    wait_available(ns, name, Duration::from_secs(60));
}

fn wait_available(ns: &Namespace, name: &str, limit: Duration) {
    eventually_within(limit, &format!("deployment {name} to have 2 available"), || {
        let object = ns.call(&["get", "deployment", name, "-o", "json"]).json();
        if object["status"]["availableReplicas"] == 2 { Ok(()) } else { Err(object["status"].to_string()) }
    });
}

#[test]
fn pods_and_node_are_ready_again_after_the_control_plane_gave_the_node_up() {
    let _turn = turn();
    let ns = Namespace::new("silent");
    deployment(&ns, "web");
    ns.running("single", IDLE);
    let before = identity(&ns, "single");
    let stopped = Stopped::new(pid_of("run/moxlet.pid"));
    wait_node("Unknown", Duration::from_secs(120));
    ns.until("single", "Ready=False by the control plane", SOON, |pod| {
        (condition(pod, "Ready")? == "False").then_some(())
    });
    drop(stopped);
    wait_node("True", SOON);
    wait_ready_within(&ns, "single", SOON);
    wait_available(&ns, "web", SOON);
    assert_eq!(identity(&ns, "single"), before);
}

#[test]
fn a_ready_condition_that_somebody_else_wrote_is_set_right() {
    let _turn = turn();
    let ns = Namespace::new("written");
    ns.running("single", IDLE);
    let patch = json!({"status": {"conditions": [{"type": "Ready", "status": "False", "reason": "Elsewhere", "message": "a"}]}});
    ns.kubectl(&[
        "patch",
        "pod",
        "single",
        "--subresource=status",
        "--type=strategic",
        "-p",
        &patch.to_string(),
    ])
    .ok();
    wait_ready_within(&ns, "single", SOON);
    let pod = ns.get("single");
    let ready =
        pod["status"]["conditions"].as_array().unwrap().iter().find(|c| c["type"] == "Ready").unwrap();
    assert!(
        ready["reason"].is_null() && ready["message"].is_null(),
        "what explained the False stays: {ready}"
    );
}

#[test]
fn pods_restart_and_end_while_the_api_server_is_away_and_their_status_follows() {
    let _turn = turn();
    let ns = Namespace::new("noapi");
    ns.running("stays", IDLE);
    ns.pod_with("ends", json!({"restartPolicy": "Never", "containers": [busybox("sleep 6; exit 7")]}));
    ns.pod("returns", busybox("sleep 4; exit 3"));
    ns.wait_phase("ends", "Running");
    let before = identity(&ns, "stays");
    control_plane("down");
    sleep(Duration::from_secs(15));
    control_plane("up");
    wait_node("True", SOON);
    wait_ready_within(&ns, "stays", SOON);
    ns.wait_phase("ends", "Failed");
    assert_eq!(ns.get("ends")["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"], 7);
    ns.until("returns", "restarted without the API server", SOON, |pod| {
        (pod["status"]["containerStatuses"][0]["restartCount"].as_u64()? >= 1).then_some(())
    });
    assert_eq!(identity(&ns, "stays"), before);
}

#[test]
fn an_api_server_that_hangs_costs_no_pod() {
    let _turn = turn();
    let ns = Namespace::new("hang");
    ns.running("stays", IDLE);
    let before = identity(&ns, "stays");
    let stopped = Stopped::new(pid_of("control-plane/run/kube-apiserver.pid"));
    sleep(Duration::from_secs(20));
    drop(stopped);
    wait_node("True", SOON);
    wait_ready_within(&ns, "stays", SOON);
    // What is new is seen to as well: no watch hangs on a connection of before.
    ns.running("new", IDLE);
    assert_eq!(identity(&ns, "stays"), before);
}

#[test]
fn an_api_server_restored_from_a_snapshot_gets_the_pods_that_it_knows() {
    let _turn = turn();
    let ns = Namespace::new("restored");
    ns.running("stays", IDLE);
    ns.running("deleted-since", IDLE);
    let before = identity(&ns, "stays");
    let data = Cluster::get().dir.join("control-plane/etcd");
    let snapshot = Cluster::get().dir.join("control-plane/etcd.snapshot");
    drop(fs::remove_dir_all(&snapshot));
    control_plane("down");
    assert!(Command::new("cp").arg("-a").args([&data, &snapshot]).status().unwrap().success());
    control_plane("up");
    wait_node("True", SOON);
    ns.kubectl(&["delete", "pod", "deleted-since", "--wait=false"]).ok();
    ns.wait_gone("deleted-since");
    ns.running("made-since", IDLE);
    control_plane("down");
    fs::remove_dir_all(&data).unwrap();
    fs::rename(&snapshot, &data).unwrap();
    control_plane("up");
    wait_node("True", SOON);
    wait_ready_within(&ns, "stays", SOON);
    assert_eq!(identity(&ns, "stays"), before, "a pod that both know was touched");
    // The API server says that it shall run: it does so again.
    eventually_within(LONG, "a command in the pod that is wanted again", || {
        let done = ns.exec("deleted-since", "echo alive");
        if done.text() == "alive\n" { Ok(()) } else { Err(done.stderr) }
    });
    assert!(ns.get("made-since").is_null());
    ns.kubectl(&["delete", "pods", "--all", "--wait=false"]).ok();
    drop(ns);
    // What the API server has forgotten is ended on the host.
    no_leaks();
}

#[test]
fn a_pod_whose_init_hangs_is_deleted_and_its_ct_is_gone() {
    let _turn = turn();
    let ns = Namespace::new("hung");
    for (name, force) in [("graceful", false), ("forced", true)] {
        ns.running(name, IDLE);
        let pid = init_of(&ns, name);
        signal(&pid, "-STOP");
        let mut args = vec!["delete", "pod", name, "--wait=false"];
        if force {
            args.extend(["--force", "--grace-period=0"]);
        }
        ns.kubectl(&args).ok();
        ns.until(name, "gone", LONG, |pod| pod.is_null().then_some(()));
        eventually_within(LONG, "the CT's PID 1 to be gone", || {
            if fs::metadata(format!("/proc/{pid}")).is_err() { Ok(()) } else { Err(pid.clone()) }
        });
    }
    drop(ns);
    no_leaks();
}

#[test]
fn a_rebooted_host_starts_its_pods_anew_with_all_that_their_volumes_hold() {
    let _turn = turn();
    let ns = Namespace::new("reboot");
    ns.apply(&json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"key": "secret"}}));
    ns.apply(&json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"key": "config"}}));
    let main = json!({"volumeMounts": [{"name": "s", "mountPath": "/s"}, {"name": "c", "mountPath": "/c"}]});
    ns.pod_with(
        "volumes",
        json!({
        "volumes": [{"name": "s", "secret": {"secretName": "s"}}, {"name": "c", "configMap": {"name": "c"}}],
        "containers": [moxlet_tests_e2e::container("main", IDLE, main)]}),
    );
    ns.wait_ready("volumes");
    // What a reboot takes: every process, every mount.
    Cluster::get().script("node-kill");
    let root = Cluster::get().root_dir();
    let script = format!(
        r#". {0}/common.sh; . {0}/clean.sh
        for path in $(cts "$1"); do lxc-stop -P "$(dirname "$path")" -n "$(basename "$path")" -k >/dev/null 2>&1 || true; done
        mounts_below "$1" | while read -r path; do umount -l "$path" || true; done"#,
        Cluster::project().join("scripts/lib").display()
    );
    assert!(Command::new("bash").args(["-c", &script, "bash"]).arg(&root).status().unwrap().success());
    Cluster::get().script("node-start");
    ns.until("volumes", "started again", LONG, |pod| {
        (pod["status"]["containerStatuses"][0]["restartCount"].as_u64()? >= 1).then_some(())
    });
    wait_ready_within(&ns, "volumes", LONG);
    let token = "test -s /var/run/secrets/kubernetes.io/serviceaccount/token && echo token";
    eventually("what the volumes hold", || {
        let text = ns.exec("volumes", &format!("cat /s/key /c/key; echo; {token}")).text();
        if text == "secretconfig\ntoken\n" { Ok(()) } else { Err(text) }
    });
}
