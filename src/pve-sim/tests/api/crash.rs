//! A kill at any point leaves what a restart understands.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::cluster::{CONF, Cluster, client, encode, percent, read};

struct Process {
    child: Child,
    url: String,
    admin: String,
    token: String,
    client: reqwest::Client,
}

impl Process {
    fn start(dir: &Path) -> Self {
        let ready = dir.join("ready.json");
        let _ = std::fs::remove_file(&ready);
        let child = Command::new(env!("CARGO_BIN_EXE_pve-sim"))
            .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--state"])
            .arg(dir.join("state"))
            .arg("--token-file")
            .arg(dir.join("token"))
            .arg("--ready-file")
            .arg(&ready)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let since = Instant::now();
        while !ready.exists() {
            assert!(since.elapsed() < Duration::from_secs(60), "it does not come up");
            std::thread::sleep(Duration::from_millis(10));
        }
        let said: Value = serde_json::from_slice(&std::fs::read(&ready).unwrap()).unwrap();
        let text = |v: &Value| v.as_str().unwrap().to_owned();
        Self {
            child,
            url: text(&said["hosts"][0]["url"]),
            admin: text(&said["admin"]),
            token: std::fs::read_to_string(dir.join("token")).unwrap().trim().to_owned(),
            client: client(&std::fs::read(text(&said["ca"])).unwrap()),
        }
    }

    async fn call(&self, method: &str, path: &str, params: &[(&str, &str)]) -> Option<Value> {
        let mut url = format!("{}/api2/json{path}", self.url);
        let mut request = self.client.request(method.parse().unwrap(), &url);
        if matches!(method, "GET" | "DELETE") {
            url = format!("{url}?{}", encode(params));
            request = self.client.request(method.parse().unwrap(), url);
        } else {
            request =
                request.header("Content-Type", "application/x-www-form-urlencoded").body(encode(params));
        }
        let sent =
            request.header("Authorization", format!("PVEAPIToken={}", self.token)).send().await.ok()?;
        Some(read(sent).await.json()["data"].clone())
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[tokio::test]
async fn a_task_that_ran_when_the_simulator_was_killed_has_an_unexpected_status() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path());
    let conf = dir.path().join("state/etc/pve/nodes/pve1/lxc/100.conf");
    std::fs::write(&conf, CONF).unwrap();
    let rule = json!({ "kind": "vzstart", "do": "never-ends" }).to_string();
    let post = process
        .client
        .post(format!("{}/faults/tasks", process.admin))
        .header("Content-Type", "application/json");
    post.body(rule).send().await.unwrap();
    let upid = process.call("POST", "/nodes/pve1/lxc/100/status/start", &[]).await.unwrap();
    process.kill();

    let process = Process::start(dir.path());
    let path = format!("/nodes/pve1/tasks/{}/status", percent(upid.as_str().unwrap()));
    let status = process.call("GET", &path, &[]).await.unwrap();
    assert_eq!((&status["status"], &status["exitstatus"]), (&json!("stopped"), &json!("unexpected status")));
    let upid = process.call("POST", "/nodes/pve1/lxc/100/status/start", &[]).await.unwrap();
    assert!(upid.is_string());
    process.kill();
}

#[tokio::test]
async fn a_kill_at_any_point_of_a_cts_life_leaves_a_state_that_can_be_cleaned_up() {
    let dir = tempfile::tempdir().unwrap();
    let created = [
        ("vmid", "100"),
        ("ostemplate", super::cluster::TEMPLATE),
        ("storage", "local-zfs"),
        ("unprivileged", "1"),
        ("start", "1"),
    ];
    for round in 0..8u64 {
        let process = Process::start(dir.path());
        let life = async {
            process.call("POST", "/nodes/pve1/lxc", &created).await;
            process.call("POST", "/nodes/pve1/lxc/100/status/stop", &[]).await;
            process.call("DELETE", "/nodes/pve1/lxc/100", &[("purge", "1"), ("force", "1")]).await;
        };
        let _ = tokio::time::timeout(Duration::from_millis(3 + round * 4), life).await;
        process.kill();

        let process = Process::start(dir.path());
        let conf = dir.path().join("state/etc/pve/nodes/pve1/lxc/100.conf");
        let since = Instant::now();
        while conf.exists() {
            assert!(since.elapsed() < Duration::from_secs(60), "{}", std::fs::read_to_string(&conf).unwrap());
            let text = std::fs::read_to_string(&conf).unwrap_or_default();
            if text.contains("lock:") || text.is_empty() {
                // What an admin does with `pct unlock`: the lock is of a task that is no more.
                std::fs::write(&conf, text.replace("lock: create\n", "").replace("lock: destroyed\n", ""))
                    .unwrap();
            }
            process
                .call(
                    "DELETE",
                    "/nodes/pve1/lxc/100",
                    &[("purge", "1"), ("force", "1"), ("destroy-unreferenced-disks", "1")],
                )
                .await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        for volume in process
            .call("GET", "/nodes/pve1/storage/local-zfs/content", &[])
            .await
            .unwrap()
            .as_array()
            .unwrap()
        {
            let path = format!("/nodes/pve1/storage/local-zfs/content/{}", volume["volid"].as_str().unwrap());
            process.call("DELETE", &path, &[]).await;
        }
        process.kill();
    }
}

#[tokio::test]
async fn running_cts_users_and_tasks_are_still_there_after_a_restart() {
    let cluster = Cluster::start(1).await;
    cluster.write_conf("pve1", 100, CONF);
    cluster.done("POST", "/nodes/pve1/lxc/100/status/start", &[]).await;
    cluster.call("POST", "/access/users", &[("userid", "kept@pve")]).await.data();
    let fingerprint = cluster.simulator.hosts()[0].fingerprint.clone();
    let cluster = cluster.restart(1).await;
    assert_eq!(cluster.simulator.hosts()[0].fingerprint, fingerprint);
    assert_eq!(
        cluster.call("GET", "/nodes/pve1/lxc/100/status/current", &[]).await.data()["status"],
        "running"
    );
    cluster.call("GET", "/access/users/kept@pve", &[]).await.data();
    let tasks = cluster.call("GET", "/nodes/pve1/tasks", &[]).await.data();
    assert_eq!(tasks[0]["status"], "OK");
}
