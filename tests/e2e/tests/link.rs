//! Node and agent apart: two programs that meet at the agent's port, by certificates that `moxlet certificates` makes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command},
};

use moxlet_tests_e2e::{Cluster, Kubectl, Namespace, busybox, eventually, tolerations};
use serde_json::{Value, json};

const BRIDGE: &str = "moxlet-link";

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A node of its own in the cluster, with an agent of its own; with what they leave it goes.
struct Apart {
    dir: tempfile::TempDir,
    name: String,
    agent: Option<Child>,
    node: Option<Child>,
}

impl Apart {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("moxlet-link.").tempdir_in("/var/lib").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let apart = Self { dir, name: format!("link-{}", std::process::id()), agent: None, node: None };
        let (port, cluster) = (free_port(), Cluster::get());
        apart.certificates("link");
        let link = |name: &str| {
            let at = |file: &str| apart.path("used").join(file);
            format!(
                "link_certificate_file = {:?}\nlink_key_file = {:?}\nlink_ca_file = {:?}\n",
                at(&format!("{name}.crt")),
                at(&format!("{name}.key")),
                at("ca.crt")
            )
        };
        let (agent, node) = (link("localhost"), link("node"));
        let (root, registry) = (apart.path("host"), &cluster.registry);
        fs::write(
            apart.path("agent.toml"),
            format!(
                "root_dir = {root:?}\nbridge = \"{BRIDGE}\"\nplain_http_registries = [{registry:?}]\n\
                 agent_listen = \"127.0.0.1:{port}\"\n{agent}"
            ),
        )
        .unwrap();
        let (state, control) = (apart.path("node"), cluster.dir.join("control-plane"));
        fs::write(
            apart.path("node.toml"),
            format!(
                "root_dir = {state:?}\nnode_name = {:?}\nnode_ip = \"127.0.0.1\"\nlisten = \"127.0.0.1:{}\"\n\
                 kubeconfig = {:?}\nbootstrap_kubeconfig = {:?}\nclient_ca_file = {:?}\n\
                 register_taints = [\"moxlet.dev/link=apart:NoSchedule\"]\n\
                 pressure_thresholds = {{ \"nodefs.available\" = \"500Mi\" }}\nimage_gc_high_threshold_percent = 100\n\
                 agent_endpoint = \"https://localhost:{port}\"\n{node}",
                apart.name,
                free_port(),
                state.join("node/kubeconfig"),
                control.join("bootstrap.kubeconfig"),
                control.join("ca.crt"),
            ),
        )
        .unwrap();
        apart
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes certificates in a directory of that name.
    fn certificates(&self, name: &str) {
        let mut command = Command::new(Cluster::get().bin.join("moxlet"));
        command.args(["certificates", "--agent", "localhost", "--dir"]).arg(self.path(name));
        assert!(command.status().unwrap().success());
    }

    /// Has a program's certificate taken from that directory.
    fn use_certificate(&self, from: &str, program: &str) {
        fs::create_dir_all(self.path("used")).unwrap();
        for ending in ["key", "crt"] {
            let file = format!("{program}.{ending}");
            fs::copy(self.path(from).join(&file), self.path("used").join(file)).unwrap();
        }
        fs::copy(self.path("link/ca.crt"), self.path("used/ca.crt")).unwrap();
    }

    fn start(&self, program: &str) -> Option<Child> {
        let log =
            fs::File::options().append(true).create(true).open(self.path(&format!("{program}.log"))).unwrap();
        let mut command = Command::new(Cluster::get().bin.join("moxlet"));
        command
            .env_remove("KUBECONFIG")
            .args([program, "--config"])
            .arg(self.path(&format!("{program}.toml")));
        Some(command.stdin(std::process::Stdio::null()).stderr(log).spawn().unwrap())
    }

    fn wait_logged(&self, program: &str, words: &[&str]) {
        eventually(&format!("{program}'s log to say {words:?}"), || {
            let log = fs::read_to_string(self.path(&format!("{program}.log"))).unwrap_or_default();
            let said = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
            if said { Ok(()) } else { Err(log) }
        });
    }

    fn wait_ready(&self, status: &str, word: &str) {
        eventually(&format!("the Node to have Ready={status}"), || {
            let node = Kubectl::new(None, &["get", "node", &self.name, "-o", "json"]).run();
            let node: Value = serde_json::from_str(node.text().as_ref()).unwrap_or_default();
            let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let ready = conditions.iter().find(|c| c["type"] == "Ready").cloned().unwrap_or_default();
            let message = ready["message"].as_str().unwrap_or_default();
            if ready["status"] == status && message.contains(word) { Ok(()) } else { Err(ready.to_string()) }
        });
    }

    /// Signs the serving certificate that the node asks for.
    fn approve(&self) {
        let user = format!("system:node:{}", self.name);
        eventually("the node's request of a serving certificate", || {
            let all = Kubectl::new(None, &["get", "csr", "-o", "json"]).json();
            let own = all["items"].as_array().into_iter().flatten().find(|csr| {
                csr["spec"]["username"] == user.as_str()
                    && csr["spec"]["signerName"] == "kubernetes.io/kubelet-serving"
            });
            let name = own.and_then(|csr| csr["metadata"]["name"].as_str()).ok_or_else(|| all.to_string())?;
            Kubectl::new(None, &["certificate", "approve", name]).run().ok();
            Ok(())
        });
    }
}

fn kill(program: &mut Option<Child>) {
    if let Some(mut child) = program.take() {
        drop(child.kill());
        drop(child.wait());
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        kill(&mut self.node);
        kill(&mut self.agent);
        drop(Kubectl::new(None, &["delete", "node", &self.name, "--ignore-not-found"]).run());
        let script = Cluster::project().join("scripts/lib");
        let clean = format!(". {0}/common.sh; . {0}/clean.sh; clean \"$1\" {BRIDGE}", script.display());
        drop(Command::new("bash").args(["-c", &clean, "bash"]).arg(self.dir.path()).status());
    }
}

/// A file of some size of which no part is like another.
fn large(path: &Path) -> Vec<u8> {
    let bytes: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(path, &bytes).unwrap();
    bytes
}

#[test]
fn a_node_and_an_agent_apart_serve_pods_and_either_may_go_and_come() {
    let mut apart = Apart::new();
    apart.certificates("strange");
    apart.use_certificate("link", "localhost");
    apart.use_certificate("strange", "node");
    apart.agent = apart.start("agent");
    apart.node = apart.start("node");
    apart.wait_logged("node", &["the agent does not answer yet", "link_certificate_file"]);
    apart.wait_logged("agent", &["refused", "authority"]);
    // The right one is taken up without a restart.
    apart.use_certificate("link", "node");
    apart.approve();
    apart.wait_ready("True", "");

    let ns = Namespace::new("link");
    let script = "echo begun; trap 'exit 0' TERM; while true; do sleep 1 & wait $!; done";
    ns.pod_with(
        "far",
        json!({"nodeName": apart.name, "tolerations": tolerations(), "containers": [busybox(script)]}),
    );
    ns.wait_ready("far");
    let container = |ns: &Namespace| {
        let status = ns.get("far")["status"]["containerStatuses"][0].clone();
        assert_eq!(status["restartCount"], 0, "{status}");
        status["containerID"].as_str().unwrap().to_owned()
    };
    let first = container(&ns);
    eventually("the pod's log", || {
        let log = ns.logs("far");
        if log.trim() == "begun" { Ok(()) } else { Err(log) }
    });
    assert_eq!(ns.exec("far", "hostname").text().trim(), "far");
    let (sent, came) = (apart.path("sent"), apart.path("came"));
    let bytes = large(&sent);
    ns.kubectl(&["cp", sent.to_str().unwrap(), "far:/tmp/file"]).ok();
    ns.kubectl(&["cp", "far:/tmp/file", came.to_str().unwrap()]).ok();
    assert!(fs::read(&came).unwrap() == bytes, "a file came back as another");

    kill(&mut apart.agent);
    apart.wait_ready("False", "https://localhost");
    apart.agent = apart.start("agent");
    apart.wait_ready("True", "");
    // A host that is gone without a word: nothing ends the connection.
    let agent = apart.agent.as_ref().unwrap().id().to_string();
    let signal = |name: &str| assert!(Command::new("kill").args([name, &agent]).status().unwrap().success());
    signal("-STOP");
    apart.wait_ready("False", "");
    signal("-CONT");
    apart.wait_ready("True", "");
    kill(&mut apart.node);
    apart.node = apart.start("node");
    eventually("an exec after both have come back", || {
        let done = ns.exec("far", "hostname");
        if done.text().trim() == "far" { Ok(()) } else { Err(done.stderr) }
    });
    assert_eq!(container(&ns), first);
    ns.kubectl(&["delete", "pod", "far", "--wait=false"]).ok();
    ns.wait_gone("far");
}
