//! The program itself: bad configuration, no root, a taken port, and pods from a folder without any cluster.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    io::Write as _,
    net::TcpListener,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use moxlet_tests_e2e::{Cluster, busybox, eventually};
use serde_json::json;

fn moxlet() -> Command {
    let mut command = Command::new(Cluster::get().bin.join("moxlet"));
    command.env_remove("KUBECONFIG");
    command
}

/// A program that should end by itself, soon.
fn ends(mut command: Command) -> Output {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(30) {
            drop(child.kill());
            panic!("it did not end: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

fn complaint(command: Command) -> String {
    let output = ends(command);
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A directory that a CT can reach, removed with what `moxlet` leaves in it.
struct Root(tempfile::TempDir);

impl Root {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("moxlet-program.").tempdir_in("/var/lib").unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let script = Cluster::project().join("scripts/lib");
        let clean = format!(". {0}/common.sh; . {0}/clean.sh; clean \"$1\" moxlet-prog", script.display());
        drop(Command::new("bash").args(["-c", &clean, "bash"]).arg(self.path()).status());
    }
}

#[test]
fn an_unknown_key_is_named_with_its_line() {
    let root = Root::new();
    let file = root.path().join("moxlet.toml");
    std::fs::write(&file, "max_pods = 10\n\nmax_podz = 11\n").unwrap();
    let mut command = moxlet();
    command.args(["up", "--config"]).arg(&file);
    let text = complaint(command);
    assert!(text.contains("line 3") && text.contains("max_podz"), "{text}");
}

#[test]
fn without_root_it_says_so() {
    let copy = tempfile::Builder::new().prefix("moxlet-program.").tempdir_in("/var/lib").unwrap();
    std::fs::set_permissions(copy.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = copy.path().join("moxlet");
    std::fs::copy(Cluster::get().bin.join("moxlet"), &program).unwrap();
    let mut command = Command::new(program);
    command.env_remove("KUBECONFIG").args(["up", "--root-dir", "/nonexistent/moxlet"]).uid(65534).gid(65534);
    let text = complaint(command);
    assert!(text.contains("root"), "{text}");
}

#[test]
fn help_names_the_ways_to_start() {
    let mut command = moxlet();
    command.args(["up", "--help"]);
    let output = ends(command);
    let text = String::from_utf8_lossy(&output.stdout);
    for word in ["--kubeconfig", "--bootstrap-kubeconfig", "--static-pod-dir", "--root-dir", "--stop-pods"] {
        assert!(text.contains(word), "{word} is missing in {text}");
    }
}

#[test]
fn a_taken_port_is_named() {
    let root = Root::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let pods = root.path().join("pods");
    std::fs::create_dir(&pods).unwrap();
    let mut command = moxlet();
    command
        .args(["up", "--listen", &address, "--root-dir"])
        .arg(root.path().join("r"))
        .arg("--static-pod-dir")
        .arg(&pods);
    let text = complaint(command);
    assert!(text.contains(&address) && text.contains("in use"), "{text}");
}

#[test]
fn two_programs_on_one_directory_are_refused() {
    let mut command = moxlet();
    command.args(["up", "--root-dir"]).arg(Cluster::get().root_dir());
    let text = complaint(command);
    assert!(text.contains("another moxlet"), "{text}");
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(Command::new("kill").arg(self.0.id().to_string()).status());
        drop(self.0.wait());
    }
}

/// What people on the host see of the pod `static-…` by the agent's socket, in the words of kubectl.
fn the_host_shows_its_pods(socket: &Path) {
    let on_the_host = |args: &[&str]| {
        let mut command = moxlet();
        command.args(args).env("MOXLET_SOCKET", socket).stdin(Stdio::null());
        let output = ends(command);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let listed = || on_the_host(&["pods", "-o", "json"]).1;
    let pod = eventually("the pod runs", || {
        let pods: serde_json::Value = serde_json::from_str(&listed()).map_err(|e| e.to_string())?;
        if pods[0]["status"] == "Running" { Ok(pods[0].clone()) } else { Err(pods.to_string()) }
    });
    let name = pod["name"].as_str().unwrap();
    let (_, table, _) = on_the_host(&["pods"]);
    let lines: Vec<_> = table.lines().collect();
    assert!(lines[0].starts_with("NAMESPACE ") && lines[0].ends_with("IP"), "{table}");
    assert!(lines[1].contains(name) && lines[1].contains("1/1") && lines[1].contains("Running"), "{table}");
    let (code, log, error) = on_the_host(&["logs", name, "--tail", "1"]);
    assert_eq!((code, log.as_str()), (Some(0), "alone\n"), "{error}");
    let (code, _, error) = on_the_host(&["logs", name, "--previous"]);
    assert!(code == Some(1) && error.contains("before the last restart"), "{error}");
    let (code, out, error) =
        on_the_host(&["exec", name, "--", "sh", "-c", "echo out; echo err >&2; exit 42"]);
    assert_eq!((code, out.as_str(), error.as_str()), (Some(42), "out\n", "err\n"));
    let mut piped = moxlet();
    piped.args(["exec", "-i", name, "--socket"]).arg(socket).args(["--", "cat"]);
    let echoed = with_input(piped, b"to the container");
    assert_eq!(String::from_utf8_lossy(&echoed.stdout), "to the container");
    let (code, _, error) = on_the_host(&["exec", name, "-c", "nobody", "--", "true"]);
    assert!(code == Some(1) && error.contains("no container \"nobody\""), "{error}");
    let (_, inspected, _) = on_the_host(&["inspect", name]);
    assert!(inspected.contains("\"CONTAINER_RUNNING\""), "{inspected}");
    let (_, events, error) = on_the_host(&["events"]);
    assert!(events.contains("Started") && events.contains(name), "{events}{error}");
}

/// Runs a program with that on its standard input.
fn with_input(mut command: Command, input: &[u8]) -> Output {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn a_configuration_is_judged_without_a_start() {
    let root = Root::new();
    let file = root.path().join("moxlet.toml");
    let judged = |text: &str| {
        std::fs::write(&file, text).unwrap();
        let mut command = moxlet();
        command.args(["check-config", "--config"]).arg(&file);
        let output = ends(command);
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(judged("container_log_max_bytes = \"10Mi\"\n"), (Some(0), String::new()));
    let (code, text) = judged("log = \"inof\"\ndocker_config = \"/nonexistent/config.json\"\n");
    assert_eq!(code, Some(1));
    assert!(text.contains("did you mean \"info\"?") && text.contains("/nonexistent/config.json"), "{text}");
}

#[test]
fn a_mistyped_store_is_not_made() {
    let root = Root::new();
    let mut command = moxlet();
    command.args(["image", "--store"]).arg(root.path().join("typo")).arg("ls");
    let text = complaint(command);
    assert!(text.contains("there is no store"), "{text}");
    assert!(!root.path().join("typo").exists());
}

#[test]
fn pods_of_a_folder_run_without_a_cluster() {
    let root = Root::new();
    let pods = root.path().join("pods");
    std::fs::create_dir(&pods).unwrap();
    let data = root.path().join("r");
    let file = root.path().join("moxlet.toml");
    let registry = &Cluster::get().registry;
    std::fs::write(&file, format!("root_dir = {data:?}\nstatic_pod_dir = {pods:?}\nlisten = \"127.0.0.1:0\"\nbridge = \"moxlet-prog\"\npod_cidr = \"10.249.0.0/24\"\nplain_http_registries = [{registry:?}]\nstop_pods = true\n")).unwrap();
    let manifest = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "static"}, "spec": {"terminationGracePeriodSeconds": 1,
        "containers": [busybox("echo alone; trap 'exit 0' TERM; while true; do sleep 1 & wait $!; done")]}});
    std::fs::write(pods.join("static.json"), manifest.to_string()).unwrap();
    let mut command = moxlet();
    let running = Running(
        command
            .args(["up", "--config"])
            .arg(&file)
            .stderr(std::fs::File::create(root.path().join("log")).unwrap())
            .spawn()
            .unwrap(),
    );
    let logged = || {
        let found = Command::new("find")
            .arg(&data)
            .args(["-name", "*.log", "-exec", "grep", "-h", "alone", "{}", "+"])
            .output()
            .unwrap();
        String::from_utf8_lossy(&found.stdout).into_owned()
    };
    eventually("the static pod's log", || {
        if logged().contains("alone") {
            Ok(())
        } else {
            Err(std::fs::read_to_string(root.path().join("log")).unwrap())
        }
    });
    the_host_shows_its_pods(&data.join("run/agent.sock"));
    std::fs::remove_file(pods.join("static.json")).unwrap();
    eventually("the CT is gone with its manifest", || {
        let found =
            Command::new("find").arg(&data).args(["-xdev", "-path", "*/ct/*/config"]).output().unwrap();
        let text = String::from_utf8_lossy(&found.stdout).into_owned();
        if text.is_empty() { Ok(()) } else { Err(text) }
    });
    drop(running);
}
