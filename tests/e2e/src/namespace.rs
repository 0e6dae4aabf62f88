//! A namespace of its own for every test, with pods in few words; it goes with its pods when the test ends.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use serde_json::{Value, json};

use crate::{Cluster, Finished, Kubectl, eventually, eventually_within};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// What lets a pod onto Moxlet's node.
pub fn tolerations() -> Value {
    json!([{"key": "virtual-kubelet.io/provider", "operator": "Exists", "effect": "NoSchedule"},
           {"key": "node.kubernetes.io/not-ready", "operator": "Exists"},
           {"key": "node.kubernetes.io/unreachable", "operator": "Exists"}])
}

/// A container `main` of the busybox image that runs a shell script.
pub fn busybox(script: &str) -> Value {
    container("main", script, json!({}))
}

/// A busybox container with further fields.
pub fn container(name: &str, script: &str, more: Value) -> Value {
    let image = Cluster::get().image("busybox");
    merge(json!({"name": name, "image": image, "command": ["sh", "-c", script]}), more)
}

fn merge(mut base: Value, more: Value) -> Value {
    if let (Some(base), Value::Object(more)) = (base.as_object_mut(), more) {
        base.extend(more);
    }
    base
}

/// A namespace.
#[derive(Debug)]
pub struct Namespace {
    /// Its name.
    pub name: String,
}

impl Namespace {
    /// Makes one whose name begins with `topic`, and waits for its ServiceAccount.
    pub fn new(topic: &str) -> Self {
        let name = format!("{topic}-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        Kubectl::new(None, &["create", "namespace", &name]).run().ok();
        let namespace = Self { name };
        eventually("the default ServiceAccount", || {
            let found = namespace.kubectl(&["get", "serviceaccount", "default"]);
            if found.code == 0 { Ok(()) } else { Err(found.stderr) }
        });
        namespace
    }

    /// `kubectl -n …`, to its end.
    pub fn kubectl(&self, args: &[&str]) -> Finished {
        Kubectl::new(Some(&self.name), args).run()
    }

    /// As [`Self::kubectl`], not run yet.
    pub fn call(&self, args: &[&str]) -> Kubectl {
        Kubectl::new(Some(&self.name), args)
    }

    /// Applies an object.
    pub fn apply(&self, object: &Value) {
        self.call(&["apply", "-f", "-"]).stdin(object.to_string()).run().ok();
    }

    /// Creates a pod of one container, which must tolerate nothing itself.
    pub fn pod(&self, name: &str, container: Value) {
        self.pod_with(name, json!({"containers": [container]}));
    }

    /// Creates a pod from its spec; tolerations and a short grace are added where they are missing.
    pub fn pod_with(&self, name: &str, spec: Value) {
        let base = json!({"tolerations": tolerations(), "terminationGracePeriodSeconds": 1, "enableServiceLinks": false});
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": merge(base, spec)});
        self.apply(&pod);
    }

    /// Creates a pod of one shell script and waits until it is Ready.
    pub fn running(&self, name: &str, script: &str) {
        self.pod(name, busybox(script));
        self.wait_ready(name);
    }

    /// Runs a script as a pod to its end; gives its log.
    pub fn output_of(&self, name: &str, spec: Value) -> String {
        self.pod_with(name, merge(json!({"restartPolicy": "Never"}), spec));
        self.wait_phase(name, "Succeeded");
        self.logs(name)
    }

    /// The pod as it is now; null if there is none.
    pub fn get(&self, name: &str) -> Value {
        let found = self.kubectl(&["get", "pod", name, "-o", "json", "--ignore-not-found"]).ok();
        if found.trim().is_empty() { Value::Null } else { serde_json::from_str(&found).unwrap() }
    }

    /// A pod's log.
    pub fn logs(&self, name: &str) -> String {
        self.kubectl(&["logs", name]).ok()
    }

    /// A command in a pod's first container.
    pub fn exec(&self, name: &str, script: &str) -> Finished {
        self.kubectl(&["exec", name, "--", "sh", "-c", script])
    }

    /// Polls a pod until `check` finds what it looks for.
    pub fn until<T>(
        &self,
        name: &str,
        what: &str,
        limit: Duration,
        mut check: impl FnMut(&Value) -> Option<T>,
    ) -> T {
        eventually_within(limit, &format!("pod {name}: {what}"), || {
            let pod = self.get(name);
            check(&pod).ok_or_else(|| format!("{}\n{}", pod["status"], self.events(name).join("\n")))
        })
    }

    /// Waits for the condition Ready.
    pub fn wait_ready(&self, name: &str) {
        self.until(name, "Ready", crate::SHORT, |pod| {
            let conditions = pod["status"]["conditions"].as_array()?;
            conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True").then_some(())
        });
    }

    /// Waits for a phase.
    pub fn wait_phase(&self, name: &str, phase: &str) {
        self.until(name, phase, crate::SHORT, |pod| (pod["status"]["phase"] == phase).then_some(()));
    }

    /// Waits until the first container waits with a reason; gives the message.
    pub fn wait_reason(&self, name: &str, reason: &str) -> String {
        self.until(name, reason, crate::LONG, |pod| {
            let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
            (waiting["reason"] == reason).then(|| waiting["message"].as_str().unwrap_or_default().to_owned())
        })
    }

    /// Waits until the pod is gone from the API.
    pub fn wait_gone(&self, name: &str) {
        self.until(name, "gone", crate::SHORT, |pod| pod.is_null().then_some(()));
    }

    /// `Reason: message` of the pod's events.
    pub fn events(&self, name: &str) -> Vec<String> {
        let selector = format!("involvedObject.name={name}");
        let events = self.call(&["get", "events", "-o", "json", "--field-selector", &selector]).json();
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        events["items"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|e| format!("{}: {}", text(&e["reason"]), text(&e["message"])))
            .collect()
    }

    /// Waits for an event whose reason and message contain these.
    pub fn wait_event(&self, name: &str, reason: &str, message: &str) {
        eventually(&format!("event {reason} of {name} about {message:?}"), || {
            let events = self.events(name);
            let found = events.iter().any(|e| e.starts_with(&format!("{reason}:")) && e.contains(message));
            if found { Ok(()) } else { Err(events.join("\n")) }
        });
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let name = &self.name;
        if std::thread::panicking() {
            for args in
                [["get", "pods", "-o", "wide"].as_slice(), &["get", "events", "--sort-by=.lastTimestamp"]]
            {
                eprintln!("{}", self.call(args).run().text());
            }
        }
        drop(self.call(&["delete", "pods", "--all", "--grace-period=1", "--timeout=60s"]).run());
        drop(Kubectl::new(None, &["delete", "namespace", name, "--wait=false"]).run());
    }
}
