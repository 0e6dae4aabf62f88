//! What keeps a container in its bounds: limits, seccomp, capabilities, users, read-only and masked paths.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::needless_pass_by_value)]

use moxlet_tests_e2e::{LONG, Namespace, busybox, container};
use serde_json::{Value, json};

const IDLE: &str = "trap 'exit 0' TERM; while true; do sleep 1 & wait $!; done";
/// containerd's default set.
const DEFAULT_CAPABILITIES: &str = "00000000a80425fb";

fn status_line(text: &str, key: &str) -> String {
    text.lines().find_map(|l| l.strip_prefix(&format!("{key}:"))).unwrap_or_default().trim().to_owned()
}

fn with(security: Value, script: &str) -> Value {
    container("main", script, json!({"securityContext": security}))
}

#[test]
fn containers_run_unprivileged_with_seccomp_and_the_default_capabilities_also_in_exec() {
    let ns = Namespace::new("confined");
    ns.pod("box", busybox(&format!("cat /proc/self/status; {IDLE}")));
    ns.wait_ready("box");
    for (place, text) in [("start", ns.logs("box")), ("exec", ns.exec("box", "cat /proc/self/status").ok())] {
        assert_eq!(status_line(&text, "Seccomp"), "2", "{place}: {text}");
        assert_eq!(status_line(&text, "CapBnd"), DEFAULT_CAPABILITIES, "{place}");
        assert_eq!(status_line(&text, "CapEff"), DEFAULT_CAPABILITIES, "{place}");
    }
    let map = ns.exec("box", "cat /proc/self/uid_map").ok();
    let fields: Vec<&str> = map.split_whitespace().collect();
    assert_ne!(fields[1], "0", "the CT's root is the host's root: {map}");
}

#[test]
fn capabilities_are_added_and_dropped() {
    let ns = Namespace::new("caps");
    let main = with(
        json!({"capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}}),
        "cat /proc/self/status",
    );
    let text = ns.output_of("one", json!({"containers": [main]}));
    assert_eq!(status_line(&text, "CapEff"), "0000000000000400");
    assert_eq!(status_line(&text, "CapBnd"), "0000000000000400");
}

#[test]
fn privilege_escalation_can_be_forbidden() {
    let ns = Namespace::new("nnp");
    let main = with(json!({"allowPrivilegeEscalation": false}), "cat /proc/self/status");
    assert_eq!(status_line(&ns.output_of("no", json!({"containers": [main]})), "NoNewPrivs"), "1");
}

#[test]
fn a_container_cannot_mount_or_load_or_look_at_the_host() {
    let ns = Namespace::new("attempts");
    ns.running("box", IDLE);
    for script in [
        "mount -t tmpfs x /tmp",
        "umount /proc",
        "mknod /tmp/d b 8 0",
        "echo 1 > /proc/sys/kernel/panic",
        "echo b > /proc/sysrq-trigger",
        "unshare -Ur true",
    ] {
        let done = ns.exec("box", script);
        assert_ne!(done.code, 0, "{script} was allowed");
    }
    for path in ["/proc/kcore", "/proc/keys", "/proc/timer_list"] {
        let read = ns.exec("box", &format!("head -c 1 {path} 2>/dev/null | wc -c")).text();
        assert_eq!(read.trim(), "0", "{path} can be read");
    }
}

#[test]
fn limits_are_seen_and_cannot_be_raised() {
    let ns = Namespace::new("limits");
    let main = container("main", IDLE, json!({"resources": {"limits": {"memory": "64Mi", "cpu": "250m"}}}));
    ns.pod("box", main);
    ns.wait_ready("box");
    let find = "find /sys/fs/cgroup -maxdepth 3 \\( -name memory.limit_in_bytes -o -name memory.max -o -name cpu.cfs_quota_us -o -name cpu.max \\) 2>/dev/null";
    let files = ns.exec("box", &format!("for f in $({find}); do echo $f $(cat $f); done")).text();
    assert!(files.contains("67108864"), "the memory limit is not to be seen: {files}");
    assert!(files.contains("25000"), "the CPU limit is not to be seen: {files}");
    let raised = ns.exec("box", &format!("for f in $({find}); do (echo -1 > $f || echo max > $f) 2>/dev/null && echo RAISED $f; done; true")).text();
    assert!(!raised.contains("RAISED"), "{raised}");
}

#[test]
fn a_container_over_its_memory_limit_is_oomkilled() {
    let ns = Namespace::new("oom");
    let main = container(
        "main",
        "exec tail -c 200m /dev/zero",
        json!({"resources": {"limits": {"memory": "32Mi"}}}),
    );
    ns.pod_with("hog", json!({"restartPolicy": "Never", "containers": [main]}));
    ns.wait_phase("hog", "Failed");
    let pod = ns.get("hog");
    let state = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    assert_eq!((&state["reason"], &state["exitCode"]), (&json!("OOMKilled"), &json!(137)), "{state}");
}

#[test]
fn one_containers_hunger_does_not_kill_its_neighbour() {
    let ns = Namespace::new("neighbour");
    let limits = json!({"resources": {"limits": {"memory": "32Mi"}}});
    ns.pod_with("pair", json!({"containers": [container("hog", "sleep 2; exec tail -c 200m /dev/zero", limits.clone()), container("calm", IDLE, limits)]}));
    ns.until("pair", "the hog is killed", LONG, |pod| {
        let statuses = pod["status"]["containerStatuses"].as_array()?;
        let hog = statuses.iter().find(|s| s["name"] == "hog")?;
        let killed = |s: &Value| s["terminated"]["reason"] == "OOMKilled";
        (killed(&hog["state"]) || killed(&hog["lastState"])).then_some(())
    });
    let pod = ns.get("pair");
    let calm = pod["status"]["containerStatuses"]
        .as_array()
        .unwrap()
        .iter()
        .find(|s| s["name"] == "calm")
        .unwrap()
        .clone();
    assert_eq!(calm["restartCount"], 0, "{calm}");
    assert!(calm["state"]["running"].is_object(), "{calm}");
}

#[test]
fn users_and_groups_are_as_asked() {
    let ns = Namespace::new("users");
    let main = with(
        json!({"runAsUser": 1000, "runAsGroup": 3000}),
        "id -u; id -g; id -G; touch /v/f && stat -c %g /v/f; stat -c %g /v",
    );
    let mut main = main;
    main["volumeMounts"] = json!([{"name": "v", "mountPath": "/v"}]);
    let text = ns.output_of("ids", json!({"securityContext": {"supplementalGroups": [4000], "fsGroup": 2000}, "containers": [main], "volumes": [{"name": "v", "emptyDir": {}}]}));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..2], ["1000", "3000"], "{text}");
    for group in ["3000", "2000", "4000"] {
        assert!(lines[2].split(' ').any(|g| g == group), "{text}");
    }
    assert_eq!(lines[3..5], ["2000", "2000"], "{text}");
}

#[test]
fn an_image_of_root_is_refused_where_root_is_forbidden() {
    let ns = Namespace::new("nonroot");
    ns.pod("root", with(json!({"runAsNonRoot": true}), IDLE));
    let message = ns.wait_reason("root", "CreateContainerConfigError");
    assert!(message.contains("runAsNonRoot"), "{message}");
    ns.pod("user", with(json!({"runAsNonRoot": true, "runAsUser": 1000}), IDLE));
    ns.wait_ready("user");
}

#[test]
fn a_read_only_root_is_read_only() {
    let ns = Namespace::new("readonly");
    ns.pod("box", with(json!({"readOnlyRootFilesystem": true}), IDLE));
    ns.wait_ready("box");
    assert!(ns.exec("box", "echo x > /root/x").fails().contains("Read-only"));
    ns.exec("box", "echo x > /dev/shm/x").ok();
}

#[test]
fn processes_are_marked_for_the_oom_killer_by_class() {
    let ns = Namespace::new("oomscore");
    ns.running("best-effort", IDLE);
    let limits = json!({"resources": {"limits": {"memory": "32Mi", "cpu": "100m"}}});
    ns.pod("guaranteed", container("main", IDLE, limits));
    ns.wait_ready("guaranteed");
    assert_eq!(ns.get("guaranteed")["status"]["qosClass"], "Guaranteed");
    let score = |pod: &str| ns.exec(pod, "cat /proc/1/oom_score_adj").ok().trim().parse::<i32>().unwrap();
    assert_eq!(score("best-effort"), 1000);
    // Where the kernel refuses a negative value it is clamped.
    assert!(score("guaranteed") <= 0, "{}", score("guaranteed"));
}
