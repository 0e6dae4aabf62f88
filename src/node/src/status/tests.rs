//! A publisher before an API server that rejects, delays, forgets, or answers for another pod.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, PodCondition, PodStatus, Secret};
use serde_json::{Value, json};

use super::{
    Publisher, SUPPORTED, Shown, Target,
    compare::{IN_FLIGHT, Verdict, judge},
    patch::patch,
};
use crate::{
    cluster::{Cluster, Token},
    error::{Error, Result},
};

/// What the server does with a patch.
enum Reaction {
    Accept,
    Refuse(u16),
    AnotherPod,
}

/// An API server that holds one pod.
#[derive(Default)]
struct Server {
    pod: Mutex<Value>,
    patches: Mutex<u32>,
    reactions: Mutex<VecDeque<Reaction>>,
}

fn object(value: &mut Value) -> &mut serde_json::Map<String, Value> {
    if !value.is_object() {
        *value = json!({});
    }
    value.as_object_mut().unwrap()
}

/// What a strategic merge does, as far as a pod's status needs it.
fn merge(into: &mut Value, with: &Value) {
    let into = object(into);
    for (key, value) in with.as_object().unwrap() {
        match value {
            Value::Null => drop(into.remove(key)),
            Value::Object(_) => merge(into.entry(key).or_insert(json!({})), value),
            Value::Array(list) if key == "conditions" => {
                let old = into.entry(key).or_insert(json!([])).as_array_mut().unwrap();
                for item in list {
                    let place = old.iter().position(|o| o["type"] == item["type"]);
                    match (place, item["$patch"] == "delete") {
                        (Some(i), true) => drop(old.remove(i)),
                        (None, true) => {}
                        (Some(i), false) => merge(&mut old[i], item),
                        (None, false) => {
                            let mut new = json!({});
                            merge(&mut new, item);
                            old.push(new);
                        }
                    }
                }
            }
            Value::Array(list) => {
                let plain: Vec<_> = list.iter().filter(|i| i["$patch"].is_null()).cloned().collect();
                into.insert(key.clone(), plain.into());
            }
            other => drop(into.insert(key.clone(), other.clone())),
        }
    }
}

impl Server {
    fn new() -> Arc<Self> {
        let pod = json!({"metadata": {"name": "web", "uid": "u", "resourceVersion": "1"}, "status": {}});
        Arc::new(Self { pod: Mutex::new(pod), ..Self::default() })
    }

    fn react(&self, reactions: impl IntoIterator<Item = Reaction>) {
        self.reactions.lock().unwrap().extend(reactions);
    }

    /// The pod as a watch shows it.
    fn shown(&self) -> Pod {
        serde_json::from_value(self.pod.lock().unwrap().clone()).unwrap()
    }

    /// Another controller writes something.
    fn write(&self, status: &Value) -> Pod {
        let mut pod = self.pod.lock().unwrap();
        merge(&mut pod["status"], status);
        let version: u64 = pod["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
        pod["metadata"]["resourceVersion"] = json!((version + 1).to_string());
        drop(pod);
        self.shown()
    }

    fn patches(&self) -> u32 {
        *self.patches.lock().unwrap()
    }

    async fn patched(&self, times: u32) {
        while self.patches() < times {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn ready(&self) -> PodCondition {
        let status = self.shown().status.unwrap();
        status.conditions.unwrap().into_iter().find(|c| c.type_ == "Ready").unwrap()
    }
}

#[async_trait]
impl Cluster for Server {
    async fn config_map(&self, _: &str, name: &str) -> Result<ConfigMap> {
        Err(Error::NotFound { kind: "configmap", name: name.into() })
    }

    async fn secret(&self, _: &str, name: &str) -> Result<Secret> {
        Err(Error::NotFound { kind: "secret", name: name.into() })
    }

    async fn token(&self, _: &Pod, _: Option<&str>, _: Option<i64>) -> Result<Token> {
        Err(Error::NotFound { kind: "serviceaccount", name: "default".into() })
    }

    async fn patch_status(&self, _: &str, _: &str, patch: &Value) -> Result<Option<Pod>> {
        *self.patches.lock().unwrap() += 1;
        let reaction = self.reactions.lock().unwrap().pop_front().unwrap_or(Reaction::Accept);
        let error = |code| {
            let status = kube::core::Status { code, message: "no".into(), ..Default::default() };
            Error::api("patch")(kube::Error::Api(Box::new(status)))
        };
        match reaction {
            Reaction::Accept => Ok(Some(self.write(&patch["status"]))),
            Reaction::Refuse(code) => Err(error(code)),
            Reaction::AnotherPod => {
                let mut pod = self.shown();
                pod.metadata.uid = Some("another".into());
                Ok(Some(pod))
            }
        }
    }

    async fn delete_pod(&self, _: &str, _: &str, _: &str) -> Result<()> {
        Ok(())
    }

    async fn create_pod(&self, _: &Pod) -> Result<()> {
        Ok(())
    }
}

fn condition(kind: &str, holds: bool, reason: Option<&str>) -> PodCondition {
    PodCondition {
        type_: kind.into(),
        status: if holds { "True" } else { "False" }.into(),
        reason: reason.map(str::to_owned),
        message: reason.map(|r| format!("because of {r}")),
        ..PodCondition::default()
    }
}

fn status(phase: &str, conditions: Vec<PodCondition>) -> Arc<PodStatus> {
    Arc::new(PodStatus { phase: Some(phase.into()), conditions: Some(conditions), ..PodStatus::default() })
}

fn publisher(server: &Arc<Server>) -> Publisher {
    let target = Target { namespace: "default".into(), name: "web".into(), uid: "u".into() };
    Publisher::new(server.clone(), target)
}

#[tokio::test]
async fn what_a_controller_wrote_while_the_node_was_away_is_written_over_though_nothing_changed_here() {
    let server = Server::new();
    let publisher = publisher(&server);
    publisher.publish(status("Running", vec![condition("Ready", true, None)]));
    publisher.settled().await;
    publisher.shown(&server.shown());
    let node_away = json!({"conditions": [{"type": "Ready", "status": "False", "reason": "NodeNotReady"}]});
    publisher.shown(&server.write(&node_away));
    server.patched(2).await;
    let ready = server.ready();
    assert_eq!((ready.status.as_str(), ready.reason), ("True", None));
}

#[tokio::test]
async fn conditions_of_other_controllers_are_left_alone() {
    let server = Server::new();
    let publisher = publisher(&server);
    publisher.publish(status("Running", vec![condition("Ready", true, None)]));
    publisher.settled().await;
    publisher.shown(&server.write(&json!({"conditions": [{"type": "example.com/gate", "status": "True"}]})));
    publisher.publish(status("Failed", vec![condition("Ready", false, Some("PodFailed"))]));
    publisher.settled().await;
    let kinds: Vec<_> =
        server.shown().status.unwrap().conditions.unwrap().into_iter().map(|c| c.type_).collect();
    assert_eq!(kinds, ["Ready", "example.com/gate"]);
}

#[tokio::test]
async fn reasons_and_messages_go_when_a_condition_turns_true() {
    let server = Server::new();
    let publisher = publisher(&server);
    let refused = condition(SUPPORTED, false, Some("UnsupportedField"));
    publisher
        .publish(status("Pending", vec![condition("Ready", false, Some("ContainersNotReady")), refused]));
    publisher.settled().await;
    assert_eq!(server.ready().reason.as_deref(), Some("ContainersNotReady"));
    publisher.publish(status("Running", vec![condition("Ready", true, None)]));
    publisher.settled().await;
    assert_eq!((server.ready().reason, server.ready().message), (None, None));
    let conditions = server.shown().status.unwrap().conditions.unwrap();
    assert!(!conditions.iter().any(|c| c.type_ == SUPPORTED), "a condition that holds no more is gone");
}

#[tokio::test]
async fn a_rejected_status_is_not_waited_for_but_named() {
    for code in [400, 403, 422] {
        let server = Server::new();
        server.react([Reaction::Refuse(code)]);
        let publisher = publisher(&server);
        publisher.publish(status("Failed", Vec::new()));
        publisher.settled().await;
        assert!(publisher.rejection().unwrap().contains(&code.to_string()));
        publisher.publish(status("Succeeded", Vec::new()));
        publisher.settled().await;
        assert_eq!(publisher.rejection(), None, "it was accepted after all");
    }
}

#[tokio::test]
async fn faults_are_tried_again_until_the_status_is_accepted() {
    let server = Server::new();
    server.react([Reaction::Refuse(500), Reaction::Refuse(429)]);
    let publisher = publisher(&server);
    publisher.publish(status("Running", Vec::new()));
    publisher.settled().await;
    assert_eq!(server.patches(), 3);
    assert_eq!(server.shown().status.unwrap().phase.as_deref(), Some("Running"));
}

#[tokio::test]
async fn an_answer_for_another_pod_of_the_name_ends_the_matter() {
    let server = Server::new();
    server.react([Reaction::AnotherPod]);
    let publisher = publisher(&server);
    publisher.publish(status("Running", Vec::new()));
    publisher.settled().await;
    assert_eq!((server.patches(), publisher.rejection()), (1, None));
}

#[test]
fn only_what_a_node_writes_is_a_difference_and_a_copy_on_its_way_is_waited_for() {
    let shown = |version, phase: &str, conditions| Shown {
        uid: "u".into(),
        version: Some(version),
        status: status(phase, conditions),
    };
    let ready = || vec![condition("Ready", true, None)];
    let answer = shown(5, "Running", ready());
    let mut with_gate = ready();
    with_gate.push(condition("example.com/gate", false, None));
    let fresh = Duration::from_secs(1);
    for (copy, age, verdict) in [
        (shown(5, "Running", ready()), fresh, Verdict::Same),
        (shown(6, "Running", with_gate), fresh, Verdict::Same),
        (shown(6, "Running", vec![condition("Ready", false, None)]), fresh, Verdict::Differs),
        (shown(4, "Pending", ready()), fresh, Verdict::Wait(IN_FLIGHT - fresh)),
        // As after an API server was restored from a snapshot: its versions begin anew.
        (shown(4, "Pending", ready()), IN_FLIGHT, Verdict::Differs),
    ] {
        assert_eq!(judge(&copy, &answer, age), verdict, "{copy:?}");
    }
}

#[test]
fn a_patch_says_null_for_what_is_not_there() {
    let patch = patch("u", &PodStatus::default());
    for key in ["reason", "message", "podIP", "podIPs"] {
        assert!(patch["status"].as_object().unwrap()[key].is_null(), "{key}");
    }
    assert_eq!(patch["metadata"]["uid"], "u");
}
