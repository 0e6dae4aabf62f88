//! What the end-to-end stories need: the cluster that `scripts/cluster up` made (named by the environment), kubectl,
//! namespaces that remove themselves, pods in few words, and waits that say what they waited for.
//!
//! A missing cluster fails a test, it does not skip it.
// Support of tests: what goes wrong here is a failed test, and a panic is how a test fails.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
// Callers write `json!(…)` in place.
#![allow(clippy::needless_pass_by_value)]

mod kubectl;
mod namespace;
mod wait;

use std::{path::PathBuf, sync::OnceLock};

pub use kubectl::{Finished, Kubectl};
pub use namespace::{Namespace, busybox, container, tolerations};
pub use wait::{LONG, SHORT, eventually, eventually_within};

/// The cluster under test.
#[derive(Debug)]
pub struct Cluster {
    /// Where `scripts/cluster` keeps it.
    pub dir: PathBuf,
    /// The built kubectl; another vendor's may be in PATH.
    pub kubectl: PathBuf,
    /// The admin's.
    pub kubeconfig: PathBuf,
    /// Name of the only node.
    pub node: String,
    /// `host:port` of the local registry.
    pub registry: String,
    /// `host:port` of the node's API.
    pub kubelet: String,
    /// Directory of the binaries.
    pub bin: PathBuf,
    /// The node's bridge.
    pub bridge: String,
}

impl Cluster {
    /// The one named by the environment.
    pub fn get() -> &'static Self {
        static CLUSTER: OnceLock<Cluster> = OnceLock::new();
        let var = |name: &str| {
            std::env::var(name).unwrap_or_else(|_| {
                panic!("{name} is not set: run `scripts/test e2e`, or `scripts/cluster up DIR` and `. DIR/env` first")
            })
        };
        CLUSTER.get_or_init(|| Self {
            dir: var("MOXLET_CLUSTER").into(),
            kubectl: var("MOXLET_KUBECTL").into(),
            kubeconfig: var("KUBECONFIG").into(),
            node: var("MOXLET_NODE"),
            registry: var("MOXLET_REGISTRY"),
            kubelet: var("MOXLET_KUBELET"),
            bin: var("MOXLET_BIN").into(),
            bridge: var("MOXLET_BRIDGE"),
        })
    }

    /// A demo image by its name: `busybox` or `web`.
    pub fn image(&self, name: &str) -> String {
        format!("{}/demo/{name}:1", self.registry)
    }

    /// Where the project lies, asked when the tests run: cargo takes over a program that was built in another copy of it.
    pub fn project() -> PathBuf {
        PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap()).join("../..").canonicalize().unwrap()
    }

    /// Runs a verb of `scripts/cluster` on this cluster and gives what it printed.
    pub fn script(&self, verb: &str) -> String {
        let output = std::process::Command::new(Self::project().join("scripts/cluster"))
            .arg(verb)
            .arg(&self.dir)
            .output()
            .unwrap();
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "scripts/cluster {verb}: {text}");
        text
    }

    /// The directory below which `moxlet up` keeps everything.
    pub fn root_dir(&self) -> PathBuf {
        self.dir.join("moxlet")
    }

    /// `curl` on the node's API with the cluster's CA: HTTP status and body.
    pub fn node_api(&self, path: &str, token: Option<&str>) -> (u16, String) {
        let mut curl = std::process::Command::new("curl");
        curl.args(["-s", "--noproxy", "*", "-w", "\n%{http_code}", "--cacert"])
            .arg(self.dir.join("control-plane/ca.crt"));
        if let Some(token) = token {
            curl.args(["-H", &format!("Authorization: Bearer {token}")]);
        }
        let output = curl.arg(format!("https://{}{path}", self.kubelet)).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, status) = text.rsplit_once('\n').unwrap_or(("", "0"));
        (status.trim().parse().unwrap_or(0), body.to_owned())
    }
}
