//! What a container finds in itself: environment, volumes and their updates, tokens, names and resolver.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use moxlet_tests_e2e::{Cluster, LONG, Namespace, busybox, container, eventually_within};
use serde_json::{Value, json};

const IDLE: &str = "trap 'exit 0' TERM; while true; do sleep 1 & wait $!; done";

fn data(ns: &Namespace) {
    ns.apply(&json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "cfg"}, "data": {"colour": "red", "shape": "round"}}));
    ns.apply(&json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "sec"}, "stringData": {"password": "hunter2"}}));
}

fn volume(name: &str, kind: Value) -> Value {
    let mut volume = kind;
    volume["name"] = json!(name);
    volume
}

#[test]
fn environment_of_every_kind() {
    let ns = Namespace::new("env");
    data(&ns);
    let env = json!([
        {"name": "PLAIN", "value": "a"},
        {"name": "COMPOSED", "value": "$(PLAIN)-$(COLOUR)-$$(PLAIN)-$(NOBODY)"},
        {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        {"name": "LABEL", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "LIMIT", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
        {"name": "COLOUR2", "valueFrom": {"configMapKeyRef": {"name": "cfg", "key": "colour"}}},
        {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "sec", "key": "password"}}},
        {"name": "OPTIONAL", "valueFrom": {"secretKeyRef": {"name": "none", "key": "x", "optional": true}}},
    ]);
    let mut env = env.as_array().unwrap().clone();
    env[1]["value"] = json!("$(PLAIN)-$$(PLAIN)-$(NOBODY)");
    let main = container(
        "main",
        "env",
        json!({"env": env, "envFrom": [{"configMapRef": {"name": "cfg"}, "prefix": "CFG_"}],
        "resources": {"limits": {"memory": "48Mi"}}}),
    );
    let text = ns.output_of("env", json!({"containers": [main]}));
    let has = |line: &str| assert!(text.lines().any(|l| l == line), "no {line} in\n{text}");
    for line in [
        "PLAIN=a",
        "COMPOSED=a-$(PLAIN)-$(NOBODY)",
        "NAME=env",
        "LABEL=env",
        "LIMIT=48",
        "COLOUR2=red",
        "PASSWORD=hunter2",
        "CFG_colour=red",
        "CFG_shape=round",
        "HOSTNAME=env",
    ] {
        has(line);
    }
    has(&format!("NAMESPACE={}", ns.name));
    has(&format!("NODE={}", Cluster::get().node));
    let address = ns.get("env")["status"]["podIP"].as_str().unwrap_or_default().to_owned();
    has(&format!("ADDRESS={address}"));
    assert!(!text.contains("OPTIONAL="), "{text}");
    assert!(text.contains("KUBERNETES_SERVICE_HOST="), "{text}");
}

#[test]
fn command_and_arguments_expand_variables() {
    let ns = Namespace::new("args");
    let main = json!({"name": "main", "image": Cluster::get().image("busybox"), "command": ["echo", "$(WORD)"], "args": ["$(WORD)", "$$(WORD)", "$(NONE)"],
        "env": [{"name": "WORD", "value": "hi"}]});
    assert_eq!(ns.output_of("args", json!({"containers": [main]})), "hi hi $(WORD) $(NONE)\n");
}

#[test]
fn a_missing_secret_key_keeps_the_container_waiting() {
    let ns = Namespace::new("nosecret");
    let main = container(
        "main",
        IDLE,
        json!({"env": [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "x"}}}]}),
    );
    ns.pod("waits", main);
    let message = ns.wait_reason("waits", "CreateContainerConfigError");
    assert!(message.contains("absent"), "{message}");
    ns.apply(&json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "absent"}, "stringData": {"x": "1"}}));
    ns.wait_ready("waits");
}

#[test]
fn a_missing_volume_is_an_event_and_mends_itself() {
    let ns = Namespace::new("nomount");
    let main = container("main", IDLE, json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}));
    ns.pod_with(
        "waits",
        json!({"containers": [main], "volumes": [volume("v", json!({"configMap": {"name": "later"}}))]}),
    );
    ns.wait_event("waits", "FailedMount", "later");
    ns.apply(
        &json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "later"}, "data": {"k": "v"}}),
    );
    ns.until("waits", "Running", LONG, |pod| (pod["status"]["phase"] == "Running").then_some(()));
}

#[test]
fn volumes_of_every_kind_with_their_modes() {
    let ns = Namespace::new("volumes");
    data(&ns);
    let mount = |name: &str| json!({"name": name, "mountPath": format!("/v/{name}")});
    let mounts = ["cfg", "items", "sec", "down", "all", "empty", "mem"].map(mount);
    let main = container(
        "main",
        "cat /v/cfg/colour /v/items/deep/shape; stat -Lc %a /v/items/deep/shape; cat /v/sec/password; echo; cat /v/down/labels; echo; \
        cat /v/all/colour /v/all/name; echo; echo x > /v/empty/x && cat /v/empty/x; grep -c ' /v/mem tmpfs ' /proc/mounts; (echo y > /v/cfg/colour) 2>&1 || echo read-only",
        json!({"volumeMounts": mounts}),
    );
    let text = ns.output_of("all", json!({"containers": [main], "volumes": [
        volume("cfg", json!({"configMap": {"name": "cfg", "items": [{"key": "colour", "path": "colour"}]}})),
        volume("items", json!({"configMap": {"name": "cfg", "items": [{"key": "shape", "path": "deep/shape", "mode": 0o440}]}})),
        volume("sec", json!({"secret": {"secretName": "sec", "defaultMode": 0o400}})),
        volume("down", json!({"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}})),
        volume("all", json!({"projected": {"sources": [{"configMap": {"name": "cfg"}}, {"downwardAPI": {"items": [{"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}}]}})),
        volume("empty", json!({"emptyDir": {}})),
        volume("mem", json!({"emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}})),
    ]}));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "redround440", "{text}");
    assert_eq!(lines[1..6], ["hunter2", "app=\"all\"", "redall", "x", "1"], "{text}");
    assert!(text.ends_with("read-only\n"), "{text}");
}

#[test]
fn a_mounted_configmap_follows_its_object() {
    let ns = Namespace::new("update");
    data(&ns);
    let main = container("main", IDLE, json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}));
    ns.pod_with(
        "watch",
        json!({"containers": [main], "volumes": [volume("v", json!({"configMap": {"name": "cfg"}}))]}),
    );
    ns.wait_ready("watch");
    assert_eq!(ns.exec("watch", "cat /v/colour").ok(), "red");
    ns.apply(&json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "cfg"}, "data": {"colour": "blue"}}));
    eventually_within(LONG, "the new colour, and the old shape gone", || {
        let seen = ns.exec("watch", "cat /v/colour; ls /v").text();
        if seen == "bluecolour\n" { Ok(()) } else { Err(seen) }
    });
}

#[test]
fn the_serviceaccount_token_opens_the_api() {
    let ns = Namespace::new("token");
    ns.running("box", IDLE);
    let dir = "/var/run/secrets/kubernetes.io/serviceaccount";
    assert_eq!(ns.exec("box", &format!("cat {dir}/namespace")).ok(), ns.name);
    assert!(ns.exec("box", &format!("cat {dir}/ca.crt")).ok().contains("BEGIN CERTIFICATE"));
    let token = ns.exec("box", &format!("cat {dir}/token")).ok();
    let review =
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}});
    let answer = ns.call(&["create", "-o", "json", "-f", "-"]).stdin(review.to_string()).json();
    assert_eq!(answer["status"]["authenticated"], true);
    assert_eq!(answer["status"]["user"]["username"], format!("system:serviceaccount:{}:default", ns.name));
    assert_eq!(answer["status"]["user"]["extra"]["authentication.kubernetes.io/pod-name"][0], "box");
}

#[test]
fn secrets_lie_on_tmpfs_only() {
    let ns = Namespace::new("tmpfs");
    ns.apply(&json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "sec"}, "stringData": {"k": "needle-in-a-secret-4711"}}));
    let main = container(
        "main",
        IDLE,
        json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}], "env": [{"name": "E", "valueFrom": {"secretKeyRef": {"name": "sec", "key": "k"}}}]}),
    );
    ns.pod_with(
        "keeps",
        json!({"containers": [main], "volumes": [volume("v", json!({"secret": {"secretName": "sec"}}))]}),
    );
    ns.wait_ready("keeps");
    // grep -x stays on one file system: what it reads is on disk.
    let find = std::process::Command::new("find")
        .arg(Cluster::get().root_dir())
        .args([
            "-xdev",
            "-type",
            "f",
            "-size",
            "-2M",
            "-exec",
            "grep",
            "-l",
            "needle-in-a-secret-4711",
            "{}",
            "+",
        ])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&find.stdout), "");
    let log = std::fs::read(Cluster::get().dir.join("run/moxlet.log")).unwrap_or_default();
    assert!(!String::from_utf8_lossy(&log).contains("needle-in-a-secret"), "a secret is in the log");
}

#[test]
fn hostname_hosts_and_resolver() {
    let ns = Namespace::new("names");
    let spec = json!({"hostname": "given", "subdomain": "sub", "hostAliases": [{"ip": "192.0.2.7", "hostnames": ["seven"]}], "dnsPolicy": "None",
        "dnsConfig": {"nameservers": ["192.0.2.53"], "searches": ["example.test"], "options": [{"name": "ndots", "value": "3"}]},
        "containers": [busybox("hostname; cat /etc/hostname /etc/hosts /etc/resolv.conf")]});
    let text = ns.output_of("names", spec);
    assert!(text.starts_with("given\ngiven\n"), "{text}");
    let address = ns.get("names")["status"]["podIP"].as_str().unwrap_or_default().to_owned();
    assert!(text.contains(&format!("{address}\tgiven.sub.{}.svc.cluster.local\tgiven", ns.name)), "{text}");
    for part in [
        "127.0.0.1\tlocalhost",
        "192.0.2.7\tseven",
        "nameserver 192.0.2.53",
        "search example.test",
        "options ndots:3",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
}

#[test]
fn pods_reach_each_other_by_address() {
    let ns = Namespace::new("reach");
    ns.pod("web", json!({"name": "main", "image": Cluster::get().image("web")}));
    ns.running("client", IDLE);
    ns.wait_ready("web");
    let address = ns.get("web")["status"]["podIP"].as_str().unwrap().to_owned();
    assert!(ns.exec("client", &format!("timeout 10 wget -qO- http://{address}/")).ok().contains("Moxlet"));
}
