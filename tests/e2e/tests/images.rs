//! Which pod gets which image: pull secrets, pull policies, tags that move.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    net::TcpListener,
    process::{Child, Command, Stdio},
};

use moxlet_tests_e2e::{Cluster, Namespace, container, eventually};
use serde_json::{Value, json};

const IDLE: &str = "trap 'exit 0' TERM; while true; do sleep 1 & wait $!; done";
/// `ci` with the password `right`.
const HTPASSWD: &str = "ci:$2y$05$abcdefghijklmnopqrstuu8xaCxxL82bnl.UY74PMksDxIJShppPC\n";

/// A registry on loopback that lets only `ci` in; it ends with the test.
struct Registry {
    address: String,
    server: Child,
    _dir: tempfile::TempDir,
}

impl Registry {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::write(path("htpasswd"), HTPASSWD).unwrap();
        let config = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\"}}\n\
             auth: {{htpasswd: {{realm: test, path: {}}}}}\n",
            path("data"),
            path("htpasswd")
        );
        fs::write(path("config.yml"), config).unwrap();
        let server = Command::new("docker-registry")
            .args(["serve", &path("config.yml")])
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually("the registry with a login", || {
            let url = format!("http://{address}/v2/");
            let asked = Command::new("curl").args(["-sf", "--noproxy", "*", "-u", "ci:right", &url]).output();
            if asked.unwrap().status.success() { Ok(()) } else { Err(url) }
        });
        Self { address, server, _dir: dir }
    }

    /// A copy of a demo image, which has this name then.
    fn image(&self, of: &str, path: &str) -> String {
        let name = format!("{}/{path}", self.address);
        copy(of, &name, &["--dest-creds", "ci:right"]);
        name
    }

    /// A pull secret for this registry.
    fn secret(&self, ns: &Namespace, name: &str, password: &str) {
        let config = json!({"auths": {&self.address: {"username": "ci", "password": password}}});
        ns.apply(&json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": "kubernetes.io/dockerconfigjson",
            "stringData": {".dockerconfigjson": config.to_string()},
        }));
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = (self.server.kill(), self.server.wait());
    }
}

/// Copies a demo image.
fn copy(of: &str, name: &str, more: &[&str]) {
    let (from, to) = (format!("docker://{}", Cluster::get().image(of)), format!("docker://{name}"));
    let mut skopeo = Command::new("skopeo");
    skopeo.args(["copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false"]).args(more);
    assert!(skopeo.args([&from, &to]).status().unwrap().success());
}

fn with(image: &str, policy: &str, secret: Option<&str>) -> Value {
    let main = container("main", IDLE, json!({"image": image, "imagePullPolicy": policy}));
    let secrets: Vec<Value> = secret.iter().map(|name| json!({"name": name})).collect();
    json!({"containers": [main], "imagePullSecrets": secrets})
}

#[test]
fn a_pod_gets_a_private_image_by_its_own_pull_secrets_alone() {
    let (ns, registry) = (Namespace::new("secrets"), Registry::start());
    let image = registry.image("busybox", "team/app:1");
    registry.secret(&ns, "right", "right");
    registry.secret(&ns, "wrong", "not-it");
    ns.pod_with("let-in", with(&image, "IfNotPresent", Some("right")));
    ns.wait_ready("let-in");

    // The image is here now: that is no leave for others to use it.
    ns.pod_with("without", with(&image, "IfNotPresent", None));
    ns.wait_event("without", "Failed", "authorization failed");
    ns.wait_reason("without", "ImagePullBackOff");
    ns.pod_with("wrong", with(&image, "IfNotPresent", Some("wrong")));
    ns.wait_event("wrong", "Failed", "authorization failed");
    ns.wait_event("wrong", "Failed", "ErrImagePull");
    ns.pod_with("never", with(&image, "Never", None));
    ns.wait_reason("never", "ErrImageNeverPull");
    for name in ["without", "wrong", "never"] {
        let text = ns.events(name).join("\n") + &ns.get(name)["status"].to_string();
        assert!(!text.contains("not-it"), "a password in an event or status: {text}");
    }

    // Who has shown the secret needs no registry any more.
    drop(registry);
    ns.pod_with("again", with(&image, "IfNotPresent", Some("right")));
    ns.wait_ready("again");
    ns.wait_event("again", "Pulled", "already present on machine");
}

#[test]
fn always_gets_the_image_that_a_tag_was_moved_to() {
    let ns = Namespace::new("moved");
    let image = format!("{}/test/moved-{}:1", Cluster::get().registry, std::process::id());
    let look = |name: &str, policy: &str| {
        let main = container(
            "main",
            "test -d /www && echo new || echo old",
            json!({"image": image, "imagePullPolicy": policy}),
        );
        ns.output_of(name, json!({"containers": [main]})).trim().to_owned()
    };
    copy("busybox", &image, &[]);
    assert_eq!(look("first", "Always"), "old");
    copy("web", &image, &[]);
    assert_eq!(look("present", "IfNotPresent"), "old");
    assert_eq!(look("always", "Always"), "new");
    assert_eq!(look("after", "IfNotPresent"), "new");
}
