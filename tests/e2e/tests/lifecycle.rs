//! A pod's life: phases, restarts and back-off, init containers, deletion, images that are not there, refused fields.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, Instant};

use moxlet_tests_e2e::{Cluster, LONG, Namespace, SHORT, busybox, container, eventually};
use serde_json::{Value, json};

const IDLE: &str = "trap 'exit 0' TERM; while true; do sleep 1 & wait $!; done";

fn terminated(pod: &Value, container: usize) -> &Value {
    &pod["status"]["containerStatuses"][container]["state"]["terminated"]
}

#[test]
fn a_pod_runs_with_an_address_and_the_events_of_a_kubelet() {
    let ns = Namespace::new("runs");
    ns.running("one", IDLE);
    let pod = ns.get("one");
    assert_eq!(pod["status"]["phase"], "Running");
    assert_eq!(pod["status"]["qosClass"], "BestEffort");
    assert!(pod["status"]["podIP"].as_str().unwrap().starts_with("10."), "{}", pod["status"]);
    assert_eq!(pod["status"]["podIPs"][0]["ip"], pod["status"]["podIP"]);
    let status = &pod["status"]["containerStatuses"][0];
    assert_eq!(status["started"], true);
    assert!(status["containerID"].as_str().unwrap().starts_with("moxlet://"), "{status}");
    assert!(status["imageID"].as_str().unwrap().contains("sha256:"), "{status}");
    for kind in ["PodScheduled", "Initialized", "ContainersReady", "Ready", "PodReadyToStartContainers"] {
        let found = pod["status"]["conditions"]
            .as_array()
            .unwrap()
            .iter()
            .any(|c| c["type"] == kind && c["status"] == "True");
        assert!(found, "{kind}: {}", pod["status"]["conditions"]);
    }
    for reason in ["Scheduled", "Pulled", "Created", "Started"] {
        ns.wait_event("one", reason, "");
    }
}

#[test]
fn never_restarted_pods_succeed_or_fail_by_exit_code() {
    let ns = Namespace::new("never");
    ns.pod_with("good", json!({"restartPolicy": "Never", "containers": [busybox("exit 0")]}));
    ns.pod_with("bad", json!({"restartPolicy": "Never", "containers": [busybox("exit 42")]}));
    // Kubernetes takes `$$` for an escaped `$`.
    ns.pod_with(
        "killed",
        json!({"restartPolicy": "Never", "containers": [busybox("sh -c 'kill -9 $$$$'; exit $?")]}),
    );
    ns.wait_phase("good", "Succeeded");
    assert_eq!(terminated(&ns.get("good"), 0)["reason"], "Completed");
    for (name, code) in [("bad", 42), ("killed", 137)] {
        ns.wait_phase(name, "Failed");
        let pod = ns.get(name);
        assert_eq!(
            (&terminated(&pod, 0)["exitCode"], &terminated(&pod, 0)["reason"]),
            (&json!(code), &json!("Error"))
        );
    }
}

#[test]
fn on_failure_restarts_until_success() {
    let ns = Namespace::new("onfailure");
    let script = "n=$(cat /data/n 2>/dev/null || echo 0); echo $((n+1)) > /data/n; [ $n -ge 1 ]";
    let main = container("main", script, json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]}));
    ns.pod_with("twice", json!({"restartPolicy": "OnFailure", "containers": [main], "volumes": [{"name": "data", "emptyDir": {}}]}));
    ns.wait_phase("twice", "Succeeded");
    assert_eq!(ns.get("twice")["status"]["containerStatuses"][0]["restartCount"], 1);
}

#[test]
fn a_crashing_container_backs_off_and_keeps_its_last_state() {
    let ns = Namespace::new("crash");
    ns.pod("loop", busybox("echo attempt; exit 3"));
    let message = ns.wait_reason("loop", "CrashLoopBackOff");
    assert!(
        message.contains("back-off") && message.contains("restarting failed container=main"),
        "{message}"
    );
    let pod = ns.until("loop", "restarted", LONG, |pod| {
        (pod["status"]["containerStatuses"][0]["restartCount"].as_u64()? >= 1).then(|| pod.clone())
    });
    assert_eq!(pod["status"]["phase"], "Running");
    assert_eq!(pod["status"]["containerStatuses"][0]["lastState"]["terminated"]["exitCode"], 3);
    ns.wait_event("loop", "BackOff", "restarting failed container");
}

#[test]
fn init_containers_run_one_after_the_other_before_the_others() {
    let ns = Namespace::new("init");
    let mounts = json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]});
    let log = ns.output_of(
        "ordered",
        json!({
            "volumes": [{"name": "data", "emptyDir": {}}],
            "initContainers": [container("first", "sleep 1; echo first >> /data/log", mounts.clone()), container("second", "echo second >> /data/log", mounts.clone())],
            "containers": [container("main", "cat /data/log", mounts)],
        }),
    );
    assert_eq!(log, "first\nsecond\n");
    let pod = ns.get("ordered");
    assert_eq!(pod["status"]["initContainerStatuses"][1]["state"]["terminated"]["exitCode"], 0);
}

#[test]
fn a_failed_init_container_fails_a_pod_that_is_never_restarted() {
    let ns = Namespace::new("initfail");
    ns.pod_with("stuck", json!({"restartPolicy": "Never", "initContainers": [container("first", "exit 1", json!({}))], "containers": [busybox("echo no")]}));
    ns.wait_phase("stuck", "Failed");
    assert_eq!(
        ns.get("stuck")["status"]["containerStatuses"][0]["state"]["waiting"]["reason"],
        "PodInitializing"
    );
}

#[test]
fn containers_of_a_pod_share_localhost_and_shared_memory() {
    let ns = Namespace::new("share");
    let server = container(
        "server",
        &format!(
            "echo from-server > /dev/shm/word; mkdir /www; echo page > /www/index.html; httpd -p 8080 -h /www; {IDLE}"
        ),
        json!({}),
    );
    let client = container("client", IDLE, json!({}));
    ns.pod_with("two", json!({"containers": [server, client]}));
    ns.wait_ready("two");
    let found = eventually("the other container's page and file", || {
        let script = "wget -qO- http://127.0.0.1:8080/ && cat /dev/shm/word";
        let done = ns.kubectl(&["exec", "two", "-c", "client", "--", "sh", "-c", script]);
        if done.code == 0 { Ok(done.text()) } else { Err(done.stderr) }
    });
    assert_eq!(found, "page\nfrom-server\n");
    let processes = ns.kubectl(&["exec", "two", "-c", "client", "--", "ps"]).ok();
    assert!(!processes.contains("httpd"), "PID namespaces are each container's own: {processes}");
}

#[test]
fn graceful_deletion_lets_a_trap_finish_its_work() {
    let ns = Namespace::new("grace");
    let script = "trap 'sleep 2; echo finished > /data/end; exit 0' TERM; echo up; while true; do sleep 1 & wait $!; done";
    let main = container("main", script, json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]}));
    ns.pod_with("tidy", json!({"terminationGracePeriodSeconds": 30, "containers": [main], "volumes": [{"name": "data", "emptyDir": {}}]}));
    ns.wait_ready("tidy");
    let start = Instant::now();
    ns.kubectl(&["delete", "pod", "tidy", "--timeout=60s"]).ok();
    assert!(
        start.elapsed() >= Duration::from_secs(2),
        "it was killed before it had finished: {:?}",
        start.elapsed()
    );
    assert!(start.elapsed() < Duration::from_secs(25), "it was not told to end: {:?}", start.elapsed());
    assert!(ns.get("tidy").is_null());
    ns.wait_event("tidy", "Killing", "Stopping container main");
}

#[test]
fn a_deaf_container_is_killed_after_its_grace() {
    let ns = Namespace::new("deaf");
    ns.pod_with("deaf", json!({"terminationGracePeriodSeconds": 3, "containers": [busybox("trap '' TERM; while true; do sleep 1; done")]}));
    ns.wait_ready("deaf");
    let start = Instant::now();
    ns.kubectl(&["delete", "pod", "deaf", "--timeout=60s"]).ok();
    assert!((3..30).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
}

#[test]
fn forced_deletion_removes_the_pod_and_then_its_ct() {
    let ns = Namespace::new("forced");
    ns.running("gone", "trap '' TERM; while true; do sleep 1; done");
    let uid = ns.get("gone")["metadata"]["uid"].as_str().unwrap().to_owned();
    ns.kubectl(&["delete", "pod", "gone", "--force", "--grace-period=0"]).ok();
    ns.wait_gone("gone");
    eventually("no directory of the pod is left", || {
        let found = std::process::Command::new("find")
            .arg(Cluster::get().root_dir())
            .args(["-xdev", "-name", &format!("*{uid}*")])
            .output()
            .unwrap();
        let found = String::from_utf8_lossy(&found.stdout).into_owned();
        if found.is_empty() { Ok(()) } else { Err(found) }
    });
}

#[test]
fn a_deployment_replaces_a_deleted_pod() {
    let ns = Namespace::new("deploy");
    let template = json!({"metadata": {"labels": {"app": "web"}}, "spec": {
        "tolerations": moxlet_tests_e2e::tolerations(), "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "web", "image": Cluster::get().image("web")}]}});
    ns.apply(&json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": template}}));
    ns.kubectl(&["rollout", "status", "deployment/web", "--timeout=120s"]).ok();
    ns.kubectl(&["delete", "pods", "--all", "--timeout=60s"]).ok();
    ns.kubectl(&["rollout", "status", "deployment/web", "--timeout=120s"]).ok();
    ns.kubectl(&["delete", "deployment", "web"]).ok();
}

#[test]
fn an_image_that_is_not_there_backs_off() {
    let ns = Namespace::new("noimage");
    let image = format!("{}/demo/nothing:1", Cluster::get().registry);
    ns.pod("missing", json!({"name": "main", "image": image}));
    ns.wait_event("missing", "Failed", "ErrImagePull");
    ns.wait_reason("missing", "ImagePullBackOff");
    assert_eq!(ns.get("missing")["status"]["phase"], "Pending");
}

#[test]
fn a_digest_that_is_not_there_is_an_image_error() {
    let ns = Namespace::new("nodigest");
    let image = format!("{}/demo/busybox@sha256:{}", Cluster::get().registry, "0".repeat(64));
    ns.pod("digest", json!({"name": "main", "image": image}));
    ns.wait_reason("digest", "ImagePullBackOff");
}

#[test]
fn an_invalid_image_name_says_so() {
    let ns = Namespace::new("badname");
    ns.pod("invalid", json!({"name": "main", "image": "UPPER/Case:::"}));
    ns.wait_reason("invalid", "InvalidImageName");
}

#[test]
fn never_pulled_images_must_be_there() {
    let ns = Namespace::new("neverpull");
    let image = format!("{}/demo/absent:1", Cluster::get().registry);
    ns.pod("never", json!({"name": "main", "image": image, "imagePullPolicy": "Never"}));
    ns.wait_reason("never", "ErrImageNeverPull");
}

#[test]
fn one_bad_image_holds_up_nobody_else() {
    let ns = Namespace::new("mixed");
    let bad = json!({"name": "bad", "image": format!("{}/demo/nothing:2", Cluster::get().registry)});
    ns.pod_with("mixed", json!({"containers": [bad, container("good", IDLE, json!({}))]}));
    ns.until("mixed", "the good container runs", SHORT, |pod| {
        let statuses = pod["status"]["containerStatuses"].as_array()?;
        statuses.iter().any(|s| s["name"] == "good" && s["state"]["running"].is_object()).then_some(())
    });
}

#[test]
fn a_command_that_is_missing_is_a_start_error_with_code_128() {
    let ns = Namespace::new("nocommand");
    let main = container("main", "", json!({"command": ["/no/such/program"]}));
    ns.pod_with("missing", json!({"restartPolicy": "Never", "containers": [main]}));
    ns.wait_phase("missing", "Failed");
    let pod = ns.get("missing");
    let state = terminated(&pod, 0);
    assert_eq!((&state["exitCode"], &state["reason"]), (&json!(128), &json!("StartError")));
    assert!(state["message"].as_str().unwrap().contains("/no/such/program"), "{state}");
    ns.wait_event("missing", "Failed", "/no/such/program");
}

#[test]
fn a_field_that_is_not_supported_keeps_the_pod_pending_and_is_named() {
    let ns = Namespace::new("refused");
    ns.pod_with("hostnet", json!({"hostNetwork": true, "containers": [busybox(IDLE)]}));
    let probe = container("main", IDLE, json!({"livenessProbe": {"exec": {"command": ["true"]}}}));
    ns.pod_with("probe", json!({"containers": [probe]}));
    for (name, field) in [("hostnet", "hostNetwork"), ("probe", "livenessProbe")] {
        ns.until(name, "a reason that names the field", SHORT, |pod| {
            let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
            waiting["message"].as_str()?.contains(field).then_some(())
        });
        assert_eq!(ns.get(name)["status"]["phase"], "Pending");
        assert_eq!(ns.events(name).iter().filter(|e| e.contains(field)).count(), 1, "{:?}", ns.events(name));
    }
    ns.kubectl(&["delete", "pods", "--all", "--timeout=60s"]).ok();
}

#[test]
fn a_termination_message_is_read_from_its_file_or_the_log() {
    let ns = Namespace::new("message");
    ns.pod_with("file", json!({"restartPolicy": "Never", "containers": [busybox("echo told > /dev/termination-log; exit 1")]}));
    let main = container(
        "main",
        "echo from the log; exit 1",
        json!({"terminationMessagePolicy": "FallbackToLogsOnError"}),
    );
    ns.pod_with("log", json!({"restartPolicy": "Never", "containers": [main]}));
    for (name, message) in [("file", "told\n"), ("log", "from the log\n")] {
        ns.wait_phase(name, "Failed");
        assert_eq!(terminated(&ns.get(name), 0)["message"], message);
    }
}

#[test]
fn a_finished_pods_log_stays_until_it_is_deleted() {
    let ns = Namespace::new("finished");
    assert_eq!(ns.output_of("done", json!({"containers": [busybox("echo kept")]})), "kept\n");
    ns.until("done", "its address is released or kept, its phase stays", SHORT, |pod| {
        (pod["status"]["phase"] == "Succeeded").then_some(())
    });
    assert_eq!(ns.logs("done"), "kept\n");
    ns.kubectl(&["delete", "pod", "done", "--timeout=60s"]).ok();
}

#[test]
fn a_changed_image_restarts_its_container() {
    let ns = Namespace::new("image");
    let web = Cluster::get().image("web");
    ns.running("one", IDLE);
    ns.kubectl(&["set", "image", "pod/one", &format!("main={web}")]).ok();
    ns.until("one", "a container of the new image", LONG, |pod| {
        let status = &pod["status"]["containerStatuses"][0];
        (status["image"] == web && status["restartCount"] == 1 && status["ready"] == true).then_some(())
    });
    ns.wait_event("one", "Killing", "definition changed");
    assert!(ns.exec("one", "cat /www/index.html").ok().contains("Moxlet"));
}
